"Gate and sum at once against SCAttn followed by a sum: layouts, sizes, dtypes, threads."
import pytest
import timm
import torch
from torch.testing import assert_close

from localmamba.cost import count_flops
from localmamba.mixer import SS2D, VimMixer, without_facts
from localmamba.models.weights import load_released, to_released
from localmamba.scattn import MODES, SCAttn

LAYOUTS = {'contiguous': lambda x: x, 'sliced': lambda x: torch.stack([x, x], -1)[..., 1],
           'transposed': lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
           'padded': lambda x: torch.nn.functional.pad(x, (3, 2, 1, 0))[..., 1:, 3:-2],
           'expanded': lambda x: x[:1].expand_as(x)}


def literal(attn, branches): return attn(branches.flatten(0, 1)).view_as(branches).sum(1)


def attention(dim, dtype=torch.float32, **kwargs):
    torch.manual_seed(dim)
    attn = SCAttn(dim, reduction=min(8, dim), **kwargs).to(dtype)
    for p in attn.parameters(): torch.nn.init.uniform_(p, -1, 1)
    return attn


def weighted(y): return (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum()


def compare(shape, layout=LAYOUTS['contiguous'], loss=weighted):
    "Output and every gradient against the literal way in float64."
    attn, exact = attention(shape[-1]), attention(shape[-1]).double()
    leaf = (2 * torch.randn(shape) + 1).requires_grad_()
    wide = leaf.detach().double().requires_grad_()
    y, y_exact = attn.merge(layout(leaf)), literal(exact, layout(wide))
    assert_close(y.double(), y_exact, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(loss(y), [leaf, *attn.parameters()])
    for a, b in zip(grads, torch.autograd.grad(loss(y_exact), [wide, *exact.parameters()])):
        assert_close(a.double(), b, rtol=1e-4, atol=1e-5 * float(b.abs().max().clamp(min=1)))


@pytest.mark.parametrize('layout', list(LAYOUTS))
def test_layouts(layout): compare((2, 3, 10, 40), LAYOUTS[layout])


@pytest.mark.parametrize('shape', [(1, 1, 1, 2), (1, 4, 3, 15), (2, 1, 5, 16), (1, 2, 70, 17), (2, 8, 130, 96)])
def test_sizes(shape): compare(shape)


def test_the_gradient_of_a_sum(): compare((2, 3, 10, 40), loss=lambda y: y.sum())


def test_a_constant_row_and_a_far_mean():
    "A row without variance, and one whose mean is a thousand times its deviation."
    attn, x = attention(24), torch.randn(1, 2, 5, 24)
    x[0, 0, 1], x[0, 1, 2] = 3., 1000. + x[0, 1, 2]
    assert_close(attn.merge(x).double(), literal(attention(24).double(), x.double()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half(dtype):
    "The result is that of the rounded branches in fp32, rounded once."
    attn, x = attention(40), torch.randn(2, 3, 10, 40).to(dtype).requires_grad_()
    y = attn.merge(x)
    assert y.dtype == dtype
    assert_close(y, literal(attn, x.detach().float()).to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-3)
    assert torch.autograd.grad(y.float().sum(), x)[0].dtype == dtype


@pytest.mark.parametrize('mode', MODES)
def test_every_mode_merges(mode):
    attn, x = attention(16, mode=mode), torch.randn(2, 3, 5, 16)
    assert_close(attn.merge(x), literal(attn, x), rtol=1e-5, atol=1e-5)


def test_float64_takes_the_literal_way():
    attn = attention(8, torch.float64)
    x = torch.randn(1, 2, 3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(attn.merge, x)


def test_bit_equal_for_any_number_of_threads():
    attn, x, before = attention(96), torch.randn(4, 4, 196, 96, requires_grad=True), torch.get_num_threads()
    def grads():
        y = attn.merge(x)
        return y, *torch.autograd.grad(y.square().sum(), [x, *attn.parameters()])
    try:
        torch.set_num_threads(1)
        alone = grads()
        torch.set_num_threads(2)
        for a, b in zip(alone, grads()): assert_close(a, b, rtol=1e-5, atol=1e-4)  # PyTorch's small products differ
        for a, b in zip(grads(), grads()): assert torch.equal(a, b)
    finally: torch.set_num_threads(before)


def test_refused():
    with pytest.raises(ValueError, match=r'branches: got shape \(2, 3, 5, 8\); allowed: \(B, K, T, 16\)'):
        attention(16).merge(torch.randn(2, 3, 5, 8))


def test_under_autocast_and_inference_mode():
    attn, x = attention(16), torch.randn(2, 3, 5, 16)
    with torch.inference_mode(): y = attn.merge(x)
    with torch.autocast('cpu', dtype=torch.bfloat16): assert_close(attn.merge(x), y, rtol=0, atol=0)


# The gate behind the merge: `scattn_at='merged'`.

@pytest.mark.parametrize('family, mode', [(VimMixer, 'channel'), (SS2D, 'both'), (SS2D, 'spatial')])
def test_the_gate_on_the_merged_map_is_its_definition_with_gradients(family, mode):
    torch.manual_seed(0)
    mixer = family(16, ('h', 'v_flip', 'w2'), d_state=4, scattn=mode, scattn_at='merged').double()
    for p in mixer.parameters(): torch.nn.init.uniform_(p, -0.5, 0.5)
    branches = torch.randn(2, 3, 12, 32, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(2, 12, 32, dtype=torch.float64)

    def plain(branches):
        x, attn = branches[:, 0] + branches[:, 1] + branches[:, 2], mixer.attn
        y = torch.nn.functional.layer_norm(x, (32,), attn.norm.weight, attn.norm.bias)
        g = torch.nn.functional.gelu(attn.global_reduce(y.mean(1, keepdim=True)))
        if mode != 'spatial': x = x * attn.channel_select(g).sigmoid()
        if mode == 'channel': return x
        l = torch.nn.functional.gelu(attn.local_reduce(y))
        return x * attn.spatial_select(torch.cat([l, g.expand_as(l)], -1)).sigmoid()

    torch.testing.assert_close(mixer.merge(branches), plain(branches))
    leaves = [branches, *mixer.attn.parameters()]
    torch.testing.assert_close(torch.autograd.grad(mixer.merge(branches), leaves, dy),
                               torch.autograd.grad(plain(branches), leaves, dy))


@pytest.mark.parametrize('name', ['test_local_vim', 'test_local_vmamba'])
def test_the_place_of_the_gate_in_models(name):
    before, late = timm.create_model(name).eval(), timm.create_model(name, scattn_at='merged').eval()
    # at the start all gates are nearly ½, wherever they stand
    for p in before.parameters(): torch.nn.init.uniform_(p, -0.5, 0.5)
    assert {k: v.shape for k, v in before.state_dict().items()} == {k: v.shape for k, v in late.state_dict().items()}
    for model, weights, place in ((late, before.state_dict(), 'branch'), (before, late.state_dict(), 'merged'),
                                  (late, dict(before.state_dict()), 'branch')):
        with pytest.raises(RuntimeError, match=f"weights belong to scattn_at='{place}'"): model.load_state_dict(weights)
    late.load_state_dict(without_facts(before.state_dict()))  # bare tensors say nothing of where they belong
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad(): assert not torch.allclose(before(images), late(images), atol=1e-6)
    for call in (lambda: to_released(late), lambda: load_released(late, to_released(before))):
        with pytest.raises(ValueError, match="scattn_at: got 'merged'"): call()
    supernet = timm.create_model(name, scattn_at='merged', directions='search').eval()
    assert supernet(images).shape == (1, 10)


def test_the_merged_gate_costs_one_branch():
    ungated = timm.create_model('test_local_vmamba', scattn='none')
    at = {p: timm.create_model('test_local_vmamba', scattn='both', scattn_at=p) for p in ('branch', 'merged')}
    none, branch, merged = (count_flops(m, 32, 'nine') for m in (ungated, *at.values()))
    assert branch - none == 4 * (merged - none)
    assert len({sum(p.numel() for p in m.parameters()) for m in at.values()}) == 1
