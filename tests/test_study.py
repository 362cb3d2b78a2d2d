"Verdicts recomputed without the project's own functions, hashes that must not change, and the plan of the miniature."
import ast
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from scipy import stats

from localmamba import study
from localmamba.families import kept_weights
from localmamba.miniature import PLAN, forecast, seconds_of, settings
from localmamba.miniature import main as miniature_main
from localmamba.recipes import correct
from localmamba.runs import run_name

ROOT = Path(__file__).parent.parent


def raw(experiment, data):
    "Parameters and metrics of every record, by json alone."
    for path in sorted((ROOT/'results'/experiment/data/'runs').glob('*/metrics.json')):
        yield json.loads(path.with_name('params.json').read_text()), json.loads(path.read_text())


def families(claim): return 2 if claim.experiment == 'ablation_scattn' and not claim.model else 1


def by_hand(claim, data):
    "Both sides of a claim, pair by pair, from raw records, by plain loops; of longer trainings 8 seeds or 16."
    seen = {}
    for params, metrics in raw(claim.experiment, data):
        if claim.model and params.get('model') != claim.model or claim.value not in metrics: continue
        rows = seen.setdefault((params.get('model'), params['seed']), {})
        rows.setdefault(params['row'], []).append(metrics[claim.value])
    means = {key: {row: np.mean(values) for row, values in rows.items()} for key, rows in seen.items()}
    means = {key: m for key, m in means.items() if {*claim.row, *claim.base} <= set(m)}
    seeds = sorted({seed for _, seed in means})
    if data == 'longer' and len(means) < 16 * families(claim): seeds = seeds[:8]
    both = [m for (_, seed), m in means.items() if seed in seeds]
    return tuple(np.array([np.mean([m[r] for r in rows]) for m in both]) for rows in (claim.row, claim.base))


def recomputed(claims, data):
    "Pairs, mean, interval, p by Holm, verdict of each claim, by SciPy and plain loops; 16 seeds are a second look."
    lines = []
    for claim in claims:
        row, base = by_hand(claim, data)
        looks = 2 if data == 'longer' and len(row) >= 16 * families(claim) else 1
        p = min(1., looks * stats.ttest_rel(row, base).pvalue) if len(row) > 1 else 1.
        scale = dict(df=len(row) - 1, loc=np.mean(row - base), scale=stats.sem(row - base)) if len(row) > 1 else {}
        low, high = stats.t.interval(1 - .05 / looks, **scale) if scale else (np.nan, np.nan)
        lines.append(dict(pairs=len(row), mean=np.mean(row - base) if len(row) else np.nan, low=low, high=high, p=p))
    worst = 0.
    for rank, line in enumerate(sorted(lines, key=lambda line: line['p'])):
        worst = line['p'] = max(worst, min(1., line['p'] * (len(lines) - rank)))
    for claim, line in zip(claims, lines):
        sure = line['p'] < .05
        line['verdict'] = ('no record' if not line['pairs'] else 'holds' if sure and line['mean'] * claim.sign > 0
                           else 'contradicted' if sure
                           else 'no difference above 1 point' if -1 < line['low'] and line['high'] < 1
                           else 'not decided')
    return lines


def test_verdicts_recomputed_from_raw_metrics():
    table, expected = study.verdicts(), recomputed(study.CLAIMS, 'miniature')
    again = [i for i, line in enumerate(expected) if line['verdict'] == 'not decided']
    for i, line in zip(again, recomputed([study.CLAIMS[i] for i in again], 'longer')):
        if line['pairs'] >= 8 * families(study.CLAIMS[i]): expected[i] = line
    for line, right in zip(table.to_dict('records'), expected, strict=True):
        assert (line['pairs'], line['verdict']) == (right['pairs'], right['verdict']), line['claim']
        for name in ('mean', 'low', 'high', 'p'): np.testing.assert_allclose(line[name], right[name], 1e-9, 1e-12)


