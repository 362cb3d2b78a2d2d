"What the data notebooks cannot show: a killed writer, damaged caches, archives, downloads, read-only folders, fastai."
import hashlib, os, signal, subprocess, sys, tarfile, warnings
from urllib.error import URLError
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from localmamba import data, digits, images, memory
from localmamba.data import (CIFAR10, ImageSet, cifar10, digit_scenes, image_folder, load_data, loaders, parse_augment,
                             subset, take)


@pytest.fixture(scope='module')
def scenes(): return digit_scenes(n_train=400, n_valid=100)

def tree(root, classes=('a', 'b'), splits=('train', 'test'), n=3, suffix='.png', size=32):
    "A folder of random images"
    rng = np.random.default_rng(0)
    for split in splits:
        for c in classes:
            (root / split / c).mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / c / f'{i}{suffix}')
    return root

def same(a, b):
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x.images, y.images)
        np.testing.assert_array_equal(x.labels, y.labels)
        assert x.classes == y.classes


# --- scenes

@pytest.mark.parametrize('seed', [0, 1, 7])
def test_nothing_is_shared(seed):
    train, valid = digit_scenes(n_train=300, n_valid=200, seed=seed)
    assert not set(train.sources['digit']) & set(valid.sources['digit'])
    for photo in (0, 1):
        seen = []
        for part in (train, valid):
            covered = np.zeros((427, 640), bool)
            for top, left, side in part.sources['crop'][part.sources['photo'] == photo]:
                assert 0 <= top and top + side <= 427 and 0 <= left and left + side <= 640
                covered[top:top + side, left:left + side] = True
            seen.append(covered)
        assert seen[0].any() and seen[1].any() and not (seen[0] & seen[1]).any()

@pytest.mark.slow
def test_same_seed_same_bytes_in_another_process(scenes):
    code = ('import hashlib; from localmamba.data import digit_scenes; '
            'sets = digit_scenes(n_train=400, n_valid=100); '
            'print(hashlib.sha256(b"".join(s.images.tobytes() for s in sets)).hexdigest())')
    command = [sys.executable, '-W', 'ignore', '-c', code]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert out.strip() == hashlib.sha256(b''.join(s.images.tobytes() for s in scenes)).hexdigest()

@pytest.mark.parametrize('size', [12, 28, 64, 224])
def test_any_size(size):
    train, valid = digit_scenes(size, n_train=20, n_valid=10)
    assert train.images.shape == (20, size, size, 3) and valid.images.shape == (10, size, size, 3)
    for top, left, height, width in train.sources['place']:
        assert 0 <= top <= size - height and 0 <= left <= size - width

def test_strokes_stand_out_from_what_was_there(scenes):
    bundled = digits.load_digits()
    for part in scenes:
        for i in range(50):
            top, left, height, width = part.sources['place'][i]
            strokes = Image.fromarray((bundled.images[part.sources['digit'][i]] / 16).astype(np.float32))
            opacity = np.clip(np.asarray(strokes.resize((width, height), Image.Resampling.BICUBIC)), 0, 1)
            photo = Image.fromarray(digits.load_sample_images().images[part.sources['photo'][i]])
            y, x, side = part.sources['crop'][i]
            plain = photo.resize((32, 32), Image.Resampling.BICUBIC, box=(x, y, x + side, y + side))
            box = slice(top, top + height), slice(left, left + width)
            before, after = np.asarray(plain)[box] / 255 @ data.LUMA, part.images[i][box] / 255 @ data.LUMA
            full = opacity > 0.99
            if full.any(): assert abs(after[full].mean() - (before * opacity).sum() / opacity.sum()) > 0.35


# --- folders

def test_second_start_reads_the_cache(tmp_path, monkeypatch):
    first = image_folder(tree(tmp_path / 'set'))
    monkeypatch.setattr(images, '_decode', None)
    same(first, image_folder(tmp_path / 'set'))

def test_changed_folder_is_decoded_again(tmp_path):
    root = tree(tmp_path / 'set')
    train, _ = image_folder(root)
    Image.new('RGB', (32, 32), 'red').save(root / 'train/a/1.png')
    again, _ = image_folder(root)
    assert (again.images[1] == [255, 0, 0]).all() and (again.images[0] == train.images[0]).all()
    assert len(list(root.glob('.decoded-*'))) == 1

def test_damaged_cache_is_replaced(tmp_path):
    root = tree(tmp_path / 'set')
    first = image_folder(root)
    file, = root.glob('.decoded-*')
    file.write_bytes(file.read_bytes()[:-500])
    with pytest.warns(UserWarning, match='damaged'): same(first, image_folder(root))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        same(first, image_folder(root))

