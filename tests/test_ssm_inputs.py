"What the operators do with odd inputs: wrong tokens, changed orders, empty tensors, torch.func, other threads."

import copy
import io
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.utils.prune
from torch.autograd import forward_ad
from torch.testing import assert_close

from localmamba.scan import TABLES, Kept, PrivateOrder, order_table, padded_orders, scan_order
from localmamba.scattn import SCAttn, plain
from localmamba.ssm import (
    directional_conv,
    directional_conv_ref,
    directional_scan,
    directional_scan_ref,
    selective_scan_fn,
    selective_scan_ref,
)

OPS = torch.ops.localmamba


def make(Bt=1, K=2, T=16, D=8, N=4, seed=0):
    "Inputs of a scan, and an order."
    torch.manual_seed(seed)
    randn = torch.randn
    inputs = dict(
        u=randn(Bt, K, T, D),
        delta=randn(Bt, K, T, D),
        A=-randn(K, D, N).exp(),
        B=randn(Bt, K, T, N),
        C=randn(Bt, K, T, N),
        D=randn(K, D),
        z=randn(Bt, T, D),
        delta_bias=randn(K, D),
    )
    return inputs, torch.stack([torch.randperm(T) for _ in range(K)])


def without_z(**kwargs):
    inputs, order = make(**kwargs)
    return {**inputs, 'z': None}, order


# tokens and orders


@pytest.mark.parametrize('tokens', [10**6, 17, 15, 3, 0, -1])
def test_wrong_tokens_are_named(tokens):
    inputs, order = without_z()
    with pytest.raises(ValueError, match=f'tokens: got {tokens}; allowed: 16'):
        directional_scan(**inputs, order=order, along_order=True, tokens=tokens)
    with pytest.raises(ValueError, match=f'tokens: got {tokens}; allowed: 16'):
        directional_scan(**inputs, order=order, tokens=tokens)
    inputs, order = make()
    with pytest.raises(ValueError, match=f'tokens: got {tokens}; allowed: 16'):
        directional_scan(**inputs, order=order, along_order=True, tokens=tokens)
    with pytest.raises(ValueError, match=r'z: got shape \(1, 5, 8\); allowed: \(1, 16, 8\)|tokens: got'):
        directional_scan(**{**inputs, 'z': torch.randn(1, 5, 8)}, order=order, along_order=True, tokens=16)


CHANGES = {
    'numpy': lambda o, v: o.numpy().__setitem__(slice(None), v),
    'data': lambda o, v: o.data.fill_(v),
    'in place': lambda o, v: o.fill_(v),
}


@pytest.mark.parametrize('how', CHANGES)
@pytest.mark.parametrize('value', [10**9, -5, 3])
@pytest.mark.parametrize('inference', (False, True))
def test_a_changed_order_is_refused(how, value, inference):
    inputs, order = make()
    with torch.inference_mode(inference):
        if inference:
            order = order.clone()
        directional_scan(**inputs, order=order)
        CHANGES[how](order, value)
        with pytest.raises(ValueError, match='order: got 16 steps'):
            directional_scan(**inputs, order=order)
        with pytest.raises(ValueError, match='order: got 16 steps'):
            directional_conv(inputs['z'], torch.randn(2, 8, 4), None, order)


@pytest.mark.parametrize('how', ('numpy', 'data', 'in place'))
def test_an_order_changed_between_forward_and_backward(how):
    "The backward follows the order of the forward."
    inputs, order = make()
    weight = torch.randn(2, 8, 4, requires_grad=True)
    leaves = [inputs[name].requires_grad_() for name in ('u', 'delta', 'z')]
    loss = lambda: (
        directional_scan(**inputs, order=order).square().sum()
        + directional_conv(inputs['z'], weight, None, order).square().sum()
    )
    expected, y = torch.autograd.grad(loss(), [*leaves, weight]), loss()
    flipped = order.flip(1)
    if how == 'numpy':
        order.numpy()[:] = flipped.numpy()
    elif how == 'data':
        order.data.copy_(flipped)
    else:
        order.copy_(flipped)
    for a, b in zip(torch.autograd.grad(y, [*leaves, weight]), expected):
        assert torch.equal(a, b)
    assert not torch.allclose(loss(), y)  # the next forward follows the new one


@pytest.mark.slow
def test_an_order_changed_between_the_passes_of_a_compiled_graph():
    inputs, order = make()
    u = inputs.pop('u').requires_grad_()
    compiled = torch.compile(
        lambda u, order: directional_scan(u, **inputs, order=order).square().sum(), backend='aot_eager'
    )
    expected, y = torch.autograd.grad(compiled(u, order), u)[0], compiled(u, order)
    order.numpy()[:] = order.flip(1).numpy()
    assert_close(torch.autograd.grad(y, u)[0], expected)


