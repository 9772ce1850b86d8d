"""Train a small Mixture-of-Experts language model with MXFP8 experts, beside the same run in bf16.

    python examples/train_moe_lm.py                  # bf16, then MXFP8: about 3 minutes on 2 cores
    python examples/train_moe_lm.py --short          # the same in miniature, seconds
    python examples/train_moe_lm.py --recipe mxfp8,fp8_rowwise --steps 1000 --out runs/long
    python examples/train_moe_lm.py --statistics     # how operands fare when they are quantised, as a plot

The text is what every machine has: the source of the Python standard library, byte by byte, one file
in 16 held out. Everything is a pure function of a plain pytree, read from top to bottom: model, loss,
optimizer, one training step from ``torch.func.grad_and_value``, the loop, the command line. Text,
checkpoints and what is shown on the screen have files of their own beside this one.

Precision: float32 master weights, optimizer and arithmetic everywhere but in the MoE layer, which gets
its tokens and weights in bfloat16 and returns bfloat16. There ``bf16`` multiplies the bfloat16 values and
``mxfp8`` quantises them, forward and backward; both add up in float32. Nothing else differs. A CPU
multiplies in float32 under either recipe, which holds these products exactly: on most that is faster than
bfloat16, and MXFP8 is only emulated. Compare the losses here, and speed on a GPU.
"""

import argparse
import functools
import math
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor

from moefp8 import MoEConfig, Recipe, cotangent_probe, init_moe_ffn, moe_ffn, quantize_params
from moefp8.recipe import PRESETS

try:
    import lm_report
    from lm_checkpoint import interruptible, load, save
    from lm_text import draw_batch, held_out_windows, load_corpus
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}; this example needs: pip install 'moefp8[examples]'") from error

Params = dict[str, Any]

# --- model ---------------------------------------------------------------------------------------


class ModelConfig(NamedTuple):
    layers: int
    heads: int
    moe: MoEConfig
    vocab: int = 256  # bytes


def init_model(generator: torch.Generator, config: ModelConfig) -> Params:
    """Embedding, blocks of attention and MoE, a norm and a head, whose first loss is about ln(vocab)."""
    dim = config.moe.dim

    def normal(*shape: int, std: float) -> Tensor:
        return torch.randn(shape, generator=generator) * std

    def block() -> Params:
        return {
            "attention_norm": torch.ones(dim),
            "shift": torch.full((dim,), 0.5),
            "qkv": normal(3 * dim, dim, std=dim**-0.5),
            "out": normal(dim, dim, std=(2 * config.layers * dim) ** -0.5),
            "moe_norm": torch.ones(dim),
            "moe": init_moe_ffn(generator, config.moe),
        }

    return {
        "embedding": normal(config.vocab, dim, std=dim**-0.5),
        "blocks": [block() for _ in range(config.layers)],
        "norm": torch.ones(dim),
        "head": normal(config.vocab, dim, std=0.5 * dim**-0.5),
    }


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight


def rotary(x: Tensor) -> Tensor:
    """Rotary position embedding of x (batch, heads, length, head_dim)."""
    half = x.shape[-1] // 2
    frequency = 10000.0 ** (-torch.arange(half, dtype=torch.float32, device=x.device) / half)
    angle = torch.arange(x.shape[-2], dtype=torch.float32, device=x.device)[:, None] * frequency
    left, right = x.chunk(2, dim=-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([left * cos - right * sin, left * sin + right * cos], dim=-1)


def attention(block: Params, x: Tensor, heads: int) -> Tensor:
    """Causal attention. Each byte first takes in the one before it: alone, a byte says too little."""
    before = F.pad(x, (0, 0, 1, -1))
    x = x + block["shift"] * (before - x)
    q, k, v = F.linear(x, block["qkv"]).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    y = F.scaled_dot_product_attention(rotary(q), rotary(k), v, is_causal=True)
    return F.linear(y.transpose(1, 2).flatten(-2), block["out"])


def low(params: Params) -> Params:
    """Bfloat16 copies of the experts; the router stays float32."""
    return {name: p if name == "router" else p.bfloat16() for name, p in params.items()}


def model(
    params: Params, tokens: Tensor, config: ModelConfig, recipe: Recipe, options: list[Params] | None = None
) -> tuple[Tensor, list]:
    """Logits (batch, length, vocab) for the byte after each byte of ``tokens``, and MoEStats a layer.

    ``options`` are further arguments of ``moe_ffn``, layer by layer.
    """
    x = F.embedding(tokens, params["embedding"]) * config.moe.dim**0.5
    stats = []
    for block, more in zip(params["blocks"], options or [{}] * config.layers, strict=True):
        x = x + attention(block, rms_norm(x, block["attention_norm"]), config.heads)
        rows = rms_norm(x, block["moe_norm"]).bfloat16()
        y, layer_stats = moe_ffn(low(block["moe"]), rows, config=config.moe, recipe=recipe, **more)
        x = x + y.float()
        stats.append(layer_stats)
    return F.linear(rms_norm(x, params["norm"]), params["head"]), stats


def cross_entropy(
    params: Params, text: Tensor, config: ModelConfig, recipe: Recipe, options: list[Params] | None = None
) -> tuple[Tensor, list]:
    """Mean nats a byte of predicting ``text[:, 1:]`` from what comes before, and MoEStats a layer."""
    logits, stats = model(params, text[:, :-1], config, recipe, options)
    return F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten()), stats