def test_killed_while_writing_leaves_no_half_cache(tmp_path):
    root = tree(tmp_path / 'set')
    def savez(f, **arrays): f.write(b'half'), f.flush(), os.kill(os.getpid(), signal.SIGKILL)
    child = os.fork()
    if not child:
        images.np.savez = savez
        try: image_folder(root)
        finally: os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL and not list(root.glob('.decoded-*'))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert len(image_folder(root)[0]) == 6

def test_disk_that_refuses_is_only_a_warning(tmp_path, monkeypatch):
    root = tree(tmp_path / 'set')
    def full(*args, **kwargs): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(images.np, 'savez', full)
    with pytest.warns(UserWarning, match='No space left'): train, _ = image_folder(root)
    assert len(train) == 6 and sorted(p.name for p in root.iterdir()) == ['test', 'train']

@pytest.mark.parametrize('suffix', ['.tar', '.tar.gz', '.tgz', '.tar.xz'])
def test_archive_and_folder_agree(tmp_path, suffix):
    root = tree(tmp_path / 'set', splits=('train', 'val'), suffix='.JPG')
    packed = tmp_path / f'set{suffix}'
    with tarfile.open(packed, {'.tar': 'w', '.tar.xz': 'w:xz'}.get(suffix, 'w:gz')) as tar: tar.add(root, 'deep/er')
    same(image_folder(root, cache=False), image_folder(packed))
    same(image_folder(root, cache=False), image_folder(packed))

def test_truncated_archive(tmp_path):
    packed = tmp_path / 'set.tar.xz'
    with tarfile.open(packed, 'w:xz') as tar: tar.add(tree(tmp_path / 'set'), '.')
    packed.write_bytes(packed.read_bytes()[:2000])
    with pytest.raises(ValueError, match='set.tar.xz, which cannot be read'): image_folder(packed)

def packed(path, *trees):
    with tarfile.open(path, 'w') as tar:
        for name, folder in trees: tar.add(folder, name)
    return path

def test_an_archive_is_read_as_its_folder_is(tmp_path, capsys):
    root = tree(tmp_path/'set')
    (root/'train/b/3.png').hardlink_to(root/'train/a/0.png')
    (root/'train/b/4.png').symlink_to('1.png')
    (root/'train/a/deep').mkdir(), (root/'train/a/0.png').rename(root/'train/a/deep/0.png')
    same(image_folder(root, cache=False), image_folder(packed(tmp_path/'set.tar', ('./', root)), cache=False))
    assert 'set.tar: 1 files left out: 1 in folders of classes' in capsys.readouterr().out
    with tarfile.open(tmp_path/'set.tar', 'a') as tar:
        tar.add(root/'test/a/1.png', './train/a/1.png')  # a later member replaces an earlier one
        for name, target in (('x', 'y'), ('y', 'x'), ('z', 'nowhere')):
            link = tarfile.TarInfo(f'./train/a/{name}.png')
            link.type, link.linkname = tarfile.SYMTYPE, f'{target}.png'
            tar.addfile(link)
    train, valid = image_folder(tmp_path/'set.tar', cache=False)
    assert len(train) == 7 and (train.images[0] == valid.images[1]).all()
    assert '3 broken links' in capsys.readouterr().out

def test_two_sets_in_one_archive_are_not_merged(tmp_path):
    root = tree(tmp_path/'set')
    with pytest.raises(ValueError, match='with a t[a-z]*/ in old and in x/new; allowed: one set'):
        image_folder(packed(tmp_path/'two.tar', ('old', root), ('x/new', root)))
    parts = packed(tmp_path/'parts.tar', ('one/train', root/'train'), ('two/test', root/'test'))
    same(image_folder(root, cache=False), image_folder(parts, cache=False))

def test_one_class_can_be_told_from_nothing(tmp_path):
    from localmamba.photos import photo_folder
    root = tree(tmp_path/'set', ('images',))
    for call in (lambda: image_folder(root), lambda: photo_folder(root, 'train'), lambda: photo_folder(root, 'valid')):
        with pytest.raises(ValueError, match='with one class \(images\), .*; allowed: the expected layout'): call()

def test_grey_palette_and_alpha_images(tmp_path):
    root = tree(tmp_path / 'set')
    for i, mode in enumerate(('L', 'P', 'RGBA')): Image.new(mode, (50, 40)).save(root / f'train/a/{i}.png')
    assert image_folder(root)[0].images.shape == (6, 32, 32, 3)

