"Detection: every row of Tables 3 and 6 counted, torchvision's detector beside ours, damaged annotations, papermill."
import json
import shutil
from functools import lru_cache
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import timm
import torch
import yaml
from faster_coco_eval.core import mask as rle
from PIL import Image
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork

from localmamba.coco import CocoFolder, as_results, average_precision, coco_instances, coco_scenes, truth_as_results
from localmamba.cost import count_flops, count_parameters
from localmamba.data import scenes
from localmamba.detector import STAGES, Anchors, Counted
from localmamba.detect import (DetectionLoader, EvalTransform, TrainTransform, as_target, detector, evaluate,
                               fit_options, head_options,
                               load_detector, loaders, predict, restored, steps)
from localmamba.mixer import without_facts
from localmamba.recipes import DETECTION, recipe
from localmamba.figures import plot_instances
from localmamba.models.backbone import Backbone
from localmamba.models.weights import to_released
from localmamba.scan import inverse_order, scan_order
from localmamba.train import fit
from notebooks import ROOT, execute, papermill, project, said_by

CONFIGS = sorted((ROOT/'nbs/configs/coco').glob('*.yaml'))
PAPER = {t: pd.read_csv(ROOT/f'results/paper/coco_{t}.csv').set_index('backbone') for t in ('1x', '3x', 'vitdet')}
SMALL = dict(num_classes=10, channels=8, width=16, proposals=30, samples=(32, 16), anchor_scale=4)

torch.set_num_threads(1)


# --- Tables 3 and 6

def given(path): return yaml.safe_load(path.read_text())

def test_a_configuration_for_every_row_that_is_ours_or_a_baselines():
    rows = {(c['table'], c['row']) for c in map(given, CONFIGS) if c.get('row')}
    assert rows == {(t, row) for t, table in PAPER.items() for row in table.index if 'Adapter' not in row}

@pytest.mark.parametrize('path', CONFIGS, ids=lambda p: p.stem)
def test_a_configuration_builds_the_model_of_its_row(path):
    said, declared = given(path), {}
    cells = json.loads((ROOT/'nbs/coco.ipynb').read_text())['cells']
    exec(''.join(next(c['source'] for c in cells if 'parameters' in c['metadata'].get('tags', []))), declared)
    assert not set(said) - set(declared)
    settings = recipe(said['recipe_name'], DETECTION)
    fit_options(settings, 117_266)
    if not said.get('row'): return
    expected, vitdet = PAPER[said['table']].params_m[said['row']], said['recipe_name'] == 'vitdet'
    counted = parameters(said['model'], json.dumps(said['model_options']), vitdet)
    if expected == expected: assert counted == pytest.approx(expected, abs=0.7)

@lru_cache
def parameters(model, options, vitdet):
    with torch.device('meta'):
        return count_parameters(detector(model, 80, backbone=json.loads(options),
                                         **head_options(recipe('vitdet' if vitdet else '1x', DETECTION)))) / 1e6

def test_parameters_and_flops_to_three_digits():
    assert [round(parameters(f'local_vmamba_{size}', '{}', False), 2) for size in ('tiny', 'small')] == [45.03, 69.25]
    assert round(parameters('local_vim_tiny', '{"img_size": 1024}', True), 2) == 30.67
    with torch.device('meta'): net = detector('local_vmamba_tiny')
    assert round(count_flops(Counted(net), (800, 1280)) / 1e9) == 291

def test_recipes_are_those_of_the_facts():
    assert steps(recipe('3x', DETECTION),
                 117_266)['drops'] == (27 * 7330, 33
                                       * 7330) and steps(recipe('vitdet', DETECTION), 1)['drops'] == (163_889, 177_546)
    for name in DETECTION: assert fit_options(recipe(name, DETECTION), 117_266)['epochs'] > 0
    shorter = recipe('vitdet', DETECTION, iterations=100)
    assert shorter['drops'] == (89, 96) and fit_options(shorter, 5)['epochs'] == 1
    with pytest.raises(ValueError, match="'learning_rate'"): recipe('1x', DETECTION, learning_rate=1)


# --- the detector