def test_an_order_changed_by_another_thread():
    "Whatever the other thread writes, a call gives one of the two results or refuses."
    inputs, order = make(T=64)
    results = [directional_scan(**inputs, order=o) for o in (order.clone(), order.flip(1))]
    first, second, wild, stop = (
        order.numpy().copy(),
        order.numpy()[:, ::-1].copy(),
        np.full((2, 64), 10**9),
        threading.Event(),
    )

    def change():
        while not stop.is_set():
            for values in (first, wild, second):
                order.numpy()[:] = values

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(300):
            try:
                y = directional_scan(**inputs, order=order)
            except ValueError:
                continue
            assert any(torch.equal(y, result) for result in results)
    finally:
        stop.set()
        thread.join()


def test_a_table_is_a_copy():
    table = order_table(('h', 'w2'), 4, 4)
    table.numpy()[:] = 10**9
    assert order_table(('h', 'w2'), 4, 4).max() == 15
    inputs, _ = make()
    with pytest.raises(ValueError, match='order: got 16 steps'):
        directional_scan(**inputs, order=table)
    directional_scan(**inputs, order=order_table(('h', 'w2'), 4, 4))
    again = torch.load(io.BytesIO(_saved(table)), weights_only=True)
    assert torch.equal(again, table) and torch.equal(copy.deepcopy(table), table)


def _saved(x):
    file = io.BytesIO()
    torch.save(x, file)
    return file.getvalue()


def test_an_order_elsewhere_is_refused():
    inputs, order = make()
    for call in (
        lambda: directional_scan(**inputs, order=order.to('meta')),
        lambda: directional_conv(inputs['z'], torch.randn(2, 8, 4), None, order.to('meta')),
    ):
        with pytest.raises(ValueError, match='order: got device meta; allowed: cpu$'):
            call()
    with pytest.raises(TypeError, match='order: got list; allowed: a tensor'):
        directional_scan(**inputs, order=order.tolist())
    with pytest.raises(TypeError, match='A: got list; allowed: a tensor'):
        directional_scan(**{**inputs, 'A': [1]}, order=order)


def test_operators_compare_shapes_when_they_run():
    "Called below the public functions, as a graph does."
    inputs, order = make()
    args = [*inputs.values(), order, True, False, 16, '', []]
    y, last, saved = OPS.directional_scan(*args)
    for at, wrong in (
        (0, torch.randn(1, 2, 9, 8)),
        (1, torch.randn(1, 2, 4, 8)),
        (2, torch.randn(2, 7, 4)),
        (3, torch.randn(1, 2, 3, 4)),
        (5, torch.randn(2, 3)),
        (6, torch.randn(1, 4, 8)),
        (8, order[:, :4]),
        (8, order.clamp(max=3)),
        (11, 400),
    ):
        with pytest.raises(ValueError, match='; allowed: '):
            OPS.directional_scan(*args[:at], wrong, *args[at + 1 :])
    for dy, dlast, kept in ((y[:, :, :4], None, saved), (y, last[..., :2], saved), (y, last, saved[:, :1])):
        with pytest.raises(ValueError, match='; allowed: '):
            OPS.directional_scan_backward(dy, dlast, kept, *args)
    x, weight = torch.randn(1, 16, 8), torch.randn(2, 8, 4)
    for wrong in ((x[:, :4], weight), (torch.randn(1, 40, 8), weight), (x, weight[:, :3]), (x, weight[:1])):
        with pytest.raises(ValueError, match='; allowed: '):
            OPS.directional_conv(*wrong, None, order, '')
    with pytest.raises(ValueError, match='dy: got shape'):
        OPS.directional_conv_backward(y[..., :3], x, weight, None, order, '')
    attn = SCAttn(8)
    parameters = [
        attn.norm.weight,
        attn.norm.bias,
        attn.global_reduce.weight,
        attn.global_reduce.bias,
        attn.channel_select.weight,
    ]
    with pytest.raises(ValueError, match='select_bias: got shape'):
        OPS.gated_sum(torch.randn(1, 2, 3, 8), *parameters, torch.randn(5), 'numba')


@pytest.mark.parametrize('name', ['test_local_vim', 'test_local_vmamba'])
def test_a_trace_refuses_another_size(name):
    torch.manual_seed(0)
    model, x = timm.create_model(name).eval(), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        traced = torch.jit.trace(model, x)
        assert_close(traced(x + 1), model(x + 1))
        for size in (16, 48):
            with pytest.raises((ValueError, RuntimeError)):
                traced(torch.randn(1, 3, size, size))


