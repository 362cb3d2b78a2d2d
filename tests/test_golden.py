"Small models of the released code: same weights and input, same output and gradients."
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from localmamba.mixer import ScanMixer
from localmamba.models.localvim import LocalVim
from localmamba.models.localvmamba import LocalVMamba
from localmamba.models.weights import load_released, released_layout, to_released

GOLDEN = Path(__file__).parent/'golden'
FAMILIES = {'local_vim': LocalVim, 'local_vmamba': LocalVMamba}


def golden(name):
    config = json.loads((GOLDEN/f'{name}.json').read_text())
    arrays = {key: torch.from_numpy(value) for key, value in np.load(GOLDEN/f'{name}.npz').items()}
    part = lambda prefix: {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}
    model = FAMILIES[config.pop('family')](**{k: v for k, v in config.items() if k != 'note'})
    return model.eval(), arrays, part('weights/'), part('grads/')


def close(ours, theirs, tolerance):
    "Largest difference relative to the largest value: elementwise ratios mean nothing where a gradient crosses zero."
    assert_close(ours / theirs.abs().max(), theirs / theirs.abs().max(), rtol=0, atol=tolerance)


@pytest.fixture(params=sorted(path.stem for path in GOLDEN.glob('*.npz')))
def name(request): return request.param


@pytest.mark.parametrize('backend', ['numba', 'reference'])
def test_outputs_and_gradients(name, backend, monkeypatch):
    monkeypatch.setenv('LOCALMAMBA_BACKEND', backend)
    model, arrays, weights, grads = golden(name)
    load_released(model, weights)
    image = arrays['input'].requires_grad_()
    output = model(image)
    close(output, arrays['output_0'], 1e-5)
    (output * arrays['cotangent_0']).sum().backward()
    close(image.grad, arrays['grad_input'], 1e-4)
    named = dict(model.named_parameters())
    for key, (parts, shape) in released_layout(model).items():
        theirs = torch.stack([grads[part] for part in parts]).reshape(named[key].shape)
        close(named[key].grad, theirs, 1e-4)


def test_round_trip_is_exact(name):
    model, _, weights, _ = golden(name)
    released = to_released(load_released(model, weights))
    assert released.keys() == weights.keys()
    for key, value in weights.items(): assert torch.equal(released[key], value), key


def test_a_padded_window_matters(name):
    "Golden models pad somewhere: leaving padding steps out must change the result, or the test above proves nothing."
    model, arrays, weights, _ = golden(name)
    load_released(model, weights)
    for module in model.modules():
        if isinstance(module, ScanMixer): module.padding = 'ragged'
    expected = arrays['output_0']
    with torch.no_grad(): assert (model(arrays['input']) - expected).abs().max() > 1e-4 * expected.abs().max()


def as_released(arrays, weights, patch_size, size):
    "The release's lines at another size: position embedding and rotation tables resized as pictures."
    side = round(weights['pos_embed'].shape[1] ** 0.5)
    def resized(rows):
        picture = rows.reshape(1, side, side, -1).permute(0, 3, 1, 2)
        picture = F.interpolate(picture, size=[-(-n // patch_size) for n in size], mode='bicubic', align_corners=False)
        return torch.flatten(picture, 2).transpose(1, 2)
    image = F.interpolate(arrays['input'], size, mode='nearest')
    tables = [resized(weights[f'rope.freqs_{f}'].unsqueeze(0))[0] for f in ('cos', 'sin')]
    return image, resized(weights['pos_embed']), tables


@pytest.mark.parametrize('size', [(96, 96), (40, 72), (64, 50), (64, 64)], ids=str)
def test_released_vim_at_another_size(size, monkeypatch):
    "Outputs and gradients with the tables that the release would have, put in by hand."
    model, arrays, weights, _ = golden('local_vim_mean_rope')
    load_released(model, weights)
    image, position, tables = as_released(arrays, weights, model.patch_embed.patch_size[0], size)
    ours = [x.requires_grad_() for x in (image.clone(),)]
    output = model(ours[0])
    (output * arrays['cotangent_0']).sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    by_hand, *_ = golden('local_vim_mean_rope')
    load_released(by_hand, weights)
    leaf = weights['pos_embed'].clone().requires_grad_()
    by_hand.pos_embed = torch.nn.Parameter(position.clone())
    by_hand.grid_size = tuple(-(-n // by_hand.patch_embed.patch_size[0]) for n in size)
    monkeypatch.setattr('localmamba.models.localvim.cached_rope_tables', lambda *_: tables)
    theirs = image.clone().requires_grad_()
    expected = by_hand(theirs)
    (expected * arrays['cotangent_0']).sum().backward()
    close(output, expected, 1e-5)
    close(ours[0].grad, theirs.grad, 1e-4)
    for n, p in by_hand.named_parameters():
        if n != 'pos_embed': close(grads[n], p.grad, 1e-4)
    as_released(arrays, weights | {'pos_embed': leaf}, 8, size)[1].backward(by_hand.pos_embed.grad)
    close(grads['pos_embed'], leaf.grad, 1e-4)


def test_exact_and_released_rotation_differ():
    model, arrays, weights, _ = golden('local_vim_mean_rope')
    exact = load_released(type(model)(**arguments('local_vim_mean_rope'), resize='exact').eval(), weights)
    load_released(model, weights)
    image = F.interpolate(arrays['input'], (96, 96))
    with torch.no_grad():
        close(exact(arrays['input']), arrays['output_0'], 1e-5)
        assert (model(image) - exact(image)).abs().max() > 0.01 * exact(image).abs().max()
        again = type(model)(**arguments('local_vim_mean_rope')).eval()
        again.load_state_dict(dict(model.state_dict()))
        assert again.resize == 'release' and torch.equal(again(image), model(image))
        larger = load_released(type(model)(**arguments('local_vim_mean_rope') | dict(img_size=96)).eval(), weights)
        close(larger(image), model(image), 1e-5)
        assert larger.rope_grids == ((8, 8), (12, 12)) and larger.rope_path((4, 6)) == ((8, 8), (12, 12), (4, 6))


def arguments(name):
    config = json.loads((GOLDEN/f'{name}.json').read_text())
    return {k: v for k, v in config.items() if k not in ('family', 'note')}
