"Rows of finished runs: whole under many writers, readers and kills; damaged files are named; the ledger is collected."
import json, multiprocessing, os, random, signal, sys, time
import pytest
from balms.rows import collect_rows, environment, read_row, read_rows, write_row
from balms.tables import format_table, plot_rates, plot_runs, summary

linux = pytest.mark.skipif(sys.platform == 'win32', reason='needs POSIX')


def row(key, length=1, **more):
    recipe = dict(data='digits', imbalance=50, preset='small', method='bs', seed=0)
    return dict(key=key, recipe=recipe, changed={}, train_crc=0, environments=[{}], filler='x'*length, **more)


def write_forever(out, i):
    "Rows of 1 to 100,000 bytes, over and over into the same 20 folders, which other writers use, too"
    rng = random.Random(i)
    while True:
        key = f'run-{rng.randrange(20)}'
        size = rng.choice((1, 300, 5000, 100_000))
        write_row(out/key, row(key, size, size=size))


def check(rows):
    for r in rows: assert len(r['filler']) == r['size'] and r['key'].startswith('run-')


def read_often(out):
    for _ in range(25): check(read_rows(out))


@linux
def test_eight_writers_beside_two_readers_then_killed(tmp_path):
    "No reader ever sees a part of a row; after kills at any time every row is whole, and nothing waits for a lock"
    fork = multiprocessing.get_context('fork')
    for i in range(20): (tmp_path/f'run-{i}').mkdir()
    writers = [fork.Process(target=write_forever, args=(tmp_path, i)) for i in range(8)]
    readers = [fork.Process(target=read_often, args=(tmp_path,)) for _ in range(2)]
    for p in writers + readers: p.start()
    for p in readers: p.join(60)
    rng = random.Random(8)
    for p in writers:
        time.sleep(rng.uniform(.01, .05))
        os.kill(p.pid, signal.SIGKILL)
        p.join(10)
    assert [p.exitcode for p in readers] == [0, 0]
    assert [p.exitcode for p in writers] == [-signal.SIGKILL]*8
    rows = read_rows(tmp_path)
    check(rows)
    assert len(rows) == 20
    write_row(tmp_path/'run-0', row('run-0', 7, size=7))                    # nobody holds anything
    assert read_row(tmp_path/'run-0')['size'] == 7


def full_disk(path):
    import resource
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
    with pytest.raises(OSError, match='row.json'): write_row(path, row('b', 300))


@linux
def test_a_full_disk(tmp_path):
    "The error names the file, and the row before stays"
    write_row(tmp_path, row('a'))
    child = multiprocessing.get_context('fork').Process(target=full_disk, args=(tmp_path,))
    child.start()
    child.join(30)
    assert child.exitcode == 0 and read_row(tmp_path) == row('a')
    assert [p.name for p in tmp_path.iterdir()] == ['row.json']


NO_ROWS = '{"torn', '5', 'null', '[]', '{}', '{"key": "a", "recipe": {}}', '\xff\x00', '{}x'


@pytest.mark.parametrize('text', NO_ROWS)
def test_what_is_no_row_is_named(tmp_path, text):
    "By file, and in a ledger by line; a ledger that is added to stays as it was"
    out, ledger = tmp_path/'out', tmp_path/'ledger.jsonl'
    (out/'a').mkdir(parents=True)
    ledger.write_text(f'{json.dumps(row("b"))}\n{text}\n', encoding='latin-1')
    before = ledger.read_bytes()
    write_row(out/'a', row('a'))
    for call in (lambda: read_rows(ledger), lambda: collect_rows(out, ledger)):
        with pytest.raises(ValueError, match=r'ledger\.jsonl, line 2'): call()
    assert ledger.read_bytes() == before
    (out/'a'/'row.json').write_text(text, encoding='latin-1')
    for call in (lambda: read_row(out/'a'), lambda: read_rows(out)):
        with pytest.raises(ValueError, match=r'row\.json'): call()


def test_collect(tmp_path):
    "One row a key; what the ledger has stays; names and odd characters survive; other images are an error"
    out, ledger = tmp_path/'out', tmp_path/'ledger.jsonl'
    for key in ('b', 'ü\u2028', 'a'):
        (out/key).mkdir(parents=True)
        write_row(out/key, row(key))
    assert sorted(collect_rows(out, ledger)) == sorted(['a', 'b', 'ü\u2028'])
    write_row(out/'a', dict(row('a'), filler='again'))
    assert collect_rows(out, ledger) == [] and {r['filler'] for r in read_rows(ledger)} == {'x'}
    write_row(out/'a', dict(row('a'), train_crc=1))
    with pytest.raises(ValueError, match='a measured on other images'): collect_rows(out, ledger)
    with pytest.raises(FileNotFoundError): read_rows(tmp_path/'none.jsonl')


def test_git_is_asked_once_a_process(monkeypatch):
    import subprocess
    from balms import rows
    calls, run = [], subprocess.run
    monkeypatch.setattr(subprocess, 'run', lambda *a, **kw: (calls.append(a), run(*a, **kw))[1])
    rows._commit.cache_clear()
    for _ in range(8): environment('cpu')
    assert len(calls) <= 1


def test_tables_name_a_row_of_another_kind(tmp_path):
    "A row of detection has no accuracy by class"
    scores = dict(seconds=1., overall=1., many=1., medium=None, few=1., ece=1.)
    good = row('a', **scores, counts=[9, 3], per_class=[.5, .5], p_y=[.4, .6], r=[.1, .2])
    assert 'Balanced Softmax' in format_table([good]) and plot_runs([good]) and plot_rates([good])
    for f, field in ((format_table, 'few'), (summary, 'seconds'), (plot_runs, 'p_y'), (plot_rates, 'counts')):
        less = {k: v for k, v in good.items() if k != field}
        with pytest.raises(ValueError, match=f'The row a has no {field}'): f([less])
