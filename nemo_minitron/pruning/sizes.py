"""What sizes a target asks for: explicit ones and shares of the teacher's, resolved and checked all at once."""

from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from math import lcm

from nemo_minitron.arch.axes import LAYER_AXES, MODEL_AXES, Axis, PrunableAxis, size_divisor
from nemo_minitron.arch.layer import COUNT_KEYS, PARTS, LayerSpec
from nemo_minitron.arch.sizes import fraction_of
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.config.sizes import TargetConfig
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
    if kept is None:
        kept = chosen_layers(target, teacher, lambda keep: tuple(range(keep)), range(teacher.num_layers))
    gone = dropped_parts(target, teacher, kept, lambda part, layers: layers)
    layers = tuple(
        student_layer(target.for_layer(index), teacher.layers[index]).without(*gone.get(index, ())) for index in kept
    )
    channels = hidden_size(target, teacher)
    ratio = rescaling(teacher, channels) if target.rescale_norms else Fraction(1)
    return narrowed(teacher, channels, layers, norm_ratio=ratio)


def num_layers(target: TargetConfig, teacher: ModelSpec) -> int:
    """How many layers stay, leaving `drop_layers` aside."""
    if counts := kind_counts(target, teacher):
        return sum(counts.values())
    return _resolved(target, "num_layers", teacher.num_layers)


def kind_counts(target: TargetConfig, teacher: ModelSpec) -> dict[str, int]:
    """How many layers of each kind stay; {} if the target names no kind."""
    asked = {kind: count for key, kind in COUNT_KEYS.items() if (count := getattr(target, key)) is not None}
    return {**teacher.kinds, **asked} if asked else {}


def chosen_layers(
    target: TargetConfig, teacher: ModelSpec, best: Callable[[int], tuple[int, ...]], ranking: Sequence[int]
) -> tuple[int, ...]:
    """Layers that stay where none are named, ascending: over all layers, or so many of each kind.

    Args:
        target: What is wanted.
        teacher: The teacher.
        best: The layers that stay if so many of all do.
        ranking: All layers, those that are worth most first; for kinds.
    """
    counts = kind_counts(target, teacher)
    if not counts:
        return best(num_layers(target, teacher))
    kept: list[int] = []
    for kind, count in counts.items():
        kept += [index for index in ranking if teacher.layers[index].kind == kind][:count]
    return tuple(sorted(kept))


def hidden_size(target: TargetConfig, teacher: ModelSpec) -> int:
    """How many channels of the residual stream stay."""
    return _resolved(target, "hidden_size", teacher.hidden_size)


