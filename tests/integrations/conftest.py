"""Tests of the integrations, run apart from the rest where the extras are installed::

    pip install -e '.[dev,transformers,torchtitan]'
    python -m pytest tests/integrations moefp8/integrations docs/integrations

The last two are docstrings and pages. The default run does not descend into a directory of this name
(norecursedirs in pyproject.toml).
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
    # Warnings are errors here too, but for these, which the libraries themselves give:
    for theirs in (
        # torchtitan imports torchdata and transformers parts that script functions.
        r"ignore:`torch.jit.script_method` is deprecated:DeprecationWarning",
        # TorchTitan's router asks for float32 autocast, which a CPU has not; it then runs without.
        r"ignore:In CPU autocast, but the target dtype is not supported:UserWarning",
    ):
        config.addinivalue_line("filterwarnings", theirs)
