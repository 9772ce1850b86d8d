"""Fixtures of the transform tests: every product form, under every preset, on every backend."""

from collections.abc import Callable

import pytest
from specs import REFERENCE, TRITON, Case, cases

from moefp8 import MXFP8


def _params(wanted: Callable[[Case], bool] = lambda case: True) -> list:
    return [
        pytest.param(case, id=name, marks=[pytest.mark.gpu] if backend is TRITON else [])
        for backend in (REFERENCE, TRITON)
        for name, case in cases(backend)
        if wanted(case)
    ]


@pytest.fixture(params=_params())
def case(request: pytest.FixtureRequest) -> Case:
    """A product to transform; ``python -m pytest -m gpu`` runs the same tests on the GPU kernels."""
    return request.param


@pytest.fixture(params=_params(lambda case: case.op.layout is not None))
def grouped_case(request: pytest.FixtureRequest) -> Case:
    """Those that take group ends."""
    return request.param


@pytest.fixture(params=_params(lambda case: case.recipe == MXFP8))
def form(request: pytest.FixtureRequest) -> Case:
    """Every form, under MXFP8 only: for what does not depend on the recipe and takes long."""
    return request.param
