"""Implementations of the products, in the order they are tried."""

from importlib.util import find_spec

from moefp8._dispatch import Implementation
from moefp8.kernels import reference

REGISTRY: dict[str, Implementation] = {}
if find_spec("triton") is not None:  # Triton is there on Linux only
    from moefp8.kernels import sm90

    REGISTRY[sm90.IMPLEMENTATION.name] = sm90.IMPLEMENTATION
REGISTRY[reference.IMPLEMENTATION.name] = reference.IMPLEMENTATION
