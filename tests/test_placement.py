"""Without a GPU: no operation mixes devices when everything is on one.

Models, heads and losses run under PyTorch's fake tensors, which have a device and a shape and no numbers, with the
Triton backend chosen. What looks at numbers (metrics, the matching of boxes) runs on the CPU, and every tensor that
this package makes there must be told its device: one that is not would be on the CPU beside inputs on a GPU."""
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

from localmamba import detector, recipes, ssm
from localmamba.kernels import backends, gpu
from localmamba.scan import order_table
from localmamba.segment import IGNORE, SegmentationLoss, confusion, scores, segmenter
from localmamba.train import CrossEntropy

NAMES = sorted(set(timm.list_models('local_v*') + timm.list_models('test_local*') + timm.list_models('vim_*') +
                   timm.list_models('vmamba_*')))
FAST = 'test_local_vim', 'test_local_vmamba', 'local_vim_tiny', 'local_vmamba_tiny', 'vim_tiny', 'vmamba_tiny'
PACKAGE = Path(ssm.__file__).parent


@pytest.fixture
def fake_gpu(monkeypatch):
    "Fake tensors, and the Triton backend as if a GPU were there."
    monkeypatch.setattr(gpu, 'reason', lambda: None)
    monkeypatch.setenv('LOCALMAMBA_BACKEND', 'triton')
    backends.forget_choices()
    caches = [f for f in vars(__import__('localmamba.scan').scan).values() if hasattr(f, 'cache_clear')]
    for cache in caches: cache.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=True): yield
    for cache in caches: cache.cache_clear()
    monkeypatch.undo()
    backends.forget_choices()


@pytest.fixture
def no_numbers(monkeypatch):
    "Models are built without numbers; stochastic depth's rates are numbers that a model asks for."
    linspace = torch.linspace
    monkeypatch.setattr(torch, 'linspace', lambda *args, **kwargs: linspace(*args, **{'device': 'cpu', **kwargs}))
    def build(make, *args, **kwargs):
        with unset_fake_temporarily(), torch.device('meta'): model = make(*args, **kwargs)
        for module in model.modules():
            for name, p in module._parameters.items():
                if p is not None: module._parameters[name] = nn.Parameter(torch.empty_like(p, device='cuda'))
            for name, p in module._buffers.items():
                if p is not None: module._buffers[name] = torch.empty_like(p, device='cuda')
        return model
    return build


def images(batch=2, side=224, dtype=torch.float32): return torch.empty(batch, 3, side, side, device='cuda', dtype=dtype)


def on_gpu(*tensors): assert all(x.device.type == 'cuda' for x in tensors), [x.device for x in tensors]


def shorten(model):
    "One block of each kind is left: those with the same directions do the same."
    for module in list(model.modules()):
        for name, blocks in list(module._modules.items()):
            if not isinstance(blocks, nn.ModuleList) or not all(hasattr(block, 'mixer') for block in blocks): continue
            kinds = {(type(block.mixer), str(getattr(block.mixer, 'directions', None))): block for block in blocks}
            setattr(module, name, nn.ModuleList(kinds.values()))
    return model


