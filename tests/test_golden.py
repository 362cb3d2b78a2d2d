"Small models of the released code: same weights and input, same output and gradients."
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

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
    "The golden models pad somewhere: leaving padding steps out must change the result, or the test above proves nothing."
    model, arrays, weights, _ = golden(name)
    load_released(model, weights)
    for module in model.modules():
        if hasattr(module, 'padding') and isinstance(module.padding, str) and hasattr(module, 'directions'): module.padding = 'ragged'
    with torch.no_grad(): assert (model(arrays['input']) - arrays['output_0']).abs().max() > 1e-4 * arrays['output_0'].abs().max()
