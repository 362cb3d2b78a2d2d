"""Training by recipes: stops within an epoch, several processes, checkpoints, photographs, the command line."""
import os, subprocess, sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from torch import nn
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from PIL import Image
from sklearn.datasets import load_sample_images

from localmamba.classify import (ASIDE, SETTINGS, chosen_recipe, classifier, evaluate, image_loaders, image_sets,
                                 run_of, settings, train)
from localmamba.mixer import without_facts
from localmamba.models.weights import load_weights, to_released
from localmamba.photos import eval_transform, photo_folder, photo_loaders, train_transform
from localmamba.recipes import EMA, Mix, RECIPES, TopRecord, fit_options, recipe
from localmamba.runs import Run
from localmamba.launch import main
from localmamba.optim import param_groups
from localmamba.train import NonFiniteLoss, fit, learner, seed_everything
from test_train import Batches, Stop, data, digits, fastais, global_torchs, mlp, ours, same, torchs

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope='module')
def photographs(tmp_path_factory):
    "Two classes of 224-pixel photographs, laid out as ImageNet is"
    home, rng = tmp_path_factory.mktemp('data')/'photographs', np.random.default_rng(0)
    for split, n in (('train', 6), ('val', 4)):
        for cls, photo in zip(('n01', 'n02'), load_sample_images().images):
            (home/split/cls).mkdir(parents=True)
            for i in range(n):
                top, left = int(rng.integers(0, 427 - 224)), int(rng.integers(0, 640 - 224))
                Image.fromarray(photo[top:top + 224, left:left + 224]).save(home/split/cls/f'{i}.JPEG')
    return home


def photos(home):
    views = train_transform(16), eval_transform(16)
    return photo_loaders(photo_folder(home, 'train'), photo_folder(home, 'valid'), 4, views, seed=1, device='cpu')


# interruptions within an epoch

FULL = dict(epochs=3, lr=1e-2, seed=5, record=TopRecord, grad_clip=0.5)
LOADERS = {f.__name__: f for f in (ours, torchs, global_torchs, fastais, digits)}


@pytest.mark.parametrize('which', [*LOADERS, 'photographs'])
def test_a_checkpoint_within_an_epoch_leaves_no_trace(tmp_path, photographs, which):
    dls = LOADERS.get(which, lambda: photos(photographs))
    model = {'digits': lambda: mlp(3*16*16, 10), 'photographs': lambda: mlp(3*16*16, 2)}.get(which, mlp)
    classes = {'digits': 10, 'photographs': 2}.get(which, 4)
    def run(name): return Run('exp', 'data', {}, name, tmp_path)
    def go(name, *stop):
        return fit(model, dls(), run=run(name), cbs=[Mix(classes, cutmix=0.), EMA(0.9), *stop], checkpoint_steps=1,
                   accumulate=1, **FULL)
    straight = go('straight')
    n = len(dls().train)
    for at in ((0, 2), (1, n - 1), (2, 1)):
        with pytest.raises(KeyboardInterrupt): go('cut', Stop(*at))
        state = run('cut').load_checkpoint()
        assert (state['epoch'], state.get('batches')) == at if at[1] else True
    assert same(straight, go('cut'))


def test_accumulated_and_scaled_steps_survive_too(tmp_path):
    for options in (dict(accumulate=3), dict(amp='fp16'), dict(amp='bf16', accumulate=2)):
        def run(name): return Run('exp', 'data', {k: str(v) for k, v in options.items()}, name, tmp_path)
        straight = fit(mlp, ours(), run=run('straight'), checkpoint_steps=1, **FULL, **options)
        with pytest.raises(KeyboardInterrupt):
            fit(mlp, ours(), run=run('cut'), cbs=[Stop(1, 3)], checkpoint_steps=1, **FULL, **options)
        state = run('cut').load_checkpoint()
        assert (state['epoch'], state['batches']) == (1, 2 if options.get('accumulate') == 2 else 3)
        assert ('scaler' in state) == (options.get('amp') == 'fp16')
        assert same(straight, fit(mlp, ours(), run=run('cut'), checkpoint_steps=1, **FULL, **options)), options


