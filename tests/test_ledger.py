"The ledger under many writers, after a crash, on a full disk, and with what is no row in it."
import json, os, random, signal, subprocess, sys, time
import pytest
from balms.recipes import _append, format_table, read_ledger

linux = pytest.mark.skipif(sys.platform == 'win32', reason='needs POSIX')


def row(key, n=1): return dict(key=key, recipe=dict(data='digits', imbalance=50, preset='small', method='bs'), changed={}, train_crc=0, filler='x'*n)


def forked(f):
    "The process id of a child that runs `f` and is gone"
    pid = os.fork()
    if pid: return pid
    code = 1
    try: f(); code = 0
    except BaseException: sys.excepthook(*sys.exc_info()); sys.stderr.flush()
    finally: os._exit(code)


@linux
def test_eight_writers_and_two_readers_at_once(tmp_path):
    "Rows of 1 to 100,000 bytes, 40 by each: none is lost, torn or mixed with another, and no reader ever sees a part of one"
    path, rng = tmp_path/'ledger.jsonl', random.Random(0)
    sizes = [[rng.choice((1, 300, 5000, 100_000)) for _ in range(40)] for _ in range(8)]
    def write(i):
        for j, n in enumerate(sizes[i]): _append(path, row(f'{i}-{j}', n))
    def read():
        import warnings; warnings.simplefilter('error')
        for _ in range(100): rows = read_ledger(path); assert len({r['key'] for r in rows}) == len(rows)
    pids = [forked(lambda i=i: write(i)) for i in range(8)] + [forked(read) for _ in range(2)]
    assert [os.waitpid(p, 0)[1] for p in pids] == [0]*10
    rows = read_ledger(path)
    assert len(rows) == 320 and {r['key']: len(r['filler']) for r in rows} == {f'{i}-{j}': n for i, ns in enumerate(sizes) for j, n in enumerate(ns)}


@linux
def test_writers_killed_at_any_time(tmp_path):
    "Eight writers, each killed somewhere; what they had said was written is there, and the next append repairs what they tore"
    path, rng = tmp_path/'ledger.jsonl', random.Random(1)
    pipes = [os.pipe() for _ in range(8)]
    def write(i):
        for j in range(10**6): _append(path, row(f'{i}-{j}', 3000)); os.write(pipes[i][1], b'.')
    pids = [forked(lambda i=i: write(i)) for i in range(8)]
    for p in rng.sample(pids, 8): time.sleep(rng.uniform(.02, .15)); os.kill(p, signal.SIGKILL); os.waitpid(p, 0)
    for _, w in pipes: os.close(w)
    said = [len(os.read(r, 10**6)) for r, _ in pipes]
    import warnings
    with warnings.catch_warnings(): warnings.simplefilter('ignore'); _append(path, row('last'))
    keys = {r['key'] for r in read_ledger(path)}
    assert sum(said) > 8 and {f'{i}-{j}' for i, n in enumerate(said) for j in range(n)} <= keys and 'last' in keys


def test_every_place_where_a_line_can_be_torn(tmp_path):
    "Cut after each byte of the last row: reading reports it and has the rows before; the next append cuts it off, reports it, and adds its row"
    path, rows = tmp_path/'ledger.jsonl', [row('a'), row('ü\u2028'), row('c')]
    for r in rows[:2]: _append(path, r)
    whole = path.read_bytes(); _append(path, rows[2]); last = path.read_bytes()[len(whole):]
    for n in range(1, len(last) - 1):
        path.write_bytes(whole + last[:n])
        with pytest.warns(UserWarning, match=r'ledger\.jsonl, line 3 is torn, as a crash leaves it, and is left out'): assert read_ledger(path) == rows[:2]
        with pytest.warns(UserWarning, match=r'ledger\.jsonl, line 3 is torn, as a crash leaves it, and is cut off, and kept in ledger.jsonl.torn'): _append(path, row('d'))
        assert read_ledger(path) == [*rows[:2], row('d')]
    path.write_bytes(whole + last[:-1])                                        # nothing is lost but the line's end
    assert read_ledger(path) == rows
    _append(path, row('d')); assert read_ledger(path) == [*rows, row('d')]


@linux
@pytest.mark.parametrize('room', (0, 1, 50, 200))
def test_a_disk_that_is_full(tmp_path, room):
    "An error that names the file and says what is left; the rows before are as they were, to the byte; with room again the row is added"
    path = tmp_path/'ledger.jsonl'
    for k in 'ab': _append(path, row(k))
    before = path.read_bytes()
    def fill():
        import resource
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + room, resource.RLIM_INFINITY))
        with pytest.raises(OSError, match=f'Cannot write to {path}, which is as it was: File too large'): _append(path, row('c', 300))
    assert os.waitpid(forked(fill), 0)[1] == 0
    assert path.read_bytes() == before
    _append(path, row('c')); assert [r['key'] for r in read_ledger(path)] == ['a', 'b', 'c']


