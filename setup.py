"""For tools that ask for a setup.py; the metadata stands in pyproject.toml."""

from setuptools import setup

setup()
