"""Train a Mixture-of-Experts language model of 100 M parameters in bf16 and in FP8, on one GPU.

    python examples/train_gpu.py                     # four runs of 1000 steps, a few minutes on an H100
    python examples/train_gpu.py --runs bf16,mxfp8   # some of them
    python examples/train_gpu.py --short             # the same in miniature, on a CPU too, in seconds

Model, optimizer and text are those of train_moe_lm.py, larger and on the device. Every run has the same
seed, so the same weights and batches; only how the products of the experts are computed differs:

    bf16               not quantised
    mxfp8              all three products in MXFP8
    fp8_rowwise        one float32 scale a row and column
    mxfp8_unpromoted   MXFP8 whose accumulators are never added up in float32, as "fast accumulation" does

Precision: float32 master weights, optimizer and residual stream; attention and experts in bfloat16 but for
the products of the experts, which the recipe decides. Losses, held-out losses, speed and memory go to
results.json, loss.png and table.md in the folder ``--out``.
"""

import argparse
import functools
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor

from moefp8 import BF16, FP8_ROWWISE, MXFP8, MoEConfig, Recipe, moe_ffn

try:
    import lm_report
    import train_moe_lm as lm
    from lm_text import draw_batch, held_out_windows, load_corpus
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Table

    from moefp8.bench.report import environment
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}; this example needs: pip install 'moefp8[examples]'") from error

#: Longer than any contraction: the accumulator is added up once, at the end.
NEVER = 2**30
RUNS = {
    "bf16": BF16,
    "mxfp8": MXFP8,
    "fp8_rowwise": FP8_ROWWISE,
    "mxfp8_unpromoted": Recipe(*(gemm._replace(promote=NEVER) for gemm in MXFP8)),
}

# --- model ---------------------------------------------------------------------------------------


def attention(block: lm.Params, x: Tensor, heads: int) -> Tensor:
    """Causal attention in bfloat16, each byte mixed with the one before it."""
    x = x + block["shift"] * (F.pad(x, (0, 0, 1, -1)) - x)
    qkv = F.linear(x.bfloat16(), block["qkv"].bfloat16())
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    q, k = (lm.rotary(z.float()).bfloat16() for z in (q, k))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return F.linear(y.transpose(1, 2).flatten(-2), block["out"].bfloat16()).float()


def cross_entropy(
    params: lm.Params, text: Tensor, config: lm.ModelConfig, recipe: Recipe
) -> tuple[Tensor, list]:
    """Mean nats a byte of predicting ``text[:, 1:]`` from what comes before, and MoEStats a layer."""
    x = F.embedding(text[:, :-1], params["embedding"]) * config.moe.dim**0.5
    stats = []
    for block in params["blocks"]:
        x = x + attention(block, lm.rms_norm(x, block["attention_norm"]), config.heads)
        experts = {name: p if name == "router" else p.bfloat16() for name, p in block["moe"].items()}
        tokens = lm.rms_norm(x, block["moe_norm"]).bfloat16()
        y, layer_stats = moe_ffn(experts, tokens, config=config.moe, recipe=recipe)
        x = x + y.float()
        stats.append(layer_stats)
    hidden, head = lm.rms_norm(x, params["norm"]).bfloat16(), params["head"].bfloat16()
    logits = F.linear(hidden, head).float()
    return F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten()), stats


def loss_fn(
    params: lm.Params, text: Tensor, config: lm.ModelConfig, recipe: Recipe
) -> tuple[Tensor, Tensor]:
    """What is minimised; the cross-entropy alone comes along as an auxiliary output."""
    entropy, stats = cross_entropy(params, text, config, recipe)
    auxiliary = sum(0.02 * s.load_balance_loss + 0.001 * s.z_loss for s in stats)
    return entropy + auxiliary, entropy


def evaluate(
    params: lm.Params, windows: Sequence[Tensor], config: lm.ModelConfig, recipe: Recipe
) -> tuple[float, Tensor]:
    """Mean cross-entropy over ``windows``, and the tokens each expert of each layer got."""
    with torch.no_grad():
        results = [cross_entropy(params, text, config, recipe) for text in windows]
    weights = torch.tensor([len(text) for text in windows], device=windows[0].device)
    losses = torch.stack([entropy for entropy, _ in results]) * weights / weights.sum()
    counts = [torch.stack([s.tokens_per_expert for s in stats]) for _, stats in results]
    return losses.sum().item(), torch.stack(counts).sum(0).cpu()


# --- one step ------------------------------------------------------------------------------------

#: ``step(params, state, text, rate)`` gives new parameters, new optimizer state and the cross-entropy.
Step = Callable[[lm.Params, lm.AdamState, Tensor, Tensor], tuple[lm.Params, lm.AdamState, Tensor]]


def train_step(
    params: lm.Params,
    state: lm.AdamState,
    text: Tensor,
    rate: Tensor,
    config: lm.ModelConfig,
    recipe: Recipe,
) -> tuple[lm.Params, lm.AdamState, Tensor]:
    loss = functools.partial(loss_fn, config=config, recipe=recipe)
    grads, (_, entropy) = torch.func.grad_and_value(loss, has_aux=True)(params, text)
    params, state = lm.adamw(params, grads, state, rate)
    return params, state, entropy.detach()


