"The selective scan and the convolution along orders: forms of their inputs, backends, the compiler, the errors."
import itertools
import shutil
import sys
import types
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from localmamba.kernels import backends as room
from localmamba.kernels.backends import Backend, Differentiable
from localmamba.ssm import (backends, directional_conv, directional_conv_ref, directional_scan, directional_scan_ref,
                            selective_scan_fn, selective_scan_ref)

BACKENDS = [name for name in ('reference', 'numba') if backends()[name] == 'available']
ACTIVATIONS = 'u', 'delta', 'B', 'C', 'z'
MAMBA_TOLERANCE = {torch.float32: (6e-4, 2e-3), torch.float16: (3e-3, 5e-3), torch.bfloat16: (3e-2, 5e-2)}


@pytest.fixture(autouse=True)
def no_override(monkeypatch): monkeypatch.delenv('LOCALMAMBA_BACKEND', raising=False)


def make_order(K, T, L, generator):
    "Random orders with L−T padding steps at random places."
    order = torch.full((K, L), -1)
    for row in order: row[torch.randperm(L, generator=generator)[:T]] = torch.randperm(T, generator=generator)
    return order


def make(Bt=2, K=2, T=11, L=14, D=19, N=6, along=False, const_B=False, const_C=False, shared_u=False, shared_z=True,
         seed=0, without=()):
    "fp64 inputs of a scan."
    g = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    S = L if along else T
    inputs = dict(u=randn(Bt, T, D) if shared_u and not along else randn(Bt, K, S, D),
                  delta=randn(Bt, K, S, D), A=-randn(K, D, N).exp(),
                  B=randn(K, D, N) if const_B else randn(Bt, K, S, N),
                  C=randn(K, D, N) if const_C else randn(Bt, K, S, N),
                  D=randn(K, D), z=randn(Bt, T, D) if shared_z else randn(Bt, K, T, D), delta_bias=randn(K, D))
    for name in without: inputs[name] = None
    if 'delta_softplus' in without:
        for name in {'delta', 'delta_bias'} - set(without): inputs[name] = inputs[name].abs() / 2
    inputs.pop('delta_softplus', None)
    return inputs, make_order(K, T, L, g)


def sliced(x):
    big = x.new_full([n + 2 for n in x.shape], float('nan'))
    big[tuple(slice(1, -1) for _ in x.shape)] = x.detach()
    return big, lambda b: b[tuple(slice(1, -1) for _ in x.shape)]


def transposed(x): return x.detach().transpose(-1, -2).contiguous(), lambda b: b.transpose(-1, -2)


def expanded(x): return x.detach()[:1].clone(), lambda b: b.expand(x.shape)


def contiguous(x): return x.detach().clone(), lambda b: b


LAYOUTS = dict(contiguous=contiguous, sliced=sliced, transposed=transposed, expanded=expanded)


def run(function, inputs, layout, dtype, cotangent, **kwargs):
    "Output, last state and gradients of `function`, its inputs laid out in memory by `layout`."
    leaves, views = {}, {}
    for name, x in inputs.items():
        if x is None: continue
        base, view = layout(x.to(dtype))
        leaves[name] = base.requires_grad_()
        views[name] = view(base)
    y, last = function(**views, **kwargs, return_last_state=True)
    grads = torch.autograd.grad(cotangent(y, last), list(leaves.values()))
    return y.detach(), last.detach(), dict(zip(leaves, grads))


def stacked(y, last):
    "A loss whose gradients reach y as slices of a stacked tensor, and the last state as one expanded number."
    both = torch.stack([y, y.flip(0)], -1)
    weights = torch.linspace(-1, 1, both.numel(), dtype=y.dtype).view(both.shape)
    return (both * weights).sum() + last.sum()


def compare(inputs, order, layout, backend, tol=2e-5, **kwargs):
    exact = run(directional_scan_ref, inputs, layout, torch.float64, stacked, order=order, **kwargs)
    if kwargs.get('along_order') and inputs['z'] is None: kwargs['tokens'] = int(order.max()) + 1
    kwargs.update(order=order, backend=backend)
    y, last, grads = run(directional_scan, inputs, layout, torch.float32, stacked, **kwargs)
    close(y, exact[0], tol)
    close(last, exact[1], tol)
    for name, grad in grads.items():
        assert grad.dtype == torch.float32
        close(grad, exact[2][name], tol, name)


def close(x, exact, tol, name=''):
    exact = exact.nan_to_num()
    atol = tol * max(1., float(exact.abs().max()))
    assert_close(x.nan_to_num().double(), exact, rtol=tol, atol=atol, msg=lambda m: f'{name}: {m}')


