"docs/use.md beyond its own blocks: the files run without this package; encoders of segmentation_models_pytorch."
import subprocess
import sys

import pytest
import timm
import torch
from torch.testing import assert_close

import localmamba  # noqa: F401  registers the models
from localmamba.export import to_onnx, to_pt2
from localmamba.ssm import directional_scan

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


def test_padded_batches_equal_their_samples():
    torch.manual_seed(0)
    K, T, D, N, lengths = 2, 9, 8, 4, (5, 9, 3)
    both = lambda n: torch.stack([torch.arange(n), torch.arange(n).flip(0)])
    u, delta, A = torch.randn(3, T, D), torch.randn(3, K, T, D), -torch.rand(K, D, N)
    B, C = torch.randn(2, 3, K, T, N)
    real = torch.arange(T) < torch.tensor(lengths)[:, None]
    y = directional_scan(u, delta.masked_fill(~real[:, None, :, None], -1e4), A, B, C, both(T))
    for i, n in enumerate(lengths):
        alone = directional_scan(u[i:i+1, :n], delta[i:i+1, :, :n], A, B[i:i+1, :, :n], C[i:i+1, :, :n], both(n))
        assert_close(y[i:i+1, :, :n], alone)


def test_an_encoder_of_segmentation_models_pytorch():
    smp = pytest.importorskip('segmentation_models_pytorch')
    model = smp.Unet('tu-test_local_vmamba', encoder_weights=None, in_channels=1, encoder_depth=2,
                     decoder_channels=(16, 8))
    assert model(torch.randn(2, 1, 64, 48)).shape == (2, 1, 64, 48)
