"Experiments on two processes: what a notebook describes, trained under torchrun."
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image

from localmamba.files import read_yaml
from localmamba.launch import main, read_parameters, run_cells
from localmamba.recipes import DETECTION, RECIPES, SEGMENTATION, recipe
from test_detect import TINY as COCO
from test_segment import TINY as ADE20K

ROOT = Path(__file__).resolve().parent.parent


def project(folder):
    (folder/'results').mkdir(parents=True)
    for name in ('settings.ini', 'results/paper', 'nbs'):
        (shutil.copytree if (ROOT/name).is_dir() else shutil.copy)(ROOT/name, folder/name)
    return folder


@pytest.mark.parametrize('name, words', [('coco', COCO), pytest.param('ade20k', ADE20K, marks=pytest.mark.slow)])
def test_two_processes_train_what_a_notebook_describes(tmp_path, name, words):
    folder = project(tmp_path/'project')
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'agg'}
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', '-m',
               'localmamba.launch', f'nbs/{name}.ipynb']
    for key, value in (words | {'batch_size': 4}).items():
        command += ['-p', key, json.dumps(value)] # batch norm needs two images a process
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout[-2000:], done.stderr[-3000:])
    run, = (folder/f'results/{name}/scenes/runs').iterdir()
    metrics, history = json.loads((run/'metrics.json').read_text()), (run/'history.csv').read_text().splitlines()
    assert (run/'weights.pt').exists() and len(history) == 3
    assert all(np.isfinite(metrics[k]) for k in ('train_loss', 'valid_loss'))


def test_a_notebook_without_training_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has 0 cells tagged 'training'"): run_cells(ROOT/'nbs/ablation_scan.ipynb', {})