OPTIONS = [c for n in range(5) for c in itertools.combinations(('D', 'z', 'delta_bias', 'delta_softplus'), n)]


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('const_B,const_C', list(itertools.product((False, True), repeat=2)))
@pytest.mark.parametrize('along', (False, True))
def test_scan_matrix(backend, layout, const_B, const_C, along):
    "Every subset of D, z, bias and softplus, on each memory layout, padding steps inside."
    for seed, without in enumerate(OPTIONS if backend == 'numba' else OPTIONS[::5]):
        inputs, order = make(along=along, const_B=const_B, const_C=const_C, seed=seed, without=without)
        softplus = 'delta_softplus' not in without
        compare(inputs, order, LAYOUTS[layout], backend, along_order=along, delta_softplus=softplus)


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('shared_u,shared_z', list(itertools.product((False, True), repeat=2)))
@pytest.mark.parametrize('layout', LAYOUTS)
def test_shared_inputs(backend, shared_u, shared_z, layout):
    inputs, order = make(K=3, shared_u=shared_u, shared_z=shared_z)
    compare(inputs, order, LAYOUTS[layout], backend)


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('Bt,K,T,L,D,N', [(1, 1, 1, 1, 1, 1), (1, 4, 7, 7, 1, 16), (2, 1, 33, 40, 32, 16),
                                          (1, 8, 5, 5, 65, 3), (3, 2, 64, 81, 130, 1), (1, 1, 17, 17, 5, 40)])
def test_scan_sizes(backend, Bt, K, T, L, D, N):
    inputs, order = make(Bt, K, T, L, D, N)
    compare(inputs, order, contiguous, backend, tol=1e-4 if T > 60 else 3e-5)


@pytest.mark.parametrize('backend', BACKENDS)
def test_only_one_output_used(backend):
    "The gradient of y alone, and of the last state alone."
    inputs, order = make()
    for cotangent in (lambda y, last: y.sum(), lambda y, last: last.square().sum()):
        reaches_all = lambda y, last: cotangent(y, last) + 0 * (y.sum() + last.sum())
        exact = run(directional_scan_ref, inputs, contiguous, torch.float64, reaches_all, order=order)
        grads = run(directional_scan, inputs, contiguous, torch.float32, cotangent, order=order, backend=backend)[2]
        for name, grad in grads.items(): close(grad, exact[2][name], 2e-5, name)


@pytest.mark.parametrize('backend', BACKENDS)
def test_some_inputs_without_gradient(backend):
    inputs, order = make(without=('z',))
    inputs = {name: x if x is None else x.float() for name, x in inputs.items()}
    inputs['delta'].requires_grad_()
    directional_scan(order=order, backend=backend, **inputs).sum().backward()
    assert inputs['delta'].grad is not None and inputs['u'].grad is None


@pytest.mark.skipif('numba' not in BACKENDS, reason='numba backend not available')
def test_gradients_bit_equal():
    inputs, order = make(Bt=3, K=4, T=64, L=81, D=96, N=16, shared_u=True)
    first = run(directional_scan, inputs, contiguous, torch.float32, stacked, order=order, backend='numba')
    g = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*s, generator=g) for s in ((3, 64, 96), (4, 96, 4), (4, 96)))
    conv = lambda: torch.autograd.grad(directional_conv(*leaves, order).square().sum(), leaves)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    first_conv = conv()
    for _ in range(4):
        again = run(directional_scan, inputs, contiguous, torch.float32, stacked, order=order, backend='numba')
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
        assert all(torch.equal(first[2][name], again[2][name]) for name in first[2])
        assert all(torch.equal(a, b) for a, b in zip(first_conv, conv()))


@pytest.mark.parametrize('dtype', (torch.bfloat16, torch.float16))
@pytest.mark.parametrize('backend', BACKENDS)
def test_scan_half(backend, dtype):
    "Half-precision activations: the output is that of the rounded inputs, rounded once; mixed dtypes are allowed."
    inputs, order = make(T=40, L=49, D=24, N=16)
    exact = {n: x.to(dtype).double() if n in ACTIVATIONS else x.float().double() for n, x in inputs.items()}
    half = {n: x.to(dtype) if n in ACTIVATIONS else x.float() for n, x in inputs.items()}
    y = directional_scan(order=order, backend=backend, **half)
    assert y.dtype == dtype
    expected = directional_scan_ref(order=order, **exact)
    eps = torch.finfo(dtype).eps
    assert_close(y.double(), expected, rtol=2 * eps, atol=1e-4)
    half['delta'] = half['delta'].float()
    assert_close(directional_scan(order=order, backend=backend, **half).double(), expected, rtol=2 * eps, atol=1e-4)
    leaves = {n: x.requires_grad_() for n, x in half.items()}
    y = directional_scan(order=order, backend=backend, **leaves)
    grads = torch.autograd.grad(y.float().sum(), list(leaves.values()))
    assert [g.dtype for g in grads] == [x.dtype for x in leaves.values()]
    references = {n: x.requires_grad_() for n, x in exact.items()}
    expected = torch.autograd.grad(directional_scan_ref(order=order, **references).sum(), list(references.values()))
    for g, e in zip(grads, expected): assert float((g.double() - e).norm() / e.norm()) < 4 * eps