def test_the_second_stage_answers_what_the_first_leaves_open(tmp_path):
    "A claim that is decided keeps its verdict; one that is not takes the longer trainings', corrected for these alone."
    def write(record, row, tops):
        for seed, top1 in enumerate(tops):
            folder = tmp_path/f'results/families/{record}/runs/{row}-{seed}'
            folder.mkdir(parents=True, exist_ok=True)
            (folder/'params.json').write_text(json.dumps({'row': row, 'seed': seed}))
            (folder/'metrics.json').write_text(json.dumps({'top1': top1}))
    for row, tops in (('Vim', [50, 51, 52]), ('LocalVim', [50, 53, 51]), ('DeiT', [40.001, 43, 41])):
        write('miniature', row, tops)
    for row, tops in (('Vim', [60, 61, 62]), ('LocalVim', [62, 63.1, 64.05]), ('DeiT', [70, 70, 70])):
        write('longer', row, tops)
    assert (study.verdicts(root=tmp_path).stage == 1).all(), 'three pairs are not enough'
    table = study.verdicts(root=tmp_path, enough=3).set_index('claim')
    beats_vim, beats_deit = table.loc['LocalVim beats Vim'], table.loc['LocalVim beats DeiT']
    assert (beats_vim.stage, beats_vim.verdict) == (2, 'holds') and 'trained longer' in study.said(beats_vim)
    assert (beats_deit.stage, beats_deit.verdict) == (1, 'holds') and beats_deit['mean'] > 0
    assert beats_vim.p == pytest.approx(stats.ttest_rel([62, 63.1, 64.05], [60, 61, 62]).pvalue)
    for row, tops in (('Vim', [60, 61, 62, 60.5]), ('LocalVim', [62, 63.1, 64.05, 61])): write('longer', row, tops)
    few = study.verdicts(root=tmp_path, enough=3).set_index('claim').loc['LocalVim beats Vim']
    assert (few.stage, few.pairs, few['mean']) == (2, 3, pytest.approx(beats_vim['mean'])), 'one seed more is none'
    more = {'Vim': [60, 61, 62, 60.5, 61.5, 60.2], 'LocalVim': [62, 63.1, 64.05, 61, 61, 63]}
    for row, tops in more.items(): write('longer', row, tops)
    line = study.verdicts(root=tmp_path, enough=3).set_index('claim').loc['LocalVim beats Vim']
    change = np.subtract(more['LocalVim'], more['Vim'])
    low, high = stats.t.interval(.975, 5, change.mean(), stats.sem(change))
    assert (line.stage, line.pairs, line.low, line.high) == (3, 6, pytest.approx(low), pytest.approx(high))
    assert line.p == pytest.approx(2 * stats.ttest_1samp(change, 0).pvalue) and '97.5 % interval' in study.said(line)
    once = study.verdicts(root=tmp_path, enough=3, looks=1).set_index('claim').loc['LocalVim beats Vim']
    assert (once.stage, once.pairs, once.p) == (2, 3, pytest.approx(few.p)), 'without the second look'
    first = study.verdicts(root=tmp_path, second='none').set_index('claim')
    assert first.verdict['LocalVim beats Vim'] == 'not decided'


def test_a_claim_about_both_families_waits_for_both(tmp_path):
    def write(record, model, row, tops):
        for seed, top1 in enumerate(tops):
            folder = tmp_path/f'results/ablation_scattn/{record}/runs/{model}-{row}-{seed}'
            folder.mkdir(parents=True)
            (folder/'params.json').write_text(json.dumps({'row': row, 'seed': seed, 'model': model}))
            (folder/'metrics.json').write_text(json.dumps({'top1': top1}))
    rows = (('channel', [50, 51, 52]), ('both', [47, 53, 53]))
    for model in (study.VIM, study.VMAMBA):
        for row, tops in rows: write('miniature', model, row, tops)
    for row, tops in rows: write('longer', study.VIM, row, tops)
    text = 'Gating tokens too, as in the figure, adds to it'
    assert study.verdicts(root=tmp_path, enough=3).set_index('claim').stage[text] == 1, 'one family only'
    for row, tops in rows: write('longer', study.VMAMBA, row, tops)
    assert study.verdicts(root=tmp_path, enough=3).set_index('claim').stage[text] == 2


def test_pairs_that_would_decide():
    "The least number at which p, corrected, or the interval decides: by SciPy, one number after the other."
    for mean, spread, claims in ((0., .2, 1), (.1, 1., 9), (.8, 1., 24), (2., 3., 24), (-2., 1., 2)):
        values = np.random.default_rng(0).normal(0, spread, 9)
        values += mean - values.mean()
        def decides(n):
            error = values.std(ddof=1) / n**.5
            low, high = stats.t.interval(.95, n - 1, mean, error)
            return claims * 2 * stats.t.sf(abs(mean) / error, n - 1) < .05 or -1 < low and high < 1
        needed = study.pairs_needed(study.difference(values), claims)
        assert needed == next(n for n in range(2, 999) if decides(n))
    assert np.isnan(study.pairs_needed(study.difference([1.])))


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