def loss_fn(
    params: Params, text: Tensor, config: ModelConfig, recipe: Recipe, options: list[Params] | None = None
) -> tuple[Tensor, Tensor]:
    """What is minimised; the cross-entropy alone comes along as an auxiliary output."""
    entropy, stats = cross_entropy(params, text, config, recipe, options)
    auxiliary = sum(0.02 * s.load_balance_loss + 0.001 * s.z_loss for s in stats)
    return entropy + auxiliary, entropy


# --- training step -------------------------------------------------------------------------------


class AdamState(NamedTuple):
    step: Tensor
    mean: Params
    square: Params


def adamw_init(params: Params) -> AdamState:
    zeros = functools.partial(pytree.tree_map, torch.zeros_like)
    return AdamState(torch.tensor(0), zeros(params), zeros(params))


def adamw(
    params: Params, grads: Params, state: AdamState, learning_rate: float | Tensor
) -> tuple[Params, AdamState]:
    """One AdamW update: gradients clipped to norm 1, weight decay 0.1 on matrices."""
    beta1, beta2, eps, decay = 0.9, 0.98, 1e-9, 0.1
    norm = torch.stack([g.square().sum() for g in pytree.tree_leaves(grads)]).sum().sqrt()
    clip = 1.0 / norm.clamp(min=1.0)
    step = state.step + 1
    mean = pytree.tree_map(lambda m, g: torch.lerp(m, g * clip, 1 - beta1), state.mean, grads)
    square = pytree.tree_map(
        lambda v, g: torch.lerp(v, (g * clip).square(), 1 - beta2), state.square, grads
    )
    correct1, correct2 = 1 - beta1**step, 1 - beta2**step

    def update(p: Tensor, m: Tensor, v: Tensor) -> Tensor:
        kept = p * (1 - learning_rate * decay) if p.ndim > 1 else p
        return kept - learning_rate * (m / correct1) / ((v / correct2).sqrt() + eps)

    return pytree.tree_map(update, params, mean, square), AdamState(step, mean, square)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over a tenth of the run, then a cosine down to 0."""
    warmup = max(steps // 10, 1)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def train_step(
    params: Params,
    state: AdamState,
    text: Tensor,
    rate: float,
    config: ModelConfig,
    recipe: Recipe,
    micro_batches: int = 1,
) -> tuple[Params, AdamState, Tensor]:
    """New parameters, new optimizer state, and the cross-entropy before the update."""
    options = None
    if micro_batches > 1:  # the experts are quantised once for all of them
        options = [{"quantized": quantize_params(low(b["moe"]), recipe)} for b in params["blocks"]]
    loss = functools.partial(loss_fn, config=config, recipe=recipe, options=options)
    step = torch.func.grad_and_value(loss, has_aux=True)
    parts = [step(params, part) for part in text.chunk(micro_batches)]

    def mean(*xs: Tensor) -> Tensor:
        return torch.stack(xs).mean(0) if len(xs) > 1 else xs[0]

    grads = pytree.tree_map(mean, *(grads for grads, _ in parts))
    params, state = adamw(params, grads, state, rate)
    return params, state, mean(*(entropy for _, (_, entropy) in parts))


# --- looking at a model --------------------------------------------------------------------------


def evaluate(
    params: Params, windows: list[Tensor], config: ModelConfig, recipe: Recipe
) -> tuple[float, Tensor]:
    """Mean cross-entropy over ``windows``, and the tokens each expert of each layer got."""
    losses, counts = [], []
    with torch.no_grad():
        for text in windows:
            entropy, stats = cross_entropy(params, text, config, recipe)
            losses.append(entropy.item())
            counts.append(torch.stack([s.tokens_per_expert for s in stats]))
    return sum(losses) / len(losses), torch.stack(counts).sum(0)


def measure(params: Params, text: Tensor, config: ModelConfig, recipe: Recipe) -> list[Params]:
    """Statistics of every operand of every layer, by name and product, for one batch.

    Forward operands come as an auxiliary output, cotangents as the gradient of probes that are zero.
    """

    def loss(probes: list[Params]) -> tuple[Tensor, list]:
        options = [{"statistics": True, "probe": probe} for probe in probes]
        entropy, stats = cross_entropy(params, text, config, recipe, options)
        return entropy, [s.operands for s in stats]

    probes = [cotangent_probe(recipe) for _ in range(config.layers)]
    cotangents, operands = torch.func.grad(loss, has_aux=True)(probes)
    return [forward | backward for forward, backward in zip(operands, cotangents, strict=True)]


def generate(
    params: Params, prompt: str, count: int, length: int, config: ModelConfig, recipe: Recipe, seed: int
) -> str:
    """Continue ``prompt`` by ``count`` bytes, sampled at temperature 0.7."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.tensor([list(prompt.encode())])
    with torch.no_grad():
        for _ in range(count):
            logits, _ = model(params, text[:, -length:], config, recipe)
            probability = (logits[:, -1] / 0.7).softmax(-1)
            text = torch.cat([text, torch.multinomial(probability, 1, generator=generator)], dim=1)
    return bytes(text[0].tolist()).decode(errors="replace")