# mamba_ssm's own test of selective_scan_fn, restricted to real A

def mamba_inputs(L, groups, variable_B, variable_C, has_D, has_z, has_bias, dtype):
    g = torch.Generator().manual_seed(0)
    batch, dim, N = 2, 4, 8
    shape = lambda variable: (dim, N) if not variable else (batch, N, L) if groups == 1 else (batch, groups, N, L)
    randn = lambda *shape: torch.randn(*shape, generator=g)
    inputs = dict(u=randn(batch, dim, L).to(dtype), delta=(.5 * torch.rand(batch, dim, L, generator=g)).to(dtype),
                  A=-.5 * torch.rand(dim, N, generator=g), B=randn(*shape(variable_B)), C=randn(*shape(variable_C)),
                  D=randn(dim) if has_D else None, z=randn(batch, dim, L).to(dtype) if has_z else None,
                  delta_bias=.5 * torch.rand(dim, generator=g) if has_bias else None)
    for name, variable in (('B', variable_B), ('C', variable_C)):
        if variable: inputs[name] = inputs[name].to(dtype)
    return inputs


def mamba_case(inputs, dtype, **kwargs):
    "Outputs and gradients within the tolerances of the original test, in which weights have their own."
    results = []
    for function in (selective_scan_fn, selective_scan_ref):
        leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items() if x is not None}
        out = function(**leaves, **kwargs)
        out = out if isinstance(out, tuple) else (out,)
        assert out[0].dtype == dtype and out[0].shape == inputs['u'].shape
        g = torch.Generator().manual_seed(1)
        loss = (out[0] * torch.randn(out[0].shape, generator=g).to(dtype)).sum()
        results.append((out, dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()))))))
    (out, grads), (expected, references) = results
    rtol, atol = MAMBA_TOLERANCE[dtype]
    weight = (max(1e-3, rtol), max(1e-3, atol)) if 'z' in inputs else (1e-3, 1e-3)
    tolerance = dict(u=(2 * rtol, 2 * atol), delta=(5 * rtol, 10 * atol), A=(weight[0], 5 * weight[1]), B=(rtol, atol),
                     C=(rtol, atol), D=weight, z=weight, delta_bias=weight)
    for a, b in zip(out, expected): assert_close(a, b, rtol=rtol, atol=atol)
    for name, grad in grads.items():
        rtol, atol = tolerance[name]
        assert_close(grad, references[name], rtol=rtol, atol=atol, msg=lambda m: f'{name}: {m}')


@pytest.mark.parametrize('groups', (1, 2))
@pytest.mark.parametrize('variable_B,variable_C', list(itertools.product((False, True), repeat=2)))
@pytest.mark.parametrize('has_D,has_z,has_bias', list(itertools.product((False, True), repeat=3)))
def test_mamba_matrix(groups, variable_B, variable_C, has_D, has_z, has_bias):
    inputs = mamba_inputs(128, groups, variable_B, variable_C, has_D, has_z, has_bias, torch.float32)
    mamba_case(inputs, torch.float32, delta_softplus=has_D != has_z, return_last_state=has_bias)


@pytest.mark.parametrize('L', (128, 256, 512, 1024, 2048, 4096))
@pytest.mark.parametrize('dtype', MAMBA_TOLERANCE)
def test_mamba_lengths(L, dtype):
    inputs = mamba_inputs(L, 2, True, True, True, True, True, dtype)
    mamba_case(inputs, dtype, delta_softplus=True, return_last_state=True)


def test_groups_of_B_and_C_may_differ():
    inputs = mamba_inputs(32, 2, True, True, True, True, True, torch.float32)
    for B, C in ((inputs['B'], inputs['C'][:, 0]), (inputs['B'][:, :1], inputs['C'])):
        both = {'B': B.expand(2, 2, 8, 32), 'C': (C if C.dim() == 4 else C[:, None]).expand(2, 2, 8, 32)}
        assert_close(selective_scan_fn(**{**inputs, 'B': B, 'C': C}), selective_scan_fn(**{**inputs, **both}))


# the convolution

