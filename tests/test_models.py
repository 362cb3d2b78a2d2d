"The models as others use them: timm, fastai, torch.compile, torch.export, autocast, and the command line."
import copy
import io
import json
import pickle
import runpy
import shutil

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.optim import param_groups_layer_decay
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel
from torch.testing import assert_close

import localmamba.scattn
from localmamba.cost import count_flops
from localmamba.mixer import SS2D, VimMixer, without_facts
from localmamba.models.weights import load_weights, to_released

NAMES = ['test_local_vim', 'test_local_vmamba']
SIZES = [(32, 32), (30, 51), (7, 64)]


@pytest.fixture(params=NAMES)
def name(request): return request.param


def test_import_registers_every_name():
    registered = set(timm.list_models(module='localvim') + timm.list_models(module='localvmamba'))
    assert registered >= {
        'local_vim_tiny', 'local_vim_tiny_unsearched', 'local_vim_tiny_midcls', 'local_vim_tiny_supernet',
        'local_vim_small', 'local_vim_small_unsearched', 'local_vim_small_midcls', 'local_vim_small_supernet',
        'local_vmamba_tiny', 'local_vmamba_tiny_supernet', 'local_vmamba_small', 'local_vmamba_small_supernet',
        'vim_tiny', 'vim_tiny_midcls', 'vim_small', 'vim_small_midcls', 'vmamba_tiny', 'vmamba_small',
        'local_vim_nano', 'local_vmamba_nano', 'test_local_vim', 'test_local_vmamba'}


@pytest.mark.parametrize('size', SIZES, ids=str)
@pytest.mark.parametrize('name, kwargs', [('test_local_vmamba', {})] + [('test_local_vim', {'readout': r})
                                                                       for r in ('mean', 'head_cls', 'mid_cls')])
def test_any_size_without_memory(name, kwargs, size):
    model = timm.create_model(name, **kwargs).eval()
    image, other = torch.randn(2, 3, *size), torch.randn(1, 3, 40, 24)
    with torch.no_grad():
        before = model(image)
        model(other)
        assert torch.equal(model(image), before)
    assert before.shape == (2, 10) and before.isfinite().all()


def test_wide_and_tall_images_see_the_same_pixels(name):
    "A model that scans rows and columns alike commutes with transposing the image, if its weights do."
    options = dict(scattn='none') | ({'rope': False, 'abs_pos_embed': False} if 'vim' in name else {})
    model = timm.create_model(name, directions=('h', 'v'), **options).eval()
    image = torch.randn(2, 3, 24, 40)
    swapped = timm.create_model(name, directions=('v', 'h'), **options).eval()
    state = without_facts(model.state_dict())  # the directions differ on purpose
    for key, value in state.items():
        if 'patch_embed.proj.weight' in key or 'conv2d.weight' in key: state[key] = value.mT.contiguous()
        if 'reduction.weight' in key or 'downsample.norm' in key:
            a, b, c, d = value.chunk(4, -1)
            state[key] = torch.cat([a, c, b, d], -1)
    swapped.load_state_dict(state)
    with torch.no_grad(): assert_close(swapped(image.mT.contiguous()), model(image), rtol=1e-4, atol=1e-5)


def test_heads_and_features(name):
    model = timm.create_model(name, num_classes=0)
    x = torch.randn(2, 3, 32, 32)
    assert model(x).shape == (2, model.num_features)
    model.reset_classifier(7)
    assert model(x).shape == (2, 7) and model.get_classifier().out_features == 7
    backbone = timm.create_model(name, features_only=True, out_indices=(0, 1))
    info = backbone.feature_info
    for feature, channels, reduction in zip(backbone(x), info.channels(), info.reduction()):
        assert feature.shape == (2, channels, 32 // reduction, 32 // reduction)


def test_one_channel_and_other_patches():
    assert timm.create_model('test_local_vim', in_chans=1, patch_size=5)(torch.randn(1, 1, 33, 32)).shape == (1, 10)


def test_weight_decay_leaves_state_parameters_alone(name):
    model = timm.create_model(name)
    spared = model.no_weight_decay()
    assert {n.rpartition('.')[2] for n in spared} >= {'A_log', 'D', 'dt_bias'}
    assert spared <= {n for n, _ in model.named_parameters()}
    layers = param_groups_layer_decay(model, 0.05, layer_decay=0.5)
    assert sum(p.numel() for g in layers for p in g['params']) == sum(p.numel() for p in model.parameters())


def test_fastai_vision_learner(tmp_path):
    "fastai's own loaders and normalisation, and ours."
    from fastai.vision.all import ImageDataLoaders, vision_learner
    from localmamba.data import digit_scenes, loaders
    train, valid = digit_scenes(n_train=80, n_valid=40)
    for split, images in (('train', train), ('valid', valid)):
        for i, (image, label) in enumerate(images):
            folder = tmp_path/split/str(label)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder/f'{i}.png')
    for dls in (ImageDataLoaders.from_folder(tmp_path, bs=16, num_workers=0, device='cpu'),
                loaders(train, valid, batch_size=16, device='cpu', path=tmp_path)):
        learn = vision_learner(dls, 'local_vim_nano', pretrained=False)
        with learn.no_bar(), learn.no_logging(): learn.fit(1)
        assert learn.get_preds()[0].shape == (40, 10)


