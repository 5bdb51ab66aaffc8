"""An architecture from the settings of a configuration, by whatever keys it has them, and what all writers share.

`nemo_config` (NeMo 1) and `megatron_config` (NeMo 2, Megatron-Bridge, Megatron-LM) say which key holds which setting;
here settings become a spec. Plain data.
"""

from collections.abc import Callable, Mapping
from typing import Any

from nemo_minitron.arch.expert_fields import are_alike
from nemo_minitron.arch.layer import FeedForward, layers_of, transformer_layer
from nemo_minitron.arch.spec import Activation, AnyScaling, LinearScaling, ModelSpec, Norm
from nemo_minitron.errors import SpecError

SIZES = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "head_dim"),
    *("max_position_embeddings", "other_positions"),
)
FLAGS = ("zero_centred_norm", "scaled_embeddings", "linear_bias", "qkv_bias", "qk_norm", "tied_embeddings")
NUMBERS = ("norm_eps", "rotary_base", "rotary_percent")
OTHERS = ("window", "vocab_divisor", "linear_factor", "position_embedding", "experts", "rotary_interleaved")
SETTINGS = (*SIZES, *FLAGS, *NUMBERS, *OTHERS)
"""What settings are called here: fields of `ModelSpec` and of layers, and `other_positions` (a second key of
`max_position_embeddings`), `zero_centred_norm`, `window` (positions to the left of a query and to its right),
`vocab_divisor` (what rows are padded to),
`linear_factor` (of `LinearScaling`), `position_embedding`, `experts`, `rotary_interleaved`."""
_LARGEST_VOCAB_DIVISOR = 128


def settings_in(config: Mapping[str, Any], keys: Mapping[str, str]) -> dict[str, Any]:
    """The settings that a configuration has, under our names; `keys` are its keys by our names."""
    return {name: config[key] for name, key in keys.items() if key in config}


def spec_from_settings(
    found: Mapping[str, Any],
    keys: Mapping[str, str],
    *,
    where: str,
    vocab_size: int,
    activation: Activation,
    norm: Norm,
    rope_scaling: AnyScaling | None = None,
    feed_forward: Callable[[int], FeedForward] | None = None,
) -> ModelSpec:
    """The architecture that settings describe. What is absent has the value that NeMo and Megatron assume.

    A null flag is false; a null size or factor is as good as absent.

    Args:
        found: Settings by our names (`settings_in`).
        keys: Keys of the configuration by our names, for messages.
        where: The configuration, for messages.
        vocab_size: Tokens.
        activation: Of MLPs.
        norm: Kind of norms.
        rope_scaling: Other than the linear one that `linear_factor` stands for.
        feed_forward: That of a layer by its number, in a model with experts.

    Raises:
        SpecError: A setting is missing or not supported; names its key.
    """
    check_settings(found, keys, where=where)
    for name in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads"):
        if found.get(name) is None:
            raise SpecError(f"{where}: key {keys[name]!r} is missing")
    heads, window = found["num_attention_heads"], found.get("window")
    groups, head_dim = found.get("num_query_groups"), found.get("head_dim")
    layer = transformer_layer(
        num_attention_heads=heads,
        num_query_groups=heads if groups is None else groups,
        ffn_hidden_size=found["ffn_hidden_size"],
        local=window is not None,
    )
    return ModelSpec(
        vocab_size=vocab_size,
        hidden_size=found["hidden_size"],
        head_dim=found["hidden_size"] // heads if head_dim is None else head_dim,
        layers=layers_of(layer, found["num_layers"], feed_forward),
        max_position_embeddings=_positions(found, keys, where),
        activation=activation,
        norm=norm,
        norm_eps=float(found.get("norm_eps", 1e-5)),
        rotary_base=float(found.get("rotary_base", 10000.0)),
        rotary_percent=float(found.get("rotary_percent", 1.0)),
        rope_scaling=one_scaling(rope_scaling, found, keys, where=where),
        tied_embeddings=bool(found.get("tied_embeddings", True)),
        qkv_bias=bool(found.get("qkv_bias", False)),
        qk_norm=bool(found.get("qk_norm", False)),
        linear_bias=bool(found.get("linear_bias", True)),
        scaled_embeddings=bool(found.get("scaled_embeddings", False)),
        sliding_window=None if window is None else window[0] + 1,
    )


