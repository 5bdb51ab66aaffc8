"""A pruning plan: which layers, channels, neurons and heads stay. Data to print, diff, review and save."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

from nemo_minitron.arch.spec import LayerSpec, ModelSpec, Norm
from nemo_minitron.checkpoints.files import staged_file
from nemo_minitron.errors import MinitronError, PlanError
from nemo_minitron.pruning.ranges import from_ranges, to_ranges
from nemo_minitron.pruning.table import size_table

FORMAT = "nemo_minitron.plan"
VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerPlan:
    """What stays of one layer. Indices are the teacher's, ascending."""

    source: int
    """Which layer of the teacher it is."""
    kv_groups: tuple[int, ...]
    heads: tuple[int, ...]
    """Query heads over all groups of the layer; every kept group keeps equally many."""
    ffn: tuple[int, ...]


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
    """Multiply RMSNorm weights by `sqrt(hidden before / hidden after)`, and its epsilon by that ratio. The norm divides
    by the mean square over all channels, so leaving channels out would shrink what it passes on, by up to that factor,
    even when they carry nothing. With it, cutting channels that are zero changes no logit."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Where the decision comes from (JSON data). Not part of the digest."""

    def __post_init__(self) -> None:
        if problems := list(_problems(self)):
            raise PlanError("pruning plan: " + "; ".join(problems), rule="every axis keeps some units of the teacher")

    @classmethod
    def keep_all(cls, spec: ModelSpec) -> Self:
        """The plan that changes nothing."""
        layers = tuple(
            LayerPlan(
                source=index,
                kv_groups=tuple(range(layer.num_query_groups)),
                heads=tuple(range(layer.num_attention_heads)),
                ffn=tuple(range(layer.ffn_hidden_size)),
            )
            for index, layer in enumerate(spec.layers)
        )
        return cls(spec=spec, hidden=tuple(range(spec.hidden_size)), layers=layers)

    @property
    def student(self) -> ModelSpec:
        """The architecture that comes out."""
        layers = tuple(
            LayerSpec(
                num_attention_heads=len(layer.heads),
                num_query_groups=len(layer.kv_groups),
                ffn_hidden_size=len(layer.ffn),
            )
            for layer in self.layers
        )
        return narrowed(self.spec, len(self.hidden), layers, rescale_norms=self.rescale_norms)

    @property
    def rescales_norms(self) -> bool:
        """Whether norm weights really change."""
        return self.rescale_norms and rescaling_applies(self.spec, len(self.hidden))

    @property
    def is_identity(self) -> bool:
        """Whether nothing is cut."""
        return self.student == self.spec

    def compose(self, then: "PruningPlan") -> "PruningPlan":
        """One plan that does what this one and then `then` (made for this one's student) do.

        Raises:
            PlanError: `then` is for another model, or the two disagree about `rescale_norms` while cutting channels.
        """
        then.check_fits(self.student, where="second plan")
        cuts = [len(plan.hidden) < plan.spec.hidden_size for plan in (self, then)]
        if all(cuts) and self.rescale_norms != then.rescale_norms:
            raise PlanError("the two plans differ in rescale_norms and both cut hidden channels")
        layers = []
        for second in then.layers:
            first = self.layers[second.source]
            layers.append(
                LayerPlan(
                    source=first.source,
                    kv_groups=tuple(first.kv_groups[index] for index in second.kv_groups),
                    heads=tuple(first.heads[index] for index in second.heads),
                    ffn=tuple(first.ffn[index] for index in second.ffn),
                )
            )
        return PruningPlan(
            spec=self.spec,
            hidden=tuple(self.hidden[index] for index in then.hidden),
            layers=tuple(layers),
            rescale_norms=then.rescale_norms if cuts[1] else self.rescale_norms,
            provenance={"composed": [dict(self.provenance), dict(then.provenance)]},
        )

    def check_fits(self, spec: ModelSpec, *, where: str = "plan") -> None:
        """Compare a model with the plan's teacher.

        Raises:
            PlanError: They differ; names the sizes that do.
        """
        if spec == self.spec:
            return
        mine, other = self.spec.to_dict(), spec.to_dict()
        differing = [f"{key}: plan {mine[key]}, model {other[key]}" for key in mine if mine[key] != other[key]]
        raise PlanError(
            f"{where}: made for another model ({'; '.join(differing)})",
            rule="a plan fits the model that was scored",
            remedy="score this model and build a plan from its scores",
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data, indices as ranges; `from_dict` is the inverse."""
        layers = [
            {
                "source": layer.source,
                **{name: to_ranges(getattr(layer, name)) for name in ("kv_groups", "heads", "ffn")},
            }
            for layer in self.layers
        ]
        return {
            "format": FORMAT,
            "version": VERSION,
            "spec": self.spec.to_dict(),
            "hidden": to_ranges(self.hidden),
            "rescale_norms": self.rescale_norms,
            "layers": layers,
            "provenance": dict(self.provenance),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read back what `to_dict` wrote.

        Raises:
            PlanError: A key is missing, of another kind, or holds indices that do not fit.
            SpecError: The teacher's architecture is not sound.
        """
        try:
            if data["format"] != FORMAT or data["version"] != VERSION:
                raise PlanError(f"plan: format {data['format']!r}, version {data['version']!r} is not known")
            spec = ModelSpec.from_dict(data["spec"])
            return cls(
                spec=spec,
                hidden=from_ranges(data["hidden"], size=spec.hidden_size, what="hidden"),
                layers=tuple(_layer_from(item, spec) for item in data["layers"]),
                rescale_norms=bool(data["rescale_norms"]),
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
            partial.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a file that `save` wrote.

        Raises:
            PlanError: It is missing or damaged, or not a plan.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(data, dict):
                raise PlanError("not a JSON object")
            return cls.from_dict(data)
        except (OSError, ValueError, RecursionError) as error:
            raise PlanError(f"{path}: cannot be read ({error})") from error
        except MinitronError as error:
            raise PlanError(f"{path}: {error.what}", rule=error.rule, remedy=error.remedy) from error

    def table(self) -> str:
        """Sizes before and after as a plain text table."""
        kept = {layer.source for layer in self.layers}
        dropped = [index for index in range(self.spec.num_layers) if index not in kept]
        return f"{size_table(self.spec, self.student)}\nlayers dropped: {to_ranges(dropped) or 'none'}"


def narrowed(
    teacher: ModelSpec, hidden_size: int, layers: tuple[LayerSpec, ...], *, rescale_norms: bool = True
) -> ModelSpec:
    """A teacher's architecture with other layers and fewer channels; see `PruningPlan.rescale_norms` for epsilon."""
    eps = teacher.norm_eps
    if rescale_norms and rescaling_applies(teacher, hidden_size):
        # 12 digits: pruning twice then states the same number as pruning once.
        eps = float(f"{eps * teacher.hidden_size / hidden_size:.12g}")
    return replace(teacher, hidden_size=hidden_size, layers=layers, norm_eps=eps)


def rescaling_applies(teacher: ModelSpec, hidden_size: int) -> bool:
    """Whether the norms are RMSNorm and channels are cut."""
    return teacher.norm is Norm.RMSNORM and hidden_size < teacher.hidden_size


def _layer_from(item: Mapping[str, Any], spec: ModelSpec) -> LayerPlan:
    source = item["source"]
    if type(source) is not int or not 0 <= source < spec.num_layers:
        raise PlanError(f"layer {source!r} is not one of the teacher's {spec.num_layers}")
    sizes = spec.layers[source]
    counts = {"kv_groups": sizes.num_query_groups, "heads": sizes.num_attention_heads, "ffn": sizes.ffn_hidden_size}
    kept = {name: from_ranges(item[name], size=size, what=f"layer {source}: {name}") for name, size in counts.items()}
    return LayerPlan(source=source, **kept)


def _problems(plan: PruningPlan) -> Iterator[str]:
    spec = plan.spec
    if not plan.layers:
        yield "zero layers; at least 1 must stay"
    sources = tuple(layer.source for layer in plan.layers)
    if plan.layers and (problem := _index_problem(sources, spec.num_layers)):
        yield f"layers: {problem}"
        return
    if problem := _index_problem(plan.hidden, spec.hidden_size):
        yield f"hidden: {problem}"
    for layer in plan.layers:
        sizes = spec.layers[layer.source]
        axes = {
            "kv_groups": (layer.kv_groups, sizes.num_query_groups),
            "heads": (layer.heads, sizes.num_attention_heads),
            "ffn": (layer.ffn, sizes.ffn_hidden_size),
        }
        problems = [f"{name}: {found}" for name, axis in axes.items() if (found := _index_problem(*axis))]
        problems = problems or _head_problems(layer, sizes)
        yield from (f"layer {layer.source}: {problem}" for problem in problems)


def _index_problem(indices: tuple[int, ...], size: int) -> str:
    if not indices:
        return "none are kept"
    if any(a >= b for a, b in pairwise(indices)):
        return "not ascending, or one index occurs twice"
    if indices[0] < 0 or indices[-1] >= size:
        return f"indices {indices[0]} to {indices[-1]} of {size}"
    return ""


def _head_problems(layer: LayerPlan, sizes: LayerSpec) -> list[str]:
    per_group = sizes.num_attention_heads // sizes.num_query_groups
    counts = dict.fromkeys(layer.kv_groups, 0)
    for head in layer.heads:
        if head // per_group not in counts:
            return [f"head {head} stays, but its KV group {head // per_group} does not"]
        counts[head // per_group] += 1
    if len(set(counts.values())) > 1:
        return [f"KV groups keep unequal numbers of heads: {counts}"]
    return []
