"Runs as processes: the command line, stopping and going on, and what a user sees when something is wrong."
import os, re, signal, subprocess, sys, time
from types import SimpleNamespace
import numpy as np, pytest, torch
from PIL import Image
from balms.baselines import LDAM, CosineLinear
from balms.checkpoint import Interrupted
from balms.cli import balms_table, balms_train
from balms.datasets import load_digits
from balms.methods import METHODS, Method
from balms.models import get_model
from balms.recipe import Recipe
from balms.rows import read_rows
from balms.runs import evaluate, probabilities, run
from balms.sigmoid import BalancedSigmoid
from balms.weights import load_weights, read_metadata, read_tensors

ENV = {**os.environ, 'OMP_NUM_THREADS': '1'}
SCORES = ('key', 'overall', 'many', 'medium', 'few', 'ece', 'nll', 'per_class', 'p_y', 'counts', 'train_crc')


def command(name, *args): return [sys.executable, '-m', 'balms.cli', name.removeprefix('balms_'), *map(str, args)]


def call(name, *args, cwd, **kw):
    env = {**ENV, 'PYTHONPATH': os.pathsep.join(filter(None, map(os.path.abspath, sys.path))), **kw}
    return subprocess.run(command(name, *args), cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def start(*args, cwd, **kw):
    env = {**ENV, 'PYTHONPATH': os.pathsep.join(filter(None, map(os.path.abspath, sys.path)))}
    return subprocess.Popen(command('balms_train', *args), cwd=cwd, env=env, **kw)


@pytest.fixture
def here(tmp_path, monkeypatch, capsys):
    "The commands in this process, in a folder of their own: as `call`"
    monkeypatch.chdir(tmp_path)
    def run_here(name, *args):
        status = 0
        try: {'balms_train': balms_train, 'balms_table': balms_table}[name](list(map(str, args)))
        except SystemExit as e: status = e.code
        return SimpleNamespace(returncode=status, **dict(zip(('stdout', 'stderr'), capsys.readouterr())))
    return run_here


def weights(d): return read_tensors(next((d/'runs').glob('*/model.safetensors')))


def assert_error(r, *words):
    "One line that has these words, and exit status 2"
    assert r.returncode == 2 and len(r.stderr.splitlines()) == 1, r.stderr
    for word in words: assert word in r.stderr, r.stderr


def test_main_job(tmp_path):
    "The README's job, shortened: a table, a figure, a row a run, no warnings; a second call trains nothing"
    args = ('--iters', 30, '--seeds', 2, '--device', 'cpu')
    r = call('balms_train', *args, cwd=tmp_path)
    assert r.returncode == 0 and not r.stderr, r.stderr
    assert 'Softmax' in r.stdout and 'Balanced Softmax' in r.stdout and '±' in r.stdout
    first = (r'digits-50-small-softmax-0-\w+: small_cnn, [\d,]+ parameters; '
             r'\d+ training and 500 test images of 10 classes; 30 steps of 64 images')
    assert re.fullmatch(first, r.stdout.splitlines()[0]), r.stdout
    assert Image.open(tmp_path/'runs/digits-50-small-iters=30.png').size[0] > 500
    rows = read_rows(tmp_path/'runs')
    assert [x['recipe']['method'] for x in rows] == ['bs', 'bs', 'softmax', 'softmax']
    (environment,) = rows[0]['environments']
    assert environment['torch'] == torch.__version__ and environment['device'] == 'cpu' and rows[0]['counts'][0] == 128
    assert call('balms_train', *args, cwd=tmp_path).returncode == 0 and read_rows(tmp_path/'runs') == rows
    t = call('balms_table', '--markdown', '--collect', 'ledger.jsonl', cwd=tmp_path)
    assert t.returncode == 0 and '| Balanced Softmax |' in t.stdout and read_rows(tmp_path/'ledger.jsonl') == rows


def test_a_model_of_the_command_line_is_used_afterwards(tmp_path, here):
    "Five lines, and it predicts the right classes"
    assert here('balms_train', '--method', 'bs', '--seeds', 1, '--device', 'cpu').returncode == 0
    (file,), (_, test) = (tmp_path/'runs').glob('*/model.safetensors'), load_digits()
    about = read_metadata(file)
    net = get_model(about['network'], len(about['classes']), about['in_channels']).eval()
    load_weights(net, file, keep_classifier=True)
    mean, std = (torch.tensor(about[k])[:, None, None] for k in ('mean', 'std'))
    predicted = net((test.images.float()/255 - mean)/std).argmax(1)
    assert about['classes'] == [str(i) for i in range(10)] and about['size'] == [8, 8]
    accuracy = (predicted == test.targets).float().mean().item()
    assert 100*accuracy == pytest.approx(read_rows(tmp_path/'runs')[0]['overall'])


linux = pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='needs Linux: looks into /proc')


