"docs/use.md beyond its own blocks: the files run without this package; encoders of segmentation_models_pytorch."
import json
import multiprocessing
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrize import register_parametrization
from torch.optim.swa_utils import AveragedModel
from torch.testing import assert_close

import localmamba  # noqa: F401  registers the models
from localmamba.export import model_card, to_onnx, to_pt2, traced
from localmamba.mixer import SS2D, VimMixer

NAMES = 'test_local_vim', 'test_local_vmamba'
SMALL = dict(test_local_vim=dict(depth=1, img_size=16), test_local_vmamba=dict(dims=(16,), depths=(1,)))


def small(name):
    "A model of one layer in which every parameter matters, for images of 16 pixels."
    torch.manual_seed(0)
    model = timm.create_model(name, **SMALL[name]).eval()
    for p in model.parameters(): nn.init.normal_(p, std=0.2)
    return model

ALONE = """
import sys
sys.modules['localmamba'] = sys.modules['timm'] = None
import torch
program, images = torch.export.load(sys.argv[1]).module(), torch.load(sys.argv[2])
torch.save(program(images), sys.argv[3])
"""


def test_a_pt2_file_runs_without_this_package(tmp_path):
    model, images = timm.create_model('test_local_vim', depth=1).eval(), torch.randn(3, 3, 32, 32)
    torch.save(images, tmp_path/'x')
    program = to_pt2(model, tmp_path/'model.pt2')
    command = [sys.executable, '-W', 'ignore', '-c', ALONE, program, tmp_path/'x', tmp_path/'y']
    subprocess.run(command, check=True, cwd=tmp_path)
    with torch.no_grad(): assert_close(torch.load(tmp_path/'y'), model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['test_local_vim', 'test_local_vmamba'])
def test_a_compiled_package(name, tmp_path):
    model, images = timm.create_model(name).eval(), torch.randn(3, 3, 32, 32)
    loaded = torch._inductor.aoti_load_package(str(to_pt2(model, tmp_path/'model.pt2', compiled=True)))
    with torch.no_grad(): assert_close(loaded(images), model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['backbone', 'segmenter'])
def test_onnx_of_what_stands_on_a_model(kind, tmp_path):
    onnxruntime = pytest.importorskip('onnxruntime')
    from localmamba.models.backbone import backbone_of
    from localmamba.segment import segmenter
    make = {'backbone': backbone_of, 'segmenter': lambda name: segmenter(name, 5, channels=16, aux_channels=0)}[kind]
    model, images = make('test_local_vmamba').eval(), torch.randn(3, 3, 40, 56)
    run = onnxruntime.InferenceSession(to_onnx(model, tmp_path/'model.onnx', img_size=(40, 56)))
    with torch.no_grad(): expected = model(images)
    outputs = [torch.from_numpy(y) for y in run.run(None, {'x': images.numpy()})]
    assert_close(outputs, expected if isinstance(expected, list) else [expected], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['local_vim_tiny', 'local_vmamba_tiny'])
def test_onnx_of_a_full_model(name, tmp_path):
    "Figures of docs/use.md: seconds to export, and onnxruntime's CPU time against ours, on one thread each."
    onnxruntime = pytest.importorskip('onnxruntime')
    model, images = timm.create_model(name).eval(), torch.randn(1, 3, 224, 224)

    def seconds(call, times=5):
        each = []
        for _ in range(times):
            begun = time.process_time()
            call()
            each.append(time.process_time() - begun)
        return min(each)

    export = seconds(lambda: to_onnx(model, tmp_path/'model.onnx'), times=1)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(tmp_path/'model.onnx', options, providers=['CPUExecutionProvider'])
    run = lambda: torch.from_numpy(session.run(None, {'x': images.numpy()})[0])
    with torch.inference_mode():
        assert_close(run(), model(images), rtol=0, atol=1e-4)
        ours, theirs = seconds(lambda: model(images)), seconds(run)
    print(f'{name}: exported in {export:.0f} s, {(tmp_path/"model.onnx").stat().st_size / 1e6:.0f} MB, '
          f'{theirs / ours:.1f} times our time ({ours:.2f} s)')
    assert export <= 60 and theirs <= 4 * ours


