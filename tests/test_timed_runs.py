"""The runner for a GPU that one has for minutes: rows as they come, nothing begun that cannot end, and going on."""
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path
import pytest
from balms.rows import read_rows

TOOL = Path(__file__).parent.parent/'tools/timed_runs.py'


def command(tmp_path, *args, out='runs', seconds=200, iters=40):
    methods = '--methods', 'softmax,posthoc,balms'
    toy = '--imbalance', '50', '--preset', 'small', '--iters', str(iters), '--iters2', '20', '--device', 'cpu'
    files = '--out', tmp_path/out, '--ledger', tmp_path/'rows.jsonl', '--models', tmp_path/'models.zip'
    once = '--seeds', '1', '--workers', '1', '--seconds', str(seconds)
    return [sys.executable, str(TOOL), 'digits', *toy, *methods, *once, *map(str, files), *args]


def call(*args, **kwargs):
    env = os.environ | dict(BALMS_COMMIT='abc1234', PYTHONPATH=str(TOOL.parent.parent))
    return subprocess.run(command(*args, **kwargs), env=env, capture_output=True, text=True, check=True).stdout


def test_rows_ledger_and_models(tmp_path):
    said = call(tmp_path)
    rows = {r['recipe']['method']: r for r in read_rows(tmp_path/'rows.jsonl')}
    assert set(rows) == {'softmax', 'posthoc', 'balms'} and said.count('digits-50-small') == 3
    assert {e['commit'] for r in rows.values() for e in r['environments']} == {'abc1234'}
    # another machine, with the models that came back: Softmax is not trained again
    call(tmp_path, out='elsewhere')
    again = {r['recipe']['method']: r for r in read_rows(tmp_path/'elsewhere')}
    assert again['softmax']['seconds'] == rows['softmax']['seconds'] and again['balms']['nll'] == rows['balms']['nll']


def test_nothing_is_begun_that_cannot_end(tmp_path):
    assert 'no time' in call(tmp_path, seconds=1)
    assert not list((tmp_path/'runs').glob('*/row.json'))


def test_what_is_under_way_at_the_end_is_kept(tmp_path):
    call(tmp_path, seconds=25, iters=100_000)
    with zipfile.ZipFile(tmp_path/'models.zip') as z: names = [Path(n).name for n in z.namelist()]
    assert names == ['checkpoint.pt']


@pytest.mark.slow
def test_killed_and_resumed(tmp_path):
    process = subprocess.Popen(command(tmp_path, iters=3000), start_new_session=True)
    checkpoint, end = tmp_path/'runs', time.monotonic() + 120
    while not list(checkpoint.glob('*/checkpoint.pt')) and time.monotonic() < end: time.sleep(.2)
    os.killpg(process.pid, 9)
    process.wait()
    assert list(checkpoint.glob('*/checkpoint.pt')) and not list(checkpoint.glob('*/row.json'))
    call(tmp_path, iters=3000)
    assert len(read_rows(tmp_path/'rows.jsonl')) == 3
