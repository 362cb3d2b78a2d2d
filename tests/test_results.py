"results.ipynb: the README out of the records without a difference, and what it says where there are none."
import json
import re
import shutil

import matplotlib
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from localmamba.miniature import forecast
from localmamba.study import VERDICTS, said
from notebooks import ROOT, execute

matplotlib.use('Agg')

@pytest.fixture
def records(tmp_path):
    "A copy of what the page reads and writes."
    left_out = shutil.ignore_patterns('digits', 'scenes', '*.pt', 'executed.ipynb')
    shutil.copytree(ROOT/'results', tmp_path/'results', ignore=left_out)
    shutil.copy(ROOT/'README.md', tmp_path)
    return tmp_path


def median_seconds(runs, row):
    "What a training of a row took, from its files."
    own = [path for path in runs.glob('*/params.json') if json.loads(path.read_text())['row'] == row]
    return np.median([json.loads(path.with_name('metrics.json').read_text())['seconds'] for path in own])


def test_the_readme_is_made_from_the_records(records, monkeypatch):
    pictures = [path for path in (records/'results').rglob('*.png')]
    before = {path: np.asarray(Image.open(path).convert('RGB'), int) for path in pictures}
    block = '<!-- results/miniature/claims.csv -->\n'
    readme = (records/'README.md').read_text()
    (records/'README.md').write_text(readme.replace(block, f'{block}| an old table |\n'))
    text, space = execute('results', root=str(records))
    assert space['changed'] == ['results/miniature/claims.csv'] and space['there'] == space['names']
    assert (records/'README.md').read_text() == readme
    for path, picture in before.items():
        after = np.asarray(Image.open(path).convert('RGB'), int)
        assert after.shape == picture.shape and abs(after - picture).mean() < 1, path.name
    assert set(space['page'].verdict) <= {'holds', 'contradicted'} and len(space['page']) >= 7
    gates = space['page'].set_index('claim').loc['SCAttn gates channels and tokens']
    assert gates.verdict == 'contradicted' and gates.found.endswith('channels and tokens: 0')
    assert list(space['fields']) == ['Vim', 'LocalVim', 'VMamba', 'LocalVMamba', 'DeiT']
    assert set(space['miniature'].verdict) <= set(VERDICTS)
    assert space['miniature'].claim.is_unique, 'no claim has two verdicts'
    assert (records/'results/miniature/claims.csv').exists()
    undecided = space['miniature'][space['miniature'].verdict == 'not decided']
    assert list(space['left'].claim) == list(undecided.claim) and (space['left'].needed > space['left'].pairs).all()
    assert f'{len(undecided)} of {len(space["miniature"])} claims are not decided' in text
    tried = space['tried']
    assert list(tried.stage) == ['pilot', '1', '2', '3'] and tried['open after it'].iloc[-1] == len(undecided)
    assert tried['open after it'].is_monotonic_decreasing
    spent = sum(line['hours_done'] for line in forecast(root=ROOT))
    assert tried['core-hours'][1:].sum() == pytest.approx(spent, abs=.3), 'as `make miniature` counts'
    minutes = space['left'].set_index('claim')['minutes a pair']['LocalVim beats Vim']
    families = records/'results/families/miniature/runs'
    assert minutes == pytest.approx(sum(median_seconds(families, row) for row in ('LocalVim', 'Vim')) / 60)
    assert 'contradicted' in set(space['miniature'].verdict) and 'Windows of 2×2 beat rows' in text
    for call in (call for calls in space['DECIDING'].values() for call in calls):
        assert (ROOT/re.search(r'-f (\S+)', call)[1]).exists(), call
    assert set(space['DECIDING']) == set(space['miniature'].experiment)
    assert '**53.53 ± 0.48**' in text and '**76.20**' in text, 'the best of what was measured, and of what is quoted'
    assert 'cross measured' in text.replace('  ', ' ') and 'd5fd3223' in text