def onnx_equals(model, path, *batches):
    "One export; onnxruntime's outputs are the model's for each batch, of one size."
    onnxruntime = pytest.importorskip('onnxruntime')
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    path = to_onnx(model.eval(), path, img_size=tuple(batches[0].shape[2:]))
    session = onnxruntime.InferenceSession(path, options)
    for images in batches:
        with torch.no_grad(): expected = model(images)
        assert_close(torch.from_numpy(session.run(None, {'x': images.numpy()})[0]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_onnx_of_the_releases_rotation_for_smaller_images(tmp_path):
    model = timm.create_model('test_local_vim', depth=1, resize='release').eval()
    onnx_equals(model, tmp_path/'model.onnx', torch.randn(1, 3, 16, 24), torch.randn(3, 3, 16, 24))


@pytest.mark.slow
@pytest.mark.parametrize('size', [(64, 64), (24, 40), (33, 47), (16, 72)])
@pytest.mark.parametrize('name, options', [
    ('test_local_vim', {}), ('test_local_vim', dict(resize='release', readout='mid_cls')), ('test_local_vmamba', {}),
    ('test_local_vmamba', dict(directions=('h_flip', 'w2', 'w7', 'v'), padding='ragged', merge='mean'))])
def test_onnx_at_other_sizes(name, options, size, tmp_path):
    model = timm.create_model(name, **options)
    onnx_equals(model, tmp_path/'model.onnx', *(torch.randn(n, 3, *size) for n in (2, 1, 5)))


def test_an_encoder_of_segmentation_models_pytorch():
    smp = pytest.importorskip('segmentation_models_pytorch')
    model = smp.Unet('tu-test_local_vmamba', encoder_weights=None, in_channels=1, encoder_depth=2,
                     decoder_channels=(16, 8))
    assert model(torch.randn(2, 1, 64, 48)).shape == (2, 1, 64, 48)


# torch.func

@pytest.mark.parametrize('name', NAMES)
def test_gradients_a_sample(name):
    model, images = small(name), torch.randn(2, 3, 16, 16)
    weights = dict(model.named_parameters())

    def loss(weights, image): return torch.func.functional_call(model, weights, (image[None],)).logsumexp(1).sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, images)
    for i in range(2):
        expected = torch.autograd.grad(model(images[i:i+1]).logsumexp(1).sum(), list(weights.values()))
        for n, dp in zip(weights, expected): assert_close(each[n][i], dp, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize('name', NAMES)
def test_jacobians_and_tangents(name):
    model, images, ways = small(name).double(), torch.randn(1, 3, 16, 16).double(), torch.randn(1, 3, 16, 16).double()
    jacobian = torch.func.jacrev(model)(images)
    y, dy = torch.func.jvp(model, (images,), (ways,))
    assert_close(y, model(images))
    assert_close(dy, (jacobian * ways).sum((2, 3, 4, 5)))
    assert_close(dy, (model(images + 1e-5 * ways) - model(images - 1e-5 * ways)) / 2e-5, rtol=1e-4, atol=1e-7)
    bright = lambda scale: model(images * scale)
    assert_close(torch.func.jacfwd(bright)(torch.ones(1).double()), torch.func.jacrev(bright)(torch.ones(1).double()))
    y, back = torch.func.vjp(model, images)
    assert_close(back(torch.ones_like(y))[0], jacobian.sum((0, 1)))


def test_deterministic_algorithms():
    images, seen = torch.randn(2, 3, 16, 16), []
    torch.use_deterministic_algorithms(True)
    try:
        for name in NAMES * 2:
            model = small(name).train()
            model(images).square().sum().backward()
            seen.append([p.grad for p in model.parameters()])
    finally: torch.use_deterministic_algorithms(False)
    for a, b in zip(seen[:2], seen[2:]): assert all(map(torch.equal, a, b))


# processes of their own

def first_a_trace(name):
    "In a new process: the first call of all is traced; what another size gives."
    warnings.simplefilter('ignore')
    model, images = small(name), torch.randn(2, 3, 16, 16)
    graph = torch.jit.trace(model, images)
    assert_close(graph(images), model(images))
    more = torch.randn(3, 3, 16, 16)
    assert_close(graph(more), model(more))
    refused = 0
    for size in ((8, 32), (32, 16), (20, 20), (15, 16)):
        try: graph(torch.randn(2, 3, *size))
        except RuntimeError: refused += 1
    return refused


def first_fake(name):
    "In a new process: fake tensors before real ones; is a real answer real?"
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
    with FakeTensorMode():
        model = timm.create_model(name, **SMALL[name])
        logits = model(torch.randn(2, 3, 16, 16))
        assert isinstance(logits, FakeTensor) and logits.shape == (2, 10)
        logits.sum().backward()
    logits = small(name)(torch.randn(2, 3, 16, 16))
    return type(logits) is torch.Tensor and bool(logits.isfinite().all())


@pytest.mark.parametrize('start, work, expected', [('spawn', first_a_trace, 4), ('forkserver', first_fake, True)])
def test_workers_and_what_they_do_first(start, work, expected):
    with multiprocessing.get_context(start).Pool(1) as pool: assert pool.map(work, NAMES) == [expected] * 2


@pytest.mark.parametrize('readout', ['head_cls', 'mid_cls'])
def test_a_trace_with_a_class_token(readout):
    model = timm.create_model('test_local_vim', depth=1, img_size=16, readout=readout).eval()
    images = torch.randn(2, 3, 16, 16)
    graph = torch.jit.trace(model, images, check_trace=False)
    assert_close(graph(images[:1]), model(images[:1]))
    with pytest.raises(RuntimeError): graph(torch.randn(2, 3, 8, 32))


# layers in other clothes

@pytest.mark.parametrize('name', NAMES)
def test_dynamic_quantisation(name):
    model, images = small(name), torch.randn(2, 3, 16, 16)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert 'quantized' in type(quantised.get_submodule(next(n for n, m in model.named_modules()
                                                            if n.endswith('attn.channel_select')))).__module__
    with torch.no_grad(): exact, rounded = model(images), quantised(images)
    assert 0 < (exact - rounded).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.parametrize('family', [VimMixer, SS2D])
def test_parametrised_layers(family):
    mixer, x = family(16, ('h', 'v')), torch.randn(1, 3, 4, 16)
    before = mixer(x)

    class Doubled(nn.Module):
        def forward(self, weight): return 2 * weight

    for module, weight in ((mixer.out_proj, 'weight'), (mixer, 'x_proj'), (mixer.attn.channel_select, 'weight')):
        register_parametrization(module, weight, Doubled())
        after = mixer(x)
        assert not torch.equal(before, after)
        before = after
    mixer(x).sum().backward()
    assert mixer.parametrizations.x_proj.original.grad.abs().sum() > 0


LAYERS = r'.*\.(in_proj|out_proj|attn\.global_reduce|attn\.channel_select)'
ADAPTERS = dict(
    LoraConfig=dict(r=2), LoHaConfig=dict(r=2), LoKrConfig=dict(r=2), IA3Config=dict(feedforward_modules='none'),
    HRAConfig=dict(r=2), C3AConfig=dict(block_size=1), FourierFTConfig=dict(n_frequency=8), RandLoraConfig=dict(r=2),
    MissConfig=dict(r=2), BOFTConfig=dict(boft_block_size=2),
    VBLoRAConfig=dict(vector_length=2, num_vectors=8), VeraConfig=dict(r=2), ShiraConfig=dict(r=1),
    AdaLoraConfig=dict(total_step=10), RoadConfig=dict(group_size=2), LNTuningConfig=dict(target_modules=r'.*norm'),
    OFTConfig=dict(oft_block_size=4), WaveFTConfig=dict(n_frequency=8), FrodConfig={}, BeftConfig={}, OSFConfig={},
    UniLoraConfig={}, **{f'{kind}Config': dict(r=2) for kind in (
        'Deft', 'Delora', 'Glora', 'Gralora', 'Hira', 'Lily', 'Peanut', 'Psoft', 'Pvera', 'Supertuning', 'TinyLora')})


@pytest.mark.parametrize('adapter', ADAPTERS)
def test_adapters_learn(adapter):
    peft = pytest.importorskip('peft')
    if not hasattr(peft, adapter): pytest.skip(f'this peft has no {adapter}')
    model = small('test_local_vmamba')
    net = peft.get_peft_model(model, getattr(peft, adapter)(**dict(target_modules=LAYERS) | ADAPTERS[adapter]))
    trained = {n: p for n, p in net.named_parameters() if p.requires_grad}
    for p in trained.values(): nn.init.normal_(p, std=0.1)
    net(torch.randn(2, 3, 16, 16)).square().sum().backward()
    silent = [n for n, p in trained.items() if p.grad is None or not p.grad.abs().sum() > 0]
    assert trained and not silent


def adapted(model, **targets):
    peft = pytest.importorskip('peft')
    net = peft.get_peft_model(model, peft.LoraConfig(r=2, **targets))
    for name, p in net.named_parameters():
        if 'lora_' in name: nn.init.normal_(p)
    return net, net.merge_and_unload


@pytest.mark.slow
@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('kind', ['layers', 'parameters', 'pruned'])
def test_onnx_of_an_adapted_and_of_a_pruned_model(name, kind, tmp_path):
    model, images = small(name), torch.randn(2, 3, 16, 16)
    before = model(images).detach()
    if kind == 'layers': net, settle = adapted(model, target_modules=LAYERS)
    elif kind == 'parameters': net, settle = adapted(model, target_parameters=['mixer.x_proj', 'mixer.dt_proj'])
    else:
        net, layers = model, [m for m in model.modules() if isinstance(m, nn.Linear)]
        for layer in layers: prune.l1_unstructured(layer, 'weight', amount=0.3)
        def settle():
            for layer in layers: prune.remove(layer, 'weight')
            return model
    assert (net.eval()(images) - before).abs().max() > 2e-3
    onnx_equals(net, tmp_path/'model.onnx', images, torch.randn(3, 3, 16, 16))
    onnx_equals(settle(), tmp_path/'settled.onnx', images)


def test_a_wrapper_that_takes_any_arguments_is_traced():
    model = small('test_local_vim')
    program = traced(AveragedModel(model).eval(), torch.randn(2, 3, 16, 16)).module()
    for images in (torch.randn(1, 3, 16, 16), torch.randn(3, 3, 16, 16)):
        with torch.no_grad(): assert_close(program(images), model(images))


# a card

def test_what_would_be_pushed_to_the_hub(tmp_path, monkeypatch):
    run = tmp_path/'run'
    run.mkdir()
    for name, said in dict(params=dict(dataset='cifar10', epochs=6, seed=3, recipe=dict(lr=0.002)),
                           metrics=dict(top1=71.25, seconds=1200.5),
                           env=dict(git_commit='0123456789abcdef', git_dirty=True, device='A processor')).items():
        (run/f'{name}.json').write_text(json.dumps(said))

    class Hub:
        def __init__(self, **_): pass
        def create_repo(self, repo_id, **_): return type('Url', (), dict(repo_id=repo_id))
        def file_exists(self, **_): return False
        def upload_folder(self, folder_path, **_):
            return {p.name: p.read_bytes() for p in Path(folder_path).iterdir()}

    monkeypatch.setattr('timm.models._hub.HfApi', Hub)
    model = timm.create_model('test_local_vmamba', directions=('v', 'w2'))
    files = timm.models.push_to_hf_hub(model, 'somebody/small', model_card=model_card(model, run))
    assert files.keys() >= {'model.safetensors', 'config.json', 'README.md'}
    told = json.loads(files['config.json'])['model_args']['directions']
    assert told == [['v', 'w2']] * len(model.mixers), 'one list a layer'
    card = files['README.md'].decode()
    for said in ('cifar10', '71.25', '1200.5', 'A processor', '0123456789, with changes', 'v, w2', 'lr: 0.002', 'Seed',
                 'license: apache-2.0', 'arXiv:2403.09338'): assert said in card, said


def test_no_card_without_a_finished_run(tmp_path):
    with pytest.raises(ValueError, match='record: got .*; allowed: the folder of a finished run'):
        model_card(timm.create_model('test_local_vim'), tmp_path)


# the page that tries a model

def test_try_it_draws_what_is_chosen(monkeypatch, tmp_path):
    ipywidgets = pytest.importorskip('ipywidgets')
    from PIL import Image
    from notebooks import execute
    photo = tmp_path/'photo.png'
    Image.effect_noise((90, 60), 80).convert('RGB').save(photo)
    _, page = execute('try_it', photo=str(photo), steps=1)
    controls = page['Controls'](ipywidgets, str(photo))
    grey = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path/'grey.png')
    assert len(set(page['opened'](tmp_path/'grey.png')[0].getdata())) > 50, 'not all white'
    before = controls.depends.value, controls.read.value
    controls.tokens.children[0].children[0].click()
    controls.layers.value = controls.layers.max
    after = controls.depends.value, controls.read.value
    assert all(a != b and a[:4] == b'\x89PNG' for a, b in zip(after, before))


@pytest.mark.parametrize('given, words', [(dict(layer=9), "'layer': got 9; allowed: 0 to 4"),
                                          (dict(photo='no.png'), 'no.png')])
def test_try_it_names_what_it_cannot_show(given, words):
    from notebooks import execute
    with pytest.raises((ValueError, FileNotFoundError), match=words): execute('try_it', **given, steps=1)


def test_an_example_of_one_exports_for_any_number():
    mixer, x = SS2D(8).eval(), torch.randn(3, 5, 7, 8)
    program = traced(mixer, x[:1]).module()
    with torch.no_grad(): assert_close(program(x), mixer(x))