def test_supernet_weights_its_branches(name):
    model = timm.create_model(name, directions='search')
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    alphas = [p for n, p in model.named_parameters() if n.endswith('alpha')]
    assert len(alphas) == len(model.directions) and all(a.grad.abs().sum() > 0 for a in alphas)


def test_gradients_are_bit_equal_from_run_to_run(name):
    model = timm.create_model(name)
    x = torch.randn(4, 3, 32, 32)
    first, again = (torch.autograd.grad(model(x).square().sum(), list(model.parameters())) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again))


def test_bf16_autocast_stays_close(name):
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        full = model(x)
        with torch.autocast('cpu', torch.bfloat16): half = model(x)
    assert_close(half.float(), full, rtol=0.05, atol=0.02)


def test_half_weights_run(name):
    model = timm.create_model(name).to(torch.bfloat16).eval()
    with torch.no_grad(): assert model(torch.randn(1, 3, 32, 32, dtype=torch.bfloat16)).isfinite().all()


def test_float64_runs_on_the_reference(name):
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        single = model(x)
        assert_close(single.double(), model.double()(x.double()), rtol=1e-4, atol=1e-5)


def test_export(name):
    model = timm.create_model(name).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad(): exported = torch.export.export(model, (x,)).module()
    assert_close(exported(x), model(x))


needs_compiler = pytest.mark.skipif(not shutil.which('g++'), reason='no C++ compiler')

@pytest.mark.parametrize('backend, kwargs', ids=['traced', 'compiled'], argvalues=[
    ('aot_eager', {}), pytest.param('inductor', {'depth': 1}, marks=[needs_compiler, pytest.mark.slow])])
def test_compile(backend, kwargs):
    "One graph, forward and backward; the compiler itself is slow on a CPU, so it gets one small model."
    for name in NAMES[:1] if kwargs else NAMES:
        torch.manual_seed(0)
        model, x = timm.create_model(name, **kwargs), torch.randn(2, 3, 32, 32)
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
        gradients = [torch.autograd.grad(m(x).square().sum(), list(model.parameters())) for m in (compiled, model)]
        for ours, expected in zip(*gradients): assert_close(ours, expected, rtol=1e-3, atol=1e-4)


def test_the_command_line_says_what_is_there(capsys):
    runpy.run_module('localmamba', run_name='__main__')
    text = capsys.readouterr().out
    for word in ('localmamba', 'torch', 'device', 'reference', 'numba', 'mamba_ssm'): assert word in text


# what the weights belong to, in every container

