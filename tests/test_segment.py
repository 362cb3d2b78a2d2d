"Segmentation: every row of Table 4 counted, damaged and foreign files, reading processes, the experiment by papermill."
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import timm
import torch
import yaml
from PIL import Image

from localmamba.cost import count_parameters
from localmamba.data import IGNORE, LabelledFolder, ade20k, ade20k_scenes, coco_semantic, read_labels, scenes
from localmamba.models.weights import to_released
from localmamba.recipes import SEGMENTATION, recipe
from localmamba.segment import (EvalTransform, SegmentationLoader, TrainTransform, confusion, crop_box, evaluate,
                                fitted, load_segmenter,
                                loaders, photometric, predict, scores, segmenter, slide)
from notebooks import ROOT, execute, papermill, project, said_by

CONFIGS = sorted((ROOT/'nbs/configs/ade20k').glob('*.yaml'))
PAPER = pd.read_csv(ROOT/'results/paper/ade20k.csv').set_index('backbone')


# --- Table 4

def test_a_configuration_for_every_row_of_table_4():
    rows = [yaml.safe_load(path.read_text()).get('row') for path in CONFIGS]
    assert sorted(row for row in rows if row) == sorted(PAPER.index)

@pytest.mark.parametrize('path', CONFIGS, ids=lambda p: p.stem)
def test_a_configuration_builds_the_model_of_its_row(path):
    given = yaml.safe_load(path.read_text())
    cells = json.loads((ROOT/'nbs/ade20k.ipynb').read_text())['cells']
    declared = {}
    exec(''.join(next(c['source'] for c in cells if 'parameters' in c['metadata'].get('tags', []))), declared)
    assert not set(given) - set(declared)
    if not given.get('row'): return
    settings = recipe(given['recipe_name'], SEGMENTATION, channels=given.get('channels'))
    with torch.device('meta'):
        net = segmenter(given['model'], 150, backbone=given['model_options'], neck=given.get('neck', False),
                        channels=settings['channels'])
    assert count_parameters(net) / 1e6 == pytest.approx(PAPER.params_m[given['row']], rel=0.1 if 'Vim'
                                                        in given['row'] and 'Local' not in given['row'] else 0, abs=1.0)

@pytest.mark.parametrize('name, size',
                         [('resnet18', (70, 100)), ('swin_tiny_patch4_window7_224', (70, 100)),
                          ('deit_tiny_patch16_224', (70, 100))])
def test_backbones_of_timm_take_any_size(name, size):
    options = {'resnet18': {},
               'deit_tiny_patch16_224': dict(img_size=64,
                                             dynamic_img_size=True)}.get(name, dict(img_size=64, strict_img_size=False))
    net = segmenter(name, 5, backbone=options, channels=8, aux_channels=8).eval()
    with torch.no_grad(): assert net(torch.randn(1, 3, *size)).shape == (1, 5, *size)

def test_released_weights_arrive_under_the_head():
    source = timm.create_model('test_local_vim')
    for p in source.parameters(): torch.nn.init.normal_(p)
    net = segmenter('test_local_vim', 5, to_released(source), channels=8, aux_channels=8)
    block, new = source.layers[1], net.backbone.model.layers[1]
    assert torch.equal(block.mixer.out_proj.weight, new.mixer.out_proj.weight)
    assert torch.equal(block.norm.weight, new.norm.weight) and not new.norm.bias.any()

@pytest.mark.parametrize('name', ['test_local_vim', 'test_local_vmamba'])
def test_recomputing_changes_no_gradient(name):
    net, x, gradients = segmenter(name, 5, channels=8, aux_channels=8, dropout=0.), torch.randn(2, 3, 32, 48), []
    for checkpointing in (False, True):
        net.set_grad_checkpointing(checkpointing)
        loss = sum(y.square().sum() for y in net.train()(x))
        gradients.append(torch.autograd.grad(loss, [p for p in net.parameters()]))
    for a, b in zip(*gradients): torch.testing.assert_close(a, b)

