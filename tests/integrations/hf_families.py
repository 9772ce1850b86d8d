"""Tiny configurations of six model families, and what their expert FFNs look like."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Glm4MoeConfig,
    GptOssConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
)

VOCABULARY = 48


class Family(NamedTuple):
    config: Callable[..., PreTrainedConfig]
    #: Beyond the sizes that all share.
    options: dict[str, Any]

    def build(self, experts_implementation: str, **options: Any) -> Any:
        """A float32 model from its configuration, the same weights every time."""
        torch.manual_seed(0)
        config = self.config(
            vocab_size=VOCABULARY,
            hidden_size=40,  # not a multiple of 32: the last block of every row is short
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=64,
            num_experts_per_tok=2,
            **{"intermediate_size": 24, **self.options, **options},
        )
        return AutoModelForCausalLM.from_config(config, experts_implementation=experts_implementation)


# One dense layer before the MoE layer, as in the models themselves.
_DENSE_FIRST = {"first_k_dense_replace": 1, "moe_intermediate_size": 24, "n_shared_experts": 1}
_LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}

FAMILIES = {
    "qwen3_moe": Family(Qwen3MoeConfig, {"num_experts": 4, "moe_intermediate_size": 24, "head_dim": 16}),
    "mixtral": Family(MixtralConfig, {"num_local_experts": 4}),
    "deepseek_v3": Family(
        DeepseekV3Config, {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, **_DENSE_FIRST, **_LATENT}
    ),
    "olmoe": Family(OlmoeConfig, {"num_experts": 4}),
    "gpt_oss": Family(GptOssConfig, {"num_local_experts": 4, "head_dim": 16, "sliding_window": 8}),
    "glm4_moe": Family(
        Glm4MoeConfig,
        {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "head_dim": 16, **_DENSE_FIRST},
    ),
}


def tokens(sequences: int = 2, length: int = 16) -> torch.Tensor:
    return torch.randint(VOCABULARY, (sequences, length), generator=torch.Generator().manual_seed(1))


def randomize(model: Any, seed: int = 2) -> Any:
    """Weights of magnitude 1 / sqrt(fan in) and biases that are not zero, instead of the initial ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter.shape[-1] if parameter.ndim > 1 else 4
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * fan_in**-0.5)
    return model


def loss_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, labels=ids).loss


def gradients(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    loss_of(model, ids).backward()
    return {name: p.grad for name, p in model.named_parameters()}
