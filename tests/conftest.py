"""Hypothesis profiles: `ci` runs by default; `HYPOTHESIS_PROFILE=deep python -m pytest` searches longer."""

import os

import torch
from hypothesis import settings

settings.register_profile("ci", max_examples=40, deadline=None, derandomize=True, print_blob=True)
settings.register_profile("deep", max_examples=2000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# One test process a core (pytest -n auto): more threads than that only wait for one another.
torch.set_num_threads(1)
