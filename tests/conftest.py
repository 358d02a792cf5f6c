"What the tests share"
import os
import pytest, torch

torch.set_num_threads(int(os.environ.get('BALMS_TEST_THREADS', 1)))   # small work: threads that wait for each other cost more than they do


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    "No test reads or fills the user's cache"
    monkeypatch.setenv('BALMS_CACHE', str(tmp_path/'cache'))


@pytest.fixture(autouse=True)
def _seed(): torch.manual_seed(0)