# --- one run -------------------------------------------------------------------------------------


class Run(NamedTuple):
    """Everything a run needs to go on: a pytree, saved whole."""

    params: Params
    optimizer: AdamState
    random: Tensor  # state of the generator that draws batches
    train_loss: Tensor  # (steps so far,)
    held_out: Tensor  # (evaluations so far, 2): step, loss
    seconds: Tensor
    statistics: Tensor  # (evaluations so far, layers, leaves of ``measure``), none without --statistics

    @property
    def step(self) -> int:
        return int(self.optimizer.step)


def new_run(args: argparse.Namespace, config: ModelConfig) -> Run:
    params = init_model(torch.Generator().manual_seed(args.seed), config)
    batches = torch.Generator().manual_seed(args.seed + 1).get_state()
    empty = torch.zeros(0, dtype=torch.float64)
    nothing, seconds = torch.zeros(0, config.layers, 0), torch.zeros(1).double()
    return Run(params, adamw_init(params), batches, empty, empty.view(0, 2), seconds, nothing)


def train(
    run: Run,
    args: argparse.Namespace,
    config: ModelConfig,
    recipe: Recipe,
    data: tuple[Tensor, list[Tensor]],
    checkpoint: Callable[[Run], None],
    report: Callable[[Run], None],
) -> Run:
    """Train until ``args.steps`` or Ctrl-C, and leave a checkpoint."""
    text, windows = data
    generator = torch.Generator()
    generator.set_state(run.random)
    with interruptible() as interrupted:
        while run.step < args.steps and not interrupted():
            start = time.perf_counter()
            batch = draw_batch(text, args.batch, args.length, generator)
            rate = learning_rate(run.step, args.steps, args.learning_rate)
            params, optimizer, entropy = train_step(
                run.params, run.optimizer, batch, rate, config, recipe, args.micro_batches
            )
            held_out, statistics = run.held_out, run.statistics
            if int(optimizer.step) % args.every == 0 or int(optimizer.step) == args.steps:
                point = [float(optimizer.step), evaluate(params, windows, config, recipe)[0]]
                held_out = torch.cat([held_out, torch.tensor([point], dtype=torch.float64)])
                if args.statistics and cotangent_probe(recipe):  # bf16 has none
                    found = [
                        torch.stack(pytree.tree_leaves(layer))
                        for layer in measure(params, batch, config, recipe)
                    ]
                    new = torch.stack(found)[None]
                    statistics = torch.cat([statistics, new]) if len(statistics) else new
            run = Run(
                params,
                optimizer,
                generator.get_state(),
                torch.cat([run.train_loss, entropy.double()[None]]),
                held_out,
                run.seconds + (time.perf_counter() - start),
                statistics,
            )
            report(run)
            if run.step % args.every == 0:
                checkpoint(run)
        checkpoint(run)
    return run


# --- command line --------------------------------------------------------------------------------

