"""Fixtures of the transform tests: every product form, under every preset, on every backend."""

from collections.abc import Callable, Iterator

import pytest
import torch
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


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """No graphs of other tests, which count towards the limit of recompilations, and none left behind:
    after an error in a compiled transform Dynamo skips the code of ``torch.func.grad`` from then on."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
