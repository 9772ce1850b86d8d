"""What a product loses beside the rounding of its operands: bias of accumulation, and block scales.

**Bias.** A tensor core adds products in an accumulator of some 14 bits. On positive data every
addition truncates the same way, so long sums come out too small. The operands here are numbers that
every recipe represents exactly (E4M3 values, 448 the largest in every block along every axis), so
``sum(out - exact) / sum(exact)`` sees the accumulation alone.

**SQNR.** ``10 log10(sum exact^2 / sum (out - exact)^2)`` of a product of ordinary operands, true
32-element MX blocks in the reference implementation beside each recipe, on distributions that
spread the exponents inside a row.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moefp8 import MXFP8_EXACT
from moefp8.bench.candidates import Candidate, Case, make_case, ours
from moefp8.bench.problem import Operands, Problem, equal_offs
from moefp8.bench.run import start
from moefp8.bench.timing import Timer
from moefp8.formats import E4M3

PRODUCTS = ("fwd", "dgrad", "wgrad")
TRUE_MX = "true MX"


class Row(NamedTuple):
    """One figure: ``kind`` is "bias" (a fraction) or "sqnr" (decibels)."""

    kind: str
    #: The contraction length, or the distribution.
    setting: str
    product: str
    candidate: str
    missing: str | None
    value: float | None
    #: The implementation of this library that served the case.
    served_by: str | None = None

    def as_json(self) -> dict[str, Any]:
        return self._asdict()


def true_mx() -> Candidate:
    """The reference of the SQNR table: 32-element blocks, float32 accumulation."""
    return ours({"mxfp8_exact": MXFP8_EXACT}, "reference")[0]._replace(name=TRUE_MX)


# --- operands ------------------------------------------------------------------------------------


def _representable(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Positive E4M3 values, uniform up to a bound that differs from row to row and column to column.

    Every 32nd row and every 32nd column is 448, the largest value, so each block along either axis
    has that amax: its scale is 1 in every format, and no element moves. The differing bounds spread
    the results over binades; otherwise a sum over a long contraction has next to no spread, all
    results would round to bfloat16 in the same direction, and that would show as a bias.
    """
    device = generator.device
    uniform = partial(torch.rand, generator=generator, device=device)
    bound = torch.exp2(-uniform(rows, 1)) * torch.exp2(-uniform(1, columns))
    x = (uniform(rows, columns) * bound * E4M3.max).to(E4M3.dtype).to(torch.bfloat16)
    x[::32] = E4M3.max
    x[:, ::32] = E4M3.max
    return x


def positive_operands(problem: Problem, device: torch.device) -> Operands:
    generator = torch.Generator(device).manual_seed(0)
    m, k, n, _ = problem
    return Operands(
        a=_representable(m, k, generator).requires_grad_(),
        b=_representable(n, k, generator)[None].mT.requires_grad_(),
        offs=equal_offs(problem, device),
        cotangent=_representable(m, n, generator),
    )


def _gaussian(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator, device=generator.device)