def test_minutes_decide_as_well(tmp_path):
    run = Run('exp', 'data', {}, 'minutes', tmp_path)
    with pytest.raises(KeyboardInterrupt): fit(mlp, ours(), run=run, cbs=[Stop(0, 2)], checkpoint_minutes=1e-9, **FULL)
    assert run.load_checkpoint()['batches'] == 2
    run = Run('exp', 'data', {}, 'never', tmp_path)
    with pytest.raises(KeyboardInterrupt): fit(mlp, ours(), run=run, cbs=[Stop(0, 2)], checkpoint_minutes=0., **FULL)
    assert run.load_checkpoint() is None


def test_a_truncated_checkpoint_gives_way_to_the_one_before(tmp_path):
    run = Run('exp', 'data', {}, 'cut', tmp_path)
    straight = fit(mlp, ours(), **FULL)
    with pytest.raises(KeyboardInterrupt): fit(mlp, ours(), run=run, cbs=[Stop(1, 3)], checkpoint_steps=1, **FULL)
    whole = run.checkpoint_path.read_bytes()
    run.checkpoint_path.write_bytes(whole[:len(whole) // 2])
    with pytest.warns(UserWarning, match='going back to the one before'):
        assert same(straight, fit(mlp, ours(), run=run, checkpoint_steps=1, **FULL))


KILLED = '''
import os, signal, sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from localmamba import runs
from test_train import Callback, Run, fit, mlp, ours
from test_imagenet import FULL

class Kill(Callback):
    def before_batch(self):
        if self.training and (self.epoch, self.iter) == (1, 2): os.kill(os.getpid(), signal.SIGKILL)

def full(self, state, whole=Run.save_checkpoint):
    if state['epoch'] == 2 and 'batches' in state:
        with runs.whole_file(self.dir/'checkpoint.new.pt') as f:
            f.write(b'PK' * 1000)
            raise OSError(28, 'No space left on device')
    whole(self, state)

def go(name, *cbs):
    fit(mlp, ours(), run=Run('exp', 'data', {{}}, name, sys.argv[1]), cbs=cbs, checkpoint_steps=1, **FULL)
for what in ('kill', 'full', None):
    child = os.fork()
    if child == 0:
        if what == 'full': Run.save_checkpoint = full
        try: go('killed', *([Kill()] if what == 'kill' else []))
        except OSError: os._exit(28)
        go('straight')
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
'''


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork and SIGKILL')
def test_killed_in_mid_epoch_and_stopped_by_a_full_disk(tmp_path):
    said = subprocess.run([sys.executable, '-W', 'ignore', '-c', KILLED.format(tests=str(ROOT/'tests')), str(tmp_path)],
                          env={**os.environ, 'PYTHONPATH': str(ROOT)}, capture_output=True, text=True)
    assert said.stdout.split() == ['-9', '28', '0'], said.stderr
    straight, killed = (Run('exp', 'data', {}, name, tmp_path) for name in ('straight', 'killed'))
    assert same((killed.metrics, killed.history), (straight.metrics, straight.history))


def test_nan_names_the_files_of_the_batch(photographs):
    class Poison(Callback):
        def before_batch(self):
            if self.training and self.iter == 1: self.learn.xb = (self.xb[0] * float('nan'),)
    with pytest.raises(NonFiniteLoss, match=r'step 1 .*the batch: .*/train/n0\d/\d.JPEG, '):
        fit(lambda: mlp(3*16*16, 2), photos(photographs), cbs=[Poison()], **FULL)
    with pytest.raises(NonFiniteLoss, match='the batch: digits, train: image .* and 24 more'):
        fit(lambda: mlp(3*16*16, 10), digits(), cbs=[Poison()], **FULL)


# the recipe

def test_accumulated_steps_equal_a_larger_batch():
    def last(bs, accumulate):
        x, y = data()
        seed_everything(0)
        model = nn.Linear(16, 4)
        fit(model, DataLoaders(Batches(x[:128], y[:128], bs, seed=0), Batches(x[128:], y[128:], 32)), 2, lr=1e-2,
            accumulate=accumulate, warmup_epochs=1, seed=3)
        return model.weight.detach()
    torch.testing.assert_close(last(8, 4), last(32, 1))


def test_accumulation_at_the_end_of_an_epoch_counts_what_is_left():
    seen = []
    class Spy(Callback):
        order = 100
        def before_step(self): seen.append((self.iter, self.model.weight.grad.clone()))
    x, y = data()
    model = nn.Linear(16, 4)
    fit(model, DataLoaders(Batches(x[:128], y[:128], 32), Batches(x[128:], y[128:], 32)), 1, lr=0., min_lr=0.,
        weight_decay=0., accumulate=3, cbs=[Spy()])
    assert [i for i, _ in seen] == [2, 3]
    for part, (_, grad) in zip((slice(0, 96), slice(96, 128)), seen):
        expected, = torch.autograd.grad(nn.functional.cross_entropy(model(x[part]), y[part]), model.weight)
        torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize('name', RECIPES)
def test_every_recipe_trains(name):
    r = recipe(name, epochs=2, warmup_epochs=1., cooldown_epochs=min(1, RECIPES[name]['cooldown_epochs']),
               layer_decay=1.)
    options = fit_options(r | dict(cutmix=0.), 4)
    metrics, history = fit(mlp, ours(), **options)
    assert len(history) == 2 and np.isfinite(metrics['train_loss']) and {'top1', 'top5'} <= set(metrics)
    assert [type(cb) for cb in options['cbs']] == [c for c, on in ((Mix, r['mixup'] or r['cutmix']), (EMA, r['ema']))
                                                   if on]


def test_schedules_change_when_published_ones_do():
    def rates(name, **changes):
        seen = []
        class Spy(Callback):
            order = 100
            def after_step(self): seen.append(self.opt.opt.param_groups[0]['lr'])
        options = fit_options(recipe(name, epochs=6, warmup_epochs=2., cutmix=0., **changes), 4)
        fit(mlp, ours(), **{**options, 'cbs': [Spy()]})
        return np.array(seen).reshape(6, 4)
    release, vim = rates('release'), rates('vim', cooldown_epochs=1)
    assert (np.ptp(release[:2], axis=1)
            == 0).all() and (np.ptp(release[2:], axis=1) > 0).all() and release[2, 0] == 1e-3
    assert (np.ptp(vim, axis=1) == 0).all() and vim[0, 0] == 1e-6 and vim[5, 0] == pytest.approx(1e-5)
    assert vim[2, 0] == pytest.approx(1e-5 + (1e-3 - 1e-5) * (1 + np.cos(np.pi * 2 / 5)) / 2)


@pytest.mark.parametrize('name', ['test_local_vim', 'test_local_vmamba'])
def test_layers_learn_at_their_rates(name):
    model = timm.create_model(name)
    names = {id(p): n for n, p in model.named_parameters()}
    scale = {names[id(p)]: g['lr_scale'] for g in param_groups(model, layer_decay=0.5) for p in g['params']}
    assert set(scale) == set(names.values())
    stem, head = scale['patch_embed.proj.weight'], scale['head.weight']
    blocks = [v for n, v in scale.items() if n.startswith('layers.')]
    assert stem < min(blocks) <= max(blocks) < head == 1.


# several processes

TOGETHER = '''
import os, sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from fastai.data.core import DataLoaders
from torch import distributed, nn
from localmamba.data import digit_scenes, loaders
from localmamba.recipes import EMA, TopRecord
from localmamba.runs import Run
from localmamba.processes import processes, unwrapped
from localmamba.train import Callback, fit
from test_train import Stop

def problem():
    train, valid = digit_scenes(size=16, n_train=96, n_valid=33)
    return loaders(train, valid, batch_size=16, augment='crop', seed=1, device='cpu')

class Gradients(Callback):
    order = 8
    seen = []
    def before_step(self):
        self.seen.append([p.grad.clone() for p in unwrapped(self.learn.model).parameters()])

def go(name, *cbs, **options):
    spy = Gradients()
    spy.seen = []
    root = sys.argv[1]
    def net(): return nn.Sequential(nn.Flatten(), nn.Linear(768, 16), nn.GELU(), nn.Linear(16, 10))
    out = fit(net, problem(), 2, lr=1e-2, seed=4, record=TopRecord,
              run=Run('exp', 'data', {{}}, name, root), cbs=[EMA(0.9), spy, *cbs], checkpoint_steps=1, **options)
    return spy.seen, out

several = 'WORLD_SIZE' in os.environ
if several: distributed.init_process_group('gloo')
who = 'two' if several else 'one'
seen, out = go(who)
accumulated, _ = go(who + '-accumulated', accumulate=2)
if several:
    try: go('cut', Stop(1, 3))
    except KeyboardInterrupt: pass
    distributed.barrier()
    _, again = go('cut')
    if processes()[0] == 0: torch.save(again[0] | {{'seconds': 0}}, sys.argv[1] + '/again.pt')
if processes()[0] == 0:
    torch.save({{'gradients': seen, 'accumulated': accumulated, 'metrics': out[0] | {{'seconds': 0}},
                'history': out[1].to_dict('list')}}, f'{{sys.argv[1]}}/{{who}}.pt')
if several: distributed.destroy_process_group()
'''


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    script, env = tmp_path/'together.py', {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    script.write_text(TOGETHER.format(tests=str(ROOT/'tests')))
    for command in ([sys.executable, '-W', 'ignore'],
                    [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']):
        said = subprocess.run([*command, str(script), str(tmp_path)], env=env, capture_output=True, text=True)
        assert said.returncode == 0, said.stderr[-3000:]
    one, two = (torch.load(tmp_path/f'{n}.pt', weights_only=False) for n in ('one', 'two'))
    for part in ('gradients', 'accumulated'):
        for a, b in zip(one[part], two[part], strict=True): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert len(one['gradients']) == 12 and len(one['accumulated']) == 6
    for name, value in one['metrics'].items(): assert two['metrics'][name] == pytest.approx(value, rel=1e-4), name
    assert torch.load(tmp_path/'again.pt') == two['metrics'], 'a resumed run of two processes ends elsewhere'
    record = Run('exp', 'data', {}, 'two', tmp_path)
    assert record.finished and len(record.history) == 2


def test_loaders_that_cannot_be_shared_are_refused():
    from localmamba.processes import Together
    learn = learner(mlp(), ours())
    together = Together('cpu')
    together.learn = learn
    with pytest.raises(TypeError, match='allowed between processes'): together.before_fit()


@pytest.mark.slow
def test_the_command_line_trains_and_leaves_the_record_of_the_notebook(tmp_path):
    config = tmp_path/'tiny.yaml'
    config.write_text(yaml.safe_dump(dict(n_train=64, n_valid=20, model='test_local_vim', model_options={}, epochs=1)))
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2',
               '-m', 'localmamba.launch', str(ROOT/'nbs/imagenet.ipynb'), '-f', str(config),
               '--device', 'cpu', '-p', 'seed', '3', '-p', 'recipe_options', '{batch_size: 16}']
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'agg'}
    said = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr[-3000:]
    s = settings(n_train=64, n_valid=20, model='test_local_vim', model_options={}, epochs=1, seed=3,
                 recipe_options={'batch_size': 16})
    run = run_of(s, tmp_path)
    assert run.finished and (run.dir/'weights.pt').exists()
    with pytest.raises(ValueError, match="unknown parameter: got 'sede'"):
        main([str(ROOT/'nbs/imagenet.ipynb'), '-p', 'sede', '3'])


def test_tensorboard_if_asked(tmp_path):
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    _, history = fit(mlp, ours(), tensorboard=tmp_path/'tb', **FULL)
    events = EventAccumulator(str(tmp_path/'tb'))
    events.Reload()
    assert [e.step for e in events.Scalars('top1')] == [0, 1, 2]
    assert [e.value for e in events.Scalars('valid_loss')] == pytest.approx(history.valid_loss.tolist())


# photographs

def test_photographs_of_224_pixels_from_end_to_end(photographs, tmp_path):
    s = settings(dataset='folder', data_dir=str(photographs), n_train=0, n_valid=0, size=224, model='local_vim_nano',
                 recipe_name='paper',
                 model_options={'patch_size': 32, 'embed_dim': 16, 'depth': 1, 'rope_pretrained_grid': 7},
                 epochs=1, recipe_options={'batch_size': 4, 'warmup_epochs': 0.})
    run = train(s, tmp_path, 'cpu')
    saved = torch.load(run.dir/'weights.pt', weights_only=True)
    assert set(saved) == {'model', 'ema_model'} and run.metrics['top1'] == run.history.top1.iloc[-1]
    again = s | dict(epochs=0, checkpoint=str(run.dir/'weights.pt'))
    train_set, valid = image_sets(again)
    said = evaluate(classifier(again, 2), image_loaders(again, train_set, valid, 'cpu').valid, 2)
    assert train_set is None and said['images'] == 8 and said['confusion'].sum() == 8
    assert said['top1'] == run.metrics['top1']


def test_the_notebook_trains_and_evaluates_on_a_folder(photographs, tmp_path, monkeypatch):
    import shutil
    import pandas as pd
    from notebooks import execute
    shutil.copytree(ROOT/'results/paper', tmp_path/'results/paper')
    shutil.copy(ROOT/'settings.ini', tmp_path)
    monkeypatch.chdir(tmp_path)
    told = dict(data_dir=str(photographs), n_train=0, n_valid=0, model='test_local_vim', model_options={},
                recipe_name='paper',
                recipe_options={'batch_size': 4, 'warmup_epochs': 0., 'epochs': 1})
    text, trained = execute('imagenet', **told)
    run = trained['run']
    assert run.finished and {f.name for f
                             in run.dir.iterdir()} == {'params.json', 'env.json', 'history.csv', 'metrics.json',
                                                       'weights.pt', 'confusion.csv'}
    text, judged = execute('imagenet', **told, checkpoint=str(run.dir/'weights.pt'), epochs=0)
    table = pd.read_csv(tmp_path/'results/imagenet/photographs/table.csv')
    assert sorted(table.epochs_done) == [0, 1] and table.top1.nunique() == 1 and judged['run'].metrics['images'] == 8
    again = execute('imagenet', **told)[1]['run']
    assert again.name == run.name and len(pd.read_csv(tmp_path/'results/imagenet/photographs/table.csv')) == 2


@pytest.mark.parametrize('skip', [False, True])
def test_a_corrupt_photograph(photographs, tmp_path, skip):
    import shutil
    home = tmp_path/'photographs'
    shutil.copytree(photographs, home)
    (home/'train/n01/2.JPEG').write_bytes((home/'train/n01/2.JPEG').read_bytes()[:700])
    s = settings(dataset='folder', data_dir=str(home), n_train=0, n_valid=0, model='test_local_vim', model_options={},
                 recipe_name='paper', epochs=1, skip_corrupt=skip,
                 recipe_options={'batch_size': 4, 'warmup_epochs': 0.})
    if skip: assert train(s, tmp_path, 'cpu').finished
    else:
        with pytest.raises(ValueError, match='corrupt image: .*n01/2.JPEG .*skip_corrupt=True'):
            train(s, tmp_path, 'cpu')


def test_wrong_folders(tmp_path, photographs):
    with pytest.raises(ValueError, match='has no images under train/<class>/; allowed: the expected layout'):
        photo_folder(photographs/'train', 'train')
    with pytest.raises(FileNotFoundError, match='is not a folder; allowed: the expected layout'):
        photo_folder(photographs/'nothing', 'train')
    (tmp_path/'train').mkdir()
    with pytest.raises(ValueError, match='no images under'): photo_folder(tmp_path, 'train')
    with pytest.raises(ValueError, match="data_dir: got ''; allowed: a folder of photographs"):
        image_sets(settings(dataset='folder'))
    with pytest.raises(ValueError, match='augment=.crop., for images in memory'):
        image_loaders(s := settings(dataset='folder', data_dir=str(photographs), recipe_options={'augment': 'crop'}),
                      *image_sets(s), 'cpu')


# checkpoints

def test_what_the_authors_released_is_named():
    for name, file in (('local_vim_tiny', 'local_vim_tiny'),
                       ('local_vim_tiny_midcls', 'local_vim_tiny_middle_cls_token'),
                       ('local_vmamba_small', 'local_vssm_small')):
        for full in (name, f'{name}.hunto_in1k'):
            home = 'https://github.com/hunto/LocalMamba/releases/download/v1.0.0'
            assert timm.get_pretrained_cfg(full).url == f'{home}/{file}.ckpt'
    for name in ('local_vim_small', 'local_vmamba_tiny', 'local_vim_tiny_unsearched'):
        with pytest.raises(RuntimeError, match='No pretrained weights'): timm.create_model(name, pretrained=True)


@pytest.mark.parametrize('name, options',
                         [('test_local_vim', {}), ('test_local_vim', dict(readout='mid_cls', rope=False)),
                          ('test_local_vmamba', {})])
def test_timm_loads_a_released_file(tmp_path, name, options):
    model = timm.create_model(name, **options)
    torch.save({'state_dict': to_released(model)}, tmp_path/'file.ckpt')
    told = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path/'file.ckpt')), **options)
    pairs = (without_facts(m.state_dict()).items() for m in (model, timm.create_model(name, **told)))
    for a, b in zip(*pairs, strict=True): assert a[0] == b[0] and torch.equal(a[1], b[1])
    other = timm.create_model(name, num_classes=7, **told)
    assert other.head.weight.shape[0] == 7
    assert torch.equal(next(iter(other.layers.parameters())), next(iter(model.layers.parameters())))