def check_settings(found: Mapping[str, Any], keys: Mapping[str, str], *, where: str) -> None:
    """Refuse settings of the wrong kind, and those with which something would be computed that nothing here computes.

    Raises:
        SpecError: Names the key.
    """

    def refused(name: str, rule: str, *, words: str = "") -> SpecError:
        return SpecError(f"{where}: {keys[name]} = {str(found.get(name))[:40]}{words}", rule=rule)

    for name in FLAGS:
        if found.get(name) not in (None, True, False):
            raise refused(name, "true or false")
    for name in SIZES:
        if found.get(name) is not None and (type(found[name]) is not int or found[name] < 1):
            raise refused(name, "a positive integer")
    for name in NUMBERS:
        if not _is_positive(found.get(name, 1.0)):
            raise refused(name, "a positive number")
    for name in ("experts", "rotary_interleaved"):
        if found.get(name):
            raise refused(name, "absent", words=" is not supported")
    # Both assume learned positions where the key is absent.
    if (kind := found.get("position_embedding", "learned_absolute")) not in ("rope", None):
        raise SpecError(f"{where}: {keys['position_embedding']} = {str(kind)[:40]!r} is not supported", rule="'rope'")
    check_window(found.get("window"), keys, where=where)


def check_window(window: Any, keys: Mapping[str, str], *, where: str) -> None:
    """Refuse a window that does not end with the query.

    Raises:
        SpecError: It does not, or is none.
    """
    is_pair = isinstance(window, list | tuple) and len(window) == 2 and all(type(each) is int for each in window)
    if window is not None and not (is_pair and window[0] >= 0 and window[1] == 0):
        raise SpecError(f"{where}: {keys['window']} = {window} is not supported", rule="[positions, 0]")


def one_scaling(
    other: AnyScaling | None, found: Mapping[str, Any], keys: Mapping[str, str], *, where: str
) -> AnyScaling | None:
    """The scaling of rotary positions, of which there is one at most.

    Raises:
        SpecError: There are two, or a factor is no positive number.
    """
    factor = found.get("linear_factor")
    if factor is None:
        return other
    if type(factor) not in (int, float) or factor <= 0 or other is not None:
        raise SpecError(
            f"{where}: {keys['linear_factor']} = {str(factor)[:40]}"
            + (" and Llama 3's scaling at once" if other else ""),
            rule="a positive number, and one scaling of rotary positions",
        )
    return LinearScaling(factor=float(factor))


def vocabulary(found: Any, key: str, rows: int | None, *, where: str) -> int:
    """Tokens of the model: rows of the embedding beyond them are padding, and there are never fewer.

    Args:
        found: What the configuration says; None where it is silent.
        key: Its key, for messages.
        rows: Rows of the stored embedding; None where there are no weights.
        where: For messages.

    Raises:
        SpecError: Nobody says it, or it does not fit.
    """
    if found is None:
        if rows is None:
            raise SpecError(f"{where}: {key} is missing, and no weights say the vocabulary")
        return rows
    if rows is None:
        if type(found) is not int or found < 1:
            raise SpecError(f"{where}: {key} = {str(found)[:40]}", rule="a positive integer")
    elif type(found) is not int or not 0 < found <= rows:
        raise SpecError(
            f"{where}: {key} = {str(found)[:40]}, but the word embedding has {rows} rows",
            rule="a row for every token, and padding behind them",
        )
    return int(found)


def shared_size(spec: ModelSpec, name: str) -> int | None:
    """A size that all layers have; None makes a reader that knows only uniform models stop, not guess."""
    values = {layer.sizes.get(name) for layer in spec.layers}
    return values.pop() if len(values) == 1 else None


def window_of(spec: ModelSpec) -> list[int] | None:
    """Positions that queries see to their left and to their right; None where every position is seen."""
    return [spec.sliding_window - 1, 0] if spec.sliding_window and spec.layers[0].local else None


def has_plain_layers(spec: ModelSpec, *, experts: bool = False) -> bool:
    """Whether keys for one kind of layer, which NeMo and Megatron have, describe all layers.

    Args:
        spec: The model.
        experts: Whether there are keys for experts too.
    """
    mixed = len({layer.local for layer in spec.layers}) > 1
    traits = spec.post_norms or spec.full_width_qk_norm or spec.query_scalar or spec.local_rotary_base
    plain = not (traits or mixed) and spec.rotary_percent > 0
    if spec.has_experts:
        one_mixer = len({layer.mixer for layer in spec.layers}) == 1 and all(layer.mixer for layer in spec.layers)
        return experts and plain and one_mixer and are_alike(spec)
    return spec.is_uniform and plain and spec.layer.is_transformer


def vocab_divisor(vocab_size: int) -> int:
    """Largest power of two up to 128 that divides the vocabulary, so that one rank pads nothing."""
    return min(vocab_size & -vocab_size, _LARGEST_VOCAB_DIVISOR)


def _positions(found: Mapping[str, Any], keys: Mapping[str, str], where: str) -> Any:
    for name in ("max_position_embeddings", "other_positions"):
        if found.get(name) is not None:
            return found[name]
    named = [keys[name] for name in ("max_position_embeddings", "other_positions") if name in keys]
    raise SpecError(f"{where}: {named[0]} is missing", rule=f"{', or '.join(named)} in its place" if named[1:] else "")


def _is_positive(value: Any) -> bool:
    try:
        return float(value) > 0
    except (TypeError, ValueError):
        return False