def sample(size, n, seed=0):
    g = torch.Generator().manual_seed(seed)
    corner = (torch.rand(n, 2, generator=g) * torch.tensor([size[1] - 24., size[0] - 24.])).round()
    boxes, masks = torch.cat([corner, corner + 20], 1), torch.zeros(n, *size, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist()): mask[top:bottom, left:right] = 1
    return torch.randn(3, *size, generator=g), dict(boxes=boxes, labels=torch.randint(1, 11, (n,), generator=g),
                                                    masks=masks)

def test_losses_and_detections_are_torchvisions():
    torch.manual_seed(0)
    net = detector('test_local_vmamba', **SMALL, score=0.01)
    batch = [sample((64, 96), 3), sample((64, 96), 2, 1)]
    images, targets = map(list, zip(*batch))
    class Batch(torch.nn.Module):
        def forward(self, images, targets):
            return ImageList(torch.stack(images), [(64, 96)] * len(images)), targets
        def postprocess(self, found, *_): return found
    class Maps(torch.nn.Module):
        def forward(self, x): return net.features(x)
    heads, rpn = net.heads, net.rpn
    theirs = GeneralizedRCNN(Maps(),
                             RegionProposalNetwork(rpn.anchor_generator, rpn.head, 0.7, 0.3, 32, 0.5,
                                                   rpn._pre_nms_top_n, rpn._post_nms_top_n, 0.7),
                             RoIHeads(heads.box_roi_pool, heads.box_head[0], heads.box_predictor[0], 0.5, 0.5, 16,
                                      0.25, None, 0.01, 0.5, 100,
                                      heads.mask_roi_pool, heads.mask_head, heads.mask_predictor), Batch())
    torch.manual_seed(1)
    ours = net(images, targets)
    torch.manual_seed(1)
    names = {'loss_objectness': 'objectness', 'loss_rpn_box_reg': 'proposals', 'loss_classifier': 'classes',
             'loss_box_reg': 'boxes', 'loss_mask': 'masks'}
    for name, value in theirs.train()(images, targets).items(): torch.testing.assert_close(value, ours[names[name]])
    net.eval()
    theirs.eval()
    with torch.no_grad(): pairs = [(net([x])[0], theirs([x])[0]) for x in images]
    for a, b in pairs:
        assert len(b['boxes']) > 5
        for key in ('boxes', 'labels', 'scores', 'masks'): torch.testing.assert_close(a[key], b[key])

