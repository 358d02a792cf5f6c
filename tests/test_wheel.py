"""A wheel built from the repository installs and runs outside of the checkout; the modules hold to the oldest Python
that is promised."""
import ast, configparser, importlib.util, os, re, shutil, subprocess, sys, venv, zipfile
from pathlib import Path
import pytest

ROOT = Path(__file__).parents[1]
CFG = configparser.ConfigParser(delimiters=['=']); CFG.read(ROOT/'settings.ini', encoding='utf-8'); CFG = CFG['DEFAULT']


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    "Built from what git tracks, with the setuptools of this environment where they can do it, else with pip's own"
    d = tmp_path_factory.mktemp('wheel')
    files = subprocess.run(['git', 'ls-files', '-z'], cwd=ROOT, capture_output=True, text=True)
    if files.returncode: pytest.skip('not a git checkout')
    for f in filter(None, files.stdout.split('\0')):
        if (ROOT/f).is_file(): (d/'src'/f).parent.mkdir(parents=True, exist_ok=True); shutil.copy(ROOT/f, d/'src'/f)
    import setuptools
    here = int(setuptools.__version__.split('.')[0]) >= 71 or importlib.util.find_spec('wheel')
    subprocess.run(
        [
            sys.executable,
            '-m',
            'pip',
            'wheel',
            '-q',
            '--no-deps',
            *(['--no-build-isolation'] if here else []),
            '-w',
            str(d / 'out'),
            str(d / 'src'),
        ],
        check=True,
    )
    res, = (d/'out').glob('*.whl')
    return res


@pytest.fixture(scope='module')
def outside(wheel, tmp_path_factory):
    """Python of an environment with the wheel, and with the dependencies of this one; nothing of the checkout is on its
    path"""
    d = tmp_path_factory.mktemp('env')
    venv.create(d/'env', with_pip=False, symlinks=os.name != 'nt')
    python = next(p for p in d.glob('env/*/python*') if p.is_file() and p.stem == 'python')
    site = Path(
        subprocess.run(
            [str(python), '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))'],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    )
    subprocess.run(
        [sys.executable, '-m', 'pip', '--python', str(python), 'install', '-q', '--no-deps', '--no-index', str(wheel)],
        check=True,
        env={k: v for k, v in os.environ.items() if k != 'PYTHONPATH'},
    )
    own = [p for p in sys.path if 'site-packages' in p or 'dist-packages' in p]
    (site/'outer.pth').write_text('\n'.join(own))
    return python


def call(python, *args, cwd, **env):
    env = {
        **{k: v for k, v in os.environ.items() if k != 'PYTHONPATH'},
        'PYTHONWARNINGS': 'ignore',
        'OMP_NUM_THREADS': '1',
        **env,
    }
    return subprocess.run([str(python), *map(str, args)], cwd=cwd, env=env, capture_output=True, text=True, timeout=600)


def test_contents(wheel):
    """All modules and nothing but them, the license, the commands, the version and the requirements that settings.ini
    says"""
    with zipfile.ZipFile(wheel) as z:
        names = z.namelist()
        meta = next(n for n in names if n.endswith('METADATA'))
        text, points = z.read(meta).decode(), z.read(next(n for n in names if n.endswith('entry_points.txt'))).decode()
    package = {f'balms/{p.name}' for p in (ROOT/'balms').iterdir() if p.is_file() and p.suffix != '.pyc'}
    assert {n for n in names if not n.startswith('balms-')} == package
    assert wheel.name.startswith(f'balms-{CFG["version"]}-py3') and any(n.endswith('LICENSE') for n in names)
    for line in CFG['console_scripts'].split(): assert line.replace('=', ' = ') in points
    for r in CFG['requirements'].split(): assert f'Requires-Dist: {r}' in text, r
    assert f'Requires-Python: >={CFG["min_python"]}' in text and 'Balanced Meta-Softmax' in text


def test_smoke_outside_of_the_checkout(outside, tmp_path):
    shutil.copy(ROOT/'tests/smoke_user.py', tmp_path)
    r = call(outside, 'smoke_user.py', cwd=tmp_path, BALMS_SMOKE_DEV='1')
    assert r.returncode == 0 and 'fit_classifier with MetaSampler' in r.stdout, r.stderr


def test_command_makes_its_table_and_figure_outside_of_the_checkout(outside, tmp_path):
    "The command of the wheel, with its data and its figure, in an empty folder"
    command = next(p for p in outside.parent.iterdir() if p.stem == 'balms_train')
    r = call(outside, command, '--iters', 20, '--seeds', 1, '--device', 'cpu', cwd=tmp_path)
    assert r.returncode == 0 and 'Balanced Softmax' in r.stdout, r.stderr
    assert next((tmp_path/'runs').glob('*.png')).stat().st_size > 10_000
    assert len([*(tmp_path/'runs').glob('*/row.json')]) == 2
    r = call(outside, '-c', 'import balms; print(balms.__file__, balms.__version__)', cwd=tmp_path)
    assert str(outside.parents[1]) in r.stdout and CFG['version'] in r.stdout


@pytest.mark.parametrize('path', sorted((ROOT/'balms').glob('*.py')), ids=lambda p: p.name)
def test_syntax_of_the_oldest_python(path):
    ast.parse(path.read_text(encoding='utf-8'), feature_version=tuple(map(int, CFG['min_python'].split('.'))))


def test_no_module_needs_a_developers_package():
    """Every import is of the standard library, of this package, or of what settings.ini requires; timm, which is
    optional, only inside of functions"""
    known = {
        re.split('[<>=]', r)[0].replace('scikit-learn', 'sklearn').lower() for r in CFG['requirements'].split()
    } | {'numpy', 'pil', 'fastcore', 'fastprogress', 'balms'}
    for path in (ROOT/'balms').glob('*.py'):
        for node in ast.parse(path.read_text(encoding='utf-8')).body:
            for name in (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            ):
                top = name.split('.')[0].lower()
                assert top in known or top in map(str.lower, sys.stdlib_module_names), (path.name, name)
