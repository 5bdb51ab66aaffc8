"""Hybrids in the words of Megatron-Core's MambaModel, NeMo 2 and Megatron-LM. Plain data.

Their layers have one part each, which a letter of `hybrid_override_pattern` names: Mamba, attention, an MLP or experts
(`arch.expert_fields`). Their mixer is called as in `arch.layer.Mamba`; what is not a field of theirs (a convolution
over 4 positions with a bias, steps without a limit, an epsilon of 1e-5 in the gated norm) is built into Megatron's.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nemo_minitron.arch.expert_fields import experts_in
from nemo_minitron.arch.layer import Attention, LayerSpec, Mamba, Mlp, Moe
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.errors import SpecError

PATTERN = "hybrid_override_pattern"
LETTERS: Mapping[str, type[Mamba | Attention | Mlp | Moe]] = {"M": Mamba, "*": Attention, "-": Mlp, "E": Moe}
_RATIOS = ("hybrid_attention_ratio", "hybrid_mlp_ratio")
_SIZES = ("mamba_head_dim", "mamba_state_dim", "mamba_num_groups")
_HEADS = "mamba_num_heads"
_EXPAND = 2
"""Without a number of heads, all of them have so many times the channels of the residual stream."""
_NORM_EPS = 1e-5


def is_hybrid(fields: Mapping[str, Any]) -> bool:
    """Whether a configuration is that of a hybrid: fields, or arguments of Megatron-LM."""
    return any(fields.get(name) for name in (PATTERN, "is_hybrid_model", *_RATIOS))


def rope_of_hybrid(found: Mapping[str, Any]) -> dict[str, Any]:
    """Settings (`arch.settings`) of a model whose attention may know no positions, without that.

    See `hybrid_spec`, which puts it back.
    """
    return {**found, "position_embedding": "rope"} if found.get("position_embedding") == "none" else dict(found)


def hybrid_spec(spec: ModelSpec, fields: Mapping[str, Any], *, without_positions: bool, where: str) -> ModelSpec:
    """The hybrid that a configuration describes.

    Args:
        spec: What it describes otherwise: layers of attention and an MLP.
        fields: Fields, or arguments of Megatron-LM.
        without_positions: Whether its attention knows no positions.
        where: For messages.

    Raises:
        SpecError: Layers are not named one by one, or of a kind that is not supported; a size or experts are missing;
            or a norm has another epsilon than that of Megatron's mixer.
    """
    pattern = fields.get(PATTERN)
    if not pattern:
        raise SpecError(
            f"{where}: a hybrid without {PATTERN}",
            rule="a letter for each layer; ratios of kinds leave it to Megatron's version which layer is which",
            remedy=f"add {PATTERN}, which the training's log says",
        )
    if not isinstance(pattern, str) or set(pattern) - set(LETTERS):
        raise SpecError(
            f"{where}: {PATTERN} = {str(pattern)[:60]!r} is not supported",
            rule=f"letters {', '.join(LETTERS)}: Mamba, attention, an MLP, experts",
        )
    if len(pattern) != spec.num_layers:
        raise SpecError(
            f"{where}: {PATTERN} names {len(pattern)} layers, num_layers = {spec.num_layers}",
            rule="a letter for each layer",
        )
    both = spec.layers[0]
    mamba = _mamba(spec, fields, where) if "M" in pattern else None
    experts = _experts(fields, where) if "E" in pattern else None
    parts = {
        "M": LayerSpec(mixer=mamba, feed_forward=None),
        "*": replace(both, feed_forward=None),
        "-": replace(both, mixer=None),
        "E": LayerSpec(mixer=None, feed_forward=experts),
    }
    percent = 0.0 if without_positions else spec.rotary_percent
    return replace(spec, layers=tuple(parts[letter] for letter in pattern), rotary_percent=percent)


def _experts(fields: Mapping[str, Any], where: str) -> Moe:
    experts = experts_in({name: value for name, value in fields.items() if value is not None}, where=where)
    if experts is None:
        raise SpecError(
            f"{where}: {PATTERN} names layers of experts, and there are none", rule="their number and sizes"
        )
    return experts


def _mamba(spec: ModelSpec, fields: Mapping[str, Any], where: str) -> Mamba:
    sizes: dict[str, Any] = {name: fields.get(name) for name in _SIZES}
    heads = fields.get(_HEADS)
    if heads is None and type(sizes["mamba_head_dim"]) is int:
        heads = _EXPAND * spec.hidden_size // max(sizes["mamba_head_dim"], 1)
    sizes[_HEADS] = heads
    if wrong := [name for name, value in sizes.items() if type(value) is not int or value < 1]:
        raise SpecError(f"{where}: {wrong[0]} = {str(sizes[wrong[0]])[:40]}", rule="a whole number from 1")
    if spec.norm_eps != _NORM_EPS:
        raise SpecError(
            f"{where}: the norms' epsilon is {spec.norm_eps}, and that of Megatron's mixer {_NORM_EPS}",
            rule="one epsilon for all norms of a model",
        )
    return Mamba(**sizes)
