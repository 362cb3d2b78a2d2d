"The search as experiments run it: through fit, interrupted, from checkpoints, and both notebooks in a process."
import json

import pandas as pd
import pytest
import timm
import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from torch.testing import assert_close

from localmamba.models.weights import to_released
from localmamba.runs import Run, read_csv
from localmamba.search import (PLANTED, AlphaRecord, agreement, chance_agreement, entropy, planted, read_directions,
                               resolve_directions,
                               searched_directions, search_weights, top_directions, write_directions)
from localmamba.train import fit, param_groups
from notebooks import execute, project


class Fresh:
    "Batches of a planted problem, new ones in every pass."
    def __init__(self, problem, batches, bs=16, side=8):
        self.problem, self.batches, self.bs, self.side = problem, batches, bs, side
        self.seed, self.epoch = 0, 0
    def __len__(self): return self.batches
    def state_dict(self): return {'seed': self.seed, 'epoch': self.epoch}
    def load_state_dict(self, state): self.seed, self.epoch = state['seed'], state['epoch']
    def __iter__(self):
        generator = torch.Generator().manual_seed(1000 * self.seed + self.epoch)
        self.epoch += 1
        for _ in range(self.batches): yield planted(self.problem, self.bs, self.side, generator)


def supernet():
    return timm.create_model('test_local_vim', img_size=8, patch_size=1, in_chans=1, num_classes=2, embed_dim=8,
                             depth=1, directions='search', rope=False, abs_pos_embed=False,
                             candidates=('h', 'h_flip', 'v', 'v_flip', 'w2', 'w2_flip'))


def search(problem, seed=0, epochs=3, batches=30, **options):
    "A model and its history of α."
    models, record = [], AlphaRecord(options.pop('folder', None), top=2, model='test_local_vim', seed=seed)
    loaders = DataLoaders(Fresh(problem, batches), Fresh(problem, 2))
    fit(lambda: models.append(supernet()) or models[0], loaders, epochs, 1e-2, seed, weight_decay=0., warmup_epochs=.3,
        cbs=[record, *options.pop('cbs', [])], **options)
    return models[0], record.table


@pytest.mark.parametrize('problem', PLANTED)
def test_a_planted_answer_is_found(problem):
    model, table = search(problem)
    assert searched_directions(model, top=2) == [PLANTED[problem]]
    assert table.epoch.tolist() == [0, 1, 2] and (table.layer == 0).all()
    last = torch.tensor(table[list(model.directions[0])].iloc[-1].to_list())
    assert_close(last, search_weights(model)[0].softmax(-1)[0], rtol=1e-5, atol=1e-6)
    assert table.entropy.is_monotonic_decreasing and table.entropy.iloc[-1] < 0.99


class Interrupt(Callback):
    def before_batch(self):
        if self.training and (self.epoch, self.iter) == (2, 3): raise KeyboardInterrupt


def test_an_interrupted_search_keeps_its_past(tmp_path):
    def once(label, cbs=()):
        run = Run('search', 'planted', {'label': label}, label, tmp_path)
        return run, search('columns', batches=6, run=run, cbs=cbs, folder=run.dir)
    whole, (_, table) = once('whole')
    with pytest.raises(KeyboardInterrupt): once('stopped', [Interrupt()])
    stopped, (_, resumed) = once('stopped')
    pd.testing.assert_frame_equal(table, resumed)
    pd.testing.assert_frame_equal(read_csv(whole.dir/'alpha.csv'), read_csv(stopped.dir/'alpha.csv'))
    assert whole.finished and (whole.dir/'directions.json').read_text() == (stopped.dir/'directions.json').read_text()


@pytest.mark.parametrize('name', ['test_local_vim', 'test_local_vmamba'])
def test_alpha_decays_by_the_rule_of_the_release_only(name):
    model = timm.create_model(name, directions='search')
    alphas = {id(p) for n, p in model.named_parameters() if n.endswith('alpha')}
    def decaying(rule):
        return {id(p) for g in param_groups(model, 0.05, rule) if g['weight_decay'] for p in g['params']}
    assert alphas and not alphas & decaying('study') and alphas <= decaying('release')


