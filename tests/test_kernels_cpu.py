"The CPU kernels in processes, threads and odd installations: what the notebook cannot hold."
import importlib.util
import multiprocessing as mp
import os, shutil, signal, subprocess, sys, threading, time, warnings
from pathlib import Path

import pytest
import torch

from localmamba.kernels import cpu, cpu_scan, cpu_scan_back, workers

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(cpu.reason() is not None, reason=str(cpu.reason()))

def case(seed=0, Bt=4, K=2, T=64, D=144, N=16):
    g = torch.Generator().manual_seed(seed)
    def r(*shape): return torch.randn(*shape, generator=g)
    order = torch.stack([torch.randperm(T, generator=g) for _ in range(K)])
    return [r(Bt, T, D), r(Bt, K, T, D), -r(K, D, N).abs() - .1, r(Bt, K, T, N), r(Bt, K, T, N), r(K, D), r(Bt, T, D),
            r(K, D), order, True, False]

def gradients(seed=0):
    args = case(seed)
    y, last, saved = cpu.scan_forward(*args)
    return [y, last, *cpu.scan_backward(torch.ones_like(y), torch.ones_like(last), *args, saved)]

def equal(xs, ys): return all(torch.equal(x, y) for x, y in zip(xs, ys, strict=True))

def run(code, **env):
    "Run a snippet in a new process; returns its output."
    done = subprocess.run([sys.executable, '-c', code], env={**os.environ, 'PYTHONPATH': str(ROOT), **env},
                          capture_output=True, text=True, timeout=180, cwd=Path(sys.executable).parent)
    assert done.returncode == 0, done.stderr
    return done.stdout

@pytest.mark.parametrize('T, D', [(64, 32), (37, 48), (16, 21), (100, 8)])
@pytest.mark.parametrize('turned', [True, False])
def test_steps_side_by_side_give_the_bits_of_channels_side_by_side(T, D, turned):
    "`mamba_ssm`'s layout, in raster order (a square is turned over) and in another (numbers are gathered)."
    args = case(T=T, D=D, N=4)
    if turned: args[8] = torch.arange(T).repeat(len(args[8]), 1)
    other = [x.mT.contiguous().mT if i in (0, 1, 3, 4, 6) else x for i, x in enumerate(args)]
    assert other[1].stride()[-2:] == (1, T)
    (y, last, saved), (y2, last2, saved2) = cpu.scan_forward(*args), cpu.scan_forward(*other)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    back = cpu.scan_backward(dy, None, *args, saved)
    assert equal([y, last, *back], [y2, last2, *cpu.scan_backward(dy.mT.contiguous().mT, None, *other, saved2)])

def bf16_results(D):
    "All that the three kernels return for bfloat16 inputs of D channels."
    g = torch.Generator().manual_seed(0)
    def r(*shape): return torch.randn(*shape, generator=g).bfloat16()
    Bt, K, T, N = 3, 2, 37, 4
    order = torch.stack([torch.randperm(T, generator=g) for _ in range(K)])
    args = [r(Bt, K, T, D), r(Bt, K, T, D), -r(K, D, N).float().abs() - .1, r(Bt, K, T, N), r(Bt, K, T, N),
            r(K, D).float(), r(Bt, T, D), r(K, D).float(), order, True, False]
    y, last, saved = cpu.scan_forward(*args)
    found = [y, last, *cpu.scan_backward(.3 * torch.ones_like(y), torch.ones_like(last), *args, saved)]
    x, weight, bias, branches, factors = r(Bt, T, D), r(K, D, 4), r(K, D), r(Bt, K, T, D), r(Bt, K, D).float()
    y = cpu.conv_forward(x, weight, bias, order)
    found += [y, *cpu.conv_backward(.3 * torch.ones_like(y), x, weight, bias, order)]
    pooled, moments = cpu.gate_pool(branches)
    y = cpu.gate_sum(branches, factors)
    return found + [pooled, moments, y, cpu.gate_factor_backward(.1 * y, branches),
                    cpu.gate_branch_backward(.1 * y, torch.ones_like(pooled), branches, factors, moments)]

@pytest.mark.parametrize('D', [16, 48, 21])   # whole vectors are read as they are, 21 channels are widened first
def test_bf16_read_by_the_kernels_gives_the_bits_of_widening_first(D, monkeypatch):
    short = bf16_results(D)
    assert short[0].dtype == torch.bfloat16 and short[0].isfinite().all()
    for module in (workers, cpu_scan, cpu_scan_back):
        monkeypatch.setattr(module, 'kernel_form', lambda x: None if x is None else x.float())
    wide = bf16_results(D)
    assert [x.dtype for x in short] == [x.dtype for x in wide] and equal(short, wide)