@pytest.mark.parametrize('name', ['imagenet', 'coco', 'ade20k'])
def test_every_experiment_refuses_at_once_and_leaves_no_record(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    lists = {'imagenet': {}, 'coco': {'scene_size': []}, 'ade20k': {'scene_kinds': []}}[name]
    for wrong in ({'n_train': -1}, {'n_valid': 'many'}, {'seed': -1}, {'amp': 'fp8'}, {'recipe_name': 'best'},
                  {'model': ''}, *([{'recipe_options': {'epochs': -3}}] if name == 'imagenet' else []),
                  {'threads': 1.5}, {'sede': 1}, {'data_dir': 'nowhere'}, *([lists] if lists else [])):
        with pytest.raises((ValueError, TypeError, FileNotFoundError)) as said:
            run_cells(ROOT/f'nbs/{name}.ipynb', wrong)
        (given, value), = wrong.items()
        assert given.removesuffix('_options') in str(said.value) or 'nowhere' in str(said.value), said.value
    assert not (tmp_path/'results').exists()


def photographs(home):
    for split in ('train', 'val'):
        for i, cls in enumerate(('Äpfel und Birnen', 'b')):
            for n in range(4):
                (home/split/cls).mkdir(parents=True, exist_ok=True)
                pixels = np.random.default_rng(n).integers(0, 256, (20, 24, 3), dtype=np.uint8) // (1 + i)
                Image.fromarray(pixels).save(home/split/cls/f'Größe {n}.png')
    return home


def test_a_folder_of_photographs_without_a_configuration(tmp_path, monkeypatch, capsys):
    "`imagenet -p data_dir photos`, begun elsewhere, in folders with blanks and umlauts, all else as it is declared"
    import torch
    folder = photographs(tmp_path/'meine Bilder'/'Obst für später').parent
    monkeypatch.chdir(folder)
    small = {'model': 'test_local_vim', 'model_options': {}, 'epochs': 1}  # the default takes half a minute
    told = run_cells(ROOT/'nbs/imagenet.ipynb', {'data_dir': 'Obst für später', **small})
    first = told['run'].dir
    assert told['run'].finished and first.is_relative_to(folder/'results/imagenet/Obst-für-später')
    assert told['classes'] == ('b', 'Äpfel und Birnen') or told['classes'] == ('Äpfel und Birnen', 'b')
    said = capsys.readouterr().out
    assert f'no settings.ini in {folder} or above: data/ and results/ are those of this folder' in said
    pixels = 200 * np.ones((20, 24, 3), np.uint8)
    Image.fromarray(pixels).save(folder/'Obst für später/train/b/Größe 0.png')
    again = run_cells(ROOT/'nbs/imagenet.ipynb', {'data_dir': 'Obst für später', **small})
    assert again['run'].dir != first and 'their results go to' in capsys.readouterr().out
    torch.set_num_threads(1)


@pytest.mark.slow
def test_as_a_person_types_it(tmp_path):
    "One argument of papermill, LC_ALL=C, blanks and umlauts, from another folder: the whole default run of imagenet"
    folder = project(tmp_path/'mein Päckchen')
    photographs(folder/'Fotos für später')
    env = {k: v for k, v in os.environ.items() if not k.startswith(('LC_', 'LANG'))}
    env |= {'PYTHONPATH': str(ROOT), 'LC_ALL': 'C', 'MPLBACKEND': 'agg', 'OMP_NUM_THREADS': '1'}
    def papermill(where, *words):
        done = subprocess.run([sys.executable, '-m', 'papermill', *words], cwd=where, env=env, capture_output=True)
        assert done.returncode == 0, (done.stdout[-500:], done.stderr[-3000:])
        return done
    few = ['-p', 'n_train', '64', '-p', 'n_valid', '20', '-p', 'epochs', '1', '-y', 'rows: [horizontal]', '-y',
           'seeds: [0]']
    done = papermill(folder, 'nbs/ablation_scan.ipynb', *few)
    assert json.loads(done.stdout)['cells'] and (folder/'results/ablation_scan/digits/table.csv').exists()
    papermill(folder/'nbs', 'ablation_scan.ipynb', '../aus gegeben.ipynb', *few, '-p', 'dataset', 'folder', '-p',
              'data_dir', str(folder/'Fotos für später'), '-p', 'batch_size', '4', '-p', 'n_valid', '0', '-p',
              'n_train', '0')
    assert (folder/'aus gegeben.ipynb').exists() and (folder/'results/ablation_scan/folder/table.csv').exists()
    papermill(folder, 'nbs/imagenet.ipynb', 'out.ipynb', '-p', 'data_dir', 'Fotos für später')
    assert (folder/'results/imagenet/Fotos-für-später/table.csv').exists()


WRONG = [('small', {'epochs': -3}), ('small', {'epochs': 1.5}), ('small', {'lr': 0.}), ('small', {'lr': '1e-3'}),
         ('small', {'batch_size': 0}), ('paper', {'ema': 1.}), ('paper', {'drop_path': -.1}), ('paper', {'hflip': 2}),
         ('paper', {'scale': [1., .5]}), ('paper', {'scale': []}), ('paper', {'scale': [.1, .2, .3]}),
         ('paper', {'constant': 'never'}), ('paper', {'rule': 'mine'}), ('paper', {'repeats': 10**12}),
         ('paper', {'weight_decay': float('nan')}), ('paper', {'mixup': float('inf')}), ('paper', {'after': 'yes'}),
         ('1x', {'drops': [-1]}), ('1x', {'drops': ['a']}), ('1x', {'limits': [800]}), ('1x', {'samples': [0, 1]}),
         ('1x', {'mirror': 1.5}), ('release', {'crop': 0}), ('release', {'crop': [512, -1]}),
         ('release', {'average': 'all'}), ('release', {'ratio': [2., .5]}), ('release', {'photometric': 1})]

@pytest.mark.parametrize('name, changes', WRONG, ids=str)
def test_recipes_refuse_what_makes_no_sense(name, changes):
    (key, value), = changes.items()
    for recipes in (RECIPES, DETECTION, SEGMENTATION):
        if name not in recipes or key not in recipes[name]: continue
        with pytest.raises((ValueError, TypeError), match=f'recipe: {key}: got .*allowed: '):
            recipe(name, recipes, **changes)


@pytest.mark.parametrize('recipes, name, changes, words', [
    (RECIPES, 'paper', {'drop_path': 2}, 'recipe: drop_path: got 2; allowed: 0 to 0.9999999 (a share)'),
    (DETECTION, '1x', {'pad_to': -1}, 'recipe: pad_to: got -1; allowed: 0 to 4294967295'),
    (SEGMENTATION, 'scenes', {'limits': -1}, 'recipe: limits: got -1; allowed: two numbers from 1 to 100000'),
    (SEGMENTATION, 'release', {'crop': -1}, 'recipe: crop: got -1; allowed: whole numbers from 1'),
    (RECIPES, 'paper', {'scale': [0, 0]}, 'recipe: scale: got [0, 0]; allowed: two numbers from 0 to 1, the smaller '
                                          'first, not both 0')])
def test_recipes_say_once_what_is_allowed(recipes, name, changes, words):
    with pytest.raises(ValueError) as refused: recipe(name, recipes, **changes)
    assert str(refused.value) == words


def test_recipes_take_what_makes_sense():
    for recipes in (RECIPES, DETECTION, SEGMENTATION):
        for name, values in recipes.items(): assert recipe(name, recipes, **values) == values
    assert recipe('release', SEGMENTATION, crop=[64, 32], ratio=[1, 1], warmup=0)['crop'] == [64, 32]
    assert recipe('paper', min_lr=0., ema=0., mixup=0, epochs=1, scale=(.5, 1))['min_lr'] == 0


@pytest.mark.parametrize('options, words', [
    (dict(model='local_vim_nana'), "model: got 'local_vim_nana'; allowed: a name of timm.* local_vim_nano"),
    (dict(model='test_local_vim', model_options={'embd_dim': 8}), 'model_options: got .*embd_dim'),
    (dict(model='test_local_vim', model_options={'embed_dim': -8}), 'model_options: got .*embed_dim|embed_dim: got'),
    (dict(model='test_local_vmamba', model_options={'dims': 'wide'}), 'model_options: got|dims'),
    (dict(model='test_local_vim', model_options={'patch_size': 0}), 'model_options: got|patch_size: got'),
    (dict(model='test_local_vim', model_options={'depth': 2.5}), 'model_options: got|depth: got')])
def test_models_that_cannot_be_made_are_named(options, words):
    from localmamba.classify import classifier, settings
    with pytest.raises((ValueError, TypeError), match=words): classifier(settings(**options), 10)


@pytest.mark.parametrize('parameters',
                         [{'seed = 3; open("ran", "w").close(); x': 1}, {'__import__("os")': 1},
                          {'seed\nopen("ran", "w")': 1},
                                        {'import os': 1}, {1: 2}, {'seed': {1, 2}}])
def test_names_are_not_run(tmp_path, monkeypatch, parameters):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, TypeError)): run_cells(ROOT/'nbs/coco.ipynb', parameters)
    assert not list(tmp_path.iterdir())