@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('W,biased', [(4, True), (4, False), (1, True), (3, False), (8, True)])
def test_conv(backend, layout, W, biased):
    g = torch.Generator().manual_seed(0)
    shapes = dict(x=(2, 11, 19), weight=(3, 19, W), bias=(3, 19))
    inputs = {name: torch.randn(*shape, generator=g, dtype=torch.float64) for name, shape in shapes.items()}
    if not biased: inputs['bias'] = None
    order, lay = make_order(3, 11, 14, g), LAYOUTS[layout]
    results = []
    tested = partial(directional_conv, backend=backend)
    for dtype, function in ((torch.float64, directional_conv_ref), (torch.float32, tested)):
        pairs = {name: lay(x.to(dtype)) for name, x in inputs.items() if x is not None}
        leaves = {name: base.requires_grad_() for name, (base, _) in pairs.items()}
        x, weight, bias = (pairs[n][1](leaves[n]) if n in pairs else None for n in shapes)
        y = function(x, weight, bias, order)
        both = torch.stack([y, y.flip(0)])
        loss = (both * torch.linspace(-1, 1, both.numel(), dtype=dtype).view(both.shape)).sum()
        results.append((y.detach(), dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()))))))
    close(results[1][0], results[0][0], 1e-5)
    for name in results[1][1]: close(results[1][1][name], results[0][1][name], 1e-5, name)


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('dtype', (torch.bfloat16, torch.float16))
def test_conv_half(backend, dtype):
    g = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*s, generator=g) for s in ((2, 9, 8), (2, 8, 4), (2, 8)))
    x, order = x.to(dtype), make_order(2, 9, 9, g)
    y = directional_conv(x, weight, bias, order, backend=backend)
    assert y.dtype == dtype
    expected = directional_conv_ref(x.double(), weight.double(), bias.double(), order)
    assert_close(y.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)
    y = directional_conv(x.requires_grad_(), weight, bias, order, backend=backend)
    assert torch.autograd.grad(y.float().sum(), x)[0].dtype == dtype


def test_along_conv_is_conv1d():
    "On the identity order the convolution is torch's own."
    g = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*s, generator=g) for s in ((2, 10, 5), (1, 5, 4), (1, 5)))
    expected = F.silu(F.conv1d(x.mT, weight[0, :, None], bias[0], padding=3, groups=5)[..., :10]).mT
    assert_close(directional_conv(x, weight, bias, torch.arange(10)[None])[:, 0], expected)


# autograd, autocast, compiler

def test_gradcheck_of_the_operators():
    inputs, order = make(T=4, L=5, D=2, N=2, Bt=1)
    leaves = [x.requires_grad_() for x in inputs.values()]
    call = lambda *xs: directional_scan(order=order, return_last_state=True, **dict(zip(inputs, xs)))
    assert torch.autograd.gradcheck(call, leaves)
    x, weight, bias = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((1, 4, 2), (2, 2, 3), (2, 2)))
    assert torch.autograd.gradcheck(lambda *xs: directional_conv(*xs, order), (x, weight, bias))


def test_second_derivative_is_refused():
    inputs, order = make(without=('D', 'z'))
    inputs = {n: x if x is None else x.float().requires_grad_() for n, x in inputs.items()}
    x = torch.randn(1, 11, 3, requires_grad=True)
    for y, x in ((directional_scan(order=order, **inputs), inputs['u']),
                 (directional_conv(x, torch.randn(2, 3, 4), None, order), x)):
        grad, = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match='no second derivative; directional_scan_ref'): grad.sum().backward()


@pytest.mark.parametrize('backend', BACKENDS)
def test_autocast(backend):
    "Under autocast the result is that without it, bit for bit: activations in any dtype, fp32 inside."
    inputs, order = make(T=40, L=49, D=24, N=16)
    for dtype in (torch.float32, torch.bfloat16):
        leaves = {n: (x.to(dtype) if n in ACTIVATIONS else x.float()).requires_grad_() for n, x in inputs.items()}
        outcomes = []
        for enabled in (False, True):
            with torch.autocast('cpu', dtype=torch.bfloat16, enabled=enabled):
                y = directional_scan(order=order, backend=backend, **leaves)
                v = directional_conv(leaves['z'], leaves['A'][..., :4], leaves['D'], order, backend=backend)
                grads = torch.autograd.grad(y.float().sum() + v.float().sum(), list(leaves.values()))
            outcomes.append((y, v, *grads))
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(*outcomes))


def layer(x, weight, inputs, order):
    "Both operators, one after the other, between ordinary functions."
    u = directional_conv(x * 2, weight, None, order)
    y, last = directional_scan(u, order=order, along_order=True, return_last_state=True, **inputs)
    return y.sum(1).relu(), last


