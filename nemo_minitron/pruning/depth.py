"""Depth scores: what a model loses without a layer, or without several in a row; part of the score file.

A candidate is a block of consecutive layers to leave out, `(first, length)`. A metric sums a loss (lower: better) over
tokens or samples, once for the complete model and once without each candidate. Names in the file, all float64:

    depth.blocks              first layer and length of each candidate          [candidates, 2]
    depth.samples             calibration samples                              []
    depth.{metric}.sum        summed loss without each candidate                [candidates]
    depth.{metric}.base       the complete model's                                []
    depth.{metric}.count      what they are divided by: tokens, or samples      []

Sums add up over shards of data and over ranks. What a candidate is worth (higher: more important) is the increase of
the mean loss, `(sum - base) / count`. The exception is `logit_mse`, whose base is the complete model's summed squared
logits: it is worth `sum / base`, with `sum = sum (M_full - M_without)^2` over tokens and vocabulary (Nemotron Elastic,
arXiv:2511.16664).
"""

from collections.abc import Iterable, Mapping
from typing import Self

import torch
from torch import Tensor

from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.config.depth import BLOCK_INFLUENCE, LOGIT_MSE
from nemo_minitron.config.sizes import TargetConfig
from nemo_minitron.errors import ScoresError
from nemo_minitron.ops.ranking import top_indices
from nemo_minitron.pruning.ranges import to_ranges

PREFIX = "depth."

Block = tuple[int, int]
"""First layer, counted from 0, and number of layers."""


def candidate_blocks(num_layers: int, lengths: Iterable[int] = (1,)) -> tuple[Block, ...]:
    """Every block of some lengths, in order of first layer and length.

    Args:
        num_layers: Of the model.
        lengths: Layers of a block; those that would leave no layer over have no candidates.
    """
    possible = [length for length in sorted(lengths) if length <= max(num_layers - 1, 1)]
    return tuple((first, n) for first in range(num_layers) for n in possible if first + n <= num_layers)


