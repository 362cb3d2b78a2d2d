"The house: a module imports only from notebooks above its own, stays short, and uses nobody's private names."
import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT/'localmamba'
MODULES = sorted(p for p in PACKAGE.rglob('*.py') if p.name not in ('_modidx.py', '__init__.py'))
LINES, ARGUMENTS = 430, 8


def module_of(path): return '.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__')


def number(path):
    "Place in the reading order: the number of the notebook that a module is exported from."
    found = re.search(r'File to edit: \S*?nbs/lib/(\d+)\w*_', path.read_text())
    assert found, f'{path.name}: it names no numbered notebook'
    return int(found[1])


def imports(path):
    "Modules of the package that a module imports, also within functions, with the names it takes from each."
    package = module_of(path).split('.')[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level + 1] if node.level else []
            name = '.'.join([*base, *(node.module or '').split('.')]).strip('.')
            if not name.startswith('localmamba'): continue
            folder = PACKAGE.parent/name.replace('.', '/')
            inner = [alias.name for alias in node.names if (folder/f'{alias.name}.py').exists()]
            for alias in inner: yield f'{name}.{alias}', ()
            if len(inner) < len(node.names): yield name, tuple(a.name for a in node.names if a.name not in inner)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, ()) for alias in node.names if alias.name.startswith('localmamba.'))


NUMBER = {module_of(path): number(path) for path in MODULES}


@pytest.mark.parametrize('path', MODULES, ids=module_of)
def test_imports_come_from_above(path):
    module = module_of(path)
    for name, _ in imports(path):
        if name not in NUMBER: continue
        assert NUMBER[name] <= NUMBER[module], f'{name} ({NUMBER[name]}) is read after {module} ({NUMBER[module]})'


def test_there_is_no_circle():
    graph = {module_of(path): {name for name, _ in imports(path)} for path in MODULES}
    done, path = set(), []

    def visit(name):
        assert name not in path, ' → '.join([*path[path.index(name):], name])
        if name in done or name not in graph: return
        path.append(name)
        for other in sorted(graph[name]): visit(other)
        done.add(path.pop())

    for name in graph: visit(name)


@pytest.mark.parametrize('path', MODULES, ids=module_of)
def test_no_private_name_of_another_room(path):
    tree = ast.parse(path.read_text())
    aliases = {}
    for name, taken in imports(path):
        private = [n for n in taken if n.startswith('_') and not n.startswith('__')]
        assert not private, f'{module_of(path)} imports {private} of {name}'
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or '').startswith('localmamba')):
            if any(module_like(node, a.name, path) for a in node.names):
                aliases |= {a.asname or a.name: a.name for a in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
            private = node.attr.startswith('_') and not node.attr.startswith('__')
            assert not private, f'{module_of(path)} uses {node.value.id}.{node.attr}'


def module_like(node, name, path):
    base = path.parent
    for _ in range(max(node.level - 1, 0)): base = base.parent
    folder = base.joinpath(*(node.module or '').split('.')) if node.level else ROOT.joinpath(*node.module.split('.'))
    return (folder/f'{name}.py').exists()


@pytest.mark.parametrize('path', MODULES, ids=module_of)
def test_a_room_is_short(path):
    code = [line for line in path.read_text().splitlines() if not line.startswith('# %%')]
    assert len(code) <= LINES, f'{len(code)} lines; allowed: {LINES}'


@pytest.mark.parametrize('path', MODULES, ids=module_of)
def test_no_long_rows_of_positions(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)): continue
        positions = [a.arg for a in [*node.args.posonlyargs, *node.args.args] if a.arg not in ('self', 'cls', 'ctx')]
        if len(positions) > ARGUMENTS and not allowed(node, path):
            pytest.fail(f'{module_of(path)}.{node.name}: {len(positions)} positional arguments')


#: Signatures that are others': `mamba_ssm`'s function and the mirror of it, tensors of an operator, and Triton's
#: kernels, which take no structure.
PUBLIC_BY_CONTRACT = {'selective_scan_fn', 'selective_scan_ref', 'directional_scan', 'directional_scan_ref'}


def allowed(node, path):
    decorators = {ast.unparse(d).split('(')[0].split('.')[-1] for d in node.decorator_list}
    operator = re.search(r'operator|the schema', ast.get_docstring(node) or '')
    return node.name in PUBLIC_BY_CONTRACT or decorators & {'jit', 'inlined'} or bool(operator)


def test_the_tour_lists_the_rooms_in_order():
    "The tour lists every notebook of the library once, in order."
    listed = re.findall(r'\(lib/(\d\w*_\w+)\.ipynb\)', (ROOT/'nbs/index.ipynb').read_text())
    assert listed == sorted(p.stem for p in (ROOT/'nbs/lib').glob('*.ipynb'))


@pytest.mark.parametrize('path', sorted((ROOT/'nbs').rglob('*.ipynb')), ids=lambda p: p.stem)
def test_a_long_notebook_has_a_table_of_contents(path):
    cells = [''.join(c['source']) for c in json.loads(path.read_text())['cells'] if c['cell_type'] == 'markdown']
    sections = [heading for cell in cells for heading in re.findall(r'^## (.+)$', cell, re.M)]
    if len(sections) < 7: return
    contents = next((cell for cell in cells[:4] if '](#' in cell), '')
    missing = [heading for heading in sections if f'](#{heading.replace(" ", "-")})' not in contents]
    assert not missing, f'{missing}: python tests/contents.py writes the table'
