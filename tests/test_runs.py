"Runs as processes: the command line, stopping and going on, and what a user sees when something is wrong."
import json, os, signal, subprocess, sys, time
import numpy as np, pytest, torch
from PIL import Image

ENV = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONWARNINGS': 'ignore'}


def command(name, *args): return [sys.executable, '-c', f'from balms.cli import {name}; {name}()', *map(str, args)]
def call(name, *args, cwd, **kw): return subprocess.run(command(name, *args), cwd=cwd, env={**ENV, **kw}, capture_output=True, text=True, timeout=300)
def ledger(d): return [json.loads(l) for l in (d/'runs/ledger.jsonl').read_text().splitlines()]
def weights(d): return torch.load(next((d/'runs').glob('*/model.pt')), weights_only=True)['model']
SCORES = ('key', 'overall', 'many', 'medium', 'few', 'ece', 'nll', 'per_class', 'p_y', 'counts', 'train_crc')


def test_main_job(tmp_path):
    "The README's job, shortened: a table, a figure, a ledger; a second call trains nothing"
    r = call('balms_train', '--iters', 30, '--seeds', 2, '--device', 'cpu', cwd=tmp_path)
    assert r.returncode == 0, r.stderr
    assert 'Softmax' in r.stdout and 'Balanced Softmax' in r.stdout and '±' in r.stdout and 'preset small (iters=30)' in r.stdout
    assert Image.open(tmp_path/'runs/digits-50-small-iters=30.png').size[0] > 500
    rows = ledger(tmp_path)
    assert [(x['recipe']['method'], x['recipe']['seed']) for x in rows] == [('softmax', 0), ('bs', 0), ('softmax', 1), ('bs', 1)]
    assert rows[0]['torch'] == torch.__version__ and rows[0]['device'] == 'cpu' and rows[0]['counts'][0] == 128
    assert call('balms_train', '--iters', 30, '--seeds', 2, '--device', 'cpu', cwd=tmp_path).returncode == 0 and ledger(tmp_path) == rows
    t = call('balms_table', '--markdown', cwd=tmp_path)
    assert t.returncode == 0 and '| Balanced Softmax |' in t.stdout


linux = pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='needs Linux: looks into /proc for the signal handler')


def wait_for_training(p):
    "Until the process handles SIGTERM, which it does while it trains"
    for _ in range(1200):
        caught = next(l for l in open(f'/proc/{p.pid}/status') if l.startswith('SigCgt'))
        if int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1: return
        time.sleep(.05)