OWN = {'row', 'controls', 'directions', 'scattn', 'scattn_at', 'seed', 'model', 'draw', 'search', 'epochs'}

@pytest.mark.parametrize('experiment', ['ablation_scan', 'ablation_scattn', 'ablation_search', 'search_directions'])
def test_the_names_of_recorded_runs_have_not_changed(experiment):
    "Every record is of a configuration, which finds it again; the searches of `families` are of that notebook's."
    plain = lambda recipe: {k: v for k, v in recipe.items() if k not in OWN}
    recipes, seen = {}, 0
    for path in (ROOT/f'nbs/configs/{experiment}').glob('*.yaml'):
        given = yaml.safe_load(path.read_text())
        record = given.get('record') or given.get('dataset', '')
        if record in ('miniature', 'longer', 'cifar10'):
            recipes.setdefault(record, []).append(plain(recipe_cell(experiment, given)))
    for record, allowed in recipes.items():
        for folder in (ROOT/f'results/{experiment}/{record}/runs').glob('*'):
            params = json.loads((folder/'params.json').read_text())
            assert run_name(params, 'x')[-8:] == folder.name[-8:]
            if experiment == 'search_directions' and 'row' in params: continue
            assert plain(params) in allowed
            seen += 1
    assert seen


def test_fields_are_of_the_families_they_name():
    for params, metrics in raw('receptive_fields', 'miniature'):
        source = ROOT/'results/families/miniature/runs'/params['weights']
        trained, reached = (json.loads((source/f'{name}.json').read_text()) for name in ('params', 'metrics'))
        assert (trained['row'], trained['seed'], reached['top1']) == (params['model'], params['seed'], metrics['top1'])


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


def test_the_plan_is_what_the_configurations_say(tmp_path):
    for job in PLAN:
        given = settings(job)
        assert given['record'] in ('miniature', 'longer') and (ROOT/f'nbs/{job.experiment}.ipynb').exists()
        times = len(given.get('models', [''])) * {'transfer': 4}.get(job.experiment, 1)  # starts and tasks
        if 'rows' in given: assert job.runs == len(given['rows']) * times
    lines = forecast(root=ROOT)
    order = [(line['job'].wave, line['seed']) for line in lines]
    assert order == sorted(order), 'seeds are the outer loop of a wave'
    spent = sum(line['hours_done'] + line['hours_left'] for line in lines)
    assert spent < 45 and f'these records took {spent:.0f} ' in (ROOT/'README.md').read_text()
    (tmp_path/'nbs').mkdir()
    (tmp_path/'nbs/configs').symlink_to(ROOT/'nbs/configs')
    hours = sum(line['hours_left'] for line in forecast(root=tmp_path))
    assert hours <= 30, 'on a machine without records'
    for page in ('README.md', 'results/miniature/PROTOCOL.md'):
        assert f'{hours:.0f} core-hours' in (ROOT/page).read_text(), page


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


def test_what_a_search_costs_is_counted(tmp_path):
    "Under the families that need it, and under the searches of an ablation: each once."
    jobs = {(job.experiment, job.config): job for job in PLAN}
    families, ablation = jobs['families', 'miniature_searched'], jobs['search_directions', 'miniature']
    given = settings(families, root=ROOT)
    supernets = ({'row': 'LocalVMamba, searched', 'lr': given['rates']['LocalVMamba']}, {'row': 'LocalVim, searched'},
                 {'candidates': settings(ablation, root=ROOT)['candidates']})
    for i, own in enumerate(supernets):
        folder = tmp_path/f'results/search_directions/miniature/runs/{i}'
        folder.mkdir(parents=True)
        (folder/'params.json').write_text(json.dumps({'lr': given['lr'], 'seed': 0, 'directions': 'search'} | own))
        (folder/'metrics.json').write_text(f'{{"seconds": {10 ** i}}}')
    (tmp_path/'nbs').mkdir()
    (tmp_path/'nbs/configs').symlink_to(ROOT/'nbs/configs')
    line = next(line for line in forecast([families], root=tmp_path) if line['seed'] == 0)
    assert (line['done'], line['left'], line['hours_done'] * 3600) == (0, 2, pytest.approx(11)), 'a search is no row'
    assert seconds_of(ablation, settings(ablation, root=ROOT), 0, tmp_path) == [100]


