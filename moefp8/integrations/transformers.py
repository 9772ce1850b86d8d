"""Hugging Face transformers: an experts implementation for each recipe (extra ``transformers``).

Importing this module registers ``moefp8_mxfp8``, ``moefp8_mxfp8_exact``, ``moefp8_mxfp8_wgrad_hp``,
``moefp8_fp8_rowwise`` and ``moefp8_bf16``, one for each of ``moefp8.recipe.PRESETS``, in
transformers' own registry of experts implementations. Nothing in a model is replaced::

    import moefp8.integrations.transformers

    model = AutoModelForCausalLM.from_config(config, experts_implementation="moefp8_mxfp8")
    model.set_experts_implementation("moefp8_fp8_rowwise")  # or later

Not every model family asks that registry: llama4 accepts any registered name and then ignores it.
:func:`check` tells, and raises where a name has no effect. It also runs by itself at the end of
``from_config``, ``from_pretrained`` and ``set_experts_implementation`` when one of the names here is
asked for; transformers has no hook for that, so :func:`register` wraps these three methods.
"""

import functools
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moefp8.grouped import scaled_grouped_mm
from moefp8.recipe import PRESETS, Recipe, check_recipe

try:
    from transformers import PreTrainedModel
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate
except ImportError as error:
    raise ImportError(
        "moefp8.integrations.transformers needs transformers >= 5.23: pip install 'moefp8[transformers]'"
    ) from error

#: What the registered names begin with.
PREFIX = "moefp8_"


