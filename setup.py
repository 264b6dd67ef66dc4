"""Packaging: every value comes from settings.ini, so that a dependency is named in one place only."""
import shlex
from configparser import ConfigParser
from setuptools import setup, find_packages

config = ConfigParser(delimiters=['='], interpolation=None)
config.read('settings.ini', encoding='utf-8')
cfg = config['DEFAULT']

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'],
    long_description=open('README.md', encoding='utf-8').read(), long_description_content_type='text/markdown',
    author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'], keywords=cfg['keywords'].split(),
    license='Apache-2.0', python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=['covid_cxr', 'covid_cxr.*']),
    package_data={'covid_cxr': ['py.typed', 'recipes/*.toml', 'report/templates/*', 'models/*/*']},
    install_requires=shlex.split(cfg['requirements']),
    extras_require={extra: shlex.split(cfg[f'{extra}_requirements']) for extra in ('dev', 'docs', 'explain', 'weights', 'tracking', 'dicom', 'hub', 'openvino')},
    entry_points={'console_scripts': shlex.split(cfg['console_scripts'])},
    zip_safe=False,
)
