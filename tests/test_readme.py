"What the README and the notebooks say about files and numbers."
import json
import re
from pathlib import Path

import pandas as pd
import pytest

from localmamba.figures import show_table

ROOT = Path(__file__).parent.parent
PAGES = [ROOT/'README.md', *ROOT.glob('*/README.md'), *sorted((ROOT/'nbs').glob('*.ipynb'))]
ACCURACY = dict(names={'params_m': 'params (M)', 'flops_m_nine': 'MFLOPs', 'top1': 'top-1 (%)', 'paper_top1': 'paper, ImageNet (%)',
                       'seconds_with_search': 'with search (s)'},
                digits={'params_m': 3, 'flops_m_nine': 2, 'paper_top1': 1, 'epochs': 0, 'seconds': 0, 'seconds_with_search': 0})
SHOWN = {  # experiment: columns of its table in the README, and how
    'ablation_scan': (['row', 'directions', 'params_m', 'flops_m_nine', 'top1_mean', 'top1_std', 'seeds', 'paper_top1'], ACCURACY),
    'ablation_search': (['row', 'epochs', 'top1_mean', 'top1_std', 'seeds', 'runs', 'seconds', 'seconds_with_search'], ACCURACY),
    'throughput': (['claim', 'target', 'measured'], dict(quoted=(), digits=2))}


def text(page):
    if page.suffix == '.md': return page.read_text()
    return '\n'.join(''.join(c['source']) for c in json.loads(page.read_text())['cells'] if c['cell_type'] == 'markdown')


def results_table(path):
    columns, how = SHOWN[path.relative_to(ROOT).parts[1]]
    return show_table(pd.read_csv(path)[columns], **how).markdown()


@pytest.mark.parametrize('page', PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_relative_links_resolve(page):
    for target in re.findall(r'\]\(([^)#\s]+)', text(page)):
        if '://' not in target: assert (page.parent/target).exists(), target


def test_tables_in_the_readme_are_the_recorded_ones():
    readme = (ROOT/'README.md').read_text()
    blocks = re.findall(r'<!-- (results/\S+\.csv) -->\n(.*?)\n<!-- end -->', readme, re.S)
    assert blocks
    for path, shown in blocks: assert shown.strip() == results_table(ROOT/path).strip()