def graphed(step: Step, params: lm.Params, state: lm.AdamState, text: Tensor, rate: Tensor) -> Step:
    """``step`` as one CUDA graph, which Python launches at once: a step of a small model is hundreds of
    kernels, and they take less time than their launches.

    Inputs and outputs of a graph lie where they lay at the capture: the new parameters and the new state
    overwrite ``params`` and ``state``, which every call must get again.
    """
    # A pure function may run to compile its kernels, and be forgotten.
    warm_up = torch.cuda.Stream()
    warm_up.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm_up):
        step(params, state, text, rate)
    torch.cuda.current_stream().wait_stream(warm_up)

    text, rate = text.clone(), rate.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        new_params, new_state, entropy = step(params, state, text, rate)
        old, new = pytree.tree_leaves((params, state)), pytree.tree_leaves((new_params, new_state))
        torch._foreach_copy_(old, new)

    def replay(
        params: lm.Params, state: lm.AdamState, new_text: Tensor, new_rate: Tensor
    ) -> tuple[lm.Params, lm.AdamState, Tensor]:
        text.copy_(new_text)
        rate.copy_(new_rate)
        graph.replay()
        return params, state, entropy.clone()

    return replay


# --- one run -------------------------------------------------------------------------------------


class Run(NamedTuple):
    """What a run showed: curves, speed and memory."""

    curve: lm_report.Result
    tokens_per_second: float
    peak_bytes: int | None


def train(
    name: str,
    params: lm.Params,
    args: argparse.Namespace,
    config: lm.ModelConfig,
    text: Tensor,
    windows: Sequence[Tensor],
    progress: Progress,
) -> Run:
    """``args.steps`` steps from ``params`` under the recipe ``name``; ``text`` lies on the CPU."""
    device, recipe = windows[0].device, RUNS[name]
    on_gpu = device.type == "cuda"
    # Copies, which a graph may overwrite.
    params = pytree.tree_map(lambda p: p.to(device, copy=True), params)
    state = pytree.tree_map(lambda s: s.to(device), lm.adamw_init(params))
    batches = torch.Generator().manual_seed(args.seed + 1)
    step_fn: Step = functools.partial(train_step, config=config, recipe=recipe)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)

    entropies: list[Tensor] = []
    points: list[list[float]] = []
    lap_seconds: list[float] = []
    task = progress.add_task(name, total=args.steps, loss=float("nan"))
    for first in range(0, args.steps, args.every):
        lap = range(first, min(first + args.every, args.steps))
        start = time.perf_counter()
        for step in lap:
            batch = draw_batch(text, args.batch, args.length, batches)
            # From pinned memory the copy does not make the host wait for the steps before.
            batch = (batch.pin_memory() if on_gpu else batch).to(device, non_blocking=True)
            rate = torch.full((), lm.learning_rate(step, args.steps, args.learning_rate), device=device)
            if step == 0 and on_gpu and not args.eager:
                step_fn = graphed(step_fn, params, state, batch, rate)
            params, state, entropy = step_fn(params, state, batch, rate)
            entropies.append(entropy)
        last = entropies[-1].item()  # waits for the device
        lap_seconds.append((time.perf_counter() - start) / len(lap))
        held_out, _ = evaluate(params, windows, config, recipe)
        points.append([float(lap[-1] + 1), held_out])
        progress.update(task, completed=lap[-1] + 1, loss=last)
    held_out, tokens = evaluate(params, windows, config, recipe)
    peak = torch.cuda.max_memory_allocated(device) if on_gpu else None
    # The first lap compiles kernels.
    seconds = statistics.median(lap_seconds[1:] or lap_seconds)
    curve = lm_report.Result(
        name,
        torch.stack(entropies).double().cpu(),
        torch.tensor(points, dtype=torch.float64),
        held_out,
        tokens,
        seconds * args.steps,
    )
    return Run(curve, args.batch * args.length / seconds, peak)


# --- what is shown and written -------------------------------------------------------------------

COLUMNS = ("run", "held-out", "vs bf16", "train", "tokens/s", "peak memory")