def through_pickle(state):
    file = io.BytesIO()
    torch.save(dict(state), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def through_safetensors(state, folder):
    save_file(state, folder/'weights.safetensors')
    return load_file(folder/'weights.safetensors')


def averaged(model):
    ema = AveragedModel(model, use_buffers=True)
    for _ in range(3): ema.update_parameters(model)
    return ema.module.state_dict()


def by_hand(model):
    ema = {k: v.clone() for k, v in model.state_dict().items()}
    for _ in range(50):
        for k, v in model.state_dict().items(): ema[k].mul_(0.99).add_(v, alpha=0.01)
    return ema


def timms(kind, model):
    ema = kind(model, decay=0.9)
    ema.update(model)
    return dict(ema.module.state_dict())


CONTAINERS = {
    'plain': lambda model, folder: dict(model.state_dict()),
    'torch.save': lambda model, folder: through_pickle(model.state_dict()),
    'safetensors': lambda model, folder: through_safetensors(model.state_dict(), folder),
    'averaged': lambda model, folder: averaged(model), 'by hand': lambda model, folder: by_hand(model),
    'EMA 2': lambda model, folder: timms(ModelEmaV2, model), 'EMA 3': lambda model, folder: timms(ModelEmaV3, model),
    'half': lambda model, folder: {k: v.half() for k, v in model.state_dict().items()},
    'bfloat16': lambda model, folder: {k: v.bfloat16() for k, v in model.state_dict().items()}}
OTHERS = {  # tensors of the same shapes, another model
    'test_local_vim': [dict(directions=('v', 'v_flip', 'h', 'h_flip')), dict(merge='mean'), dict(padding='ragged'),
                       dict(rope=False), dict(rope_pretrained_grid=14), dict(scattn_at='merged')],
    'test_local_vmamba': [dict(directions=('h', 'h_flip', 'w3', 'w2_flip')), dict(merge='mean'), dict(padding='ragged'),
                          dict(scattn_at='merged')]}


@pytest.mark.parametrize('container', CONTAINERS)
def test_weights_of_another_model_are_refused(name, container, tmp_path):
    model = timm.create_model(name)
    state = CONTAINERS[container](model, tmp_path)
    timm.create_model(name).load_state_dict(state)
    for kwargs in OTHERS[name][:None if container == 'plain' else 1]:
        other = timm.create_model(name, **kwargs)
        with pytest.raises(RuntimeError, match='the weights belong to'): other.load_state_dict(state)
        with pytest.raises(RuntimeError, match='the weights belong to'): other.load_state_dict(state, strict=False)
        with pytest.raises(ValueError, match='does not fit this'): load_weights(other, dict(state))
        assert other.load_state_dict(without_facts(state)).missing_keys == []


def test_the_class_token_belongs_to_the_weights():
    head, middle = (timm.create_model('test_local_vim', readout=r, flip_cls=False) for r in ('head_cls', 'mid_cls'))
    with pytest.raises(RuntimeError, match="belong to readout='head_cls'; the model has 'mid_cls'"):
        middle.load_state_dict(dict(head.state_dict()))


def test_as_many_tokens_on_another_grid(tmp_path):
    "The position embedding of 4 × 16 tokens would fit 8 × 8, and be another picture."
    wide, square = (timm.create_model('test_local_vim', depth=1, img_size=s).eval() for s in ((16, 64), 32))
    with pytest.raises(RuntimeError, match='the weights belong to 4 × 16 tokens; the model has 8 × 8'):
        square.load_state_dict(dict(wide.state_dict()))
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad(): expected = wide(x)
    assert_close(load_weights(square, wide.state_dict())(x), expected)
    assert square.rope_grids == ((4, 16), (8, 8))
    again = timm.create_model('test_local_vim', depth=1).eval()
    again.load_state_dict(dict(square.state_dict()))
    assert_close(again(x), expected)
    save_file(wide.state_dict(), tmp_path/'a.safetensors')
    overlay = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path/'a.safetensors')))
    assert_close(timm.create_model('test_local_vim', depth=1, **overlay).eval()(x), expected)
    with pytest.raises(RuntimeError, match='4 × 16 tokens'):  # timm resizes nothing here
        timm.create_model('test_local_vim', depth=1, checkpoint_path=str(tmp_path/'a.safetensors'))


def test_older_files_have_metadata_only(name):
    model, other = timm.create_model(name), timm.create_model(name, directions=('v', 'h', 'w2', 'w3'))
    state = model.state_dict()
    for where, module in model.named_modules():
        if isinstance(module, (VimMixer, SS2D)): state._metadata[where]['directions'] = list(module.directions)
    for key in [k for k in state if k.endswith('_extra_state')]: del state[key]
    timm.create_model(name).load_state_dict(state)
    with pytest.raises(RuntimeError, match='the weights belong to directions'): other.load_state_dict(state)
    with pytest.raises(ValueError, match='the weights belong to directions'): load_weights(other, {'model': state})


@pytest.fixture
def files(name, tmp_path):
    "A model, and its weights as ours and as released ones."
    model = timm.create_model(name).eval()
    save_file(model.state_dict(), tmp_path/'own.safetensors')
    torch.save({'state_dict': model.state_dict()}, tmp_path/'own.pth.tar')
    released = {'model': to_released(timm.create_model(name)), 'model_ema': to_released(model)}
    torch.save(released, tmp_path/'released.ckpt')
    return model, [tmp_path/'own.safetensors', tmp_path/'own.pth.tar', tmp_path/'released.ckpt']