def layer_arguments(dtype=torch.float32, Bt=2):
    inputs, order = make(Bt=Bt, along=True, without=('delta_bias',))
    inputs = {n: x.to(dtype).requires_grad_() for n, x in inputs.items() if x is not None and n != 'u'}
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(Bt, 11, 19, generator=g, dtype=dtype), torch.randn(2, 19, 4, generator=g)
    return x.requires_grad_(), weight.requires_grad_(), inputs, order


def loss_and_grads(function, x, weight, inputs, order):
    y, last = function(x, weight, inputs, order)
    return y, last, *torch.autograd.grad(y.float().square().sum() + last.sum(), [x, weight, *inputs.values()])


def test_compile():
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend='aot_eager')
    for Bt in (2, 3):
        arguments = layer_arguments(Bt=Bt)
        for a, b in zip(loss_and_grads(compiled, *arguments), loss_and_grads(layer, *arguments)): assert_close(a, b)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        for a, b in zip(loss_and_grads(compiled, *arguments), loss_and_grads(layer, *arguments)): assert_close(a, b)


@pytest.mark.skipif(not shutil.which('g++'), reason='no C++ compiler')
def test_compile_inductor(monkeypatch):
    "Two backends share the compiler's cache on disk, where what they save for the backward differs."
    for backend in BACKENDS:
        monkeypatch.setenv('LOCALMAMBA_BACKEND', backend)
        torch._dynamo.reset()
        compiled, arguments = torch.compile(layer, fullgraph=True), layer_arguments()
        for a, b in zip(loss_and_grads(compiled, *arguments), loss_and_grads(layer, *arguments)): assert_close(a, b)


def test_compile_mamba_layout():
    inputs = mamba_inputs(16, 2, True, False, True, True, True, torch.float32)
    call = lambda inputs: selective_scan_fn(**inputs, delta_softplus=True, return_last_state=True)
    torch._dynamo.reset()
    for a, b in zip(torch.compile(call, fullgraph=True, backend='aot_eager')(inputs), call(inputs)): assert_close(a, b)


def test_export():
    class Layer(torch.nn.Module):
        def forward(self, x, weight, inputs, order): return layer(x, weight, inputs, order)
    detach = lambda *args: torch.utils._pytree.tree_map(torch.detach, args)
    arguments, larger = detach(*layer_arguments()), detach(*layer_arguments(Bt=5))
    batch = torch.export.Dim('batch', min=2, max=64)
    activation = {0: batch}
    shapes = (activation, None, {n: activation if n in ACTIVATIONS else None for n in arguments[2]}, None)
    program = torch.export.export(Layer(), arguments, dynamic_shapes=shapes)
    for a, b in zip(program.module()(*larger), layer(*larger)): assert_close(a, b)


def operator_arguments():
    inputs, order = make(Bt=2, D=3, N=2, without=('D',))
    inputs = {n: x if x is None else x.float().requires_grad_() for n, x in inputs.items()}
    scan = (*(inputs[n] for n in ('u', 'delta', 'A', 'B', 'C', 'D', 'z', 'delta_bias')), order, True, False, 11, '', [])
    conv = torch.randn(2, 11, 3).requires_grad_(), torch.randn(2, 3, 4).requires_grad_(), None, order, ''
    return scan, conv


def test_opcheck():
    scan, conv = operator_arguments()
    torch.library.opcheck(torch.ops.localmamba.directional_scan.default, scan)
    torch.library.opcheck(torch.ops.localmamba.directional_conv.default, conv)
    detach = lambda args: [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
    saved = torch.ops.localmamba.directional_scan(*scan)[2]
    checks = 'test_schema', 'test_faketensor'
    ops = torch.ops.localmamba
    arguments = torch.randn(2, 2, 11, 3), None, saved, *detach(scan)
    torch.library.opcheck(ops.directional_scan_backward.default, arguments, test_utils=checks)
    arguments = torch.randn(2, 2, 14, 3), *detach(conv)
    torch.library.opcheck(ops.directional_conv_backward.default, arguments, test_utils=checks)


@pytest.mark.parametrize('Bt,K,L,D,N', [(1, 1, 1, 1, 1), (2, 3, 33, 70, 5)])
def test_fake_agrees_with_real(Bt, K, L, D, N):
    inputs, order = make(Bt, K, L, L, D, N)
    args = (*(x.float() for x in inputs.values()), order, True, False, L, '', [])
    real = torch.ops.localmamba.directional_scan(*args)
    with torch._subclasses.FakeTensorMode() as mode:
        args = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args]
        fake = torch.ops.localmamba.directional_scan(*args)
    strides = lambda x: [stride for size, stride in zip(x.shape, x.stride()) if size > 1]
    for a, b in zip(real, fake): assert a.shape == b.shape and a.dtype == b.dtype and strides(a) == strides(b)


