"A run that is stopped, doubled or damaged ends like one left alone, or says why not."
import os, signal, time
from pathlib import Path

import pytest
import torch

from localmamba import ade20k, coco, runs
from localmamba.data import scenes
from localmamba.runs import Run, dataset_name
from localmamba.train import KeepWeights, fit
from test_train import Stop, mlp, ours

forks = pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
pytestmark = pytest.mark.filterwarnings('ignore')


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(runs, 'environment', lambda **facts: {'python': '3', **facts})


def run_in(folder, name='a run', **data): return Run('exp', 'data', {'seed': 0}, name, folder, **data)


def train(folder, epochs=2, cbs=(), **options):
    run = run_in(folder)
    return fit(mlp, ours(), epochs, run=run, cbs=[KeepWeights(run.dir/'weights.pt'), *cbs], seed=1, **options)


def outcome(folder):
    "What a finished run left, times apart"
    run = run_in(folder)
    assert run.finished and not [*run.dir.glob('checkpoint*'), *run.dir.glob('.*')], sorted(run.dir.iterdir())
    metrics = {k: v for k, v in run.metrics.items() if k != 'seconds'}
    weights = torch.load(run.dir/'weights.pt', weights_only=True)['model']
    return metrics, run.history.drop(columns='seconds').to_dict(), {k: v.tolist() for k, v in weights.items()}


OPERATIONS = [(os, 'replace'), (os, 'fsync'), (os, 'open'), (Path, 'unlink'), (os, 'close')]

def killed_at(n, work):
    "Fork, and die like a killed process at file operation `n` (its beginning); True when there were fewer"
    child = os.fork()
    if child: return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    count = 0
    def counted(do):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == n: os._exit(9)
            return do(*args, **kwargs)
        return call
    try:
        for owner, name in OPERATIONS: setattr(owner, name, counted(getattr(owner, name)))
        work()
    except BaseException:
        os._exit(8)
    os._exit(0)


def every(work, first=1, step=1):
    "Work killed at one operation after the other, each time in a folder of its own, then done again"
    n = first
    while not killed_at(n, lambda: work(n)):
        work(n)
        yield n
        n += step


