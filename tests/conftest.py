"What the tests share"
import os
import pytest, torch
from hypothesis import settings

# small work: threads that wait for each other cost more than they do
torch.set_num_threads(int(os.environ.get('BALMS_TEST_THREADS', 1)))


# How much is tried: 'ci', the same examples each time, or 'nightly', others each night. `nightly` says the same to the
# tests that draw for themselves.
settings.register_profile('ci', max_examples=300, deadline=None, derandomize=True)
settings.register_profile('nightly', max_examples=10_000, deadline=None)
PROFILE = os.environ.get('BALMS_PROFILE') or os.environ.get('HYPOTHESIS_PROFILE') or 'ci'
settings.load_profile(PROFILE)


def pytest_collection_modifyitems(items):
    "Tests marked cuda are skipped where there is none"
    if torch.cuda.is_available(): return
    for item in items:
        if item.get_closest_marker('cuda'): item.add_marker(pytest.mark.skip(reason='needs a GPU'))


@pytest.fixture(scope='session')
def nightly(): return PROFILE == 'nightly'


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    "No test reads or fills the user's cache"
    monkeypatch.setenv('BALMS_CACHE', str(tmp_path/'cache'))


@pytest.fixture(autouse=True)
def _seed(): torch.manual_seed(0)
