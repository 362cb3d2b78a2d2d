"""Within tests/suite.py, a line for each file whose tests are done.

LOCALMAMBA_MESSAGES=list.txt pytest tests: every refusal that a test asks for, once, to be read in one list."""
import os
import re
from collections import Counter

import pytest

LEFT, TOOK = Counter(), Counter()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items): LEFT.update(item.nodeid.split('::')[0] for item in items)


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


def keep_messages(file):
    "Write what `pytest.raises` catches: test, kind and words; those that differ in numbers or folders alone, once"
    from _pytest.raises import RaisesExc
    seen, leave = set(), RaisesExc.__exit__
    def kept(self, kind, error, trace):
        words = f'{type(error).__name__}: {error}' if error else ''
        key = re.sub(r"/[^ ':;,]*/|\d+|'[^']*'", '', words)
        if error is not None and key not in seen:
            seen.add(key)
            with open(file, 'a') as f: f.write(f"{os.environ.get('PYTEST_CURRENT_TEST')}\n    {words[:600]}\n")
        return leave(self, kind, error, trace)
    RaisesExc.__exit__ = kept


def pytest_configure(config):
    if file := os.environ.get('LOCALMAMBA_MESSAGES'): keep_messages(file)
    worker = hasattr(config, 'workerinput')
    if os.environ.get('LOCALMAMBA_SUITE') and not worker: config.pluginmanager.register(Report())
