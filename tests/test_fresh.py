"A fresh process keeps its memory, many image sizes keep their tables, and both can be left alone."
import json
import os
import subprocess
import sys

import pytest
import torch

from localmamba import scan
from localmamba.kernels import vector
from localmamba.models import common, localvim

PASS = """
import json, os, resource, sys, torch
from localmamba.models.localvim import LocalVim
from localmamba.kernels.workers import keep_memory
torch.set_num_threads(1)
model, images = LocalVim(depth=3).eval(), torch.randn(4, 3, 224, 224)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    with torch.no_grad(): model(images)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(json.dumps([keep_memory(), [faults() for _ in range(5)]]))
"""


def fresh(code=PASS, **env):
    "Whether memory is kept, and the fewest page faults of a pass after the second, in a process of its own."
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, timeout=600,
                          env={k: v for k, v in os.environ.items() if not k.startswith('MALLOC_')} | env)
    assert done.returncode == 0, done.stderr
    kept, faults = json.loads(done.stdout)
    return kept, min(faults[2:])


@pytest.mark.skipif(vector.reason() is not None or sys.platform != 'linux', reason='about glibc and the CPU kernels')
def test_a_fresh_process_does_not_fault_its_memory_in_again():
    kept, faults = fresh()
    if not kept: pytest.skip('there is no glibc')
    assert faults < 450   # of LocalVim-T's 20 blocks, 3,000 a pass would be allowed


LARGE = """
import json, resource, torch
from localmamba.kernels.workers import keep_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3): torch.ones(2**24)   # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(json.dumps([keep_memory(), [faults() for _ in range(5)]]))
"""


@pytest.mark.skipif(vector.reason() is not None or sys.platform != 'linux', reason='about glibc and the CPU kernels')
def test_large_tensors_are_kept_too():
    "A batch of 128 images makes tensors of more than the 32 MiB that older versions of glibc keep."
    kept, faults = fresh(LARGE)
    if not kept: pytest.skip('there is no glibc')
    assert faults < 3 * 2**14 // 8   # a page each: 3 * 2**14


@pytest.mark.slow
@pytest.mark.parametrize('name, value', [('LOCALMAMBA_KEEP_MEMORY', '0'), ('MALLOC_TRIM_THRESHOLD_', '131072')])
def test_memory_is_left_alone_where_somebody_says_so(name, value):
    assert fresh(**{name: value})[0] is False


def test_a_wrong_switch_is_refused(monkeypatch):
    from localmamba.kernels.workers import keep_memory
    monkeypatch.setenv('LOCALMAMBA_KEEP_MEMORY', 'yes')
    with pytest.raises(ValueError, match=r"LOCALMAMBA_KEEP_MEMORY: got 'yes'; allowed: 0, 1"):
        keep_memory.__wrapped__()


def test_three_hundred_sizes_keep_their_tables(monkeypatch):
    "In a second round over 300 sizes nothing is computed again, in bounded memory."
    made, rotations = [], common.rope_tables
    monkeypatch.setattr(common, 'rope_tables', lambda *args: made.append(args) or rotations(*args))
    table = scan._table
    monkeypatch.setattr(scan, '_table', lambda *args: made.append(args) or table(*args))
    model = localvim.LocalVim(img_size=32, patch_size=2, embed_dim=8, depth=2, d_state=2,
                              directions=[('h', 'w2'), ('v', 'w7_flip')]).eval()
    sizes = [(2 * h, 2 * w) for h in range(1, 16) for w in range(31, 51)]
    counts = []
    for _ in range(2):
        made.clear()
        with torch.no_grad():
            for size in sizes: model(torch.zeros(1, 3, *size))
        counts.append(len(made))
    assert len(sizes) == 300 and counts == [900, 0]
    for kept in (scan.TABLES, common.ROTATIONS):
        assert kept.size <= kept.limit <= 2**28 and kept.size == sum(value.nbytes for value in kept.values.values())
