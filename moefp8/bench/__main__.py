"""Command line of the benchmarks: ``python -m moefp8.bench --help``."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from moefp8.bench.markdown import render
from moefp8.bench.problem import NEVER, PUBLISHED, SMALL, Problem
from moefp8.kernels import REGISTRY
from moefp8.recipe import PRESETS

NO_GPU = """\
No CUDA device here, and these tables are about one. The CPU reference can be measured instead, at a
small size:

    python -m moefp8.bench {command} --device cpu
"""


def shape(text: str) -> tuple[int, int, int]:
    """``M,K,N`` as three positive integers."""
    try:
        m, k, n = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected M,K,N, got {text!r}") from None
    if min(m, k, n) < 1:
        raise argparse.ArgumentTypeError(f"expected positive M,K,N, got {text!r}")
    return m, k, n


def problem(text: str) -> Problem:
    """``M,K,N,G`` as a problem."""
    *axes, groups = text.split(",")
    return Problem(*shape(",".join(axes)), positive(groups))


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return value


def interval(text: str) -> int:
    """A promotion interval, or "never"."""
    return NEVER if text == "never" else positive(text)


def parser() -> argparse.ArgumentParser:
    """Everything that can be asked for."""
    top = argparse.ArgumentParser(
        prog="python -m moefp8.bench",
        description="Measure grouped products, quantisers and their accuracy on this machine.",
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, about: str, *, shapes: bool) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=about, description=about)
        sub.add_argument("--device", help="cuda (default), cuda:1, ..., or cpu")
        sub.add_argument("--json", type=Path, metavar="FILE", help="write all figures as JSON")
        sub.add_argument("--png", type=Path, metavar="FILE", help="draw the figures")
        sub.add_argument(
            "--repeats", type=positive, metavar="N", help="calls of each (20 on a GPU, 5 on a CPU)"
        )
        sub.add_argument(
            "--without", action="append", default=[], metavar="NAME",
            help="repeatable: leave out what has NAME in its name",
        )  # fmt: skip
        sub.add_argument(
            "--peer-seconds", type=positive, default=240, metavar="S",
            help="what the first call of a peer that tunes itself may take (240)",
        )  # fmt: skip
        if shapes:
            sub.add_argument(
                "--shape",
                type=shape,
                action="append",
                metavar="M,K,N",
                help="repeatable (default: the published shapes on a GPU, 1024,512,512 on a CPU)",
            )
            sub.add_argument(
                "--groups",
                type=positive,
                nargs="+",
                metavar="G",
                help="numbers of experts: of each --shape (8), or those of the published shapes",
            )
            sub.add_argument(
                "--unequal", type=positive, nargs="?", const=1, metavar="MULTIPLE",
                help="random group sizes, multiples of MULTIPLE (1); peers may need 16 or 32",
            )  # fmt: skip
        return sub

    def products(sub: argparse.ArgumentParser, recipes: Sequence[str], *, promote: bool = True) -> None:
        sub.add_argument(
            "--recipe",
            choices=list(PRESETS),
            action="append",
            help=f"repeatable (default: {', '.join(recipes)})",
        )
        if promote:
            sub.add_argument(
                "--promote", type=interval, action="append", default=[], metavar="N",
                help="repeatable: add the recipes with this promotion interval, or never",
            )  # fmt: skip
        sub.add_argument(
            "--implementation", choices=list(REGISTRY), help="of moefp8 (default: the first that serves)"
        )
        sub.set_defaults(recipes=recipes)

    grouped = command("grouped-mm", "The grouped product and its gradients beside bf16.", shapes=True)
    products(grouped, ["mxfp8", "fp8_rowwise"])
    grouped.add_argument("--forward", action="store_true", help="leave the backward out")
    alone = command("gemm", "The product alone beside dense cuBLAS FP8, operands quantised.", shapes=True)
    alone.add_argument(
        "--promote", type=interval, action="append", metavar="N",
        help="repeatable: promotion intervals, or never (128)",
    )  # fmt: skip
    command("quantize", "The quantisers beside a copy.", shapes=True)
    layers = command("moe-layer", "The whole MoE layer beside the same one in bfloat16.", shapes=False)
    products(layers, ["mxfp8", "fp8_rowwise"], promote=False)
    layers.add_argument(
        "--layer",
        action="append",
        metavar="NAME",
        help="repeatable: layers with NAME in their name",
    )
    layers.add_argument("--tokens", type=positive, help="instead of the published number")
    layers.add_argument("--auto", action="store_true", help="add recipe='auto'")
    layers.add_argument("--quantized", action="store_true", help="add weights quantised beforehand")
    layers.add_argument("--compile", action="store_true", help="compile this library's layer as well")
    accuracy = command("accumulation", "Bias of long sums, and SQNR by distribution.", shapes=False)
    products(accuracy, ["mxfp8", "fp8_rowwise", "mxfp8_exact"])
    accuracy.add_argument(
        "--contraction", type=positive, nargs="+", default=[16384, 131072], help="lengths of the long sums"
    )
    accuracy.add_argument(
        "--intervals", type=interval, nargs="+", default=[128, 256, 512, 1024, NEVER], metavar="N",
        help="promotion intervals of the trade-off (128 256 512 1024 never)",
    )  # fmt: skip
    accuracy.add_argument(
        "--shape", type=problem, help="M,K,N,G of the trade-off's speed (Llama4, 8 experts, on a GPU)"
    )
    accuracy.add_argument("--size", type=positive, help="the other axes (a multiple of 32)")
    page = commands.add_parser("markdown", help="The JSON of a run as Markdown tables.")
    page.add_argument("file", type=Path, nargs="+", help="what --json wrote")
    return top


def device_of(args: argparse.Namespace) -> torch.device:
    if args.device is None and not torch.cuda.is_available():
        raise SystemExit(NO_GPU.format(command=args.command))
    device = torch.device(args.device or "cuda")
    if device.type == "cuda" and device.index is None:  # torch.cuda.set_device wants a number
        return torch.device("cuda", torch.cuda.current_device())
    return device


def problems_of(args: argparse.Namespace, device: torch.device) -> list[Problem]:
    """The published shapes on a GPU and a small one on a CPU, or those asked for."""
    if args.shape is None:
        known = PUBLISHED if device.type == "cuda" else SMALL
        kept = [p for p in known if args.groups is None or p.groups in args.groups]
        if not kept:
            have = sorted({p.groups for p in known})
            raise SystemExit(f"--groups: the published shapes have {have}; others need a --shape")
        return kept
    return [Problem(m, k, n, g) for m, k, n in args.shape for g in args.groups or [8]]


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, measure, print and write."""
    args = parser().parse_args(argv)
    if args.command == "markdown":
        print("\n".join(render(path) for path in args.file), end="")
        return
    device = device_of(args)
    if getattr(args, "repeats", 0) is None:
        args.repeats = 20 if device.type == "cuda" else 5
    try:
        from moefp8.bench import commands
    except ModuleNotFoundError as error:
        raise SystemExit(f"{error.name} is missing: pip install 'moefp8[bench]'") from error
    command = shlex.join(["python", "-m", "moefp8.bench", *(sys.argv[1:] if argv is None else argv)])
    if args.command == "accumulation":
        commands.accumulation(args, device, command)
    elif args.command == "moe-layer":
        commands.layer(args, device, command)
    else:
        runs = {"grouped-mm": commands.grouped_mm, "gemm": commands.products, "quantize": commands.quantize}
        runs[args.command](args, problems_of(args, device), device, command)


if __name__ == "__main__":
    main()
