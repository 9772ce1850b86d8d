"""Leaf operators: called directly where nothing watches, else through PyTorch's dispatcher."""

import ctypes

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moefp8._leaf import leaf, over_leading

#: A type for every time the function itself ran.
CALLS = []


def _same(x, factor):
    return torch.empty_like(x)


@leaf("test_scaled", fake=_same, vmap=over_leading)
def scaled(x: torch.Tensor, factor: int) -> torch.Tensor:
    CALLS.append(type(x))
    return x * factor


@leaf("test_in_memory", fake=lambda x: torch.empty_like(x), vmap=over_leading)
def in_memory(x: torch.Tensor) -> torch.Tensor:
    """Reads memory, as a kernel does."""
    return torch.from_numpy(np.frombuffer(ctypes.string_at(x.data_ptr(), x.nbytes), np.float32).copy())


class Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def no_dispatcher(monkeypatch):
    def refuse(self, *args, **kwargs):
        raise AssertionError(f"{self} was dispatched")

    monkeypatch.setattr(torch._ops.OpOverload, "__call__", refuse)


def test_called_directly_in_eager_mode(no_dispatcher):
    x = torch.arange(3.0)
    assert torch.equal(scaled(x, 2), torch.tensor([0.0, 2.0, 4.0]))


def test_a_parameter_is_a_tensor(no_dispatcher):
    weight = torch.nn.Parameter(torch.ones(3), requires_grad=False)
    assert torch.equal(scaled(weight, 2), torch.full((3,), 2.0))


def test_what_requires_a_gradient_that_nobody_records(no_dispatcher):
    x = torch.ones(3, requires_grad=True)
    with torch.no_grad():
        assert torch.equal(scaled(x, 2), torch.full((3,), 2.0))


def test_the_fixture_notices_the_dispatcher(no_dispatcher):
    x = torch.ones(2)
    with Names(), pytest.raises(AssertionError, match=r"moefp8\.test_scaled\.default was dispatched"):
        scaled(x, 2)


def test_a_profiler_sees_the_operator():
    x = torch.ones(2)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        scaled(x, 2)
    assert "moefp8::test_scaled" in {event.name for event in profile.events()}


def test_a_dispatch_mode_sees_the_operator():
    x = torch.ones(2)
    with Names() as names:
        scaled(x, 3)
    assert names.seen == ["moefp8.test_scaled.default"]


def test_a_subclass_sees_the_operator():
    class Sub(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return torch.ones(2)

    seen = []
    scaled(torch.Tensor._make_subclass(Sub, torch.ones(2)), 3)
    assert seen == ["moefp8.test_scaled.default"]


def test_a_negation_that_is_only_noted():
    assert torch.equal(in_memory(torch._neg_view(torch.ones(2))), torch.tensor([-1.0, -1.0]))


def test_zeros_that_are_nowhere(no_dispatcher):
    with pytest.raises(AssertionError, match=r"moefp8\.test_scaled\.default was dispatched"):
        scaled(torch._efficientzerotensor(2), 2)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_a_trace_records_the_operator():
    traced = torch.jit.trace(lambda x: scaled(x, 2), torch.ones(3))
    assert "moefp8::test_scaled" in str(traced.graph)
    assert torch.equal(traced(torch.arange(3.0)), torch.tensor([0.0, 2.0, 4.0]))


def test_vmap_uses_the_batching_rule():
    x = torch.randn(4, 3)
    CALLS.clear()
    assert torch.equal(torch.vmap(lambda row: scaled(row, 2))(x), 2 * x)
    assert len(CALLS) == 1  # once for the batch


def test_make_fx_records_the_operator():
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(lambda x: scaled(x, 2))(torch.ones(3))
    assert [str(n.target) for n in graph.graph.nodes if n.op == "call_function"] == [
        "moefp8.test_scaled.default"
    ]


def test_fake_tensors_are_not_computed():
    from torch._subclasses import FakeTensorMode

    CALLS.clear()
    with FakeTensorMode():
        assert scaled(torch.ones(5), 2).shape == (5,)
    assert CALLS == []


def test_compiled_is_one_operator():
    from torch._dynamo.testing import EagerAndRecordGraphs

    backend = EagerAndRecordGraphs()
    torch.compile(lambda x: scaled(x, 2), backend=backend, fullgraph=True)(torch.ones(3))
    targets = [str(n.target) for n in backend.graphs[0].graph.nodes if n.op == "call_function"]
    assert targets == ["moefp8.test_scaled.default"]


def test_has_no_derivative():
    """Autograd must not differentiate what happens inside."""
    x = torch.ones(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        scaled(x, 2).sum().backward()


def test_functional_grad_sees_the_operator():
    with pytest.raises(RuntimeError, match=r"autograd\.Function"):  # PyTorch's, of an operator without one
        torch.func.grad(lambda x: scaled(x, 2).sum())(torch.ones(3))