def test_anchors_are_torchvisions():
    maps = [torch.zeros(1, 1, 64 // s, 96 // s) for s in (4, 8, 16)]
    image = ImageList(torch.zeros(1, 3, 64, 96), [(64, 96)])
    theirs = AnchorGenerator(((32,), (64,), (128,)), ((0.5, 1.0, 2.0),) * 3)(image, maps)
    torch.testing.assert_close(Anchors((4, 8, 16))(image, maps)[0], theirs[0])
    last = Anchors((64,))(ImageList(torch.zeros(1, 3, 800, 1344), [(800, 1333)]),
                          [torch.zeros(1, 1, 13, 21)])[0].view(13, 21, 3, 4)
    assert (last[-1, -1].view(3, 2, 2).mean(1) == torch.tensor([20 * 64., 12 * 64.])).all()

def test_padding_by_hand_changes_nothing():
    for name in ('test_local_vmamba', 'test_local_vim'):
        torch.manual_seed(0)
        net, image = detector(name, **SMALL, score=0.0).eval(), torch.randn(3, 50, 70)
        padded = torch.nn.functional.pad(image, (0, -70 % net.divisor, 0, -50 % net.divisor))
        with torch.no_grad(): for_one, for_other = (net.once([x])[0][0] for x in (image, padded))
        with torch.no_grad():
            def room(x): return 0, padded.shape[2] - x.shape[2], 0, padded.shape[1] - x.shape[1]
            maps = [net.features(torch.nn.functional.pad(x, room(x))[None]) for x in (image, padded)]
        for a, b in zip(*(m.values() for m in maps)): assert torch.equal(a, b)
        assert for_one['boxes'][:, 2].max() <= 70 and for_other['boxes'].shape == for_one['boxes'].shape

@pytest.mark.parametrize('cascade', [False, True])
def test_alone_or_in_a_batch_and_call_after_call(cascade):
    torch.manual_seed(0)
    net = detector('test_local_vim', cascade=cascade, **SMALL, score=0.0).eval()
    one, other = torch.randn(3, 40, 60), torch.randn(3, 100, 70)
    with torch.no_grad(): first, (_, again), third = net([one])[0], net([other, one]), net([one])[0]
    for key in first: assert torch.equal(first[key], again[key]) and torch.equal(first[key], third[key])

def unscanned(seq, order, H, W): return seq[inverse_order(order)]
def unscanned_as_released(seq, order, H, W):
    return seq.view(H, W).t().flatten()  # the transposed map taken to be H by W

def by_columns(x, unscan):
    "A scan down the columns, the simplest there is: a running sum"
    H, W = x.shape
    order = scan_order('v', H, W)
    return unscan(x.flatten()[order].cumsum(0), order, H, W).view(H, W)

def check_not_square(unscan, H, W):
    x = torch.randn(H, W, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(by_columns(x, unscan), x.t().flatten().cumsum(0).view(W, H).t())

def test_the_released_unscan_fails_where_ours_does_not():
    for unscan in (unscanned, unscanned_as_released): check_not_square(unscan, 56, 56)
    check_not_square(unscanned, 50, 84)
    with pytest.raises(AssertionError): check_not_square(unscanned_as_released, 50, 84)

def test_maps_of_a_transposed_image_are_transposed():
    "Rows and columns swapped in image, scans, kernels: with a wrong un-scan of v this holds on square images only"
    torch.manual_seed(0)
    kwargs = dict(scattn='none')
    rows, columns = (timm.create_model('test_local_vmamba', directions=d, **kwargs).eval() for d
                     in (('h', 'v', 'h_flip', 'v_flip'), ('v', 'h', 'v_flip', 'h_flip')))
    state = {k: v.transpose(2, 3) if v.ndim == 4 else v for k, v in rows.state_dict().items()}
    for k, v in state.items():
        if k.endswith(('reduction.weight', 'downsample.norm.weight', 'downsample.norm.bias')):
            parts = v.chunk(4, -1)
            state[k] = torch.cat([parts[0], parts[2], parts[1], parts[3]], -1)
    columns.load_state_dict(columns.state_dict() | without_facts(state))
    x = torch.randn(1, 3, 40, 72)
    with torch.no_grad(): a, b = Backbone(rows).eval()(x), Backbone(columns).eval()(x.transpose(2, 3))
    for m, n in zip(a, b): torch.testing.assert_close(m, n.transpose(2, 3), atol=1e-5, rtol=1e-4)

@pytest.mark.parametrize('cascade', [False, True])
def test_a_batch_without_a_single_instance_trains(cascade):
    net = detector('test_local_vmamba', cascade=cascade, **SMALL)
    images, targets = map(list, zip(sample((48, 48), 0), sample((40, 64), 0)))
    losses = net(images, targets)
    sum(losses.values()).backward()
    assert all(v.isfinite() for v in losses.values()) and losses['masks'] == 0

@pytest.mark.parametrize('name, options',
                         [('local_vmamba', {}), ('local_vim', {}), ('resnet18', {}),
                          ('deit_tiny_patch16_224', dict(img_size=64, dynamic_img_size=True))])
def test_bf16_and_backbones_of_any_kind(name, options):
    net = detector(f'test_{name}' if name.startswith('local') else name, backbone=options, **SMALL)
    image, target = sample((70, 90), 2)
    with torch.autocast('cpu', torch.bfloat16): losses = net([image], [target])
    sum(losses.values()).backward()
    assert all(v.isfinite() and v.dtype == torch.float32 for v in losses.values())
    with torch.autocast('cpu', torch.bfloat16), torch.no_grad(): found, = net.eval()([image])
    assert found['boxes'].dtype == torch.float32

def test_batch_norms_of_a_backbone_keep_their_statistics():
    net = detector('resnet18', **SMALL)
    before = net.backbone.model.bn1.running_mean.clone()
    net.train()([sample((64, 64), 1)[0]], [sample((64, 64), 1)[1]])
    assert torch.equal(before, net.backbone.model.bn1.running_mean)

def test_cascade_scales():
    for iou, scale, weight in STAGES: assert scale[0] / scale[2] == 2 and scale[0] == scale[1]
    torch.manual_seed(0)
    net = detector('test_local_vmamba', cascade=True, **SMALL)
    boxes, deltas = [torch.tensor([[2., 3., 20., 30.]])], torch.randn(1, 8)
    torch.testing.assert_close(net.heads.coders[2].decode(deltas, boxes),
                               net.heads.box_coder.decode(deltas * (10 / 30), boxes))

def test_recomputing_changes_no_gradient():
    net, (image, target), gradients = detector('test_local_vim', **SMALL), sample((48, 64), 2), []
    for checkpointing in (False, True):
        net.set_grad_checkpointing(checkpointing)
        torch.manual_seed(0)
        gradients.append(torch.autograd.grad(sum(net([image], [target]).values()), list(net.backbone.parameters())))
    for a, b in zip(*gradients): torch.testing.assert_close(a, b)
    assert net.no_weight_decay() <= set(dict(net.named_parameters()))

def test_released_weights_arrive_and_other_checkpoints_are_refused(tmp_path):
    source = timm.create_model('test_local_vmamba')
    net = detector('test_local_vmamba', weights=to_released(source), **SMALL)
    assert torch.equal(net.backbone.model.layers[0].blocks[0].mixer.in_proj.weight,
                       source.layers[0].blocks[0].mixer.in_proj.weight)
    torch.save({'model': net.state_dict()}, tmp_path/'a.pt')
    with pytest.raises(ValueError, match='does not fit this detector'):
        load_detector(detector('test_local_vmamba', **SMALL | dict(num_classes=9)), tmp_path/'a.pt')
    load_detector(net, tmp_path/'a.pt')

@pytest.mark.parametrize('name, channels', [('test_local_vmamba', 1), ('test_local_vmamba', 4), ('test_local_vim', 13)])
def test_images_of_any_number_of_channels(name, channels):
    net = detector(name, backbone=dict(in_chans=channels), **SMALL).eval()
    image = np.random.default_rng(0).integers(0, 256, (40, 50, channels)).astype(np.uint8)
    found = predict(net, image, (64, 48))
    assert found['masks'].shape[1:] == (40, 50)
    if channels == 1: np.testing.assert_equal(predict(net, image[..., 0], (64, 48)), found)
    with pytest.raises(ValueError, match=rf'image: got shape .*; allowed: \(H, W, {channels}\)'):
        predict(net, image.repeat(2, 2))


def test_what_is_found_comes_back_to_the_size_of_the_image():
    found = dict(boxes=torch.tensor([[4., 8., 12., 16.]]), labels=torch.tensor([3]), scores=torch.tensor([.9]),
                 masks=torch.ones(1, 1, 28, 28))
    whole = restored(found, (20, 30), (40, 90))
    np.testing.assert_allclose(whole['boxes'], [[12, 16, 36, 32]])
    mask, = whole['masks']
    assert mask.shape == (40, 90) and mask[17:31, 13:35].all() and not mask[:14].any() and not mask[:, 40:].any()


# --- files

@pytest.fixture(scope='module')
def root(tmp_path_factory):
    return coco_scenes(8, 6, tmp_path_factory.mktemp('scenes'), size=(64, 80), n_digits=(2, 3), digit_size=(.5, .8))

@pytest.fixture
def changed(root, tmp_path):
    "The validation scenes with an annotation file that a function has changed"
    def apply(change, **kwargs):
        held = json.loads((root/'annotations/instances_val2017.json').read_text())
        change(held)
        (tmp_path/'a.json').write_text(json.dumps(held))
        return CocoFolder(root/'val2017', tmp_path/'a.json', 'changed', **kwargs)
    return apply

def test_masks_are_what_can_be_seen(root):
    for i, scene in enumerate(scenes(8, size=(64, 80), n_digits=(2, 3), digit_size=(.5, .8))):
        things = coco_instances(root)[i][1]
        np.testing.assert_array_equal(things['masks'].astype(bool), scene.masks[scene.masks.any((1, 2))])
        assert things['masks'].sum(0).max() <= 1

def test_truth_as_predictions_is_perfect(root, changed):
    assert {v for v in average_precision(coco_instances(root), truth_as_results(coco_instances(root)))[0].values()
            if v is not None} == {100.}
    def crowd(held): held['annotations'][1]['iscrowd'] = 1
    crowded = changed(crowd)
    for said in (truth_as_results(crowded), truth_as_results(coco_instances(root, 'validation'))):
        assert average_precision(crowded, json.loads(json.dumps(said)))[0]['AP_box'] == 100.

def test_every_way_to_write_a_mask_is_read(changed):
    def box(held):
        a = held['annotations'][0]
        a |= {'bbox': [10, 5, 20, 30], 'area': 600, 'segmentation': [[10, 5, 30, 5, 30, 35, 10, 35]]}
    polygon = changed(box)[0][1]['masks'][0]
    def runs(held):
        box(held)
        flat = polygon.T.flatten()
        lengths = np.diff(np.flatnonzero(np.diff(np.concatenate([[1 - 0], flat, [2]]))))
        counts, last, n = [], 0, 0
        for v in flat:
            if v != last: counts, last, n = [*counts, n], v, 0
            n += 1
        held['annotations'][0]['segmentation'] = {'size': [64, 80], 'counts': [int(c) for c in [*counts, n]]}
        assert len(lengths)
    np.testing.assert_array_equal(changed(runs)[0][1]['masks'][0], polygon)
    assert polygon[5:35, 10:30].all() and polygon.sum() == 600

def test_crowds_empty_images_and_boxes_without_area(changed):
    def crowds(held):
        for a in held['annotations']: a['iscrowd'] = int(a['image_id'] == 1)
    def none(held): held['annotations'] = [a for a in held['annotations'] if a['image_id'] != 2]
    def flat(held): held['annotations'][0]['bbox'][3], held['annotations'][1]['area'] = 0, 0
    def outside(held): held['annotations'][0]['bbox'] = [-30., 5., 20., 10.]
    def over(held): held['annotations'][0]['bbox'] = [-5., 5., 500., 10.]
    crowded = changed(crowds)
    assert len(crowded.with_instances()) == 5 and not len(as_target(crowded[0][1] | dict(size=(64, 80)))['boxes'])
    empty = changed(none)
    assert len(empty) == 6 and len(empty.with_instances()) == 5
    assert empty[1][1]['boxes'].shape == (0, 4) and empty[1][1]['masks'].shape == (0, 64, 80)
    assert average_precision(empty,
                             as_results(2, [[1, 1, 9, 9]], [1], [1.], np.ones((1, 64, 80)),
                                        empty.category_ids))[0]['AP_box'] == 0.
    assert '2 instances of zero area left out' in repr(changed(flat))
    assert '1 instances of zero area' in repr(changed(outside))
    assert changed(over)[0][1]['boxes'][0].tolist() == [0., 5., 80., 15.]

def test_missing_and_damaged_files(changed, root, tmp_path):
    def more(held):
        held['images'] += [{'id': 90 + i, 'file_name': f'gone{i}.jpg', 'height': 9, 'width': 9} for i in range(7)]
    with pytest.raises(FileNotFoundError, match='7 of 13 .* not in .*gone0.jpg, .*…; allowed: with skip_missing=True'):
        changed(more)
    left = changed(more, skip_missing=True)
    assert '7 missing images left out' in repr(left) and len(left) == 6
    for content, words in (('{', 'not JSON'), ('[]', r'"images": got \[\]; allowed: a list in a dictionary'),
                           ('{"images": [{"id": 1}]}', 'image 1: file_name: got nothing')):
        (tmp_path/'b.json').write_text(content)
        with pytest.raises(ValueError, match=words): CocoFolder(root/'val2017', tmp_path/'b.json')
    with pytest.raises(FileNotFoundError, match='does not exist'): coco_instances(tmp_path)
    with pytest.raises(ValueError, match="split: got 'test'"): coco_instances(root, 'test')
    copied = shutil.copytree(root, tmp_path/'set')
    (copied/'val2017/000000000003.jpg').write_bytes(b'')
    valid = coco_instances(copied, 'validation')
    with pytest.raises(ValueError, match='corrupt image: .*000000000003.jpg'): valid[2]
    with pytest.raises(ValueError, match='corrupt image: '): list(DetectionLoader(valid, 1, 0, EvalTransform(None)))
    assert len(valid.readable()) == 5

@pytest.mark.parametrize('change, words',
                         [(lambda a: a.update(image_id=99), 'image_id: got 99'),
                          (lambda a: a.update(category_id=99), 'category_id: got 99'),
                                           (lambda a: a.update(bbox=[1, 2, np.nan, 3]), 'annotation 1: bbox: got'),
                                           (lambda a: a.update(id=2), 'id: got 2 more than once; allowed: each once'),
                                           (lambda a: a.pop('bbox'), 'annotation 1: bbox: got nothing'),
                                           (lambda a: a.update(segmentation=''), "segmentation: got ''; allowed: poly"),
                                           (lambda a: a.update(segmentation=[[1, 2, 3, 4]]),
                                            r"segmentation: got \[\[1, 2, 3, 4\]\]; allowed: polygons of three"),
                                           (lambda a: a.update(segmentation='x' * 99), "got 'x{59}…; allowed: lists")])
def test_annotations_that_make_no_sense(changed, change, words):
    with pytest.raises(ValueError, match=words): changed(lambda held: change(held['annotations'][0]))

@pytest.mark.parametrize('shift', [20220101120000000, 2 ** 62])
def test_ids_beyond_what_a_float_can_hold(changed, shift):
    def results(held): return [r | {'score': .1 + .1 * (i % 7)} for i, r in enumerate(truth_as_results(held)) if i % 3]
    def further(held):
        for entry in held['images']: entry['id'] += shift
        for a in held['annotations']: a['image_id'], a['id'] = a['image_id'] + shift, a['id'] + shift
    plain, far = changed(lambda held: None), changed(further)
    scored = average_precision(plain, results(plain))[0]
    assert scored == average_precision(far, results(far))[0] and 0 < scored['AP_box'] < 100
    with pytest.raises(ValueError, match='id: got .*; allowed: a whole number of 64 bits'):
        changed(lambda held: held['images'][0].update(id=2 ** 64))

def test_files_that_an_entry_names_are_read_whatever_they_are_called(root, tmp_path, capsys):
    home = shutil.copytree(root, tmp_path/'set')
    held = json.loads((home/'annotations/instances_val2017.json').read_text())
    for entry, name in zip(held['images'], ('.hidden.jpg', 'plain', 'a.bin')):
        (home/'val2017'/entry['file_name']).rename(home/'val2017'/name)
        entry['file_name'] = name
    (home/'val2017/notes.txt').touch()
    (home/'annotations/instances_val2017.json').write_text(json.dumps(held))
    named, plain = coco_instances(home, 'validation'), coco_instances(root, 'validation')
    for i in range(6): np.testing.assert_array_equal(named[i][0], plain[i][0])
    assert '1 files left out: 1 of another kind (.txt)' in capsys.readouterr().out

def test_nothing_to_judge_by_is_said_before_training(root, changed):
    train, settings = coco_instances(root), recipe('scenes', DETECTION)
    def crowds(held):
        for a in held['annotations']: a['iscrowd'] = 1
    for change in (crowds, lambda held: held['annotations'].clear()):
        with pytest.raises(ValueError, match='valid: got no instance in changed, so nothing to judge by'):
            loaders(train, changed(change), settings)

def test_an_instance_on_a_line_is_drawn():
    mask = np.arange(40)[None, :, None] < 9
    things = dict(boxes=np.array([[0, 0, 1, 9]]), labels=[1], masks=mask)
    plot_instances([np.zeros((40, 1, 3), np.uint8)], {'truth': [things]}, ['a'])

def test_small_and_large_masks_are_told_by_their_own_area(root):
    "A thin diagonal has a large box and a small mask"
    class One:
        categories, name, label, masks = [{'id': 1, 'name': 'line'}], 'one', {1: 1}, True
        mask = np.eye(64, 80, dtype=np.uint8)
        entries = [({'id': 1, 'file_name': '', 'height': 64, 'width': 80},
                    [{'id': 1, 'image_id': 1, 'category_id': 1, 'bbox': [0, 0, 64, 64], 'area': 64.,
                      'segmentation': rle.encode(np.asfortranarray(mask))}])]
    said = as_results(1, [[0, 0, 64, 64]] * 2, [1, 1], [.9, .8], [One.mask, np.zeros_like(One.mask)], [1])
    scores, _ = average_precision(One, said)
    assert scores['APs_mask'] == 100. and scores['APm_mask'] is None

def test_results_are_json_of_cocos_form(root):
    valid = coco_instances(root, 'validation')
    net = detector('test_local_vmamba', **SMALL, score=0.0).eval()
    results, seconds = evaluate(net, valid.take([0]), limits=None)
    assert seconds > 0 and json.loads(json.dumps(results)) == results
    assert set(results[0]) == {'image_id', 'category_id', 'score', 'bbox',
                               'segmentation'} and rle.decode(results[0]['segmentation']).shape == (64, 80)
    average_precision(valid.take([0]), results)
    with pytest.raises(ValueError, match=r'results\[0\]: image_id: got 1; allowed: an image of'):
        average_precision(valid.take([1]), results)
    with pytest.raises(ValueError, match='training mode'): predict(net.train(), valid[0][0], None)


# --- samples

def test_samples_are_the_same_whoever_makes_them(root):
    train, settings = coco_instances(root), recipe('scenes', DETECTION, iterations=6, batch_size=4)
    settings |= dict(every=3, mirror=0.5, augment='jitter', limits=(96, 96))
    def passes(n, start=0, **kwargs):
        loader = loaders(train, train, settings, seed=5, device='cpu', **kwargs).train
        loader.load_state_dict(dict(seed=5, epoch=start))
        return [(torch.cat([x.flatten() for x in images]), torch.cat([t['boxes'] for t in targets])) for _
                in range(n) for images, targets, _ in loader]
    whole = passes(2)
    for other in (passes(1) + passes(1, 1), passes(2, workers=1)):
        for a, b in zip(whole, other, strict=True): assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    loader = DetectionLoader(train, 2, 1, EvalTransform(None))
    next(iter(loader))
    assert all(name.endswith('.jpg') for name in loader.batch_names(0))
    halves = [passes(2, rank=r, world=2) for r in range(2)]
    assert torch.equal(whole[0][1].sort(0)[0], torch.cat([h[0][1] for h in halves]).sort(0)[0])

def test_a_crop_without_instances_is_a_sample():
    things = dict(boxes=np.array([[0, 0, 4, 4]], np.float32), labels=np.array([1]),
                  masks=np.zeros((1, 300, 300), np.uint8), crowd=np.array([False]), image_id=1)
    things['masks'][0, :4, :4] = 1
    targets = [TrainTransform('jitter', (32, 32))(np.zeros((300, 300, 3), np.uint8), things,
                                                  np.random.default_rng(i))[1] for i in range(20)]
    assert any(len(t['boxes']) == 0 for t in targets) and all(t['masks'].shape[1:].numel() <= 32 * 32 for t in targets)

def test_wrong_words():
    with pytest.raises(ValueError, match="augment: got 'crop'"): TrainTransform('crop')
    with pytest.raises(ValueError, match='num_classes: got 0'): detector('test_local_vim', 0)
    with pytest.raises(ValueError, match="recipe: got 'paper'"): recipe('paper', DETECTION)


@pytest.mark.parametrize('augment, name, cascade', [('resize', 'test_local_vim', False),
                                                    ('jitter', 'test_local_vmamba', True)])
def test_boxes_alone_are_learnt_and_judged(root, tmp_path, augment, name, cascade):
    "Files of another labelling tool: no segmentation, ids from 0, an image without anything, one box at the edge"
    home = shutil.copytree(root, tmp_path/'set')
    for path in (home/'annotations').glob('*.json'):
        held = json.loads(path.read_text())
        for i, a in enumerate(held['annotations']): a['id'] = i; del a['segmentation'], a['area'], a['iscrowd']
        held['annotations'][0]['bbox'] = [70, 50, 20, 20]
        held['annotations'] = [a for a in held['annotations'] if a['image_id'] != 2]
        path.write_text(json.dumps(held))
    with pytest.raises(ValueError, match='masks=False reads boxes alone'): coco_instances(home)
    train, valid = (coco_instances(home, split, masks=False) for split in ('training', 'validation'))
    settings = recipe('scenes', DETECTION, iterations=2, every=1, batch_size=2, augment=augment, limits=(64, 48),
                      warmup=0)
    def build(): return detector(name, 10, masks=False, cascade=cascade, channels=8, width=16, proposals=30,
                                 samples=(32, 16), anchor_scale=4)
    with pytest.raises(ValueError, match='valid: got masks=True'): loaders(train, coco_instances(root), settings)
    metrics, history = fit(build, loaders(train, valid, settings, device='cpu'), seed=1,
                           **fit_options(settings, len(train)))
    assert {k for k in metrics if 'mask' in k} == set() and np.isfinite(metrics['train_boxes'])
    assert metrics['AP_box'] is not None and len(history) == 2
    net = build().eval()
    assert not any('mask' in k for k in net.state_dict())
    found = evaluate(net, valid.take([0]), limits=None)[0]
    assert 'AP_mask' not in average_precision(valid, found)[0] and 'segmentation' not in (found or [{}])[0]
    plot_instances([valid[0][0]], {'truth': [valid[0][1]]}, valid.classes)
    assert len(net.eval()([torch.zeros(3, 64, 64)])) == 1 and count_flops(Counted(net), (64, 64)) > 0
    whole = detector('test_local_vmamba', **SMALL)
    image, target = sample((48, 48), 1)
    del target['masks']
    with pytest.raises(ValueError, match='targets: got no masks'): whole([image], [target])


@pytest.mark.parametrize('names, words', [(lambda c: (*c[:-1], 'zebra'), '9, zebra'),
                                          (lambda c: c[::-1], 'another order')])
def test_every_task_is_judged_on_the_classes_it_learns(names, words):
    from localmamba import detect, photos, segment
    train, valid = (SimpleNamespace(name=name, classes=tuple('0123456789')) for name in ('mine', 'yours'))
    valid.classes = names(valid.classes)
    for call in (lambda: detect.loaders(train, valid, {}), lambda: segment.loaders(train, valid, {}),
                 lambda: photos.photo_loaders(train, valid, 2, (None, None))):
        with pytest.raises(ValueError, match=f'got yours, with other classes than mine: .*{words}; allowed: '): call()


# --- the experiment

TINY = dict(n_train=8, n_valid=4, iterations=4, every=2, batch_size=2, channels=8, width=16, model='test_local_vmamba',
            model_options={}, panels=2)

def test_experiment_trains_then_evaluates_the_checkpoint_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(project(tmp_path))
    said_by(papermill(tmp_path, 'coco', '-y', json.dumps(TINY)))
    results = tmp_path/'results/coco/scenes'
    run, = (results/'runs').iterdir()
    assert {f.name for f in run.iterdir()} == {'params.json', 'env.json', 'history.csv', 'metrics.json', 'weights.pt',
                                               'results.json', 'precision_recall.csv', 'speed.csv'}
    history, table = pd.read_csv(run/'history.csv'), pd.read_csv(results/'table.csv')
    assert len(history) == 2 and {'train_objectness', 'valid_masks', 'AP_box', 'APs_mask'} <= set(history)
    assert np.allclose(history.train_loss,
                       history[[f'train_{k}' for k in ('objectness', 'proposals', 'classes', 'boxes',
                                                       'masks')]].sum(axis=1))
    assert table.AP_box.notna().all() and table.seconds_an_image[0] > 0 and table.steps[0] == 4
    assert all((results/f'{name}.png').stat().st_size > 5000 for name
               in ('curves', 'losses', 'predictions', 'precision_recall'))
    rendered, = (tmp_path/'data').glob('scenes_coco-*')
    execute('coco', **TINY, checkpoint=str(run/'weights.pt'), data_dir=str(rendered), row='LocalVMamba-T', table='1x')
    judged = pd.read_csv(tmp_path/'results/coco/coco/table.csv')
    assert judged.paper_AP_box.tolist() == [46.7] and judged.AP_box[0] == pytest.approx(table.AP_box[0], abs=1e-3)
    assert Image.open(tmp_path/'results/coco/coco/predictions.png').size[0] > 300
