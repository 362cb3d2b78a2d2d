"Within tests/suite.py, a line for each file whose tests are done."
import os
from collections import Counter

import pytest

LEFT, TOOK = Counter(), Counter()


#: Fixtures that take long and serve a file: what uses them stays in one process (`--dist loadgroup`).
COSTLY = {'uninterrupted', 'searches', 'toy', 'served'}


def pytest_collection_modifyitems(items):
    LEFT.update(item.nodeid.split('::')[0] for item in items)
    for item in items:
        for name in COSTLY & set(getattr(item, 'fixturenames', ())): item.add_marker(pytest.mark.xdist_group(name))


class Report:
    "Counts, in the process that prints; with pytest-xdist it collects nothing itself, so the workers' list is taken."
    def pytest_xdist_node_collection_finished(self, node, ids):
        if not LEFT: LEFT.update(name.split('::')[0] for name in ids)

    def pytest_runtest_logreport(self, report):
        file = report.nodeid.split('::')[0]
        TOOK[file] += report.duration
        if report.when != 'teardown': return
        LEFT[file] -= 1
        if not LEFT[file]: print(f'\nfinished {file} {TOOK[file]:.1f}', flush=True)


def pytest_configure(config):
    worker = hasattr(config, 'workerinput')
    if os.environ.get('LOCALMAMBA_SUITE') and not worker: config.pluginmanager.register(Report())