def test_meta_tensors():
    inputs, order = make()
    y = directional_scan(order=order.to('meta'), **{n: x.to('meta') for n, x in inputs.items()})
    assert y.device.type == 'meta' and y.shape == (2, 2, 11, 19)


def test_inference_mode():
    "A table of an order made in inference mode works there, and in training afterwards."
    inputs, _ = make()
    inputs = {n: x.float() for n, x in inputs.items()}
    with torch.inference_mode():
        order = make_order(2, 11, 14, torch.Generator().manual_seed(0))
        y = directional_scan(order=order, **inputs)
    inputs['u'].requires_grad_()
    again = directional_scan(order=order, **inputs)
    assert_close(y, again)
    again.sum().backward()


def test_flops():
    "Half of what torch counts is the field's 9·L·D·N, plus one each for skip and gate; the backward counts twice."
    inputs, order = make(Bt=2, K=3, T=11, L=14, D=19, N=6)
    leaves = {n: x.float().requires_grad_() for n, x in inputs.items()}
    one = 2 * 3 * 14 * 19
    with FlopCounterMode(display=False) as counter: y = directional_scan(order=order, **leaves)
    assert counter.get_total_flops() == 2 * one * (9 * 6 + 2)
    with FlopCounterMode(display=False) as counter: y.sum().backward()
    assert counter.get_total_flops() == 4 * one * (9 * 6 + 2)
    with FlopCounterMode(display=False) as counter:
        y = directional_conv(torch.randn(2, 11, 19, requires_grad=True), torch.randn(3, 19, 4), None, order)
    assert counter.get_total_flops() == 2 * one * 4
    u, A = torch.randn(2, 19, 5), torch.randn(19, 6)
    with FlopCounterMode(display=False) as counter: selective_scan_fn(u, u, A, A, A)
    assert counter.get_total_flops() == 2 * 2 * 5 * 19 * 9 * 6


# backends

def test_backends_are_listed():
    assert list(backends()) == ['reference', 'numba', 'triton', 'mamba_ssm'] and backends()['reference'] == 'available'
    assert all(isinstance(reason, str) and reason for reason in backends().values())


def chosen(backend=None, dtype=torch.float32, **env): return room.chosen(backend, torch.zeros(1, dtype=dtype))


def test_choice(monkeypatch):
    fast = 'numba' if 'numba' in BACKENDS else 'reference'
    assert chosen() == fast and chosen(dtype=torch.float64) == 'reference' and chosen('reference') == 'reference'
    monkeypatch.setenv('LOCALMAMBA_BACKEND', 'reference')
    assert chosen() == 'reference' and chosen(fast) == fast


LISTING = 'Backends: reference: available; numba: .*; triton: .*; mamba_ssm: '


@pytest.mark.parametrize('name,message', [('cuda_core', f'there is no such backend. {LISTING}'), ('triton', LISTING)])
def test_override_is_refused(monkeypatch, name, message):
    monkeypatch.setenv('LOCALMAMBA_BACKEND', name)
    inputs, order = make()
    with pytest.raises(ValueError, match=f'LOCALMAMBA_BACKEND={name!r}: .*{message}'):
        directional_scan(order=order, **{n: x.float() for n, x in inputs.items()})


def test_cuda_backend_on_cpu_tensors(monkeypatch):
    monkeypatch.setattr(room, 'load_kernels', lambda name: (object(), None))
    room.resolve.cache_clear()
    try:
        with pytest.raises(ValueError, match="backend='triton': runs on cuda tensors only, the input is on cpu"):
            chosen('triton')
    finally: room.resolve.cache_clear()


def test_missing_numba_is_said(monkeypatch):
    load = room.load_kernels
    missing = lambda name: (None, 'cannot import numba') if name == 'numba' else load(name)
    monkeypatch.setattr(room, 'load_kernels', missing)
    room.resolve.cache_clear()
    try:
        with pytest.warns(UserWarning, match='plain PyTorch reference.*cannot import numba'):
            assert chosen() == 'reference'
        with pytest.raises(ValueError, match='cannot import numba'): chosen('numba')
    finally: room.resolve.cache_clear()


def test_float64_by_name():
    if 'numba' not in BACKENDS: pytest.skip('numba backend not available')
    with pytest.raises(ValueError, match="backend='numba': computes in float32, the input is float64"):
        chosen('numba', torch.float64)