@dataclass(frozen=True)
class Experts:
    """An entry of the registry: the forward of an experts module under a recipe.

    With E experts, T tokens of width D, hidden width H and k experts a token::

        y[t] = sum over j < k of  weights[t, j] * ffn(x[t], expert index[t, j])
        ffn(x, e) = act(x @ up[e] + b_up[e]) @ down[e] + b_down[e]

    where ``act`` is the module's own: gate and up lie in one ``gate_up_proj``, as halves or
    interleaved, or there is only ``up_proj``. Pairs (t, j) are sorted by expert, both products run
    as :func:`moefp8.scaled_grouped_mm`, and the results go back to their tokens in a fixed order.
    An index of ``num_experts`` or more marks a pair that another rank serves: it sorts behind the
    last group, where the products give zeros and take no gradient.
    """

    recipe: Recipe
    implementation: str | tuple[str, ...] | None = None

    def __call__(
        self, module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        """The contract of transformers' registry.

        Args:
            module: the experts module; its attributes say how the weights lie.
            hidden_states: x, (T, D).
            top_k_index: (T, k) expert of each pair.
            top_k_weights: (T, k).

        Returns:
            y, (T, D) of the dtype of x.
        """
        tokens, top_k = top_k_index.shape
        expert = top_k_index.reshape(-1)
        order = expert.argsort(stable=True)
        offs = _group_ends(expert, module.num_experts)
        # A zero output alone would not keep another rank's pair out of a norm's bias.
        weights = torch.where(expert < module.num_experts, top_k_weights.reshape(-1), 0)

        x = hidden_states[order // top_k]
        up = self._linear(module, "gate_up_proj" if module.has_gate else "up_proj", x, offs)
        y = self._linear(module, "down_proj", _activate(module, up), offs)
        if module.has_post_expert_norm:
            y = module.post_expert_norm(y)
        y = y * weights[order].unsqueeze(-1)
        # Back into the order of tokens, then a sum over k: unlike index_add, the same bits every time.
        y = y[order.argsort()].unflatten(0, (tokens, top_k)).sum(1)
        return y.to(hidden_states.dtype)

    def _linear(self, module: Any, name: str, x: Tensor, offs: Tensor) -> Tensor:
        weight = getattr(module, name)
        # Under autocast a Linear would run in autocast's dtype; without it, in its weight's.
        device = weight.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else weight.dtype
        return scaled_grouped_mm(
            x.to(dtype),
            (weight if module.is_transposed else weight.mT).to(dtype),
            offs,
            bias=getattr(module, name + "_bias").to(dtype) if module.has_bias else None,
            recipe=self.recipe,
            implementation=self.implementation,
        )


def _group_ends(expert: Tensor, num_experts: int) -> Tensor:
    """End row of each expert's group, (E,) int32, in pairs sorted by expert."""
    # Not bincount, which reads its input on the host, nor searchsorted, which vmap cannot batch.
    size = torch.zeros(num_experts + 1, dtype=torch.int32, device=expert.device)
    bucket = expert.clamp(max=num_experts).to(torch.int64)
    size = size.scatter_add(0, bucket, torch.ones_like(bucket, dtype=torch.int32))
    return size[:num_experts].cumsum(0, dtype=torch.int32)


def _activate(module: Any, up: Tensor) -> Tensor:
    if not module.has_gate:
        return module.act_fn(up)
    if not module.is_concatenated and type(module)._apply_gate is _default_apply_gate:
        # The default splits into halves whatever the layout; families that interleave bring their own.
        return module.act_fn(up[..., ::2]) * up[..., 1::2]
    return module._apply_gate(up)


# --- the registry --------------------------------------------------------------------------------


def register() -> None:
    """Register every preset under its name and arm the check; importing this module has done so.

    May be called again: it then restores what is missing and changes nothing else.

    >>> register()
    >>> ALL_EXPERTS_FUNCTIONS["moefp8_mxfp8"].recipe == PRESETS["mxfp8"]
    True
    """
    for name, recipe in PRESETS.items():
        register_recipe(PREFIX + name, recipe)
    # The parts of a composite model are made by _from_config too, and a vision tower has no experts.
    # Only the call that names an implementation speaks for the whole model.
    _check_after(
        "_from_config", lambda model, *_, experts_implementation=None, **__: experts_implementation
    )
    _check_after("from_pretrained", lambda model, *_, **__: model.get_experts_implementation())
    _check_after("set_experts_implementation", lambda model, experts_implementation: experts_implementation)


def register_recipe(
    name: str, recipe: Recipe, *, implementation: str | Sequence[str] | None = None
) -> None:
    """Register a recipe of your own as an experts implementation.

    Args:
        name: what to pass as ``experts_implementation``.
        recipe: any :class:`moefp8.Recipe`.
        implementation: as in :func:`moefp8.scaled_grouped_mm`.

    Raises:
        ValueError: ``name`` already stands for something else.
        TypeError, ValueError: a recipe with a field out of range.

    >>> from moefp8 import MXFP8, Gemm
    >>> e5m2 = Gemm(dtype=torch.float8_e5m2)
    >>> register_recipe("mxfp8_e5m2_gradients", MXFP8._replace(dgrad=e5m2))
    """
    check_recipe(recipe)
    if implementation is not None and not isinstance(implementation, str):
        implementation = tuple(implementation)
    entry = Experts(recipe, implementation)
    present = ALL_EXPERTS_FUNCTIONS.get(name)
    if name == "eager" or present not in (None, entry):
        raise ValueError(
            f"name: {name!r} already is an experts implementation, {present or 'of the model families'}; "
            f"a name keeps its meaning, so take another"
        )
    ALL_EXPERTS_FUNCTIONS.register(name, entry)


def use(model: Any, recipe: str | Recipe) -> Any:
    """Run the experts of ``model`` under ``recipe``, or say why that is not possible.

    Args:
        model: a transformers model.
        recipe: a :class:`moefp8.Recipe`, or a name with or without the prefix ``moefp8_``.

    Returns:
        ``model``, whose weights are untouched.

    Raises:
        ValueError: an unknown name, or a model that does not ask the registry (see :func:`check`).

    >>> from transformers import AutoModelForCausalLM, Qwen3MoeConfig
    >>> tiny = Qwen3MoeConfig(vocab_size=8, hidden_size=32, num_hidden_layers=1, num_experts=2)
    >>> model = use(AutoModelForCausalLM.from_config(tiny), "mxfp8")
    >>> list(check(model))
    ['model.layers.0.mlp.experts']
    """
    if isinstance(recipe, Recipe):
        name = _name_of(recipe)
    else:
        name = recipe if recipe in ALL_EXPERTS_FUNCTIONS else PREFIX + recipe
        if not isinstance(ALL_EXPERTS_FUNCTIONS.get(name), Experts):
            known = ", ".join(map(repr, _ours()))
            raise ValueError(f"recipe: expected a Recipe or one of {known}, got {recipe!r}")
    model.set_experts_implementation(name)
    check(model)
    return model


def check(model: Any) -> dict[str, Recipe]:
    """The experts modules of ``model`` that run under a recipe of moefp8.

    Args:
        model: a transformers model, however it was made.

    Returns:
        Recipe of each such module, by its dotted path.

    Raises:
        ValueError: there is none. The message says whether the model does not ask the registry at
            all, and then points to :func:`moefp8.low_precision`, or asks it for something else.
    """
    asking, found = [], {}
    for path, module in model.named_modules():
        # What transformers' decorator puts on a module that goes through the registry.
        if hasattr(module, "is_transposed") and hasattr(module, "has_gate"):
            asking.append(path)
            entry = ALL_EXPERTS_FUNCTIONS.get(str(module.config._experts_implementation))
            if isinstance(entry, Experts):
                found[path] = entry.recipe
    if found:
        return found
    family = type(model).__name__
    if asking:
        name = model.config._experts_implementation
        raise ValueError(
            f"{family}: its {len(asking)} experts modules ({asking[0]}, ...) run experts_implementation="
            f"{name!r}, which is none of moefp8's: {', '.join(_ours())}"
        )
    weights = sorted({_pattern(path) for path, p in model.named_parameters() if p.ndim == 3})
    rules = "".join(f", ({weight!r}, MXFP8)" for weight in weights)[2:] or "..."
    raise ValueError(
        f"{family}: an experts implementation has no effect on this model family, because none of its "
        f"modules asks transformers' experts registry. moefp8.low_precision goes by parameter names and "
        f"needs no registry: low_precision(fn, [{rules}])"
    )


def _ours() -> list[str]:
    return [name for name, entry in ALL_EXPERTS_FUNCTIONS.items() if isinstance(entry, Experts)]


def _name_of(recipe: Recipe) -> str:
    """The name ``recipe`` is registered under; a recipe without one gets it from its contents."""
    entry = Experts(recipe)
    for name, present in ALL_EXPERTS_FUNCTIONS.items():
        if present == entry:
            return name
    name = f"{PREFIX}{zlib.crc32(repr(recipe).encode()):08x}"
    register_recipe(name, recipe)
    return name


def _pattern(path: str) -> str:
    """A parameter's path with numbers of layers replaced by ``*``."""
    return ".".join("*" if part.isdigit() else part for part in path.split("."))


def _check_after(method: str, requested: Callable[..., str | dict | None]) -> None:
    """Let a method of PreTrainedModel end with :func:`check` where a name of moefp8's was asked for.

    ``requested(model, *args, **kwargs)`` tells which name, or a dict of them, the call asked for.
    """
    raw = PreTrainedModel.__dict__[method]
    original = getattr(raw, "__func__", raw)
    if hasattr(original, "_moefp8"):
        return

    @functools.wraps(original)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        # from_pretrained may return (model, loading info); the setter returns nothing.
        model = result[0] if isinstance(result, tuple) else self if result is None else result
        names = requested(model, *args, **kwargs)
        if not set(_ours()).isdisjoint(names.values() if isinstance(names, dict) else [names]):
            check(model)
        return result

    checked._moefp8 = True  # type: ignore[attr-defined]
    setattr(PreTrainedModel, method, classmethod(checked) if isinstance(raw, classmethod) else checked)


register()
