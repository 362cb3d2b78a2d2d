"The weights that come with the package: their card, their record, and what they reach."
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.models import PretrainedCfg
from torch.testing import assert_close

import localmamba.classify  # noqa: F401 (names of both families for timm)
from localmamba.models.bundled import (
    bundled_cards, bundled_cfgs, bundled_folder, bundled_options, card_text, write_bundled)
from localmamba.models.localvmamba import local_vmamba_nano

ROOT = Path(__file__).parent.parent
CARDS = bundled_cards()
NANO = dict(dims=(8, 16), depths=(1, 1), d_state=1, patch_size=4)


@pytest.fixture
def own(tmp_path, monkeypatch):
    "Weights of an untrained model in a folder that stands for the package's; the model."
    torch.manual_seed(0)
    net = timm.create_model('local_vmamba_nano', num_classes=10, **NANO).eval()
    card = dict(model_options=NANO, mean=[.1, .2, .3], std=[.4, .5, .6], classes=list('0123456789'), top1=10.)
    write_bundled('local_vmamba_nano.mine', net.state_dict(), card, tmp_path)
    monkeypatch.setattr('localmamba.models.bundled.bundled_folder', lambda: tmp_path)
    return net


def test_the_card_gives_the_architecture(own):
    assert bundled_options('local_vmamba_nano', False, dict(pretrained_cfg='mine')) == NANO
    assert bundled_options('local_vmamba_nano', True, {}) == NANO
    assert bundled_options('local_vmamba_nano', False, {}) == {}
    assert bundled_options('local_vmamba_nano', True, dict(pretrained_cfg_overlay=dict(file='x'))) == {}
    assert bundled_options('local_vim_nano', True, {}) == {}


def test_written_weights_are_read_by_timm(own, tmp_path):
    file = tmp_path/'local_vmamba_nano.mine.safetensors'
    net = timm.create_model('local_vmamba_nano', pretrained=True, pretrained_cfg_overlay=dict(file=str(file)), **NANO)
    x = torch.randn(2, 3, 32, 32)
    assert_close(net.eval()(x), own(x))
    assert '10' in (tmp_path/'local_vmamba_nano.mine.md').read_text()


def test_at_most_four_megabytes():
    assert sum(path.stat().st_size for path in bundled_folder().glob('*')) <= 4e6


@pytest.mark.parametrize('name', CARDS)
def test_a_card_says_what_its_record_says(name):
    card = CARDS[name]
    record = json.loads((ROOT/'results'/card['run']/'metrics.json').read_text())
    assert card['top1'] == record['top1'] and card['params_m'] == record['params_m'] < 1
    params = json.loads((ROOT/'results'/card['run']/'params.json').read_text())
    assert params['model'] == name.split('.')[0] and params['model_options'] == card['model_options']


@pytest.mark.parametrize('name', CARDS)
def test_the_card_to_be_read_is_that_of_the_weights(name):
    assert (bundled_folder()/f'{name}.md').read_text() == card_text(name, CARDS[name])


@pytest.mark.parametrize('name', CARDS)
def test_timm_gives_weights_and_preprocessing(name):
    net, card = timm.create_model(name, pretrained=True).eval(), CARDS[name]
    assert [list(m.directions) for m in net.mixers] == card['directions']
    transform = timm.data.create_transform(**timm.data.resolve_data_config(net.pretrained_cfg, model=net))
    x = transform(Image.new('RGB', (32, 32), (255, 0, 0)))
    assert_close(x[:, 5, 5], (torch.tensor([1., 0., 0.]) - torch.tensor(card['mean'])) / torch.tensor(card['std']))
    fresh = timm.create_model(name).eval()
    assert fresh.state_dict().keys() == net.state_dict().keys()
    assert timm.create_model(name, pretrained=True, num_classes=3)(x[None]).shape == (1, 3)


@pytest.mark.parametrize('name', CARDS)
def test_one_changed_bit_is_refused(name, tmp_path):
    whole, file = (bundled_folder()/f'{name}.safetensors').read_bytes(), tmp_path/f'{name}.safetensors'
    header, variant = 8 + int.from_bytes(whole[:8], 'little'), name.split('.')[0]
    overlay, options = dict(file=str(file)), bundled_options(variant, True, {})
    file.write_bytes(whole)
    timm.create_model(variant, pretrained=True, pretrained_cfg_overlay=overlay, **options)
    for at in [header, len(whole) - 5, *np.random.default_rng(0).integers(header, len(whole), 3)]:
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1:])
        with pytest.raises(ValueError, match=f'{name}.safetensors, which is damaged .its tensors are not those of its'):
            timm.create_model(variant, pretrained=True, pretrained_cfg_overlay=overlay, **options)


def test_a_changed_bit_is_refused_when_a_model_is_asked_for_by_its_tag(own, tmp_path, monkeypatch):
    file = tmp_path/'local_vmamba_nano.mine.safetensors'
    cfgs = bundled_cfgs('local_vmamba_nano')
    monkeypatch.setattr('timm.models._builder.get_pretrained_cfg', lambda name: PretrainedCfg(**cfgs[name]))
    x = torch.randn(2, 3, 32, 32)
    assert_close(local_vmamba_nano(pretrained=True, pretrained_cfg='mine').eval()(x), own(x))
    whole = file.read_bytes()
    file.write_bytes(whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:])
    with pytest.raises(ValueError, match='mine.safetensors, which is damaged'):
        local_vmamba_nano(pretrained=True, pretrained_cfg='mine')


@pytest.mark.parametrize('name', CARDS)
def test_accuracy_on_500_test_images(name):
    from localmamba.memory import cifar10
    try: _, valid = cifar10(n_train=10, n_valid=500, download=False)
    except FileNotFoundError: pytest.skip('CIFAR-10 is not at hand')
    net = timm.create_model(name, pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config(net.pretrained_cfg, model=net))
    x = torch.stack([transform(Image.fromarray(image)) for image in valid.images])
    with torch.no_grad(): right = (net(x).argmax(1) == torch.as_tensor(valid.labels)).double().mean().item() * 100
    error = (CARDS[name]['top1'] * (100 - CARDS[name]['top1']) / 500) ** .5  # of a share of 500 images
    assert abs(right - CARDS[name]['top1']) < 3.3 * error, right


def test_a_build_carries_them(tmp_path):
    source = (ROOT/'setup.py').read_text()
    assert "package_data={'localmamba': ['bundled/*']}" in source