# empty tensors


@pytest.mark.parametrize('along', (False, True))
@pytest.mark.parametrize('sizes', [dict(Bt=0), dict(T=0), dict(D=0), dict(N=0), dict(Bt=0, T=0), dict(D=0, N=0)])
def test_empty_scans(sizes, along):
    inputs, order = make(**sizes)
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    y, last = directional_scan(**leaves, order=order, along_order=along, return_last_state=True)
    expected, expected_last = directional_scan_ref(**inputs, order=order, along_order=along, return_last_state=True)
    assert_close(y, expected)
    assert_close(last, expected_last)
    (y.sum() + last.sum()).backward()
    assert all(x.grad.shape == x.shape and x.grad.isfinite().all() for x in leaves.values())


def test_the_last_state_of_no_tokens_is_zero():
    inputs, _ = make(T=0)
    for _ in range(3):
        torch.full((1000,), 7.0)
        last = directional_scan(**inputs, order=torch.zeros(2, 0, dtype=torch.long), return_last_state=True)[1]
        assert torch.equal(last, torch.zeros(1, 2, 8, 4))
    u, A, B = torch.randn(2, 6, 0), -torch.ones(6, 3), torch.randn(2, 3, 0)
    y, last = selective_scan_fn(u, u, A, B, B, return_last_state=True)
    assert y.shape == (2, 6, 0) and torch.equal(last, torch.zeros(2, 6, 3))


def test_orders_of_padding_only():
    inputs, _ = make(T=0)
    order = torch.full((2, 5), -1)
    y, last = directional_scan(**inputs, order=order, return_last_state=True)
    assert y.shape == (1, 2, 0, 8) and torch.equal(last, torch.zeros_like(last))
    assert_close(
        directional_conv(inputs['z'], torch.randn(2, 8, 4), torch.ones(2, 8), order),
        torch.nn.functional.silu(torch.ones(1, 2, 5, 8)),
    )


@pytest.mark.parametrize('shape', [(0, 4, 8), (2, 0, 8), (2, 4, 0)])
def test_empty_convolutions(shape):
    x, weight = torch.randn(shape, requires_grad=True), torch.randn(3, shape[2], 4, requires_grad=True)
    y = directional_conv(x, weight, None, torch.arange(shape[1]).repeat(3, 1))
    assert y.shape == (shape[0], 3, shape[1], shape[2])
    y.sum().backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize('name', ['test_local_vim', 'test_local_vmamba'])
def test_batches_of_none_one_and_two(name):
    model = timm.create_model(name)
    for n in (0, 1, 2, 0):
        y = model(torch.randn(n, 3, 32, 32))
        assert y.shape == (n, 10)
        y.sum().backward()


@pytest.mark.parametrize('shape', [(0, 2, 3, 8), (2, 2, 0, 8), (2, 0, 3, 8)])
def test_empty_merges(shape):
    attn, x = SCAttn(8), torch.randn(shape, requires_grad=True)
    y = attn.merge(x)
    assert torch.equal(y, torch.zeros(shape[0], *shape[2:]))
    y.sum().backward()


@pytest.mark.slow
@pytest.mark.parametrize('lanes', ('8', '16'))
def test_infinite_and_nan_on_vectors_of_both_lengths(lanes):
    "Exponents out of range take another way, also in the second of two vectors of channels, as 16 lanes have them."
    names = 'test_infinite_and_nan_as_the_reference or test_infinite_and_nan_in_the_convolution'
    done = subprocess.run([sys.executable, '-m', 'pytest', __file__, '-q', '-k', names], capture_output=True, text=True,
                          env={**os.environ, 'LOCALMAMBA_LANES': lanes})
    assert done.returncode == 0 and '.' * 27 in done.stdout, done.stdout[-2000:]


ODD = {'nothing': lambda x: None, 'a list': lambda x: x.tolist(), 'numpy': lambda x: x.detach().numpy(),
       'sparse': lambda x: x.to_sparse(), 'nested': lambda x: torch.nested.nested_tensor([x]),
       'integers': lambda x: x.int(), 'complex': lambda x: x.to(torch.complex64), 'flat': lambda x: x.flatten()}


