"The experiment notebooks as their users run them: papermill in a process, interrupted or with a wrong word."
import ast
import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from localmamba.files import read_yaml
from localmamba.parameters import comments, compare_parameters, refuse_values
from notebooks import ROOT, execute, papermill, project, said_by

GIVEN = dict(n_train=256, n_valid=64, epochs=2, depth=1, embed_dim=16, seeds=[0, 1], threads=1, model='local_vim_nano',
             rows=['horizontal', 'horizontal + local + SCAttn'], dims=[])
TINY = '-y', json.dumps(GIVEN)


def table(folder): return pd.read_csv(folder/'results/ablation_scan/digits/table.csv')


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
    folder = project(tmp_path_factory.mktemp('whole'))
    with pytest.MonkeyPatch.context() as moved:
        moved.chdir(folder)
        execute('ablation_scan', **GIVEN)
    return folder


def test_table_figure_and_records(uninterrupted):
    rows = table(uninterrupted)
    assert rows.row.tolist() == ['horizontal', 'horizontal + local + SCAttn'] and (rows.seeds == 2).all()
    assert rows.paper_top1.tolist() == [73.1, 75.8]
    results = uninterrupted/'results/ablation_scan/digits'
    assert (results/'table.png').stat().st_size > 5000
    runs = sorted((results/'runs').iterdir())
    assert len(runs) == 4
    files = {'params.json', 'env.json', 'history.csv', 'metrics.json'}
    for run in runs: assert {f.name for f in run.iterdir()} == files
    assert str(uninterrupted) not in (runs[0]/'env.json').read_text() + (runs[0]/'params.json').read_text()


def test_killed_and_started_again(uninterrupted, tmp_path):
    folder = project(tmp_path/'killed')
    process = papermill(folder, 'ablation_scan', *TINY, start_new_session=True)
    runs = folder/'results/ablation_scan/digits/runs'
    deadline = time.time() + 300
    while time.time() < deadline and not list(runs.glob('*/checkpoint.pt')): time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (runs.parent/'table.csv').exists() and list(runs.glob('*/history.csv'))
    said_by(papermill(folder, 'ablation_scan', *TINY))
    pd.testing.assert_frame_equal(table(folder).drop(columns='seconds'), table(uninterrupted).drop(columns='seconds'))


def test_finished_runs_are_not_run_again(uninterrupted, monkeypatch):
    before = {f: f.stat().st_mtime_ns for f in uninterrupted.glob('results/ablation_scan/digits/runs/*/metrics.json')}
    monkeypatch.chdir(uninterrupted)
    execute('ablation_scan', **GIVEN)
    assert before == {f: f.stat().st_mtime_ns for f in before}


@pytest.mark.parametrize('given, words', [
    (dict(rows=['diagonal']), r"'rows': got \['diagonal'\]; allowed: \['horizontal'"),
    (dict(dataset='cifar'), "'dataset': got 'cifar'; allowed: digits, cifar10, folder")])
def test_a_wrong_word_is_refused(tmp_path, monkeypatch, given, words):
    monkeypatch.chdir(project(tmp_path/'wrong'))
    with pytest.raises(ValueError, match=words): execute('ablation_scan', **given)
    assert not list(Path('results').rglob('metrics.json'))


EXPERIMENTS = sorted(p for p in (ROOT/'nbs').glob('[a-z]*.ipynb') if p.stem not in ('index', 'results'))


@pytest.mark.parametrize('path', EXPERIMENTS, ids=lambda p: p.stem)
def test_an_experiment_has_one_parameters_cell_and_its_outputs(path):
    notebook = json.loads(path.read_text())
    tagged = [c for c in notebook['cells'] if 'parameters' in c['metadata'].get('tags', [])]
    assert len(tagged) == 1
    assert notebook['metadata']['kernelspec']['language'] == 'python'
    assert any(c.get('outputs') for c in notebook['cells'])


CONFIGS = sorted((ROOT/'nbs/configs').glob('*/*.yaml'))


