"""Runs under real conditions: papermill, nbdev_clean, a disk that fills up, processes that are killed."""
import json, os, pickle, signal, subprocess, sys, time, warnings
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch

from localmamba import runs
from localmamba.parameters import comments, compare_parameters, refuse_values
from localmamba.runs import (
    Run, collect, device_folder, environment, read_csv, read_json, run_name, summarise, write_csv, write_json)

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')]).rstrip(os.pathsep))


def make(root, seed=0, label='a run', **params): return Run('exp', 'data', {'seed': seed, **params}, label, root)


def state(epoch, n=8): return {'epoch': epoch, 'w': torch.full((n,), float(epoch))}


# names

def test_names_never_change():
    assert run_name({'seed': 0, 'lr': 1e-3, 'directions': ('h', 'w2')}, 'horizontal + local / seed 0') \
        == 'horizontal-local-seed-0-5db103e2'


def test_names_depend_on_values_not_on_order_or_container():
    a = run_name({'x': [1, 2], 'y': None}, 'l')
    assert a == run_name({'y': None, 'x': (1, 2)}, 'l') != run_name({'x': [2, 1], 'y': None}, 'l')


@pytest.mark.parametrize('params', [{'x': float('inf')}, {'x': {1, 2}}, {'x': torch.ones(1)}])
def test_parameters_json_cannot_hold_are_named(params):
    with pytest.raises(ValueError, match=r"params\['x'\].*allowed"): run_name(params, 'l')


def test_label_and_folder_names(tmp_path):
    with pytest.raises(ValueError, match='label.*allowed'): run_name({}, ' / ')
    with pytest.raises(ValueError, match='experiment.*allowed'): Run('../up', 'data', {}, 'l', tmp_path)


# records

def test_csv_keeps_every_bit(tmp_path):
    values = [0.1 + 0.2, 1e-300, 123456789.12345679, 5e-324, 1/3]
    write_csv(tmp_path/'t.csv', [{'epoch': i, 'v': v, 's': f'text {i}'} for i, v in enumerate(values)])
    back = read_csv(tmp_path/'t.csv')
    assert back.v.tolist() == values and back.epoch.tolist() == list(range(5)) and back.s[1] == 'text 1'
    write_csv(tmp_path/'t2.csv', back)
    assert (tmp_path/'t.csv').read_bytes() == (tmp_path/'t2.csv').read_bytes()


def test_finished_means_metrics_are_whole(tmp_path):
    run = make(tmp_path).start()
    (run.dir/'metrics.json').write_text('{"top1": 7')
    assert not run.finished
    run.finish({'top1': 70.})
    assert run.finished and make(tmp_path).metrics == {'top1': 70.}
    with pytest.raises(RuntimeError, match='finished'): run.start()


def test_nan_metric_is_refused_and_run_stays_unfinished(tmp_path):
    run = make(tmp_path).start()
    with pytest.raises(ValueError, match='top1'): run.finish({'top1': float('nan')})
    assert not run.finished


def test_edited_params_are_noticed(tmp_path):
    run = make(tmp_path).start()
    write_json(run.dir/'params.json', {'seed': 5})
    with pytest.raises(ValueError, match='params'): run.start()


def test_resume_elsewhere_is_recorded(tmp_path):
    run = make(tmp_path).start(backend='reference')
    run.start(backend='reference')
    assert 'earlier' not in read_json(run.dir/'env.json')
    run.start(backend='numba')
    env = read_json(run.dir/'env.json')
    assert env['backend'] == 'numba' and [e['backend'] for e in env['earlier']] == ['reference']


def test_environment_tells_nothing_about_the_person():
    told = json.dumps(environment())
    private = {str(Path.home()), str(ROOT), os.uname().nodename, os.environ.get('USER', '')}
    assert not [p for p in private if len(p) > 4 and p in told]
    assert environment()['torch'] == torch.__version__


@pytest.mark.parametrize('flags, folder', [('avx2 fma', 'amd-epyc'), ('avx2 avx512f avx512bw', 'amd-epyc-avx512'),
                                           (None, 'amd-epyc')])   # None: no Linux