@pytest.mark.parametrize('odd', ODD)
@pytest.mark.filterwarnings('ignore:The PyTorch API of nested tensors')
def test_what_is_no_dense_tensor_is_named(odd):
    inputs, order = make()
    for name in inputs:
        if odd == 'nothing' and name in ('D', 'z', 'delta_bias'): continue
        with pytest.raises((ValueError, TypeError), match=f'^{name}: got .*; allowed: '):
            directional_scan(**{**inputs, name: ODD[odd](inputs[name])}, order=order)
    conv = dict(x=inputs['z'], weight=torch.randn(2, 8, 4), bias=torch.randn(2, 8))
    for name in conv:
        if odd == 'nothing' and name == 'bias': continue
        with pytest.raises((ValueError, TypeError), match=f'^{name}: got .*; allowed: '):
            directional_conv(**{**conv, name: ODD[odd](conv[name])}, order=order)
    u, A, B = torch.randn(2, 6, 10), -torch.rand(6, 4), torch.randn(2, 4, 10)
    for at, name in enumerate(('u', 'delta', 'A', 'B', 'C')):
        given = [u, u, A, B, B]
        given[at] = ODD[odd](given[at])
        with pytest.raises((ValueError, TypeError), match=f'{name}: got .*; allowed: '): selective_scan_fn(*given)
    if odd == 'flat': return
    for call in (SCAttn(8).merge, SCAttn(8)):
        if odd != 'nested':
            with pytest.raises((ValueError, TypeError), match='(x|branches): got .*; allowed: '):
                call(ODD[odd](torch.randn(1, 2, 3, 8)))


@pytest.mark.parametrize('words', [
    dict(tokens=16.), dict(tokens='16'), dict(tokens=[16]), dict(backend=['numba']),
    dict(backend=3), dict(delta_softplus='yes'), dict(along_order='no'), dict(initial_state=[0]),
    dict(initial_state=torch.zeros(1, 2, 8, 4).int())], ids=str)
def test_other_arguments_are_named(words):
    inputs, order = make()
    (name, _), = words.items()
    with pytest.raises((ValueError, TypeError), match=f'^{name}: got .*; allowed: '):
        directional_scan(**inputs, order=order, **words)


def test_tables_of_odd_directions_and_sizes():
    for directions in (None, 3, [['h'], ['v']], ('h', 3)):
        with pytest.raises(ValueError, match='directions?: got'): order_table(directions, 4, 4)
    with pytest.raises(ValueError, match='height, width: got 1000000x1000000 tokens'): order_table(('h',), 10**6, 10**6)
    for name, words in (('test_local_vim', dict(directions=3)), ('test_local_vim', dict(img_size=(32,))),
                        ('test_local_vim', dict(img_size='32')), ('test_local_vmamba', dict(directions=3)),
                        ('test_local_vmamba', dict(dims=0))):
        (key, _), = words.items()
        with pytest.raises((ValueError, TypeError), match=f'{key}: got'): timm.create_model(name, **words)
    model = timm.create_model('test_local_vmamba')
    with pytest.raises(ValueError, match='x: got torch.float64; allowed: torch.float32'):
        model(torch.zeros(1, 3, 32, 32, dtype=torch.float64))


def test_zero_channels():
    for dim in (0, -1, 2.5, True, None):
        with pytest.raises(ValueError, match=r'dim: got .*; allowed: an integer from 1'): SCAttn(dim, mode='none')
    parameters = [torch.ones(0), torch.zeros(0), torch.ones(3, 0), torch.ones(3), torch.ones(0, 3), torch.zeros(0)]
    leaves = [x.requires_grad_() for x in (torch.ones(2, 3, 5, 0), *parameters)]
    y, pooled, moments = OPS.gated_sum(*leaves, 'numba')
    assert y.shape == (2, 5, 0) and pooled.shape == (2, 3, 0) and torch.equal(moments, torch.zeros(2, 3, 5, 2))
    for x, grad in zip(leaves, torch.autograd.grad(y.sum(), leaves)): assert torch.equal(grad, torch.zeros_like(x))


# windows, tables


def test_windows_wider_than_the_map():
    with pytest.raises(ValueError, match='direction: got windows of 20000 on a map of 14x14 tokens, 400000000 steps'):
        scan_order('w20000', 14, 14)
    assert torch.equal(scan_order('w20000', 14, 14, 'ragged'), torch.arange(196))
    assert torch.equal(
        scan_order('w5', 3, 7, 'ragged'),
        torch.cat(
            [scan_order('h', 3, 7).view(3, 7)[:, :5].flatten(), scan_order('h', 3, 7).view(3, 7)[:, 5:].flatten()]
        ),
    )
    for name in ('w0', 'w١', 'w' + '9' * 5000, 'w-1', '', None, 7):
        with pytest.raises(ValueError, match='direction: got'):
            scan_order(name, 4, 4)
    for size in (0, -1, 2.5, True, '4', None):
        with pytest.raises(ValueError, match='height: got'):
            order_table(('h',), size, 4)
    for directions in ('h', (), []):
        with pytest.raises(ValueError, match='directions: got'):
            order_table(directions, 4, 4)