def test_checkpoint_path_and_file(name, files):
    model, paths = files
    x = torch.randn(1, 3, 32, 32)
    for path in paths:
        overlay = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(path)))
        for kwargs in (dict(checkpoint_path=str(path)), overlay):
            with torch.no_grad(): assert_close(timm.create_model(name, **kwargs).eval()(x), model(x))
            with pytest.raises(RuntimeError): timm.create_model(name, **kwargs, directions=('v', 'h', 'w5'))
        for kwargs in (dict(num_classes=7), dict(in_chans=1), dict(in_chans=13, num_classes=2, img_size=48)):
            made = timm.create_model(name, **overlay, **kwargs)
            assert made(torch.randn(1, made.in_chans, 48, 40)).shape == (1, made.num_classes)
            assert torch.equal(made.mixers[-1].x_proj, model.mixers[-1].x_proj)
        ways = overlay, dict(checkpoint_path=str(path))
        maps = [timm.create_model(name, features_only=True, **kwargs).eval()(x) for kwargs in ways]
        for a, b, c in zip(*maps, model.forward_intermediates(x, intermediates_only=True)):
            assert_close(a, b)
            assert_close(a, c)


@pytest.mark.parametrize('kwargs', ids=str, argvalues=[
    dict(directions=[['h', 'v'], ['w3', 'v_flip'], ['h', 'v']], num_classes=5, in_chans=1, padding='ragged'),
    dict(directions='search'), dict(scattn='both', scattn_at='merged', img_size=64)])
def test_saved_for_the_hub(name, kwargs, tmp_path):
    if name == 'test_local_vim':
        kwargs = kwargs | dict(readout='mid_cls', depth=3)
    model = timm.create_model(name, **kwargs).eval()
    timm.models.save_for_hf(model, tmp_path, safe_serialization='both')
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    x = torch.randn(2, model.in_chans, 40, 32)
    with torch.no_grad(): assert_close(again(x), model(x))
    args = json.loads((tmp_path/'config.json').read_text())['model_args']
    assert {'directions', 'scattn', 'scattn_at', 'merge', 'padding'} <= args.keys()
    assert again.directions == model.directions


@pytest.mark.parametrize('make', [iter, dict.fromkeys, np.array, lambda names: (n for n in names)])
def test_directions_of_any_kind_are_listed(name, make, tmp_path):
    two = dict(depths=(1, 1)) if name == 'test_local_vmamba' else dict(depth=2)
    for given in (make(['h', 'v']), [make(['h', 'v']), make(['w2', 'v'])], iter([('h', 'v'), ('w2', 'h')])):
        model = timm.create_model(name, directions=given, candidates=make(['h', 'w3']), **two)
        assert len(model.directions) == 2 and {len(layer) for layer in model.directions} == {2}
        timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
        args = json.loads((tmp_path/'config.json').read_text())['model_args']
        assert args['directions'] == [list(layer) for layer in model.directions] and args['candidates'] == ['h', 'w3']
    searched = timm.create_model(name, directions='search', candidates=make(['h', 'w3']), **two)
    assert searched.directions == [('h', 'w3')] * 2
    with pytest.raises(ValueError, match='which has no order'): timm.create_model(name, directions={'h', 'v'}, **two)


def test_img_size_is_accepted():
    model = timm.create_model('local_vmamba_nano', img_size=64, depths=(1, 1, 1))
    assert model(torch.randn(1, 3, 48, 40)).shape == (1, 10)
    with pytest.raises(ValueError, match=r'img_size\[0\]: got 0'): timm.create_model('test_local_vmamba', img_size=0)


def test_copies(name):
    model, x = timm.create_model(name).eval(), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), AveragedModel(model)):
            assert_close(copied.eval()(x), model(x))
        assert_close(torch.func.functional_call(model, dict(model.state_dict()), x), model(x))


# what wraps a module sees it

needs_plain = pytest.mark.skipif(not hasattr(localmamba.scattn, 'plain'), reason='the gate cannot tell yet')

