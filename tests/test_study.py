"Verdicts recomputed without the project's own functions, hashes that must not change, and the plan of the miniature."
import ast
import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy import stats

from localmamba import study
from localmamba.miniature import PLAN, forecast, seconds_of, settings
from localmamba.runs import run_name

ROOT = Path(__file__).parent.parent


def raw(experiment, data):
    "Parameters and metrics of every record, by json alone."
    for path in sorted((ROOT/'results'/experiment/data/'runs').glob('*/metrics.json')):
        yield json.loads(path.with_name('params.json').read_text()), json.loads(path.read_text())


def by_hand(claim, data):
    "Paired differences of a claim from raw records: plain loops."
    seen = {}
    for params, metrics in raw(claim.experiment, data):
        if claim.model and params.get('model') != claim.model or claim.value not in metrics: continue
        rows = seen.setdefault((params.get('model'), params['seed']), {})
        rows.setdefault(params['row'], []).append(metrics[claim.value])
    means = [{row: np.mean(values) for row, values in rows.items()} for rows in seen.values()]
    both = [m for m in means if {*claim.row, *claim.base} <= set(m)]
    return tuple(np.array([np.mean([m[r] for r in rows]) for m in both]) for rows in (claim.row, claim.base))


def test_verdicts_recomputed_from_raw_metrics(data='miniature'):
    table, expected = study.verdicts(data), []
    for claim in study.CLAIMS:
        row, base = by_hand(claim, data)
        p = stats.ttest_rel(row, base).pvalue if len(row) > 1 else 1.
        low, high = (stats.t.interval(.95, len(row) - 1, np.mean(row - base), stats.sem(row - base)) if len(row) > 1
                     else (np.nan, np.nan))
        expected.append([len(row), np.mean(row - base) if len(row) else np.nan, low, high, p])
    counts, mean, low, high, p = map(np.array, zip(*expected))
    order, corrected, worst = sorted(range(len(p)), key=lambda i: p[i]), [None] * len(p), 0.
    for rank, i in enumerate(order):
        worst = max(worst, min(1., p[i] * (len(p) - rank)))
        corrected[i] = worst
    assert table.pairs.tolist() == counts.tolist()
    for name, values in (('mean', mean), ('low', low), ('high', high), ('p', corrected)):
        np.testing.assert_allclose(table[name], values, rtol=1e-9, atol=1e-12)
    for i, line in table.iterrows():
        sure = corrected[i] < .05
        right = ('no record' if not counts[i] else 'holds' if sure and mean[i] * line['sign'] > 0
                 else 'contradicted' if sure
                 else 'no difference above 1 point' if -1 < low[i] and high[i] < 1 else 'not decided')
        assert line.verdict == right, line.claim


def test_differences_between_rows():
    import pandas as pd
    rows = (('a', 50., 1.), ('b', 30., 1.1), ('c', 50.2, .9))
    frame = pd.DataFrame([dict(row=row, seed=seed, top1=base + seed * slope) for seed in range(4)
                          for row, base, slope in rows])
    table = study.between_rows(frame).cells
    assert table.compared.tolist() == ['c − b', 'b − a', 'c − a'], 'largest first'
    assert table.set_index('compared').decided['b − a'] == 'yes' and table.set_index('compared').decided['c − a'] == ''
    assert 'nothing to compare' in study.between_rows(frame[frame.seed == 0])


def test_holm_is_the_one_of_statsmodels():
    multitest = pytest.importorskip('statsmodels.stats.multitest')
    p = np.random.default_rng(0).uniform(0, .1, 24)
    np.testing.assert_allclose(study.holm(p), multitest.multipletests(p, method='holm')[1])


