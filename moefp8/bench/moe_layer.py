"""The whole MoE layer, forward and backward, under each recipe and beside the same layer in bfloat16.

The baseline is that layer on ``torch._grouped_mm``, eager and compiled; the faster of the two counts.
"""

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moefp8 import BF16, choose_recipe, expert_ffn, moe_ffn, quantize_params
from moefp8.bench.layers import (
    Inputs,
    Layer,
    LayerProblem,
    Params,
    bf16_experts,
    bf16_layer,
    draw_layer,
    halved,
    take_eager,
    take_plain,
)
from moefp8.bench.memory import kept_bytes, peak_bytes
from moefp8.bench.refusals import explain, may_raise
from moefp8.bench.timing import Timer, summary
from moefp8.bench.where import time_by_part
from moefp8.recipe import Recipe

EAGER, COMPILED = "torch bf16, eager", "torch bf16, compiled"
LAYOUTS = ("balanced", "skewed")

#: ``experts(params, rows, offs)`` on sorted rows.
Experts = Callable[[dict[str, Tensor], Tensor, Tensor], Tensor]


class LayerCandidate(NamedTuple):
    """A way to compute the layer.

    Attributes:
        name: as it stands in tables.
        layer: makes ``layer(params, x)`` for a problem and its parameters.
        experts: the expert feed-forward alone, for the bytes that it keeps.
        refuse: why it cannot run, or None.
        choice: of recipe "auto": what it stands for, and why.
    """

    name: str
    layer: Callable[[LayerProblem, Params], Layer]
    experts: Callable[[], Experts]
    refuse: Callable[[torch.device], str | None] = lambda device: None
    choice: Callable[[LayerProblem, torch.device], str] | None = None


def _choice(problem: LayerProblem, device: torch.device) -> str:
    c = problem.config
    return str(choose_recipe(problem.rows, c.dim, c.hidden, c.num_experts, device=device))


class Row(NamedTuple):
    """One candidate on one layer and kind of routing."""

    problem: LayerProblem
    layout: str
    candidate: str
    missing: str | None
    figures: dict[str, float]
    #: Seconds by part, of a single profiled call.
    parts: dict[str, float]
    #: What recipe "auto" chose, and why.
    choice: str | None = None

    @property
    def place(self) -> str:
        return f"{self.problem}, {self.layout}"

    def as_json(self) -> dict[str, Any]:
        row = {**self._asdict(), "problem": self.problem._asdict()}
        row["problem"]["config"] = self.problem.config._asdict()
        return {**{k: v for k, v in row.items() if k != "figures"}, **self.figures}


def _compiled(fn: Callable[..., Tensor]) -> Any:
    return torch.compile(fn, dynamic=False)


def baselines() -> list[LayerCandidate]:
    """The layer in bfloat16, eager and compiled."""

    def no_gpu(device: torch.device) -> str | None:
        return None if device.type == "cuda" else "is compiled for a CUDA device only"

    return [
        LayerCandidate(EAGER, lambda p, _: bf16_layer(p.config, take_eager), lambda: bf16_experts),
        LayerCandidate(
            COMPILED,
            lambda p, _: _compiled(bf16_layer(p.config, take_plain)),
            lambda: _compiled(bf16_experts),
            no_gpu,
        ),
    ]


def ours(
    recipes: dict[str, Recipe | str],
    implementation: str | None,
    *,
    compiled: bool = False,
    quantized: bool = False,
) -> list[LayerCandidate]:
    """``moe_ffn`` under each recipe; if asked for also compiled, and with weights quantised beforehand."""

    def candidate(name: str, recipe: Any, *, compile_: bool = False, reuse: bool = False) -> LayerCandidate:
        how: dict[str, Any] = {"recipe": recipe, "implementation": implementation}

        def layer(problem: LayerProblem, params: Params) -> Layer:
            # As for the second micro-batch of a step: quantised once, outside of what is timed.
            ready: dict[str, Any] = {"quantized": quantize_params(params, **how)} if reuse else {}

            def own(params: Params, x: Tensor) -> Tensor:
                y, _ = moe_ffn(params, x, config=problem.config, **how, **ready)
                return y

            return _compiled(own) if compile_ else own

        found = LayerCandidate(name, layer, lambda: partial(expert_ffn, **how))
        return found._replace(choice=_choice) if recipe == "auto" else found

    found = []
    for name, recipe in recipes.items():
        found.append(candidate(f"moefp8 {name}", recipe))
        if quantized and isinstance(recipe, Recipe) and recipe != BF16:
            found.append(candidate(f"moefp8 {name}, weights ready", recipe, reuse=True))
        if compiled:
            found.append(candidate(f"moefp8 {name}, compiled", recipe, compile_=True))
    return found


def step_of(layer: Layer, inputs: Inputs) -> Callable[[], tuple[Tensor, ...]]:
    """Forward, and the gradients of ``sum(y * cotangent)`` to tokens and all parameters."""

    def step() -> tuple[Tensor, ...]:
        y = layer(inputs.params, inputs.x)
        return y.detach(), *torch.autograd.grad(y, inputs.differentiable, inputs.cotangent)

    return step


class _DoesNotFitError(Exception):
    """The layer does not fit with as many tokens."""


