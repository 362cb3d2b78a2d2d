"Checkpoints of others: what lies beside the weights, EMA, prefixes, damage, and what a file of another model is told."
import argparse
import datetime
import enum
import logging
import os
import re
import zipfile
from collections import OrderedDict, defaultdict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

import localmamba  # noqa: F401  registers the models
from localmamba.export import save_weights
from localmamba.models.reading import absurd_in, checksum
from localmamba.models.weights import load_released, load_weights, read_checkpoint, to_released

NAMES = ['test_local_vim', 'test_local_vmamba']


@pytest.fixture(params=NAMES)
def name(request): return request.param


class Config(dict):
    "As mmengine's and others' configurations: a dict with attributes."
    __getattr__ = dict.__getitem__


class History(list): pass


class Slots:
    __slots__ = ('rate',)
    def __init__(self): self.rate = 1e-3


class Phase(enum.Enum): train = 1


class Trap:
    "Runs a program when it is unpickled by pickle."
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return os.mkdir, (self.path,)


BESIDE = {
    'number': np.float64(76.2), 'array': np.arange(3), 'objects': np.array(['a', None], dtype=object),
    'path': Path('weights'), 'namespace': argparse.Namespace(lr=1e-3, path=Path('a')),
    'config': Config(model=Config(depth=2)), 'history': History([1., 2.]), 'slots': Slots(),
    'default': defaultdict(list, loss=[1.]), 'partial': partial(nn.LayerNorm, eps=1e-6), 'class': nn.Linear,
    'time': datetime.datetime(2024, 5, 1), 'phase': Phase.train, 'complex': 1j, 'bytes': b'abc', 'range': range(3)}


def same(model, other):
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize('what', [*BESIDE, 'everything'])
def test_what_lies_beside_the_weights_does_not_hide_them(what, tmp_path):
    model = timm.create_model('test_local_vim', depth=1)
    beside = BESIDE if what == 'everything' else {what: BESIDE[what]}
    torch.save({**beside, 'model': model.state_dict()}, tmp_path/'a.pt')
    assert same(load_weights(timm.create_model('test_local_vim', depth=1), tmp_path/'a.pt'), model)


def test_no_program_in_a_file_runs(tmp_path, caplog):
    model = timm.create_model('test_local_vim', depth=1)
    torch.save({'model': model.state_dict(), 'trap': Trap(tmp_path/'made')}, tmp_path/'a.pt')
    with pytest.raises(ValueError, match='with (posix|nt).mkdir, a program; allowed: data; nothing in it was run'):
        read_checkpoint(tmp_path/'a.pt')
    torch.save({'model': model.state_dict(), 'config': BESIDE['config']}, tmp_path/'b.pt')
    with caplog.at_level(logging.WARNING): read_checkpoint(tmp_path/'b.pt')
    assert 'left out, since they are no data: ' in caplog.text and 'Config' in caplog.text
    assert not (tmp_path/'made').exists()


EMA = {
    'model_ema': lambda s: {'model_ema': s}, 'state_dict_ema': lambda s: {'state_dict_ema': s},
    'ema_model': lambda s: {'ema_model': s}, 'ema': lambda s: {'ema': s},
    'nested': lambda s: {'model_ema': {'state_dict': s, 'decay': 0.9999}},
    'dotted': lambda s: {'model_ema.state_dict': s}, 'ema_state_dict': lambda s: {'ema_state_dict': s}}


@pytest.mark.parametrize('how', EMA)
def test_ema_weights_are_found_and_said(name, how, tmp_path, caplog):
    model, plain = (timm.create_model(name) for _ in range(2))
    for names in ('model', 'state_dict'):
        torch.save({names: plain.state_dict(), **EMA[how](model.state_dict()), 'epoch': 3}, tmp_path/'a.pt')
        with caplog.at_level(logging.WARNING):
            assert same(load_weights(timm.create_model(name), tmp_path/'a.pt'), model)
        assert 'are taken, not those under' in caplog.text
        assert same(load_weights(timm.create_model(name), tmp_path/'a.pt', ema=False), plain)


PREFIXES = ('module.', '_orig_mod.', 'module._orig_mod.', '_orig_mod.module.', 'backbone.', 'model.', 'encoder.',
            'module.module.', 'teacher.backbone.', 'something.')


