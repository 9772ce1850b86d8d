"""What TorchTitan's debug models need to run on a CPU: two overrides of its own kind, and one to test.

``attention`` takes scaled-dot-product attention where the models compile FlexAttention for a GPU.
``dispatcher`` is for torch.func alone: TorchTitan adds expert outputs up with a custom operator whose
derivative torch.func does not see, so the same sum is written as index_add. ``last_layer`` is an
override as a user would write it.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torchtitan.config import ConfigManager, apply_overrides, derive, override
from torchtitan.models.common.attention import FlexAttention
from torchtitan.models.common.moe import GroupedExperts
from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher
from torchtitan.protocols.module import Module

from moefp8 import MXFP8, Gemm
from moefp8.integrations.torchtitan import with_recipe


class CausalAttention(Module):
    """One document a sequence, so a causal mask is all there is to ``attention_masks``."""

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        pass

    def __init__(self, config: Any) -> None:
        super().__init__()

    def forward(self, q, k, v, *, attention_masks=None, scale=None, enable_gqa=False, **_):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, scale=scale, is_causal=True, enable_gqa=enable_gqa)
        return out.transpose(1, 2)


@override(target=FlexAttention.Config, description="Attention that runs on a CPU.")
def attention(cfg: Any) -> Any:
    return derive(cfg, CausalAttention.Config)


class FunctionalDispatcher(LocalTokenDispatcher):
    @dataclass(kw_only=True, slots=True)
    class Config(LocalTokenDispatcher.Config):
        pass

    def combine(self, routed_output, metadata, x):
        weighted = routed_output.float() * metadata.topk_scores_experts_sorted_N.unsqueeze(1)
        index = metadata.token_indices_experts_sorted_N
        return torch.zeros_like(x).index_add(0, index, weighted.to(x.dtype))


@override(target=LocalTokenDispatcher.Config, description="Combine that torch.func sees through.")
def dispatcher(cfg: Any) -> Any:
    return derive(cfg, FunctionalDispatcher.Config)


@override(target=GroupedExperts.Config, fqns=["*.layers.5.*"], description="A recipe for one layer.")
def last_layer(cfg: Any) -> Any:
    return with_recipe(cfg, MXFP8._replace(dgrad=Gemm(dtype=torch.float8_e5m2)))


def build(module: str, config_name: str, *overrides: str, layers: int | None = None) -> Any:
    """The model that ``--module M --config C --override.imports ...`` trains, as the trainer builds it.

    ``layers`` keeps only the first so many.
    """
    arguments = ["--module", module, "--config", config_name]
    config = ConfigManager().parse_args(
        [*arguments, "--override.imports", "titan_cpu.attention", *overrides]
    )
    model_config = config.model_spec.model
    model_config.layers = model_config.layers[:layers]
    model_config.update_from_config(config=config)
    apply_overrides(config.override, config)
    with torch.device("meta"):
        model = model_config.build()
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        model.init_weights(buffer_device=torch.device("cpu"))
    return model.train()
