"What files hold is what their owner sees: orientation, depth, left-out files, own label maps, broken COCO files."
import copy
import gzip
import json
import os
import struct
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from localmamba.ade20k import LabelledFolder, ade20k, coco_semantic, label_image, read_labels
from localmamba.classify import evaluate
from localmamba.coco import CocoFolder, average_precision, coco_instances, read_annotations, truth_as_results
from localmamba.files import identity
from localmamba.images import TURNS, CorruptImage, ImageSet, UnfitImage, image_folder, image_size, open_image
from localmamba.photos import (PhotoTransform, eval_transform, photo_folder, photo_loaders, shortened,
                               train_transform)
from localmamba.stream import InOrder, StreamLoader

ROOT = Path(__file__).parent.parent
RNG = np.random.default_rng(0)
BLOCKS = RNG.integers(0, 256, (5, 2, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)  # 40 high, 16 wide
LABELS = RNG.integers(1, 4, (5, 2), dtype=np.uint8).repeat(8, 0).repeat(8, 1)


def stored(pixels, way):
    "Pixels as a camera held that way stores them."
    image = Image.fromarray(pixels)
    return image if way == 1 else image.transpose(TURNS[{6: 8, 8: 6}.get(way, way)])

def save(pixels, path, way=1, exif=True, **options):
    tags = Image.Exif()
    if exif: tags[0x0112] = way
    path.parent.mkdir(parents=True, exist_ok=True)
    stored(pixels, way).save(path, exif=tags, **options)
    return path


# --- pictures

@pytest.mark.parametrize('suffix, options', [('.jpg', {'quality': 100, 'subsampling': 0}), ('.png', {}), ('.tif', {}),
                                             ('.tiff', {'compression': 'tiff_lzw'}), ('.webp', {'lossless': True})])
@pytest.mark.parametrize('way', range(1, 9))
def test_upright_whatever_the_orientation(tmp_path, suffix, options, way):
    path = save(BLOCKS, tmp_path/f'a{suffix}', way, **options)
    read = np.asarray(open_image(path), int)
    assert read.shape == BLOCKS.shape and abs(read - BLOCKS).max() <= 3
    assert image_size(path) == (40, 16)
    as_stored = np.asarray(open_image(path, turn=False), int)
    assert abs(as_stored - np.asarray(stored(BLOCKS, way), int)).max() <= 3

RAMP = np.arange(256).repeat(4).reshape(16, 64)

@pytest.mark.parametrize('values, suffix', [
    (RAMP.astype(np.uint8), '.png'), ((RAMP * 257).astype(np.uint16), '.png'), ((RAMP * 257).astype(np.uint16), '.tif'),
    ((RAMP * 257).astype('>u2'), '.tif'), ((RAMP * 257).astype(np.int32), '.tif'), (RAMP.astype(np.int32), '.tif'),
    ((RAMP / 255).astype(np.float32), '.tif'), (RAMP.astype(np.float32), '.tif')])
def test_256_grey_levels_whatever_the_depth(tmp_path, values, suffix):
    Image.fromarray(values).save(tmp_path/f'a{suffix}')
    np.testing.assert_array_equal(np.asarray(open_image(tmp_path/f'a{suffix}')), np.stack([RAMP] * 3, -1))

def drawn(mode):
    "Left half red (or dark), right half transparent where the mode knows it."
    image = Image.new('RGBA', (8, 4), (255, 0, 0, 255))
    image.paste((9, 9, 9, 0), (4, 0, 8, 4))
    if mode == 'P':
        image = Image.new('P', (8, 4), 0)
        image.putpalette([255, 0, 0, 9, 9, 9])
        image.paste(1, (4, 0, 8, 4))
        image.info['transparency'] = 1
    return image if mode in ('RGBA', 'P') else image.convert(mode)

@pytest.mark.parametrize('mode, left, right', [('RGBA', (255, 0, 0), (255,) * 3), ('P', (255, 0, 0), (255,) * 3),
                                               ('LA', (76,) * 3, (255,) * 3)])
def test_what_is_transparent_is_paper(tmp_path, mode, left, right):
    image = drawn(mode)
    image.save(tmp_path/'a.png', **({'transparency': 1} if mode == 'P' else {}))
    read = np.asarray(open_image(tmp_path/'a.png'))
    assert tuple(read[0, 0]) == left and tuple(read[0, 7]) == right
    assert open_image(tmp_path/'a.png', 'RGBA').mode == 'RGBA'

def test_bits_and_inks(tmp_path):
    Image.fromarray(RAMP > 99).save(tmp_path/'bits.png')
    np.testing.assert_array_equal(np.asarray(open_image(tmp_path/'bits.png'))[..., 1], (RAMP > 99) * 255)
    Image.fromarray(BLOCKS).convert('CMYK').save(tmp_path/'inks.tif')
    np.testing.assert_array_equal(np.asarray(open_image(tmp_path/'inks.tif')), BLOCKS)

@pytest.mark.parametrize('make, error, words', [
    (lambda p: Image.fromarray(np.float32([[0, 300]])).save(p/'a.tif'), UnfitImage, 'from 0 to 300'),
    (lambda p: Image.fromarray(np.float32([[0, np.nan]])).save(p/'a.tif'), UnfitImage, 'not finite'),
    (lambda p: Image.fromarray(np.int32([[-1, 5]])).save(p/'a.tif'), UnfitImage, 'from -1 to 5'),
    (lambda p: drawn('L').save(p/'a.gif', save_all=True, append_images=[Image.new('L', (8, 4))]),
     UnfitImage, 'got 2 pictures'),
    (lambda p: (p/'a.jpg').write_bytes(b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n'),
     CorruptImage, 'no picture of a format'),
    (lambda p: (p/'a.png').write_bytes(b''), CorruptImage, 'the file is empty'),
    (lambda p: (p/'a.png').write_bytes(b'\x89PNG\r\n\x1a\n'), CorruptImage, 'corrupt image'),
    (lambda p: os.mkfifo(p/'a.png'), UnfitImage, 'a pipe or a device'),
    (lambda p: (p/'a.png').mkdir(), UnfitImage, 'a folder')])
def test_what_cannot_be_meant_is_refused_with_its_path(tmp_path, make, error, words):
    make(tmp_path)
    path, = tmp_path.iterdir()
    with pytest.raises(error) as e: open_image(path)
    assert words in str(e.value) and str(path) in str(e.value)

@pytest.mark.parametrize('way', [1, 6])
@pytest.mark.parametrize('exif', [True, False])
def test_the_size_of_a_png_that_is_told_after_its_pixels(tmp_path, way, exif):
    import zlib
    def chunk(kind, content): return struct.pack('>I', len(content)) + kind + content + struct.pack(
        '>I', zlib.crc32(kind + content))
    tags = Image.Exif()
    tags[0x0112] = way
    Image.fromarray(BLOCKS).save(tmp_path/'a.png')
    content = (tmp_path/'a.png').read_bytes()
    told = chunk(b'eXIf', tags.tobytes()[6:]) if exif else b''
    (tmp_path/'a.png').write_bytes(content[:-12] + chunk(b'tEXt', b'date\0today') + told + content[-12:])
    assert image_size(tmp_path/'a.png') == open_image(tmp_path/'a.png').size[::-1]
    assert image_size(tmp_path/'a.png') == ((16, 40) if exif and way == 6 else (40, 16))

def test_a_tiff_with_a_mask_of_its_own_is_one_picture(tmp_path):
    mask = Image.new('1', (16, 40), 1)
    mask.encoderinfo = {'tiffinfo': {254: 4}}  # as GDAL writes it
    Image.fromarray(BLOCKS).save(tmp_path/'a.tif', save_all=True, append_images=[mask])
    assert Image.open(tmp_path/'a.tif').n_frames == 2
    assert (np.asarray(open_image(tmp_path/'a.tif')) == BLOCKS).all()

def test_every_damage_is_a_corrupt_image(tmp_path):
    rng = np.random.default_rng(1)
    for suffix in ('.jpg', '.png', '.tif', '.webp', '.gif', '.bmp'):
        options = {'compression': 'tiff_lzw'} if suffix == '.tif' else {}
        whole = save(BLOCKS, tmp_path/f'a{suffix}', 1, **options).read_bytes()
        for _ in range(40):
            broken = bytearray(whole[:rng.integers(1, len(whole))] if rng.random() < 0.3 else whole)
            for at in rng.integers(0, len(broken), 3): broken[at] = rng.integers(0, 256)
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                try: assert open_image('x', content=bytes(broken)).mode == 'RGB'
                except (CorruptImage, UnfitImage) as e: assert ' x' in str(e)

def folder(root, n=2):
    for split in ('train', 'val'):
        for cls in 'ab':
            for i in range(n): save(BLOCKS, root/split/cls/f'{i}.png', 1)
    return root

def test_too_large_is_not_corrupt(tmp_path, monkeypatch):
    root = folder(tmp_path)
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 300)
    with pytest.raises(UnfitImage, match='image too large'): image_folder(root, skip_corrupt=True, cache=False)

@pytest.mark.parametrize('suffix', ['.gif', '.webp', '.png'])
def test_films_are_left_out_if_asked(tmp_path, capsys, suffix):
    root, blue = folder(tmp_path), Image.new('RGB', (16, 40), 'blue')
    film = root/f'train/b/9{suffix}'
    Image.fromarray(BLOCKS).save(film, save_all=True, append_images=[blue])
    with pytest.raises(UnfitImage, match='got 2 pictures .*; allowed: one; skip_corrupt=True leaves'):
        image_folder(root, cache=False)
    train, _ = image_folder(root, skip_corrupt=True, cache=False)
    assert len(train) == 4 and train.skipped == (str(film),)
    def loader(**skip):
        return StreamLoader(photo_folder(root, 'train'), 2, PhotoTransform(eval_transform(16)), InOrder(), **skip)
    read = loader(skip_corrupt=True)
    assert sum(len(y) for _, y in read) == 4 and read.skipped == {str(film)}
    with pytest.raises(UnfitImage, match='skip_corrupt=True'): list(loader())

def test_no_validation_image_that_can_be_decoded(tmp_path):
    root, views = folder(tmp_path), (train_transform(16), eval_transform(16))
    for file in (root/'val').rglob('*.png'): file.write_bytes(b'')
    with pytest.raises(ValueError, match='valid: got no image of .*, valid that can be decoded; allowed: one at least'):
        photo_loaders(*(photo_folder(root, split) for split in ('train', 'valid')), 2, views, skip_corrupt=True)
    with pytest.raises(ValueError, match='loader: got no image'): evaluate(torch.nn.Linear(1, 1), [], 2)

@pytest.mark.parametrize('channels', [1, 4])
def test_photo_loaders_want_three_channels(channels):
    held = ImageSet(np.zeros((4, 16, 16, channels), np.uint8), [0, 1, 0, 1], 'ab')
    with pytest.raises(ValueError, match=f'images: got {channels} channels; allowed: 3'):
        photo_loaders(held, held, 2, (train_transform(16), eval_transform(16)), device='cpu')

def test_readers_see_the_same_and_count_the_rest(tmp_path, capsys):
    root = folder(tmp_path)
    save(BLOCKS, root/'train/a/x.tif', 6)
    save(BLOCKS, root/'train/a/y.WEBP', 6, lossless=True)
    save(BLOCKS, root/'train/b/z.gif', 1)
    (root/'train/a/notes.txt').touch(), (root/'train/a/.hidden.png').touch(), (root/'train/c').mkdir()
    (root/'train/a/loop.png').symlink_to(root/'train/a/loop.png'), (root/'train/a/inner').symlink_to(root/'train/a')
    os.mkfifo(root/'train/b/pipe.png')
    train, valid = image_folder(root, size=16, cache=False)
    photos = photo_folder(root, 'train')
    assert train.classes == photos.classes == photo_folder(root, 'valid').classes == ('a', 'b')
    assert len(train) == len(photos) == 7 and train.labels.tolist() == photos.labels.tolist() and len(valid) == 4
    np.testing.assert_array_equal(np.asarray(photos[2][0]), BLOCKS)
    said = capsys.readouterr().out
    assert '1 hidden' in said and 'of another kind (.txt)' in said and '1 folders without a picture' in said
    assert 'pipes, devices or broken links' in said or '1 links to themselves' in said
    image_folder(root, size=16, cache=False)
    assert not capsys.readouterr().out


# --- label maps

def segmentation(root, maps, classes, image=BLOCKS):
    for split in ('training', 'validation'):
        for i, labels in enumerate(maps):
            save(image, root/f'images/{split}/{i}.png')
            save(np.asarray(labels, np.uint8), root/f'annotations/{split}/{i}.png')
    if classes:
        held = classes if isinstance(classes[0], dict) else [{'name': c} for c in classes]
        (root/'classes.json').write_text(json.dumps(held))
    return root

HALVES = np.repeat([[0, 1]], 40, 0).repeat(8, 1)

@pytest.mark.parametrize('classes, maps, options, expected', [
    (['background', 'building'], [HALVES], {}, [0, 1]), (['background', 'building'], [HALVES * 255], {}, [0, 1]),
    (['background', 'building'], [HALVES + 1], {}, [0, 1]),
    (['road', 'car'], [HALVES], {'label_zero': 'class'}, [0, 1]), (['road', 'car'], [HALVES * 255], {}, [0, 1]),
    (['road', 'car'], [HALVES, HALVES + 1], {'label_zero': 'ignored'}, [255, 0]),
    ([{'name': 'car', 'label': 1}, {'name': 'road', 'label': 0}], [HALVES], {}, [1, 0]),
    ([{'name': 'car', 'label': 7}, {'name': 'road', 'label': 3}], [HALVES * 4 + 3], {}, [1, 0]),
    (['background', 'building'], [np.where(np.arange(40)[:, None] < 9, 9, HALVES)], {'ignored': (9,)}, [255, 255])])
def test_labels_are_as_written(tmp_path, classes, maps, options, expected):
    for split in ('training', 'validation'):
        _, labels = ade20k(segmentation(tmp_path, maps, classes), split, **options)[0]
        assert labels[0, [0, -1]].tolist() == expected

@pytest.mark.parametrize('classes, maps, options, words', [
    (['building'], [HALVES], {}, 'name what is around it'), (['road', 'car'], [HALVES], {}, "label_zero='class'"),
    (['road', 'car'], [HALVES], {'label_zero': 'ignored'}, "label_zero='class'"), (None, [HALVES], {}, "only 'wall'"),
    (['background', 'building'], [HALVES * 2], {}, 'allowed'), (['a', 'b', 'c'], [HALVES * 8 + 1], {}, 'ignored=(9,)'),
    (['a', 'b'], [HALVES + 1], {'label_zero': 'x'}, "label_zero: got 'x'"),
    (['a', 'b'], [HALVES + 1], {'ignored': ('x',)}, 'ignored: got'),
    ([{'name': 'a'}, {'name': 'a'}], [HALVES + 1], {}, "name: got 'a'"),
    ([{'name': 'a'}, {'name': 3}], [HALVES + 1], {}, 'entry 2: name'),
    ([{'name': 'a', 'colour': [1, 2]}, {'name': 'b', 'colour': [1, 2, 3]}], [HALVES + 1], {}, 'entry 1: colour'),
    ([{'name': 'a', 'colour': [1, 2, 256]}, {'name': 'b'}], [HALVES + 1], {}, 'entry 1: colour'),
    ([{'name': 'a', 'label': 1}, {'name': 'b', 'label': 1}], [HALVES + 1], {}, 'label: got')])
def test_labels_that_cannot_be_meant(tmp_path, classes, maps, options, words):
    with pytest.raises(ValueError) as e: ade20k(segmentation(tmp_path, maps, classes), **options)
    assert words in str(e.value)

@pytest.mark.parametrize('zero, expected', [('class', [1, 2]), ('ignored', [0, 1])])
def test_a_background_that_no_map_holds_is_asked_for(tmp_path, zero, expected):
    root = segmentation(tmp_path, [HALVES + 1], ['background', 'road', 'tree'])
    with pytest.raises(ValueError, match="none holds 0 or 3; allowed: label_zero='class' .*'ignored'"): ade20k(root)
    with pytest.warns(UserWarning, match='1 of 3 are in none'): held = ade20k(root, label_zero=zero)
    assert np.unique(held[0][1]).tolist() == expected

def test_greys_of_a_gif_are_numbers(tmp_path):
    for name, labels in (('a', HALVES * 4 + 3), ('b', HALVES), ('c', HALVES * 255)):
        save(labels.astype(np.uint8), tmp_path/f'{name}.gif', exif=False)
        np.testing.assert_array_equal(np.asarray(label_image(tmp_path/f'{name}.gif')), labels)
    coloured = Image.fromarray(HALVES.astype(np.uint8)).convert('P')
    coloured.putpalette([0, 0, 0, 255, 0, 0])
    coloured.save(tmp_path/'d.gif')
    np.testing.assert_array_equal(np.asarray(label_image(tmp_path/'d.gif')), HALVES)

def test_only_what_can_be_said_is_advised(tmp_path):
    for part in ('train2017', 'semantic/train2017'): (tmp_path/part).mkdir(parents=True)
    save(BLOCKS, tmp_path/'train2017/1.png')
    save((HALVES * 2 + np.arange(40)[:, None] % 2).astype(np.uint8), tmp_path/'semantic/train2017/1.png')
    (tmp_path/'semantic/classes.json').write_text(json.dumps([{'id': i, 'name': str(i)} for i in (1, 2, 3, 4)]))
    with pytest.warns(UserWarning, match='1 of 4 are in none') as said: coco_semantic(tmp_path)
    assert 'label_zero' not in str(said[0].message)
    cells = [''.join(cell['source']) for cell in json.loads((ROOT/'nbs/ade20k.ipynb').read_text())['cells']]
    with pytest.raises(ValueError, match="label_zero: got 'class'; allowed: '' for dataset 'coco_mini'"):
        exec(next(cell for cell in cells if 'def opened(' in cell), dict(label_zero='class', dataset='coco_mini'))

def test_a_class_that_no_map_holds_is_warned_of(tmp_path):
    with pytest.warns(UserWarning, match='1 of 3 are in none of the 1 training label maps: b'):
        ade20k(segmentation(tmp_path, [HALVES * 2 + 1], ['a', 'b', 'c']))

@pytest.mark.parametrize('text', ['', '{', '[]', '{"name": "a"}', '[1, 2]', '[{"name": ""}, {"name": "b"}]', '[' * 9999,
                                  'null'])
def test_broken_class_lists(tmp_path, text):
    (segmentation(tmp_path, [HALVES + 1], ['a', 'b'])/'classes.json').write_text(text)
    with pytest.raises(ValueError, match='classes.json'): ade20k(tmp_path)

@pytest.mark.parametrize('way', range(1, 9))
@pytest.mark.parametrize('how', ['as seen', 'turned too', 'as stored'])
def test_masks_lie_on_their_pictures(tmp_path, way, how):
    if how == 'as stored' and way < 5: return  # as large as what is seen: taken as seen
    save(BLOCKS, tmp_path/'images/a.png', way)
    if how == 'as seen': save(LABELS, tmp_path/'maps/a.png', 1, exif=False)
    else: save(LABELS, tmp_path/'maps/a.png', way, exif=how == 'turned too')
    data = LabelledFolder(tmp_path/'images', tmp_path/'maps', 'abc')
    image, labels = data[0]
    np.testing.assert_array_equal(image, BLOCKS)
    np.testing.assert_array_equal(labels, LABELS - 1)
    assert data.size(0) == (40, 16)

def test_two_files_of_one_name(tmp_path, capsys):
    segmentation(tmp_path, [HALVES + 1], ['a', 'b'])
    save(BLOCKS, tmp_path/'images/training/0.jpg')
    data = ade20k(tmp_path)
    assert len(data) == 1 and data.files[0][0].name == '0.jpg'
    assert 'of a name that another has (0.png)' in capsys.readouterr().out

def test_bits_are_labels(tmp_path):
    Image.fromarray(HALVES.astype(bool)).save(tmp_path/'a.png')
    assert read_labels(tmp_path/'a.png', 2, (0, 1), ())[0].tolist() == HALVES[0].tolist()


# --- COCO

TRUTH = {'images': [{'id': 1, 'file_name': 'a.png', 'height': 40, 'width': 16},
                    {'id': 2, 'file_name': 'b.png', 'height': 40, 'width': 16}],
         'categories': [{'id': 1, 'name': 'thing'}, {'id': 3, 'name': 'other'}],
         'annotations': [{'id': 1, 'image_id': 1, 'category_id': 1, 'bbox': [2, 4, 9, 20], 'area': 180, 'iscrowd': 0,
                          'segmentation': [[2, 4, 11, 4, 11, 24, 2, 24]]},
                         {'id': 2, 'image_id': 1, 'category_id': 3, 'bbox': [0, 0, 4, 4], 'area': 16, 'iscrowd': 0,
                          'segmentation': {'size': [40, 16], 'counts': [0, 4, 36, 4, 36, 4, 36, 4, 516]}}]}

def written(root, held):
    for name in ('a', 'b'): save(BLOCKS, root/f'val2017/{name}.png')
    (root/'annotations').mkdir(exist_ok=True)
    (root/'annotations/instances_val2017.json').write_text(held if isinstance(held, str) else json.dumps(held))
    return root

ODD = [None, True, 'x', '', '1', [], [1], {}, {'a': 1}, np.nan, np.inf, -np.inf, 1e300, 10**400, 0.5, -1]
RIGHT = {  # values of `ODD` by their index that are all right for a field
    ('images', 'id'): (15,), ('images', 'file_name'): (2, 4), ('images', 'height'): (), ('images', 'width'): (),
    ('categories', 'id'): (2, 4, 15), ('categories', 'name'): (2, 4),
    ('annotations', 'id'): (15,), ('annotations', 'image_id'): (), ('annotations', 'category_id'): (),
    ('annotations', 'bbox'): (), ('annotations', 'area'): (14,), ('annotations', 'iscrowd'): (1,),
    ('annotations', 'segmentation'): ()}

@pytest.mark.parametrize('part, key', RIGHT, ids=lambda x: x)
def test_every_field_of_every_kind(tmp_path, part, key):
    "16 odd values and none at all, in each field: refused at opening with the entry's id, or read."
    path = tmp_path/'a.json'
    for i, value in [*enumerate(ODD), (None, 'gone')]:
        held = copy.deepcopy(TRUTH)
        if i is None: del held[part][0][key]
        else: held[part][0][key] = value
        path.write_text(json.dumps(held))
        if i is None and key in ('area', 'iscrowd') or i in RIGHT[part, key]:
            if key == 'id' and part != 'annotations': held |= {'annotations': [], part: held[part][:1]}
            path.write_text(json.dumps(held))
            read_annotations(path)
            continue
        with pytest.raises(ValueError) as e: read_annotations(path)
        assert str(path) in str(e.value) and (key in str(e.value) or 'id' in key), (value, str(e.value))

@pytest.mark.parametrize('value', [
    [2, 4, -9, 20], [2, 4, 9, -1], [0, 0, 1e9, 1], [2, 4, 9], [2, 4, 9, 20, 1], ['2', 4, 9, 20], [2, 4, 9, np.nan],
    [True, 4, 9, 20], [[2], 4, 9, 20]])
def test_boxes(tmp_path, value): refused(tmp_path, 'bbox', value)

@pytest.mark.parametrize('value', [
    [], [[]], [[1, 2]], [[1, 2, 3, 4]], [[1, 2, 3, 4, 5]], [1, 2, 3, 4, 5, 6], [['1', 2, 3, 4, 5, 6]],
    [[1, 2, 3, 4, 5, 1e9]], [[1, 2, 3, 4, 5, np.nan]], [None],
    {'size': [40, 16]}, {'counts': [640]}, {'size': [16, 40], 'counts': [640]}, {'size': 640, 'counts': [640]},
    {'size': [40, 16], 'counts': [639]}, {'size': [40, 16], 'counts': [641]}, {'size': [40, 16], 'counts': [-1, 641]},
    {'size': [40, 16], 'counts': 'abc'}, {'size': [40, 16], 'counts': '\x7f'}, {'size': [40, 16], 'counts': 'P'},
    {'size': [40, 16], 'counts': None}])
def test_masks(tmp_path, value): refused(tmp_path, 'segmentation', value)

def refused(tmp_path, key, value):
    held = copy.deepcopy(TRUTH)
    held['annotations'][1][key] = value
    with pytest.raises(ValueError, match=f'annotation 2: {key}: got .*allowed: '):
        coco_instances(written(tmp_path, held), 'validation')

@pytest.mark.parametrize('text', ['', '[]', 'null', '{', '3', '[' * 99999, '{"images": {}}',
                                  '{"images": [], "categories": [], "annotations": []}',
                                  '{"images": [1], "categories": [], "annotations": []}'])
def test_what_is_no_coco_file(tmp_path, text):
    with pytest.raises(ValueError, match='instances_val2017.json'):
        coco_instances(written(tmp_path, text), 'validation')

def test_odd_but_meant(tmp_path):
    held = copy.deepcopy(TRUTH)
    held['categories'] = [{'id': 'thing', 'name': 'thing'}, {'id': 'other', 'name': 'other'}]
    for i, a in enumerate(held['annotations']): a |= {'id': -i, 'category_id': held['categories'][i]['id']}
    held['annotations'][0]['segmentation'].append([1, 2, 3, 4])
    data = coco_instances(written(tmp_path, held), 'validation')
    assert data.classes == ('other', 'thing') and len(data) == 2 and [len(e[1]) for e in data.entries] == [2, 0]
    scores = average_precision(data, truth_as_results(data))[0]
    assert scores['AP_box'] == scores['AP_mask'] == 100
    assert data[0][1]['masks'].sum() == 180 + 16 and len(data[1][1]['boxes']) == 0

def test_boxes_alone(tmp_path):
    held = copy.deepcopy(TRUTH)
    for a in held['annotations']: del a['segmentation']
    with pytest.raises(ValueError, match='masks=False'): coco_instances(written(tmp_path, held), 'validation')
    data = coco_instances(tmp_path, 'validation', masks=False)
    assert 'masks' not in data[0][1] and data[0][1]['boxes'].tolist() == [[2, 4, 11, 24], [0, 0, 4, 4]]
    scores = average_precision(data, truth_as_results(data))[0]
    assert scores['AP_box'] == 100 and 'AP_mask' not in scores
    with pytest.raises(ValueError, match='kinds'): average_precision(data, [], ('mask',))

@pytest.mark.parametrize('way', range(1, 9))
def test_boxes_fit_turned_pictures(tmp_path, way):
    held = copy.deepcopy(TRUTH)
    save(BLOCKS, written(tmp_path, held)/'val2017/a.png', way)
    np.testing.assert_array_equal(coco_instances(tmp_path, 'validation')[0][0], BLOCKS)
    if way < 5: return
    held['images'][0] |= {'height': 16, 'width': 40}  # annotated as it is stored
    held['annotations'] = held['annotations'][:1]
    written(tmp_path, held)
    save(BLOCKS, tmp_path/'val2017/a.png', way)
    image = CocoFolder(tmp_path/'val2017', tmp_path/'annotations/instances_val2017.json')[0][0]
    np.testing.assert_array_equal(image, np.asarray(stored(BLOCKS, way)))


def tiff(bits, values, white):
    "A grey TIFF of one strip, its numbers packed by hand."
    packed = int(''.join(f'{v:0{bits}b}' for v in values), 2).to_bytes(-(-bits * len(values) // 8), 'big')
    if bits == 16: packed = np.array(values, '<u2').tobytes()
    tags = [(256, 4, len(values)), (257, 4, 1), (258, 3, bits), (259, 3, 1), (262, 3, 1 - white), (273, 4, 8),
            (277, 3, 1), (278, 4, 1), (279, 4, len(packed))]
    body = b''.join(struct.pack('<HHI', tag, kind, 1) + struct.pack('<HH' if kind == 3 else '<I', *([v, 0] if kind == 3
                    else [v])) for tag, kind, v in tags)
    return struct.pack('<2sHI', b'II', 42, 8 + len(packed)) + packed + struct.pack('<H', len(tags)) + body + bytes(4)

@pytest.mark.parametrize('bits, white', [(8, False), (8, True), (12, False), (16, False), (16, True)])
def test_greys_of_any_depth_whichever_end_is_white(tmp_path, bits, white):
    top = 2 ** bits - 1
    (tmp_path/'a.tif').write_bytes(tiff(bits, [0, top // 2, top, 0], white))
    read = np.asarray(open_image(tmp_path/'a.tif'))[0, :, 0].tolist()
    assert read in ([255, 128, 0, 255], [255, 127, 0, 255]) if white else read in ([0, 127, 255, 0], [0, 128, 255, 0])

def test_endless_pictures_and_packed_ones_take_no_memory(tmp_path):
    import resource
    tall = Image.fromarray(RNG.integers(0, 256, (20_000, 1, 3), dtype=np.uint8))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert PhotoTransform(eval_transform(64))(tall, 0, (0, 0))[0].shape == (3, 64, 64)
    member = tarfile.TarInfo('set/train/a/big.png')
    member.size = 2 ** 33
    with gzip.open(tmp_path/'set.tar.gz', 'wb') as f: f.write(member.tobuf() + bytes(10_000))
    with pytest.raises(ValueError, match='set.tar.gz, which .*got pictures of 8,589,934,592 bytes'):
        image_folder(tmp_path/'set.tar.gz')
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB
    wide = Image.new('RGB', (99, 2))
    assert shortened(wide) is wide and shortened(Image.new('RGB', (2, 999))).size == (2, 100)

@pytest.mark.parametrize('line', ['a.png 99999999999', 'a.png \u00b2', 'a.png -1', '/etc/passwd 0', '../a.png 0',
                                  'a.png,0', 'a.png', 'file label'])
def test_lists_that_make_no_sense(tmp_path, line):
    (tmp_path/'meta').mkdir()
    (tmp_path/'meta/train.txt').write_text(f'b.png 0\n{line}\n', encoding='utf-8')
    with pytest.raises(ValueError, match='train.txt, line 2: got .*; allowed: "<file> <class number>"'):
        photo_folder(tmp_path, 'train')
    (tmp_path/'meta/train.txt').write_bytes('Größe.png 0'.encode('latin-1'))
    with pytest.raises(ValueError, match='train.txt: got invalid .* at byte 2; allowed: UTF-8'):
        photo_folder(tmp_path, 'train')

@pytest.mark.parametrize('train, val, classes', [
    ('cat/0.png 1, dog/0.png 0', 'dog/1.png 0, cat/1.png 1', ('dog', 'cat')),  # in an order of their own
    ('n01/0.png 0, n02/0.png 1', '0.png 1, 1.png 0', ('n01', 'n02')),  # as Caffe and mmcls have ImageNet
    ('n01/0.png 0, n02/0.png 1', '0.png 1', ('n01', 'n02')),
    ('n01/0.png 0, n02/0.png 1', 'n02/0.png 2', ('0', '1', '2')),  # a class without an image to train on
    ('a/0.png 0, a/1.png 1', 'a/0.png 0', ('0', '1')), ('a/0.png 0, b/1.png 0, c/2.png 1', '0.png 0', ('0', '1'))])
def test_lists_name_their_classes_once(tmp_path, train, val, classes):
    (tmp_path/'meta').mkdir()
    for name, lines in (('train', train), ('val', val)):
        (tmp_path/f'meta/{name}.txt').write_text(lines.replace(', ', '\n'))
    assert photo_folder(tmp_path, 'train').classes == photo_folder(tmp_path, 'valid').classes == classes

def test_a_list_beside_folders_of_classes(tmp_path):
    for name in ('n01', 'n02', 'n03'): save(BLOCKS, tmp_path/'train'/name/'0.png')
    (tmp_path/'meta').mkdir(), (tmp_path/'meta/val.txt').write_text('0.png 1\n')
    assert photo_folder(tmp_path, 'train').classes == photo_folder(tmp_path, 'valid').classes == ('n01', 'n02', 'n03')

def test_lists_that_contradict_each_other(tmp_path):
    (tmp_path/'meta').mkdir(), (tmp_path/'meta/train.txt').write_text('cat/0.png 1\ndog/0.png 0\n')
    (tmp_path/'meta/val.txt').write_text('cat/0.png 0\ndog/0.png 1\n')
    with pytest.raises(ValueError, match='val.txt: got cat/0.png with the class number 0, that of dog in training; '):
        photo_folder(tmp_path, 'valid')

def test_lists_with_gaps_and_a_mark(tmp_path, capsys):
    (tmp_path/'meta').mkdir()
    (tmp_path/'meta/train.txt').write_text('\ufeffa/Größe 1.png 1\r\nb.png 4\n', encoding='utf-8')
    found = photo_folder(tmp_path, 'train')
    assert found.labels.tolist() == [1, 4] and found.files[0].endswith('train/a/Größe 1.png')
    assert '3 of the 5 class numbers from 0 have no image' in capsys.readouterr().out

@pytest.mark.parametrize('policy', ['', 'rand-m9-mstd0.5-inc1', 'augmix-m3', 'original', 'best', 'rand-x0'])
def test_policies(policy):
    if policy in ('best', 'rand-x0'):
        with pytest.raises(ValueError, match=f"auto_augment: got '{policy}' .*; allowed: a policy of timm"):
            train_transform(16, auto_augment=policy)
    else: assert train_transform(16, auto_augment=policy)(Image.new('RGB', (20, 20))).shape == (3, 16, 16)
    for size in (0, -4, 2.5, '16', None, 10**7, (16, 0)):
        with pytest.raises(ValueError, match='size: got'): train_transform(size, auto_augment='')
        with pytest.raises(ValueError, match='size: got'): eval_transform(size)

def test_the_identity_of_a_folder_with_broken_links(tmp_path):
    (tmp_path/'a.png').write_bytes(b'x')
    for name, target in (('gone', 'nowhere'), ('loop', tmp_path/'loop')): os.symlink(target, tmp_path/name)
    assert identity(tmp_path)['bytes'] == 1
    with pytest.raises(OSError): identity(tmp_path, ['gone'])

def test_the_identity_follows_links_to_folders(tmp_path):
    for place in ('one', 'two'): (tmp_path/place).mkdir(), (tmp_path/place/'a.png').write_text(place)
    (tmp_path/'set').mkdir()
    (tmp_path/'set/again').symlink_to(tmp_path/'set')  # which has no end
    def linked(to):
        (tmp_path/'set/val').unlink(missing_ok=True)
        (tmp_path/'set/val').symlink_to(tmp_path/to)
        return identity(tmp_path/'set')
    one, two = linked('one'), linked('two')
    assert one != two and one['files'] == two['files'] == 1

@pytest.mark.parametrize('name, size, at', [('set.tar', 10**6, 300_000), ('x.bmp', 10**6, 500_000),
                                            ('x.bmp', 10**6, 10**6 - 1), ('meta/val.txt', 10**5, 70_000)])
def test_the_identity_sees_a_byte_that_changed(tmp_path, name, size, at):
    (tmp_path/'set/meta').mkdir(parents=True)
    if name != 'set.tar':
        for i in range(300): (tmp_path/f'set/{i}.png').touch()
    path, content, seen = tmp_path/'set'/name, bytearray(size), []
    for content[at] in (0, 1):
        path.write_bytes(content)
        seen.append(identity(path if name == 'set.tar' else tmp_path/'set'))
    assert seen[0] != seen[1]

def test_label_maps_below_the_folder_around_ade20k_are_read_whole():
    line = next(line for cell in json.loads((ROOT/'nbs/ade20k.ipynb').read_text())['cells'] for line in cell['source']
                if line.startswith('def told('))
    exec(line, held := {})
    for name in ('annotations/training/1.png', 'ADEChallengeData2016/annotations/training/1.png', 'x/classes.json'):
        assert held['told'](name)
    assert not held['told']('ADEChallengeData2016/images/training/annotations')

def test_a_cache_of_something_else_is_made_anew(tmp_path):
    for split in ('train', 'val'):
        for cls in 'ab': save(BLOCKS, tmp_path/split/cls/'0.png', exif=False)
    image_folder(tmp_path, 8)
    cache, = tmp_path.glob('.decoded*')
    np.savez(cache, x=1)
    with pytest.warns(UserWarning, match='is damaged'): assert len(image_folder(tmp_path, 8)[0]) == 2


# --- masks of no pixel, results of others

def coco_of(tmp_path, segmentation, **words):
    save(BLOCKS, tmp_path/'im/a.png', exif=False)  # 40 high, 16 wide
    held = {'images': [{'id': 1, 'file_name': 'a.png', 'height': 40, 'width': 16}],
            'categories': [{'id': 3, 'name': 'x'}],
            'annotations': [{'id': i, 'image_id': 1, 'category_id': 3, 'bbox': [2, 2, 8, 8], 'segmentation': s}
                            for i, s in enumerate((segmentation, [[2, 2, 10, 2, 10, 10, 2, 10]]), 1)]}
    (tmp_path/'a.json').write_text(json.dumps(held))
    return CocoFolder(tmp_path/'im', tmp_path/'a.json', **words)

@pytest.mark.parametrize('segmentation', [
    [[2, 3, 5, 3, 9, 3]], [[2, 3, 2, 3, 2, 3]], [[2, 3, 5, 6, 9, 10]], [[40, 50, 50, 50, 50, 60]],
    [[2.1, 3.1, 2.2, 3.1, 2.2, 3.2]], {'size': [40, 16], 'counts': [640]}, {'size': [40, 16], 'counts': [0, 0, 640]}])
def test_masks_of_no_pixel_are_left_out(tmp_path, segmentation):
    data = coco_of(tmp_path, segmentation)
    assert '1 instances of zero area left out' in repr(data) and len(data[0][1]['labels']) == 1
    assert average_precision(data, truth_as_results(data))[0]['AP_mask'] == 100

def test_run_lengths_of_a_size_in_floats(tmp_path):
    data = coco_of(tmp_path, {'size': [40., 16.], 'counts': [100., 100., 440.]})
    assert data[0][1]['masks'].sum((1, 2)).tolist() == [100, 64]

def test_no_image_at_all_is_refused(tmp_path):
    coco_of(tmp_path, [[2, 2, 10, 2, 10, 10]])
    (tmp_path/'im/a.png').unlink()
    with pytest.raises(FileNotFoundError, match='got 1 of 1 images that are not in'):
        CocoFolder(tmp_path/'im', tmp_path/'a.json', skip_missing=True)

@pytest.mark.parametrize('change', [
    dict(score='high'), dict(score=float('nan')), dict(score=None), dict(bbox=None), dict(bbox=[float('nan')] * 4),
    dict(bbox=[1, 2, 3]), dict(image_id=55), dict(image_id=None), dict(category_id=1), dict(segmentation=None),
    dict(segmentation=[[2, 2, 10, 2, 10, 10]]), dict(segmentation={'size': [3, 3], 'counts': [9]}),
    dict(segmentation={'size': [40, 16], 'counts': 'zzzz'}), dict(segmentation={'size': [40, 16]})], ids=str)
def test_results_that_the_evaluator_would_choke_on(tmp_path, change):
    data = coco_of(tmp_path, [[2, 2, 10, 2, 10, 10]])
    results = truth_as_results(data)
    (name, _), = change.items()
    results[1] |= change
    with pytest.raises(ValueError, match=rf'results\[1\]: {name}: got .*; allowed: '): average_precision(data, results)
    del results[1][name]
    with pytest.raises(ValueError, match=rf'results\[1\]: {name}: got None'): average_precision(data, results)
