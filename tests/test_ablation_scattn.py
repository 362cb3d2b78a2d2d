"ablation_scattn and receptive_fields at toy size, and the counts that tell which gate made the published numbers."
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
import yaml
from notebooks import execute

from localmamba.cost import count_flops, count_parameters
from localmamba.families import family

ROOT = Path(__file__).parent.parent
TOY = dict(n_train=64, n_valid=32, epochs=1, depth=1, depths=[1, 1], embed_dim=16, dims=[16, 16])


@pytest.fixture
def project(tmp_path, monkeypatch):
    (tmp_path/'settings.ini').touch()
    shutil.copytree(ROOT/'results/paper', tmp_path/'results/paper')
    monkeypatch.chdir(tmp_path)
    return tmp_path/'results'


def test_which_gate_and_where(project, monkeypatch):
    rows = ['none', 'channel', 'both', 'both, merged']
    text, space = execute('ablation_scattn', **TOY, rows=rows, seeds=[0, 1], published=[],
                          models=['local_vim_nano', 'local_vmamba_nano'])
    table = pd.read_csv(project/'ablation_scattn/digits/table.csv')
    assert table.row.tolist() == 2 * rows and (table.seeds == 2).all() and table.model.nunique() == 2
    assert table.paper_top1.dropna().tolist() == [75.2, 75.8]
    runs = list((project/'ablation_scattn/digits/runs').iterdir())
    assert len(runs) == 16 and (project/'ablation_scattn/digits/table.png').stat().st_size > 5000
    vmamba = table[table.model == 'local_vmamba_nano'].set_index('row')
    params = vmamba.params_m
    assert params['both'] == params['both, merged'] > params['channel'] > params['none']
    assert vmamba.flops_m_nine['both'] > vmamba.flops_m_nine['both, merged'] > vmamba.flops_m_nine['none']
    assert 'both − none' in text and 'corrected p' in text
    lines = space['differences'](space['frame'])
    pairs = space['frame'].pivot(index=['model', 'seed'], columns='row', values='top1')
    expected = (pairs['both'] - pairs['none']).mean()
    found = lines[(lines.question == 'both − none (as in the figure)') & (lines.family == 'both families')]
    assert np.isclose(found['mean'].item(), expected) and found.pairs.item() == 4


@pytest.mark.parametrize('model', ['local_vim_nano', 'local_vmamba_nano'])
def test_a_training_that_ablation_scan_has_done_is_taken(project, monkeypatch, model):
    "The ungated row is that of rows and windows; another learning rate is another training."
    told = TOY | dict(seeds=[2], patch_size=4, d_state=4, batch_size=32, warmup_epochs=1., weight_decay=.05)
    _, space = execute('ablation_scan', **told, lr=4e-3, model=model, rows=['horizontal + local'])
    [there] = space['runs']
    asked = told | dict(models=[model], rows=['none'], published=[], shared='ablation_scan')
    [taken] = execute('ablation_scattn', **asked, lr=4e-3)[1]['runs']
    assert taken.metrics['top1'] == there.metrics['top1'] and taken.metrics['taken_from'].endswith(there.name)
    assert not (taken.dir/'history.csv').exists()
    [own] = execute('ablation_scattn', **asked, lr=2e-3)[1]['runs']
    assert 'taken_from' not in own.metrics and (own.dir/'history.csv').exists()


@pytest.mark.parametrize('config, model', [('longer_wide', 'local_vim_nano'),
                                           ('longer_maps_wide', 'local_vmamba_nano')])
def test_a_model_without_a_gate_is_as_large_as_one_with_it(project, monkeypatch, config, model):
    "The row *none, wide* at the recorded sizes; its training is not that of *none*."
    given = yaml.safe_load((ROOT/f'nbs/configs/ablation_scattn/{config}.yaml').read_text())
    assert (given['rows'], given['models']) == (['none, wide'], [model])
    told = {name: given[name] for name in ('embed_dim', 'depth', 'dims', 'depths', 'd_state', 'patch_size', 'side')}
    told |= dict(n_train=32, n_valid=32, epochs=1, seeds=[0])
    execute('ablation_scan', **told, model=model, rows=['horizontal + local'])
    _, space = execute('ablation_scattn', **told, models=[model], rows=['none', 'none, wide', 'channel'], published=[],
                       shared='ablation_scan')
    none, wide, channel = (run.metrics for run in space['runs'])
    assert 'taken_from' in none and 'taken_from' not in wide and len({run.name[-8:] for run in space['runs']}) == 3
    assert wide['params_m'] == pytest.approx(channel['params_m'], rel=.02) and none['params_m'] < .94*wide['params_m']
    assert wide['flops_m_nine'] == pytest.approx(channel['flops_m_nine'], rel=.1), 'a gate has few FLOPs'