def test_parameters_that_must_not_decay_are_named():
    net = segmenter('test_local_vim', 5, channels=8)
    names = dict(net.named_parameters())
    assert net.no_weight_decay() <= set(names) and any(n.endswith('A_log') for n in net.no_weight_decay())

def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    torch.save({'model': segmenter('test_local_vim', 5, channels=8).state_dict()}, tmp_path/'a.pt')
    with pytest.raises(ValueError, match='does not fit this segmenter'):
        load_segmenter(segmenter('test_local_vim', 6, channels=8), tmp_path/'a.pt')
    load_segmenter(segmenter('test_local_vim', 5, channels=8), tmp_path/'a.pt')


# --- files

@pytest.fixture(scope='module')
def root(tmp_path_factory): return ade20k_scenes(12, 4, tmp_path_factory.mktemp('scenes'))

@pytest.fixture
def mine(root, tmp_path): return shutil.copytree(root, tmp_path/'set')

def test_scenes_know_their_pixels():
    for scene in scenes(20, size=(64, 96), n_digits=(3, 5)):
        assert scene.image.shape == (64, 96, 3) and scene.masks.shape == (len(scene.labels), 64, 96)
        assert scene.masks.sum(0).max() <= 1 and scene.masks[-1].any() and not (scene.masks.any(0) & scene.soft).any()

def test_training_and_validation_scenes_differ():
    a, b = next(scenes(1, True)), next(scenes(1, False))
    assert (a.image != b.image).mean() > 0.5

def annotation(mine, i=0): return ade20k(mine).files[i][1]

@pytest.mark.parametrize('mode', ['L', 'P', 'I;16'])
def test_one_channel_of_numbers_in_any_depth(tmp_path, mode):
    numbers = np.arange(12).reshape(3, 4) % 8
    image = Image.fromarray(numbers.astype({'L': np.uint8, 'P': np.uint8, 'I;16': np.uint16}[mode]))
    if mode == 'P': image.putpalette(list(np.random.default_rng(0).integers(0, 256, 768)))
    image.save(tmp_path/'a.png')
    np.testing.assert_array_equal(read_labels(tmp_path/'a.png', 7), np.where(numbers == 0, IGNORE, numbers - 1))

@pytest.mark.parametrize('change, words',
                         [(lambda a: a.convert('RGB'), 'colours or fractions'),
                                           (lambda a: a.resize((64, 48), 0), 'got 48x64 pixels'),
                                           (lambda a: Image.fromarray(np.asarray(a).astype(np.uint16) * 300),
                                            'allowed: 0 to 12')])
def test_wrong_annotations(mine, change, words):
    path = annotation(mine)
    change(Image.open(path)).save(path)
    with pytest.raises(ValueError) as e: ade20k(mine)[0]
    assert words in str(e.value) and str(path) in str(e.value)

@pytest.mark.parametrize('part, words',
                         [('images/training', 'no images/training'), ('annotations', 'no annotations/training'),
                                         ('annotations/training/000003.png', '1 names without an annotation'),
                                         ('images/training/000003.jpg', '1 names without an image')])
def test_wrong_layout_shows_the_expected_one(mine, part, words):
    path = mine/part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(ValueError) as e: ade20k(mine)
    assert words in str(e.value) and 'images/training/<name>.jpg' in str(e.value)

def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match='does not exist'): ade20k(tmp_path/'no')
    with pytest.raises(FileNotFoundError, match='classes.json'): coco_semantic(tmp_path)
    with pytest.raises(ValueError, match='classes: got 300'): LabelledFolder(tmp_path, tmp_path, range(300))

def test_the_folder_around_it_will_do(mine):
    outer = mine.parent/'outer'
    outer.mkdir()
    mine.rename(outer/'ADEChallengeData2016')
    assert len(ade20k(outer)) == 12

