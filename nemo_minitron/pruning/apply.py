"""Applying a plan: a lazy view of a checkpoint whose tensors are cut when they are asked for."""

import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from nemo_minitron.arch.axes import LAYER_AXES, Axis, Packing, Scope, is_prunable, outer_axis, row_of
from nemo_minitron.arch.layer import LayerSpec, Mamba
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.arch.weights import MAMBA_PARTS, Weight, weight_named
from nemo_minitron.checkpoints.source import PLAN_FILE, TensorSource, names_of
from nemo_minitron.ops.mixing import mix_slots
from nemo_minitron.ops.packing import crossed, gate_up_rows, head_channels, part_rows, qkv_rows
from nemo_minitron.ops.slicing import slice_dims
from nemo_minitron.pruning.plan import LayerPlan, PruningPlan

_EMBEDDING = "embedding.word_embeddings.weight"
_FINAL_NORM = "decoder.final_layernorm.weight"


class PrunedSource:
    """What a plan leaves of a checkpoint; itself a `TensorSource`.

    A view of a view is one view with the composed plan, so pruning twice rounds once. The student carries the plan that
    leads from the very first teacher to it (`PruningPlan.of_checkpoint`).

    Args:
        source: The teacher's checkpoint.
        plan: What stays.

    Raises:
        PlanError: The plan is for another model, or the one that the checkpoint carries is damaged.
    """

    def __init__(self, source: TensorSource, plan: PruningPlan) -> None:
        plan.check_fits(source.spec)
        self._lineage = _lineage(source.lineage, plan)
        self.plan: PruningPlan = source.plan.compose(plan) if isinstance(source, PrunedSource) else plan
        self.teacher: TensorSource = source.teacher if isinstance(source, PrunedSource) else source
        self._student = self.plan.student
        self._files = self._travelling_files()

    @property
    def spec(self) -> ModelSpec:
        """The student's architecture."""
        return self._student

    @property
    def family(self) -> str:
        """The teacher's."""
        return self.teacher.family

    @property
    def dtype(self) -> torch.dtype:
        """The teacher's."""
        return self.teacher.dtype

    @property
    def lineage(self) -> dict[str, Any]:
        """The teacher's, with the plan's digest added under `pruned`; unchanged when nothing is cut."""
        return dict(self._lineage)

    def names(self) -> tuple[str, ...]:
        """Canonical names of the student in table order."""
        return names_of(self._student)

    def get(self, name: str) -> Tensor:
        """One of the student's tensors, cut from the teacher's."""
        weight = weight_named(self._student, name)
        layer = None if weight.layer is None else self.plan.layers[weight.layer]
        teacher_name = name if layer is None else weight.row.name.format(i=layer.source, e=_source(weight, layer))
        keep = {dim: self._kept(axis, weight, layer) for dim, axis in enumerate(weight.row.axes)}
        cuts = {dim: kept for dim, kept in keep.items() if kept is not None}
        whole = self.teacher.get(teacher_name)
        tensor = slice_dims(whole, cuts)
        if layer is not None and weight.row.packing is Packing.QKV and layer.mixes:
            columns = torch.tensor(self.plan.hidden) if whole.dim() > 1 else None
            slots = _slot_mixes(layer, self.plan.spec.layers[layer.source])
            return mix_slots(tensor, whole, slots, head_dim=self.plan.spec.head_dim, columns=columns)
        factor = math.sqrt(self._squared_factor(weight, layer))
        if factor == 1:
            return tensor
        offset = 1 if _is_norm_scale(weight) and self._student.norm.zero_centred else 0
        return ((tensor.double() + offset) * factor - offset).to(tensor.dtype)

    def _squared_factor(self, weight: Weight, layer: LayerPlan | None) -> Fraction:
        """What a weight's square is multiplied by, since fewer channels are left.

        Norms: see `PruningPlan.rescale_norms`. Embeddings that enter times `sqrt(hidden_size)` make up for the smaller
        root, so that the first layer sees what it saw; where they are the output layer too, the final norm takes it
        back.
        """
        if layer is not None and weight.row.axes == (Axis.MAMBA_CHANNEL,) and weight.row.packing is Packing.PLAIN:
            return self.plan.group_ratio(layer)
        factor = self.plan.norm_ratio if _is_norm_scale(weight) else Fraction(1)
        if self._student.scaled_embeddings:
            channels = Fraction(self.plan.spec.hidden_size, self._student.hidden_size)
            if weight.name == _EMBEDDING:
                return channels
            if weight.name == _FINAL_NORM and self._student.tied_embeddings:
                return factor / channels
        return factor

    def tokenizer_files(self) -> dict[str, bytes]:
        """The teacher's, with the plan from the first teacher to the student; unchanged when nothing is cut."""
        return dict(self._files)

    def _travelling_files(self) -> dict[str, bytes]:
        files = self.teacher.tokenizer_files()
        if self.plan.is_identity:
            return files
        plan = self.plan
        if PLAN_FILE in files:
            plan = PruningPlan.from_bytes(files[PLAN_FILE], where=PLAN_FILE).followed_by(plan)
        return {**files, PLAN_FILE: plan.to_bytes()}

    def _kept(self, axis: Axis, weight: Weight, layer: LayerPlan | None) -> Tensor | None:
        """Indices that stay along a dimension of the teacher's tensor; None when all do."""
        if not is_prunable(axis):
            return None
        row = row_of(axis)
        if layer is None or row.scope is Scope.MODEL:
            return torch.tensor(self.plan.kept(row))
        teacher, units = self.plan.spec.layers[layer.source], torch.tensor(layer.kept[axis])
        if axis is Axis.MAMBA_CHANNEL:
            return _mamba_rows(weight, teacher.mamba, layer.kept)
        outer = outer_axis(row)
        if row.each and outer is not None:
            inside = teacher.size(row)
            units = units[units // inside == _source(weight, layer)] % inside
        if weight.row.packing is Packing.QKV and outer is not None:
            return qkv_rows(
                units,
                torch.tensor(layer.kept[outer.axis]),
                num_heads=teacher.size(row),
                num_groups=teacher.size(outer),
                head_dim=self.plan.spec.head_dim,
            )
        if weight.row.packing is Packing.GATE_UP:
            return gate_up_rows(units, neurons=teacher.size(row))
        # A KV group's are the channels of its key head.
        is_head = row_of(row.sums or axis).is_head
        return head_channels(units, head_dim=self.plan.spec.head_dim) if is_head else units


def _source(weight: Weight, layer: LayerPlan) -> int | None:
    """Which expert of the teacher's layer a weight's is."""
    return None if weight.expert is None else layer.kept[Axis.EXPERT][weight.expert]


def _mamba_rows(weight: Weight, mamba: Mamba, kept: Mapping[Axis, Sequence[int]]) -> Tensor:
    """Indices along a dimension that holds the channels of Mamba heads, or all parts of a Mamba packing."""
    heads, channels, groups = (
        torch.tensor(kept[axis]) for axis in (Axis.MAMBA_HEAD, Axis.MAMBA_CHANNEL, Axis.MAMBA_GROUP)
    )
    inner = crossed(heads, channels, size=mamba.mamba_head_dim)
    maps = crossed(groups, torch.arange(mamba.mamba_state_dim), size=mamba.mamba_state_dim)
    of_part = {"z": inner, "x": inner, "B": maps, "C": maps, "dt": heads}
    if weight.row.packing not in MAMBA_PARTS:
        return inner
    rows = mamba.parts()
    return part_rows([(rows[letters], of_part[letters]) for letters in MAMBA_PARTS[weight.row.packing]])


def _is_norm_scale(weight: Weight) -> bool:
    """Whether a weight multiplies a normalised residual stream."""
    return weight.row.axes == (Axis.HIDDEN,) and weight.name.endswith(("layer_norm_weight", "layernorm.weight"))


def _slot_mixes(layer: LayerPlan, teacher: LayerSpec) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """A layer's merged heads and groups as slots of the student's QKV weight and sums of slots of the teacher's.

    Each KV group lies as its query heads, its key, its value.
    """
    row = next(row for row in LAYER_AXES if row.within is not None and row.axis in layer.kept)
    outer = outer_axis(row)
    assert outer is not None
    heads, groups = layer.kept[row.axis], layer.kept[outer.axis]
    before = teacher.size(row) // teacher.size(outer)
    after = len(heads) // len(groups)

    def query(head: int, per_group: int) -> int:
        return head // per_group * (per_group + 2) + head % per_group

    for head, terms in layer.mixes.get(row.axis, ()):
        slot = query(heads.index(head), after)
        yield slot, [(query(origin, before), coefficient) for origin, coefficient in terms]
    for group, terms in layer.mixes.get(outer.axis, ()):
        for part in (0, 1):  # key, value
            slot = groups.index(group) * (after + 2) + after + part
            yield slot, [(origin * (before + 2) + before + part, coefficient) for origin, coefficient in terms]


def _lineage(lineage: dict[str, Any], plan: PruningPlan) -> dict[str, Any]:
    if plan.is_identity:
        return dict(lineage)
    step = {"plan": plan.digest(), "from": plan.spec.digest()}
    return {**lineage, "pruned": [*lineage.get("pruned", []), step]}