def test_rows_at_equal_parameters():
    "The README's table of the recurrence and of SCAttn, from the raw metrics."
    top1, params = {}, {}
    for asked, metrics in (*raw('ablation_scan', 'miniature'), *raw('ablation_scattn', 'longer')):
        top1[asked['model'], asked['row'], asked['seed']] = metrics['top1']
        params[asked['model'], asked['row']] = metrics['params_m']
    table = pd.read_csv(ROOT/'results/miniature/equal_size.csv')
    assert len(table) >= 6 and set(table.compared) >= {'cross − no scan, wide', 'channel − none'}
    for line in table.to_dict('records'):
        row, base = line['compared'].split(' − ')
        seeds = [s for m, r, s in top1 if (m, r) == (line['model'], base) and (m, row, s) in top1]
        change = np.array([top1[line['model'], row, s] - top1[line['model'], base, s] for s in seeds])
        low, high = stats.t.interval(.95, len(change) - 1, change.mean(), stats.sem(change))
        np.testing.assert_allclose([line[k] for k in ('mean', 'low', 'high')], [change.mean(), low, high])
        ratio = params[line['model'], base] / params[line['model'], row]
        assert line['parameters, ratio'] == pytest.approx(ratio) and ('wide' not in base or abs(ratio - 1) < .05)


def test_cost_and_spread_of_every_claim():
    "How unlike the compared rows are, and how many pairs a point takes, from the raw metrics."
    table = pd.read_csv(ROOT/'results/miniature/comparisons.csv', keep_default_na=False)
    assert set(table.claim) == {claim.text for claim in study.CLAIMS}
    assert len(table) == len(study.CLAIMS) + 1, 'one of both families'
    for line in table.to_dict('records'):
        claim = next(claim for claim in study.CLAIMS if claim.text == line['claim'])
        runs = pd.DataFrame([params | metrics for params, metrics in raw(claim.experiment, 'miniature')])
        if line['model']: runs = runs[runs.model == line['model']]
        [row], [base] = claim.row, claim.base
        one, other = (runs[runs.row == name].groupby('seed')[claim.value].mean() for name in (row, base))
        change = (one - other).dropna()
        assert len(change) == line['pairs'] and line['spread'] == pytest.approx(change.std())
        takes = line['1 point takes']
        fewer, half = (stats.t.ppf(.975, n - 1) * change.std() / n**.5 for n in (takes - 1, takes))
        assert half < 1 and not fewer < 1, 'so many, and no fewer'
        for name, column in (('parameters', 'params_m'), ('FLOPs', 'flops_m_nine')):
            if column not in runs: continue
            ratio = runs[runs.row == base][column].mean() / runs[runs.row == row][column].mean()
            assert float(line[f'{name}, ratio']) == pytest.approx(ratio)


def record(folder, params, metrics, identity=None):
    "A finished run by hand."
    folder.mkdir(parents=True)
    env = {} if identity is None else {'data': {'identity': identity, 'files': 1, 'bytes': 1}}
    for name, content in (('params', params), ('metrics', metrics), ('env', env)):
        (folder/f'{name}.json').write_text(json.dumps(content))


def test_trainings_on_other_data_are_not_taken(tmp_path):
    "Two folders of photographs have one name, 'folder', and no record in common."
    runs = tmp_path/'results/ablation_scan/folder/runs'
    record(runs/'a', {'lr': 1.}, {'top1': 50.}, 'one')
    (runs/'.DS_Store').touch()
    def taken(data): return study.same_training('ablation_scan', 'folder', {'lr': 1.}, root=tmp_path, data=data)
    assert taken({'identity': 'one'})['top1'] == taken(None)['top1'] == 50 and taken({'identity': 'two'}) == {}
    assert len(study.collect('ablation_scan', 'folder', tmp_path)) == 1, 'what is no run is passed over'
    kept = tmp_path/'results/families/folder/runs'
    record(kept/'c', {'row': 'Vim', 'seed': 0}, {'top1': 50.}, 'one')
    assert kept_weights('folder', 'Vim', 0, root=tmp_path, data={'identity': 'one'}).parent == kept/'c'
    with pytest.raises(ValueError, match='is of another training .data: got others'):
        kept_weights('folder', 'Vim', 0, root=tmp_path, data={'identity': 'two'})


@pytest.mark.parametrize('words', [['--processes', '0'], ['--only', 'families,transfer']])
def test_miniature_refuses_what_would_do_nothing(words, capsys):
    with pytest.raises(SystemExit) as stopped: miniature_main(['--forecast', *words])
    assert stopped.value.code == 2 and words[0] in capsys.readouterr().err


def test_equal_scores_count_once():
    "The first of equal scores is the answer, in top-1 as in the confusion."
    scores = torch.randn(2000, 100, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    one, five = correct(scores, scores.argmax(1))
    assert one == five == 2000
