"""What every test process shares, and how the snippets of README, docs and docstrings are collected.

``python -m pytest`` runs ``tests``; ``python -m pytest README.md docs moefp8`` runs the snippets. Each
document is one namespace, so with xdist keep it on one worker: ``--dist loadfile``.
"""

import os
from doctest import ELLIPSIS, NORMALIZE_WHITESPACE

import torch

if not torch.cuda.is_available():  # before anything imports triton: its kernels are interpreted
    os.environ["TRITON_INTERPRET"] = "1"

from hypothesis import settings
from sybil import Sybil
from sybil.document import PythonDocStringDocument
from sybil.parsers.doctest import DocTestParser
from sybil.parsers.myst import PythonCodeBlockParser, SkipParser

# `ci` runs by default; HYPOTHESIS_PROFILE=deep searches longer.
settings.register_profile("ci", max_examples=40, deadline=None, derandomize=True, print_blob=True)
settings.register_profile("deep", max_examples=2000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# One test process a core (pytest -n auto): more threads than that only wait for one another.
torch.set_num_threads(1)

_FLAGS = ELLIPSIS | NORMALIZE_WHITESPACE
_DOCSTRINGS = Sybil(
    name="docstrings",
    parsers=[DocTestParser(_FLAGS)],
    patterns=["moefp8/**/*.py", "moefp8/*.py"],
    document_types={".py": PythonDocStringDocument},
)
_PAGES = Sybil(
    name="pages",
    parsers=[PythonCodeBlockParser(doctest_optionflags=_FLAGS), SkipParser()],
    patterns=["README.md", "docs/*.md", "docs/**/*.md"],
)

pytest_collect_file = (_DOCSTRINGS + _PAGES).pytest()