class DepthScores:
    """Depth metrics of one model over some calibration text. They do not depend on any parallel layout.

    Args:
        spec: The model that was scored.
        tensors: The float64 sums by name; kept, not copied.

    Raises:
        ScoresError: A sum is missing, unknown, of the wrong shape, or not finite (names the layers), a candidate cannot
            be, or nothing was counted.
    """

    def __init__(self, spec: ModelSpec, tensors: Mapping[str, Tensor]) -> None:
        self.spec = spec
        self.tensors = dict(tensors)
        _check(spec, self.tensors)

    @classmethod
    def from_tensors(cls, spec: ModelSpec, tensors: Mapping[str, Tensor]) -> Self | None:
        """Those of a score file's tensors that belong here; None when none do."""
        mine = {name: tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}
        return cls(spec, mine) if mine else None

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The candidates, in order."""
        return _blocks(self.tensors)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of what was measured."""
        return _metrics(self.tensors)

    @property
    def samples(self) -> int:
        """Calibration samples; 0 if all metrics brought their own texts."""
        return int(self.tensors["depth.samples"])

    def values(self, metric: str) -> Tensor:
        """What each candidate is worth `[candidates]`: nats per token for `lm_loss`, a ratio for `logit_mse`.

        Raises:
            ScoresError: The metric was not measured.
        """
        if metric not in self.metrics:
            raise ScoresError(
                f"depth metric {metric} is not in the scores, which have {', '.join(self.metrics)}",
                remedy=f"add it to score.depth.metrics and score again (--from score), or choose another "
                f"target.depth_metric: {BLOCK_INFLUENCE}, {', '.join(self.metrics)}",
            )
        sums, base, count = (self.tensors[f"depth.{metric}.{part}"] for part in ("sum", "base", "count"))
        return sums / base if metric == LOGIT_MSE else (sums - base) / count

    def base(self, metric: str) -> float:
        """The complete model's mean of a metric; of `logit_mse`, its squared logits per token."""
        return float(self.tensors[f"depth.{metric}.base"] / self.tensors[f"depth.{metric}.count"])

    def layers(self, metric: str) -> Tensor:
        """What each single layer is worth `[layers]`."""
        return self.curve(metric, 1)

    def curve(self, metric: str, length: int) -> Tensor:
        """What each block of `length` layers is worth, by first layer: `[layers - length + 1]`.

        Raises:
            ScoresError: The metric was not measured, or not for such blocks.
        """
        places = {block: index for index, block in enumerate(self.blocks)}
        wanted = [(first, length) for first in range(self.spec.num_layers - length + 1)]
        if not all(block in places for block in wanted):
            raise ScoresError(
                f"depth metric {metric} was not measured for blocks of {length} layers",
                rule=f"the scores have blocks of {to_ranges(self.lengths)} layers",
                remedy="set score.depth.blocks=true (with shortest_block, longest_block and single_layers as needed) "
                "and score again (--from score)",
            )
        return self.values(metric)[[places[block] for block in wanted]]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Numbers of layers that candidates have, ascending."""
        return tuple(sorted({length for _, length in self.blocks}))

    def best_block(self, metric: str, length: int) -> int:
        """First layer of the block of `length` layers that is worth least; the lowest of equals."""
        return int(self.curve(metric, length).argmin())

    def merge(self, other: "DepthScores") -> "DepthScores":
        """The sums of two that were measured on different text.

        Raises:
            ScoresError: They are of different models, candidates or metrics.
        """
        differing = {
            "models": self.spec != other.spec,
            "candidates": self.blocks != other.blocks,
            f"metrics ({', '.join(self.metrics)}; {', '.join(other.metrics)})": set(self.metrics) != set(other.metrics),
        }
        if found := [what for what, differs in differing.items() if differs]:
            raise ScoresError(
                f"depth scores of different {', '.join(found)}",
                rule="scores that are merged measure the same thing on different text",
                remedy="score with the same model and the same score.depth",
            )
        summed = {name: tensor + other.tensors[name] for name, tensor in self.tensors.items()}
        return DepthScores(self.spec, summed | {"depth.blocks": self.tensors["depth.blocks"]})

    def joined(self, others: Iterable["DepthScores"]) -> "DepthScores":
        """These and other metrics of the same candidates, in one."""
        tensors = dict(self.tensors)
        for other in others:
            if self.blocks != other.blocks or set(self.metrics) & set(other.metrics):
                raise ScoresError("depth scores of other candidates, or of the same metrics", rule="other metrics")
            tensors = other.tensors | tensors
        return DepthScores(self.spec, tensors)


def kept_layers(block_influence: Tensor, depth: DepthScores | None, target: TargetConfig, keep: int) -> tuple[int, ...]:
    """The layers that stay, as `target.depth_metric` and `target.depth_contiguous` say; ties go to the lower index.

    Args:
        block_influence: `[layers]`.
        depth: The score file's depth metrics, if it has any.
        target: What is wanted.
        keep: How many layers stay.

    Raises:
        ScoresError: The scores lack what the target asks for; says how to get it.
    """
    metric, total = target.depth_metric, block_influence.numel()
    if metric == BLOCK_INFLUENCE:
        return _indices(block_influence, keep)
    if depth is None:
        raise ScoresError(
            f"target.depth_metric = {metric}, and the scores hold no depth metrics",
            rule="a layer choice by another metric than block influence needs that metric in the score file",
            remedy=f"set score.depth.metrics=[{metric}] and score again (--from score)",
        )
    if not target.depth_contiguous or keep == total:
        return _indices(depth.layers(metric), keep)
    first = depth.best_block(metric, total - keep)
    return tuple(layer for layer in range(total) if not first <= layer < first + total - keep)


def block_text(block: Block) -> str:
    """A candidate in words: `layer 3`, or `layers 3-5`."""
    first, length = block
    return f"layer {first}" if length == 1 else f"layers {first}-{first + length - 1}"


def _indices(values: Tensor, keep: int) -> tuple[int, ...]:
    return tuple(top_indices(values, keep=keep).tolist())


def _blocks(tensors: Mapping[str, Tensor]) -> tuple[Block, ...]:
    return tuple((int(first), int(length)) for first, length in tensors["depth.blocks"].tolist())


def _metrics(tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    return tuple(name.split(".")[1] for name in tensors if name.count(".") == 2 and name.endswith(".sum"))


def _check(spec: ModelSpec, tensors: Mapping[str, Tensor]) -> None:
    blocks = _checked_blocks(spec, tensors)
    metrics = _metrics(tensors)
    if not metrics:
        raise ScoresError("depth scores without a metric", rule="at least one")
    shapes: dict[str, tuple[int, ...]] = {"depth.blocks": (len(blocks), 2), "depth.samples": ()}
    for metric in metrics:
        shapes |= {f"depth.{metric}.sum": (len(blocks),), f"depth.{metric}.base": (), f"depth.{metric}.count": ()}
    if differing := sorted(set(shapes) ^ set(tensors)):
        raise ScoresError(f"depth scores: {', '.join(differing)} missing or unknown")
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape or tensors[name].dtype != torch.float64:
            raise ScoresError(
                f"depth scores: {name} is {tensors[name].dtype} shaped {tuple(tensors[name].shape)}",
                rule=f"float64 shaped {shape}",
            )
    for metric in metrics:
        _check_metric(metric, blocks, tensors)
    if not 0 <= float(tensors["depth.samples"]) < float("inf"):
        raise ScoresError(f"depth scores: depth.samples = {float(tensors['depth.samples']):g}", rule="at least 0")


def _checked_blocks(spec: ModelSpec, tensors: Mapping[str, Tensor]) -> tuple[Block, ...]:
    shape = tuple(tensors["depth.blocks"].shape) if "depth.blocks" in tensors else ()
    if len(shape) != 2 or shape[1] != 2 or not bool(torch.isfinite(tensors["depth.blocks"]).all()):
        raise ScoresError(f"depth scores: depth.blocks shaped {shape}", rule="first layer and length of each candidate")
    blocks = _blocks(tensors)
    outside = [block for block in blocks if block[0] < 0 or block[1] < 1 or sum(block) > spec.num_layers]
    if outside or len(set(blocks)) < len(blocks):
        raise ScoresError(
            f"depth scores: candidates {outside or 'named twice'}",
            rule=f"blocks of the model's {spec.num_layers} layers, each once",
        )
    if not blocks:
        raise ScoresError("depth scores without a candidate", rule="at least one")
    for length in sorted({length for _, length in blocks}):
        firsts = {first for first, n in blocks if n == length}
        if missing := sorted(set(range(spec.num_layers - length + 1)) - firsts):
            raise ScoresError(
                f"depth scores: {' and '.join(block_text((first, length)) for first in missing)} not measured",
                rule="every block of a length is a candidate, or none is",
            )
    return blocks


def _check_metric(metric: str, blocks: tuple[Block, ...], tensors: Mapping[str, Tensor]) -> None:
    sums, base, count = (tensors[f"depth.{metric}.{part}"] for part in ("sum", "base", "count"))
    places = [f"without {block_text(block)}" for block in blocks]
    wrong = [place for place, value in zip(places, sums.tolist(), strict=True) if not _finite(value)]
    if not _finite(float(base)):
        wrong = ["of the complete model"]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise ScoresError(
            f"depth scores: {metric} {wrong[0]}{more} is NaN or infinite",
            rule="losses are finite numbers",
            remedy="look for overflow in the layers after it; calibrate in bf16 or fp32, not fp16",
        )
    if float(count) <= 0 or (metric == LOGIT_MSE and float(base) <= 0):
        raise ScoresError(f"depth scores: {metric} counts nothing", rule="at least one token")


def _finite(value: float) -> bool:
    return bool(torch.isfinite(torch.tensor(value)))