def stub_mamba(monkeypatch):
    "Stand-ins with the interfaces of mamba_ssm and causal_conv1d, on the CPU."
    class Old(torch.autograd.Function):
        "Like the original: no setup_context, the last state's gradient ignored."
        @staticmethod
        def forward(ctx, softplus, *args):
            ctx.softplus, ctx.args = softplus, args
            return selective_scan_ref(*args, delta_softplus=softplus, return_last_state=True)

        @staticmethod
        def backward(ctx, dout, *_):
            with torch.enable_grad():
                leaves = [x if x is None else x.detach().requires_grad_() for x in ctx.args]
                out = selective_scan_ref(*leaves, delta_softplus=ctx.softplus)
            grads = iter(torch.autograd.grad(out, [x for x in leaves if x is not None], dout))
            return None, *(None if x is None else next(grads) for x in leaves)

    def scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False):
        assert u.is_contiguous() and B.is_contiguous() and z is None and u.dtype == delta.dtype
        return Old.apply(delta_softplus, u, delta, A, B, C, D, None, delta_bias)

    def conv(x, weight, bias=None, activation=None):
        assert activation == 'silu'
        y = F.conv1d(x, weight[:, None], bias, padding=weight.shape[1] - 1, groups=len(weight))
        return F.silu(y[..., :x.shape[-1]])

    modules = {'mamba_ssm': {}, 'mamba_ssm.ops': {}, 'selective_scan_cuda': {},
               'mamba_ssm.ops.selective_scan_interface': {'selective_scan_fn': scan},
               'causal_conv1d': {'causal_conv1d_fn': conv}}
    for name, content in modules.items():
        module = types.ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    kernels = Differentiable(room.mamba_scan, room.mamba_conv, lambda: None, last_state_grad=False)
    monkeypatch.setitem(room.BACKENDS, 'mamba_ssm', Backend(kernels))
    room.forget_choices()


def test_mamba_ssm_backend(monkeypatch):
    "Through stand-ins: layouts in and out, gradients, and the refusal to differentiate the last state."
    stub_mamba(monkeypatch)
    run_exact = partial(run, directional_scan_ref, layout=contiguous, dtype=torch.float64)
    run_single = partial(run, directional_scan, layout=contiguous, dtype=torch.float32, backend='mamba_ssm')
    squares = lambda y, last: y.square().sum()
    try:
        for along, const in itertools.product((False, True), repeat=2):
            inputs, order = make(along=along, const_B=const, without=('D',) if const else ())
            exact = run_exact(inputs, cotangent=squares, order=order, along_order=along)
            given = run_single(inputs, cotangent=squares, order=order, along_order=along)
            close(given[0], exact[0], 2e-5)
            for name in given[2]: close(given[2][name], exact[2][name], 5e-5, name)
        x, weight, bias = (torch.randn(*s, requires_grad=True) for s in ((2, 11, 19), (2, 19, 4), (2, 19)))
        given = directional_conv(x, weight, bias, order, backend='mamba_ssm')
        expected = directional_conv_ref(x, weight, bias, order)
        assert_close(given, expected)
        given, expected = (torch.autograd.grad(y.sum(), (x, weight, bias)) for y in (given, expected))
        for a, b in zip(given, expected): assert_close(a, b)
        with pytest.raises(RuntimeError, match='no gradient through the last state'):
            run_single(inputs, cotangent=lambda y, last: last.sum(), order=order, along_order=along)
    finally: room.forget_choices()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('backend', [None, *(n for n in ('triton', 'mamba_ssm') if backends()[n] == 'available')])
def test_cuda(backend):
    inputs, order = make(T=40, L=49, D=24, N=16)
    exact = directional_scan_ref(order=order, **inputs)
    y = directional_scan(order=order, backend=backend, **{n: x.float().cuda() for n, x in inputs.items()})
    close(y.cpu(), exact, 1e-4)


# what bad arguments get