def test_tables_are_bounded_in_bytes():
    kept, made = Kept(1000), []
    table = lambda n: lambda: made.append(n) or PrivateOrder(np.zeros((1, n), np.int64), None)
    for _ in range(3):
        for n in range(1, 8):
            kept.get(n, table(n))
    assert kept.size == 8 * sum(range(1, 8)) and len(made) == 7
    kept.get(100, table(100))
    assert kept.size <= 1000 and 100 in kept.values and 1 not in kept.values
    kept.get(1000, table(1000))
    assert list(kept.values) == [1000]  # one is always kept
    order_table(('h',), 3, 3)
    assert TABLES.size <= TABLES.limit


# what the dtype and the values may be


@pytest.mark.parametrize('value', [float('inf'), -float('inf'), float('nan')])
@pytest.mark.parametrize('name', ['u', 'delta', 'B', 'C', 'z', 'A', 'D', 'delta_bias'])
def test_infinite_and_nan_as_the_reference(name, value):
    inputs, order = make(T=20, D=19)
    inputs[name].flatten()[37 % inputs[name].numel()] = value
    leaves, dy = [x.requires_grad_() for x in inputs.values()], torch.randn(1, 2, 20, 19)
    y, expected = directional_scan(**inputs, order=order), directional_scan_ref(**inputs, order=order)
    pairs = zip([y, *torch.autograd.grad(y, leaves, dy)], [expected, *torch.autograd.grad(expected, leaves, dy)])
    for i, (a, b) in enumerate(pairs):
        assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.isinf(), b.isinf())
        bound = 1e-3 if i else 1e-4  # of gradients, of the output
        assert_close(a, b, rtol=bound, atol=bound, equal_nan=True)


@pytest.mark.parametrize('value', [float('inf'), -float('inf'), float('nan')])
def test_infinite_and_nan_in_the_convolution(value):
    order, (x, weight, bias) = torch.stack([torch.randperm(20) for _ in range(2)]), [
        torch.randn(shape) for shape in ((2, 20, 19), (2, 19, 4), (2, 19))
    ]
    for t in (x, weight, bias):
        kept, t.view(-1)[23] = t.view(-1)[23].item(), value
        leaves, dy = [leaf.clone().requires_grad_() for leaf in (x, weight, bias)], torch.randn(2, 2, 20, 19)
        y, expected = directional_conv(*leaves, order), directional_conv_ref(*leaves, order)
        assert_close(y, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
        for a, b in zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(expected, leaves, dy)):
            assert_close(a, b, rtol=1e-4, atol=1e-4, equal_nan=True)
        t.view(-1)[23] = kept


def test_powers_beyond_a_float():
    "A growing state: as large as in the reference, and infinite where it is."
    inputs, order = make(T=40, D=17)
    inputs['A'] = inputs['A'].abs() * 40
    y, expected = directional_scan(**inputs, order=order), directional_scan_ref(**inputs, order=order)
    assert expected.isnan().any() or expected.isinf().any()
    assert torch.equal(y.isfinite(), expected.isfinite())


@pytest.mark.parametrize('dtype', (torch.bfloat16, torch.float16))
def test_half_gradients_of_merge_and_convolution(dtype):
    "Against float64 of the rounded inputs: as near as rounding the result allows."
    torch.manual_seed(0)
    eps, attn, x = torch.finfo(dtype).eps, SCAttn(40), torch.randn(2, 3, 10, 40).to(dtype).requires_grad_()
    for p in attn.parameters():
        torch.nn.init.uniform_(p, -1, 1)
    dy, exact, wide = (
        torch.randn(2, 10, 40).to(dtype),
        copy.deepcopy(attn).double(),
        x.detach().double().requires_grad_(),
    )
    literal = exact(wide.flatten(0, 1)).view_as(wide).sum(1)
    expected = torch.autograd.grad(literal, [wide, *exact.parameters()], dy.double())
    for a, b in zip(torch.autograd.grad(attn.merge(x), [x, *attn.parameters()], dy), expected):
        assert float((a.double() - b).norm() / b.norm()) < 2 * eps
    order, weight = torch.stack([torch.randperm(9) for _ in range(2)]), torch.randn(2, 8, 4)
    x, dy = torch.randn(2, 9, 8).to(dtype), torch.randn(2, 2, 9, 8).to(dtype)
    leaves, wide = [t.clone().requires_grad_() for t in (x, weight)], [t.double().requires_grad_() for t in (x, weight)]
    expected = torch.autograd.grad(directional_conv_ref(*wide, None, order), wide, dy.double())
    for a, b in zip(torch.autograd.grad(directional_conv(*leaves, None, order), leaves, dy), expected):
        assert float((a.double() - b).norm() / b.norm()) < 2 * eps