@needs_plain
@pytest.mark.parametrize('backend', ['', 'reference'])
def test_hooks_and_replaced_layers(name, backend, monkeypatch):
    if backend: monkeypatch.setenv('LOCALMAMBA_BACKEND', backend)
    model, x, seen = timm.create_model(name).eval(), torch.randn(2, 3, 32, 32), []
    for p in model.parameters(): nn.init.normal_(p, std=0.3)  # so that every layer matters
    mixer = model.mixers[0]
    with torch.no_grad(): before = model(x)
    for layer in ('in_proj', 'out_proj', 'attn.channel_select', 'attn.global_reduce', 'attn.norm', 'attn'):
        with torch.no_grad():
            def doubled(module, given, answer): return seen.append(1) or answer * 2
            handle = mixer.get_submodule(layer).register_forward_hook(doubled)
            changed, calls = model(x), len(seen)
            handle.remove()
            assert calls and not torch.equal(changed, before), layer
            seen.clear()
            assert_close(model(x), before)

    class Louder(nn.Linear):
        def forward(self, x): return super().forward(x) + 3

    for layer in ('in_proj', 'attn.channel_select', 'attn.global_reduce'):
        other = copy.deepcopy(model)
        other.mixers[0].get_submodule(layer).__class__ = Louder
        with torch.no_grad(): assert not torch.equal(other(x), before), layer
    other = copy.deepcopy(model)
    other.mixers[0].attn = nn.Identity()
    with torch.no_grad(): assert not torch.equal(other(x), before)


@pytest.mark.parametrize('targets', ids=['layers', 'projections'], argvalues=[
    pytest.param(dict(target_modules='all-linear'), marks=needs_plain),
    dict(target_parameters=['mixer.x_proj', 'mixer.dt_proj'])])
def test_lora(name, targets):
    peft = pytest.importorskip('peft')
    net = peft.get_peft_model(timm.create_model(name), peft.LoraConfig(r=2, init_lora_weights=False, **targets))
    net(torch.randn(2, 3, 32, 32)).square().sum().backward()
    adapters = {n: p.grad for n, p in net.named_parameters() if 'lora_' in n}
    assert adapters and all(g is not None and g.abs().sum() > 0 for g in adapters.values()), adapters.keys()


def test_pruning_and_parametrised_projections(name):
    model, x = timm.create_model(name), torch.randn(2, 3, 32, 32)
    for p in model.parameters(): nn.init.normal_(p, std=0.3)
    before, mixer = model(x), model.mixers[0]
    layers = mixer.attn.channel_select, mixer.in_proj
    for module, parameter in ((mixer, 'x_proj'), (mixer, 'dt_proj'), *((layer, 'weight') for layer in layers)):
        prune.l1_unstructured(module, parameter, 0.9)
        after = model(x)
        assert not torch.equal(after, before)
        before = after
    before.sum().backward()
    assert mixer.x_proj_orig.grad.abs().sum() > 0


# bare mixers

def test_a_mixer_says_what_it_takes():
    for mixer in (SS2D(16, ('h', 'w2')), VimMixer(16, ('h', 'w2'))):
        assert mixer(torch.randn(2, 5, 7, 16)).shape == (2, 5, 7, 16)
        for wrong in (torch.randn(2, 16, 5, 7), torch.randn(5, 7, 16), torch.randn(2, 5, 7, 16).long(), [1],
                      torch.randn(2, 16, 16, 16).to(memory_format=torch.channels_last)):
            with pytest.raises(ValueError, match=r'\(B, H, W, C\)'): mixer(wrong)
        turned = torch.randn(2, 16, 5, 16).permute(0, 3, 2, 1)  # a map on its side, and a map all the same
        assert_close(mixer(turned), mixer(turned.contiguous()))
    for cls, taps in ((SS2D, 2), (SS2D, 4), (SS2D, 0), (VimMixer, 0), (VimMixer, 9), (VimMixer, 2.5), (VimMixer, 2.),
                      (VimMixer, True)):
        with pytest.raises(ValueError, match='d_conv: got'): cls(16, d_conv=taps)
    with pytest.raises(ValueError, match='dt_rank: got'): SS2D(16, dt_rank=-1)


@pytest.mark.parametrize('cls', [SS2D, VimMixer])
def test_a_hook_on_a_mixer_fires_once(cls):
    mixer, x, seen = cls(8, ('h', 'v')), torch.randn(2, 4, 5, 8), []
    expected = 2 * mixer(x)
    mixer.register_forward_pre_hook(lambda module, given: seen.append(given[0].shape))
    mixer.register_forward_hook(lambda module, given, answer: 2 * answer)
    assert_close(mixer(x), expected)
    assert seen == [x.shape]