@forks
@pytest.mark.parametrize('step', [5, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_every_file_operation(tmp_path, step):
    train(tmp_path/'alone')
    expected, done = outcome(tmp_path/'alone'), []
    for n in every(lambda n: train(tmp_path/str(n)), step=step):
        assert outcome(tmp_path/str(n)) == expected, n
        done.append(n)
    assert len(done) > 30 // step


def segmenter_run(folder, home):
    from localmamba.data import ade20k
    from localmamba.recipes import SEGMENTATION, recipe
    from localmamba.segment import fit_options, loaders, segmenter
    settings = recipe('scenes', SEGMENTATION, iterations=2, every=1, batch_size=2, warmup=0, crop=32)
    train, valid = ade20k(home), ade20k(home, 'validation')
    def build(): return segmenter('test_local_vmamba', len(train.classes), channels=8, aux_channels=4)
    dls = loaders(train, valid, settings, device='cpu')
    run = run_in(folder)
    return fit(build, dls, run=run, seed=1, cbs=[KeepWeights(run.dir/'weights.pt')], **fit_options(settings))


def detector_run(folder, home):
    from localmamba.coco import coco_instances
    from localmamba.detect import detector, fit_options, head_options, loaders
    from localmamba.recipes import DETECTION, recipe
    settings = recipe('scenes', DETECTION, iterations=2, every=1, batch_size=2, warmup=0, channels=8, width=16)
    train, valid = coco_instances(home), coco_instances(home, 'validation')
    def build(): return detector('test_local_vmamba', len(train.classes), **head_options(settings))
    run = run_in(folder)
    return fit(build, loaders(train, valid.take(range(2)), settings, device='cpu'), run=run, seed=1,
               cbs=[KeepWeights(run.dir/'weights.pt')], **fit_options(settings, len(train)))


def at_the_end(work, tmp_path):
    "Killed at every operation after the last checkpoint, up to and inside `finish`"
    work(tmp_path/'alone')
    expected, saved = outcome(tmp_path/'alone'), {}
    class Copy(KeepWeights):
        order = 98
        def after_fit(self): raise KeyboardInterrupt
    import shutil
    import localmamba.train as module
    keep, module.KeepWeights.after_fit = module.KeepWeights.after_fit, Copy.after_fit
    try:
        with pytest.raises(KeyboardInterrupt): work(tmp_path/'stopped')
    finally: module.KeepWeights.after_fit = keep
    assert run_in(tmp_path/'stopped').load_checkpoint()['epoch'] == 2
    def again(n):
        if not (tmp_path/str(n)).exists(): shutil.copytree(tmp_path/'stopped', tmp_path/str(n))
        work(tmp_path/str(n))
    for n in every(again):
        assert outcome(tmp_path/str(n)) == expected, n
        saved[n] = True
    assert len(saved) > 10


@forks
@pytest.mark.slow
@pytest.mark.parametrize('kind', ['segmentation', 'detection'])
def test_killed_after_the_last_checkpoint(tmp_path, kind):
    from localmamba.ade20k import ade20k_scenes
    from localmamba.coco import coco_scenes
    torch.set_num_threads(1)
    if kind == 'segmentation':
        home = ade20k_scenes(4, 2, tmp_path)
        at_the_end(lambda folder: segmenter_run(folder, home), tmp_path/'runs')
    else:
        home = coco_scenes(4, 2, tmp_path, size=(64, 80), n_digits=(1, 2), digit_size=(.5, .8))
        at_the_end(lambda folder: detector_run(folder, home), tmp_path/'runs')


def test_a_segmenter_stopped_after_its_last_checkpoint_is_finished(tmp_path):
    from localmamba.data import ade20k_scenes
    torch.set_num_threads(1)
    home = ade20k_scenes(4, 2, tmp_path)
    metrics, _ = segmenter_run(tmp_path/'alone', home)
    for saved in (True, False):  # with what was measured in the checkpoint, and without, as earlier versions left it
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(KeepWeights, 'after_fit', lambda self: (_ for _ in ()).throw(KeyboardInterrupt()))
            with pytest.raises(KeyboardInterrupt): segmenter_run(tmp_path/str(saved), home)
        run = run_in(tmp_path/str(saved))
        if not saved:
            state = torch.load(run.checkpoint_path, weights_only=True)
            del state['callbacks']['record']
            torch.save(state, run.checkpoint_path)
        assert segmenter_run(tmp_path/str(saved), home)[0] | {'seconds': 0} == metrics | {'seconds': 0}


# --- two processes

@forks
def test_two_processes_share_one_run(tmp_path):
    train(tmp_path/'alone', 3)
    for i in range(3):
        child = [os.fork() for _ in range(1)][0]
        if not child:
            try: train(tmp_path/str(i), 3)
            except BaseException: os._exit(1)
            os._exit(0)
        train(tmp_path/str(i), 3)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert outcome(tmp_path/str(i)) == outcome(tmp_path/'alone')


@forks
def test_a_lock_goes_with_its_process_and_the_second_says_that_it_waits(tmp_path, capfd):
    run = run_in(tmp_path)
    read, write = os.pipe()
    child = os.fork()
    if not child:
        run.lock()
        os.write(write, b'x')
        time.sleep(60)
        os._exit(0)
    os.read(read, 1)
    with pytest.raises(TimeoutError, match='another process is at work on'): run.lock(patience=0.3)
    assert 'another process is at work on it; waiting' in capfd.readouterr().err
    os.kill(child, signal.SIGKILL), os.waitpid(child, 0)
    run.lock(patience=5).release()
    assert list(run.dir.iterdir()) == []


# --- what a kill, a person or a disk can leave

def half_done(folder, epochs=3):
    "A run whose second epoch is done and saved"
    with pytest.raises(KeyboardInterrupt): train(folder, epochs, cbs=[Stop(2, 1)])
    return run_in(folder)


@pytest.mark.parametrize('change',
                         [lambda t: t[:-5], lambda t: t.split('\n')[0] + '\n', lambda t: '', lambda t: t + '7,7\n',
                                    lambda t: t.replace('0,', '5,', 1)])
def test_a_damaged_history_is_mended_from_the_checkpoint(tmp_path, change):
    train(tmp_path/'alone', 3)
    path = half_done(tmp_path/'cut').dir/'history.csv'
    path.write_text(change(path.read_text()))
    train(tmp_path/'cut', 3)
    assert outcome(tmp_path/'cut') == outcome(tmp_path/'alone')


def test_rows_that_no_checkpoint_can_mend_are_named(tmp_path):
    run = run_in(tmp_path).start()
    for epoch in (0, 2): run.log({'epoch': epoch, 'loss': 1.})
    run.save_checkpoint({'epoch': 3})
    with pytest.raises(ValueError, match=r'history.csv: got rows of the epochs \[0, 2\]; allowed: all of the 3'):
        run.load_checkpoint()
    run.release()


@pytest.mark.parametrize('content', [b'', b'PK', b'half', 'half', 'list'])
def test_no_whole_checkpoint_in_words(tmp_path, content):
    train(tmp_path/'alone', 3)
    run = half_done(tmp_path/'cut')
    whole = run.checkpoint_path.read_bytes()
    for path in (run.checkpoint_path, run.previous_path):
        if content == 'list': torch.save([1], path)
        else: path.write_bytes(whole[:len(whole) // 2] if content == 'half' else content)
    with pytest.warns(UserWarning, match='checkpoint.pt cannot be read .*going back to the one before it'):
        with pytest.warns(UserWarning, match='checkpoint.previous.pt cannot be read .*going back to the beginning'):
            train(tmp_path/'cut', 3)
    assert outcome(tmp_path/'cut') == outcome(tmp_path/'alone')


def test_a_checkpoint_that_would_unpack_to_more_than_it_is(tmp_path):
    import zipfile
    run = run_in(tmp_path).start()
    with zipfile.ZipFile(run.checkpoint_path, 'w', zipfile.ZIP_DEFLATED) as f:
        f.writestr('checkpoint/data.pkl', bytes(10 ** 7))
    with pytest.warns(UserWarning, match='claims to unpack to more than it is'): assert run.load_checkpoint() is None
    run.release()


@pytest.mark.parametrize('name, content',
                         [('metrics', '[1, 2]'), ('metrics', '7'), ('params', '"text"'), ('env', '[]')])
def test_json_of_another_kind_is_named(tmp_path, name, content):
    run = run_in(tmp_path, data={'identity': 'a', 'files': 1, 'bytes': 1})
    run.dir.mkdir(parents=True)
    (run.dir/f'{name}.json').write_text(content)
    with pytest.raises(TypeError, match=rf'{name}.json: got a .*allowed: a dict'): run.start()


def test_a_finished_run_is_cleared_of_what_finish_left(tmp_path):
    train(tmp_path)
    run = run_in(tmp_path)
    for name in ('checkpoint.pt', 'checkpoint.previous.pt', 'checkpoint.new.pt', '.history.csv.7.tmp'):
        (run.dir/name).write_bytes(b'x')
    train(tmp_path)
    outcome(tmp_path)


def test_folders_that_cannot_be_written_to(tmp_path, monkeypatch):
    def refuse(*args, **kwargs): raise PermissionError(13, 'Permission denied', str(args[0]))
    with monkeypatch.context() as m:
        m.setattr(os, 'open', refuse)
        with pytest.raises(PermissionError, match='Permission denied: a run cannot be recorded'): train(tmp_path)
    train(tmp_path)
    with monkeypatch.context() as m:
        m.setattr(os, 'open', refuse)
        (run_in(tmp_path).dir/'checkpoint.pt').write_bytes(b'x')
        assert train(tmp_path)[0]['top1'] >= 0  # reading needs no lock


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    train(tmp_path/'alone', 3)
    done, sync = 0, os.fsync
    def full(f):
        nonlocal done
        done += 1
        if done > 12: raise OSError(28, 'No space left on device')
        return sync(f)
    with monkeypatch.context() as m:
        m.setattr(os, 'fsync', full)
        with pytest.raises(OSError, match='No space left on device: not written, and what was there before stays'):
            train(tmp_path/'cut', 3)
    train(tmp_path/'cut', 3)
    assert outcome(tmp_path/'cut') == outcome(tmp_path/'alone')


def test_clocks_that_jump_back(tmp_path, monkeypatch):
    train(tmp_path/'alone', 3)
    now = iter(range(10 ** 9, 0, -3600))
    monkeypatch.setattr(time, 'time', lambda: next(now))
    half_done(tmp_path/'cut')
    train(tmp_path/'cut', 3)
    assert outcome(tmp_path/'cut') == outcome(tmp_path/'alone') and run_in(tmp_path/'cut').metrics['seconds'] >= 0


# --- a record belongs to its data

def test_other_data_under_the_same_name_are_another_run(tmp_path, capsys):
    from localmamba.files import identity, write_text
    for name in ('cat', 'dog'): write_text(tmp_path/'photos/train'/name/'1.jpg', name)
    def asked(): return dataset_name('exp', 'photos', identity(tmp_path/'photos'), tmp_path)
    def run(): return Run('exp', asked(), {'seed': 0}, 'a run', tmp_path, identity(tmp_path/'photos'))
    first = run().start()
    first.finish({'top1': 100.})
    assert run().finished and asked() == 'photos'
    write_text(tmp_path/'photos/train/dog/1.jpg', 'god')  # of the same name and size
    other = run()
    assert not other.finished and other.dir.parts[-3].startswith('photos-')
    assert 'these data are' in capsys.readouterr().out
    with pytest.raises(ValueError, match='data: got 2 files of 6 bytes .*; allowed: 2 files of 6 bytes'):
        Run('exp', 'photos', {'seed': 0}, 'a run', tmp_path, identity(tmp_path/'photos')).finished


def test_every_study_keeps_other_data_elsewhere(tmp_path, monkeypatch, capsys):
    from localmamba.files import write_text
    from localmamba.study import kept_as
    monkeypatch.chdir(tmp_path)
    for path in ('one/train/a/1.png', 'two/photos/train/a/1.png'): write_text(tmp_path/path, path)
    def kept(dataset, path, record=''):
        return kept_as('ablation_scan', dict(dataset=dataset, data_dir=path, record=record))
    assert kept('digits', '') == ('digits', None)
    name, data = kept('folder', 'one')
    Run('ablation_scan', name, {'seed': 0}, 'a run', data=data).start().finish({'top1': 1.})
    assert kept('folder', 'one') == ('folder', data)
    other, second = kept('folder', 'two/photos')
    assert other == f"folder-{second['identity'][:8]}" and 'their results go to' in capsys.readouterr().out
    with pytest.raises(ValueError, match='data: got 1 files'):
        Run('ablation_scan', kept('folder', 'two', 'folder')[0], {'seed': 0}, 'a run', data=second).finished
    for dataset, path, words in (('folder', '', 'data_dir'), ('imagenet', 'one', "got 'imagenet'")):
        with pytest.raises(ValueError, match=words): kept(dataset, path)
    with pytest.raises(FileNotFoundError, match='data: got nowhere, where no files are'): kept('folder', 'nowhere')


def test_records_that_say_nothing_stay_valid(tmp_path):
    run = run_in(tmp_path).start()
    run.finish({'top1': 1.})
    data = {'identity': 'a', 'files': 1, 'bytes': 1}
    assert dataset_name('exp', 'data', data, tmp_path) == 'data' and run_in(tmp_path, data=data).finished


@forks
@pytest.mark.parametrize('room, render, read', [(coco, coco.coco_scenes, coco.coco_instances),
                                                (ade20k, ade20k.ade20k_scenes, ade20k.ade20k)], ids=['coco', 'ade20k'])
def test_a_killed_renderer_leaves_no_half_set(tmp_path, monkeypatch, room, render, read):
    def stopped(*args, **kwargs):
        yield from scenes(2, *args[1:], **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)
    monkeypatch.setattr(room, 'scenes', stopped)
    child = os.fork()
    if not child:
        try: render(8, 2, tmp_path)
        finally: os._exit(1)  # whatever happens, the child is not to go on with the tests
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not list(tmp_path.glob('scenes*')) and list(tmp_path.glob('.partial*'))
    monkeypatch.undo()
    assert len(read(render(8, 2, tmp_path))) == 8


@pytest.mark.parametrize('name, content, words', [
    ('env', '{"data": "x"}', 'data: got'), ('env', '{"a": NaN}', 'got the value NaN'),
    ('env', '[' * 99999, 'recursion'), ('metrics', '{"a": Infinity}', 'got the value Infinity'),
    ('params', '[' * 99999, 'recursion'),
    ('metrics', '{"a": ' + '9' * 5000 + '}', 'digits')])
def test_json_that_python_alone_would_read_is_named(tmp_path, name, content, words):
    run = run_in(tmp_path, data={'identity': 'a', 'files': 1, 'bytes': 1})
    run.dir.mkdir(parents=True)
    (run.dir/f'{name}.json').write_text(content)
    with pytest.raises((TypeError, ValueError), match=rf'{name}.json: .*{words}.*allowed: '): run.start()
    run.release()


@pytest.mark.parametrize('damage', [Path.unlink, lambda path: path.write_text(''), lambda path: path.write_text('x'),
                                    lambda path: path.write_text('epoch,loss\n0,9.0\n'),
                                    lambda path: path.write_text('epoch,loss\n1,9.0\n1,9.0\n')])
def test_every_checkpoint_brings_its_history_along(tmp_path, damage):
    run = run_in(tmp_path).start()
    for epoch in range(3):
        run.log({'epoch': epoch, 'loss': 0.1 * epoch, 'word': 'a, b', 'none': None})
        if epoch < 2: run.save_checkpoint({'epoch': epoch + 1})
    damage(run.dir/'history.csv')
    assert run.load_checkpoint() == {'epoch': 2}
    assert run.history.loss.tolist() == [0., 0.1] and run.history.word.tolist() == ['a, b'] * 2
    run.release()


def test_a_history_deleted_under_an_older_checkpoint_is_missed(tmp_path):
    run = run_in(tmp_path).start()
    torch.save({'epoch': 2}, run.checkpoint_path)  # as they were written before they held the history
    with pytest.raises(ValueError, match=r'history.csv: got rows of the epochs \[\]; allowed: all of the 2'):
        run.load_checkpoint()
    run.save_checkpoint({'epoch': 2})  # of somebody who logs nothing
    assert run.load_checkpoint() == {'epoch': 2} and not (run.dir/'history.csv').exists()
    run.release()


@pytest.mark.parametrize('rows', ['x,1\ny,2\n', ',\n,\n', '0.5,1\n1,2\n', '0,1\n', '0,' + 'x' * 140_000 + '\n'])
def test_histories_of_something_else_are_named(tmp_path, rows):
    run = run_in(tmp_path).start()
    run.log({'epoch': 0, 'loss': 1.})
    run.save_checkpoint({'epoch': 2})
    (run.dir/'history.csv').write_text('epoch,loss\n' + rows)
    with pytest.raises(ValueError, match='history.csv: (got rows of the epochs|is no table)'): run.load_checkpoint()
    run.release()


@pytest.mark.parametrize('state', [{'epoch': -1}, {'epoch': True}, {'epoch': 10**9, 'history': []},
                                   {'epoch': 1, 'history': 5}, {'epoch': 1, 'history': [5]},
                                   {'epoch': 2, 'history': []}])
def test_checkpoints_that_contradict_themselves(tmp_path, state):
    run = run_in(tmp_path).start()
    torch.save(state, run.checkpoint_path)
    with pytest.warns(UserWarning, match="cannot be read .it(s history)? has (no|not)"):
        assert run.load_checkpoint() is None
    torch.save({'epoch': 10**9}, run.checkpoint_path)
    (run.dir/'history.csv').write_text('epoch\n0\n')
    with pytest.raises(ValueError, match='allowed: all of the 1000000000'): run.load_checkpoint()
    run.release()