@pytest.mark.parametrize('path', CONFIGS, ids=lambda p: f'{p.parent.name}/{p.stem}')
def test_a_notebook_accepts_its_configurations(path):
    "Names, kinds and values, as papermill would give them."
    cells = json.loads((ROOT/f'nbs/{path.parent.name}.ipynb').read_text())['cells']
    source = next(''.join(c['source']) for c in cells if 'parameters' in c['metadata'].get('tags', []))
    given = read_yaml(path.read_text(encoding='utf-8'))
    injected = '# Parameters\n' + '\n'.join(f'{name} = {value!r}' for name, value in given.items())
    defaults, said = compare_parameters([source, injected, 'check_parameters()'])
    assert said == given
    refuse_values(defaults, defaults | given, comments(source), **allowed(cells))


def allowed(cells):
    "What a notebook tells `check_parameters`, as far as it is written out there."
    calls = [node for c in cells if c['cell_type'] == 'code' and 'check_parameters(' in ''.join(c['source'])
             for node in ast.walk(ast.parse(''.join(c['source'])))]
    words = [word for node in calls if isinstance(node, ast.Call) and ast.unparse(node.func) == 'check_parameters'
             for word in node.keywords]
    return {word.arg: ast.literal_eval(word.value) for word in words if isinstance(word.value, ast.Tuple)}


SMALL = dict(n_train=64, n_valid=32)
ABSURD = [
    ('ablation_scan', dict(patch_size=40), 'patch_size', '40; allowed for images of 32 pixels: 1 to 32'),
    ('ablation_scan', dict(warmup_epochs=7.), 'warmup_epochs', '7.0; allowed: at most 6, the number of epochs'),
    ('ablation_scan', dict(seeds=[1, 0, 1]), 'seeds', '1 more than once'),
    ('ablation_scan', dict(seeds=[2 ** 33]), 'seeds', '8589934592 in it; allowed: whole numbers, 0 to 4294967295'),
    ('ablation_scan', dict(rows=['cross', 'cross']), 'rows', "'cross' more than once"),
    ('ablation_scattn', dict(published=['nonsense']), 'published', r"\['nonsense'\]; allowed: \['local_vim_tiny'"),
    ('ablation_scattn', dict(published=['vim_tiny']), 'published', r"\['vim_tiny'\]; allowed: \['local_vim_tiny'"),
    ('ablation_scattn', dict(dims=[0]), 'dims', '0 in it; allowed: whole numbers, 1 to'),
    ('ablation_scattn', dict(patch_size=40), 'patch_size', '40; allowed for images of 32 pixels: 1 to 32'),
    ('ablation_scattn', dict(shared='nonsense'), 'shared', "'nonsense'; allowed: '', 'ablation_scan'"),
    ('ablation_search', dict(rows=['released']), 'rows', r"\['released'\], and no released list has 3 layers; allowed"),
    ('ablation_search', dict(warmup_epochs=3., search_epochs=2), 'warmup_epochs', '3.0; .* number of search_epochs'),
    ('ablation_search', dict(amp='fp8'), 'amp', "'fp8'; allowed: 'none', 'bf16'"),
    ('search_directions', dict(top=9), 'top', '9; allowed: at most 8, the number of candidates'),
    ('search_directions', dict(candidates=['h', 'v']), 'top', '4; allowed: at most 2, the number of candidates'),
    ('search_directions', dict(label_smoothing=2.), 'label_smoothing', '2.0; allowed: 0 to 1'),
    ('families', dict(rates={'Vim': '1e-3'}), 'rates', "'1e-3' for 'Vim'; .*write 1.0e-3"),
    ('families', dict(rates={'Vim': -1}), 'rates', "-1 for 'Vim'; allowed: numbers above 0"),
    ('families', dict(rates={'Vim': 0.}), 'rates', "0.0 for 'Vim'; allowed: numbers above 0"),
    ('families', dict(rates={'LocalVim, searched': .1}), 'rates', r"\['LocalVim, searched'\]; allowed: \['DeiT'"),
    ('families', dict(side=7, rows=['LocalVim, searched', 'ConvNeXt']), 'side', '7; allowed: 8 or more'),
    ('receptive_fields', dict(side=30), 'patch_size', '4; allowed for images of 30 pixels: 1, 3, 5, 15'),
    ('receptive_fields', dict(patch_size=5), 'patch_size', '5; allowed for images of 32 pixels: 1, 2, 4, 8, 16'),
    ('receptive_fields', dict(side=31), 'patch_size', '4; allowed for images of 31 pixels: none'),
    ('receptive_fields', dict(models=['Vim', 'DeiT'], embed_dim=28, depth=1, side=28), 'embed_dim', None),
    ('receptive_fields', dict(models=['DeiT'], embed_dim=30), 'embed_dim', '30; allowed: multiples of 4'),
    ('transfer', dict(scene_size=[64]), 'scene_size', r'\[64\]; allowed: two numbers .height and width'),
    ('transfer', dict(scene_size=[8, 8]), None, r'size: got \(8, 8\); allowed: two numbers of at least 32 pixels'),
    ('transfer', dict(patch_size=3), 'patch_size', '3; allowed: 2, 4')]