@linux
def test_a_disk_that_is_full_when_a_run_has_ended(tmp_path):
    "Its row finds no room: an error, the rows before as they were, the model kept; with room again the same call does not train, and adds it"
    import balms.recipes as m
    path, r = tmp_path/'ledger.jsonl', m.Recipe(iters=6, bs=32)
    _append(path, row('a', 2_000_000))                                          # more than a checkpoint has
    before = path.read_bytes()
    def call(code):
        "In a process of its own: a forked child cannot train when its parent has"
        return subprocess.run([sys.executable, '-c', f'import resource, signal, balms.recipes as m\n{code}\nm.run(m.Recipe(**{r.row!r}), {str(tmp_path)!r}, device="cpu")'], env={**os.environ, 'OMP_NUM_THREADS': '1'}, capture_output=True, text=True, timeout=200)
    p = call(f'signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nresource.setrlimit(resource.RLIMIT_FSIZE, ({len(before) + 100}, resource.RLIM_INFINITY))')
    assert p.returncode == 1 and 'which is as it was: File too large. The model is kept' in p.stderr, p.stderr
    assert path.read_bytes() == before and [p.name for p in (tmp_path/r.key).iterdir()] == ['model.pt']
    p = call('m.Learner.fit = None')                                              # it cannot train
    assert p.returncode == 0, p.stderr
    assert [x['key'] for x in read_ledger(path)] == ['a', r.key]


@linux
def test_without_locks(tmp_path, monkeypatch):
    "As on some network drives: rows are still appended whole; a line that another process is still writing is not taken for a torn one, by writers and readers; nothing is ever cut off, a torn line is left and reported"
    import threading, balms.recipes as m
    monkeypatch.setattr(m, '_lock', lambda *args: False)
    path = tmp_path/'ledger.jsonl'
    pids = [forked(lambda i=i: [_append(path, row(f'{i}-{j}', 3000)) for j in range(20)]) for i in range(4)]
    assert [os.waitpid(p, 0)[1] for p in pids] == [0]*4 and len(read_ledger(path)) == 80
    line = json.dumps(row('slow')).encode() + b'\n'
    with open(path, 'ab', buffering=0) as f:
        f.write(line[:40])
        t = threading.Timer(.3, lambda: f.write(line[40:])); t.start()
        _append(path, row('next')); t.join()
    assert [r['key'] for r in read_ledger(path)[-2:]] == ['slow', 'next']
    with open(path, 'ab', buffering=0) as f:
        f.write(line[:40])
        t = threading.Timer(.3, lambda: f.write(line[40:])); t.start()
        assert len(read_ledger(path)) == 83; t.join()
    with open(path, 'ab') as f: f.write(line[:40])
    with pytest.warns(UserWarning, match='line 84 is torn, as a crash leaves it, and is left '): pids = [forked(lambda i=i: _append(path, row(f'last {i}'))) for i in range(3)]; _append(path, row('last'))
    assert [os.waitpid(p, 0)[1] for p in pids] == [0]*3
    with pytest.warns(UserWarning, match='line 84 is torn'): rows = read_ledger(path)
    assert {r['key'] for r in rows[83:]} == {'last', 'last 0', 'last 1', 'last 2'}


BAD_ENDS = dict(carriage_returns=lambda a, b: (a + b).replace(b'\n', b'\r'), joined=lambda a, b: a + b[:-1] + a[:-1], array=lambda a, b: b'[' + a[:-1] + b',' + b[:-1] + b']', note=lambda a, b: a + b'my note',
                odd=lambda a, b: a + b[:-1].replace(b'"train_crc": 0', b'"train_crc": "0"'), utf16=lambda a, b: a.decode().encode('utf-16'), zeros=lambda a, b: a + b'\0'*9)


@pytest.mark.parametrize('how', BAD_ENDS)
def test_an_end_that_no_crash_leaves_is_not_cut_off(tmp_path, how):
    "Whatever else stands at the end of a ledger, without the end of a line, is somebody's: an error, to reader and writer, and the file as it was"
    path = tmp_path/'ledger.jsonl'
    data = BAD_ENDS[how](*(json.dumps(row(k)).encode() + b'\n' for k in 'ab'))
    path.write_bytes(data)
    for f in (read_ledger, lambda p: _append(p, row('c'))):
        with pytest.raises(ValueError, match=r'ledger\.jsonl, line [12] is not a row of a ledger'): f(path)
    assert path.read_bytes() == data and not (tmp_path/'ledger.jsonl.torn').exists()


def test_what_is_cut_off_is_kept(tmp_path):
    path = tmp_path/'ledger.jsonl'
    _append(path, row('a'))
    with open(path, 'ab') as f: f.write(b'{"key": "b", "rec')
    with pytest.warns(UserWarning, match=r'line 2 is torn.*is cut off, and kept in ledger\.jsonl\.torn'): _append(path, row('c'))
    assert (tmp_path/'ledger.jsonl.torn').read_bytes() == b'{"key": "b", "rec\n' and [r['key'] for r in read_ledger(path)] == ['a', 'c']


