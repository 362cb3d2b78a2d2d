"""Training under real conditions: processes that are killed, loaders of all kinds, a terminal behind papermill."""
import os, random, subprocess, sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from torch import nn
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader as FastaiLoader

from localmamba.runs import Run
from localmamba.optim import cosine_lr, param_groups
from localmamba.progress import StatusLine
from localmamba.train import (NonFiniteLoss, fit, learner, rng_state,
                              seed_everything, set_rng_state)

ROOT = Path(__file__).resolve().parent.parent


class Batches:
    def __init__(self, x, y, bs, seed=None):
        self.dataset, self.x, self.y, self.bs = (x, y), x, y, bs
        self.generator = torch.Generator().manual_seed(seed) if seed is not None else None
    def __len__(self): return len(self.x) // self.bs
    def __iter__(self):
        order = torch.randperm(len(self.x), generator=self.generator) if self.generator else torch.arange(len(self.x))
        for i in order.view(-1, self.bs): yield self.x[i], self.y[i]


def data():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(160, 16, generator=g)
    return x, x[:, :4].argmax(1)


def ours():
    x, y = data()
    return DataLoaders(Batches(x[:128], y[:128], 32, seed=0), Batches(x[128:], y[128:], 32))


def torchs():
    x, y = data()
    pairs = torch.utils.data.TensorDataset(x, y)
    shuffled = torch.utils.data.DataLoader(pairs, 32, shuffle=True, generator=torch.Generator().manual_seed(4))
    return DataLoaders(shuffled, torch.utils.data.DataLoader(pairs, 32))


def global_torchs():
    x, y = data()
    pairs = torch.utils.data.TensorDataset(x, y)
    return DataLoaders(torch.utils.data.DataLoader(pairs, 32, shuffle=True), torch.utils.data.DataLoader(pairs, 32))


def fastais():
    x, y = data()
    pairs = list(zip(x, y))
    return DataLoaders(FastaiLoader(pairs, bs=32, shuffle=True), FastaiLoader(pairs, bs=32))


def digits():
    from localmamba.data import digit_scenes, loaders
    train, valid = digit_scenes(size=16, n_train=96, n_valid=32)
    return loaders(train, valid, batch_size=32, augment='crop_erase', seed=1, device='cpu')


def mlp(inputs=16, classes=4):
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, classes))


class Stop(Callback):
    def __init__(self, epoch, batch): self.at = (epoch, batch)
    def before_batch(self):
        if self.training and (self.epoch, self.iter) == self.at: raise KeyboardInterrupt


RECIPE = dict(epochs=4, lr=1e-2, warmup_epochs=1.5, label_smoothing=0.1, grad_clip=0.5, seed=5)


def untimed(metrics, history):
    return {k: v for k, v in metrics.items() if k != 'seconds'}, history.drop(columns='seconds')


def same(a, b):
    (m, h), (n, k) = untimed(*a), untimed(*b)
    return m == n and h.to_dict() == k.to_dict()


# resume

@pytest.mark.parametrize('dls', [ours, torchs, global_torchs, fastais, digits])
@pytest.mark.parametrize('amp', ['none', 'bf16'])
def test_interrupted_ends_like_uninterrupted(tmp_path, dls, amp):
    model = (lambda: mlp(3*16*16, 10)) if dls is digits else mlp
    def run(name): return Run('exp', 'data', {'amp': amp}, name, tmp_path)
    seed_everything(9)
    straight = fit(model, dls(), run=run('straight'), amp=amp, **RECIPE)
    for at in ((0, 2), (1, 1), (3, 0)):
        random.random(), torch.rand(3)
        with pytest.raises(KeyboardInterrupt): fit(model, dls(), run=run('cut'), amp=amp, cbs=[Stop(*at)], **RECIPE)
    resumed = fit(model, dls(), run=run('cut'), amp=amp, **RECIPE)
    assert same(straight, resumed)
    assert same(resumed, fit(None, None, run=run('cut'), **RECIPE))
    assert run('straight').history.drop(columns='seconds').equals(run('cut').history.drop(columns='seconds'))


def test_a_run_does_not_depend_on_the_runs_before_it():
    for make in (ours, torchs, digits):
        dls, model = make(), (lambda: mlp(3*16*16, 10)) if make is digits else mlp
        assert same(fit(model, dls, **RECIPE), fit(model, dls, **RECIPE)), make
    assert not same(fit(mlp, ours(), **RECIPE), fit(mlp, ours(), **{**RECIPE, 'seed': 6}))