@pytest.mark.parametrize('prefix', PREFIXES)
def test_prefixes(name, prefix, tmp_path):
    model = timm.create_model(name)
    for state in (model.state_dict(), to_released(model)):
        state = OrderedDict((prefix + k, v) for k, v in state.items())
        torch.save({'state_dict': state}, tmp_path/'a.pt')
        assert same(load_weights(timm.create_model(name), tmp_path/'a.pt'), model)
        state['neck.weight'] = torch.zeros(2)
        with pytest.raises(ValueError, match=r'unexpected \(1\): neck.weight'):
            load_weights(timm.create_model(name), state)


def test_what_wrappers_and_profilers_add(name, tmp_path):
    model = timm.create_model(name)
    state = model.state_dict()
    for where, module in list(model.named_modules()):
        state[f'{where}.total_ops'.lstrip('.')] = state[f'{where}.total_params'.lstrip('.')] = torch.zeros(1)
    assert same(load_weights(timm.create_model(name), {'model': state}), model)
    assert same(load_weights(timm.create_model(name), {'model_ema': AveragedModel(model).state_dict()}), model)
    detector = {f'backbone.{k}': v for k, v in model.state_dict().items()} | {'neck.weight': torch.zeros(2)}
    with pytest.raises(ValueError, match=r'unexpected \(1\): neck.weight'):
        load_weights(timm.create_model(name), detector)


def test_damaged_files_are_named(tmp_path):
    path = tmp_path/'a.pt'
    torch.save({'model': timm.create_model('test_local_vim', depth=1).state_dict()}, path)
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    read_checkpoint(path)
    for end in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError, match=r'a\.pt, which is damaged'): read_checkpoint(path)
    with zipfile.ZipFile(tmp_path/'a.zip', 'w') as archive: archive.writestr('a', '')
    with zipfile.ZipFile(tmp_path/'a.zip') as archive: assert archive.testzip() is None
    storages = [(e.header_offset + 200, e.file_size) for e in _entries(path, whole) if e.file_size > 1000]
    for _ in range(20):
        changed = bytearray(whole)
        for _ in range(3):
            start, size = storages[rng.integers(len(storages))]
            changed[start + int(rng.integers(size - 200))] ^= 1 << int(rng.integers(8))
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=r'a\.pt, which is damaged'): read_checkpoint(path)
    path.write_bytes(b'%PDF-1.4 no checkpoint')
    with pytest.raises(ValueError, match=r'a\.pt, which is damaged or no checkpoint'): read_checkpoint(path)
    (tmp_path/'a.safetensors').write_bytes(whole)
    with pytest.raises(ValueError, match=r'a\.safetensors, which is damaged'): read_checkpoint(tmp_path/'a.safetensors')


def _entries(path, content):
    path.write_bytes(content)
    with zipfile.ZipFile(path) as archive: return archive.infolist()