def test_files_of_parameters_and_devices(tmp_path, capsys):
    for text, words in (('- 1', 'holds a list'), ('a: [', 'allowed: lines of'),
                        ('a: !!python/object/apply:os.getcwd []', 'allowed: lines of')):
        (tmp_path/'x.yaml').write_text(text)
        with pytest.raises(ValueError, match=words): read_parameters(tmp_path/'x.yaml')
    with pytest.raises(ValueError, match='file: got .*no.yaml .*allowed: lines of'): read_parameters(tmp_path/'no.yaml')
    assert read_parameters('',
                           [('seed', '3'), ('rows', '[a, b]'),
                            ('label', '')]) == {'seed': 3, 'rows': ['a', 'b'], 'label': ''}
    with pytest.raises(SystemExit): main([str(ROOT/'nbs/coco.ipynb'), '--device', 'tpu'])
    assert "invalid choice: 'tpu'" in capsys.readouterr().err
    with pytest.raises(ValueError, match='allowed: the path of an .ipynb'): main(['nowhere.ipynb'])


def test_a_notebook_run_here_leaves_no_names_to_the_next(tmp_path):
    from IPython import get_ipython
    from localmamba.parameters import check_parameters
    cells = [nbformat.v4.new_code_cell('size = 3', metadata={'tags': ['parameters']}),
             nbformat.v4.new_code_cell('found = get_ipython()', metadata={'tags': ['training']})]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path/'small.ipynb')
    before = get_ipython()
    assert run_cells(tmp_path/'small.ipynb', {'size': 5})['size'] == 5
    assert get_ipython() is before
    space = {'size': 7, 'check_parameters': check_parameters}
    exec('values = check_parameters()', space)
    assert space['values'] == {'size': 7}


