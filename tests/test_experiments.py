"The experiment notebooks as their users run them: papermill in a process, interrupted or with a wrong word."
import json
import os
import signal
import time
from pathlib import Path

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
    (dict(rows=['diagonal']), r"rows: got \['diagonal'\]; allowed: \['horizontal'"),
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
    refuse_values(defaults, defaults | given, comments(source))
