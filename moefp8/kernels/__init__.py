"""Implementations of the products, in the order they are tried."""

from importlib.util import find_spec

from moefp8._dispatch import Implementation
from moefp8.kernels import reference

REGISTRY: dict[str, Implementation] = {}
if find_spec("triton") is not None:  # Triton is there on Linux only
    from moefp8.kernels import sm90, sm100

    # "triton" is what runs on the GPU at hand; the second name is for tests without one.
    REGISTRY[sm90.IMPLEMENTATION.name] = sm90.IMPLEMENTATION._replace(name_on=sm100.name_on)
    REGISTRY[sm100.IMPLEMENTATION.name] = sm100.IMPLEMENTATION
REGISTRY[reference.IMPLEMENTATION.name] = reference.IMPLEMENTATION