def recipe_cell(experiment, given):
    "The recipe that a notebook makes of its parameters: its cells up to there."
    space = {'__name__': '__main__'}
    for cell in json.loads((ROOT/f'nbs/{experiment}.ipynb').read_text())['cells']:
        if cell['cell_type'] != 'code': continue
        source = ''.join(cell['source'])
        if 'parameters' in cell['metadata'].get('tags', []):
            exec(source, space)
            defaults = {node.targets[0].id for node in ast.parse(source).body}
            space.update(given, check_parameters=lambda: {name: space[name] for name in defaults})
        elif 'recipe = recipe_of(' in source:
            from localmamba.study import recipe_of
            start = source.index('recipe = recipe_of(')
            code = 'params = check_parameters()\n' + source[start:source.index('\nkept', start)]
            exec(code, space | {'recipe_of': recipe_of}, space)
            return space['recipe']


OWN = {'row', 'directions', 'scattn', 'scattn_at', 'seed', 'model', 'draw', 'search', 'epochs'}

@pytest.mark.parametrize('experiment', ['ablation_scan', 'ablation_scattn', 'ablation_search', 'search_directions',
                                        'receptive_fields'])
def test_the_names_of_recorded_runs_have_not_changed(experiment):
    "Every record is of a configuration, which finds it again; the searches of `families` are of that notebook's."
    config = lambda path: recipe_cell(experiment, yaml.safe_load(path.read_text()))
    plain = lambda recipe: {k: v for k, v in recipe.items() if k not in OWN}
    recipes = [plain(config(path)) for path in (ROOT/f'nbs/configs/{experiment}').glob('miniature*.yaml')]
    for folder in (ROOT/f'results/{experiment}/miniature/runs').glob('*'):
        params = json.loads((folder/'params.json').read_text())
        assert run_name(params, 'x')[-8:] == folder.name[-8:]
        if experiment == 'search_directions' and 'row' in params: continue
        assert any(recipe == {k: params.get(k) for k in recipe} for recipe in recipes)


def test_the_table_of_scans_is_made_from_the_raw_metrics():
    import pandas as pd
    table = pd.read_csv(ROOT/'results/miniature/ablation_scan.csv').set_index(['model', 'row'])
    lines = [params | metrics for params, metrics in raw('ablation_scan', 'miniature')]
    for key, part in pd.DataFrame(lines).groupby(['model', 'row']):
        said = table.loc[key]
        assert (said.seeds, len(part)) == (part.seed.nunique(), part.seed.nunique())
        np.testing.assert_allclose([said.top1_mean, said.top1_std, said.params_m],
                                   [part.top1.mean(), part.top1.std(), part.params_m.iloc[0]])


def test_the_protocol_names_every_claim():
    protocol = (ROOT/'results/miniature/PROTOCOL.md').read_text()
    lines = protocol.split('<!-- claims -->')[1].split('<!-- end -->')[0].splitlines()
    named = [line.split(' | ')[0].strip('| ') for line in lines if line.startswith('| ')][1:]
    assert named == [claim.text for claim in study.CLAIMS]


def test_the_plan_is_what_the_configurations_say():
    for job in PLAN:
        given = settings(job)
        assert given['record'] == 'miniature' and (ROOT/f'nbs/{job.experiment}.ipynb').exists()
        times = {'ablation_scattn': 2, 'transfer': 4}.get(job.experiment, 1)  # models; starts and tasks
        if 'rows' in given: assert job.runs == len(given['rows']) * times
    lines = forecast(root=ROOT)
    order = [(line['job'].wave, line['seed']) for line in lines]
    assert order == sorted(order), 'seeds are the outer loop of a wave'
    assert sum(line['hours_done'] + line['hours_left'] for line in lines) < 45


def test_a_family_with_a_rate_of_its_own_is_counted(tmp_path):
    job = next(job for job in PLAN if (job.experiment, job.config) == ('families', 'miniature'))
    given = settings(job, root=ROOT)
    own = {'row': 'Swin', 'seed': 1, 'lr': given['rates']['Swin'], 'n_train': given['n_train']}
    for i, changed in enumerate(({}, {'lr': given['lr']}, {'seed': 2}, {'row': 'LocalVim, searched'})):
        folder = tmp_path/f'results/families/miniature/runs/{i}'
        folder.mkdir(parents=True)
        (folder/'params.json').write_text(json.dumps(own | changed))
        (folder/'metrics.json').write_text('{"seconds": 7}')
    assert seconds_of(job, given, 1, tmp_path) == [7]
