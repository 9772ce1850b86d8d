"""Train a Hugging Face MoE model with MXFP8 experts, beside the same run with its own bf16 experts.

    python examples/finetune_hf_moe.py            # eager, then moefp8_mxfp8: some 5 minutes on one core
    python examples/finetune_hf_moe.py --short    # the same in miniature, seconds
    python examples/finetune_hf_moe.py --load runs/finetune_hf_moe/eager --learning-rate 5e-4

The model is a small Qwen3-MoE built from its configuration, or what ``--load`` names: a folder that
``save_pretrained`` wrote, of any family that asks transformers' experts registry and whose vocabulary
has room for 256 bytes. Nothing is downloaded: the text is the source of the Python standard library,
byte by byte, one file in 16 held out.

One line makes the difference between the runs, ``experts_implementation=``. Everything else is an
ordinary transformers training loop: float32 weights, autocast to bfloat16, AdamW.
"""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

try:
    import lm_report
    import torch
    import torch.nn.functional as F
    from torch import Tensor
    from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3MoeConfig
    from transformers.utils.logging import disable_progress_bar

    import moefp8.integrations.transformers  # noqa: F401  (registers moefp8_mxfp8 and its siblings)
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}; this example needs: pip install 'moefp8[examples,transformers]'") from error

from lm_text import draw_batch, held_out_windows, load_corpus
from train_moe_lm import learning_rate

# --- model ---------------------------------------------------------------------------------------


def build(experts: str, args: argparse.Namespace) -> PreTrainedModel:
    """The model with its experts under the implementation ``experts``, the same weights every time."""
    if args.load is not None:
        model = AutoModelForCausalLM.from_pretrained(
            args.load, experts_implementation=experts, dtype=torch.float32
        )
    else:
        torch.manual_seed(args.seed)
        config = Qwen3MoeConfig(
            vocab_size=256,  # bytes
            hidden_size=args.dim,
            num_hidden_layers=args.layers,
            num_attention_heads=args.heads,
            num_key_value_heads=args.heads,
            head_dim=args.dim // args.heads,
            num_experts=args.experts,
            num_experts_per_tok=args.top_k,
            moe_intermediate_size=args.hidden,
            max_position_embeddings=args.length,
            tie_word_embeddings=True,
            router_aux_loss_coef=0.02,
        )
        model = AutoModelForCausalLM.from_config(config, experts_implementation=experts)
    return model.to(args.device).train()


class Losses(NamedTuple):
    entropy: Tensor  # nats a byte
    total: Tensor  # with the router's load-balancing loss
    tokens_per_expert: Tensor  # (layers, E)


def losses(model: PreTrainedModel, text: Tensor) -> Losses:
    """Losses of predicting ``text[:, 1:]`` (batch, length) from the bytes before."""
    with torch.autocast(text.device.type, torch.bfloat16):
        out = model(input_ids=text[:, :-1], output_router_logits=True, use_cache=False)
    entropy = F.cross_entropy(out.logits.flatten(0, 1).float(), text[:, 1:].flatten())
    top_k, coefficient = model.config.num_experts_per_tok, model.config.router_aux_loss_coef
    chosen = [logits.topk(top_k).indices.flatten() for logits in out.router_logits]
    counts = torch.stack([c.bincount(minlength=model.config.num_experts) for c in chosen])
    return Losses(entropy, entropy + coefficient * out.aux_loss, counts)


# --- one run -------------------------------------------------------------------------------------


class State(NamedTuple):
    """How far a run is."""

    step: int
    seconds: Tensor
    train_loss: Tensor  # (step,)


def evaluate(model: PreTrainedModel, windows: list[Tensor]) -> tuple[float, Tensor]:
    """Mean nats a byte over ``windows``, and the tokens each expert of each layer got."""
    with torch.no_grad():
        results = [losses(model, text) for text in windows]
    entropy = torch.stack([r.entropy for r in results]).mean().item()
    return entropy, torch.stack([r.tokens_per_expert for r in results]).sum(0).cpu()