def test_same_bits_for_any_number_of_threads():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1); one = gradients()
        torch.set_num_threads(2); two = gradients()
    finally: torch.set_num_threads(before)
    assert equal(one, two)

def _child(queue, args):
    # PyTorch's own OpenMP loops hang in a forked child; the kernels, with their helpers, must not.
    out = [cpu.scan_forward(*args)[0].numpy()]
    torch.set_num_threads(1)
    queue.put(out + [x.numpy() for x in gradients()])

def test_fork_after_use():
    args = case()
    want = [cpu.scan_forward(*args)[0]] + gradients()
    context = mp.get_context('fork')
    queue = context.Queue()
    child = context.Process(target=_child, args=(queue, args), daemon=True)
    child.start()
    got = [torch.from_numpy(x) for x in queue.get(timeout=60)]
    child.join(20)
    assert child.exitcode == 0 and equal(want, got)

def test_python_threads():
    want, got = [gradients(i) for i in range(4)], [None] * 4
    def work(i):
        for _ in range(5): got[i] = gradients(i)
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads: t.start()
    for t in threads: t.join(120)
    assert all(equal(a, b) for a, b in zip(want, got))

class Scans(torch.utils.data.Dataset):
    def __len__(self): return 4
    def __getitem__(self, i): return cpu.scan_forward(*case(i))[0]

def test_dataloader_worker():
    want = [cpu.scan_forward(*case(i))[0] for i in range(4)]
    loader = torch.utils.data.DataLoader(Scans(), batch_size=None, num_workers=1, multiprocessing_context='fork',
                                         timeout=60)
    assert equal(want, list(loader))

TIMED = '''
import sys, time; sys.path.insert(0, {tests!r})
import test_kernels_cpu as t
from localmamba.kernels.workers import KERNELS
start = time.perf_counter(); out = t.gradients(); print(time.perf_counter() - start)
print(t.cpu.__file__); print(sum(not kernel.cache_hits for kernel, _ in KERNELS.values()))
'''

@pytest.mark.slow
def test_read_only_install_compiles_once(tmp_path):
    "Kernels go to the user's folder when the package cannot be written; a second process loads them from there."
    site, home = tmp_path / 'site', tmp_path / 'home'
    shutil.copytree(ROOT / 'localmamba', site / 'localmamba', ignore=shutil.ignore_patterns('__pycache__'))
    (site / 'localmamba' / 'kernels' / '__pycache__').touch()   # a file: no folder can be made here, not even by root
    env = dict(PYTHONPATH=str(site), HOME=str(home), XDG_CACHE_HOME=str(home / 'cache'), PYTHONDONTWRITEBYTECODE='1')
    code = TIMED.format(tests=str(ROOT / 'tests'))
    (_, where, misses), second = (run(code, **env).splitlines()[-3:] for _ in range(2))
    assert where.startswith(str(site)) and int(misses) > 0 and list(home.rglob('*.nbc'))
    assert int(second[2]) == 0 and float(second[0]) < 5

PEAK = """
import sys, torch; sys.path.insert(0, {tests!r})
import test_kernels_cpu as t
def status(field):
    return next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith(field)) * 1024
t.gradients()
torch.manual_seed(0)
B, D, L, N = 32, 384, 196, 16
u, delta, z, dy, y, du, ddelta, dz = (torch.randn(B, 1, L, D) for _ in range(8))   # the last four: freed just before
args = [u, delta, -torch.rand(1, D, N), torch.randn(B, 1, L, N), torch.randn(B, 1, L, N), None, z, None,
        torch.arange(L)[None], True, True]
size = u.numel() * 4
del y, du, ddelta, dz
before = status('VmRSS')
open('/proc/self/clear_refs', 'w').write('5')
y, last, saved = t.cpu.scan_forward(*args)
grads = t.cpu.scan_backward(dy, None, *args, saved)
print((status('VmHWM') - before - 4 * size) / (4 * B * D * L * N))
"""

@pytest.mark.skipif(not Path('/proc/self/clear_refs').exists(), reason='reads the peak of memory from /proc')
def test_peak_memory():
    "Beyond inputs and outputs: less than a fifth of one (batch, channels, length, state) tensor."
    share = float(run(PEAK.format(tests=str(ROOT / 'tests')), MALLOC_MMAP_THRESHOLD_='65536').splitlines()[-1])
    assert share < .2, share

