"""Tests of the integrations, run apart from the rest where the extras are installed::

    pip install -e '.[dev,transformers,torchtitan]' && python -m pytest tests/integrations

The default run does not descend into this directory (norecursedirs in pyproject.toml).
"""

import importlib.util
import os

import pytest

# Everything here is built from configurations; a test that wants a download is wrong.
os.environ["HF_HUB_OFFLINE"] = "1"

MISSING = [name for name in ("transformers", "torchtitan") if importlib.util.find_spec(name) is None]


def pytest_configure(config: pytest.Config) -> None:
    if MISSING:
        raise pytest.UsageError(
            f"tests/integrations needs {' and '.join(MISSING)}: pip install -e '.[dev,{','.join(MISSING)}]'"
        )