@pytest.mark.slow
def test_receptive_fields(project, monkeypatch):
    names = ['LocalVim', 'VMamba', 'DeiT']
    text, space = execute('receptive_fields', **TOY, models=names, patch_size=4, n_field=8)
    table = pd.read_csv(project/'receptive_fields/digits/table.csv')
    assert table.model.tolist() == names and table.own_after_mean.between(0, 100).all()
    for run in (project/'receptive_fields/digits/runs').iterdir():
        fields = np.load(run/'fields.npz')
        assert set(fields) == {'before', 'after'}
        for field in fields.values(): assert field.shape == (32, 32) and np.isclose(field.sum(), 1, atol=1e-4)
    vim = np.load(next((project/'receptive_fields/digits/runs').glob('DeiT*/fields.npz')))
    assert (vim['before'] > 0).all(), 'attention sees every pixel'


def test_receptive_fields_of_trained_families(project, monkeypatch):
    "Nothing is trained: a model as its seed makes it, and with the weights that families kept."
    told = dict(models=['VMamba'], seeds=[3], patch_size=4, n_train=16, n_valid=16, n_field=4)
    with pytest.raises(ValueError, match="'families': got 'toy', which has no record of VMamba seed 3"):
        execute('receptive_fields', **told, families='toy')
    source = project/'families/toy/runs/VMamba-seed-3'
    source.mkdir(parents=True)
    (source/'params.json').write_text(json.dumps(dict(row='VMamba', seed=3, patch_size=4)))
    (source/'metrics.json').write_text(json.dumps(dict(top1=12.5)))
    with pytest.raises(FileNotFoundError, match='not on this machine; delete its folder'):
        execute('receptive_fields', **told, families='toy')
    torch.manual_seed(5)
    trained = family('VMamba', 10, 32, 4)
    torch.save({'model': trained.state_dict()}, source/'weights.pt')
    text, space = execute('receptive_fields', **told, families='toy')
    [run] = space['runs']
    assert (run.metrics['top1'], run.params['weights'], run.params['model']) == (12.5, source.name, 'VMamba')
    assert 'lr' not in run.params and not (run.dir/'history.csv').exists()
    fields = np.load(run.dir/'fields.npz')
    np.testing.assert_array_equal(fields['after'], space['field_of'](trained))
    torch.manual_seed(3)
    np.testing.assert_array_equal(fields['before'], space['field_of'](family('VMamba', 10, 32, 4)))


@pytest.mark.parametrize('model, name, scattn', [('local_vim_tiny', 'LocalVim-T', 'both'),
                                                 ('vmamba_tiny', 'VMamba-T', 'none')])
def test_the_recorded_counts_are_ours(model, name, scattn):
    counts = pd.read_csv(ROOT/'results/ablation_scattn/imagenet/counts.csv').set_index(['model', 'row'])
    with torch.device('meta'): net = timm.create_model(model, scattn=scattn)
    recorded = counts.loc[(name, scattn)]
    assert recorded.params_m == count_parameters(net) / 1e6
    assert recorded.flops_g_nine == count_flops(net, 224, 'nine') / 1e9


def test_transfer(project, monkeypatch):
    "A backbone starts from its classifier's weights, another from scratch; records name the classifier."
    toy = dict(n_train=8, n_valid=2, iterations=2, batch_size=2, classes_images=32, classes_epochs=1, rows=['VMamba'])
    text, space = execute('transfer', **toy)
    table = pd.read_csv(project/'transfer/scenes/table.csv')
    assert table.row.tolist() == ['VMamba', 'VMamba, from scratch']
    assert {'AP_box_mean', 'AP_mask_mean', 'miou_mean'} <= set(table)
    params = {run.params['row']: run.params['weights'] for run in space['segmented']}
    assert params['VMamba, from scratch'] == '' and (project/'transfer/scenes/runs'/params['VMamba']).is_dir()
    held = torch.load(space['WEIGHTS']['VMamba', 0])['model']
    net = space['detector'](*space['scan_options']('VMamba', 28, 4)[:1], 10, space['WEIGHTS']['VMamba', 0],
                            space['scan_options']('VMamba', 28, 4)[1])
    own = {k.removeprefix('backbone.model.'): v for k, v in net.state_dict().items()}
    shared = [k for k in held if k in own]
    assert len(shared) > 40 and all(torch.equal(held[k], own[k]) for k in shared)
    times = [p.stat().st_mtime_ns for p in sorted((project/'transfer/scenes/runs').glob('*/metrics.json'))]
    with pytest.raises(ValueError, match="'families': got 'none', which has no record of VMamba seed 0"):
        execute('transfer', **toy, families='none')
    assert times == [p.stat().st_mtime_ns for p in sorted((project/'transfer/scenes/runs').glob('*/metrics.json'))]