def test_corrupt_images_are_named_or_counted(mine, capsys):
    train = ade20k(mine)
    bad = train.files[4][0]
    bad.write_bytes(bad.read_bytes()[:300])
    with pytest.raises(ValueError, match=f'corrupt image: {bad}'): train[4]
    for workers in (0, 1):
        with pytest.raises(ValueError, match='corrupt image: '): list(SegmentationLoader(train, 4, workers=workers))
    assert len(train.readable()) == 11 and '1 images left out' in capsys.readouterr().out

def test_nothing_to_judge_by_is_said_before_training(mine):
    maps = sorted((mine/'annotations/validation').iterdir())
    def opened():
        for path in maps: Image.fromarray(np.zeros_like(Image.open(path))).save(path)
        return ade20k(mine), ade20k(mine, 'validation')
    with pytest.raises(ValueError, match='valid: got no pixel with a class in set, validation, so nothing to judge by'):
        loaders(*opened(), recipe('scenes', SEGMENTATION))

def test_coco_semantic(tmp_path):
    for part in ('train2017', 'semantic/train2017'): (tmp_path/part).mkdir(parents=True)
    Image.new('RGB', (8, 6)).save(tmp_path/'train2017/1.jpg')
    Image.fromarray(np.full((6, 8), [3] * 7 + [1], np.uint8)).save(tmp_path/'semantic/train2017/1.png')
    (tmp_path/'semantic/classes.json').write_text(json.dumps([{'id': i, 'name': str(i)} for i in (1, 2, 3)]))
    with pytest.warns(UserWarning, match='1 of 3 are in none of the 1 training label maps: 2'):
        assert (coco_semantic(tmp_path)[0][1] == [2] * 7 + [0]).all()
    (tmp_path/'semantic/classes.json').write_text(json.dumps([{'id': i, 'name': str(i)} for i in (1, 2, 4)]))
    with pytest.raises(ValueError, match='got other ids than 1 to 3 in '): coco_semantic(tmp_path)


# --- samples

def test_image_and_labels_stay_together():
    "The red channel is the label, so any crop, resizing by the nearest pixel apart, keeps them equal"
    labels = np.kron(np.arange(20).reshape(4, 5), np.ones((40, 40), int)).astype(np.uint8)
    image = np.repeat(labels[..., None], 3, 2)
    transform = TrainTransform((64, 80), None, (1.0, 1.0), 0.75, 0.5, False)
    for i in range(20):
        x, y = transform(image, labels, np.random.default_rng(i))
        red = (x[0] * 58.395 + 123.675).round()
        assert x.shape == (3, 64, 80) and torch.equal(red.long(), y)

def test_what_is_beyond_the_image_is_ignored():
    x, y = TrainTransform(64, None, (0.5, 0.5), 1.0, 0.,
                          True)(np.full((40, 60, 3), 9, np.uint8), np.ones((40, 60), np.uint8),
                                np.random.default_rng(0))
    assert (y[:20, :30] == 1).all() and (y[20:] == IGNORE).all() and not x[:, 20:].any() and not x[:, :, 30:].any()

def test_crops_are_not_all_one_class():
    labels = np.zeros((100, 400), np.uint8)
    labels[:, 300:] = 1
    shares = []
    for i in range(50):
        top, left = crop_box(labels, (100, 100), 0.75, np.random.default_rng(i))
        shares.append((labels[top:top + 100, left:left + 100] == 1).mean())
    assert np.mean([0.25 < s < 0.75 for s in shares]) > 0.8

def test_photometric_keeps_shape_and_grey_stays_grey():
    grey = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, 2)
    out = [photometric(grey, np.random.default_rng(i)) for i in range(20)]
    assert all(o.dtype == np.uint8 and (o == o[..., :1]).all() for o in out) and len({o.tobytes() for o in out}) > 10