def test_corrupt_images(tmp_path):
    root = tree(tmp_path / 'set', suffix='.jpg')
    bad = root / 'train/b/1.jpg'
    bad.write_bytes(bad.read_bytes()[:200])
    with pytest.raises(ValueError, match='train/b/1.jpg'): image_folder(root)
    train, _ = image_folder(root, skip_corrupt=True)
    assert len(train) == 5 and train.labels.tolist() == [0, 0, 0, 1, 1] and str(bad) in train.skipped[0]
    with pytest.raises(ValueError, match='train/b/1.jpg'): image_folder(root)

@pytest.mark.parametrize('remove, words', [('train', 'no images under train'), ('test', 'no images under valid'),
                                           ('test/b', 'only one of train and test has: b')])
def test_wrong_layout_shows_the_expected_one(tmp_path, remove, words):
    root = tree(tmp_path / 'set')
    (root / remove).rename(tmp_path / 'gone')
    with pytest.raises(ValueError, match=words) as e: image_folder(root)
    assert 'train/<class>/<name>.png' in str(e.value) and str(root) in str(e.value)


# --- CIFAR-10

def test_cifar10_is_found_under_data(tmp_path, monkeypatch):
    (tmp_path / 'settings.ini').touch(), (tmp_path / 'nbs').mkdir()
    monkeypatch.chdir(tmp_path / 'nbs')
    root = tree(tmp_path / 'data/cifar10', CIFAR10, n=4)
    train, valid = cifar10(n_train=20, seed=1)
    assert np.bincount(train.labels).tolist() == [2] * 10 and len(valid) == 40
    with tarfile.open(tmp_path / 'data/cifar10_jpeg.tar.xz', 'w:xz') as tar: tar.add(root, 'x')
    whole = cifar10()
    root.rename(tmp_path / 'elsewhere')
    same(whole, cifar10())
    same(whole, cifar10(tmp_path / 'elsewhere'))

def test_cifar10_found_under_data_has_an_identity(tmp_path, monkeypatch):
    from localmamba.classify import run_of, settings
    from localmamba.study import kept_as
    monkeypatch.chdir(tmp_path)
    def held(): return kept_as('families', dict(dataset='cifar10', data_dir='', record='')), run_of(
        settings(dataset='cifar10'), tmp_path).data
    assert held() == (('cifar10', None), None)
    found = []
    for content in (b'one', b'two'):
        (tmp_path/'data').mkdir(exist_ok=True), (tmp_path/'data/cifar10.tar').write_bytes(content)
        (_, data), other = held()
        assert data == other
        found.append(data['identity'])
    assert found[0] != found[1]

def test_cifar10_without_a_network(tmp_path, monkeypatch):
    def offline(url): raise URLError('Name or service not known')
    monkeypatch.setattr(memory, 'untar_data', offline)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match='Name or service not known') as e: cifar10()
    assert 'train/<class>/' in str(e.value) and 'cifar10' in str(e.value)
    with pytest.raises(FileNotFoundError, match='download=False'): cifar10(download=False)

def test_cifar10_through_fastai(tmp_path, monkeypatch):
    root = tree(tmp_path / 'fastai/cifar10', CIFAR10, n=1)
    monkeypatch.setattr(memory, 'untar_data', lambda url: root)
    monkeypatch.chdir(tmp_path)
    assert len(cifar10()[0]) == 10

def test_other_classes_are_not_cifar10(tmp_path):
    with pytest.raises(ValueError, match='airplane'): cifar10(tree(tmp_path / 'set'))


# --- loaders

@pytest.mark.parametrize('augment', ['none', 'flip', 'crop', 'erase', 'flip_crop_erase'])
def test_resume_is_bit_equal(scenes, augment):
    def make(): return loaders(*scenes, batch_size=32, augment=augment, seed=5, device='cpu')
    whole = make()
    passes = [[b for b in whole.train] for _ in range(3)]
    first = make()
    assert len([b for b in first.train]) == 12
    state = first.state_dict()
    next(iter(first.train)), first.one_batch()
    resumed = make()
    resumed.load_state_dict(state)
    for expected in passes[1:]:
        for (x, y), (a, b) in zip(expected, resumed.train, strict=True):
            torch.testing.assert_close(x, a, rtol=0, atol=0)
            torch.testing.assert_close(y, b, rtol=0, atol=0)

def test_one_batch_is_the_next_one_and_takes_nothing(scenes):
    dls = loaders(*scenes, batch_size=32, augment='crop', device='cpu')
    x, y = dls.one_batch()
    a, b = next(iter(dls.train))
    torch.testing.assert_close(x, a, rtol=0, atol=0)
    torch.testing.assert_close(y, b, rtol=0, atol=0)