@linux
@pytest.mark.parametrize('sig', (signal.SIGINT, signal.SIGTERM))
def test_stopped_run_goes_on_to_the_same_weights(tmp_path, sig):
    (tmp_path/'a').mkdir(); (tmp_path/'b').mkdir()
    args = ('--method', 'bs', '--seeds', 1, '--iters', 800, '--device', 'cpu')
    assert call('balms_train', *args, cwd=tmp_path/'a').returncode == 0
    p = subprocess.Popen(command('balms_train', *args), cwd=tmp_path/'b', env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_training(p)
    time.sleep(.3); p.send_signal(sig)
    out, err = p.communicate(timeout=60)
    assert p.returncode == 130 and 'The same command goes on from there' in err, (p.returncode, err)
    step = torch.load(next((tmp_path/'b/runs').glob('*/checkpoint.pt')), weights_only=True)['step']
    assert 0 < step < 800
    assert call('balms_train', *args, cwd=tmp_path/'b').returncode == 0
    a, b = weights(tmp_path/'a'), weights(tmp_path/'b')
    assert all(torch.equal(a[k], b[k]) for k in a)
    (ra,), (rb,) = ledger(tmp_path/'a'), ledger(tmp_path/'b')
    assert all(ra[k] == rb[k] for k in SCORES)


def folder(root, train):
    rng = np.random.default_rng(0)
    for split, ns in (('train', train), ('test', (8, 8, 8))):
        for j, (c, n) in enumerate(zip(('dark', 'grey', 'light'), ns)):
            (root/split/c).mkdir(parents=True)
            for i in range(n):
                h, w = rng.integers(12, 20, 2)
                Image.fromarray((80*j + rng.integers(0, 60, (h, w, 3))).astype(np.uint8)).save(root/split/c/f'{i}.png')
    return root


def test_own_folder(tmp_path):
    "Images of differing sizes with the tail they have, and the same folder thinned"
    folder(tmp_path/'photos', (40, 20, 10))
    args = ('--data', 'photos', '--seeds', 1, '--iters', 12, '--device', 'cpu')
    r = call('balms_train', *args, cwd=tmp_path, BALMS_CACHE=str(tmp_path/'c'))
    assert r.returncode == 2 and '--size' in r.stderr and 'Traceback' not in r.stderr
    r = call('balms_train', *args, '--size', 16, cwd=tmp_path, BALMS_CACHE=str(tmp_path/'c'))
    assert r.returncode == 0 and 'its own tail' in r.stdout, r.stderr
    assert ledger(tmp_path)[-1]['counts'] == [40, 20, 10]
    r = call('balms_train', *args, '--size', 16, '--imbalance', 20, cwd=tmp_path, BALMS_CACHE=str(tmp_path/'c'))
    assert r.returncode == 0 and ledger(tmp_path)[-1]['counts'] == [40, 8, 2]
    assert {f.name for f in (tmp_path/'runs').glob('*.png')} == {f'photos-{t}-small-size=16-iters=12.png' for t in ('own', '20')}


@pytest.mark.parametrize('args,message', [
    (['--data', 'cifar'], "Unknown data set 'cifar': choose from digits"), (['--data', './none'], 'No folder'), (['--method', 'bs', 'sbs'], "Unknown method 'sbs'"),
    (['--imbalance', '500'], 'the largest imbalance'), (['--out', '/proc/nowhere'], 'Cannot write to the output folder'), (['--device', 'cuda:77'], 'cannot be used here'),
])
def test_one_line_errors(tmp_path, args, message):
    r = call('balms_train', *args, cwd=tmp_path)
    assert r.returncode == 2 and message in r.stderr and 'Traceback' not in r.stderr and len(r.stderr.splitlines()) == 1, r.stderr


def test_other_images_under_the_same_recipe_are_refused(tmp_path, monkeypatch):
    from balms.recipes import Recipe, run
    monkeypatch.chdir(tmp_path)
    folder(tmp_path/'photos', (20, 10, 5))
    r = Recipe('photos', method='softmax', size=8, iters=4)
    run(r, device='cpu')
    (tmp_path/'photos/train/dark/0.png').unlink()
    for method in ('posthoc', 'softmax'):                                    # the model, and the row of the ledger
        with pytest.raises(ValueError, match='other images'): run(Recipe('photos', method=method, size=8, iters=4), device='cpu')


def test_a_run_that_fails_gives_the_signals_back(tmp_path, monkeypatch):
    from balms import recipes
    monkeypatch.setattr(torch.nn.functional, 'cross_entropy', lambda *a, **k: 1/0)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ZeroDivisionError): recipes.run(recipes.Recipe(method='softmax', iters=4), tmp_path, device='cpu')
    assert signal.getsignal(signal.SIGINT) is before


def test_a_diverged_run_never_reaches_the_ledger(tmp_path):
    from balms.recipes import Interrupted, Recipe, run
    r = Recipe(iters=20, lr=1e6, warmup=0)
    with pytest.raises(Interrupted): run(r, tmp_path, device='cpu', stop_at=20)
    for _ in range(2):
        with pytest.raises(FloatingPointError, match='diverged'): run(r, tmp_path, device='cpu')
    assert (tmp_path/'ledger.jsonl').read_text() == ''


def test_table_without_ledger(tmp_path):
    r = call('balms_table', cwd=tmp_path)
    assert r.returncode == 2 and 'balms_train makes one' in r.stderr
    (tmp_path/'runs').mkdir(); (tmp_path/'runs/ledger.jsonl').write_text('{"broken\n')
    r = call('balms_table', cwd=tmp_path)
    assert r.returncode == 2 and 'ledger.jsonl, line 1' in r.stderr and 'Traceback' not in r.stderr


@pytest.mark.skipif(os.name != 'posix', reason='needs a pseudo-terminal')
def test_progress_bar_on_a_terminal_only(tmp_path):
    "A bar with the loss on a terminal; plain lines in a pipe"
    import pty
    args = ('--method', 'bs', '--seeds', 1, '--iters', 150, '--device', 'cpu')
    main, child = pty.openpty()
    p = subprocess.Popen(command('balms_train', *args), cwd=tmp_path, env=ENV, stdout=child, stderr=child, close_fds=True)
    os.close(child)
    out = b''
    while True:
        try: chunk = os.read(main, 65536)
        except OSError: break                                                # the other end is closed
        if not chunk: break
        out += chunk
    assert p.wait(60) == 0 and b'\r' in out and b'150/150' in out, out[-2000:]
    (tmp_path/'pipe').mkdir()
    r = call('balms_train', *args, cwd=tmp_path/'pipe')
    assert r.returncode == 0 and '\r' not in r.stdout + r.stderr and '150/150' not in r.stdout