@linux
def test_a_full_disk_without_locks_cuts_off_nothing_of_others(tmp_path, monkeypatch):
    "Another process has added its row in the meantime: it stays, and the error says that a torn line is before it"
    import balms.recipes as m
    path = tmp_path/'ledger.jsonl'
    _append(path, row('a'))
    class Full:
        def __init__(self, f): self.f, self.n = f, 0
        def __getattr__(self, k): return getattr(self.f, k)
        def write(self, data):
            self.n += 1
            if self.n == 1: return self.f.write(data[:20])
            with open(path, 'ab') as g: g.write(b'\n' + json.dumps(row('b')).encode() + b'\n')
            raise OSError(28, 'No space left on device')
    ledger = m._ledger
    @m.contextmanager
    def full(p):
        with ledger(p) as (f, rows): yield Full(f), rows
    monkeypatch.setattr(m, '_ledger', full); monkeypatch.setattr(m, '_lock', lambda *a: False)
    with pytest.raises(OSError, match='which has a torn line now: No space left on device'): _append(path, row('c'))
    with pytest.warns(UserWarning, match='line 2 is torn'): assert [r['key'] for r in read_ledger(path)] == ['a', 'b']


def test_rows_are_forced_to_the_disk(tmp_path, monkeypatch):
    "Before `_append` returns"
    told, fsync = [], os.fsync
    monkeypatch.setattr(os, 'fsync', lambda fd: told.append(os.fstat(fd).st_size) or fsync(fd))
    _append(tmp_path/'ledger.jsonl', row('a'))
    assert told == [(tmp_path/'ledger.jsonl').stat().st_size]


def test_a_row_that_run_did_not_write(tmp_path):
    "It may stand in a ledger; the table names it, whatever it lacks"
    from balms.recipes import plot_rates, plot_runs, summary
    from balms.seg_runs import seg_table
    good = dict(key='a', recipe=dict(data='x', imbalance=5, preset='small', method='bs'), changed={}, train_crc=0, seconds=1., overall=1., many=1., medium=None, few=1., ece=1., counts=[9, 3], per_class=[.5, .5], p_y=[.4, .6], r=[.1, .2])
    assert 'Balanced Softmax' in format_table([good]) and plot_runs([good]) and plot_rates([good])
    for what in (dict(seconds='1'), dict(overall=10**400), dict(few=[1]), dict(recipe={**good['recipe'], 'imbalance': '5'}), dict(recipe={**good['recipe'], 'imbalance': [5]})):
        for f in (format_table, summary):
            with pytest.raises(ValueError, match=f'The row a has no {"imbalance" if "recipe" in what else next(iter(what))}'): f([{**good, **what}])
    for what in (dict(per_class=['x', 'y']), dict(per_class=None), dict(p_y=[.4]), dict(counts=[9, None]), dict(r=[[1], 2])):
        for f in (plot_runs, plot_rates):
            with pytest.raises(ValueError, match=f'The row a has no .*{next(iter(what))}'): f([{**good, **what}])
    with pytest.raises(ValueError, match='different numbers of images'): plot_runs([good, {**good, 'key': 'b', 'counts': [9, 2]}])
    with pytest.raises(ValueError, match='The row a has no AP'): seg_table([good], 'x', 'small')


@pytest.mark.parametrize('line', (' ', '{"torn', '5', 'null', '[]', '{}', '{"key": 1, "recipe": {}}', '{"key": "a"}', '{"key": "a", "recipe": {}}', '{"key": "a", "recipe": {"data": ["x"], "preset": "small", "method": "bs"}, "changed": {}, "train_crc": 0}', '['*100_000, '\x00', '{"key": "a", "recipe": {}}x', '\u2028'))
def test_a_line_that_is_no_row(tmp_path, line):
    "Named by file and number, wherever a ledger is read or written; nothing is cut off"
    path = tmp_path/'ledger.jsonl'
    text = f'{json.dumps(row("a"))}\n{line}\n{json.dumps(row("b"))}\n'
    path.write_text(text, encoding='utf-8')
    for f in (read_ledger, lambda p: _append(p, row('c'))):
        with pytest.raises(ValueError, match=r'ledger\.jsonl, line 2 is not a row of a ledger'): f(path)
    assert path.read_text(encoding='utf-8') == text


def test_bytes_that_are_no_text(tmp_path):
    path = tmp_path/'ledger.jsonl'
    path.write_bytes(b'\xff\xfe\n')
    with pytest.raises(ValueError, match=r'ledger\.jsonl, line 1 is not a row'): read_ledger(path)
    assert read_ledger(tmp_path/'none.jsonl') == [] and format_table([]) == 'The ledger is empty.'
