"Experiments on two processes: what a notebook describes, trained under torchrun."
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from localmamba.launch import main, read_parameters, run_cells
from test_detect import TINY as COCO
from test_segment import TINY as ADE20K

ROOT = Path(__file__).resolve().parent.parent


def project(folder):
    (folder/'results').mkdir(parents=True)
    for name in ('settings.ini', 'results/paper', 'nbs'):
        (shutil.copytree if (ROOT/name).is_dir() else shutil.copy)(ROOT/name, folder/name)
    return folder


@pytest.mark.parametrize('name, words', [('coco', COCO), ('ade20k', ADE20K)])
def test_two_processes_train_what_a_notebook_describes(tmp_path, name, words):
    folder = project(tmp_path/'project')
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'agg'}
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', '-m',
               'localmamba.launch', f'nbs/{name}.ipynb']
    for key, value in (parameters(words) | {'batch_size': 4}).items():
        command += ['-p', key, json.dumps(value)] # batch norm needs two images a process
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout[-2000:], done.stderr[-3000:])
    run, = (folder/f'results/{name}/scenes/runs').iterdir()
    metrics, history = json.loads((run/'metrics.json').read_text()), (run/'history.csv').read_text().splitlines()
    assert (run/'weights.pt').exists() and len(history) == 3
    assert all(np.isfinite(metrics[k]) for k in ('train_loss', 'valid_loss'))


def parameters(words):
    import yaml
    found, words = {}, list(words)
    while words:
        flag, *words = words
        if flag == '-p':
            key, value, *words = words
            found[key] = yaml.safe_load(value) if value else ''
        else:
            text, *words = words
            found |= yaml.safe_load(text)
    return found


def test_a_notebook_without_training_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has 0 cells tagged 'training'"): run_cells(ROOT/'nbs/ablation_scan.ipynb', {})


@pytest.mark.parametrize('name', ['imagenet', 'coco', 'ade20k'])
def test_every_experiment_refuses_at_once_and_leaves_no_record(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    lists = {'imagenet': {}, 'coco': {'scene_size': []}, 'ade20k': {'scene_kinds': []}}[name]
    for wrong in ({'n_train': -1}, {'n_valid': 'many'}, {'seed': -1}, {'amp': 'fp8'}, {'recipe_name': 'best'},
                  {'model': ''},
                  {'threads': 1.5}, {'sede': 1}, {'data_dir': 'nowhere'}, *([lists] if lists else [])):
        with pytest.raises((ValueError, TypeError, FileNotFoundError)) as said:
            run_cells(ROOT/f'nbs/{name}.ipynb', wrong)
        (given, value), = wrong.items()
        assert given in str(said.value) or value == 'nowhere' and 'nowhere' in str(said.value), said.value
    assert not (tmp_path/'results').exists()


@pytest.mark.parametrize('parameters',
                         [{'seed = 3; open("ran", "w").close(); x': 1}, {'__import__("os")': 1},
                          {'seed\nopen("ran", "w")': 1},
                                        {'import os': 1}, {1: 2}, {'seed': {1, 2}}])
def test_names_are_not_run(tmp_path, monkeypatch, parameters):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, TypeError)): run_cells(ROOT/'nbs/coco.ipynb', parameters)
    assert not list(tmp_path.iterdir())


def test_files_of_parameters_and_devices(tmp_path, capsys):
    for text, words in (('- 1', 'holds a list'), ('a: [', 'cannot be read'),
                        ('a: !!python/object/apply:os.getcwd []', 'cannot be read')):
        (tmp_path/'x.yaml').write_text(text)
        with pytest.raises(ValueError, match=words): read_parameters(tmp_path/'x.yaml')
    with pytest.raises(ValueError, match='file: .*no.yaml cannot be read'): read_parameters(tmp_path/'no.yaml')
    assert read_parameters('',
                           [('seed', '3'), ('rows', '[a, b]'),
                            ('label', '')]) == {'seed': 3, 'rows': ['a', 'b'], 'label': ''}
    with pytest.raises(SystemExit): main([str(ROOT/'nbs/coco.ipynb'), '--device', 'tpu'])
    assert "invalid choice: 'tpu'" in capsys.readouterr().err
    with pytest.raises(ValueError, match='allowed: the path of an .ipynb'): main(['nowhere.ipynb'])
