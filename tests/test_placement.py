"""Without a GPU: no operation mixes devices when everything is on one.

Models, heads and losses run under PyTorch's fake tensors, which have a device and a shape and no numbers, with the
Triton backend chosen. What looks at numbers (metrics) runs on the CPU while new tensors without a device of their own
are made on `meta`: using one together with the inputs is an error, as it would be on a GPU."""
import pytest
import timm
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from localmamba.kernels import backends, gpu
from localmamba.scan import order_table
from localmamba.segment import IGNORE, SegmentationLoss, confusion, scores, segmenter
from localmamba.train import CrossEntropy

pytestmark = pytest.mark.slow  # not yet seen to end within the quick tests' time
NAMES = sorted(set(timm.list_models('local_v*') + timm.list_models('test_local*') + timm.list_models('vim_*') +
                   timm.list_models('vmamba_*')))
FAST = {'test_local_vim', 'test_local_vmamba', 'local_vim_nano', 'local_vmamba_nano', 'vim_tiny_midcls'}


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


@pytest.mark.parametrize('name', [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in NAMES])
def test_models(name, no_numbers, fake_gpu):
    "Classifier, loss, and maps for detection and segmentation."
    model = no_numbers(timm.create_model, name)
    side = model.default_cfg['input_size'][-1]
    logits = model(images(side=side))
    loss = CrossEntropy(.1)(logits, torch.empty(2, dtype=torch.int64, device='cuda'))
    on_gpu(logits, loss, *model.parameters(), *model.buffers())
    assert logits.shape == (2, model.num_classes)


def test_the_triton_backend_is_meant(no_numbers, fake_gpu, monkeypatch):
    "The fake implementations called above are those of this backend: its saved states have its shape."
    from localmamba import ssm
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


@pytest.fixture
def no_default_device():
    with torch.device('meta'): yield


def test_metrics_make_their_tensors_where_the_predictions_are(no_default_device):
    target = torch.tensor([[0, 1], [2, IGNORE]], device='cpu')
    matrix = confusion(torch.tensor([[0, 1], [1, 1]], device='cpu'), target, 3)
    assert matrix.device.type == 'cpu' and round(scores(matrix)['pixel_accuracy'], 2) == 66.67