# transforms


@pytest.mark.parametrize('name', ['test_local_vim', 'test_local_vmamba'])
def test_functorch_on_models(name):
    torch.manual_seed(0)
    model, x = timm.create_model(name).eval(), torch.randn(2, 3, 16, 16)
    params = {k: v.detach() for k, v in model.named_parameters()}
    call = lambda params, x: torch.func.functional_call(model, params, (x,)).square().sum()
    assert_close(call(params, x), model(x).square().sum())
    one = lambda params, image: call(params, image[None])
    samples = torch.func.vmap(torch.func.grad(one), (None, 0))(params, x)
    for i in range(2):
        model.zero_grad()
        model(x[i : i + 1]).square().sum().backward()
        for key, p in model.named_parameters():
            assert_close(samples[key][i], p.grad, rtol=1e-3, atol=1e-4)
    y, pull = torch.func.vjp(lambda x: torch.func.functional_call(model, params, (x,)), x[:1])
    v = torch.randn_like(x[:1])
    tangent = torch.func.jvp(lambda x: torch.func.functional_call(model, params, (x,)), (x[:1],), (v,))[1]
    assert_close((pull(torch.ones_like(y))[0] * v).sum(), tangent.sum(), rtol=1e-3, atol=1e-4)


def test_jacobians_of_the_scan_and_the_convolution():
    inputs, order = make(T=3, D=2, N=2)
    u, weight = inputs.pop('u'), torch.randn(2, 2, 3)
    for f, x in (
        (lambda u: directional_scan(u, **inputs, order=order), u),
        (lambda z: directional_conv(z, weight, None, order), inputs['z']),
    ):
        expected = torch.autograd.functional.jacobian(f, x)
        assert_close(torch.func.jacrev(f)(x), expected)
        assert_close(torch.func.jacfwd(f)(x), expected)
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(x, torch.ones_like(x)))).tangent
        assert_close(tangent, expected.sum(tuple(range(4, 4 + x.dim()))))


def test_an_operator_alone_refuses_forward_mode():
    inputs, order = make()
    with forward_ad.dual_level():
        u = forward_ad.make_dual(inputs['u'], torch.ones_like(inputs['u']))
        with pytest.raises(RuntimeError, match='no forward-mode derivative'):
            OPS.directional_scan(u, *list(inputs.values())[1:], order, True, False, 16, '', [])


def test_the_gate_in_forward_mode():
    attn, x, v = SCAttn(8), torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8)
    literal = lambda x: attn(x.flatten(0, 1)).view_as(x).sum(1)
    assert_close(torch.func.jvp(attn.merge, (x,), (v,)), torch.func.jvp(literal, (x,), (v,)))


def test_deterministic_algorithms_and_copies():
    model, x = timm.create_model('test_local_vmamba'), torch.randn(1, 3, 32, 32)
    torch.use_deterministic_algorithms(True)
    try:
        model(x).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    for twin in (
        copy.deepcopy(model),
        torch.load(io.BytesIO(_saved(model)), weights_only=False),
        torch.optim.swa_utils.AveragedModel(model),
    ):
        assert_close(twin.eval()(x), model.eval()(x))


def test_a_fake_mode_before_real_tensors():
    "What is asked for first in a fake mode is not kept as a fake tensor."
    TABLES.values.clear()
    inputs, _ = make()
    with torch._subclasses.FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(x) for name, x in inputs.items()}
        assert directional_scan(**fake, order=order_table(('h', 'w2'), 4, 4)).shape == (1, 2, 16, 8)
    assert directional_scan(**inputs, order=order_table(('h', 'w2'), 4, 4)).isfinite().all()


# pieces of sequences, batches of different sizes


