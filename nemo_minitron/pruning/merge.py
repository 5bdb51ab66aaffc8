"""Merging dropped layers: the layer before a gap takes on what the layers in it did, as far as a linear map can.

Source: "ReplaceMe", arXiv:2505.02819. A residual model's stream behind the gap is the stream before it plus what the
dropped layers add. The second MLP matrix of the layer before the gap is refitted by ridge regression so that it adds
that too, together with what its own dropped neurons did (`ops.refit`). The regression needs two sums over calibration
tokens, with `a` the input of that matrix and `r` what the dropped layers add to the stream:

    layers.{i}.moment    sum a a^T    [ffn, ffn]
    layers.{i}.cross     sum a r^T    [ffn, hidden]

Both are float64, for each layer `i` of the teacher that stands before a gap.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.arch.weights import LAYER_PREFIX, weight_named
from nemo_minitron.checkpoints.files import staged_file
from nemo_minitron.checkpoints.safetensors_file import Entry, SafetensorsFile, SafetensorsWriter
from nemo_minitron.checkpoints.source import Checkpoint
from nemo_minitron.errors import CheckpointError, PlanError, ScoresError
from nemo_minitron.ops.refit import refit_change
from nemo_minitron.pruning.apply import PrunedSource
from nemo_minitron.pruning.plan import PruningPlan

FORMAT = "nemo_minitron.merge"
_SECOND = LAYER_PREFIX + "mlp.linear_fc2.weight"


class Gap(NamedTuple):
    """Consecutive layers that go."""

    layer: int
    """The layer before them, which stays."""
    end: int
    """The layer behind them; the number of layers where the last ones go."""


def gaps_of(plan: PruningPlan) -> tuple[Gap, ...]:
    """Every gap that a plan leaves behind a kept layer, in order."""
    ends = [*(layer.source for layer in plan.layers), plan.spec.num_layers]
    return tuple(Gap(layer, end) for layer, end in pairwise(ends) if end > layer + 1)


def mergeable_gaps(plan: PruningPlan) -> tuple[Gap, ...]:
    """The gaps of a plan, each behind a layer that keeps its MLP.

    Raises:
        PlanError: One does not, so that nothing can take on what is missing.
    """
    gaps = gaps_of(plan)
    before = {gap.layer for gap in gaps}
    bare = [layer.source for layer in plan.layers if layer.source in before and "feed_forward" in layer.without]
    if bare:
        raise PlanError(
            f"target.merge_layers: layer {bare[0]} loses its MLP, and layers behind it go",
            rule="the second MLP matrix of the layer before dropped ones takes on what they added",
            remedy="set target.merge_layers=false, or keep that MLP (target.drop_feed_forwards)",
        )
    return gaps


def check_mergeable(spec: ModelSpec) -> None:
    """Make sure that a layer's second MLP matrix adds to the residual stream as it is.

    Raises:
        PlanError: A norm stands between them, or a layer has none, or experts, each with a matrix of its own.
    """
    if any(not layer.is_transformer for layer in spec.layers):
        raise PlanError(
            "target.merge_layers for a model with layers that are not attention and an MLP",
            rule="the second MLP matrix of the layer before dropped ones takes on what they added",
            remedy="set target.merge_layers=false",
        )
    if spec.post_norms:
        raise PlanError(
            "target.merge_layers for a model whose MLPs have a norm at their end",
            rule="what the second MLP matrix returns is added to the residual stream",
            remedy="set target.merge_layers=false",
        )


@dataclass(frozen=True, slots=True)
class MergeSums:
    """The sums for one plan. They do not depend on any parallel layout."""

    plan_digest: str
    tensors: Mapping[str, Tensor]
    """float64, by name."""
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def check_fits(self, plan: PruningPlan) -> None:
        """Make sure that they were taken for a plan.

        Raises:
            ScoresError: They belong to another plan, or a sum is missing, unknown, of the wrong shape or not finite.
        """
        if self.plan_digest != plan.digest():
            raise ScoresError(
                f"sums for merging layers of another plan ({self.plan_digest[:12]}, this plan {plan.digest()[:12]})",
                rule="they rest on the gaps of one plan",
                remedy="score again (--from score)",
            )
        shapes: dict[str, tuple[int, int]] = {}
        for gap in gaps_of(plan):
            neurons = plan.spec.layers[gap.layer].on_rank(1).neurons
            shapes[f"layers.{gap.layer}.moment"] = neurons, neurons
            shapes[f"layers.{gap.layer}.cross"] = neurons, plan.spec.hidden_size
        if differing := sorted(set(shapes) ^ set(self.tensors)):
            raise ScoresError(f"sums for merging layers: {', '.join(differing)} missing or unknown")
        for name, shape in shapes.items():
            tensor = self.tensors[name]
            if tuple(tensor.shape) != shape or tensor.dtype != torch.float64:
                raise ScoresError(
                    f"sums for merging layers: {name} is {tensor.dtype} shaped {tuple(tensor.shape)}",
                    rule=f"float64 shaped {shape}",
                )
            if not bool(torch.isfinite(tensor).all()):
                raise ScoresError(
                    f"sums for merging layers: NaN or infinity in {name}",
                    rule="activations are finite",
                    remedy="look for overflow in that layer; calibrate in bf16 or fp32, not fp16",
                )

    def save(self, path: Path) -> None:
        """Write a file under a temporary name, then put it in place."""
        metadata = {
            "format": FORMAT,
            "plan_digest": self.plan_digest,
            "provenance": json.dumps(dict(self.provenance), sort_keys=True),
        }
        entries = {name: Entry(tensor.dtype, tuple(tensor.shape)) for name, tensor in self.tensors.items()}
        with staged_file(path) as partial, SafetensorsWriter(partial, entries, metadata) as writer:
            for name, tensor in self.tensors.items():
                writer.write(name, tensor)

    @classmethod
    def load(cls, path: Path) -> "MergeSums":
        """Read a file that `save` wrote.

        Raises:
            ScoresError: It is missing, damaged, or another kind of file.
        """
        try:
            file = SafetensorsFile(path)
            if file.metadata.get("format") != FORMAT:
                raise ScoresError(f"{path}: format {file.metadata.get('format')!r}", rule=FORMAT)
            tensors = {name: file.get(name) for name in file.entries}
            return cls(file.metadata["plan_digest"], tensors, json.loads(file.metadata["provenance"]))
        except CheckpointError as error:
            raise ScoresError(error.what, remedy="score again (--from score)") from error
        except (KeyError, ValueError) as error:
            raise ScoresError(f"{path}: {error}", remedy="the file is damaged; score again") from error


def merge_gaps(source: PrunedSource, sums: MergeSums, *, ridge: float) -> Checkpoint:
    """A pruned checkpoint whose layers before gaps have taken on what is missing, tensor by tensor.

    The gaps stand in the last pruning of its lineage, under `merged`.

    Args:
        source: The pruned checkpoint.
        sums: For its plan.
        ridge: See `ops.refit`.

    Raises:
        PlanError: The model's MLPs end with a norm, or one that is needed is gone.
        ScoresError: The sums do not fit.
    """
    plan, gaps = source.plan, mergeable_gaps(source.plan)
    check_mergeable(plan.spec)
    sums.check_fits(plan)
    before = {gap.layer for gap in gaps}
    refitted = {_SECOND.format(i=index): layer for index, layer in enumerate(plan.layers) if layer.source in before}

    def get(name: str) -> Tensor:
        tensor = source.get(name)
        if (layer := refitted.get(name)) is None:
            return tensor
        change_HK = refit_change(
            source.teacher.get(_SECOND.format(i=layer.source)),
            torch.tensor(layer.kept[weight_named(source.spec, name).row.axes[1]]),
            sums.tensors[f"layers.{layer.source}.moment"],
            sums.tensors[f"layers.{layer.source}.cross"],
            ridge=ridge,
        )
        return (tensor.double() + change_HK[torch.tensor(plan.hidden)]).to(tensor.dtype)

    lineage = source.lineage
    if gaps:
        *steps, last = lineage["pruned"]
        done = {"gaps": [list(gap) for gap in gaps], "ridge": ridge}
        lineage = {**lineage, "pruned": [*steps, {**last, "merged": done}]}
    return Checkpoint(
        spec=source.spec,
        family=source.family,
        dtype=source.dtype,
        lineage=lineage,
        files=source.tokenizer_files,
        get=get,
    )