def test_workers_change_nothing_and_positions_are_the_state(root):
    train, settings = ade20k(root), recipe('scenes', SEGMENTATION, every=3, batch_size=4)
    def passes(n, start=0, **kwargs):
        loader = loaders(train, train, settings, seed=5, device='cpu', **kwargs).train
        loader.load_state_dict(dict(seed=5, epoch=start))
        return [x for _ in range(n) for x, _ in loader]
    whole = passes(3)
    for other in (passes(1) + passes(2, 1), passes(3, workers=1)):
        for a, b in zip(whole, other, strict=True): assert torch.equal(a, b)
    loader = SegmentationLoader(train, 6, steps=4, transform=lambda image, labels,
                                rng: (torch.zeros(1), torch.tensor(int(image.astype(int).sum()))))
    seen = torch.cat([y for _, y in loader])
    assert sorted(seen[:12].tolist()) == sorted(seen[12:].tolist()) and not torch.equal(seen[:12], seen[12:])

def test_validation_images_of_one_size_share_a_batch(mine):
    path, odd = ade20k(mine).files[5]
    Image.open(path).resize((64, 64)).save(path), Image.open(odd).resize((64, 64), 0).save(odd)
    sizes = [tuple(y.shape) for _, y in SegmentationLoader(ade20k(mine), 4, transform=EvalTransform(None))]
    assert sizes == [(4, 96, 128), (1, 96, 128), (1, 64, 64), (4, 96, 128), (2, 96, 128)]


# --- judging

@pytest.mark.parametrize('name', ['test_local_vim', 'test_local_vmamba', 'resnet18'])
@pytest.mark.parametrize('channels', [1, 4, 13])
def test_images_of_any_number_of_channels(name, channels):
    net = segmenter(name, 3, backbone=dict(in_chans=channels), channels=8, aux_channels=0).eval()
    image = np.random.default_rng(0).integers(0, 256, (40, 50, channels)).astype(np.uint8)
    assert predict(net, image, (32, 32)).shape == (3, 40, 50)
    if channels == 1: torch.testing.assert_close(predict(net, image[..., 0], None), predict(net, image, None))
    with pytest.raises(ValueError, match=rf'image: got shape .*; allowed: \(H, W, {channels}\)'):
        predict(net, image.repeat(2, 2))
    with pytest.raises(TypeError, match='image: got float32'): predict(net, image.astype(np.float32))


def test_statistics_are_those_of_the_model():
    net = segmenter('test_local_vmamba', 3,
                    backbone=dict(pretrained_cfg_overlay=dict(mean=(.5, .5, .5), std=(.25, .5, 1.))),
                    channels=8, aux_channels=0)
    assert net.stats == ((.5, .5, .5), (.25, .5, 1.))
    seen = []
    net.backbone.register_forward_pre_hook(lambda m, x: seen.append(x[0]))
    predict(net.eval(), np.full((32, 32, 3), 255, np.uint8), None)
    torch.testing.assert_close(seen[0][0, :, 0, 0], torch.tensor([2., 1., .5]))


def test_one_class_is_refused():
    with pytest.raises(ValueError, match='num_classes: got 1; allowed: 2 or more'): segmenter('test_local_vim', 1)


def test_confusion_adds_up_over_images_and_counts_by_hand():
    target, pred = torch.tensor([[0, 0, 1], [1, IGNORE, 2]]), torch.tensor([[0, 1, 1], [1, 2, 0]])
    whole = confusion(pred, target, 4)
    assert torch.equal(whole, sum(confusion(p, t, 4) for p, t in zip(pred, target)))
    said = scores(whole)
    assert said['iou'][:3] == pytest.approx([100 / 3, 200 / 3, 0.]) and np.isnan(said['iou'][3])
    assert (said['miou'], said['macc'], said['pixel_accuracy']) == pytest.approx((100 / 3, 50., 60.))