@pytest.mark.parametrize('softplus,bias', [(True, True), (True, False), (False, True)])
def test_a_sequence_in_pieces(softplus, bias):
    inputs, _ = make(Bt=2, T=21)
    if not softplus:
        inputs['delta'], inputs['delta_bias'] = inputs['delta'].abs(), inputs['delta_bias'].abs()
    if not bias:
        inputs['delta_bias'] = None
    inputs = {name: x if x is None else x.double() for name, x in inputs.items()}
    inputs['D'] = None
    order, state, ys = torch.arange(21).repeat(2, 1), None, []
    leaves = [x.requires_grad_() for x in inputs.values() if x is not None]
    whole, last = directional_scan(**inputs, order=order, delta_softplus=softplus, return_last_state=True)
    for a, b in ((0, 5), (5, 6), (6, 21)):
        piece = {n: x[..., a:b, :] if n in ('u', 'delta', 'B', 'C', 'z') else x for n, x in inputs.items()}
        y, state = directional_scan(
            **piece, order=order[:, : b - a], delta_softplus=softplus, return_last_state=True, initial_state=state
        )
        ys.append(y)
    assert_close(torch.cat(ys, 2), whole)
    assert_close(state, last)
    loss = lambda y, last: y.square().sum() + last.square().sum()
    for x, y in zip(
        torch.autograd.grad(loss(torch.cat(ys, 2), state), leaves), torch.autograd.grad(loss(whole, last), leaves)
    ):
        assert_close(x, y)


@pytest.mark.parametrize('along', (False, True))
def test_an_initial_state_against_the_reference(along):
    inputs, order = make(Bt=2, T=16)
    order = torch.cat([torch.full((2, 3), -1), order], 1)[:, torch.randperm(19)]
    if along:
        inputs = {
            n: torch.nn.functional.pad(x, (0, 0, 0, 3)) if n in ('u', 'delta', 'B', 'C') else x
            for n, x in inputs.items()
        }
    state = torch.randn(2, 2, 8, 4, requires_grad=True)
    given = [directional_scan(**inputs, order=order, along_order=along, initial_state=state, return_last_state=True)]
    given.append(
        directional_scan_ref(**inputs, order=order, along_order=along, initial_state=state, return_last_state=True)
    )
    assert_close(*given, rtol=1e-4, atol=1e-4)
    grads = [torch.autograd.grad(y.sum() + last.sum(), state)[0] for y, last in given]
    assert_close(*grads, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r'initial_state: got shape \(2, 8, 4\); allowed: \(2, 2, 8, 4\)'):
        directional_scan(**inputs, order=order, along_order=along, initial_state=state[0])