def test_a_file_that_unpacks_to_more_than_itself(tmp_path):
    torch.save({'model': {'a': torch.zeros(2_000_000)}}, tmp_path/'a.pt')
    packed = zipfile.ZipFile(tmp_path/'b.pt', 'w', zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(tmp_path/'a.pt') as source, packed as target:
        for entry in source.infolist(): target.writestr(entry.filename, source.read(entry))
    assert (tmp_path/'b.pt').stat().st_size < 100_000
    with pytest.raises(ValueError, match=r'b\.pt: got .* bytes that unpack to 8,'): read_checkpoint(tmp_path/'b.pt')


def test_the_first_line_is_the_true_cause(name):
    model = timm.create_model(name)
    other = dict(embed_dim=32, rope_pretrained_grid=14) if name == 'test_local_vim' else dict(dims=(8, 16))
    for load, state in ((load_released, to_released(timm.create_model(name, **other))),
                        (load_weights, timm.create_model(name, **other).state_dict())):
        with pytest.raises(ValueError) as error: load(model, state)
        assert 'of another shape' in str(error.value).splitlines()[0]
    turned = to_released(timm.create_model('test_local_vim', rope_pretrained_grid=14))
    with pytest.raises(ValueError, match='rope_pretrained_grid: got 8'):
        load_released(timm.create_model('test_local_vim'), turned)
    nothing = {'epoch': 3, **{f'key{i}': i for i in range(20)}}
    with pytest.raises(ValueError, match=r'holds no weights: got epoch \(int\), .*key19'): load_weights(model, nothing)
    with pytest.raises(TypeError, match='source: got a int'): load_weights(model, 3)


@pytest.mark.parametrize('under', ['EMA', 'ema_weights', 'averaged_model', ('ema', 'shadow'), 'model_ema.module'])
def test_averaged_weights_under_more_names(under, caplog):
    model, other = (timm.create_model('test_local_vim', depth=1) for _ in range(2))
    state = model.state_dict()
    held = {under[0]: {under[1]: state}} if isinstance(under, tuple) else {under: state}
    loaded = load_weights(timm.create_model('test_local_vim', depth=1), {'model': other.state_dict(), **held})
    assert same(loaded, model) and 'are taken, not those under model' in caplog.text


def test_what_stands_among_the_weights_is_left_out_and_named(caplog):
    model = timm.create_model('test_local_vim', depth=1)
    state = {**model.state_dict(), 'epoch': 3, 7: 'x'}
    assert same(load_weights(timm.create_model('test_local_vim', depth=1), state), model)
    assert 'left out beside the weights: epoch (int), 7 (str)' in caplog.text
    arrays = {name: x.numpy() for name, x in model.state_dict().items()}
    with pytest.raises(ValueError, match=r'holds no weights: got pos_embed \(ndarray\), '): load_weights(model, arrays)


@pytest.mark.parametrize('kind', [torch.Tensor.int, torch.Tensor.bool, lambda x: x.to(torch.complex64),
                                  lambda x: x.to('meta'), lambda x: x.to_sparse()])
def test_weights_that_are_no_floats_are_refused(kind):
    model = timm.create_model('test_local_vim', depth=1)
    state = {name: kind(x) if name == 'head.weight' else x for name, x in model.state_dict().items()}
    with pytest.raises(ValueError, match=r'of another kind \(1\): head.weight .* instead of floats'):
        load_weights(timm.create_model('test_local_vim', depth=1), state)


@pytest.mark.parametrize('content, words', [
    (b'<!doctype html><html>404', 'a page of HTML'), (b'version https://git-lfs.github.com/spec/v1', 'Git LFS'),
    (b'\x1f\x8b' + bytes(30), 'packed by gzip'), (b'{"model": 1}', 'JSON'), (b'hello', 'no pickle'),
    (bytes(500), '.*'), (b'\x80\x02', '.*')])
def test_files_that_are_no_checkpoint(tmp_path, content, words):
    (tmp_path/'a.pt').write_bytes(content)
    with pytest.raises(ValueError, match=rf'a.pt, which is damaged or no checkpoint .*{words}.*; allowed: a whole'):
        read_checkpoint(tmp_path/'a.pt')


def test_files_of_the_time_before_zip_cut_anywhere(tmp_path):
    path = tmp_path/'a.pt'
    torch.save({'model': {'a': torch.ones(3)}}, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    assert read_checkpoint(path)['a'].tolist() == [1, 1, 1]
    for end in range(1, len(whole), 7):
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError, match='a.pt, which is damaged or no checkpoint'): read_checkpoint(path)


def test_dictionaries_in_themselves_and_ever_deeper():
    endless, deep = {}, {'a': torch.ones(1)}
    endless['model'] = endless
    for _ in range(2000): deep = {'model': deep}
    for content in (endless, deep):
        with pytest.raises(ValueError, match='holds no weights: got model'):
            load_weights(timm.create_model('test_local_vim', depth=1), content)


def test_safetensors_by_their_content(tmp_path):
    save_file({'a': torch.ones(3)}, tmp_path/'a.pth')
    assert read_checkpoint(tmp_path/'a.pth')['a'].tolist() == [1, 1, 1]


SAVERS = {'legacy': lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False),
          'safetensors': save_file}

@pytest.mark.parametrize('kind', SAVERS)
@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf'), 3e10, -3e38])
def test_numbers_that_no_training_leaves_are_damage_where_no_checksum_is(tmp_path, kind, value):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        state = {'a': torch.randn(9), 'b': torch.zeros(0), 'n': torch.tensor(2**62), 'w': torch.randn(3, 4).to(dtype)}
        SAVERS[kind](state, tmp_path/'a.pt')
        assert torch.equal(read_checkpoint(tmp_path/'a.pt')['w'], state['w'])
        state['w'][1, 2] = value
        SAVERS[kind](state, tmp_path/'a.pt')
        with pytest.raises(ValueError, match='which is damaged .values that only damage or a diverged .* leaves: w '):
            read_checkpoint(tmp_path/'a.pt')


