"The experiments' notebooks as tests run them: their code in this process, or papermill in a process of its own."
import ast
import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from matplotlib import pyplot as plt

from localmamba.parameters import comments, declared, refuse_parameters, refuse_values

ROOT = Path(__file__).resolve().parent.parent


def project(folder):
    "A folder that counts as a project: results go there, not into this checkout."
    folder.mkdir(parents=True, exist_ok=True)
    (folder/'settings.ini').touch()
    shutil.copytree(ROOT/'results/paper', folder/'results/paper')
    return folder


def execute(name, **parameters):
    "Run a notebook's code in this process, with other parameters; what it displays, as text, and its names."
    shown, threads = [], torch.get_num_threads()
    said = lambda *things: shown.extend(getattr(it, 'data', None) or repr(it) for it in things if it is not None)
    space = {'__name__': '__main__', 'display': said}
    plt.switch_backend('agg')
    try:
        with patch('IPython.display.display', said):
            for cell in json.loads((ROOT/'nbs'/f'{name}.ipynb').read_text())['cells']:
                if cell['cell_type'] != 'code': continue
                tree = ast.parse(''.join(cell['source']))
                last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
                exec(compile(tree, name, 'exec'), space)
                if last is not None: said(eval(compile(ast.Expression(last.value), name, 'eval'), space))
                if 'parameters' in cell['metadata'].get('tags', []):
                    assert parameters.keys() <= space.keys()
                    space.update(parameters)
                    space['check_parameters'] = partial(checked, ''.join(cell['source']), space)
                plt.close('all')
    finally: torch.set_num_threads(threads)
    return '\n'.join(map(str, shown)), space


def checked(source, space, **allowed):
    "What `check_parameters` does where there is a history of cells: refuse values, give the parameters."
    defaults = declared(source)
    values = {name: space[name] for name in defaults}
    refuse_parameters(defaults, values)
    refuse_values(defaults, values, comments(source), **allowed)
    return values


def papermill(folder, name, *args, **options):
    "Start papermill on a notebook; what it says goes to the process's stdout."
    command = [sys.executable, '-m', 'papermill', ROOT/f'nbs/{name}.ipynb', folder/'out.ipynb', '--cwd', folder,
               '--no-progress-bar', *args]
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env=os.environ | {'PYTHONPATH': str(ROOT)}, **options)


def said_by(process, timeout=600):
    "Wait for a process that ends well; its output."
    text, _ = process.communicate(timeout=timeout)
    assert process.returncode == 0, text[-5000:]
    return text