def test_windows_that_overlap_are_averaged():
    class Counted(torch.nn.Module):
        calls = 0
        def forward(self, x):
            self.calls += 1
            return x[:, :1] * 0 + self.calls
    model = Counted()
    out = slide(model, torch.zeros(1, 3, 4, 10), (4, 6), (4, 4))
    assert model.calls == 2 and out[0, 0, 0].tolist() == [1.] * 4 + [1.5] * 2 + [2.] * 4

def test_a_large_image_is_predicted_at_its_own_size():
    net = segmenter('test_local_vmamba', 5, channels=8, aux_channels=0).eval()
    image = np.random.default_rng(0).integers(0, 256, (130, 70, 3), dtype=np.uint8)
    for options in (dict(), dict(mode='slide', crop=(32, 32), stride=(20, 20)), dict(scales=(0.5, 1.0), flip=True),
                    dict(amp=True)):
        assert predict(net, image, (64, 32), **options).shape == (5, 130, 70)
    assert fitted((130, 70), (64, 32)) == (59, 32)

def test_evaluate_gives_the_mode_back(root):
    net = segmenter('test_local_vmamba', 12, channels=8, aux_channels=0).train()
    valid = ade20k(root, 'validation').take([0])
    assert evaluate(net, valid, limits=None).sum() == (valid[0][1] != IGNORE).sum() and net.training


# --- the experiment

TINY = dict(n_train=12, n_valid=4, iterations=4, every=2, batch_size=2, channels=8, model='test_local_vmamba',
            model_options={})

@pytest.mark.slow
def test_experiment_trains_then_evaluates_the_checkpoint_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(project(tmp_path))
    said_by(papermill(tmp_path, 'ade20k', '-y', json.dumps(TINY)))
    results = tmp_path/'results/ade20k/scenes'
    run, = (results/'runs').iterdir()
    assert {f.name for f in run.iterdir()} == {'params.json', 'env.json', 'history.csv', 'metrics.json', 'weights.pt'}
    metrics, table = json.loads((run/'metrics.json').read_text()), pd.read_csv(results/'table.csv')
    assert len(metrics['iou']) == 6 and table.miou[0] == pytest.approx(metrics['miou'])
    assert len(pd.read_csv(run/'history.csv')) == 2
    assert all((results/f'{name}.png').stat().st_size > 5000 for name in ('table', 'curves', 'predictions'))
    rendered, = (tmp_path/'data').glob('scenes_ade20k-*')
    execute('ade20k', **TINY, checkpoint=str(run/'weights.pt'), data_dir=str(rendered), multi_scale=True,
            row='LocalVMamba-T')
    judged = pd.read_csv(tmp_path/'results/ade20k/ade20k/table.csv')
    assert judged.scale.tolist() == ['multi'] and judged.paper_miou.tolist() == [49.1] and judged.miou[0] > 0


@pytest.mark.parametrize('words', [
    dict(num_classes=2.5), dict(num_classes='3'), dict(channels=0), dict(aux_channels=-1), dict(aux_index=9),
    dict(pool_scales=()), dict(pool_scales=(0,))], ids=str)
def test_heads_that_cannot_be_are_named(words):
    (name, _), = words.items()
    with pytest.raises(ValueError, match=f'{name}: got .*; allowed: '):
        segmenter('test_local_vmamba', **{'num_classes': 3, 'channels': 8, 'aux_channels': 8, **words})


@pytest.mark.parametrize('image', [np.zeros((0, 9, 3), np.uint8), 'x.png', None])
def test_what_is_no_image_is_named(image):
    net = segmenter('test_local_vmamba', 3, channels=8, aux_channels=8).eval()
    with pytest.raises(ValueError, match='image: got .* as height and width; allowed: both from 1'):
        predict(net, image)
    for limits in (64, '64', (64,), (0, 9), (1e12, 1e12), (float('nan'), 3)):
        with pytest.raises(ValueError, match='limits: got .*; allowed: two positive numbers'):
            predict(net, np.zeros((4, 4, 3), np.uint8), limits=limits)
