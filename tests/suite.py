"""Every notebook of the library, then pytest, two at a time, saying what is done and about how long is left.

python tests/suite.py [--check] [--remember]
    --check     only what the last commit needs: package in step with the notebooks, ruff, the fast tests
    --remember  write the seconds that each part took to tests/seconds.json, from which the rest is estimated
"""
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT, BIN = Path(__file__).resolve().parent.parent, Path(sys.executable).parent
SECONDS = ROOT/'tests'/'seconds.json'
FAST = 'tests/test_layout.py', 'tests/test_readme.py', 'tests/test_golden.py', 'tests/test_models.py'


class Progress:
    "Which parts are done, and how long the others may take, by the seconds of an earlier run and the pace of this one."
    def __init__(self, parts, workers=2):
        known = json.loads(SECONDS.read_text()) if SECONDS.exists() else {}
        known = {part: seconds for part, seconds in known.items() if seconds > 0}
        usual = sorted(known.values())[len(known) // 2] if known else 10.
        self.expected, self.workers = {part: known.get(part, usual) for part in parts}, workers
        self.start, self.done, self.took = time.time(), 0., {}

    def finished(self, part, seconds):
        self.took[part] = round(seconds, 1)
        self.done += self.expected.get(part, 0.)
        passed = time.time() - self.start
        pace = passed / self.done if self.done else 1 / self.workers
        left = pace * (sum(self.expected.values()) - self.done)
        rest = f'about {left // 60:.0f}:{left % 60:02.0f} left'
        print(f'{len(self.took):3d}/{len(self.expected)}  {part}  {seconds:.0f} s · {rest}', flush=True)


def notebooks(progress):
    "Test the library's notebooks with nbdev; True if all pass."
    command = [BIN/'nbdev_test', '--n_workers', '2', '--do_print']
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env=os.environ | {'PYTHONUNBUFFERED': '1'})   # lines as they come
    started, other = {}, []
    for line in process.stdout:
        if found := re.match(r'Starting .*?(nbs/.*\.ipynb)', line): started[found[1]] = time.time()
        elif found := re.match(r'- Completed .*?(nbs/.*\.ipynb)', line):
            progress.finished(found[1], time.time() - started.get(found[1], progress.start))
        else: other.append(line)
    if process.wait(): print(''.join(other))
    return process.returncode == 0


def tests(progress):
    "Run pytest; `conftest` writes a line for each file that is done. True if all pass."
    command = [sys.executable, '-m', 'pytest', '-n', '2', '--dist', 'worksteal', '--durations', '20']
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True,
                               env=os.environ | {'LOCALMAMBA_SUITE': '1', 'PYTHONUNBUFFERED': '1'})
    for line in process.stdout:
        if found := re.match(r'finished (tests/\S+) ([\d.]+)', line): progress.finished(found[1], float(found[2]))
        elif line.strip(): print(line, end='', flush=True)
    return process.wait() == 0


def check():
    "The short check: is the package in step, is ruff content, do the fast tests pass?"
    before = {path: path.read_bytes() for path in (ROOT/'localmamba').rglob('*.py')}
    fast = [f for f in FAST if (ROOT/f).exists()]
    steps = (('the package is what the notebooks export', [BIN/'nbdev_export']),
             ('ruff', [BIN/'ruff', 'check', '-q', '.']),
             ('fast tests', [sys.executable, '-m', 'pytest', '-n', '2', *fast]))
    for name, command in steps:
        print(f'{name} …', flush=True)
        if subprocess.run(command, cwd=ROOT).returncode: return False
        modules = (ROOT/'localmamba').rglob('*.py')
        changed = [str(path.relative_to(ROOT)) for path in modules if before.get(path) != path.read_bytes()]
        if changed:
            print(f'package: got {", ".join(changed)} out of step; it is exported now: commit it with its notebook')
            return False
    return True


def main():
    if '--check' in sys.argv: return check()
    books = [str(p.relative_to(ROOT)) for p in sorted((ROOT/'nbs/lib').rglob('*.ipynb'))
             if '.ipynb_checkpoints' not in p.parts]
    files = [str(p.relative_to(ROOT)) for p in sorted((ROOT/'tests').glob('test_*.py'))]
    progress = Progress(books + files)
    good = notebooks(progress)
    good = tests(progress) and good
    if '--remember' in sys.argv and good:
        SECONDS.write_text(json.dumps(dict(sorted(progress.took.items())), indent=1) + '\n')
    print(f'{"Everything passed" if good else "Something failed, see above"}; {time.time() - progress.start:.0f} s')
    return good


if __name__ == '__main__': sys.exit(not main())