@pytest.mark.parametrize('name, given, parameter, words', ABSURD, ids=str)
def test_an_absurd_value_is_refused_before_anything_is_trained(tmp_path, monkeypatch, name, given, parameter, words):
    class Trained(Exception): pass
    def fit(*args, **options): raise Trained
    monkeypatch.chdir(project(tmp_path/'absurd'))
    monkeypatch.setattr('localmamba.train.fit', fit)
    refused = f"parameter '{parameter}': got {words}" if parameter else words
    with pytest.raises(ValueError if words else Trained, match=refused if words else None):
        execute(name, **({} if name == 'transfer' else SMALL) | given)
    assert not list(Path('results').rglob('params.json'))


@pytest.mark.parametrize('name, given, words', [
    ('transfer', dict(n_train=4, n_valid=2), 'record of VMamba seed 0 .*patch_size: got 4, recorded 2'),
    ('receptive_fields', SMALL | dict(patch_size=2, models=['VMamba']), r'.side: got 32, recorded 28\)'),
    ('receptive_fields', SMALL | dict(patch_size=2, side=28, seeds=[9]), 'no record of Vim seed 9')])
def test_what_families_has_recorded_otherwise_is_named(tmp_path, monkeypatch, name, given, words):
    monkeypatch.chdir(project(tmp_path/'other'))
    for row in ('Vim', 'VMamba'):
        record = Path('results/families/miniature/runs')/f'{row}-seed-0'
        record.mkdir(parents=True)
        (record/'params.json').write_text(json.dumps(dict(row=row, seed=0, side=28)))
        (record/'metrics.json').write_text(json.dumps(dict(top1=50.)))
    with pytest.raises(ValueError, match=f"parameter 'families': got 'miniature', .*{words}"):
        execute(name, **given, families='miniature')


def test_fields_are_cut_by_the_stages_of_the_model_that_was_measured(tmp_path, monkeypatch):
    "Not by those of this run: a record of `families` has two, and says nothing of dims."
    space = {'np': np, 'pd': pd}
    for cell in json.loads((ROOT/'nbs/receptive_fields.ipynb').read_text())['cells']:
        code = ''.join(cell['source'])
        if 'def stages' in code or 'def measures' in code:
            defined = [node for node in ast.parse(code).body if isinstance(node, ast.FunctionDef)]
            exec(compile(ast.Module(defined, []), 'receptive_fields', 'exec'), space)
    seen = []
    space['described'] = lambda field, side: seen.append(side) or {}
    (tmp_path/'runs/a').mkdir(parents=True)
    np.savez(tmp_path/'runs/a/fields.npz', before=np.ones(1), after=np.ones(1))
    lines = [dict(model='VMamba', dims=(8, 16, 32)), dict(model='VMamba', dims=np.nan), dict(model='Vim', dims=(8, 16))]
    space['measures'](tmp_path, pd.DataFrame([dict(run='a', seed=0, top1=1., patch_size=2) | line for line in lines]))
    assert seen[::2] == [8, 4, 2]
