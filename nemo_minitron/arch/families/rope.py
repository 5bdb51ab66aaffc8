"""Rotary settings of `config.json`: `rope_parameters` of transformers 5, `rope_scaling` and the keys of before it."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

from nemo_minitron.arch.spec import AnyScaling, LinearScaling, ModelSpec, RopeScaling, YarnScaling
from nemo_minitron.errors import SpecError

BASE = 10000.0
"""What transformers assumes where no base is named."""
_YARN = ("factor", "beta_fast", "beta_slow", "attention_factor")
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor")


class Rope(NamedTuple):
    """One set of rotary parameters."""

    base: float
    percent: float
    scaling: AnyScaling | None


def read_rope(config: Mapping[str, Any], *, percent: float, base: float = BASE) -> Rope:
    """The one set of rotary parameters of a model.

    `rope_parameters` and `rope_scaling` may both be there, and `rope_theta` and `partial_rotary_factor` may stand in
    them or beside them. transformers has taken one or the other in turns, so they have to agree.

    Raises:
        SpecError: They do not, a value is missing or of the wrong kind, or the scaling is not supported.
    """
    found = {key: config[key] for key in ("rope_parameters", "rope_scaling") if config.get(key)}
    ropes = {key: parse_rope(value, config, where=key, percent=percent, base=base) for key, value in found.items()}
    if not ropes:
        return parse_rope({}, config, where="rope_parameters", percent=percent, base=base)
    if len(set(ropes.values())) > 1:
        (one, first), (other, second) = ropes.items()
        raise SpecError(
            f"config.json: {one} says {_words(first)}, and {other} says {_words(second)}",
            rule=f"they agree: transformers 5 takes {other} complete, transformers 4 knows no rope_parameters",
            remedy="keep the one that is meant",
        )
    return next(iter(ropes.values()))


def parse_rope(
    rope: Any,
    config: Mapping[str, Any],
    *,
    where: str,
    percent: float,
    base_key: str = "rope_theta",
    base: float = BASE,
) -> Rope:
    """One set of rotary parameters.

    Args:
        rope: What stands under `where`.
        config: The data around it.
        where: For messages.
        percent: Fraction of a head's channels that turn where nothing says so.
        base_key: Where the base stands if not inside.
        base: What is assumed where it does not stand there either.

    Raises:
        SpecError: See `read_rope`.
    """
    if not isinstance(rope, Mapping) or any(isinstance(value, Mapping) for value in rope.values()):
        raise SpecError(f"config.json: {where} = {str(rope)[:60]!r} is not supported", rule="one set of parameters")
    kind = _agreed(rope, "rope_type", rope, "type", where=where, default="default")
    theta = _number(_agreed(rope, "rope_theta", config, base_key, where=where, default=base), "rope_theta")
    key = "partial_rotary_factor"
    if key in rope and rope[key] is None:
        raise SpecError(
            f"config.json: {where}: {key} = null",
            rule="a fraction of a head's channels; classes of transformers differ in what they make of null here",
            remedy=f"give a number, or leave {key} out",
        )
    share = _agreed(rope, key, config, key, where=where, default=percent)
    if share is None and percent == 1:  # null is nothing said; a class with another default of its own takes it for 1
        share = percent
    return Rope(theta, _number(share, key), _scaling(kind, rope, config, where))


def scaling_data(spec: ModelSpec) -> dict[str, Any] | None:
    """Scaling of a model as the contents of `rope_scaling`, without the base."""
    match spec.rope_scaling:
        case None:
            return None
        case LinearScaling(factor=factor):
            return {"rope_type": "linear", "factor": factor}
        case RopeScaling() as scaling:
            return {"rope_type": "llama3", **asdict(scaling)}
        case YarnScaling() as scaling:
            return {"rope_type": "yarn", **asdict(scaling)}


def _scaling(kind: Any, rope: Mapping[str, Any], config: Mapping[str, Any], where: str) -> AnyScaling | None:
    if kind == "default":
        return None
    if kind not in ("linear", "llama3", "yarn"):
        remedy = "with sequences up to max_position_embeddings it is 'default'" if kind == "dynamic" else ""
        raise SpecError(
            f"config.json: {where}: rope_type = {kind!r} is not supported",
            rule="default, linear, llama3 or yarn",
            remedy=remedy,
        )
    needed = _LLAMA3 if kind == "llama3" else ("factor",)
    if missing := [key for key in needed if key not in rope]:
        raise SpecError(f"config.json: {where}: {missing[0]} is missing", rule=f"rope_type {kind!r} has it")
    values = {
        key: _number(rope[key], key) for key in (_YARN if kind == "yarn" else needed) if rope.get(key) is not None
    }
    if kind == "linear":
        return LinearScaling(factor=values["factor"])
    key = "original_max_position_embeddings"
    original = _agreed(rope, key, config, key, where=where, default=config.get("max_position_embeddings"))
    if type(original) is not int:
        raise SpecError(f"config.json: {where}: {key} = {original!r}", rule="a whole number")
    if kind == "llama3":
        return RopeScaling(**values, original_max_position_embeddings=original)
    if strange := [key for key in ("mscale", "mscale_all_dim") if rope.get(key)] or [
        key for key in ("truncate",) if rope.get(key, True) is not True
    ]:
        raise SpecError(f"config.json: {where}: {strange[0]} = {rope[strange[0]]!r} is not supported", rule="absent")
    return YarnScaling(**values, original_max_position_embeddings=original)


def _agreed(
    inner: Mapping[str, Any], key: str, outer: Mapping[str, Any], other: str, *, where: str, default: Any
) -> Any:
    """A value that may stand in two places."""
    values = [data[name] for data, name in ((inner, key), (outer, other)) if name in data]
    if len(values) == 2 and values[0] != values[1]:
        raise SpecError(
            f"config.json: {where}.{key} = {values[0]!r}, but {other} = {values[1]!r}",
            rule="transformers 5 takes the first, transformers 4 the second",
            remedy="keep the one that is meant",
        )
    return values[0] if values else default


def _number(value: Any, key: str) -> float:
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise SpecError(f"config.json: {key} = {str(value)[:40]!r}", rule="a positive number")
    return float(value)


def _words(rope: Rope) -> str:
    scaling = "no scaling" if rope.scaling is None else str(rope.scaling)
    return f"rope_theta = {rope.base:g}, partial_rotary_factor = {rope.percent:g}, {scaling}"