def test_layers_are_read_in_their_order(tmp_path):
    "Layer 10 comes after layer 9, not after layer 1."
    for kwargs in (dict(model_name='test_local_vim', depth=12),
                   dict(model_name='test_local_vmamba', dims=(16, 16), depths=(1, 11))):
        model = timm.create_model(directions='search', **kwargs)
        alphas = [p for n, p in model.named_parameters() if n.endswith('alpha')]
        with torch.no_grad():
            for layer, alpha in enumerate(alphas): alpha[layer % 8] = 1. + layer
        expected = [(model.directions[0][layer % 8],) for layer in range(12)]
        torch.save({'state_dict': to_released(model)}, tmp_path/'released.ckpt')
        torch.save({'model': model.state_dict()}, tmp_path/'ours.pt')
        for source in (model, model.state_dict(), to_released(model), tmp_path/'released.ckpt', tmp_path/'ours.pt'):
            assert searched_directions(source, top=1) == expected


def test_sources_that_are_no_search(tmp_path):
    with pytest.raises(ValueError, match="a supernet, built with directions='search'"):
        searched_directions(timm.create_model('test_local_vim'))
    with pytest.raises(FileNotFoundError, match='where no file is'): searched_directions(tmp_path/'nothing.ckpt')
    other = timm.create_model('test_local_vim', directions='search', candidates=('h', 'v', 'w3'))
    assert {d for layer in searched_directions(other.state_dict(), top=2) for d in layer} <= {'h', 'v', 'w3'}
    with pytest.raises(ValueError, match='those of this search'): searched_directions(to_released(other), top=2)
    assert len(searched_directions(to_released(other), top=2, candidates=('h', 'v', 'w3'))) == 2
    with pytest.raises(ValueError, match='NaN'): top_directions([[float('nan')] * 8])


def test_ties_go_to_the_earlier_candidate():
    assert top_directions([[0.] * 8], top=4) == [('h', 'h_flip', 'v', 'v_flip')]
    assert top_directions([[0.] * 8], top=4, worst=True) == [('w2', 'w2_flip', 'w7', 'w7_flip')]
    assert entropy([[1., 0.], [.5, .5]]).tolist() == [0., 1.]


def test_a_file_of_directions_for_another_depth_is_refused(tmp_path):
    path = write_directions(tmp_path/'directions.json', [('h', 'w2')] * 3)
    assert resolve_directions(str(path), 3) == read_directions(path) == [('h', 'w2')] * 3
    with pytest.raises(ValueError, match='got 3 layers in .*; allowed: 4'): resolve_directions(path, 4)


TINY = dict(n_train=128, n_valid=40, depth=2, embed_dim=16, epochs=1, seeds=[0, 1])


@pytest.fixture(scope='module')
def searches(tmp_path_factory):
    folder = project(tmp_path_factory.mktemp('searches'))
    with pytest.MonkeyPatch.context() as moved:
        moved.chdir(folder)
        execute('search_directions', **TINY)
    return folder


def test_search_directions(searches):
    results = searches/'results/search_directions/digits'
    runs = sorted((results/'runs').iterdir())
    assert len(runs) == 2
    for run in runs:
        assert {f.name for f in run.iterdir()} == {'params.json', 'env.json', 'history.csv', 'metrics.json',
                                                   'alpha.csv', 'directions.json'}
        record, alpha = json.loads((run/'directions.json').read_text()), pd.read_csv(run/'alpha.csv')
        assert [len(layer) for layer in read_directions(run/'directions.json')] == [4, 4]
        assert record['provenance']['run'] == run.name
        assert len(alpha) == 2 and (alpha[record['candidates']].sum(axis=1) - 1).abs().max() < 1e-6
        assert str(searches) not in (run/'directions.json').read_text()
    assert pd.read_csv(results/'table.csv').layer.tolist() == [0, 0, 1, 1]
    assert all((results/name).stat().st_size > 5000 for name in ('choices.png', 'alpha.png'))


