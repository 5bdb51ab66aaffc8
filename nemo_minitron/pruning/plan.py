"""A pruning plan: which layers, channels, neurons and heads stay. Data to print, diff, review and save."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Self

from nemo_minitron.arch.axes import LAYER_AXES, MODEL_AXES, Axis, PrunableAxis, outer_axis, row_of
from nemo_minitron.arch.layer import PARTS, LayerSpec, Mamba
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.checkpoints.files import staged_file
from nemo_minitron.checkpoints.open import open_checkpoint
from nemo_minitron.checkpoints.source import PLAN_FILE
from nemo_minitron.errors import MinitronError, PlanError
from nemo_minitron.pruning import mixes
from nemo_minitron.pruning.mixes import Mixes
from nemo_minitron.pruning.ranges import from_ranges, to_ranges
from nemo_minitron.pruning.table import size_table
from nemo_minitron.pruning.validate import index_problem, layer_problems

FORMAT = "nemo_minitron.plan"
VERSIONS = (1, 2, 3)
"""2 adds `merged_heads`, `merged_groups` and `norm_scale`; 3 `without` and `top_k`, and `norm_scale` in layers. A plan
without them is still written as 1, and its digest stays what it was."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerPlan:
    """What stays of one layer. Indices are the teacher's, ascending."""

    source: int
    """Which layer of the teacher it is."""
    kept: Mapping[Axis, tuple[int, ...]]
    """Indices by axis, for every axis of `arch.axes.LAYER_AXES` that the layer has. Of units that lie within others,
    heads within KV groups and neurons within experts, the indices count over the layer, and each of the others keeps
    equally many."""
    mixes: Mapping[Axis, Mixes] = field(default_factory=dict)
    """By axis, units whose weights become sums over the teacher's units (head-residual merging): query weights of query
    heads; key and value weights of KV groups, only where every head has a key and value of its own."""
    without: tuple[str, ...] = ()
    """Parts of the layer that go, by their names in `arch.layer.PARTS`; the layer passes on what it would be given."""
    norm_scale: tuple[int, int] | None = None
    """As `PruningPlan.norm_scale`, for the channels of a Mamba group."""
    top_k: int | None = None
    """Experts that a token is routed to; None: as many as in the teacher."""

    @classmethod
    def keep_all(cls, source: int, layer: LayerSpec) -> Self:
        """All of a layer."""
        return cls(source=source, kept={row.axis: tuple(range(layer.units(row))) for row in axes_of(layer)})

    def cut(self, teacher: LayerSpec) -> LayerSpec:
        """Sizes of what stays of the teacher's layer, and to how many experts it routes."""
        left = teacher.without(*self.without)
        return left.with_sizes(**{row.size: self._size(row) for row in axes_of(left)}).routed_to(self.top_k)

    def _size(self, row: PrunableAxis) -> int:
        outer = outer_axis(row) if row.each else None
        return len(self.kept[row.axis]) // (1 if outer is None else len(self.kept[outer.axis]))


def axes_of(layer: LayerSpec) -> tuple[PrunableAxis, ...]:
    """The prunable axes that a layer has, in the order of a plan."""
    return tuple(row for row in LAYER_AXES if layer.size(row))