def test_mambas_layout_in_pieces():
    torch.manual_seed(0)
    u, A, B = torch.randn(2, 6, 30), -torch.rand(6, 3), torch.randn(2, 2, 3, 30)
    whole, state = selective_scan_ref(u, u.abs(), A, B, B, z=u), None
    ys = []
    for part in (slice(0, 11), slice(11, 30)):
        y, state = selective_scan_fn(
            u[..., part],
            u[..., part].abs(),
            A,
            B[..., part],
            B[..., part],
            z=u[..., part],
            return_last_state=True,
            initial_state=state,
        )
        ys.append(y)
    assert_close(torch.cat(ys, 2), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('padding', ('zeros', 'ragged'))
def test_maps_of_different_sizes_in_one_batch(padding):
    "Convolution and scan along every direction give each map what it gets on its own."
    torch.manual_seed(0)
    directions, sizes, D, N = ('h', 'h_flip', 'v', 'w2_flip'), [(3, 5), (4, 2), (1, 1)], 6, 3
    K, orders = 4, padded_orders(directions, sizes, 4, 5, padding)
    x, A, weight, bias = torch.randn(3, 20, D), -torch.rand(K, D, N), torch.randn(K, D, 4), torch.randn(K, D)
    mix = torch.randn(D, D), torch.randn(D, 2 * N)

    def layer(x, order):
        u = directional_conv(x, weight, None, order)
        B, C = (u @ mix[1]).split(N, -1)
        return directional_scan(u, u @ mix[0], A, B, C, order, z=x, delta_bias=bias, along_order=True)

    y = layer(x, orders).unflatten(2, (4, 5))
    for i, (h, w) in enumerate(sizes):
        own = x[i].view(4, 5, D)[:h, :w].reshape(1, h * w, D)
        assert_close(
            y[i, :, :h, :w],
            layer(own, order_table(directions, h, w, padding))[0].unflatten(1, (h, w)),
            rtol=1e-4,
            atol=1e-5,
        )
    with pytest.raises(ValueError, match='sizes: got 5x5; allowed: at most 4x5'):
        padded_orders(directions, [(5, 5)], 4, 5)


# modules that have to be called


class Adapter(torch.nn.Linear):
    pass


@pytest.mark.parametrize(
    'spoil',
    [
        lambda attn: attn.channel_select.register_forward_hook(lambda m, given, y: y + 1),
        lambda attn: attn.global_reduce.register_forward_pre_hook(lambda m, given: (given[0] + 1,)),
        lambda attn: attn.norm.register_full_backward_hook(lambda m, dx, dy: (2 * dx[0],)),
        lambda attn: attn.register_forward_hook(lambda m, given, y: 2 * y),
        lambda attn: setattr(attn, 'channel_select', Adapter(2, 16)),
        lambda attn: setattr(attn.channel_select, 'forward', lambda x: 0 * x.mean() + torch.ones(16)),
        lambda attn: torch.nn.utils.parametrizations.weight_norm(attn.global_reduce),
        lambda attn: torch.nn.utils.prune.l1_unstructured(attn.channel_select, 'weight', 0.5),
        lambda attn: setattr(attn, 'norm', torch.nn.LayerNorm(16, eps=1e-2)),
        lambda attn: setattr(attn, 'norm', torch.nn.LayerNorm(16, bias=False)),
    ],
)
def test_spoilt_modules_are_called(spoil):
    torch.manual_seed(0)
    attn = SCAttn(16)
    for p in attn.parameters():
        torch.nn.init.uniform_(p, -1, 1)
    assert attn._fits(torch.zeros(1)) and plain(attn.norm)
    spoil(attn)
    assert not attn._fits(torch.zeros(1))
    x = torch.randn(2, 3, 5, 16, requires_grad=True)
    y, literal = attn.merge(x), attn(x.flatten(0, 1)).view_as(x).sum(1)
    assert torch.equal(y, literal)
    assert torch.equal(*(torch.autograd.grad(t.square().sum(), x)[0] for t in (y, literal)))


# guard pages


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='needs mprotect')
@pytest.mark.parametrize('lanes', (0, 8))
def test_fuzz(lanes):
    "A minute of random inputs against pages without access, on the machine's vectors and on those of 8 lanes."
    script = Path(__file__).with_name('fuzz_ssm.py')
    result = subprocess.run([sys.executable, script, '60', str(lanes)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize('name', ['test_local_vim', 'test_local_vmamba'])
def test_another_default_dtype_changes_nothing(name, dtype):
    "What the kernels write into is of fp32, whatever new tensors are."
    torch.manual_seed(0)
    model, x = timm.create_model(name).eval(), torch.randn(2, 3, 32, 32)
    def out_and_gradients():
        y = model(x)
        return y, *torch.autograd.grad(y.logsumexp(1).sum(), list(model.parameters()))
    expected, before = out_and_gradients(), torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try: found = out_and_gradients()
    finally: torch.set_default_dtype(before)
    for a, b in zip(found, expected, strict=True): assert_close(a, b, rtol=0, atol=0)


def test_a_transform_of_a_transform_leaves_nothing_behind():
    "The rotation of a size that only a nested transform has seen is a plain one afterwards."
    model = timm.create_model('test_local_vim', depth=1, img_size=8, embed_dim=12).eval()
    x = torch.randn(1, 3, 8, 8)
    torch.func.hessian(lambda s: model(x * s).logsumexp(1).sum())(torch.ones(()))
    by_transform = torch.func.grad(lambda x: model(x).sum())(x)
    leaf = x.clone().requires_grad_()
    model(leaf).sum().backward()
    assert_close(by_transform, leaf.grad, rtol=1e-4, atol=1e-5)


def test_linearize_is_served():
    model, x = timm.create_model('test_local_vmamba').eval(), torch.randn(1, 3, 32, 32)
    y, tangent = torch.func.linearize(model, x)
    assert_close(y, model(x))
    assert_close(tangent(torch.ones_like(x)), torch.func.jvp(model, (x,), (torch.ones_like(x),))[1])


class ForLinear(torch.Tensor):
    "A weight that knows the functions of PyTorch alone, as torchao's quantised ones."
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if 'localmamba' in str(function): raise NotImplementedError(function)
        return super().__torch_function__(function, types, args, kwargs or {})


def test_weights_of_other_classes_are_asked_not_read():
    gate, branches = SCAttn(16).eval(), torch.randn(2, 4, 9, 16)
    assert gate._fits(branches)
    with torch.no_grad():
        expected = gate.merge(branches)
        gate.channel_select.weight = torch.nn.Parameter(gate.channel_select.weight.as_subclass(ForLinear))
        assert not gate._fits(branches)
        assert_close(gate.merge(branches).as_subclass(torch.Tensor), expected)
