"""A pruning plan: which layers, channels, neurons and heads stay. Data to print, diff, review and save."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Self

from nemo_minitron.arch.spec import LayerSpec, ModelSpec
from nemo_minitron.checkpoints.files import staged_file
from nemo_minitron.checkpoints.source import PLAN_FILE, open_checkpoint
from nemo_minitron.errors import MinitronError, PlanError
from nemo_minitron.pruning import mixes
from nemo_minitron.pruning.ranges import from_ranges, to_ranges
from nemo_minitron.pruning.table import size_table
from nemo_minitron.pruning.validate import problems_of

FORMAT = "nemo_minitron.plan"
VERSIONS = (1, 2)
"""2 adds `merged_heads`, `merged_groups` and `norm_scale`. A plan without them is still written as 1, and its digest
stays what it was."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerPlan:
    """What stays of one layer. Indices are the teacher's, ascending."""

    source: int
    """Which layer of the teacher it is."""
    kv_groups: tuple[int, ...]
    heads: tuple[int, ...]
    """Query heads over all groups of the layer; every kept group keeps equally many."""
    ffn: tuple[int, ...]
    merged_heads: mixes.Mixes = ()
    """Query heads whose query weights become sums over the teacher's query heads (head-residual merging)."""
    merged_groups: mixes.Mixes = ()
    """The same for key and value weights, over KV groups: only where every head has a key and value of its own."""


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
        if problems := list(problems_of(self)):
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
            replace(
                self.spec.layers[layer.source],
                num_attention_heads=len(layer.heads),
                num_query_groups=len(layer.kv_groups),
                ffn_hidden_size=len(layer.ffn),
            )
            for layer in self.layers
        )
        return narrowed(self.spec, len(self.hidden), layers, norm_ratio=self.norm_ratio)

    @property
    def norm_ratio(self) -> Fraction:
        """What the mean square over channels is divided by on account of those that go; 1 without rescaling."""
        if self.norm_scale is not None:
            return Fraction(*self.norm_scale)
        return rescaling(self.spec, len(self.hidden)) if self.rescale_norms else Fraction(1)

    @property
    def merges(self) -> bool:
        """Whether any kept head takes on residuals of dropped ones."""
        return any(layer.merged_heads or layer.merged_groups for layer in self.layers)

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
        return PruningPlan(
            spec=self.spec,
            hidden=hidden,
            layers=tuple(_composed_layer(self.layers[second.source], second) for second in then.layers),
            rescale_norms=rescale_norms or mixed,
            norm_scale=(total.numerator, total.denominator) if mixed else None,
            provenance={"composed": [*_steps(self.provenance), *_steps(then.provenance)]},
        )

    def followed_by(self, then: "PruningPlan") -> "PruningPlan":
        """`compose` for a student that was on disk in between.

        Its family and the last digits of its norms' epsilon may have become others: some pruned Llamas are exported as
        Mistral.

        Raises:
            PlanError: `then` is for a model of other sizes.
        """
        student = self.student
        aligned = replace(then.spec, family=student.family, norm_eps=student.norm_eps)
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
            _refuse_unknown(data, _PLAN_KEYS, version=data["version"], where="plan")
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
        return f"{size_table(self.spec, self.student)}\nlayers dropped: {to_ranges(dropped) or 'none'}"


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
_LAYER_KEYS = ("source", "kv_groups", "heads", "ffn")
_ADDED = ("norm_scale", "merged_heads", "merged_groups")


def _refuse_unknown(data: Mapping[str, Any], known: tuple[str, ...], *, version: int, where: str) -> None:
    allowed = {*known, *(_ADDED if version > 1 else ())}
    if unknown := sorted(set(data) - allowed):
        raise PlanError(f"{where}: unknown key(s) {', '.join(unknown)} in version {version}")


def _layer_data(layer: LayerPlan) -> dict[str, Any]:
    data: dict[str, Any] = {"source": layer.source}
    data |= {name: to_ranges(getattr(layer, name)) for name in ("kv_groups", "heads", "ffn")}
    merged = {name: mixes.to_json(getattr(layer, name)) for name in ("merged_heads", "merged_groups")}
    return data | {name: found for name, found in merged.items() if found}


def _layer_from(item: Mapping[str, Any], spec: ModelSpec, version: int) -> LayerPlan:
    source = item["source"]
    if type(source) is not int or not 0 <= source < spec.num_layers:
        raise PlanError(f"layer {source!r} is not one of the teacher's {spec.num_layers}")
    _refuse_unknown(item, _LAYER_KEYS, version=version, where=f"layer {source}")
    sizes = spec.layers[source]
    counts = {"kv_groups": sizes.num_query_groups, "heads": sizes.num_attention_heads, "ffn": sizes.ffn_hidden_size}
    kept = {name: from_ranges(item[name], size=size, what=f"layer {source}: {name}") for name, size in counts.items()}
    return LayerPlan(
        source=source,
        kv_groups=kept["kv_groups"],
        heads=kept["heads"],
        ffn=kept["ffn"],
        merged_heads=mixes.from_json(item.get("merged_heads", {}), what=f"layer {source}: merged_heads"),
        merged_groups=mixes.from_json(item.get("merged_groups", {}), what=f"layer {source}: merged_groups"),
    )


def _norm_scale(value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    before, after = value
    if type(before) is not int or type(after) is not int:
        raise PlanError(f"norm_scale = {value!r}", rule="two numbers of channels")
    return before, after


def _composed_layer(first: LayerPlan, second: LayerPlan) -> LayerPlan:
    return LayerPlan(
        source=first.source,
        kv_groups=tuple(first.kv_groups[index] for index in second.kv_groups),
        heads=tuple(first.heads[index] for index in second.heads),
        ffn=tuple(first.ffn[index] for index in second.ffn),
        merged_heads=mixes.composed(first.merged_heads, first.heads, second.merged_heads, second.heads),
        merged_groups=mixes.composed(first.merged_groups, first.kv_groups, second.merged_groups, second.kv_groups),
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