SCRIPT = '''
import os, signal, sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from fastai.callback.core import Callback
from localmamba import runs, train
from localmamba.runs import Run
from test_train import RECIPE, digits, mlp

class Kill(Callback):
    def __init__(self, at): self.at = at
    def before_batch(self):
        if self.training and (self.epoch, self.iter) == self.at: os.kill(os.getpid(), signal.SIGKILL)

def half(self, state, whole=Run.save_checkpoint): # the row of epoch 2 is on disk, its checkpoint only in part
    if state['epoch'] < 3: return whole(self, state)
    with runs.whole_file(self.dir/'checkpoint.new.pt') as f:
        f.write(b'PK' * 1000)
        f.flush()
        os.kill(os.getpid(), signal.SIGKILL)

def go(name, *cbs):
    run = Run('exp', 'data', {{}}, name, sys.argv[1])
    train.fit(lambda: mlp(3*16*16, 10), digits(), run=run, cbs=cbs, **RECIPE)

for kill in ((1, 1), 'between', None):
    child = os.fork() # a new process that need not import everything again
    if child == 0:
        if kill == 'between': Run.save_checkpoint = half
        go('killed', Kill(kill))
        go('straight')
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    killed = Run('exp', 'data', {{}}, 'killed', sys.argv[1])
    print(status, killed.finished, len(killed.history), flush=True)
'''


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork and SIGKILL')
def test_killed_process_ends_like_one_left_alone(tmp_path):
    command = [sys.executable, '-W', 'ignore', '-c', SCRIPT.format(tests=str(ROOT/'tests')), str(tmp_path)]
    process = subprocess.run(command, env={**os.environ, 'PYTHONPATH': str(ROOT)}, capture_output=True, text=True)
    assert process.stdout.split('\n')[:3] == ['-9 False 1', '-9 False 3', '0 True 4'], process.stderr
    straight, killed = (Run('exp', 'data', {}, name, tmp_path) for name in ('straight', 'killed'))
    assert same((killed.metrics, killed.history), (straight.metrics, straight.history))
    assert killed.history.epoch.tolist() == [0, 1, 2, 3]
    assert sorted(p.name for p in killed.dir.iterdir()) == ['env.json', 'history.csv', 'metrics.json', 'params.json']


def test_generators_go_back():
    seed_everything(1)
    before = rng_state()
    def draw(): return random.random(), random.gauss(0, 1), torch.rand(3).tolist(), np.random.randn(3).tolist()
    first = draw()
    set_rng_state(before)
    assert draw() == first


# the guard

class Poison(Callback):
    def __init__(self, training): self.where = training
    def before_batch(self):
        if (self.training, self.epoch, self.iter) == (self.where, 2, 0): self.learn.xb = (self.xb[0] * float('inf'),)


def test_nan_names_step_and_checkpoint_and_can_be_resumed(tmp_path):
    run = Run('exp', 'data', {}, 'nan', tmp_path)
    words = r'step 8 \(epoch 2, batch 0 of 4\); last good checkpoint: .*checkpoint.pt .after epoch 1'
    with pytest.raises(NonFiniteLoss, match=words):
        fit(mlp, ours(), run=run, cbs=[Poison(True)], **RECIPE)
    assert not run.finished
    assert same(fit(mlp, ours(), run=run, **RECIPE), fit(mlp, ours(), **RECIPE))


def test_nan_in_validation_is_not_saved(tmp_path):
    run = Run('exp', 'data', {}, 'nan', tmp_path)
    with pytest.raises(NonFiniteLoss, match='validation loss .* after epoch 2'):
        fit(mlp, ours(), run=run, cbs=[Poison(False)], **RECIPE)
    assert run.load_checkpoint()['epoch'] == 2
    with pytest.raises(NonFiniteLoss, match='none yet'): fit(lambda: nn.Sequential(mlp(), Inf()), ours(), **RECIPE)


class Inf(nn.Module):
    def forward(self, x): return x * float('inf')


# the recipe

def test_schedule_is_followed_step_by_step():
    seen = []
    class Spy(Callback):
        order = 100
        def after_step(self): seen.append(self.opt.opt.param_groups[0]['lr'])
    fit(mlp, ours(), cbs=[Spy()], **RECIPE)
    assert seen == [cosine_lr(i, 16, 6, 1e-2) for i in range(16)] and max(seen) == 1e-2


def test_gradients_are_clipped():
    norms = []
    class Spy(Callback):
        order = 100
        def before_step(self): norms.append(nn.utils.get_total_norm([p.grad for p in self.model.parameters()]).item())
    fit(mlp, ours(), cbs=[Spy()], **{**RECIPE, 'grad_clip': 0.01})
    assert max(norms) <= 0.01 * (1 + 1e-4)


def test_fit_equals_a_plain_loop():
    torch.manual_seed(0)
    model, dls = nn.Linear(16, 4), ours()
    start = {k: v.clone() for k, v in model.state_dict().items()}
    metrics, history = fit(model, dls, 3, lr=1e-2, seed=2)
    plain, plain_dls = nn.Linear(16, 4), ours()
    plain.load_state_dict(start)
    plain_dls.train.generator.manual_seed(2)
    groups = [{'params': [plain.weight], 'weight_decay': 0.05}, {'params': [plain.bias], 'weight_decay': 0.}]
    opt = torch.optim.AdamW(groups)
    for step in range(12):
        if step % 4 == 0: batches = list(plain_dls.train)
        x, y = batches[step % 4]
        for group in opt.param_groups: group['lr'] = cosine_lr(step, 12, 0, 1e-2)
        opt.zero_grad()
        nn.functional.cross_entropy(plain(x), y).backward()
        opt.step()
    torch.testing.assert_close(model.weight, plain.weight)
    torch.testing.assert_close(model.bias, plain.bias)
    x, y = plain_dls.valid.dataset
    assert metrics['top1'] == pytest.approx(100 * (plain(x).argmax(1) == y).float().mean().item())
    assert metrics['valid_loss'] == pytest.approx(nn.functional.cross_entropy(plain(x), y).item(), rel=1e-5)


