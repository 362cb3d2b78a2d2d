"What the README and the notebooks say about files; its tables are tested in `test_results`."
import json
import re
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).parent.parent
SPEEDRUN = ROOT/'results/speedrun/README.md'
PAGES = [ROOT/'README.md', SPEEDRUN, *ROOT.glob('*/README.md'), *sorted((ROOT/'nbs').rglob('*.ipynb'))]


def text(page):
    if page.suffix == '.md': return page.read_text()
    cells = json.loads(page.read_text())['cells']
    return '\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')


@pytest.mark.parametrize('page', PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_relative_links_resolve(page):
    for target in re.findall(r'\]\(([^)#\s]+)', text(page)):
        if '://' not in target: assert (page.parent/target).exists(), target


RECORDS = [line for line in SPEEDRUN.read_text().splitlines() if '[record](' in line]


@pytest.mark.parametrize('line', RECORDS, ids=lambda line: line.split('runs/')[1].rstrip(') |'))
def test_the_record_book_says_what_the_records_say(line):
    *_, epochs, top1, params_m, seconds, _, commit, log = (cell.strip('* ') for cell in line.strip('|').split('|'))
    run = SPEEDRUN.parent/re.search(r'\((.+)\)', log)[1]
    metrics, params, env = (json.loads((run/f'{name}.json').read_text()) for name in ('metrics', 'params', 'env'))
    assert env['git_commit'].startswith(commit.split(',')[0]) and ('changed' in commit) == env['git_dirty']
    said = epochs, top1.split()[0].strip('*'), params_m.split()[0], re.match(r'[0-9,]*[0-9]', seconds)[0]
    assert said == (str(params['epochs']), f"{metrics['top1']:.2f}", f"{metrics['params_m']:.3f}",
                    f"{metrics['seconds']:,.0f}")


def test_the_readme_quotes_the_record_book():
    quoted = [line for line in RECORDS if 'the bundled' in line or '`speedrun.yaml`' in line]
    assert len(quoted) == 3
    for line in quoted: assert f"{float(re.search(r'([0-9.]+) %', line)[1]):.1f} %" in text(ROOT/'README.md')


def test_the_readme_quotes_the_main_experiment():
    "What it says `make ablation_scan` decides is what the stored notebook shows."
    cells = json.loads((ROOT/'nbs/ablation_scan.ipynb').read_text())['cells']
    outputs = [output for cell in cells for output in cell.get('outputs', [])]
    seen = ' '.join(''.join(output.get('data', {}).get('text/plain', '')) for output in outputs)
    change, low, high = map(float, re.search(r'^ *no scan − cross +(\S+) +(\S+) +(\S+)', seen, re.M).groups())
    said = f'{-change:.1f} points, {-high:+.1f} to {-low:+.1f}'.replace('-', '−')
    rows = 'cross', 'cross, no convolution'
    with_it, without = (re.search(rf'^ *{row} +none .* (\S+) ± ', seen, re.M)[1] for row in rows)
    page = ' '.join(text(ROOT/'README.md').split())
    assert f'({said})' in page and f'({float(without):.0f} against {float(with_it):.0f} %' in page


def test_the_readme_counts_the_verdicts():
    claims = pd.read_csv(ROOT/'results/miniature/claims.csv')
    count = claims.verdict.value_counts()
    readme = ' '.join(text(ROOT/'README.md').split())
    left = sum((claims.stage > 1) | (claims.verdict == 'not decided'))
    assert f'over all {len(claims)} claims' in readme and f'over the {left} that two passes left open' in readme
    assert (f'{count["holds"]} claims hold, {count["contradicted"]} are contradicted, '
            f'{count["no difference above 1 point"]} show no difference above 1 point, and {count["not decided"]} stay '
            f'open: at most {len(claims) // 4} were to') in readme