def test_ablation_search_takes_the_searches_that_are_there(searches, monkeypatch):
    before = {f: f.stat().st_mtime_ns for f in searches.glob('results/search_directions/digits/runs/*/metrics.json')}
    monkeypatch.chdir(searches)
    execute('ablation_search', **TINY, search_epochs=1, draws=1)
    kept = searches.glob('results/search_directions/digits/runs/*/metrics.json')
    assert before == {f: f.stat().st_mtime_ns for f in kept}
    table = pd.read_csv(searches/'results/ablation_search/digits/table.csv')
    assert table.row.tolist() == ['searched', 'random', 'un-searched', 'un-searched, longer', 'worst']
    assert (table.seeds == 2).all()
    assert table.params_m.nunique() == 1 and table.epochs.tolist()[:3] == [1, 1, 1] and table.epochs[3] > 2
    for run in (searches/'results/ablation_search/digits/runs').glob('searched*'):
        params = json.loads((run/'params.json').read_text())
        found = searches/'results/search_directions/digits/runs'/params['search']/'directions.json'
        assert list(map(tuple, params['directions'])) == read_directions(found)
    assert (searches/'results/ablation_search/digits/table.png').stat().st_size > 5000


@pytest.mark.parametrize('notebook, given', [
    ('ablation_search', dict(rows=['searched', 'worst'], search_epochs=1)),
    ('ablation_scan', dict(rows=['local'], model='local_vim_nano'))])
def test_experiments_take_a_file_of_directions(searches, notebook, given, monkeypatch):
    monkeypatch.chdir(searches)
    found = next(searches.glob('results/search_directions/digits/runs/*/directions.json'))
    given = given | dict(directions=str(found), n_train=128, n_valid=40)
    _, space = execute(notebook, depth=2, embed_dim=16, epochs=1, seeds=[5], **given)
    layers = next(d for d in space['frame'].directions if not isinstance(d[0], str))
    assert tuple(map(tuple, layers)) == tuple(read_directions(found))
    assert len(pd.read_csv(searches/f'results/{notebook}/digits/table.csv')) == 2
    with pytest.raises(ValueError, match='allowed: 3'): execute(notebook, depth=3, **given)


def test_families_searches_where_no_file_is_given(tmp_path, monkeypatch):
    "One supernet, of `search_seed`, serves every seed; given as a file its list is another's run of the same name."
    monkeypatch.chdir(project(tmp_path))
    row = 'LocalVMamba, searched'
    given = dict(rows=[row], n_train=32, n_valid=16, epochs=1, seeds=[3, 4], search_seed=2)
    _, space = execute('families', **given)
    found, = tmp_path.glob('results/search_directions/digits/runs/*/directions.json')
    assert space['SEARCHED'][row] == read_directions(found) and '-seed-2-' in str(found)
    assert {json.dumps(run.params['directions']) for run in space['runs']} == {json.dumps(read_directions(found))}
    before = [run.name for run in space['runs']]
    _, space = execute('families', **given, searched_vmamba=str(found))
    assert [run.name for run in space['runs']] == before


def test_helpers_say_what_they_take():
    model = timm.create_model('test_local_vmamba', directions='search')
    assert searched_directions({'model': model.state_dict()}) == searched_directions(model)
    weights = torch.randn(2, 8, requires_grad=True)
    assert top_directions(weights) == top_directions(weights.detach().numpy())
    for call in (lambda: chance_agreement(2, top=9), lambda: chance_agreement(2, lists=1), lambda: chance_agreement(0)):
        with pytest.raises(ValueError, match='; allowed: '): call()
    for lists in (([], []), ([()], [()])):
        with pytest.raises(ValueError, match='lists: got none of a layer'): agreement(*lists)