def train(experts: str, args: argparse.Namespace, text: Tensor, windows: list[Tensor]) -> Any:
    """Train one model, save it in ``args.out / experts``, and return what there is to report."""
    model = build(experts, args)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), eps=1e-9, weight_decay=0.1)
    generator = torch.Generator().manual_seed(args.seed + 1)
    entropies, held_out, seconds = [], [], 0.0
    start = State(0, torch.tensor(0.0), torch.tensor([]))
    with lm_report.progress(experts, start, args) as report:
        for step in range(args.steps):
            began = time.perf_counter()
            batch = draw_batch(text, args.batch, args.length, generator).to(args.device)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args.steps, args.learning_rate)
            loss = losses(model, batch)
            optimizer.zero_grad()
            loss.total.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            entropies.append(loss.entropy.item())
            seconds += time.perf_counter() - began
            report(State(step + 1, torch.tensor(seconds), torch.tensor(entropies)))
            if (step + 1) % args.every == 0 or step + 1 == args.steps:
                held_out.append((step + 1, evaluate(model, windows[:4])[0]))
    model.save_pretrained(args.out / experts)
    final, counts = evaluate(model, windows)
    name = experts.removeprefix("moefp8_")
    return lm_report.Result(name, torch.tensor(entropies), torch.tensor(held_out), final, counts, seconds)


# --- command line --------------------------------------------------------------------------------

#: Flags that ``--short`` changes unless they are given.
SHORT = {"steps": 30, "batch": 4, "length": 64, "dim": 64, "hidden": 64, "every": 10}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--runs", default="eager,moefp8_mxfp8", help="experts implementations, comma separated")
    add("--load", type=Path, help="start from this save_pretrained folder, not from new weights")
    add("--steps", type=int, default=200, help="training steps")
    add("--short", action="store_true", help="a miniature of the whole job, for continuous integration")
    add("--batch", type=int, default=8, help="sequences a step")
    add("--length", type=int, default=128, help="bytes a sequence")
    add("--layers", type=int, default=2, help="decoder layers")
    add("--dim", type=int, default=128, help="width of a token")
    add("--heads", type=int, default=4, help="attention heads")
    add("--hidden", type=int, default=256, help="width inside an expert")
    add("--experts", type=int, default=8, help="experts a layer")
    add("--top-k", type=int, default=2, help="experts a token")
    add("--learning-rate", type=float, default=4e-3, help="peak of the schedule")
    add("--every", type=int, default=50, help="steps between held-out points")
    add("--seed", type=int, default=0, help="of the weights and the batches")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to train")
    add("--out", type=Path, default=Path("runs/finetune_hf_moe"), help="folder of the models and the plot")
    args = parser.parse_args(argv)
    if args.short:
        parser.set_defaults(**SHORT)
        args = parser.parse_args(argv)
    for flag in ("steps", "batch", "length", "layers", "dim", "heads", "hidden", "experts", "every"):
        if getattr(args, flag) < 1:
            parser.error(f"argument --{flag}: expected at least 1, got {getattr(args, flag)}")
    if args.dim % (2 * args.heads):
        parser.error(f"argument --dim: expected a multiple of 2 * heads = {2 * args.heads}, got {args.dim}")
    if not 1 <= args.top_k <= args.experts:
        parser.error(f"argument --top-k: expected 1 to --experts = {args.experts}, got {args.top_k}")
    args.runs = args.runs.split(",")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    disable_progress_bar()  # of transformers; the example draws its own
    text, held_out = load_corpus()
    count = 4 if args.short else 24
    windows = held_out_windows(held_out, args.batch, args.length, count)
    windows = [window.to(args.device) for window in windows]
    parameters = sum(p.numel() for p in build(args.runs[0], args).parameters())
    lm_report.header(parameters, len(text), len(held_out), args)
    results = [train(experts, args, text, windows) for experts in args.runs]
    lm_report.table(results)
    lm_report.plot(results, args.out / "loss.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