def cells(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """The rows of the table; differences are from the first run."""
    first = runs[0].curve.held_out

    def row(run: Run) -> tuple[str, ...]:
        curve = run.curve
        return (
            curve.recipe,
            f"{curve.held_out:.4f}",
            f"{100 * (curve.held_out / first - 1):+.2f} %",
            f"{curve.final_train_loss:.4f}",
            f"{run.tokens_per_second:,.0f}",
            "-" if run.peak_bytes is None else f"{run.peak_bytes / 2**30:.1f} GiB",
        )

    return [row(run) for run in runs]


def columns(runs: Sequence[Run]) -> list[str]:
    return [f"vs {runs[0].curve.recipe}" if name == "vs bf16" else name for name in COLUMNS]


def show(runs: Sequence[Run]) -> None:
    table = Table(title="loss in nats a byte", title_justify="left")
    for i, name in enumerate(columns(runs)):
        table.add_column(name, justify="right" if i else "left")
    for row in cells(runs):
        table.add_row(*row)
    lm_report.console.print(table)


def markdown(runs: Sequence[Run], command: str, found: dict[str, Any]) -> str:
    """The table for a page of documentation, with what it was measured on."""
    heading = columns(runs)
    lines = [heading, ["---"] * len(heading), *cells(runs)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    where = ", ".join(f"{name} {value}" for name, value in found.items() if value is not None)
    return f"{table}\n\nLoss in nats a byte. `{command}`; {where}.\n"


def as_json(run: Run) -> dict[str, Any]:
    curve = run.curve
    return {
        "run": curve.recipe,
        "held_out": curve.held_out,
        "held_out_points": curve.held_out_points.tolist(),
        "train_loss": [round(x, 6) for x in curve.train_loss.tolist()],
        "tokens_per_expert": curve.tokens_per_expert.tolist(),
        "tokens_per_s": run.tokens_per_second,
        "peak_bytes": run.peak_bytes,
    }


# --- command line --------------------------------------------------------------------------------

#: Flags that ``--short`` changes unless they are given.
SHORT = {"steps": 6, "batch": 2, "length": 32, "layers": 1, "dim": 64, "heads": 2, "hidden": 64}
SHORT |= {"experts": 4, "every": 3, "windows": 4}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--runs", default=",".join(RUNS), help="which, comma separated, the first one to compare with")
    add("--steps", type=int, default=1000, help="training steps")
    add("--short", action="store_true", help="a miniature of the whole job")
    add("--device", help="cuda (where there is one), cuda:1, ..., or cpu")
    add("--batch", type=int, default=32, help="sequences a step")
    add("--length", type=int, default=512, help="bytes a sequence")
    add("--layers", type=int, default=4, help="transformer blocks")
    add("--dim", type=int, default=1024, help="width of a token")
    add("--heads", type=int, default=8, help="attention heads")
    add("--hidden", type=int, default=1024, help="width inside an expert")
    add("--experts", type=int, default=8, help="experts a layer")
    add("--top-k", type=int, default=2, help="experts a token")
    add("--learning-rate", type=float, default=5e-4, help="peak of the schedule")
    add("--every", type=int, default=50, help="steps between held-out points")
    add("--windows", type=int, default=512, help="sequences of held-out text, 64 at a time")
    add("--eager", action="store_true", help="launch every kernel from Python, not a step as a CUDA graph")
    add("--seed", type=int, default=0, help="of the weights and the batches")
    add("--out", type=Path, default=Path("runs/train_gpu"), help="folder of results.json and loss.png")
    args = parser.parse_args(argv)
    if args.short:
        parser.set_defaults(**SHORT)
        args = parser.parse_args(argv)
    args.runs = args.runs.split(",")
    for name in args.runs:
        if name not in RUNS:
            parser.error(f"argument --runs: expected some of {', '.join(RUNS)}, got {name!r}")
    if args.device is None and not torch.cuda.is_available() and not args.short:
        parser.error("no CUDA device here; --short runs on a CPU, and train_moe_lm.py trains on one")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    command = shlex.join(["python", "examples/train_gpu.py", *(sys.argv[1:] if argv is None else argv)])
    device = torch.device(args.device)
    moe = MoEConfig(args.dim, args.hidden, args.experts, args.top_k)
    config = lm.ModelConfig(args.layers, args.heads, moe)
    text, held_out = load_corpus()
    (all_windows,) = held_out_windows(held_out, args.windows, args.length, 1)
    windows = all_windows.to(device).split(64)
    args.out.mkdir(parents=True, exist_ok=True)
    found = environment(device)
    params = lm.init_model(torch.Generator().manual_seed(args.seed), config)
    count = sum(p.numel() for p in pytree.tree_leaves(params))
    lm_report.console.print(
        f"{count / 1e6:.1f} M parameters on {found['device']};\n{len(text) / 1e6:.1f} MB of text to train "
        f"on, {args.windows * args.length / 1e6:.2f} MB held out\n"
        f"{args.steps} steps of {args.batch} x {args.length} bytes"
    )

    runs: list[Run] = []
    bar = (BarColumn(bar_width=28), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.3f}"))
    with Progress(
        TextColumn("{task.description:>17}"), *bar, TimeRemainingColumn(elapsed_when_finished=True),
        console=lm_report.console,
    ) as progress:  # fmt: skip
        for name in args.runs:
            runs.append(train(name, params, args, config, text, windows, progress))
            # After every run, so that a run that fails costs only itself.
            settings = {key: value for key, value in vars(args).items() if key != "out"}
            content = {"command": command, "environment": found, "parameters": count, "settings": settings}
            content["runs"] = [as_json(run) for run in runs]
            (args.out / "results.json").write_text(json.dumps(content, indent=1) + "\n")
            (args.out / "table.md").write_text(markdown(runs, command, found))
    show(runs)
    lm_report.plot([run.curve for run in runs], args.out / "loss.png")


if __name__ == "__main__":
    main()