def _student_t(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Two degrees of freedom: z / sqrt(chi^2_2 / 2), where chi^2_2 / 2 is exponential."""
    uniform = torch.rand(*shape, generator=generator, device=generator.device)
    # rand may return 0, whose -log1p is 0 as well: a t of infinity.
    chi = -torch.log1p(-uniform.clamp(min=2.0**-24))
    return _gaussian(shape, generator) / chi.sqrt()


def _channels(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Gaussian, every 64th channel (last axis) a thousand times as large."""
    x = _gaussian(shape, generator)
    x[..., ::64] *= 1000.0
    return x


def _lognormal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Gaussian signs, magnitudes exp(3 z)."""
    sign = _gaussian(shape, generator).sign()
    return sign * torch.exp(3.0 * _gaussian(shape, generator))


DISTRIBUTIONS: dict[str, Callable[[Sequence[int], torch.Generator], Tensor]] = {
    "gaussian": _gaussian,
    "student-t(2)": _student_t,
    "channels x1000": _channels,
    "lognormal sigma=3": _lognormal,
}


def _distributed(problem: Problem, distribution: str, device: torch.device) -> Operands:
    """Operands that all follow one distribution, in bfloat16."""
    generator = torch.Generator(device).manual_seed(0)
    m, k, n, groups = problem

    def values(*shape: int) -> Tensor:
        return DISTRIBUTIONS[distribution](shape, generator).to(torch.bfloat16)

    return Operands(
        a=values(m, k).requires_grad_(),
        b=values(groups, n, k).mT.requires_grad_(),
        offs=equal_offs(problem, device),
        cotangent=values(m, n),
    )


# --- measurements --------------------------------------------------------------------------------


def exact_product(operands: Operands, product: str) -> Tensor:
    """The product of the operands as they are, in float64; one group."""
    a, b, g = (x.detach().double() for x in (operands.a, operands.b[0], operands.cotangent))
    return {"fwd": lambda: a @ b, "dgrad": lambda: g @ b.T, "wgrad": lambda: a.T @ g}[product]()


def _served_by(candidate: Candidate, case: Case, reason: str | None) -> str | None:
    return candidate.served_by(case) if candidate.served_by and reason is None else None


def _results(candidate: Candidate, case: Case, timer: Timer) -> tuple[dict[str, Tensor] | None, str | None]:
    """A candidate's three results in float64 (one group), or the reason why there are none."""
    outcome = start(candidate, case, timer)
    if outcome.step is None:
        return None, outcome.reason
    out, da, db = outcome.step()
    return dict(zip(PRODUCTS, (out.double(), da.double(), db[0].double()), strict=True)), None


def bias_problem(product: str, contraction: int, other: int) -> Problem:
    """One group whose ``product`` contracts over ``contraction``; the other two axes are ``other``."""
    axis = {"fwd": "k", "dgrad": "n", "wgrad": "m"}[product]
    return Problem(other, other, other, 1)._replace(**{axis: contraction})


def measure_bias(
    candidates: Sequence[Candidate],
    contraction: int,
    other: int,
    timer: Timer,
    advance: Callable[[], None],
) -> list[Row]:
    """Relative bias of each candidate's three products at one contraction length."""
    rows = []
    for product in PRODUCTS:
        problem = bias_problem(product, contraction, other)
        case = make_case(problem, positive_operands(problem, timer.device), backward=True)
        exact = exact_product(case.operands, product)
        for candidate in candidates:
            results, reason = _results(candidate, case, timer)
            bias = None
            if results is not None:
                bias = ((results[product] - exact).sum() / exact.sum()).item()
            by = _served_by(candidate, case, reason)
            rows.append(Row("bias", str(contraction), product, candidate.name, reason, bias, by))
            advance()
    return rows


def measure_sqnr(
    candidates: Sequence[Candidate],
    distribution: str,
    problem: Problem,
    timer: Timer,
    advance: Callable[[], None],
) -> list[Row]:
    """Signal to quantisation noise of each candidate's three products on one distribution."""
    rows = []
    case = make_case(problem, _distributed(problem, distribution, timer.device), backward=True)
    exact = {product: exact_product(case.operands, product) for product in PRODUCTS}
    for candidate in candidates:
        results, reason = _results(candidate, case, timer)
        for product in PRODUCTS:
            sqnr = None if results is None else sqnr_db(exact[product], results[product])
            by = _served_by(candidate, case, reason)
            rows.append(Row("sqnr", distribution, product, candidate.name, reason, sqnr, by))
        advance()
    return rows


def sqnr_db(exact: Tensor, value: Tensor) -> float:
    """``10 log10(sum exact^2 / sum (value - exact)^2)``."""
    return (10.0 * torch.log10(exact.square().sum() / (value - exact).square().sum())).item()