def measure_layer(
    problem: LayerProblem,
    candidates: Sequence[LayerCandidate],
    timer: Timer,
    repeats: int,
    advance: Callable[[], None],
    say: Callable[[str], None],
) -> list[Row]:
    """Rows of one layer; where a candidate runs out of memory, of all with the next power of two tokens."""
    while True:
        try:
            return _measure(problem, candidates, timer, repeats, advance)
        except _DoesNotFitError as error:
            fewer = halved(problem)
            if fewer.tokens < problem.config.num_experts:
                raise
            say(f"{problem}: {error} runs out of memory; now with {fewer.tokens} tokens")
            problem = fewer
        if timer.device.type == "cuda":
            torch.cuda.empty_cache()


def _measure(
    problem: LayerProblem,
    candidates: Sequence[LayerCandidate],
    timer: Timer,
    repeats: int,
    advance: Callable[[], None],
) -> list[Row]:
    device = timer.device
    balanced = draw_layer(problem, device, skewed=False)
    skewed = balanced._replace(x=draw_layer(problem, device, skewed=True).x)  # the rest is the same
    inputs = {"balanced": balanced, "skewed": skewed}
    torch.compiler.reset()  # what was compiled for the layer before
    missing: dict[str, str | None] = {}
    memory: dict[str, dict[str, float]] = {}
    steps: dict[str, Callable[[], Any]] = {}
    for candidate in candidates:
        missing[candidate.name] = candidate.refuse(device)
        if missing[candidate.name] is not None:
            continue
        try:
            layer = candidate.layer(problem, balanced.params)
            own = {layout: step_of(layer, inputs[layout]) for layout in LAYOUTS}
            first = timer.first_call(own["balanced"])
            timer.first_call(own["skewed"])
            memory[candidate.name] = {"first_call_s": first, **_memory(candidate, problem, balanced, own)}
            steps |= {f"{layout}\n{candidate.name}": step for layout, step in own.items()}
        except torch.OutOfMemoryError as error:
            raise _DoesNotFitError(candidate.name) from error
        except may_raise(candidate.name) as error:
            timer.check_device(candidate.name, error)
            missing[candidate.name] = explain(error)
    times, exposed, failed = timer.alternate(
        steps, repeats, advance, lambda key: may_raise(key.split("\n")[1])
    )
    if "out of memory" in failed.values():
        raise _DoesNotFitError(next(key for key in failed if failed[key] == "out of memory").split("\n")[1])

    present = [name for name in (EAGER, COMPILED) if f"balanced\n{name}" in times]
    faster = min(present, key=lambda name: statistics.median(times[f"balanced\n{name}"]), default=None)
    rows = []
    for layout in LAYOUTS:
        for candidate in candidates:
            name = candidate.name
            key = f"{layout}\n{name}"
            figures: dict[str, float] = {}
            parts: dict[str, float] = {}
            choice = None
            if key in times:
                choice = candidate.choice(problem, device) if candidate.choice else None
                figures = {**summary(times[key]), "exposed": float(key in exposed)}
                figures["rate"] = problem.operations / figures["median_s"]
                figures |= _ratios(times, key, layout, faster)
                if layout == "balanced":
                    figures |= memory[name]
                    if faster is not None:
                        figures |= _over(memory[name], memory[faster])
                    timer.beat()
                    parts = time_by_part(steps[key], device, problem.config.dim, problem.config.hidden)
            reason = failed.get(key, missing[name])
            rows.append(Row(problem, layout, name, reason, figures, parts, choice))
    return rows


def _ratios(times: dict[str, list[float]], key: str, layout: str, faster: str | None) -> dict[str, float]:
    """Speed over the faster baseline under the same routing, and time over balanced routing."""

    def median_ratio(other: str, of: str) -> float:
        return statistics.median(a / b for a, b in zip(times[other], times[of], strict=True))

    found = {}
    if faster is not None and f"{layout}\n{faster}" in times:
        found["speedup"] = median_ratio(f"{layout}\n{faster}", key)
    balanced = "\n".join(("balanced", key.split("\n")[1]))
    if layout == "skewed" and balanced in times:
        found["over_balanced"] = median_ratio(key, balanced)
    return found


def _memory(
    candidate: LayerCandidate,
    problem: LayerProblem,
    inputs: Inputs,
    steps: dict[str, Callable[[], Any]],
) -> dict[str, float]:
    """Bytes that the experts keep for the backward, and the peak of the layer's forward and backward."""
    found = {}
    device = inputs.x.device
    peak = peak_bytes(steps["balanced"], device)
    if peak is not None:
        found["peak_bytes"] = float(peak)
    config = problem.config
    sizes = torch.full((config.num_experts,), problem.rows // config.num_experts)
    sizes[-1] += problem.rows - int(sizes.sum())
    offs = sizes.cumsum(0).to(device, torch.int32)
    rows = torch.randn(problem.rows, config.dim, device=device, dtype=torch.bfloat16).requires_grad_()
    weights = {name: p for name, p in inputs.params.items() if name != "router"}
    experts = candidate.experts()
    found["kept_bytes"] = float(kept_bytes(lambda: experts(weights, rows, offs), list(weights.values())))
    return found


def _over(own: dict[str, float], base: dict[str, float]) -> dict[str, float]:
    keys = [key for key in ("kept_bytes", "peak_bytes") if key in own and key in base]
    return {f"{key}_ratio": own[key] / base[key] for key in keys}