def test_groups_of_the_models():
    timm = pytest.importorskip('timm')
    pytest.importorskip('localmamba.models.localvim')
    pytest.importorskip('localmamba.models.localvmamba')
    for name in ('test_local_vim', 'test_local_vmamba'):
        model = timm.create_model(name)
        names = {id(p): n for n, p in model.named_parameters()}
        decay, rest = ([names[id(p)] for p in g['params']] for g in param_groups(model))
        assert len(decay) + len(rest) == len(names)
        leaves = {n.rpartition('.')[2] for n in decay}
        assert not leaves & {'A_log', 'D', 'dt_bias', 'conv_bias', 'bias', 'pos_embed', 'cls_token', 'alpha'}, name
        assert {'x_proj', 'dt_proj'} <= leaves, (name, leaves)
        released = {names[id(p)].rpartition('.')[2] for p in param_groups(model, rule='release')[0]['params']}
        assert released - leaves == {'A_log'}, name


def test_frozen_parameters_are_left_out():
    model = mlp()
    for p in model[1].parameters(): p.requires_grad_(False)
    before = model[1].weight.clone()
    assert sum(len(g['params']) for g in param_groups(model)) == 2
    fit(model, ours(), **RECIPE)
    assert torch.equal(before, model[1].weight)


def test_only_one_group_when_nothing_decays():
    groups = param_groups(nn.LayerNorm(4))
    assert [g['name'] for g in groups] == ['no_decay'] and groups[0]['weight_decay'] == 0


@pytest.mark.parametrize('wrong, words', [(dict(amp='fp8'), "amp: got 'fp8'; allowed"),
                                          (dict(epochs=0), 'epochs: got 0'), (dict(seed=-1), 'seed: got -1'),
                                          (dict(rule='x'), 'rule'),
                                          (dict(label_smoothing=2.), 'label_smoothing')])
def test_wrong_arguments(wrong, words):
    with pytest.raises(ValueError, match=words): fit(mlp, ours(), **{**RECIPE, **wrong})


def test_no_sample_to_be_judged_on():
    dls, (x, y) = ours(), data()
    with pytest.raises(ValueError, match='valid: got no sample to judge by'):
        fit(mlp, DataLoaders(dls.train, Batches(x[:0], y[:0], 32)), **RECIPE)


def test_validate_and_predict_leave_the_record_alone():
    learn = learner(mlp(), ours())
    learn.fit(1)
    assert learn.validate()[0] == pytest.approx(learn.record.last_row['valid_loss'], rel=1e-5)
    assert len(learn.record.rows) == 1


# the line

def test_status_line_in_a_log(capsys):
    line = StatusLine()
    for i in range(100): line.update(f'step {i}')
    line.update('done', last=True)
    assert capsys.readouterr().err.splitlines() == ['step 0', 'done']


def test_status_line_says_where_it_stopped(capsys):
    with pytest.raises(KeyboardInterrupt): fit(mlp, ours(), label='toy', cbs=[Stop(2, 1)], **RECIPE)
    assert 'toy · stopped in epoch 2/4, step 2/4 · loss' in capsys.readouterr().err.splitlines()[-1]


def test_one_line_a_run_in_the_notebook_and_a_terminal_behind_papermill(tmp_path):
    source = (f"import sys; sys.path.insert(0, {str(ROOT/'tests')!r})\n"
              "from test_train import fit, mlp, ours, RECIPE")
    cells = [nbformat.v4.new_code_cell(source, metadata={'tags': ['parameters']}),
             nbformat.v4.new_code_cell("for seed in range(2): fit(mlp, ours(), label=f'toy seed {seed}', **RECIPE)")]
    kernel = {'display_name': 'python3', 'language': 'python', 'name': 'python3'}
    path = tmp_path/'lines.ipynb'
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={'kernelspec': kernel}), path)
    env = {k: v for k, v in os.environ.items() if k not in ('JPY_SESSION_NAME', 'VSCODE_PID', 'PYTEST_CURRENT_TEST')}
    env['PYTHONPATH'] = str(ROOT)
    said = subprocess.run([sys.executable, '-m', 'papermill', str(path), str(path), '--no-progress-bar'],
                          env=env, cwd=tmp_path, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    shown = [o.data['text/plain'] for o in nbformat.read(path, 4).cells[-1].outputs]
    assert len(shown) == 2 and all(f'toy seed {i} · 4 epochs · loss' in line for i, line in enumerate(shown)), shown
    assert all(line in said.stderr for line in shown), said.stderr