def test_any_module_is_counted():
    class UNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.mixer, self.out = nn.Conv2d(1, 8, 3, padding=1), SS2D(8, ('h', 'v')), nn.Conv2d(8, 2, 1)
        def forward(self, image):
            return self.out(self.mixer(x=self.stem(image).permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
    net = UNet()
    bare, convolutions = count_flops(net.mixer, (12, 9)), 12 * 9 * 8 * (9 + 2)
    assert count_flops(net, (12, 9)) == count_flops(net, torch.zeros(1, 1, 12, 9)) == bare + convolutions
    mixer, tokens = SS2D(18), torch.zeros(1, 64, 64, 18)
    assert count_flops(mixer, 64) == count_flops(mixer, dict(x=tokens)) > 64 * 64 * 18 * 18 * 6
    mixer, tokens = VimMixer(8), torch.zeros(1, 108, 8)
    ways = (12, 9), (tokens, 12, 9), dict(x=tokens, width=9, height=12), tokens.view(1, 12, 9, 8)
    assert len({count_flops(mixer, way) for way in ways}) == 1
    assert count_flops(nn.ReLU(), tokens) == 0

    class Several(nn.Linear):
        def forward(self, images): return [super(Several, self).forward(x) for x in images]
    assert count_flops(Several(3, 4), ([torch.zeros(2, 3), torch.zeros(1, 3)],)) == 36
    for size in (0, '32', None, (32,), 3.5):
        with pytest.raises(ValueError, match='img_size: got'): count_flops(mixer, size)


def test_features_that_are_not_pooled(name):
    "timm's way to ask for them, and back."
    x = torch.randn(2, 3, 32, 32)
    model = timm.create_model(name, num_classes=0, global_pool='').eval()
    assert_close(model(x), model.forward_features(x))
    assert model.forward_head(model.forward_features(x), pre_logits=True).shape == model(x).shape
    model.reset_classifier(3, 'avg')
    assert model(x).shape == (2, 3)
    model.reset_classifier(0, '')
    assert_close(model(x), model.forward_features(x))
    assert timm.create_model(name, global_pool='avg').eval()(x).ndim == 2
    with pytest.raises(ValueError, match="global_pool: got 'max'; allowed: None, '', 'avg'"):
        model.reset_classifier(3, 'max')


def test_numbers_of_classes(name):
    assert timm.create_model(name, num_classes=np.int64(5)).eval()(torch.randn(1, 3, 32, 32)).shape == (1, 5)
    for wrong in (True, 2.5):
        with pytest.raises(ValueError, match='num_classes: got'): timm.create_model(name, num_classes=wrong)


def test_a_model_made_without_numbers_gets_them_all(name):
    "`meta`, `to_empty`, then what draws the weights."
    with torch.device('meta'): model = timm.create_model(name)
    model.to_empty(device='cpu')
    with torch.no_grad():
        for p in model.parameters(): p.fill_(torch.nan)
    for module in model.modules():
        if module is not model and hasattr(module, 'reset_parameters'): module.reset_parameters()
    if hasattr(model, 'init_weights'): model.init_weights()
    assert not [n for n, p in model.named_parameters() if not p.isfinite().all()]


def test_what_flop_counters_miss_is_counted():
    "Fused encoders and LSTMs; a mixer whose gate is somebody's own."
    z = torch.zeros(1, 16, 64)
    assert count_flops(nn.MultiheadAttention(64, 4, batch_first=True), (z, z, z)) == 4 * 16 * 64**2 + 2 * 16**2 * 64
    assert count_flops(nn.LSTM(8, 16, batch_first=True), torch.zeros(1, 5, 8)) == 5 * 4 * 16 * (8 + 16)
    assert torch.backends.mha.get_fastpath_enabled()
    model = timm.create_model('test_local_vmamba', scattn='none')
    expected = count_flops(model, 32)
    for mixer in model.mixers: mixer.attn = nn.Identity()
    assert count_flops(model, 32) == expected


def test_narrow_mixers():
    for mixer in (SS2D(2), SS2D(3), VimMixer(1)): assert mixer(torch.randn(1, 4, 4, mixer.dim)).shape[-1] == mixer.dim