def test_processors_of_one_name_do_not_share_a_folder(flags, folder, monkeypatch, tmp_path):
    path = tmp_path/'cpuinfo'
    if flags: path.write_text(f'processor\t: 0\nmodel name\t: AMD EPYC\nflags\t\t: fpu {flags}\n')
    monkeypatch.setattr(runs.torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(runs, 'device_name', lambda: 'AMD EPYC')
    monkeypatch.setattr(runs._has_avx512, '__defaults__', (path,))
    assert device_folder() == folder and device_folder('AMD EPYC') == 'amd-epyc'   # a name given is kept
    monkeypatch.setattr(runs.torch.cuda, 'is_available', lambda: True)
    assert device_folder() == 'amd-epyc'   # a GPU's name says all


def test_history_columns_are_fixed(tmp_path):
    run = make(tmp_path).start()
    run.log({'epoch': 0, 'loss': 1.})
    with pytest.raises(ValueError, match='columns'): run.log({'epoch': 1, 'top1': 3.})
    with pytest.raises(ValueError, match='columns'): make(tmp_path, seed=1).start().log({'loss': 1.})


# checkpoints

def test_history_goes_back_with_the_checkpoint(tmp_path):
    run = make(tmp_path).start()
    for epoch in range(4):
        run.log({'epoch': epoch, 'loss': float(epoch)})
        if epoch < 3: run.save_checkpoint(state(epoch + 1))
    assert run.load_checkpoint()['epoch'] == 3
    assert run.history.epoch.tolist() == [0, 1, 2]


@pytest.mark.parametrize('kept', [0, 1, 100, 0.5, -1])
def test_cut_off_checkpoint_falls_back(tmp_path, kept):
    run = make(tmp_path).start()
    for epoch in range(3):
        run.log({'epoch': epoch, 'loss': float(epoch)})
        run.save_checkpoint(state(epoch + 1, 1000))
    whole = run.checkpoint_path.read_bytes()
    run.checkpoint_path.write_bytes(whole[:int(len(whole) * kept) if isinstance(kept, float) else kept])
    with pytest.warns(UserWarning, match='cannot be read'): found = run.load_checkpoint()
    assert found['epoch'] == 2 and run.history.epoch.tolist() == [0, 1]


def test_flipped_bits_never_become_weights(tmp_path):
    run, rng = make(tmp_path).start(), np.random.default_rng(0)
    for epoch in range(2): run.save_checkpoint(state(epoch + 1, 200))
    whole, seen = run.checkpoint_path.read_bytes(), set()
    for i in rng.integers(0, len(whole), 150):
        run.checkpoint_path.write_bytes(whole[:i] + bytes([whole[i] ^ (1 << rng.integers(8))]) + whole[i + 1:])
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            found = run.load_checkpoint()
        assert torch.equal(found['w'], torch.full((200,), float(found['epoch'])))
        seen.add(found['epoch'])
    assert 1 in seen


def test_nothing_whole_means_from_the_start(tmp_path):
    run = make(tmp_path).start()
    for epoch in range(2):
        run.log({'epoch': epoch, 'loss': 1.})
        run.save_checkpoint(state(epoch + 1))
    for path in (run.checkpoint_path, run.previous_path): path.write_bytes(b'')
    with pytest.warns(UserWarning): assert run.load_checkpoint() is None
    assert len(run.history) == 0


def test_no_code_is_run_from_a_checkpoint(tmp_path):
    class Evil:
        def __reduce__(self): return Path.touch, (tmp_path/'ran',)
    run = make(tmp_path).start()
    run.checkpoint_path.write_bytes(pickle.dumps(Evil()))
    with pytest.warns(UserWarning): assert run.load_checkpoint() is None
    assert not (tmp_path/'ran').exists()
    with pytest.raises(ValueError, match='state.*allowed'): run.save_checkpoint({'epoch': 1, 'x': Path('x')})
    with pytest.raises(ValueError, match="state.'epoch'"): run.save_checkpoint({'w': 1})


@pytest.mark.skipif(os.name != 'posix', reason='needs a limit on file size')
def test_full_disk_leaves_everything_whole(tmp_path):
    import resource
    run = make(tmp_path).start()
    run.log({'epoch': 0, 'loss': 1.})
    run.save_checkpoint(state(1))
    before = {p.name: p.read_bytes() for p in run.dir.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError): run.save_checkpoint(state(2, 100_000))
        with pytest.raises(OSError): write_json(run.dir/'params.json', ['x' * 9000])
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {p.name: p.read_bytes() for p in run.dir.iterdir()} == before
    assert run.load_checkpoint()['epoch'] == 1


WRITER = '''
import sys, torch
from localmamba.runs import Run
run = Run('exp', 'data', {'seed': 0}, 'a run', sys.argv[1]).start()
found = run.load_checkpoint()
epoch = found['epoch'] if found else 0
print('ready', flush=True)
while True:
    run.log({'epoch': epoch, 'loss': 1.0 / (epoch + 1)})
    epoch += 1
    run.save_checkpoint({'epoch': epoch, 'w': torch.full((300_000,), float(epoch))})
'''


@pytest.mark.skipif(os.name != 'posix', reason='needs SIGKILL')
def test_killed_while_writing(tmp_path):
    done = 0
    for attempt in range(3):
        process = subprocess.Popen([sys.executable, '-c', WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == 'ready\n'
        time.sleep(0.31 + 0.173 * attempt)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        run = make(tmp_path)
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            found = run.load_checkpoint()
        assert found['epoch'] > done and torch.equal(found['w'], torch.full((300_000,), float(found['epoch'])))
        done = found['epoch']
        assert run.history.epoch.tolist() == list(range(done))
        assert run.history.loss.tolist() == [1.0 / (e + 1) for e in range(done)]
    run.start()
    run.finish({'top1': 1.})
    assert sorted(p.name for p in run.dir.iterdir()) == ['env.json', 'history.csv', 'metrics.json', 'params.json']


# tables

def test_collect_and_summarise(tmp_path):
    assert len(collect('exp', 'data', tmp_path)) == 0
    for row, seed, top1 in (('b', 0, 1.), ('b', 1, 3.), ('a', 0, 5.)):
        make(tmp_path, seed, f'{row} {seed}', row=row, directions=['h'], epochs=2).start().finish({'top1': top1})
    make(tmp_path, 7, 'unfinished', row='b').start()
    make(tmp_path, 0, 'trial', row='b', directions=['h'], epochs=1).start().finish({'top1': 0.})
    frame = collect('exp', 'data', tmp_path, where={'epochs': 2})
    assert len(frame) == 3 and len(collect('exp', 'data', tmp_path)) == 4
    frame = frame.sort_values(['row', 'seed'], ascending=[False, True])
    table = summarise(frame, ['row', 'directions'], 'top1')
    assert table.row.tolist() == ['b', 'a'] and table['mean'].tolist() == [2., 5.] and table.n.tolist() == [2, 1]
    assert table['std'][0] == pytest.approx(2 ** .5) and np.isnan(table['std'][1])
    with pytest.raises(ValueError, match='top5.*allowed'): summarise(frame, 'row', 'top5')


# parameters

PARAMS, CHECK = 'epochs = 3 # passes\nlr: float = 1e-3\nlimit = None\nseeds = [0, 1]', 'p = check_parameters()'


@pytest.mark.parametrize('cells, expected', [
    ([PARAMS, CHECK], {}),
    (['x', PARAMS, CHECK, 'y = 1', CHECK], {}),
    ([PARAMS, '# Parameters\nlimit = 5\nseeds = (3,)', CHECK], {'limit': 5, 'seeds': (3,)}),
    ([PARAMS, '# Parameters\nepochs = 5', CHECK, 'steps = 4', 'print(1)', CHECK], {'epochs': 5}),
    ([PARAMS, '# Parameters\nepochs = 5', CHECK, PARAMS, CHECK], {}),
])
def test_cells_in_the_order_people_run_them(cells, expected):
    defaults, given = compare_parameters(cells)
    assert given == expected


@pytest.mark.parametrize('cells, error, words', [
    ([PARAMS, '# Parameters\nepoch = 5', CHECK], ValueError, "'epoch' .did you mean 'epochs'"),
    ([PARAMS, '# Parameters\nseeds = "0,1"', CHECK], TypeError, "'seeds'.*-y"),
    ([PARAMS, '# Parameters\nepochs = None', CHECK], TypeError, 'epochs'),
    ([PARAMS, '# Parameters\nlr = True', CHECK], TypeError, 'lr'),
    (['# Parameters\nepochs = 5', 'import os', PARAMS, CHECK], ValueError, "tagged 'parameters'"),
    (['import os', '# Parameters\nepochs = 5', PARAMS, CHECK], ValueError, "tagged 'parameters'"),
    (['import os', CHECK], ValueError, 'first cell after'),
])
def test_cells_that_are_refused(cells, error, words):
    with pytest.raises(error, match=words): compare_parameters(cells)


def notebook(path, tagged=True):
    cells = [nbformat.v4.new_markdown_cell('# A tiny experiment', metadata={'scrolled': True}),
             nbformat.v4.new_code_cell('import json\nfrom localmamba.runs import check_parameters'),
             nbformat.v4.new_code_cell("epochs = 3 # passes\nlr = 1e-3 # rate\nout = 'out.json' # file",
                                       metadata={'tags': ['parameters']} if tagged else {}),
             nbformat.v4.new_code_cell("p = check_parameters()\nwith open(out, 'w') as f: json.dump(p, f)")]
    kernel = {'display_name': 'python3', 'language': 'python', 'name': 'python3'}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={'kernelspec': kernel}), path)
    return path


def clean(path, settings):
    (path.parent/'settings.ini').write_text(settings)
    (path.parent/'localmamba').mkdir(exist_ok=True)
    nbdev_clean = Path(sys.executable).with_name('nbdev_clean')
    subprocess.run([nbdev_clean, '--fname', path.name], cwd=path.parent, check=True, capture_output=True)


def papermill(path, *args):
    command = [sys.executable, '-m', 'papermill', str(path), str(path.with_name('done.ipynb')), '--no-progress-bar']
    return subprocess.run([*command, *args], cwd=path.parent, capture_output=True, text=True)


def test_cleaned_notebook_honours_p(tmp_path):
    path = notebook(tmp_path/'tiny.ipynb')
    clean(path, (ROOT/'settings.ini').read_text())
    cells = nbformat.read(path, 4).cells
    assert (cells[0].metadata, cells[2].metadata) == ({}, {'tags': ['parameters']})
    said = papermill(path, '-p', 'epochs', '7', '-p', 'lr', '1', '-p', 'out', str(tmp_path/'o.json'))
    assert said.returncode == 0, said.stderr
    assert (tmp_path/'o.json').read_text() == json.dumps({'epochs': 7, 'lr': 1.0, 'out': str(tmp_path/'o.json')})


def test_a_lost_tag_is_noticed(tmp_path):
    path = notebook(tmp_path/'tiny.ipynb')
    settings = (ROOT/'settings.ini').read_text()
    assert 'allowed_cell_metadata_keys = tags' in settings
    clean(path, settings.replace('allowed_cell_metadata_keys = tags', 'allowed_cell_metadata_keys ='))
    assert nbformat.read(path, 4).cells[2].metadata == {}
    said = papermill(path, '-p', 'epochs', '7')
    assert said.returncode and "the cell tagged 'parameters' was not found" in said.stderr
    assert not (tmp_path/'out.json').exists()


@pytest.mark.slow
@pytest.mark.parametrize('given, words', [(('-p', 'epoch', '7'), "got 'epoch' (did you mean 'epochs'?); allowed"),
                                          (('-p', 'epochs', '7.5'), "parameter 'epochs': got 7.5 (float)")])
def test_papermill_with_wrong_parameters(tmp_path, given, words):
    said = papermill(notebook(tmp_path/'tiny.ipynb'), *given)
    assert said.returncode and words in said.stderr
    assert not (tmp_path/'out.json').exists()


def test_without_a_history_the_plain_values_are_returned(tmp_path):
    from execnb.shell import CaptureShell
    from IPython.core.interactiveshell import InteractiveShell
    before = InteractiveShell._instance
    try:
        shell = CaptureShell()
        shell.run('from localmamba.runs import check_parameters\nepochs = 3; name = "x"')
        shell.run('p = check_parameters()')
        assert shell.exc is None and shell.user_ns['p'] == {'epochs': 3, 'name': 'x'}
    finally: InteractiveShell._instance = before


CELL = """epochs = 30  # passes over the data
seed = 0  # of everything
n_train = 400  # images; 0: all
share = 0.1  # of the images, 0 to 1
lr = 1e-3  # peak
warmup = -1  # steps; -1: a tenth
rows = ['h', 'v']  # what is compared
size = [64, 80]  # pixels
model = 'nano'  # of timm
label = ''  # shown
"""
DEFAULTS = dict(epochs=30, seed=0, n_train=400, share=0.1, lr=1e-3, warmup=-1, rows=['h', 'v'], size=[64, 80],
                model='nano',
                label='')

@pytest.mark.parametrize('wrong, error, words', [
    (dict(epochs=0), ValueError, "parameter 'epochs': got 0; allowed: 1 to"), (dict(epochs=-3), ValueError, 'got -3'),
    (dict(epochs=10 ** 15), ValueError, 'allowed: 1 to 4294967295'), (dict(n_train=-1), ValueError, 'allowed: 0 to'),
    (dict(share=1.5), ValueError, r'allowed: 0 to 1 \(of the images\)$'),
    (dict(share=float('nan')), ValueError, 'got nan'),
    (dict(lr=0.), ValueError, 'not 0'), (dict(lr=float('inf')), ValueError, 'got inf'),
    (dict(warmup=-2), ValueError, 'allowed: -1'),
    (dict(rows=[]), ValueError, "'rows': got an empty list"),
    (dict(rows=['h', 3]), TypeError, 'got 3 .int. in it; allowed: str'),
    (dict(size=[64, -1]), ValueError, 'got -1 in it'), (dict(size=['64']), TypeError, 'allowed: int'),
    (dict(model=''), ValueError, "'model': got ''"), (dict(model='giant'), ValueError, "allowed: 'nano', 'micro'")])
def test_values_that_make_no_sense(wrong, error, words):
    with pytest.raises(error, match=words):
        refuse_values(DEFAULTS, DEFAULTS | wrong, comments(CELL), model=('nano', 'micro'))

def test_values_that_do():
    right = dict(epochs=1, n_train=0, share=1., warmup=-1, rows=['w2'], size=[1, 2, 3], label='x', model='micro',
                 seed=2 ** 32 - 1)
    refuse_values(DEFAULTS, DEFAULTS | right, comments(CELL), model=('nano', 'micro'))


@pytest.mark.parametrize('name, wrong', [('weights', 'nowhere.pth'), ('checkpoint', '.'), ('row', 'a\0'),
                                         ('ignored', [-1]), ('ignored', ['a']), ('ignored', [None])])
def test_files_and_numbers_by_what_is_said_of_them(tmp_path, name, wrong):
    cell = "weights = ''  # a file\ncheckpoint = ''  # another\nrow = ''  # text\nignored = []  # more numbers\n"
    defaults = dict(weights='', checkpoint='', row='', ignored=[])
    with pytest.raises((ValueError, TypeError), match=f"parameter '{name}': got "):
        refuse_values(defaults, defaults | {name: wrong}, comments(cell))
    (tmp_path/'w.pt').write_bytes(b'x')
    refuse_values(defaults, defaults | dict(weights=str(tmp_path/'w.pt'), ignored=[0, 255], row='any'), comments(cell))