@pytest.mark.parametrize('whole', [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize('name', [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in NAMES])
def test_models(name, whole, no_numbers, fake_gpu):
    "Classifier and loss. PyTorch's engine has no backward on a GPU that is not there: that is left to `gpu_check`."
    model = no_numbers(timm.create_model, name)
    if not whole: model = shorten(model)
    logits = model(images(side=model.default_cfg['input_size'][-1]))
    loss = CrossEntropy(.1)(logits, torch.empty(2, dtype=torch.int64, device='cuda'))
    on_gpu(logits, loss, *model.parameters(), *model.buffers())
    assert logits.shape == (2, model.num_classes)


def test_the_triton_backend_is_meant(no_numbers, fake_gpu, monkeypatch):
    "The fake implementations called above are those of this backend: its saved states have its shape."
    u, order = torch.empty(2, 9, 8, device='cuda'), order_table(('h', 'v'), 3, 3, device='cuda')
    delta, A, B = (torch.empty(*shape, device='cuda', requires_grad=True) for shape in ((2, 2, 9, 8), (2, 8, 4),
                                                                                        (2, 2, 9, 4)))
    seen = []
    monkeypatch.setattr(gpu, 'saved_shape', lambda *sizes: seen.append(sizes) or (1,))
    y = ssm.directional_scan(u, delta, A, B, B, order)
    on_gpu(y)
    assert (2, 2, 9, 8, 4) in seen


@pytest.mark.parametrize('model', ['test_local_vim', 'test_local_vmamba'])
def test_segmentation(model, no_numbers, fake_gpu):
    options = {'img_size': 64} if 'vmamba' not in model else {}
    net = no_numbers(segmenter, model, 5, backbone=options).train()
    pred = net(images(side=64))
    loss = SegmentationLoss()(pred, torch.empty(2, 64, 64, dtype=torch.int64, device='cuda'))
    on_gpu(*pred, loss, *net.parameters())


@pytest.mark.parametrize('model', ['test_local_vim', 'test_local_vmamba'])
def test_features_for_detection(model, no_numbers, fake_gpu):
    "Backbone, pyramid and the proposals' head; what follows looks at numbers."
    options = {'img_size': 64} if 'vmamba' not in model else {}
    net = no_numbers(detector.detector, model, 3, backbone=options)
    maps = net.features(images(side=64))
    on_gpu(*maps.values(), *(x for part in net.rpn.head(list(maps.values())) for x in part))


MOVED = {'rope_angles', '<genexpr>'}  # made on the CPU, cached, and moved to the tokens by `cached_rope_tables`


class Made(TorchFunctionMode):
    "Notes where this package makes a tensor without telling its device."
    def __init__(self):
        super().__init__()
        self.unplaced, self.placed, self.others = set(), 0, 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in _device_constructors():
            caller = sys._getframe(1)
            if PACKAGE in Path(caller.f_code.co_filename).parents and caller.f_code.co_name not in MOVED:
                if kwargs.get('device') is None: self.unplaced.add(f'{caller.f_code.co_filename}:{caller.f_lineno}')
                else: self.placed += 1
            else: self.others += 1
        return function(*args, **kwargs)


def test_such_a_tensor_is_noted():
    with Made() as made:
        recipes.TopRecord.reset(recipes.TopRecord.__new__(recipes.TopRecord))  # kept on the CPU on purpose
        ssm.directional_scan_ref(*(torch.ones(1, 1, 2, 1) for _ in range(2)), -torch.ones(1, 1, 1),
                                 *(torch.ones(1, 1, 2, 1) for _ in range(2)), order=torch.arange(2)[None])
    assert len(made.unplaced) == 1 and 'recipes.py' in made.unplaced.pop() and made.placed


@pytest.mark.slow
def test_detection_makes_its_tensors_where_the_images_are():
    "A training step and detections: all tensors that are made are torchvision's, whose parts are taken as they are."
    net = detector.detector('test_local_vim', 3, backbone={'img_size': 64})
    box = torch.tensor([[4., 4., 30., 40.], [20., 10., 60., 60.]])
    targets = [dict(boxes=box, labels=torch.tensor([1, 2]), masks=torch.ones(2, 64, 64, dtype=torch.uint8))] * 2
    with Made() as made:
        sum(net.train()(list(torch.rand(2, 3, 64, 64)), targets).values()).backward()
        with torch.no_grad(): net.eval()(list(torch.rand(1, 3, 64, 64)))
    assert made.others and not made.unplaced


def test_metrics_make_their_tensors_where_the_predictions_are():
    target = torch.tensor([[0, 1], [2, IGNORE]])
    with Made() as made:
        matrix = confusion(torch.tensor([[0, 1], [1, 1]]), target, 3)
        assert round(scores(matrix)['pixel_accuracy'], 2) == 66.67
        assert recipes.correct(torch.eye(6), torch.arange(6)).tolist() == [6, 6]
    assert not made.unplaced
