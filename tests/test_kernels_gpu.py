"The GPU kernels against the reference: on a GPU, and in Triton's interpreter in a process of its own."
import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from torch import nn
from torch.testing import assert_close

from localmamba import gpu_check
from localmamba.files import read_csv
from localmamba.kernels import gpu, gpu_gate, gpu_scan
from localmamba.kernels.paper import Shape
from localmamba.models.weights import to_released
from localmamba.scattn import SCAttn
from localmamba.ssm import backends, directional_conv, directional_conv_ref, directional_scan, directional_scan_ref
from test_ssm import LAYOUTS, MAMBA_TOLERANCE, contiguous, make, make_order

ROOT = Path(__file__).resolve().parents[1]
DEVICE = 'cpu' if gpu.INTERPRETED else 'cuda'
runs = pytest.mark.skipif(gpu.reason() is not None, reason=str(gpu.reason()))
cuda = lambda test: pytest.mark.cuda(pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')(test))


def python(*args, timeout=600, **env):
    "Output of a new process, in which the interpreter is on only if asked for."
    env = {**{k: v for k, v in os.environ.items() if k != 'TRITON_INTERPRET'}, 'PYTHONPATH': str(ROOT), **env}
    done = subprocess.run([sys.executable, *args], env=env, capture_output=True, text=True, timeout=timeout, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.skipif(gpu.INTERPRETED or gpu.MISSING is not None, reason='in the interpreter already, or no Triton')
def test_in_the_interpreter():
    "The tests below that need no GPU."
    chosen = '-m', 'not cuda and not slow', '-k', 'not without_triton and not check_of_a_gpu', '-p', 'no:cacheprovider'
    out = python('-m', 'pytest', __file__, *chosen, TRITON_INTERPRET='1')
    assert ' passed' in out


@pytest.fixture
def small_tiles(monkeypatch):
    "Several chunks, several saved states and several blocks of channels on small inputs."
    for name, value in dict(CHUNK=2, SAVED_EVERY=4, BLOCK=4).items(): monkeypatch.setattr(gpu_scan, name, value)
    monkeypatch.setattr(gpu_gate, 'TOKENS', 2)


def weights(x): return torch.linspace(-1, 1, x.numel(), dtype=torch.float64).view(x.shape).to(x.device, x.dtype)


def stacked(y, last):
    "A loss whose gradients reach y as slices of a stacked tensor, and the last state as one expanded number."
    both = torch.stack([y, y.flip(0)], -1)
    return (both * weights(both)).sum() + last.sum()


def run(function, inputs, layout, loss, device, **kwargs):
    "Output, last state and gradients, on the CPU; the inputs laid out in memory by `layout`."
    leaves, views = {}, {}
    for name, x in inputs.items():
        if x is None: continue
        base, view = layout(x)
        leaves[name] = base.to(device).requires_grad_()
        views[name] = view(leaves[name])
    kwargs = {k: x.to(device) if k == 'order' else x for k, x in kwargs.items()}
    y, last = function(**views, **kwargs, return_last_state=True)
    grads = torch.autograd.grad(loss(y, last), list(leaves.values()), allow_unused=True)
    grads = {n: g.cpu() for n, g in zip(leaves, grads) if g is not None}
    return dict(y=y.detach().cpu(), last=last.detach().cpu(), **grads)


def compare(inputs, order, layout=contiguous, tol=2e-5, loss=stacked, **kwargs):
    exact = run(directional_scan_ref, inputs, layout, loss, 'cpu', order=order, **kwargs)
    if kwargs.get('along_order') and inputs['z'] is None: kwargs['tokens'] = int(order.max()) + 1
    single = {n: x if x is None else x.float() for n, x in inputs.items()}
    given = run(directional_scan, single, layout, loss, DEVICE, order=order, backend='triton', **kwargs)
    for name, x in exact.items():
        x, atol = x.nan_to_num(), tol * max(1., float(x.nan_to_num().abs().max()))
        assert given[name].dtype == torch.float32
        assert_close(given[name].nan_to_num().double(), x, rtol=tol, atol=atol, msg=lambda m: f'{name}: {m}')


SMALL = dict(T=5, L=6, D=5, N=2)
slow = lambda *values: pytest.param(*values, marks=pytest.mark.slow)
FORMS = [('contiguous', True, False, False, ()), slow('sliced', False, True, False, ('D',)),
         slow('sliced', True, False, True, ('z',)),
         ('transposed', True, True, True, ('D', 'z')), slow('expanded', False, True, True, ('delta_softplus', 'z')),
         slow('expanded', True, False, False, ('delta_bias', 'D'))]


@runs
@pytest.mark.parametrize('layout,along,const_B,const_C,without', FORMS)
def test_scan(small_tiles, layout, along, const_B, const_C, without):
    "Memory layouts, constant or varying B and C, with and without D, z, bias and softplus; padding steps inside."
    inputs, order = make(along=along, const_B=const_B, const_C=const_C, without=without, **SMALL)
    compare(inputs, order, LAYOUTS[layout], along_order=along, delta_softplus='delta_softplus' not in without)


@runs
@pytest.mark.parametrize('shared_u,shared_z,layout', [(True, True, 'sliced'), slow(True, False, 'expanded'),
                                                      slow(False, False, 'transposed')])
def test_shared(small_tiles, shared_u, shared_z, layout):
    inputs, order = make(K=3, shared_u=shared_u, shared_z=shared_z, **SMALL)
    compare(inputs, order, LAYOUTS[layout])


@runs
@pytest.mark.parametrize('Bt,K,T,L,D,N', [(1, 1, 1, 1, 1, 1), (1, 2, 3, 3, 1, 16), slow(1, 1, 16, 18, 3, 2),
                                          slow(1, 1, 3, 3, 33, 1)])
def test_sizes(Bt, K, T, L, D, N):
    "With the tiles of the GPU."
    compare(*make(Bt, K, T, L, D, N))


@runs
@pytest.mark.slow
@pytest.mark.parametrize('loss', [lambda y, last: y.sum(), lambda y, last: last.square().sum()])
def test_only_one_output_used(small_tiles, loss): compare(*make(**SMALL), loss=loss)


@runs
@pytest.mark.slow
def test_small_steps_and_long_memory(small_tiles):
    "Δ from 1e-9 to 100: the softplus keeps its digits, nothing overflows."
    inputs, order = make(without=('delta_bias', 'z'), **SMALL)
    inputs['delta'] = torch.linspace(-20, 100, inputs['delta'].numel(), dtype=torch.float64).view(inputs['delta'].shape)
    compare(inputs, order, tol=2e-5)
    inputs['delta'] = inputs['delta'] * 0 - 15
    inputs['D'] = None
    exact = directional_scan_ref(order=order, **inputs)
    single = {n: x.float().to(DEVICE) for n, x in inputs.items() if x is not None}
    given = directional_scan(order=order.to(DEVICE), backend='triton', **single)
    assert_close(given.double().cpu(), exact, rtol=1e-4, atol=1e-4 * float(exact.abs().max()))


def half_inputs(dtype, **sizes):
    inputs, order = make(**sizes)
    inputs = {n: x.to(torch.float32 if n in ('A', 'D', 'delta_bias') else dtype) for n, x in inputs.items()}
    return inputs, order


@runs
@pytest.mark.parametrize('dtype', (torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)))
def test_half(small_tiles, dtype):
    "The results are those of the rounded inputs, rounded once."
    inputs, order = half_inputs(dtype, shared_u=True, **SMALL)
    loss = lambda y, last: (y.to(last.dtype) * weights(y.to(last.dtype))).sum()
    given = run(directional_scan, inputs, contiguous, loss, DEVICE, order=order, backend='triton')
    exact = run(directional_scan_ref, {n: x.double() for n, x in inputs.items()}, contiguous, loss, 'cpu', order=order)
    assert given['y'].dtype == dtype and all(given[n].dtype == x.dtype for n, x in inputs.items())
    for name, x in exact.items():
        assert float((given[name].double() - x).norm() / x.norm()) < 4 * torch.finfo(dtype).eps, name


@runs
@pytest.mark.parametrize('taps,bias,layout', [
    (4, True, 'sliced'), slow(1, False, 'transposed'), slow(8, True, 'expanded'), slow(3, False, 'contiguous')])
def test_conv(small_tiles, taps, bias, layout):
    g = torch.Generator().manual_seed(0)
    randn = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    inputs = dict(x=randn(2, 7, 6), weight=randn(2, 6, taps), bias=randn(2, 6) if bias else None)
    order = make_order(2, 7, 9, g)
    def both(function):
        def call(x, weight, bias=None, return_last_state=True, **kwargs):
            y = function(x, weight, bias, **kwargs)
            return y, y.new_zeros(())
        return call
    exact = run(both(directional_conv_ref), inputs, LAYOUTS[layout], stacked, 'cpu', order=order)
    single = {n: x if x is None else x.float() for n, x in inputs.items()}
    given = run(both(directional_conv), single, LAYOUTS[layout], stacked, DEVICE, order=order, backend='triton')
    for name, x in exact.items(): assert_close(given[name].nan_to_num().double(), x.nan_to_num(), rtol=2e-5, atol=5e-5)


@runs
@pytest.mark.slow
def test_bit_equal(small_tiles):
    inputs, order = make(shared_u=True, **SMALL)
    inputs = {n: x.float() for n, x in inputs.items()}
    call = lambda: run(directional_scan, inputs, contiguous, stacked, DEVICE, order=order, backend='triton')
    first, again = call(), call()
    assert all(torch.equal(first[name], again[name]) for name in first)


@runs
@pytest.mark.parametrize('Bt,K,T,E,dtype,layout', [(2, 3, 5, 6, torch.float32, 'sliced'),
                                                   (1, 1, 1, 33, torch.float32, 'contiguous'),
                                                   (1, 2, 3, 16, torch.bfloat16, 'transposed')])
def test_gate(small_tiles, Bt, K, T, E, dtype, layout):
    "SCAttn's merge by these kernels and in plain PyTorch, gradients of the branches and of every parameter, too."
    torch.manual_seed(0)
    gate = SCAttn(E, reduction=2).double()
    for p in gate.parameters(): nn.init.normal_(p, std=.5)
    base, at = LAYOUTS[layout](torch.randn(Bt, K, T, E, dtype=torch.float64) + 1)
    base = base.to(dtype)

    def run(module, device, backend, dtype):
        module, leaf = copy.deepcopy(module).to(device, dtype), base.to(device, dtype, copy=True).requires_grad_()
        parameters = [p for part in (module.norm, module.global_reduce,
                                     module.channel_select) for p in part.parameters()]
        args = at(leaf), *parameters
        if backend: y = torch.ops.localmamba.gated_sum(*args, backend)[0]
        else: y = module(args[0].flatten(0, 1)).view_as(args[0]).sum(1)
        return y, torch.autograd.grad((y * weights(y)).sum(), (leaf, *parameters))

    (y, grads), (exact, wanted) = run(gate, DEVICE, 'triton', dtype), run(gate, 'cpu', None, torch.float64)
    tol = 2e-5 if dtype == torch.float32 else 5e-2
    for a, b in zip((y, *grads), (exact, *wanted)):
        assert a.dtype == dtype
        assert_close(a.double().cpu(), b, rtol=tol, atol=tol * max(1., float(b.abs().max())))


@runs
def test_large_steps_keep_the_gradient_of_A(small_tiles):
    "At Δ = 100 the rest of the old state is 5e-5 of what is written: differences of the two would lose four digits."
    column = lambda *values: torch.tensor(values).view(1, 1, -1, 1).to(DEVICE)
    one, order = column(1., 1., 1.), torch.arange(3)[None].to(DEVICE)
    args = one, column(1., 2., 100.), torch.full((1, 1, 1), -.1,
                                                 device=DEVICE), one, one, None, None, None, order, False, True
    saved = gpu.scan_forward(*args)[2]
    dA = gpu.scan_backward(column(0., 0., 1.), None, *args, saved)[2]
    A = torch.tensor(-.1, dtype=torch.float64, requires_grad=True)
    wanted, = torch.autograd.grad((102 * A).exp() + 2 * (100 * A).exp() + 100, A)
    assert_close(dA.double().cpu().flatten(), wanted.view(1), rtol=1e-6, atol=0)


@runs
def test_the_check_of_a_gpu(small_tiles):
    "`gpu_check`'s errors by these kernels, half types included."
    rows = gpu_check.correctness([Shape(5, 4, 1, 2, 3)], [torch.float32, torch.bfloat16], DEVICE)
    assert len(rows) == 2 * (9 + 4 + 8) and all(row['ok'] for row in rows), [row for row in rows if not row['ok']]


# without a GPU

@pytest.mark.skipif(gpu.reason() is None, reason='the kernels can be used here')
def test_reason():
    assert backends()['triton'] == gpu.reason() and ('GPU' in gpu.reason() or 'triton' in gpu.reason())
    inputs, order = make(**SMALL)
    with pytest.raises(ValueError, match="backend='triton': needs a GPU|backend='triton': triton cannot"):
        directional_scan(order=order, backend='triton', **{n: x.float() for n, x in inputs.items()})


def test_without_triton():
    code = "import sys, torch; sys.modules['triton'] = None\nfrom localmamba.ssm import backends; print(backends())"
    out = python('-c', code)
    assert 'triton cannot be imported' in out


@pytest.mark.skipif(gpu.reason() is None, reason='the kernels can be used here')
def test_the_check_without_a_gpu(capsys, tmp_path):
    "It refuses in words; at tiny sizes it runs, keeps its tables, and a second run reads them."
    assert gpu_check.main([]) == 2 and 'a GPU is needed' in capsys.readouterr().out
    with pytest.raises(SystemExit): gpu_check.main(['scan'])
    assert 'part: got scan; allowed: correctness' in capsys.readouterr().err
    args = ['placement', 'correctness', '--quick', '--out', str(tmp_path)]
    assert gpu_check.main(args) == 0 and 'correctness: 42 of 42 within bounds' in capsys.readouterr().out
    before = {f: f.stat().st_mtime_ns for f in tmp_path.glob('*.csv')}
    assert len(before) == 2 and gpu_check.main(args) == 0
    assert before == {f: f.stat().st_mtime_ns for f in before}
    wrong = tmp_path/'correctness.csv'
    wrong.write_text(wrong.read_text().replace('True', 'False', 1))
    capsys.readouterr()
    assert gpu_check.main(args) == 1 and 'correctness: 1 of 42 out of bounds' in capsys.readouterr().out


@pytest.mark.slow
def test_the_check_needs_few_libraries():
    code = ("import sys; sys.modules.update(dict.fromkeys(('fastai', 'nbdev', 'papermill', 'IPython')))\n"
            "from localmamba.gpu_check import PARTS; print(*PARTS)")
    assert 'correctness' in python('-c', code)


TRIAL = ['-p', 'device', 'cpu', '-p', 'tiny', 'True', '-p', 'folder', 'trial', '-y',
         'parts: [paper, correctness, placement, golden, speed, models, steps]', '-y',
         'rows: [imagenet/local_vim_tiny, ade20k/local_vmamba_tiny, coco/local_vim_tiny]']


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
@pytest.mark.parametrize('options', [[], TRIAL])
def test_make_gpu(tmp_path, options):
    "The experiment ends by itself where there is no GPU, and its parts run on the CPU."
    for name in ('tests', 'nbs', 'results'): (tmp_path/name).symlink_to(ROOT/name)
    (tmp_path/'results').unlink()
    shutil.copytree(ROOT/'results/gpu', tmp_path/'results/gpu')
    (tmp_path/'settings.ini').touch()
    python('-m', 'papermill', ROOT/'nbs/gpu.ipynb', tmp_path/'out.ipynb', '--cwd', tmp_path, *options, timeout=3000)
    said = (tmp_path/'out.ipynb').read_text()
    if not options: assert 'Nothing was measured: there is no GPU here.' in said
    else:
        page = (tmp_path/'results/gpu/trial/README.md').read_text()
        assert '42 of 42 within bounds' in page and '3 of 3 fit' in page, page


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_the_trainings_of_make_gpu_on_the_cpu(tmp_path):
    "The parts that start other notebooks: the cuda tests (none here), a training killed and resumed, a checkpoint."
    for path in ROOT.iterdir():
        if path.name != 'results': (tmp_path/path.name).symlink_to(path)
    (tmp_path/'results').mkdir()
    for path in (ROOT/'results').iterdir():
        if path.name not in ('gpu', 'imagenet'): (tmp_path/'results'/path.name).symlink_to(path)
    for part in ('train', 'val'):
        for label in ('cats', 'dogs'):
            (tmp_path/'photos'/part/label).mkdir(parents=True)
            for i in range(2):
                Image.effect_noise((64, 48), 80).convert('RGB').save(tmp_path/f'photos/{part}/{label}/{i}.jpg')
    model = timm.create_model('local_vim_tiny', num_classes=2)
    torch.save({'model': to_released(model)}, tmp_path/'released.pth')
    small = dict(dataset='digits', n_train=256, n_valid=64, model='test_local_vmamba', model_options={}, threads=1,
                 epochs=12, recipe_options=dict(batch_size=16, warmup_epochs=0.))
    options = dict(device='cpu', tiny=True, folder='trial', parts=['tests', 'training', 'checkpoint'],
                   training_args=['-y', json.dumps(small)], kill_after=45., checkpoint=str(tmp_path/'released.pth'),
                   data_dir=str(tmp_path/'photos'))
    python('-m', 'papermill', ROOT/'nbs/gpu.ipynb', tmp_path/'out.ipynb', '--cwd', tmp_path, '-y', json.dumps(options),
           timeout=3000)
    tables = {part: read_csv(tmp_path/f'results/gpu/trial/{part}.csv') for part in options['parts']}
    said = {part: table.to_dict('records') for part, table in tables.items()}
    assert said['tests'][0]['exit'] in (0, 5), said  # 5: none was chosen
    assert [(row['amp'], row['exit']) for row in said['training']] == [('bf16', 0), ('fp16', 0)], said
    histories = [read_csv(path) for path in tmp_path.glob('results/imagenet/digits/runs/*/history.csv')]
    assert [len(history) for history in histories] == [12, 12]
    assert said['checkpoint'][0]['exit'] == 0, said


@pytest.mark.slow
@pytest.mark.skipif(gpu.MISSING is not None, reason=str(gpu.MISSING))
@pytest.mark.parametrize('capability', (80, 90))
def test_compiles(tmp_path, capability):
    "The kernels of a layer, without a GPU: no atomic anywhere, few spills in one kernel and none in the others."
    if not getattr(gpu_scan.triton.knobs.nvidia.ptxas, 'path', None): pytest.skip('no ptxas in this Triton')
    printed = python('-m', 'localmamba.kernels.paper', str(capability), timeout=3000, TRITON_CACHE_DIR=str(tmp_path))
    out = json.loads(printed)
    kernels = {row['kernel']: row for row in out['kernels']}
    assert len(kernels) == 8 and all(row['atomics'] == 0 for row in kernels.values())
    assert all(row['spilled'] == 0 for name, row in kernels.items() if name != 'scan_backward')
    assert kernels['scan_backward']['spilled'] <= 160
    assert len(out['rows']) == 10 and all(row['predicted_us'] >= .9 * row['floor_us'] for row in out['rows'])


# on a GPU

@cuda
@pytest.mark.parametrize('dtype', list(MAMBA_TOLERANCE))
@pytest.mark.parametrize('L,D,N,along,const', [(196, 384, 16, True, False), (1024, 32, 8, False, False),
                                               (128, 4, 8, False, True)])
def test_cuda(dtype, L, D, N, along, const):
    "Within the tolerances of mamba_ssm's own test."
    inputs, order = half_inputs(dtype, Bt=2, K=4, T=L, L=L, D=D, N=N, along=along, const_B=const)
    inputs['delta'] = (.5 * torch.rand(inputs['delta'].shape)).to(dtype)
    inputs['A'] = inputs['A'].clamp(-1, -.01)
    loss = lambda y, last: (y.to(last.dtype) * weights(y.to(last.dtype))).sum()
    options = dict(order=order, along_order=along)
    single = {n: x.float() for n, x in inputs.items()}
    exact = run(directional_scan_ref, single, contiguous, loss, 'cuda', **options)
    given = run(directional_scan, inputs, contiguous, loss, 'cuda', **options, backend='triton')
    rtol, atol = MAMBA_TOLERANCE[dtype]
    for name, x in exact.items():
        scale = max(1., float(x.abs().max()))
        assert_close(given[name].float(), x, rtol=5 * rtol, atol=5 * atol * scale, msg=lambda m: f'{name}: {m}')


@cuda
def test_cuda_bit_equal():
    inputs, order = half_inputs(torch.bfloat16, Bt=8, K=4, T=196, L=196, D=384, N=16, shared_u=True)
    loss = lambda y, last: (y.float() * weights(y.float())).sum()
    call = lambda: run(directional_scan, inputs, contiguous, loss, 'cuda', order=order, backend='triton')
    first = call()
    for _ in range(4): assert all(torch.equal(first[name], x) for name, x in call().items())
