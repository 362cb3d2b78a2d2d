"""Write a table of contents into each long notebook, behind its title, and the library's into the tour:
python tests/contents.py"""
import json
import re
import uuid
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LONG = 7  # sections


def sections(cells):
    "Headings of the second level, as they stand in the text."
    texts = [''.join(c['source']) for c in cells if c['cell_type'] == 'markdown']
    return [h for text in texts for h in re.findall(r'^## (.+)$', text, re.M)]


def contents(headings):
    "One line of links; JupyterLab's anchors are the headings with hyphens for blanks."
    return 'On this page: ' + ' · '.join(f'[{h}](#{h.replace(" ", "-")})' for h in headings)


PARTS = {'the scan': '00', 'kernels': '04', 'gate, layer, models': '10', 'measuring, searching': '17', 'data': '20a',
         'training': '28', 'tasks': '35', 'showing, sharing': '39'}  # and the number that each begins with


def library():
    "A line a part of the library, its notebooks in reading order."
    books = sorted((ROOT/'nbs'/'lib').glob('*.ipynb'))
    for part, first, last in zip(PARTS, PARTS.values(), [*list(PARTS.values())[1:], '99']):
        links = ' · '.join(f'[{p.stem}](lib/{p.name})' for p in books if first <= p.stem.split('_')[0] < last)
        yield f'| {part} | {links} |'


def write_tour():
    "The rows of the table under `## The library` in index.ipynb."
    path = ROOT/'nbs'/'index.ipynb'
    notebook = json.loads(path.read_text(encoding='utf-8'))
    cell = next(c for c in notebook['cells'] if '## The library' in ''.join(c['source']))
    head = ''.join(cell['source']).split('|---|---|')[0] + '|---|---|\n'
    cell['source'] = (head + '\n'.join(library())).splitlines(keepends=True)
    path.write_text(json.dumps(notebook, sort_keys=True, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')


def main():
    write_tour()
    for path in sorted((ROOT/'nbs').rglob('*.ipynb')):
        if '.ipynb_checkpoints' in path.parts: continue
        notebook = json.loads(path.read_text(encoding='utf-8'))
        cells, before = notebook['cells'], path.read_text(encoding='utf-8')
        headings = sections(cells)
        place = next((i for i, c in enumerate(cells) if ''.join(c['source']).startswith('On this page: ')), None)
        if place is not None and len(headings) < LONG: del cells[place]
        if len(headings) >= LONG:
            if place is None:
                place = next(i for i, c in enumerate(cells) if c['cell_type'] == 'markdown') + 1
                cells.insert(place, {'cell_type': 'markdown', 'id': uuid.uuid4().hex[:8], 'metadata': {}, 'source': []})
            cells[place]['source'] = [contents(headings)]
        text = json.dumps(notebook, sort_keys=True, indent=1, ensure_ascii=False) + '\n'
        if text != before: path.write_text(text, encoding='utf-8')


if __name__ == '__main__': main()
