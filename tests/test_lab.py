"What JupyterLab does to the notebooks: opening one and saving it leaves the file as it was."
import json
import re
import shutil
from pathlib import Path

import pytest
from jupyter_server.services.contents.largefilemanager import LargeFileManager
from jupyter_server.serverapp import ServerApp
from traitlets.config import Config

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
SETTINGS = json.loads((ROOT/'nbs/jupyter_server_config.json').read_text())


@pytest.fixture(scope='module')
def served(tmp_path_factory):
    "A server's view of a copy of the notebooks."
    root = tmp_path_factory.mktemp('lab')
    for path in NOTEBOOKS:
        copy = root/path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    shutil.copy(ROOT/'settings.ini', root)
    return root, LargeFileManager(root_dir=str(root), config=Config(SETTINGS))


@pytest.mark.parametrize('name', [str(p.relative_to(ROOT)) for p in NOTEBOOKS])
def test_a_notebook_opened_and_saved_is_unchanged(served, name, monkeypatch):
    root, manager = served
    monkeypatch.chdir(root)
    before = (root/name).read_bytes()
    model = manager.get(name)
    model['content']['metadata']['kernelspec']['display_name'] = 'Python 3 (ipykernel)'
    model['content']['metadata']['language_info'] = {'name': 'python', 'version': '3.11.7', 'mimetype': 'text/x-python'}
    for cell in model['content']['cells']: cell['metadata']['trusted'] = True
    manager.save(model, name)
    assert (root/name).read_bytes() == before


def test_the_lab_serves_what_the_tour_links_to():
    recipe = (ROOT/'Makefile').read_text()
    assert 'jupyter lab --notebook-dir . nbs/index.ipynb' in recipe


def test_the_server_finds_what_the_set_up_installs(tmp_path, monkeypatch):
    name = re.search(r'cp nbs/jupyter_server_config.json \.venv/etc/jupyter/(\S+)', (ROOT/'Makefile').read_text())[1]
    (tmp_path/name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT/'nbs/jupyter_server_config.json', tmp_path/name)
    monkeypatch.setenv('JUPYTER_CONFIG_PATH', str(tmp_path))
    server = ServerApp()
    server.load_config_file()
    assert server.config.ContentsManager.pre_save_hook == 'nbdev.clean.clean_jupyter'
