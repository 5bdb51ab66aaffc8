"""What sizes a target asks for: explicit ones and shares of the teacher's, resolved and checked all at once."""

from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from math import lcm

from nemo_minitron.arch.spec import LayerSpec, ModelSpec
from nemo_minitron.config.run import TargetConfig
from nemo_minitron.errors import PlanError
from nemo_minitron.pruning.plan import narrowed, rescaling


def student_spec(target: TargetConfig, teacher: ModelSpec) -> ModelSpec:
    """The architecture that a target asks for; needs no scores.

    None keeps the teacher's size. KV groups without heads given keep their heads each, so the number of heads follows.
    For layers of different sizes, which of them stay is known only with scores: the first ones are taken.

    Raises:
        PlanError: With every size that cannot be.
    """
    if target.budgets:
        named = ", ".join(f"target.{name}" for name in target.budgets)
        raise PlanError(
            f"{named}: a budget leaves sizes open",
            rule="a plan needs sizes; stage search of a recipe finds those that keep to a budget",
            remedy="give sizes under target, or `nemo-minitron search RECIPE`",
        )
    problems = list(dict.fromkeys(_problems(target, teacher)))
    if problems:
        raise PlanError(
            "target: " + "; ".join(problems),
            rule="a student is cut out of its teacher: no size grows, every KV group keeps as many heads as the others",
            remedy="change the sizes under target",
        )
    kept = named_layers(target, teacher)
    sizes = [teacher.layers[index] for index in kept or range(num_layers(target, teacher))]
    layers = tuple(student_layer(target, layer) for layer in sizes)
    channels = hidden_size(target, teacher)
    ratio = rescaling(teacher, channels) if target.rescale_norms else Fraction(1)
    return narrowed(teacher, channels, layers, norm_ratio=ratio)


def num_layers(target: TargetConfig, teacher: ModelSpec) -> int:
    """How many layers stay, leaving `drop_layers` aside."""
    return _resolved(target, "num_layers", teacher.num_layers)


def hidden_size(target: TargetConfig, teacher: ModelSpec) -> int:
    """How many channels of the residual stream stay."""
    return _resolved(target, "hidden_size", teacher.hidden_size)


def student_layer(target: TargetConfig, layer: LayerSpec) -> LayerSpec:
    """Sizes of what stays of one layer of the teacher."""
    groups = _resolved(target, "num_query_groups", layer.num_query_groups)
    heads = groups * (layer.num_attention_heads // layer.num_query_groups)
    if target.num_attention_heads is not None:
        heads = _resolved(target, "num_attention_heads", layer.num_attention_heads, unit=groups, most=heads)
    return replace(
        layer,
        num_attention_heads=heads,
        num_query_groups=groups,
        ffn_hidden_size=_resolved(target, "ffn_hidden_size", layer.ffn_hidden_size),
    )


def named_layers(target: TargetConfig, teacher: ModelSpec) -> tuple[int, ...] | None:
    """Layers that stay because the target names those that go; None when they are to be ranked."""
    if target.drop_layers is None:
        return None
    return tuple(index for index in range(teacher.num_layers) if index not in set(target.drop_layers))


def _resolved(target: TargetConfig, name: str, size: int, *, unit: int = 1, most: int | None = None) -> int:
    """Units that an axis of `size` keeps: a share becomes the nearest multiple of its divisor and of `unit`."""
    wanted = getattr(target, name)
    if wanted is None:
        return size
    if isinstance(wanted, int):
        return wanted
    step = lcm(getattr(target.multiple_of, name), unit)
    # Through its decimal digits: 0.3 is three tenths, not the nearest binary fraction.
    steps = int(Fraction(str(wanted)) * size / step + Fraction(1, 2))
    return max(1, min(steps, (most or size) // step)) * step


def _problems(target: TargetConfig, teacher: ModelSpec) -> Iterator[str]:
    yield from _size_problems(target, "num_layers", teacher.num_layers)
    yield from _size_problems(target, "hidden_size", teacher.hidden_size)
    if target.drop_layers is not None:
        yield from _drop_problems(target, teacher, list(target.drop_layers))
    for sizes in dict.fromkeys(teacher.layers):
        yield from _layer_problems(target, sizes)


def _size_problems(target: TargetConfig, name: str, size: int) -> Iterator[str]:
    wanted, step = getattr(target, name), getattr(target.multiple_of, name)
    if wanted is None:
        return
    found = _resolved(target, name, size)
    shown = f"{name} = {wanted}"
    if found > size:
        because = "" if found == wanted else f" is {found} as a multiple of {step}"
        yield f"{shown}{because}, the teacher has {size}"
    elif found % step:
        yield f"{shown} is not a multiple of multiple_of.{name} = {step}"


def _drop_problems(target: TargetConfig, teacher: ModelSpec, dropped: list[int]) -> Iterator[str]:
    if len(set(dropped)) < len(dropped):
        yield f"drop_layers names a layer twice: {dropped}"
    if outside := [index for index in dropped if not 0 <= index < teacher.num_layers]:
        yield f"drop_layers = {outside}: the teacher's layers are 0-{teacher.num_layers - 1}"
    left = teacher.num_layers - len(set(dropped))
    if left < 1:
        yield "drop_layers leaves zero layers; at least 1 must stay"
    if target.num_layers is not None and num_layers(target, teacher) != left:
        yield f"num_layers = {target.num_layers}, but drop_layers leaves {left}"


def _layer_problems(target: TargetConfig, sizes: LayerSpec) -> Iterator[str]:
    yield from _size_problems(target, "ffn_hidden_size", sizes.ffn_hidden_size)
    group_problems = list(_size_problems(target, "num_query_groups", sizes.num_query_groups))
    yield from group_problems
    if target.num_attention_heads is not None and not group_problems:
        yield from _head_problems(target, sizes)


def _head_problems(target: TargetConfig, sizes: LayerSpec) -> Iterator[str]:
    wanted = target.num_attention_heads
    layer = student_layer(target, sizes)
    groups, heads = layer.num_query_groups, layer.num_attention_heads
    most = groups * (sizes.num_attention_heads // sizes.num_query_groups)
    shown = f"num_attention_heads = {wanted}"
    if not isinstance(wanted, int):
        if heads > most:
            yield f"{shown} is {heads} as a multiple of {heads}, but {groups} KV groups have {most} heads"
        return
    problems = list(_size_problems(target, "num_attention_heads", sizes.num_attention_heads))
    yield from problems
    if heads % groups:
        yield f"{shown} is not a multiple of num_query_groups = {groups}"
    elif heads > most and not problems:
        yield f"{shown}, but {groups} KV groups have {most} heads"
