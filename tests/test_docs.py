"What the README and the how-to pages say: commands name what exists, Python runs, links resolve."
import json
import re
import runpy
import shlex
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PAGES = [ROOT/'README.md', ROOT/'CONTRIBUTING.md', *sorted((ROOT/'docs').glob('*.md')), ROOT/'data/README.md',
         ROOT/'results/README.md']
FENCED = re.compile(r'^```(\w*)\n(.*?)^```', re.M | re.S)


def blocks(page, *languages):
    return [code for language, code in FENCED.findall(page.read_text()) if language in languages]


def commands():
    "Every line of a shell block and every command in backticks, once, with its page."
    seen = set()
    for param in lines():
        if param.values not in seen: yield param
        seen.add(param.values)


def lines():
    for page in PAGES[:-2]:  # the last two show folders, not commands
        for block in blocks(page, '', 'sh', 'bash'):
            for line in re.sub(r'\\\n\s*', ' ', block).splitlines():
                line = line.split('  #')[0].strip()
                if line and not line.startswith('#') and '=$(' not in line:
                    yield pytest.param(line, id=f'{page.name}: {line[:70]}')
        for line in re.findall(r'`((?:make|papermill|python -m) [^`<>…]+)`', page.read_text()):
            yield pytest.param(line, id=f'{page.name}: {line[:70]}')


def parameters(notebook):
    "Names in the notebook's cell of parameters."
    cells = [c for c in json.loads(notebook.read_text())['cells'] if 'parameters' in c['metadata'].get('tags', [])]
    return set(re.findall(r'^(\w+)(?::[^=\n]+)? *=', ''.join(cells[0]['source']), re.M))


def check_notebook(words):
    "A notebook, its configuration file and its parameters exist."
    notebook = next(ROOT/w for w in words if w.endswith('.ipynb') and w.startswith('nbs/'))
    assert notebook.exists(), notebook
    names = []
    for flag, value in zip(words, words[1:]):
        if flag == '-f': names += yaml.safe_load((ROOT/value).read_text())
        if flag == '-p': names.append(value)
        if flag == '-y': names += yaml.safe_load(value)
    assert set(names) <= parameters(notebook), set(names) - parameters(notebook)


@lru_cache
def run(*command):
    "Standard error of a command that must succeed."
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize('line', commands())
@pytest.mark.filterwarnings('ignore:.*found in sys.modules')
def test_a_command_names_what_exists(line, monkeypatch):
    words = shlex.split(re.sub(r'^(srun |\w+=\S+ )+', '', line))
    tool = Path(words[0]).name
    if any(w.endswith('.ipynb') and w.startswith('nbs/') for w in words): check_notebook(words)
    elif tool == 'make':
        goals = [w for w in words[1:] if '=' not in w]
        run('make', '-n', *goals)
        if extra := next((w[5:] for w in words if w.startswith('ARGS=')), ''):
            if (ROOT/f'nbs/{goals[0]}.ipynb').exists(): check_notebook([f'nbs/{goals[0]}.ipynb', *shlex.split(extra)])
    elif tool in ('python', 'python3') and words[1:2] == ['-m']:
        monkeypatch.setattr(sys, 'argv', [words[2], '--help'])
        try: runpy.run_module(words[2], run_name='__main__')
        except SystemExit as end: assert not end.code, end
    elif tool == 'pip': assert set(re.findall(r'\[(\w+)\]', line)) <= {'dev', 'cuda', 'onnx'}
    elif tool in ('git', 'cd'): pass
    else: pytest.fail(f'no check for this command: {line}')


LONG = {'segmentation.md'}  # trains


@pytest.mark.parametrize('page', [pytest.param(p, id=p.name, marks=[pytest.mark.slow] * (p.name in LONG))
                                  for p in PAGES if blocks(p, 'python')])
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for code in blocks(page, 'python'): exec(compile(code, page.name, 'exec'), names)


DEEPER = [p for p in (ROOT/'docs').rglob('*.md') if p not in PAGES]


@pytest.mark.parametrize('page', PAGES + DEEPER, ids=lambda p: p.name)
def test_links_resolve(page):
    for target in re.findall(r'\]\(([^)#\s]+)', FENCED.sub('', page.read_text())):
        if '://' not in target: assert (page.parent/target).exists(), target