def test_a_foreign_repository_is_not_the_commit(tmp_path):
    "Installed inside somebody else's git repository, a row must not name that repository's commit"
    import shutil, balms
    shutil.copytree(os.path.dirname(balms.__file__), tmp_path/'balms')
    git = ['git', '-c', 'user.name=a', '-c', 'user.email=a@b', '-C', str(tmp_path)]
    for a in (['init', '-q'], ['commit', '-q', '--allow-empty', '-m', 'theirs']): subprocess.run([*git, *a], check=True)
    code = 'from balms.recipes import _commit; import balms; print(balms.__file__, _commit())'
    r = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env={**ENV, 'PYTHONPATH': str(tmp_path)}, capture_output=True, text=True, check=True)
    assert r.stdout.split() == [str(tmp_path/'balms'/'__init__.py'), 'None']


@linux
def test_balms_from_the_command_line_killed_in_its_second_stage(tmp_path):
    "Stage 1 is trained once, for Softmax and both decoupled methods; a run stopped in stage 2 goes on there and ends as the one that was not stopped"
    args = ['--method', 'softmax', 'bs_cbs_dt', 'balms', '--seeds', 1, '--iters', 30, '--iters2', 900, '--device', 'cpu']
    (tmp_path/'a').mkdir(); (tmp_path/'b').mkdir()
    r = call('balms_train', *args, cwd=tmp_path/'a')
    assert r.returncode == 0 and 'BALMS' in r.stdout, r.stderr
    assert len(list((tmp_path/'a/runs').glob('digits-50-small-softmax-0-*'))) == 1
    p = subprocess.Popen(command('balms_train', *args), cwd=tmp_path/'b', env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in p.stdout:
        if 'bs_cbs_dt' in line: break
    wait_for_training(p)
    time.sleep(.2); p.send_signal(signal.SIGTERM)
    err = p.communicate(timeout=120)[1]
    assert p.returncode == 130 and 'of 900' in err, err
    r = call('balms_train', *args, cwd=tmp_path/'b')
    assert r.returncode == 0, r.stderr
    a, b = ([{k: row[k] for k in ('key', 'nll', 'p_y')} | {'r': row.get('r')} for row in ledger(tmp_path/d)] for d in 'ab')
    assert a == b and a[-1]['r'] is not None


def test_table_of_the_paper_from_the_command_line(tmp_path):
    (tmp_path/'runs').mkdir(); (tmp_path/'runs/ledger.jsonl').write_text('')
    r = call('balms_table', '--table', 5, cwd=tmp_path)
    assert r.returncode == 0 and 'missing / 81.5' in r.stdout and 'balms_train --data cifar100 --imbalance 10 --preset paper' in r.stdout
    r = call('balms_table', '--table', 3, cwd=tmp_path)
    assert r.returncode == 2 and 'choose from 2, 5, 7, 8' in r.stderr


@pytest.mark.parametrize('method, at', [('bs', 20), ('balms', 20), ('balms', 30)])
def test_stopped_after_the_last_step_of_a_stage(tmp_path, method, at):
    "Nothing is trained a step too many"
    from balms.recipes import Interrupted, Recipe, run
    r = Recipe(method=method, iters=20, **({'iters2': 10} if method == 'balms' else {}))
    whole = run(r, tmp_path/'a', device='cpu')
    with pytest.raises(Interrupted): run(r, tmp_path/'b', device='cpu', stop_at=at)
    again = run(r, tmp_path/'b', device='cpu')
    assert again['nll'] == whole['nll'] and again.get('r') == whole.get('r')


def test_one_and_two_stages_in_one_table_and_figure(tmp_path):
    r = call('balms_train', '--method', 'softmax', 'bs_dt', 'balms', '--seeds', 1, '--iters', 20, '--iters2', 10, '--views', 1, '--device', 'cpu', cwd=tmp_path)
    assert r.returncode == 0, r.stderr
    assert r.stdout.count('preset small') == 1 and 'BALMS' in r.stdout and len(list((tmp_path/'runs').glob('*.png'))) == 1


@linux
def test_a_disk_that_is_full_at_the_figure(tmp_path):
    "The table is printed, the error is one line that names the figure, and the figure that was there is as it was"
    args = ('--method', 'softmax', 'bs', '--seeds', 1, '--iters', 20, '--device', 'cpu')
    assert call('balms_train', *args, cwd=tmp_path).returncode == 0
    (figure,) = (tmp_path/'runs').glob('*.png')
    before = figure.read_bytes()
    r = subprocess.run(['bash', '-c', 'ulimit -f 8; exec "$0" "$@"', *command('balms_train', *args)], cwd=tmp_path, env=ENV, capture_output=True, text=True)
    assert r.returncode == 2 and 'Balanced Softmax' in r.stdout and figure.name in r.stderr and 'File too large' in r.stderr and 'Traceback' not in r.stderr, (r.stdout, r.stderr)
    assert figure.read_bytes() == before and sorted(p.suffix for p in (tmp_path/'runs').iterdir() if p.is_file()) == ['.jsonl', '.png']
