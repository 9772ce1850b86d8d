"""Implementations of the products, in the order they are tried."""

from moefp8._dispatch import Implementation
from moefp8.kernels import reference

REGISTRY: dict[str, Implementation] = {reference.IMPLEMENTATION.name: reference.IMPLEMENTATION}