@dataclass(frozen=True, kw_only=True, slots=True)
class PruningPlan:
    """What stays of a model.

    Raises:
        PlanError: Indices are not ascending, out of range or none at all, a kept head has no kept group, or groups keep
            unequal numbers of heads. Every problem is listed.
    """

    spec: ModelSpec
    """The teacher."""
    hidden: tuple[int, ...]
    layers: tuple[LayerPlan, ...]
    rescale_norms: bool = True
    """Multiply the scales of norms by `sqrt(hidden before / hidden after)`, and their epsilon by that ratio. A norm
    divides by the mean square over all channels, so leaving channels out would shrink what it passes on, by up to that
    factor, even when they carry nothing. With it, cutting channels changes no logit if they are zero (RMSNorm), or are
    the mean of all channels and have no bias in the norms (LayerNorm, which subtracts that mean)."""
    norm_scale: tuple[int, int] | None = None
    """Channels before and after, as far as norms were rescaled for them: set where a plan that rescales and one that
    does not were composed. None: all channels or none, as `rescale_norms` says."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Where the decision comes from (JSON data). Not part of the digest."""

    def __post_init__(self) -> None:
        if problems := list(self._problems()):
            raise PlanError("pruning plan: " + "; ".join(problems), rule="every axis keeps some units of the teacher")

    def _problems(self) -> Iterator[str]:
        if not self.layers:
            yield "zero layers; at least 1 must stay"
        elif problem := index_problem(self.kept(row_of(Axis.LAYER)), self.spec.num_layers):
            yield f"layers: {problem}"
            return
        for row in MODEL_AXES:
            if row.axis is not Axis.LAYER and (problem := index_problem(self.kept(row), self.spec.size(row))):
                yield f"{row.plan}: {problem}"
        if self.norm_scale is not None and min(self.norm_scale) < 1:
            yield f"norm_scale: {self.norm_scale} is no ratio of channels"
        for layer in self.layers:
            teacher = self.spec.layers[layer.source]
            if set(layer.without) >= {name for name in PARTS if getattr(teacher, name) is not None}:
                yield f"layer {layer.source}: neither its mixer nor its feed-forward stays; drop the layer"
                continue
            problems = layer_problems(layer.kept, layer.mixes, teacher.without(*layer.without))
            yield from (f"layer {layer.source}: {problem}" for problem in problems)
            yield from self._routing_problems(layer)
            if layer.norm_scale is not None and (min(layer.norm_scale) < 1 or Axis.MAMBA_HEAD not in layer.kept):
                yield f"layer {layer.source}: norm_scale: {layer.norm_scale} is no ratio of channels of a Mamba group"

    def _routing_problems(self, layer: LayerPlan) -> Iterator[str]:
        teacher = self.spec.layers[layer.source]
        if not teacher.has_experts:
            if layer.top_k is not None:
                yield f"layer {layer.source}: top_k = {layer.top_k}, but the layer has no experts"
            return
        top_k, left = layer.top_k or teacher.moe.top_k, len(layer.kept.get(Axis.EXPERT, ()))
        if layer.top_k is not None and not 1 <= layer.top_k <= teacher.moe.top_k:
            yield f"layer {layer.source}: top_k = {layer.top_k}, the teacher's is {teacher.moe.top_k}"
        elif 0 < left < top_k:
            yield f"layer {layer.source}: a token is routed to top_k = {top_k} experts, and {left} stay"

    @classmethod
    def keep_all(cls, spec: ModelSpec) -> Self:
        """The plan that changes nothing."""
        layers = tuple(LayerPlan.keep_all(index, layer) for index, layer in enumerate(spec.layers))
        return cls(spec=spec, hidden=tuple(range(spec.hidden_size)), layers=layers)

    @property
    def student(self) -> ModelSpec:
        """The architecture that comes out."""
        layers = tuple(layer.cut(self.spec.layers[layer.source]) for layer in self.layers)
        return narrowed(self.spec, len(self.hidden), layers, norm_ratio=self.norm_ratio)

    def kept(self, row: PrunableAxis) -> tuple[int, ...]:
        """Indices that stay of an axis of the model."""
        return tuple(layer.source for layer in self.layers) if row.axis is Axis.LAYER else self.hidden

    @property
    def norm_ratio(self) -> Fraction:
        """What the mean square over channels is divided by on account of those that go; 1 without rescaling."""
        if self.norm_scale is not None:
            return Fraction(*self.norm_scale)
        return rescaling(self.spec, len(self.hidden)) if self.rescale_norms else Fraction(1)

    def group_ratio(self, layer: LayerPlan) -> Fraction:
        """As `norm_ratio`, for the norm that a Mamba mixer takes over the channels of each of its groups."""
        if layer.norm_scale is not None:
            return Fraction(*layer.norm_scale)
        return self._group_rescaling(layer) if self.rescale_norms else Fraction(1)

    def _group_rescaling(self, layer: LayerPlan) -> Fraction:
        """Channels of a Mamba group before over those after; 1 for a layer of another kind."""
        sizes = [each.mixer for each in (self.spec.layers[layer.source], layer.cut(self.spec.layers[layer.source]))]
        found = [Fraction(m.inner_size, m.mamba_num_groups) for m in sizes if isinstance(m, Mamba)]
        return found[0] / found[1] if len(found) == len(sizes) else Fraction(1)

    @property
    def dropped_parts(self) -> dict[str, list[int]]:
        """Layers that stay without a part, by the part's name."""
        found = {part: [layer.source for layer in self.layers if part in layer.without] for part in PARTS}
        return {part: layers for part, layers in found.items() if layers}

    @property
    def merges(self) -> bool:
        """Whether any kept head takes on residuals of dropped ones."""
        return any(mixes for layer in self.layers for mixes in layer.mixes.values())

    @property
    def is_identity(self) -> bool:
        """Whether nothing is cut."""
        return self.student == self.spec and not self.merges

    def compose(self, then: "PruningPlan") -> "PruningPlan":
        """One plan that does what this one and then `then` (made for this one's student) do, exactly.

        Raises:
            PlanError: `then` is for another model.
        """
        then.check_fits(self.student, where="second plan")
        cuts = [len(plan.hidden) < plan.spec.hidden_size for plan in (self, then)]
        total = self.norm_ratio * then.norm_ratio
        hidden = tuple(self.hidden[index] for index in then.hidden)
        rescale_norms = then.rescale_norms if cuts[1] else self.rescale_norms
        plain = rescaling(self.spec, len(hidden)) if rescale_norms else Fraction(1)
        mixed = total != plain
        composed = PruningPlan(
            spec=self.spec,
            hidden=hidden,
            layers=tuple(_composed_layer(self.layers[second.source], second) for second in then.layers),
            rescale_norms=rescale_norms or mixed,
            norm_scale=(total.numerator, total.denominator) if mixed else None,
            provenance={"composed": [*_steps(self.provenance), *_steps(then.provenance)]},
        )
        layers = []
        for layer, second in zip(composed.layers, then.layers, strict=True):
            ratio = self.group_ratio(self.layers[second.source]) * then.group_ratio(second)
            as_said = Axis.MAMBA_HEAD not in layer.kept or ratio == composed.group_ratio(layer)
            layers.append(layer if as_said else replace(layer, norm_scale=(ratio.numerator, ratio.denominator)))
        return replace(composed, layers=tuple(layers))

    def followed_by(self, then: "PruningPlan") -> "PruningPlan":
        """`compose` for a student that was on disk in between.

        The last digits of its norms' epsilon may have become others.

        Raises:
            PlanError: `then` is for a model of other sizes.
        """
        student = self.student
        aligned = replace(then.spec, norm_eps=student.norm_eps)
        return self.compose(replace(then, spec=aligned))

    def check_fits(self, spec: ModelSpec, *, where: str = "plan") -> None:
        """Compare a model with the plan's teacher.

        Raises:
            PlanError: They differ; names the sizes that do.
        """
        if spec == self.spec or _all_but_rounding(spec, self.spec):
            return
        mine, other = self.spec.to_dict(), spec.to_dict()
        differing = [
            f"{key}: plan {mine.get(key)}, model {other.get(key)}"
            for key in {**mine, **other}
            if mine.get(key) != other.get(key)
        ]
        raise PlanError(
            f"{where}: made for another model ({'; '.join(differing)})",
            rule="a plan fits the model that was scored",
            remedy="score this model and build a plan from its scores",
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data, indices as ranges; `from_dict` is the inverse."""
        data = {
            "format": FORMAT,
            "version": 1,
            "spec": self.spec.to_dict(),
            "hidden": to_ranges(self.hidden),
            "rescale_norms": self.rescale_norms,
            "layers": [_layer_data(layer) for layer in self.layers],
            "provenance": dict(self.provenance),
        }
        if self.norm_scale is not None:
            data["norm_scale"] = list(self.norm_scale)
        if self.merges or self.norm_scale is not None:
            data["version"] = 2
        if any(layer.without or layer.norm_scale or layer.top_k is not None for layer in self.layers):
            data["version"] = 3
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read back what `to_dict` wrote.

        Raises:
            PlanError: A key is missing, of another kind, or holds indices that do not fit.
            SpecError: The teacher's architecture is not sound.
        """
        try:
            if data["format"] != FORMAT or data["version"] not in VERSIONS:
                raise PlanError(
                    f"plan: format {data['format']!r}, version {data['version']!r} is not known",
                    rule=f"{FORMAT}, version {' or '.join(map(str, VERSIONS))}",
                    remedy="a newer nemo_minitron may have written it",
                )
            _refuse_unknown(data, _PLAN_KEYS, _PLAN_ADDED, version=data["version"], where="plan")
            spec = ModelSpec.from_dict(data["spec"])
            return cls(
                spec=spec,
                hidden=from_ranges(data["hidden"], size=spec.hidden_size, what="hidden"),
                layers=tuple(_layer_from(item, spec, data["version"]) for item in data["layers"]),
                rescale_norms=bool(data["rescale_norms"]),
                norm_scale=_norm_scale(data.get("norm_scale")),
                provenance=dict(data["provenance"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PlanError(f"plan: {type(error).__name__}: {error}", rule="the data of PruningPlan.to_dict") from error

    def digest(self) -> str:
        """SHA-256 of the decision (provenance left out), 64 hex digits; the same on every machine."""
        decision = {key: value for key, value in self.to_dict().items() if key != "provenance"}
        return hashlib.sha256(json.dumps(decision, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def save(self, path: Path) -> None:
        """Write JSON under a temporary name, then put it in place."""
        with staged_file(path) as partial:
            partial.write_bytes(self.to_bytes())

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a file that `save` wrote.

        Raises:
            PlanError: It is missing or damaged, or not a plan.
        """
        try:
            return cls.from_bytes(path.read_bytes(), where=str(path))
        except OSError as error:
            raise PlanError(f"{path}: cannot be read ({error})") from error

    def to_bytes(self) -> bytes:
        """The bytes of the file that `save` writes."""
        return (json.dumps(self.to_dict(), indent=1) + "\n").encode()

    @classmethod
    def from_bytes(cls, content: bytes, *, where: str) -> Self:
        """Read what `to_bytes` gave; `where` is for messages.

        Raises:
            PlanError: It is damaged, or not a plan.
        """
        try:
            data = json.loads(content.decode())
            if not isinstance(data, dict):
                raise PlanError("not a JSON object")
            return cls.from_dict(data)
        except (ValueError, RecursionError) as error:
            raise PlanError(f"{where}: cannot be read ({error})") from error
        except MinitronError as error:
            raise PlanError(f"{where}: {error.what}", rule=error.rule, remedy=error.remedy) from error

    @classmethod
    def of_checkpoint(cls, path: Path) -> Self:
        """Which units of the first teacher a checkpoint's units are: all prunings that led to it, as one plan.

        Args:
            path: A student as a Hugging Face folder, a `.nemo` file or an unpacked one, distilled or not. A model that
                was never pruned is its own teacher: the plan that keeps all.

        Raises:
            CheckpointError: There is no readable checkpoint.
            PlanError: The plan that the student carries is missing, damaged, or for other sizes.
        """
        source = open_checkpoint(path)
        content = source.tokenizer_files().get(PLAN_FILE)
        if content is None and not source.lineage.get("pruned"):
            return cls.keep_all(source.spec)
        if content is None:
            raise PlanError(
                f"{path}: was pruned, but {PLAN_FILE} is not among its files",
                remedy="copy it from where the student was written, or use the plan.json that it was pruned with",
            )
        plan = cls.from_bytes(content, where=f"{path}: {PLAN_FILE}")
        if not _same_sizes(plan.student, source.spec):
            raise PlanError(f"{path}: {PLAN_FILE} belongs to a student of other sizes")
        return plan

    def table(self) -> str:
        """Sizes before and after as a plain text table."""
        kept = {layer.source for layer in self.layers}
        dropped = [index for index in range(self.spec.num_layers) if index not in kept]
        lines = [size_table(self.spec, self.student), f"layers dropped: {to_ranges(dropped) or 'none'}"]
        lines += [f"{part} dropped of layers: {to_ranges(layers)}" for part, layers in self.dropped_parts.items()]
        return "\n".join(lines)


def narrowed(teacher: ModelSpec, hidden_size: int, layers: tuple[LayerSpec, ...], *, norm_ratio: Fraction) -> ModelSpec:
    """A teacher's architecture with other layers and fewer channels; see `PruningPlan.rescale_norms` for epsilon."""
    eps = teacher.norm_eps
    if norm_ratio != 1:
        # 12 digits: pruning twice then states the same number as pruning once.
        eps = float(f"{eps * norm_ratio.numerator / norm_ratio.denominator:.12g}")
    return replace(teacher, hidden_size=hidden_size, layers=layers, norm_eps=eps)


def rescaling(teacher: ModelSpec, hidden_size: int) -> Fraction:
    """Channels before over channels after."""
    return Fraction(teacher.hidden_size, hidden_size)


_PLAN_KEYS = ("format", "version", "spec", "hidden", "rescale_norms", "layers", "provenance")
_TOP_K = "top_k"
_PLAN_ADDED = {2: ("norm_scale",)}
_LAYER_ADDED = {2: tuple(row.mixes for row in LAYER_AXES if row.mixes), 3: ("norm_scale", "without", _TOP_K)}
"""Keys by the version that added them."""


def _refuse_unknown(
    data: Mapping[str, Any], known: tuple[str, ...], added: Mapping[int, tuple[str, ...]], *, version: int, where: str
) -> None:
    allowed = {*known, *(key for since, keys in added.items() if since <= version for key in keys)}
    if unknown := sorted(set(data) - allowed):
        raise PlanError(f"{where}: unknown key(s) {', '.join(unknown)} in version {version}")


def _layer_data(layer: LayerPlan) -> dict[str, Any]:
    rows = [row for row in LAYER_AXES if row.axis in layer.kept]
    kept = {row.plan: to_ranges(layer.kept[row.axis]) for row in rows}
    mixed = {row.mixes: mixes.to_json(found) for row in reversed(rows) if (found := layer.mixes.get(row.axis))}
    data: dict[str, Any] = {"source": layer.source}
    if layer.without:
        data["without"] = list(layer.without)
    if layer.norm_scale is not None:
        data["norm_scale"] = list(layer.norm_scale)
    routed = {} if layer.top_k is None else {_TOP_K: layer.top_k}
    return data | kept | mixed | routed


def _layer_from(item: Mapping[str, Any], spec: ModelSpec, version: int) -> LayerPlan:
    source = item["source"]
    if type(source) is not int or not 0 <= source < spec.num_layers:
        raise PlanError(f"layer {source!r} is not one of the teacher's {spec.num_layers}")
    without = tuple(item.get("without", ()))
    if set(without) - set(PARTS):
        raise PlanError(f"layer {source}: without = {list(without)}", rule=f"parts of a layer: {', '.join(PARTS)}")
    where, teacher = f"layer {source}", spec.layers[source].without(*without)
    rows = axes_of(teacher)
    _refuse_unknown(item, ("source", *(row.plan for row in rows)), _LAYER_ADDED, version=version, where=where)
    mixed = {
        row.axis: mixes.from_json(item[row.mixes], what=f"{where}: {row.mixes}") for row in rows if row.mixes in item
    }
    return LayerPlan(
        source=source,
        kept={r.axis: from_ranges(item[r.plan], size=teacher.units(r), what=f"{where}: {r.plan}") for r in rows},
        mixes={axis: found for axis, found in mixed.items() if found},
        top_k=_whole(item.get(_TOP_K), where),
        without=without,
        norm_scale=_norm_scale(item.get("norm_scale")),
    )


def _whole(value: Any, where: str) -> int | None:
    if value is not None and type(value) is not int:
        raise PlanError(f"{where}: {_TOP_K} = {str(value)[:40]!r}", rule="a number of experts")
    return value


def _norm_scale(value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    before, after = value
    if type(before) is not int or type(after) is not int:
        raise PlanError(f"norm_scale = {value!r}", rule="two numbers of channels")
    return before, after


def _composed_layer(first: LayerPlan, second: LayerPlan) -> LayerPlan:
    none: Mixes = ()
    mixed = {
        axis: mixes.composed(first.mixes.get(axis, none), first.kept[axis], second.mixes.get(axis, none), kept)
        for axis, kept in second.kept.items()
    }
    return LayerPlan(
        source=first.source,
        kept={axis: tuple(first.kept[axis][index] for index in kept) for axis, kept in second.kept.items()},
        mixes={axis: found for axis, found in mixed.items() if found},
        top_k=None if Axis.EXPERT not in second.kept else second.top_k or first.top_k,
        without=tuple(name for name in PARTS if name in (*first.without, *second.without)),
    )


def _steps(provenance: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The provenance of every pruning, the first one first."""
    return list(provenance["composed"]) if set(provenance) == {"composed"} else [dict(provenance)]


def _all_but_rounding(one: ModelSpec, other: ModelSpec) -> bool:
    """Whether two architectures are equal but for the last digits of epsilon, which each pruning rounds."""
    close = math.isclose(one.norm_eps, other.norm_eps, rel_tol=1e-9)
    return close and replace(one, norm_eps=other.norm_eps) == other


def _same_sizes(one: ModelSpec, other: ModelSpec) -> bool:
    names = ("vocab_size", "hidden_size", "head_dim", "layers")
    return all(getattr(one, name) == getattr(other, name) for name in names)