def test_checkpoints_of_other_models_are_refused(tmp_path):
    mine = timm.create_model('test_local_vim')
    torch.save({'model': mine.state_dict()}, tmp_path/'mine.pt')
    load_weights(timm.create_model('test_local_vim'), tmp_path/'mine.pt')
    with pytest.raises(RuntimeError,
                       match='the weights belong to directions h, h_flip, w2, w2_flip; the model has v, v_flip'):
        load_weights(timm.create_model('test_local_vim', directions=('v', 'v_flip', 'h', 'h_flip')), tmp_path/'mine.pt')
    with pytest.raises(ValueError, match=r'of another shape .*\(16, 3, 4, 4\) instead of \(24, 3, 4, 4\)'):
        load_weights(timm.create_model('test_local_vim', embed_dim=24), tmp_path/'mine.pt')
    with pytest.raises(ValueError, match=r'does not fit this LocalVMamba: [\s\S]*missing'):
        load_weights(timm.create_model('test_local_vmamba'), tmp_path/'mine.pt')
    with pytest.raises(ValueError, match=r'does not fit this VisionTransformer: [\s\S]*missing'):
        load_weights(timm.create_model('test_vit', num_classes=10), tmp_path/'mine.pt')
    with pytest.raises(ValueError, match='head.weight .10, 16. instead of .7, 16.'):
        load_weights(timm.create_model('test_local_vim', num_classes=7), tmp_path/'mine.pt')
    tuned = load_weights(timm.create_model('test_local_vim', num_classes=7, img_size=48), tmp_path/'mine.pt',
                         new_head=True)
    assert tuned.head.weight.shape[0] == 7 and tuned.pos_embed.shape[1] == 144


