"What the README and the notebooks say about files; its tables are tested in `test_results`."
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT/'README.md', *ROOT.glob('*/README.md'), *sorted((ROOT/'nbs').rglob('*.ipynb'))]


def text(page):
    if page.suffix == '.md': return page.read_text()
    cells = json.loads(page.read_text())['cells']
    return '\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')


@pytest.mark.parametrize('page', PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_relative_links_resolve(page):
    for target in re.findall(r'\]\(([^)#\s]+)', text(page)):
        if '://' not in target: assert (page.parent/target).exists(), target