@pytest.mark.parametrize('name,bad,match', [
    ('delta', lambda x: x[0], r'delta: got shape \(2, 11, 19\); allowed: \(Bt, K, T, D\)'),
    ('u', lambda x: x[:, :1], r'u: got shape \(2, 1, 11, 19\); allowed: \(2, 2, 11, 19\) or \(2, 11, 19\)'),
    ('A', lambda x: x[:, :5], r'A: got shape \(2, 5, 6\); allowed: \(2, 19, 6\)'),
    ('A', lambda x: x[0], r'A: got shape \(19, 6\); allowed: \(K, D, N\)'),
    ('B', lambda x: x[..., :4], r'B: got shape \(2, 2, 11, 4\); allowed: \(2, 2, 11, 6\) or \(2, 19, 6\)'),
    ('C', lambda x: x[0], r'C: got shape \(2, 11, 6\); allowed'),
    ('D', lambda x: x[0], r'D: got shape \(19,\); allowed: \(2, 19\)'),
    ('delta_bias', lambda x: x[:, :3], r'delta_bias: got shape \(2, 3\); allowed: \(2, 19\)'),
    ('z', lambda x: x[:, :3], r'z: got shape \(2, 3, 19\); allowed: \(2, 11, 19\) or \(2, 2, 11, 19\)'),
    ('order', lambda x: x[:1], r'order: got shape \(1, 14\); allowed: \(2, L\)'),
    ('order', lambda x: x.int(), r'order: got dtype torch.int32; allowed: torch.int64'),
    ('order', lambda x: x.clamp(max=9), r'order: got 14 steps for 11 tokens; allowed: in each row every'),
    ('order', lambda x: torch.where(x == 3, 300, x), r'order: got 14 steps for 11 tokens'),
    ('order', lambda x: x[:, :5], r'order: got 5 steps for 11 tokens'),
    ('order', lambda x: x - 1, r'order: got 14 steps'),
    ('u', lambda x: x.long(), r'u: got dtype torch.int64; allowed: torch.float32'),
    ('A', lambda x: x.to(torch.complex64), r'A: got dtype torch.complex64; allowed: only real parameters'),
    ('B', lambda x: x.to('meta'), r'B: got device meta; allowed: cpu'),
])
def test_scan_errors(name, bad, match):
    inputs, order = make()
    arguments = {**{n: x.float() for n, x in inputs.items()}, 'order': order}
    arguments[name] = bad(arguments[name])
    with pytest.raises(ValueError, match=match): directional_scan(**arguments)


def test_order_is_checked_again_after_a_change():
    inputs, order = make()
    inputs = {n: x.float() for n, x in inputs.items()}
    directional_scan(order=order, **inputs)
    order[0] = 5
    with pytest.raises(ValueError, match='exactly once'): directional_scan(order=order, **inputs)


def test_along_order_with_padding_needs_tokens():
    inputs, order = make(along=True, without=('z',))
    inputs = {n: x if x is None else x.float() for n, x in inputs.items()}
    with pytest.raises(ValueError, match='tokens: got 14; allowed: 11, as many as order visits'):
        directional_scan(order=order, along_order=True, **inputs)
    assert directional_scan(order=order, along_order=True, tokens=11, **inputs).shape == (2, 2, 11, 19)


@pytest.mark.parametrize('change,match', [
    (dict(x=torch.zeros(3, 4)), r'x: got shape \(3, 4\); allowed: \(Bt, T, D\)'),
    (dict(weight=torch.zeros(2, 5, 4)), r'weight: got shape \(2, 5, 4\); allowed: \(K, 3, W\)'),
    (dict(weight=torch.zeros(2, 3, 9)), 'weight: got 9 taps; allowed: 1 to 8'),
    (dict(bias=torch.zeros(3)), r'bias: got shape \(3,\); allowed: \(2, 3\)'),
    (dict(order=torch.zeros(2, 4, dtype=torch.long)), 'order: got 4 steps for 4 tokens'),
])
def test_conv_errors(change, match):
    arguments = dict(x=torch.zeros(1, 4, 3), weight=torch.zeros(2, 3, 4), bias=None, order=torch.arange(4).repeat(2, 1))
    with pytest.raises(ValueError, match=match): directional_conv(**{**arguments, **change})


@pytest.mark.parametrize('change,match', [
    (dict(A=torch.zeros(4, 8, dtype=torch.complex64)), 'A: got dtype torch.complex64; allowed: real numbers'),
    (dict(B=torch.zeros(2, 3, 8, 5)), r'B, C: got 3 groups; allowed: a number that divides the 4 channels of u'),
    (dict(B=torch.zeros(2, 7, 5)), r'B: got shape \(2, 7, 5\); allowed: \(4, 8\) or \(2, 8, 5\)'),
    (dict(delta=torch.zeros(2, 4, 6)), r'delta: got shape \(2, 4, 6\); allowed: \(2, 4, 5\)'),
    (dict(u=torch.zeros(4, 5)), r'u: got shape \(4, 5\); allowed: \(B, D, L\)'),
    (dict(z=torch.zeros(2, 5, 4)), r'z: got shape \(2, 5, 4\); allowed: \(2, 4, 5\)'),
])
def test_mamba_layout_errors(change, match):
    u, B = torch.zeros(2, 4, 5), torch.zeros(2, 8, 5)
    arguments = dict(u=u, delta=u, A=torch.zeros(4, 8), B=B, C=B)
    with pytest.raises(ValueError, match=match): selective_scan_fn(**{**arguments, **change})