def test_leaves_denormals_as_they_were():
    gradients()
    assert (torch.tensor([1e-39]) * 1.0).item() > 0

def test_nan_is_not_swallowed():
    for i in range(8):
        args = case()
        args[i] = args[i].clone(); args[i].view(-1)[5] = float('nan')
        assert cpu.scan_forward(*args)[0].isnan().any(), i

@pytest.mark.slow
def test_no_folder_to_write():
    code = '''
import warnings, torch, numba.core.caching as caching
caching.CacheImpl._locator_classes = []
from localmamba.kernels import cpu_conv, workers
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter('always')
    workers.compiled(cpu_conv._conv_forward)
print([str(w.message) for w in seen])
'''
    assert 'NUMBA_CACHE_DIR' in run(code)

def test_a_damaged_kept_kernel_is_named_and_compiled_again(tmp_path):
    "Cut off, empty, of other bytes, or a folder in its place: numba's own files beside a kernel's source."
    (tmp_path/'tiny.py').write_text('def tiny(p): pass\n')
    def fresh():
        spec = importlib.util.spec_from_file_location('tiny', tmp_path/'tiny.py')
        module = importlib.util.module_from_spec(spec)
        sys.modules['tiny'] = module
        spec.loader.exec_module(module)
        return workers._c_function(module.tiny)
    try:
        fresh()
        for damage in (b'', b'half', bytes(range(256)) * 9):
            kept = sorted(tmp_path.rglob('*.nb?'))
            assert len(kept) == 2
            for file in kept: file.write_bytes(damage)
            with pytest.warns(UserWarning, match='the kept kernel .*tiny.*cannot be used .*compiled anew'):
                kernel = fresh()
            workers.ctypes.CFUNCTYPE(None, workers.ctypes.c_void_p)(kernel.address)(0)
            with warnings.catch_warnings():
                warnings.simplefilter('error')
                fresh(), fresh()  # written again, read again
    finally: sys.modules.pop('tiny', None)

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='no fork')
def test_a_fork_while_another_thread_compiles():
    from numba.core.compiler_lock import global_compiler_lock as lock
    held = threading.Event()
    def compile_slowly():
        with lock: held.set(), time.sleep(.3)
    thread = threading.Thread(target=compile_slowly)
    thread.start(), held.wait()
    child = os.fork()
    if not child:
        with lock: os._exit(7)
    done, until = (0, 0), time.monotonic() + 20
    while not done[0] and time.monotonic() < until: done = os.waitpid(child, os.WNOHANG); time.sleep(.01)
    if not done[0]: os.kill(child, signal.SIGKILL), os.waitpid(child, 0)
    thread.join()
    assert done[0] and os.waitstatus_to_exitcode(done[1]) == 7

def test_helpers_have_stopped_before_an_interruption_goes_on(monkeypatch):
    at_work, ended = threading.Event(), []
    def call(table):
        if threading.current_thread() is threading.main_thread():
            at_work.wait()
            raise KeyboardInterrupt
        at_work.set(), time.sleep(.1), ended.append(table)
    monkeypatch.setattr(workers, '_team', lambda: None)
    with pytest.raises(KeyboardInterrupt): workers._run(None, call, 0, 2, ())
    assert ended == [0]

@pytest.mark.skipif(not hasattr(signal, 'setitimer'), reason='no timers')
def test_interrupted_scans_leave_nothing_behind(monkeypatch):
    "Ctrl-C again and again while Python's helper threads run: memory stays whole, the next result is right."
    monkeypatch.setattr(workers, '_team', lambda: None)
    before, want, stopped = torch.get_num_threads(), gradients(), 0
    torch.set_num_threads(2)
    try:
        for i in range(30):
            signal.signal(signal.SIGALRM, signal.default_int_handler)
            try:
                signal.setitimer(signal.ITIMER_REAL, .0005 + .0002 * i)
                for _ in range(3): gradients()
            except KeyboardInterrupt: stopped += 1
            finally: signal.setitimer(signal.ITIMER_REAL, 0)
        assert stopped > 5 and equal(gradients(), want)
    finally:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        torch.set_num_threads(before)

def test_without_numba():
    out = run("import sys; sys.modules['numba'] = None\nfrom localmamba.kernels import cpu; print(cpu.reason())")
    assert 'numba cannot be imported' in out and 'pip install numba' in out
