"""Random scans, convolutions and merges whose inputs and outputs end (or begin) at a page that nobody may touch.

python tests/fuzz_ssm.py SECONDS [LANES] [SEED]: a fault ends the process, a wrong number raises, with the seed."""

import ctypes
import mmap
import random
import sys
import time

LANES = int(sys.argv[2]) if len(sys.argv) > 2 else 0
if LANES == 8:  # before anything asks: this machine has no AVX-512
    import llvmlite.binding

    _host = llvmlite.binding.get_host_cpu_features

    def _narrow():
        features = _host()
        for name in features:
            if name.startswith('avx512'):
                features[name] = False
        return features

    llvmlite.binding.get_host_cpu_features = _narrow

import torch

from localmamba.kernels.backends import kernels_of
from localmamba.scattn import SCAttn
from localmamba.ssm import directional_conv, directional_conv_ref, directional_scan, directional_scan_ref

PAGE, EMPTY, LIBC = mmap.PAGESIZE, torch.empty, ctypes.CDLL(None, use_errno=True)
DTYPES = torch.float32, torch.float32, torch.bfloat16, torch.float16


def guarded(shape, dtype=torch.float32, front=False):
    "Uninitialised memory between two pages without access, against the last of them (or the first)."
    count = 1
    for n in shape:
        count *= n
    size = count * dtype.itemsize
    if not size:
        return EMPTY(shape, dtype=dtype)
    pages = -(-size // PAGE)
    memory = mmap.mmap(-1, (pages + 2) * PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (address, address + (pages + 1) * PAGE):
        if LIBC.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(PAGE), 0):
            raise OSError(ctypes.get_errno(), 'mprotect')
    offset = PAGE if front else (pages + 1) * PAGE - size
    x = torch.frombuffer(memory, dtype=dtype, count=count, offset=offset).view(shape)
    return x.fill_(float('nan')) if dtype.is_floating_point else x


def guarded_empty(*size, **options):
    "torch.empty, guarded where it is asked for plain CPU memory."
    shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
    dtype = options.get('dtype') or torch.float32
    if set(options) - {'dtype'} or dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return EMPTY(*size, **options)
    return guarded(tuple(shape), dtype, random.random() < 0.3)


def laid_out(values, dtype):
    "The values in guarded memory, in some order of axes, sometimes with gaps."
    axes = list(range(values.dim()))
    random.shuffle(axes)
    if random.random() < 0.4:
        axes.sort()
    step = [random.choice((1, 1, 1, 2)) for _ in axes]
    base = guarded(
        [(values.shape[a] - 1) * s + 1 if values.shape[a] else 0 for a, s in zip(axes, step)],
        dtype,
        random.random() < 0.3,
    )
    x = base[tuple(slice(None, None, s) for s in step)].permute([axes.index(a) for a in range(len(axes))])
    return x.copy_(values).requires_grad_()


def orders(K, T, L):
    table = torch.full((K, L), -1)
    for row in table:
        row[torch.randperm(L)[:T].sort().values if random.random() < 0.5 else torch.arange(T)] = torch.randperm(T)
    return table


def compare(f, reference, leaves, what):
    "Outputs and gradients against float64 of the same inputs."
    exact = {n: x if x is None else x.detach().double().requires_grad_() for n, x in leaves.items()}
    given, wanted = [(y if isinstance(y, tuple) else (y,)) for y in (f(**leaves), reference(**exact))]
    cotangents = [guarded(y.shape, y.dtype).copy_(torch.randn(y.shape)) for y in given]
    present = [n for n, x in leaves.items() if x is not None]
    grads = torch.autograd.grad(given, [leaves[n] for n in present], cotangents)
    paired = [(y, c.double()) for y, c in zip(wanted, cotangents) if y.requires_grad]  # not the state of no tokens
    leaves64 = [exact[n] for n in present]
    heads, weights = zip(*paired) if paired else ((), ())
    grads64 = torch.autograd.grad(heads, leaves64, weights, allow_unused=True) if paired else [None] * len(present)
    eps = max(torch.finfo(x.dtype).eps for x in leaves.values() if x is not None)
    for name, a, b in zip([*map(str, range(len(given))), *present], [*given, *grads], [*wanted, *grads64]):
        b = torch.zeros_like(a, dtype=torch.float64) if b is None else b
        if a.shape != b.shape:
            raise AssertionError(f'{what}: {name} has shape {tuple(a.shape)}, not {tuple(b.shape)}')
        error = float((a.detach().double() - b.detach()).norm())
        if not error <= (8 * eps + 2e-4) * float(b.norm()) + 1e-4 * b.numel() ** 0.5:
            raise AssertionError(f'{what}: {name} is off by {error}')


def scan_case():
    Bt, K, T, D, N = (
        random.choice(c)
        for c in (
            (0, 1, 1, 2, 3),
            (1, 2, 4),
            (0, 1, 2, 7, 16, 17, 33, 50),
            (0, 1, 3, 8, 15, 16, 17, 31, 33, 50),
            (1, 2, 3, 4, 7, 8, 16, 17),
        )
    )
    L, along, softplus = T + random.choice((0, 0, 1, 5, 20)), random.random() < 0.5, random.random() < 0.7
    S, chance = L if along else T, lambda: random.random() < 0.5
    raw = dict(
        u=(Bt, T, D) if chance() and not along else (Bt, K, S, D),
        delta=(Bt, K, S, D),
        A=(K, D, N),
        B=(K, D, N) if random.random() < 0.2 else (Bt, K, S, N),
        C=(K, D, N) if random.random() < 0.2 else (Bt, K, S, N),
        D=(K, D) if chance() else None,
        z=None if chance() else (Bt, T, D) if chance() else (Bt, K, T, D),
        delta_bias=(K, D) if chance() else None,
    )
    values = {n: None if s is None else torch.randn(s) for n, s in raw.items()}
    values['A'] = -values['A'].exp() - 0.1
    if not softplus:
        for n in ('delta', 'delta_bias'):
            values[n] = values[n] if values[n] is None else values[n].abs() / 2
    wide = 'A', 'D', 'delta_bias'
    dtype = random.choice(DTYPES)
    leaves = {
        n: x
        if x is None
        else laid_out(
            x, torch.float32 if n in wide else random.choice((dtype, dtype, torch.float32)) if n != 'u' else dtype
        )
        for n, x in values.items()
    }
    rest = dict(order=orders(K, T, L), delta_softplus=softplus, along_order=along, return_last_state=True, tokens=T)
    what = f'scan Bt={Bt} K={K} T={T} L={L} D={D} N={N} along={along} dtype={dtype}'
    compare(lambda **x: directional_scan(**x, **rest), lambda **x: directional_scan_ref(**x, **rest), leaves, what)


def conv_case():
    Bt, K, T, D, W = (
        random.choice(c)
        for c in ((0, 1, 2, 3), (1, 2, 4), (0, 1, 2, 7, 40, 70, 130), (0, 1, 8, 15, 16, 17, 33), range(1, 9))
    )
    order, dtype = orders(K, T, T + random.choice((0, 0, 3))), random.choice(DTYPES)
    leaves = dict(
        x=laid_out(torch.randn(Bt, T, D), dtype),
        weight=laid_out(torch.randn(K, D, W), torch.float32),
        bias=laid_out(torch.randn(K, D), torch.float32) if random.random() < 0.5 else None,
    )
    compare(
        lambda **x: directional_conv(**x, order=order),
        lambda **x: directional_conv_ref(**x, order=order),
        leaves,
        f'conv Bt={Bt} K={K} T={T} D={D} W={W} dtype={dtype}',
    )


def merge_case():
    B, K, T, C = (random.choice(c) for c in ((1, 2, 3), (1, 2, 5), (1, 2, 7, 64, 70, 130), (8, 9, 15, 16, 17, 33, 50)))
    attn, dtype = SCAttn(C), random.choice(DTYPES)
    for p in attn.parameters():
        torch.nn.init.uniform_(p, -1, 1)
        p.data = laid_out(p.data, torch.float32).detach()
    exact = SCAttn(C).double()
    exact.load_state_dict(attn.state_dict())
    leaves = dict(branches=laid_out(2 * torch.randn(B, K, T, C), dtype))
    compare(
        lambda branches: attn.merge(branches),
        lambda branches: exact(branches.flatten(0, 1)).view_as(branches).sum(1),
        leaves,
        f'merge B={B} K={K} T={T} C={C} dtype={dtype}',
    )


def main(seconds, seed=0):
    torch.empty, start, cases = guarded_empty, time.time(), 0
    while time.time() - start < seconds:
        random.seed(seed)
        torch.manual_seed(seed)
        try:
            random.choice((scan_case, scan_case, scan_case, conv_case, merge_case))()
        except AssertionError as error:
            raise AssertionError(f'seed {seed}: {error}') from None
        seed, cases = seed + 1, cases + 1
    from localmamba.kernels.vector import WIDTH

    print(f'{cases} cases in {time.time() - start:.0f} s on {WIDTH} lanes ({kernels_of("", torch.zeros(1)).__name__})')


if __name__ == '__main__':
    main(float(sys.argv[1]), int(sys.argv[3]) if len(sys.argv) > 3 else 0)