def test_the_notebook_and_the_module_have_the_same_settings():
    import ast, nbformat
    cell = next(c for c in nbformat.read(ROOT/'nbs/imagenet.ipynb', 4).cells if 'parameters'
                in c.metadata.get('tags', []))
    said = {node.targets[0].id: ast.literal_eval(node.value) for node in ast.parse(cell.source).body}
    assert said == SETTINGS | ASIDE and list(said) == list(SETTINGS | ASIDE)


ROWS = sorted((ROOT/'nbs/configs/imagenet').glob('*.yaml'))

@pytest.mark.parametrize('path', ROWS, ids=lambda p: p.stem)
def test_configurations_build_the_row_they_name(path):
    import pandas as pd
    s = settings(**yaml.safe_load(path.read_text()))
    paper = pd.read_csv(ROOT/'results/paper/imagenet.csv').drop_duplicates('method').set_index('method')
    with torch.device('meta'): model = classifier(s | dict(pretrained=False), 1000 if s['dataset'] == 'folder' else 10)
    if s['dataset'] == 'folder':
        assert sum(p.numel() for p
                   in model.parameters()) / 1e6 == pytest.approx(paper.params_m[s['row'].split(',')[0]], abs=0.9)
    else: assert s['dataset'] == 'cifar10' and s['row'] not in paper.index
    assert chosen_recipe(s)


def test_what_a_recipe_cannot_do_is_said():
    "Values for photographs beside images in memory; a warm-up that is the whole training; epochs given twice."
    for unused in ({'hflip': 0.}, {'random_erasing': .9}, {'repeats': 3}):
        with pytest.raises(ValueError, match=f'recipe_options: got {next(iter(unused))}; allowed: .* photographs'):
            chosen_recipe(settings(recipe_options=unused))
        assert chosen_recipe(settings(dataset='folder', data_dir='x', recipe_options=unused))
    with pytest.warns(UserWarning, match='epochs: 3 are no more than warmup_epochs'):
        chosen_recipe(settings(recipe_name='release', epochs=3))
    for twice in ({'epochs': 5}, {'name': 'paper'}):
        with pytest.raises(ValueError, match='recipe_options: got'):
            chosen_recipe(settings(epochs=3, recipe_options=twice))