def wait_for_training(p):
    "Until the process handles SIGTERM, which it does while it trains"
    for _ in range(1200):
        caught = next(line for line in open(f'/proc/{p.pid}/status') if line.startswith('SigCgt'))
        if int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1: return
        time.sleep(.05)


@linux
@pytest.mark.parametrize('sig', (signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)))
def test_stopped_run_goes_on_to_the_same_weights(tmp_path, sig):
    (tmp_path/'a').mkdir(); (tmp_path/'b').mkdir()
    args = ('--method', 'bs', '--seeds', 1, '--iters', 800, '--device', 'cpu')
    assert call('balms_train', *args, cwd=tmp_path/'a').returncode == 0
    p = start(*args, cwd=tmp_path/'b', stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_training(p)
    time.sleep(.3); p.send_signal(sig)
    err = p.communicate(timeout=60)[1]
    assert p.returncode == 130 and 'The same command goes on from there' in err, (p.returncode, err)
    step = torch.load(next((tmp_path/'b/runs').glob('*/checkpoint.pt')), weights_only=True)['step']
    assert 0 < step < 800
    assert call('balms_train', *args, cwd=tmp_path/'b').returncode == 0
    a, b = weights(tmp_path/'a'), weights(tmp_path/'b')
    assert all(torch.equal(a[k], b[k]) for k in a)
    (ra,), (rb,) = read_rows(tmp_path/'a/runs'), read_rows(tmp_path/'b/runs')
    assert all(ra[k] == rb[k] for k in SCORES)


@linux
def test_balms_stopped_in_its_second_stage(tmp_path):
    "Stage 1 is trained once; a run stopped in stage 2 goes on there and ends as the one that was not stopped"
    args = ('--method', 'softmax', 'balms', '--seeds', 1, '--iters', 30, '--iters2', 900, '--device', 'cpu')
    (tmp_path/'a').mkdir(); (tmp_path/'b').mkdir()
    r = call('balms_train', *args, cwd=tmp_path/'a')
    assert r.returncode == 0 and 'BALMS' in r.stdout, r.stderr
    assert len(list((tmp_path/'a/runs').glob('digits-50-small-softmax-0-*'))) == 1
    p = start(*args, cwd=tmp_path/'b', stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in p.stdout:
        if '[1/2]' in line: break
    wait_for_training(p)
    time.sleep(.3); p.send_signal(signal.SIGTERM)
    err = p.communicate(timeout=120)[1]
    assert p.returncode == 130 and 'of 900' in err, err
    assert call('balms_train', *args, cwd=tmp_path/'b').returncode == 0
    a, b = ([{k: row.get(k) for k in ('key', 'nll', 'p_y', 'r')} for row in read_rows(tmp_path/d/'runs')] for d in 'ab')
    assert a == b and any(row['r'] for row in a)


def folder(root, train):
    rng = np.random.default_rng(0)
    for split, ns in (('train', train), ('test', (8, 8, 8))):
        for j, (c, n) in enumerate(zip(('dark', 'grey', 'light'), ns)):
            (root/split/c).mkdir(parents=True)
            for i in range(n):
                h, w = rng.integers(12, 20, 2)
                image = (80*j + rng.integers(0, 60, (h, w, 3))).astype(np.uint8)
                Image.fromarray(image).save(root/split/c/f'{i}.png')
    return root


def test_own_folder(tmp_path, here):
    "Images of differing sizes with the tail they have, and the same folder thinned"
    folder(tmp_path/'photos', (40, 20, 10))
    args = ('--data', 'photos', '--seeds', 1, '--iters', 12, '--device', 'cpu')
    assert_error(here('balms_train', *args), 'size')
    r = here('balms_train', *args, '--size', 16)
    assert r.returncode == 0 and 'its own tail' in r.stdout, r.stderr
    assert [x['counts'] for x in read_rows('runs')] == [[40, 20, 10]]*2
    assert here('balms_train', *args, '--size', 16, '--imbalance', 20, '--method', 'bs').returncode == 0
    assert [40, 8, 2] in [x['counts'] for x in read_rows('runs')]
    figures = sorted(f.name for f in (tmp_path/'runs').glob('*.png'))
    assert figures == [f'photos-{tail}-small-size=16-iters=12.png' for tail in ('20', 'own')]


def test_odd_names_reach_no_file_name(tmp_path, here):
    "Paths of weights and of data, spaces and other characters: a table and a figure"
    args = ('--method', 'bs', '--seeds', 1, '--iters', 5, '--device', 'cpu')
    assert here('balms_train', *args).returncode == 0
    (model,) = (tmp_path/'runs').glob('*/model.safetensors')
    (tmp_path/'some').mkdir()
    model.rename(tmp_path/'some/my file: 1.safetensors')
    folder(tmp_path/'some/my photos?', (9, 5, 3))
    for args in (('--weights', 'some/my file: 1.safetensors', '--seeds', 1),
                 ('--data', 'some/my photos?', '--size', 8, '--seeds', 1)):
        r = here('balms_train', *args, '--iters', 6, '--device', 'cpu', '--out', 'other')
        assert r.returncode == 0, r.stderr
    names = [f.name for f in (tmp_path/'other').glob('*.png')]
    assert len(names) == 2 and all(re.fullmatch(r'[\w.=+-]+', name) for name in names), names


@pytest.mark.parametrize('args,message', [
    (['--data', 'cifar'], "'cifar'"), (['--data', './none'], 'none'), (['--method', 'bs', 'sbs'], "'sbs'"),
    (['--imbalance', '500'], '500'), (['--out', '/proc/none'], '/proc/none'), (['--device', 'cuda:77'], 'cuda:77'),
    (['--iters2', '5'], 'iters2'), (['--weights', 'nowhere.pth'], 'nowhere.pth')])
def test_one_line_errors(here, args, message): assert_error(here('balms_train', *args), message)


def test_an_error_of_a_process_is_one_line(tmp_path):
    assert_error(call('balms_train', '--method', 'sbs', cwd=tmp_path), "'sbs'")


def test_help_is_immediate(tmp_path):
    "It imports neither torch nor fastai, and names every method and every field of a recipe; --version is there"
    code = 'import sys; from balms.cli import main\ntry: main(["train", "--help"])\nfinally: print(*sys.modules)'
    r = subprocess.run([sys.executable, '-c', code], env=ENV, capture_output=True, text=True)
    text, modules = r.stdout.rsplit('\n', 2)[:2]
    assert not {'torch', 'fastai', 'numpy'} & set(modules.split())
    for name in METHODS: assert re.search(rf'^ +{name} ', text, re.M), name
    for field in Recipe.__dataclass_fields__: assert field == 'seed' or '--' + field.replace('_', '-') in text, field
    assert re.fullmatch(r'balms \d+\.\d+\.\d+\n', call('balms_train', '--version', cwd=tmp_path).stdout)


def test_other_images_under_the_same_recipe_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder(tmp_path/'photos', (20, 10, 5))
    r = Recipe('photos', method='softmax', size=8, iters=4)
    run(r, device='cpu')
    (tmp_path/'photos/train/dark/0.png').unlink()
    for method in ('posthoc', 'softmax'):                                    # the model, and the row
        r = Recipe('photos', method=method, size=8, iters=4)
        with pytest.raises(ValueError, match='other images'): run(r, device='cpu')


def test_rows_of_other_subsets_say_what_was_drawn_from(tmp_path):
    row, other = (run(Recipe(method='softmax', iters=4, split_seed=s), tmp_path, device='cpu') for s in (0, 1))
    assert other['source'] == load_digits()[0].source and 'source' not in row and row['train_crc'] != other['train_crc']


def test_a_method_of_ones_own_is_measured_as_the_built_in(tmp_path, monkeypatch):
    "Probabilities come from the loss: with LDAM, ECE and likelihood are those of the row of the table"
    monkeypatch.setitem(METHODS, 'my_ldam', Method('My LDAM', LDAM, head=CosineLinear))
    ours, mine = (run(Recipe(method=m, iters=60), tmp_path, device='cpu') for m in ('ldam', 'my_ldam'))
    assert all(ours[k] == mine[k] for k in ('overall', 'ece', 'nll', 'per_class', 'p_y'))


def test_probabilities_are_those_of_the_loss():
    "LDAM's classifier gives cosines: their softmax alone is nearly flat, and so a wrong answer about calibration"
    cosines, targs, counts = torch.randn(50, 3).tanh(), torch.randint(3, (50,)), [9, 3, 1]
    loss = LDAM(counts)
    torch.testing.assert_close(probabilities(cosines, loss), (loss.s*cosines).softmax(1))
    assert evaluate(cosines, targs, counts, loss) == evaluate(loss.s*cosines, targs, counts)
    sigmoids = cosines.sigmoid()                                      # those of a row do not sum to 1
    torch.testing.assert_close(probabilities(cosines, BalancedSigmoid(counts)), sigmoids/sigmoids.sum(1, keepdim=True))


def test_one_process_of_git_at_most(tmp_path):
    git = tmp_path/'bin/git'
    git.parent.mkdir()
    git.write_text(f'#!/bin/sh\necho called >> {tmp_path}/calls\necho abc\n')
    git.chmod(0o755)
    path = f'{git.parent}{os.pathsep}{os.environ["PATH"]}'
    assert call('balms_train', '--iters', 5, '--seeds', 1, '--device', 'cpu', cwd=tmp_path, PATH=path).returncode == 0
    calls = tmp_path/'calls'
    assert not calls.exists() or calls.read_text() == 'called\n'


def test_a_run_that_fails_gives_the_signals_back(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.functional, 'cross_entropy', lambda *a, **k: 1/0)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ZeroDivisionError): run(Recipe(method='softmax', iters=4), tmp_path, device='cpu')
    assert signal.getsignal(signal.SIGINT) is before


def test_a_diverged_run_has_no_row(tmp_path):
    r = Recipe(iters=20, lr=1e6, warmup=0)
    with pytest.raises(Interrupted): run(r, tmp_path, device='cpu', stop_at=20)
    for _ in range(2):
        with pytest.raises(FloatingPointError, match='diverged'): run(r, tmp_path, device='cpu')
    assert read_rows(tmp_path) == []


@pytest.mark.parametrize('method, at', [('bs', 20), ('balms', 20), ('balms', 30)])
def test_stopped_after_the_last_step_of_a_stage(tmp_path, method, at):
    "Nothing is trained a step too many"
    r = Recipe(method=method, iters=20, **({'iters2': 10} if method == 'balms' else {}))
    whole = run(r, tmp_path/'a', device='cpu')
    with pytest.raises(Interrupted): run(r, tmp_path/'b', device='cpu', stop_at=at)
    again = run(r, tmp_path/'b', device='cpu')
    assert again['nll'] == whole['nll'] and again.get('r') == whole.get('r')


def test_tables(tmp_path, here):
    assert_error(here('balms_table'), 'runs')
    (tmp_path/'runs/a').mkdir(parents=True)
    r = here('balms_table', '--table', 5)
    assert r.returncode == 0 and 'missing / 81.5' in r.stdout
    assert 'balms_train --data cifar100 --imbalance 10 --preset paper' in r.stdout
    assert_error(here('balms_table', '--table', 3), '3')
    (tmp_path/'runs/a/row.json').write_text('{"broken')
    assert_error(here('balms_table'), 'row.json')


@pytest.mark.skipif(os.name != 'posix', reason='needs a pseudo-terminal')
def test_progress_bar_on_a_terminal(tmp_path):
    "One line that is written over"
    import pty
    main, child = pty.openpty()
    args = ('--method', 'bs', '--seeds', 1, '--iters', 150, '--device', 'cpu')
    p = start(*args, cwd=tmp_path, stdout=child, stderr=child)
    os.close(child)
    out = b''
    while True:
        try: chunk = os.read(main, 65536)
        except OSError: break                                                # the other end is closed
        if not chunk: break
        out += chunk
    assert p.wait(60) == 0 and b'\r' in out and b'step 150/150, loss' in out, out[-2000:]


def test_progress_in_a_pipe(tmp_path, monkeypatch, capsys):
    "A line in half a minute, with step, loss and the time that is left"
    monkeypatch.setattr('balms.stage.time.monotonic', iter(range(0, 10**6, 4)).__next__)
    run(Recipe(method='bs', iters=40), tmp_path, device='cpu', progress=True)
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith('digits-50-small-bs-0-') and 2 <= len(lines) < 20
    for line in lines: assert re.fullmatch(r'digits-50-.*: step \d+/40, loss \d\.\d+, \d+ (s|min) left', line), line


def test_one_and_two_stages_in_one_table_and_figure(tmp_path, here):
    args = ('--method', 'softmax', 'bs_dt', 'balms', '--seeds', 1, '--iters', 20, '--iters2', 10, '--views', 1)
    r = here('balms_train', *args, '--device', 'cpu')
    assert r.returncode == 0, r.stderr
    assert r.stdout.count('preset small') == 1 and 'BALMS' in r.stdout
    assert len(list((tmp_path/'runs').glob('*.png'))) == 1


@linux
def test_a_disk_that_is_full_at_the_figure(tmp_path, here):
    "The table is printed, the error is one line that names the figure, and the figure that was there is as it was"
    args = ('--method', 'softmax', 'bs', '--seeds', 1, '--iters', 20, '--device', 'cpu')
    assert here('balms_train', *args).returncode == 0
    (figure,) = (tmp_path/'runs').glob('*.png')
    before = figure.read_bytes()
    line = ['bash', '-c', 'ulimit -f 8; exec "$0" "$@"', *command('balms_train', *args)]
    env = {**ENV, 'PYTHONPATH': os.pathsep.join(filter(None, map(os.path.abspath, sys.path)))}
    r = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert 'Balanced Softmax' in r.stdout
    assert_error(r, figure.name, 'File too large')
    assert figure.read_bytes() == before