@pytest.mark.parametrize('cells', ['', '[]', '{}', '{"cells": null}', '{"cells": ["x"]}', '{"cells": [{"source": ""}]}',
                                   '{"cells": [{"cell_type": "code", "source": "a"}]}', 'print(1)', '[' * 99999])
def test_what_is_no_notebook_is_named(tmp_path, cells):
    (tmp_path/'x.ipynb').write_text(cells)
    with pytest.raises(ValueError, match='notebook: got .*x.ipynb., which is no notebook .*; allowed: '):
        run_cells(tmp_path/'x.ipynb', {})


@pytest.mark.parametrize('source', ['import os', 'a = ', 'a, b = 1, 2', 'print(1)'])
def test_parameters_that_are_more_than_assignments(tmp_path, source):
    cells = [nbformat.v4.new_code_cell(source, metadata={'tags': ['parameters']}),
             nbformat.v4.new_code_cell('1', metadata={'tags': ['training']})]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path/'small.ipynb')
    with pytest.raises(ValueError, match="a cell tagged 'parameters' .* that does more than assign; allowed"):
        run_cells(tmp_path/'small.ipynb', {'a': 1})
    for wrong in (None, ['a']):
        with pytest.raises(TypeError, match='parameters: got .*; allowed: a dict'):
            run_cells(tmp_path/'small.ipynb', wrong)


@pytest.mark.parametrize('value', ['[1', '*x', '!!python/object/apply:os.getcwd []', '{', '"', '@', '\0', '[' * 400,
                                   '!!int x', '9' * 5000, '- &a [*a]'])
def test_values_that_are_no_yaml_are_named(tmp_path, value):
    with pytest.raises(ValueError, match="parameter 'seed': got .*; allowed: YAML"):
        read_parameters('', [('seed', value)])
    (tmp_path/'x.yaml').write_text(f'seed: {value}' if value[0] != '-' else f'seed:\n  {value}')
    with pytest.raises(ValueError, match='file: got .*x.yaml .*; allowed'): read_parameters(tmp_path/'x.yaml')


def test_a_file_that_unfolds_to_more_than_memory_holds(tmp_path):
    lines = ['a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]']
    lines += [f'{chr(98 + i)}: &{chr(98 + i)} [{", ".join(["*" + chr(97 + i)] * 9)}]' for i in range(12)]
    (tmp_path/'x.yaml').write_text('\n'.join(lines))
    with pytest.raises(ValueError, match='x.yaml .got more than 100,000 values.; allowed'):
        read_parameters(tmp_path/'x.yaml')


@pytest.mark.parametrize('text, key', [
    ('seed: 1\nlr: 2\nseed: 3', 'seed'), ('recipe:\n  lr: 1\n  lr: 1', 'lr'), ('[{a: 1, b: 2, "a": 3}]', 'a'),
    ('{"seed": 1, "seed": 1}', 'seed'), ('1: a\n0x1: b', '0x1'), ('yes: 1\ntrue: 2', 'true'),
    ('a: &k x\n? *k\n: 1\n? *k\n: 2', 'x')])
def test_a_key_given_twice_is_named(tmp_path, text, key):
    with pytest.raises(ValueError, match=f"'{key}' is given twice, in lines"): read_yaml(text)
    (tmp_path/'x.yaml').write_text(text)
    with pytest.raises(ValueError, match=f"x.yaml .'{key}' is given twice"): read_parameters(tmp_path/'x.yaml')
    with pytest.raises(ValueError, match="parameter 'rows': .* is given twice"): read_parameters('', [('rows', text)])


def test_a_parameter_given_twice_is_named_and_one_of_the_file_is_replaced(tmp_path):
    (tmp_path/'x.yaml').write_text('seed: 1\nlr: 2')
    assert read_parameters(tmp_path/'x.yaml', [('seed', '3')]) == {'seed': 3, 'lr': 2}
    with pytest.raises(ValueError, match="parameter 'seed': got two values"):
        read_parameters(tmp_path/'x.yaml', [('seed', '3'), ('seed', '3')])


def test_committed_configurations_give_each_key_once():
    files = list((ROOT/'nbs/configs').rglob('*.yaml'))
    assert len(files) > 20
    for path in files: read_yaml(path.read_text(encoding='utf-8'))
