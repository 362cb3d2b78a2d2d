"The models as others use them: timm, fastai, torch.compile, torch.export, autocast, and the command line."
import shutil
import subprocess
import sys

import pytest
import timm
import torch
from PIL import Image
from timm.optim import param_groups_layer_decay
from torch.testing import assert_close

import localmamba  # noqa: F401  registers the models

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
@pytest.mark.parametrize('name, kwargs', [('test_local_vmamba', {})] + [('test_local_vim', {'readout': r}) for r in ('mean', 'head_cls', 'mid_cls')])
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
    model = timm.create_model(name, directions=('h', 'v'), scattn='none', **({'rope': False, 'abs_pos_embed': False} if 'vim' in name else {})).eval()
    image = torch.randn(2, 3, 24, 40)
    swapped = timm.create_model(name, directions=('v', 'h'), scattn='none', **({'rope': False, 'abs_pos_embed': False} if 'vim' in name else {})).eval()
    state = dict(model.state_dict())  # a plain dict: the directions differ on purpose
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
    for feature, channels, reduction in zip(backbone(x), backbone.feature_info.channels(), backbone.feature_info.reduction()):
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

@pytest.mark.parametrize('backend, kwargs', [('aot_eager', {}), pytest.param('inductor', {'depth': 1}, marks=needs_compiler)],
                         ids=['traced', 'compiled'])
def test_compile(backend, kwargs):
    "One graph, forward and backward; the compiler itself is slow on a CPU, so it gets one small model."
    for name in NAMES[:1] if kwargs else NAMES:
        torch.manual_seed(0)
        model, x = timm.create_model(name, **kwargs), torch.randn(2, 3, 32, 32)
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
        gradients = [torch.autograd.grad(m(x).square().sum(), list(model.parameters())) for m in (compiled, model)]
        for ours, expected in zip(*gradients): assert_close(ours, expected, rtol=1e-3, atol=1e-4)


def test_the_command_line_says_what_is_there():
    text = subprocess.run([sys.executable, '-m', 'localmamba'], capture_output=True, text=True, check=True).stdout
    for word in ('localmamba', 'torch', 'device', 'reference', 'numba', 'mamba_ssm'): assert word in text
