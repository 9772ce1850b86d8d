"""What train_moe_lm.py shows: progress, final table, plot, sample. Nothing here touches the training."""

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

console = Console(highlight=False)


class Result(NamedTuple):
    """What is known of a finished run."""

    recipe: str
    train_loss: Tensor  # (steps,)
    held_out_points: Tensor  # (evaluations, 2): step, loss
    held_out: float
    tokens_per_expert: Tensor  # (layers, E)
    seconds: float

    @property
    def final_train_loss(self) -> float:
        """Mean over the last tenth of the run."""
        return self.train_loss[-max(len(self.train_loss) // 10, 1) :].mean().item()


def header(parameters: int, train_bytes: int, held_out_bytes: int, args: argparse.Namespace) -> None:
    console.print(
        f"{parameters / 1e6:.2f} M parameters, {args.layers} layers of {args.experts} experts, "
        f"top-{args.top_k}, on {torch.get_num_threads()} threads\n"
        f"{train_bytes / 1e6:.2f} MB of the standard library to train on, {held_out_bytes / 1e6:.2f} MB "
        f"held out;\n{args.steps} steps of {args.batch} x {args.length} bytes"
    )


@contextmanager
def progress(name: str, run: NamedTuple, args: argparse.Namespace) -> Iterator[Callable]:
    """A progress bar; yields the function that moves it on to a later state of the run."""
    bar = Progress(
        TextColumn("[bold]{task.description:>12}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]:>6.0f} tokens/s  loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
    )
    tokens = args.batch * args.length
    loss = speed = float("nan")
    with bar:
        task = bar.add_task(name, total=args.steps, completed=run.step, loss=loss, speed=speed)
        before = run.seconds.item()

        def report(run: NamedTuple) -> None:
            nonlocal loss, speed, before
            now, new = run.seconds.item(), run.train_loss[-1].item()
            rate = tokens / (now - before)
            loss = new if loss != loss else 0.95 * loss + 0.05 * new  # NaN before the first step
            speed = rate if speed != speed else 0.9 * speed + 0.1 * rate
            before = now
            bar.update(task, completed=run.step, loss=loss, speed=speed)

        yield report


def interrupted(name: str, step: int, path: Path, command: str) -> None:
    console.print(f"\n[bold]{name}: stopped after step {step}[/], checkpoint in {path}. Go on with")
    console.print(f"    {escape(command)}", soft_wrap=True)


def table(results: Sequence[Result]) -> None:
    first = results[0]
    grid = Table(title="loss in nats a byte", title_justify="left")
    grid.add_column("recipe", style="bold")
    for column in ("train", "held-out", f"vs {first.recipe}", "time", "tokens per expert, %"):
        grid.add_column(column, justify="right", no_wrap=True)
    for r in results:
        share = 100 * r.tokens_per_expert / r.tokens_per_expert.sum(1, keepdim=True)
        grid.add_row(
            r.recipe,
            f"{r.final_train_loss:.4f}",
            f"{r.held_out:.4f}",
            "" if r is first else f"{100 * (r.held_out / first.held_out - 1):+.2f} %",
            f"{r.seconds:.1f} s",
            "\n".join(" ".join(f"{x:2.0f}" for x in layer) for layer in share.tolist()),
        )
    console.print(grid)


def _smooth(loss: Tensor, window: int) -> Tensor:
    """Mean over ``window // 2`` values on each side: at the start as many as there are, not to lag."""
    total = torch.cat([torch.zeros(1, dtype=loss.dtype), loss.cumsum(0)])
    i = torch.arange(len(loss))
    reach = i.clamp(max=window // 2)
    start, end = i - reach, (i + reach + 1).clamp(max=len(loss))
    return (total[end] - total[start]) / (end - start)


def plot(results: Sequence[Result], path: Path) -> None:
    """Loss curves with held-out points, and below them how far each run is from the first."""
    colours = ["#33658a", "#e4572e", "#2a9d8f", "#8e6c8a", "#b08900"]
    styles = ["-", (0, (5, 2)), "-.", ":", (0, (1, 1))]
    window = max(len(results[0].train_loss) // 20, 1)
    base = _smooth(results[0].train_loss, window)

    figure = Figure(figsize=(8, 5.4), dpi=150, layout="constrained")
    top, bottom = figure.subplots(2, sharex=True, height_ratios=[3, 1])
    for i, r in enumerate(results):
        colour, label = colours[i % len(colours)], f"{r.recipe}: held-out {r.held_out:.4f}"
        steps = torch.arange(1, len(r.train_loss) + 1)
        curve = _smooth(r.train_loss, window)
        top.plot(steps, r.train_loss, color=colour, alpha=0.15, linewidth=0.8)
        top.plot(steps, curve, color=colour, linestyle=styles[i % len(styles)], linewidth=1.8, label=label)
        top.plot(
            *r.held_out_points.T, "o", color=colour, markersize=7 - 3 * min(i, 1), markeredgecolor="white"
        )
        if i:
            bottom.plot(steps, 100 * (curve / base - 1), color=colour, linewidth=1.2)
            step, loss = r.held_out_points.T
            first = results[0].held_out_points[:, 1]
            bottom.plot(
                step, 100 * (loss / first - 1), "o", color=colour, markersize=6, markeredgecolor="white"
            )
    top.plot([], [], "o", color="grey", markeredgecolor="white", label="held-out text")
    top.set_ylabel("loss, nats a byte")
    top.set_title("MoE language model on the Python standard library", loc="left", fontweight="bold")
    top.legend(frameon=False)
    low = min(r.train_loss.min().item() for r in results)
    top.set_ylim(low - 0.1, min(4.5, max(r.train_loss.max().item() for r in results)))
    bottom.axhline(0, color=colours[0], linewidth=1)
    bottom.axhspan(-0.5, 0.5, color="grey", alpha=0.12, linewidth=0, label="within 0.5 %")
    bottom.set_ylim(-2, 2)
    bottom.set_ylabel(f"% of {results[0].recipe}'s")
    bottom.set_xlabel("step")
    bottom.legend(frameon=False, loc="upper right")
    for axes in (top, bottom):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    console.print(f"plot: {path}")


def plot_statistics(
    name: str, steps: Tensor, keys: Sequence[tuple[str, str, str]], values: Tensor, path: Path
) -> None:
    """How operands fare under quantisation over a run: ``values`` (evaluations, layers, keys).

    ``keys`` are (operand, product, field). The mean over layers; weights are one line, their mean.
    """
    panels = {
        "subnormal": "subnormal, % of elements",
        "flushed": "flushed to zero, % of elements",
        "spread": "spread of block exponents, binades",
        "amax": "largest magnitude",
    }
    operands = {
        "x": (["x"], "#33658a"),
        "hidden": (["hidden"], "#2a9d8f"),
        "weights": (["w1", "w2", "w3"], "#8e6c8a"),
        "cotangents: of the output": (["out"], "#e4572e"),
        "of gate": (["gate"], "#b08900"),
        "of up": (["up"], "#7a7a7a"),
    }
    styles = {"fwd": "-", "dgrad": (0, (5, 2)), "wgrad": ":"}
    figure = Figure(figsize=(10, 7), dpi=150, layout="constrained")
    for axes, (field, title) in zip(figure.subplots(2, 2, sharex=True).flat, panels.items(), strict=True):
        for names, colour in operands.values():
            for product, style in styles.items():
                at = [i for i, key in enumerate(keys) if key in [(n, product, field) for n in names]]
                if at:
                    curve = values[:, :, at].mean((1, 2)) * (100 if title.endswith("elements") else 1)
                    axes.plot(steps, curve, color=colour, linestyle=style, linewidth=1.5)
        axes.set_title(title, loc="left", fontsize=10)
        if field in ("spread", "amax"):
            axes.set_xlabel("step")
        if field == "amax":
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    lines = [Line2D([], [], color=colour, label=label) for label, (_, colour) in operands.items()]
    lines += [Line2D([], [], color="black", linestyle=s, label=product) for product, s in styles.items()]
    figure.legend(handles=lines, loc="outside lower center", ncols=5, frameon=False)
    figure.suptitle(f"Operands of the experts' products under {name}", x=0.01, ha="left", fontweight="bold")
    figure.savefig(path)
    console.print(f"plot: {path}")


def sample(name: str, text: str) -> None:
    console.print(Panel(escape(text), title=f"written by {name}", title_align="left"))