def test_no_records_say_what_to_run(tmp_path, monkeypatch):
    text, space = execute('results', root=str(tmp_path))
    for experiment in space['TO_RUN']:
        assert f'| {experiment} |' in text and f'nothing: run `make {experiment}`' in text, experiment
    assert 'configs/ablation_scan/miniature.yaml' in text
    assert set(space['miniature'].verdict) == {'no record'}
    assert space['there'] == [] and not (tmp_path/'README.md').exists()


def test_the_tour_runs_and_writes_nothing(monkeypatch):
    def state(): return {p: p.stat().st_mtime_ns for p in (ROOT/'results').glob('*.*')}
    before = state()
    monkeypatch.chdir(ROOT/'nbs')
    text, _ = execute('index')
    assert 'torch.Size([1, 10])' in text and 'horizontal + local' in text and state() == before


def test_every_experiment_is_on_the_page():
    cells = json.loads((ROOT/'nbs/results.ipynb').read_text())['cells']
    source = ''.join(''.join(cell['source']) for cell in cells)
    for path in (ROOT/'nbs').glob('[a-z]*.ipynb'):
        if path.stem in ('index', 'results', 'try_it', 'gpu'): continue  # gpu's page is results/gpu/<device>/README.md
        assert f"'{path.stem}': (" in source, path.stem
        configs = sorted((ROOT/'nbs/configs'/path.stem).glob('*.yaml'))
        if configs: assert any(f"'{config.stem}'" in source for config in configs), path.stem


def notebooks(): return sorted((ROOT/'nbs').rglob('*.ipynb'))

@pytest.mark.parametrize('path', notebooks(), ids=lambda path: path.stem)
def test_a_notebook_can_be_read_on_a_page(path):
    assert path.stat().st_size <= 700 * 1024, f'{path.stat().st_size:,} bytes'
    for cell in json.loads(path.read_text())['cells']:
        if cell['cell_type'] != 'code': continue
        assert len(''.join(cell['source']).splitlines()) <= 60, ''.join(cell['source'])[:200]
        for output in cell['outputs']:
            kinds = set(output.get('data', {}))
            widget = any('widget' in kind for kind in kinds)
            assert not widget or kinds & {'image/png', 'text/html'}, 'a cell that shows nothing without widgets'


def stored(path):
    "What a reader of a notebook sees without running it."
    outputs = [output for cell in json.loads(path.read_text())['cells'] for output in cell.get('outputs', [])]
    texts = [''.join(output.get('data', {}).get('text/plain', '')) for output in outputs]
    return ' '.join('\n'.join(texts).split())


SHOWS_VERDICTS = [path for path in notebooks() if "show_verdicts(verdicts('miniature'" in path.read_text()]

@pytest.mark.parametrize('name', ['index', 'results', *(path.stem for path in SHOWS_VERDICTS)])
def test_a_notebook_shows_the_verdicts_of_today(name):
    claims = pd.read_csv(ROOT/'results/miniature/claims.csv')
    own = claims if name in ('index', 'results') else claims[claims.experiment == name]
    seen = stored(ROOT/f'nbs/{name}.ipynb')
    assert len(own) and len(SHOWS_VERDICTS) == claims.experiment.nunique()
    for _, line in own.iterrows(): assert f'{said(line)} {line.verdict}' in seen, line.claim


@pytest.mark.parametrize('name', ('index', 'results'))
def test_a_notebook_shows_the_rows_of_today(name):
    for _, line in pd.read_csv(ROOT/'results/miniature/ablation_scan.csv').iterrows():
        assert f'{line.top1_mean:.2f} ± {line.top1_std:.2f} {line.seeds}' in stored(ROOT/f'nbs/{name}.ipynb'), line.row


def test_links_to_headings_of_the_readme_resolve():
    text = (ROOT/'README.md').read_text()
    headings = [line.lstrip('# ').lower() for line in text.splitlines() if line.startswith('#')]
    headings = [re.sub(r'[^\w\- ]', '', heading).replace(' ', '-') for heading in headings]
    for heading in re.findall(r'\]\(#([^)]+)\)', text): assert heading in headings, heading
