"Experiments on two processes: what a notebook describes, trained under torchrun."
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from localmamba.launch import run_cells
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