def test_global_generators_are_left_alone(scenes):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for _ in loaders(*scenes, augment='flip_crop_erase', device='cpu').train: pass
    digit_scenes(n_train=10, n_valid=10)
    assert torch.equal(before, torch.get_rng_state())

def test_erasing_and_flipping_happen_about_half_of_the_time(scenes):
    plain = torch.from_numpy(scenes[0].images).permute(0, 3, 1, 2)
    g = torch.Generator().manual_seed(0)
    flipped = data.pick(plain.contiguous(), torch.arange(400), {'flip'}, g)
    same_way = (flipped == plain).flatten(1).all(1)
    assert torch.equal(flipped[~same_way], plain[~same_way].flip(3)) and 150 < same_way.sum() < 250
    erased = data.erase(torch.ones(400, 3, 32, 32), g)
    assert 120 < (erased == 0).flatten(1).any(1).sum() < 250 and (erased == 0).flatten(1).float().mean(1).max() <= 0.26

def test_fastai_learner_trains_validates_and_predicts(scenes):
    from fastai.learner import Learner
    from fastai.metrics import accuracy
    dls = loaders(*scenes, batch_size=32, device='cpu')
    assert (dls.c, dls.vocab, dls.bs, dls.n_inp, len(dls.train_ds)) == (10, list('0123456789'), 32, 1, 400)
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)), metrics=accuracy)
    with learn.no_logging(): learn.fit(1, 1e-3)
    predictions, targets = learn.get_preds()
    assert predictions.shape == (100, 10) and torch.equal(targets, torch.from_numpy(scenes[1].labels))
    assert learn.get_preds(ds_idx=0)[0].shape == (400, 10)
    assert learn.validate()[1] == pytest.approx((predictions.argmax(1) == targets).float().mean().item())
    assert len(dls.new_empty().train.dataset) == 0

def test_subset_is_even_and_repeatable(scenes):
    part = subset(scenes[0], 73, seed=2)
    assert len(part) == 73 and set(np.bincount(part.labels)) == {7, 8}
    np.testing.assert_array_equal(part.images, subset(scenes[0], 73, seed=2).images)
    assert (part.sources['digit'] != subset(scenes[0], 73, seed=3).sources['digit']).any()
    assert len(set(map(bytes, subset(scenes[0], 400).images))) == len(set(map(bytes, scenes[0].images)))

@pytest.mark.parametrize('call, words', [
    (lambda s: loaders(*s, batch_size=0), 'batch_size: got 0'),
    (lambda s: loaders(*s, batch_size=401), 'allowed: 1 to 400'),
    (lambda s: loaders(*s, augment='flipcrop'), "augment: got 'flipcrop'"),
    (lambda s: loaders(s[0], take(s[1], [0]), augment=3), 'augment: got 3'),
    (lambda s: subset(s[0], 0), 'n: got 0'),
    (lambda s: load_data('imagenet'), 'digits, cifar10, folder'),
    (lambda s: load_data('folder'), 'path: got None'),
    (lambda s: load_data('digits', n_train=2.5), 'n_train: got 2.5; allowed: a whole number'),
    (lambda s: load_data('digits', n_valid='9'), "n_valid: got '9'"),
    (lambda s: load_data('digits', holdout=6000), 'holdout: got 6000; allowed: up to 5999'),
    (lambda s: load_data('cifar10', size=64), 'size: got 64'),
    (lambda s: digit_scenes(size=1000), 'size: got 1000'),
    (lambda s: digit_scenes(valid_fraction=0.9), 'valid_fraction: got 0.9'),
    (lambda s: image_folder('nowhere', size=0), 'size: got 0'),
    (lambda s: ImageSet(s[0].images, s[0].labels[:5], s[0].classes), 'labels: got shape'),
    (lambda s: ImageSet(s[0].images[:2], [0.7, 1.2], 'ab'), 'labels: got 0.7; allowed: whole numbers'),
    (lambda s: ImageSet(s[0].images[:2], ['a', 'b'], 'ab'), "labels: got 'a'; allowed: whole numbers"),
    (lambda s: subset(s[0], 2.5), 'n: got 2.5'),
])
def test_wrong_arguments_are_named(scenes, call, words):
    with pytest.raises(ValueError, match=words.replace('(', r'\(')): call(scenes)

@pytest.mark.parametrize('given, parts', [('none', set()), ('flip', {'flip'}), ('crop_flip', {'crop', 'flip'})])
def test_augment_names(given, parts): assert parse_augment(given) == parts
