"The throughput notebook at toy size: its records, that a part can be run alone, and what it says without a GPU."
import json
import shutil

import pandas as pd
import pytest
import torch

from notebooks import execute, papermill, project, said_by

TINY = dict(shapes=[[1, 16, 20, 4]], models=['test_local_vim', 'test_local_vmamba'], train_models=['test_local_vim'],
            token_sizes=[32, 64], peers=['test_vit'], limit_shapes=[[1, 2, 16, 20, 4], [1, 2, 16, 20, 8]],
            compiled=False, img_size=32, batch_size=2, repeats=1, max_seconds=1, threads=1, device='toy',
            gpu_batch_size=2, small_batch=16, n_sizes=20)


@pytest.fixture(scope='module')
def toy(tmp_path_factory):
    folder = project(tmp_path_factory.mktemp('toy'))
    with pytest.MonkeyPatch.context() as moved:
        moved.chdir(folder)
        execute('throughput', **TINY, parts=['scan', 'limit', 'models', 'peers', 'rest', 'tokens'])
    return folder/'results/throughput/toy'


def test_every_scan_is_timed(toy):
    table = pd.read_csv(toy/'table.csv')
    assert set(table.passes) == {'forward', 'forward + backward'}
    jax = table.scan.isin(('JAX lax.scan, jit', 'intel-extension-for-pytorch'))   # timed, or left out and said so
    assert jax.sum() == 4 and all(row.ms_median > 0 or 'left out: ' in row.note for row in table[jax].itertuples())
    table = table[~jax]
    assert len(table) == 2 * 6
    assert (table.ms_min > 0).all() and (table.ms_min <= table.ms_median).all() and table.note.isna().all()
    assert (table[table.scan == 'ours'].times_ours == 1).all()


def test_models_layers_and_tokens(toy):
    models = pd.read_csv(toy/'models.csv')
    inference = models[models.passes == 'inference']
    assert set(inference.scan) == {'ours', 'ours, bf16', 'backend reference', 'mamba_ssm loop'}
    assert (models.products_ms < models.ms_median)[models.scan == 'ours'].all()
    layers = pd.read_csv(toy/'layers.csv')
    assert len(layers) == 4 and layers.share.between(0, 1).all()
    assert pd.read_csv(toy/'scaling.csv').tokens.tolist() == [4, 16] * 2


def test_shares_of_the_limit_and_their_claims(toy):
    limit, claims = pd.read_csv(toy/'limit.csv'), pd.read_csv(toy/'claims.csv')
    assert limit.passes.tolist() == ['forward', 'backward'] * 2 and limit.share.between(0, 1.2).all()
    stated = claims[claims.claim.str.contains('share of the limit')]
    assert len(stated) == 4 and (stated.target == '≥ 0.65').all() and stated.measured.tolist() == limit.share.tolist()
    peers = pd.read_csv(toy/'peers.csv')
    assert (peers.ms_an_image > 0).all() and set(peers.passes) == {'inference', 'training step'}


def test_what_surrounds_the_kernels(toy):
    rest, claims = pd.read_csv(toy/'rest.csv'), pd.read_csv(toy/'claims.csv').set_index('claim')
    assert len(rest) == 2 * 3 + 2 + 1 + 2 and (rest.value >= 0).all()
    first, second = rest.value[rest.quantity.str.contains('round')]
    assert 0 < second < first < 1   # what has been made is only looked up
    gradients = rest.value[rest.quantity.str.startswith('gradients')]
    assert gradients.between(1e-4, 0.2).all()
    assert claims.measured['LocalVim 4x48, loading, augmentation and optimiser / step'] < 1
    assert sum('fresh process' in claim for claim in claims.index) == 4


def test_figures_and_provenance(toy):
    for name in ('table', 'models', 'scaling'): assert (toy/f'{name}.png').stat().st_size > 5000
    environment = json.loads((toy/'env.json').read_text())
    parts = 'table', 'limit', 'models', 'layers', 'peers', 'rest', 'scaling'
    assert {f'{part}.csv' for part in parts} == set(environment)
    assert all({'torch', 'threads', 'load', 'parameters'} <= set(facts) for facts in environment.values())
    assert str(toy.parents[2]) not in json.dumps(environment)


@pytest.mark.skipif(torch.cuda.is_available(), reason='this is about machines without a GPU')
@pytest.mark.slow
def test_one_part_alone_and_no_gpu(toy, tmp_path):
    shutil.copytree(toy, tmp_path/'results/throughput/toy')
    (tmp_path/'settings.ini').touch()
    said_by(papermill(tmp_path, 'throughput', '-y', json.dumps(TINY | dict(parts=['gpu']))))
    copied = tmp_path/'results/throughput/toy'
    assert {f.name for f in copied.iterdir()} == {f.name for f in toy.iterdir()}
    for name in ('table.csv', 'env.json'): assert (copied/name).read_bytes() == (toy/name).read_bytes()
    assert 'No GPU was used' in (tmp_path/'out.ipynb').read_text()


def test_a_wrong_part_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"parts: \['memory'\] are unknown; allowed: scan, limit, models"):
        execute('throughput', parts=['memory'])


def test_an_earlier_checkout_is_the_one_that_is_timed(tmp_path, monkeypatch):
    "Not the package in the folder where the notebook was started."
    monkeypatch.chdir(project(tmp_path/'project'))
    _, space = execute('throughput', **TINY, parts=[])
    other = tmp_path/'earlier/localmamba'
    other.mkdir(parents=True)
    (other/'__init__.py').write_text("raise ImportError('this is the other checkout')")
    monkeypatch.chdir(space['Path'](space['localmamba'].__file__).parent.parent)
    with pytest.raises(RuntimeError, match='this is the other checkout'): space['small_steps'](other.parent)