def student_layer(target: TargetConfig, layer: LayerSpec) -> LayerSpec:
    """Sizes of what stays of one layer of the teacher."""
    sizes: dict[str, int] = {}
    for row in LAYER_AXES:
        if not (size := layer.size(row)):
            continue
        outer = size_divisor(row)
        if outer is None:
            sizes[row.size] = _resolved(target, row.size, size)
            continue
        units = sizes[outer.size]
        most = units * (size // layer.size(outer))
        asked = getattr(target, row.size) is not None
        sizes[row.size] = _resolved(target, row.size, size, unit=units, most=most) if asked else most
    return layer.with_sizes(**sizes).routed_to(target.top_k)


def named_layers(target: TargetConfig, teacher: ModelSpec) -> tuple[int, ...] | None:
    """Layers that stay because the target names those that go; None when they are to be ranked."""
    if target.drop_layers is None:
        return None
    return tuple(index for index in range(teacher.num_layers) if index not in set(target.drop_layers))


def dropped_parts(
    target: TargetConfig, teacher: ModelSpec, kept: Sequence[int], ranked: Callable[[str, list[int]], Sequence[int]]
) -> dict[int, tuple[str, ...]]:
    """Parts that go out of layers that stay, by layer; every layer keeps one.

    Args:
        target: What is wanted.
        teacher: The teacher.
        kept: Layers that stay.
        ranked: Puts layers in order by what a part is worth, the least first: `ranked(part, layers)`.
    """
    gone: dict[int, tuple[str, ...]] = {}
    for part, wanted in _parts(target).items():
        if isinstance(wanted, int):
            able = [index for index in kept if len(teacher.layers[index].parts) == 2 and index not in gone]
            wanted = tuple(ranked(part, able)[:wanted])  # noqa: PLW2901
        gone |= {index: (*gone.get(index, ()), part) for index in wanted if index in kept}
    return {index: tuple(part for part in PARTS if part in parts) for index, parts in gone.items()}


def _parts(target: TargetConfig) -> dict[str, int | tuple[int, ...]]:
    """What is asked of each part of layers, by its name: named layers first, so that a number leaves them out."""
    asked = {"mixer": target.drop_mixers, "feed_forward": target.drop_feed_forwards}
    found = {part: wanted for part, wanted in asked.items() if wanted is not None}
    return dict(sorted(found.items(), key=lambda item: isinstance(item[1], int)))


def _part_problems(target: TargetConfig, teacher: ModelSpec) -> Iterator[str]:
    kept = set(named_layers(target, teacher) or range(teacher.num_layers))
    left = {index: len(layer.parts) for index, layer in enumerate(teacher.layers)}
    keys = {"mixer": "drop_mixers", "feed_forward": "drop_feed_forwards"}
    taken = 0
    for part, wanted in _parts(target).items():
        if isinstance(wanted, int):
            stay = num_layers(target, teacher) if target.drop_layers is None else len(kept)
            able = max(min(sum(left[index] == 2 for index in kept), stay) - taken, 0)
            taken += wanted
            if wanted > able:
                yield f"{keys[part]} = {wanted}, and {able} layers have both parts"
            continue
        if outside := sorted(index for index in set(wanted) if index not in kept):
            yield f"{keys[part]} = {outside}: not among the layers that stay"
        for index in sorted(set(wanted) & kept):
            if getattr(teacher.layers[index], part) is None:
                yield f"{keys[part]}: layer {index} has none"
            elif left[index] == 1:
                yield f"{keys[part]}: layer {index} has nothing else; name it in drop_layers"
            left[index] -= 1


def _resolved(target: TargetConfig, name: str, size: int, *, unit: int = 1, most: int | None = None) -> int:
    """Units that an axis of `size` keeps: a share becomes the nearest multiple of its divisor and of `unit`."""
    wanted = getattr(target, name)
    if wanted is None:
        return size
    if isinstance(wanted, int):
        return wanted
    return fraction_of(size, wanted, step=lcm(getattr(target.multiple_of, name), unit), maximum=most)


def _problems(target: TargetConfig, teacher: ModelSpec) -> Iterator[str]:
    for row in MODEL_AXES:
        yield from _size_problems(target, row.size, teacher.size(row))
    for row in LAYER_AXES:
        if getattr(target, row.size) is not None and not teacher.common_size(row):
            yield f"{row.size}: the teacher has no {row.units}"
    if target.drop_layers is not None:
        drops = list(_drop_problems(target, teacher, list(target.drop_layers)))
        yield from drops
    if target.drop_layers is None or not drops:
        yield from _part_problems(target, teacher)
    yield from _unnamed_problems(target, teacher)
    yield from _kind_problems(target, teacher)
    for sizes in dict.fromkeys(layer for index, layer in enumerate(teacher.layers) if index not in target.by_layer):
        yield from _layer_problems(target, sizes)
        yield from _routing_problems(target, sizes)
    for index in target.by_layer:
        yield from (f"by_layer.{index}: {problem}" for problem in _single_layer_problems(target, teacher, index))
    if target.top_k is not None and not teacher.has_experts:
        yield f"top_k = {target.top_k}: the teacher has no experts"


def _kind_problems(target: TargetConfig, teacher: ModelSpec) -> Iterator[str]:
    """What is wrong with numbers of layers of single kinds."""
    asked = {key: count for key in COUNT_KEYS if (count := getattr(target, key)) is not None}
    for key, count in asked.items():
        have = teacher.kinds.get(COUNT_KEYS[key], 0)
        if count > have:
            yield f"{key} = {count}, the teacher has {have} such layers"
    if asked and (other := [key for key in ("num_layers", "drop_layers") if getattr(target, key) is not None]):
        yield f"{next(iter(asked))} and {other[0]}: give one of them"
    if asked and target.depth_contiguous:
        yield f"{next(iter(asked))} with depth_contiguous: layers of one kind do not follow one another"


def _unnamed_problems(target: TargetConfig, teacher: ModelSpec) -> Iterator[str]:
    """Layers cannot be named while it is left to scores which of them stay."""
    if target.drop_layers is not None or num_layers(target, teacher) >= teacher.num_layers:
        return
    named = {key: getattr(target, key) for key in ("by_layer", "drop_mixers", "drop_feed_forwards")}
    by = next((key for key in COUNT_KEYS if getattr(target, key) is not None), "num_layers")
    for key in (key for key, value in named.items() if value and not isinstance(value, int)):
        yield f"{key} names layers, but {by} leaves it to scores which stay; name those that go in drop_layers"


def _single_layer_problems(target: TargetConfig, teacher: ModelSpec, index: int) -> Iterator[str]:
    if index >= teacher.num_layers:
        yield f"the teacher's layers are 0-{teacher.num_layers - 1}"
    elif index in (target.drop_layers or ()):
        yield "drop_layers drops it"
    else:
        sizes = teacher.layers[index]
        for name in (name for name, size in target.by_layer[index] if size is not None and name not in sizes.sizes):
            yield f"{name}: this layer of the teacher has none"
        yield from _layer_problems(target.for_layer(index), sizes)
        yield from _routing_problems(target.for_layer(index), sizes)


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


def _layer_problems(target: TargetConfig, layer: LayerSpec) -> Iterator[str]:
    found: dict[Axis, list[str]] = {}
    for row in LAYER_AXES:
        outer = size_divisor(row)
        if not layer.size(row):
            problems = []
        elif outer is None:
            problems = list(_size_problems(target, row.size, layer.size(row)))
        elif getattr(target, row.size) is None or found[outer.axis]:
            problems = []
        else:
            problems = list(_nesting_problems(target, layer, row, outer))
        found[row.axis] = problems
        yield from problems


def _routing_problems(target: TargetConfig, layer: LayerSpec) -> Iterator[str]:
    """What is wrong with the number of experts that a token is routed to."""
    if not layer.has_experts:
        return
    before = layer.moe.top_k
    top_k, left = target.top_k or before, student_layer(target, layer).moe.num_experts
    if top_k > before:
        yield f"top_k = {top_k}, the teacher routes a token to {before} experts"
    elif top_k > left:
        asked = "top_k" if target.top_k else "the teacher's top_k"
        yield f"num_experts = {left} is below {asked} = {top_k} (give a smaller target.top_k, or keep more experts)"


def _nesting_problems(target: TargetConfig, layer: LayerSpec, row: PrunableAxis, outer: PrunableAxis) -> Iterator[str]:
    """What is wrong with a number of units that lie within others."""
    wanted, student = getattr(target, row.size), student_layer(target, layer)
    units, size = student.size(outer), student.size(row)
    most = units * (layer.size(row) // layer.size(outer))
    shown, there = f"{row.size} = {wanted}", f"{units} {outer.units} have {most} {row.units}"
    if not isinstance(wanted, int):
        if size > most:
            yield f"{shown} is {size} as a multiple of {size}, but {there}"
        return
    problems = list(_size_problems(target, row.size, layer.size(row)))
    yield from problems
    if size % units:
        yield f"{shown} is not a multiple of {outer.size} = {units}"
    elif size > most and not problems:
        yield f"{shown}, but {there}"
