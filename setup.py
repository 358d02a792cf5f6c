"Everything here comes from settings.ini, which nbdev reads too."
import re
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup, find_packages

here = Path(__file__).parent
ini = ConfigParser(delimiters=['='])
ini.read(here/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']

statuses = ['1 - Planning', '2 - Pre-Alpha', '3 - Alpha', '4 - Beta', '5 - Production/Stable']
readme = here/'README.md'
at = {
    True: f"{cfg['git_url'].replace('github.com', 'raw.githubusercontent.com')}/{cfg['branch']}/",
    False: f"{cfg['git_url']}/blob/{cfg['branch']}/",
}
def absolute(text):
    """Links of README.md as they work on another site's page: pictures from the repository's files, the rest on its
    pages"""
    return re.sub(r'\]\((?![a-z]+:|#)([^)\s]+)', lambda m: f"]({at[m[1].endswith('.png')]}{m[1]}", text)

setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    keywords=cfg['keywords'].split(),
    author=cfg['author'],
    author_email=cfg['author_email'],
    url=cfg['git_url'],
    license='Apache-2.0',
    long_description=absolute(readme.read_text(encoding='utf-8')) if readme.exists() else '',
    long_description_content_type='text/markdown',
    classifiers=[
        f'Development Status :: {statuses[int(cfg["status"]) - 1]}',
        'Intended Audience :: Developers',
        'Intended Audience :: Science/Research',
        f'Natural Language :: {cfg["language"]}',
        'Programming Language :: Python :: 3',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
    packages=find_packages(include=['balms', 'balms.*']),
    include_package_data=True,
    zip_safe=False,
    python_requires=f'>={cfg["min_python"]}',
    install_requires=cfg['requirements'].split(),
    extras_require={
        name: cfg[f'{name}_requirements'].split() for name in ('dev', 'timm', 'photos', 'distributed', 'export', 'lvis')
    },
    entry_points={'console_scripts': cfg['console_scripts'].split(), 'nbdev': ['balms = balms._modidx:d']},
)