#: Flags that ``--short`` changes unless they are given.
SHORT = {"steps": 30, "batch": 4, "length": 64, "dim": 64, "hidden": 64, "every": 10, "sample": 40}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    known = ", ".join(PRESETS)
    add = parser.add_argument
    add("--recipe", action="append", help=f"presets, comma separated or repeated: {known} (bf16,mxfp8)")
    add("--steps", type=int, default=700, help="training steps")
    add("--short", action="store_true", help="a miniature of the whole job, for continuous integration")
    add("--batch", type=int, default=4, help="sequences a step")
    add("--length", type=int, default=256, help="bytes a sequence")
    add("--layers", type=int, default=2, help="transformer blocks")
    add("--dim", type=int, default=128, help="width of a token")
    add("--heads", type=int, default=4, help="attention heads")
    add("--hidden", type=int, default=128, help="width inside an expert")
    add("--experts", type=int, default=8, help="experts a layer")
    add("--top-k", type=int, default=2, help="experts a token")
    add("--learning-rate", type=float, default=3e-3, help="peak of the schedule")
    add("--every", type=int, default=70, help="steps between held-out points, which are checkpoints too")
    add("--sample", type=int, default=240, help="bytes of text to generate at the end")
    add("--micro-batches", type=int, default=1, help="parts of a step; experts are quantised once for all")
    add("--statistics", action="store_true", help="measure operands at held-out points, and plot them")
    add("--seed", type=int, default=0, help="of the weights and the batches")
    add("--out", type=Path, default=Path("runs/train_moe_lm"), help="folder of checkpoints and the plot")
    add(
        "--resume",
        action="store_true",
        help="go on from the checkpoints in --out: the same bits, on as many threads",
    )
    args = parser.parse_args(argv)
    if args.short:
        parser.set_defaults(**SHORT)
        args = parser.parse_args(argv)

    args.recipe = [name for flag in args.recipe or ["bf16,mxfp8"] for name in flag.split(",")]
    for name in args.recipe:
        if name not in PRESETS:
            parser.error(f"argument --recipe: expected some of {known}, got {name!r}")
    sizes = ("steps", "batch", "length", "layers", "dim", "heads", "hidden", "experts", "top_k", "every")
    sizes = (*sizes, "micro_batches")
    for flag in (*sizes, "sample", "learning_rate", "seed"):
        least, value = int(flag in sizes), getattr(args, flag)
        if not value >= least:  # NaN is not
            parser.error(f"argument --{flag.replace('_', '-')}: expected at least {least}, got {value}")
    if args.dim % (2 * args.heads):
        parser.error(f"argument --dim: expected a multiple of 2 * heads = {2 * args.heads}, got {args.dim}")
    if args.batch % (parts := args.micro_batches):
        parser.error(f"argument --micro-batches: expected a divisor of --batch {args.batch}, got {parts}")
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"argument --out: expected a folder, got the file {args.out}")
    if args.top_k > args.experts:
        parser.error(f"argument --top-k: expected at most --experts = {args.experts}, got {args.top_k}")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    config = ModelConfig(
        args.layers, args.heads, MoEConfig(args.dim, args.hidden, args.experts, args.top_k)
    )
    names = ("steps", "batch", "length", "layers", "dim", "heads", "hidden", "experts", "top_k")
    new = ("micro_batches", "statistics")
    settings = {name: getattr(args, name) for name in (*names, "learning_rate", "every", "seed", *new)}
    text, held_out = load_corpus()
    if args.length >= min(len(text), len(held_out)):
        raise SystemExit(
            f"--length: expected less than {len(held_out)}, the held-out bytes, got {args.length}"
        )
    few = held_out_windows(held_out, args.batch, args.length, 4 if args.short else 16)
    many = held_out_windows(held_out, args.batch, args.length, 4 if args.short else 128)
    count = sum(p.numel() for p in pytree.tree_leaves(new_run(args, config).params))
    lm_report.header(count, len(text), len(held_out), args)

    paths = {name: args.out / f"{name}.safetensors" for name in args.recipe}
    if args.resume and not any(path.exists() for path in paths.values()):
        raise SystemExit(f"--resume: there is no checkpoint of {', '.join(paths)} in {args.out}")

    results = []
    for name, path in paths.items():
        run = new_run(args, config)
        if args.resume and path.exists():
            run = load(path, run, settings)
        save_here = functools.partial(save, path=path, settings=settings)
        with lm_report.progress(name, run, args) as report:
            run = train(run, args, config, PRESETS[name], (text, few), save_here, report)
        if run.step < args.steps:
            flags = [flag for flag in (sys.argv[1:] if argv is None else argv) if flag != "--resume"]
            command = shlex.join(["python", sys.argv[0], *flags, "--resume"])
            lm_report.interrupted(name, run.step, path, command)
            return 130  # what a shell reports for a program that Ctrl-C ended
        loss, tokens = evaluate(run.params, many, config, PRESETS[name])
        if len(run.statistics):
            leaves = pytree.tree_leaves_with_path(measure(run.params, few[0], config, PRESETS[name])[0])
            keys = [
                tuple(str(getattr(k, "key", getattr(k, "name", k))) for k in path) for path, _ in leaves
            ]
            image = args.out / f"statistics_{name}.png"
            lm_report.plot_statistics(name, run.held_out[:, 0], keys, run.statistics, image)
        results.append(
            lm_report.Result(name, run.train_loss, run.held_out, loss, tokens, run.seconds.item())
        )

    lm_report.table(results)
    lm_report.plot(results, args.out / "loss.png")
    name = args.recipe[-1]
    sample = generate(run.params, "def ", args.sample, args.length, config, PRESETS[name], args.seed)
    lm_report.sample(name, sample)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # outside of a training step: there is nothing to save
        sys.exit(130)