def test_a_file_with_checksums_that_holds_nan_was_written_so(tmp_path, caplog):
    torch.save({'w': torch.tensor([1., float('nan')])}, tmp_path/'a.pt')
    assert read_checkpoint(tmp_path/'a.pt')['w'].isnan().tolist() == [False, True]
    assert 'as it was written, with values that only damage or a diverged' in caplog.text


def test_one_changed_bit_of_our_own_files_is_seen(tmp_path):
    model = timm.create_model('test_local_vim', depth=1)
    path, rng = save_weights(model, tmp_path/'a.safetensors'), np.random.default_rng(0)
    whole = path.read_bytes()
    assert same(load_weights(timm.create_model('test_local_vim', depth=1), path), model)
    header = 8 + int.from_bytes(whole[:8], 'little')
    for at in [*rng.integers(header, len(whole), 40), *rng.integers(0, 8, 3)]:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << rng.integers(8)]) + whole[at + 1:])
        with pytest.raises(ValueError, match='a.safetensors, which is damaged'): read_checkpoint(path)
    for old, new in ((b'"F32"', b'"I32"'), (b'"a.', b'"b.'), (b'pos_embed', b'pos_embee')):
        path.write_bytes(whole.replace(old, new, 1))
        if path.read_bytes() == whole: continue
        with pytest.raises(ValueError, match='a.safetensors, which is damaged'): read_checkpoint(path)


def test_a_damaged_folder_is_refused_on_timms_way(tmp_path):
    model = timm.create_model('test_local_vim', depth=1)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    save_weights(model, tmp_path/'model.safetensors')
    assert same(timm.create_model(f'local-dir:{tmp_path}', pretrained=True), model)
    path = tmp_path/'model.safetensors'
    whole = bytearray(path.read_bytes())
    whole[-5] ^= 1
    path.write_bytes(whole)
    with pytest.raises(ValueError, match='model.safetensors, which is damaged .its tensors are not those'):
        timm.create_model(f'local-dir:{tmp_path}', pretrained=True)


@pytest.mark.parametrize('dtype', [torch.bool, torch.int8, torch.float16, torch.bfloat16, torch.complex64,
                                   torch.float8_e4m3fn])
def test_a_checksum_of_any_kind_of_number(dtype):
    a, b = ({'x': torch.tensor([[1, 0], [n, 1]]).to(dtype).t(), 'none': torch.zeros(0).to(dtype)} for n in (0, 1))
    assert checksum(a) == checksum({name: x.clone() for name, x in a.items()}) != checksum(b)
    assert not absurd_in(a)


def first_names(state):
    "VMamba v0's first names, by those that it and the release of LocalMamba have now."
    now = (r'patch_embed\.0\.', 'patch_embed.proj.'), (r'patch_embed\.2\.', 'patch_embed.norm.'), (r'^classifier\.', '')
    now += (r'(blocks\.\d+)\.norm\.', r'\1.ln_1.'), (r'\.op\.', '.self_attention.')
    for old, new in now: state = {re.sub(old, new, name): value for name, value in state.items()}
    return state


@pytest.mark.parametrize('prefix', ['', 'module.', 'backbone.'])
@pytest.mark.parametrize('load', [load_released, load_weights, lambda model, state: model.load_state_dict(state)])
def test_the_first_names_of_vmamba(prefix, load):
    def make(): return timm.create_model('vmamba_tiny', dims=(16, 32), depths=(1, 1), num_classes=10)
    model, other = make(), make()
    state = first_names(to_released(model))
    assert 'layers.0.blocks.0.self_attention.A_logs' in state and 'norm.weight' in state
    if prefix and load not in (load_released, load_weights): return
    load(other, {prefix + name: value for name, value in state.items()})
    for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True): assert torch.equal(a, b)


@pytest.mark.parametrize('released', [False, True])
def test_another_head_is_kept_whatever_it_is(name, released):
    model = timm.create_model(name)
    state = to_released(model) if released else model.state_dict()
    for head in (nn.Identity(), nn.Sequential(nn.Dropout(), nn.Linear(model.num_features, 3))):
        other = timm.create_model(name)
        other.head = head
        kept = [p.clone() for p in head.parameters()]
        load_weights(other, state, new_head=True)
        for a, b in zip(head.parameters(), kept, strict=True): assert torch.equal(a, b)
        assert torch.equal(other.layers[0].state_dict()[next(iter(other.layers[0].state_dict()))],
                           model.layers[0].state_dict()[next(iter(model.layers[0].state_dict()))])
