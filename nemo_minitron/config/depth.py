"""Which depth metrics are measured, and how the layers that go are chosen by them."""

import re
from typing import Annotated, Self

from pydantic import AfterValidator, model_validator

from nemo_minitron.config.base import Count, Section

BLOCK_INFLUENCE = "block_influence"
"""1 - cos(input, output) of each layer; every score file has it."""
LM_LOSS = "lm_loss"
"""Nats a token that the next-token loss rises by."""
LOGIT_MSE = "logit_mse"
"""Squared change of the logits over their squares."""
MEASURED = (LM_LOSS, LOGIT_MSE)

_IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def _metric(value: str) -> str:
    if value not in MEASURED and not _IMPORT_PATH.fullmatch(value):
        free = f" ({BLOCK_INFLUENCE} is always measured)" if value == BLOCK_INFLUENCE else ""
        raise ValueError(f"one of {', '.join(MEASURED)}, or package.module:name of a metric of your own{free}")
    return value


class DepthConfig(Section):
    """What leaving layers out costs. Nothing is measured unless metrics are named."""

    metrics: tuple[Annotated[str, AfterValidator(_metric)], ...] = ()
    """`lm_loss` (rise of the next-token loss, nats per token), `logit_mse` (squared change of the logits over their
    squares), or `package.module:name` of a `DepthMetric` of your own, known by that name from then on."""
    blocks: bool = False
    """Measure blocks of consecutive layers too, which `target.depth_contiguous` chooses from. For L layers this costs
    about L^2 / 6 forward passes; single layers cost L / 2."""
    longest_block: Count | None = None
    """Layers of the longest block; None for every length."""
    shortest_block: Count = 1
    """Layers of the shortest block. With `longest_block` the same, only blocks of the length that will go are measured,
    which costs about half as many passes as there are such blocks."""
    single_layers: bool = True
    """Measure every single layer too, whatever `shortest_block` is. Without them a choice of blocks costs about half,
    and the report draws no bars of layers left out one by one."""
    samples: Count = 8
    """Calibration samples they are measured on, of `score.sequence_length` tokens."""

    @property
    def names(self) -> tuple[str, ...]:
        """The metrics' names in the score file."""
        return tuple(metric.rpartition(":")[2] for metric in self.metrics)

    def lengths(self, num_layers: int) -> tuple[int, ...]:
        """Numbers of layers of the candidates in a model of `num_layers`, ascending."""
        if not self.blocks:
            return (1,)
        longest = min(self.longest_block or num_layers, num_layers - 1)
        lengths = set(range(self.shortest_block, longest + 1))
        return tuple(sorted(lengths | {1} if self.single_layers else lengths))

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        problems = []
        if len(set(self.names)) < len(self.names):
            problems.append(f"metrics {list(self.metrics)} give a name twice")
        if reserved := [m for m in self.metrics if ":" in m and m.rpartition(":")[2] in (BLOCK_INFLUENCE, *MEASURED)]:
            problems.append(f"metrics {reserved} have the name of a metric that exists; rename them")
        if self.blocks and not self.metrics:
            problems.append("blocks = true measures nothing without metrics, such as [lm_loss]")
        if self.longest_block is not None and not self.blocks:
            problems.append("longest_block needs blocks = true")
        if self.shortest_block > 1 and not self.blocks:
            problems.append("shortest_block needs blocks = true")
        if not self.single_layers and not self.blocks:
            problems.append("single_layers = false leaves nothing to measure without blocks = true")
        if self.longest_block is not None and self.shortest_block > self.longest_block:
            problems.append(f"shortest_block = {self.shortest_block} is above longest_block = {self.longest_block}")
        if problems:
            raise ValueError("; ".join(problems))
        return self


def target_problems(score: DepthConfig, metric: str, *, contiguous: bool) -> list[str]:
    """What a target's choice of layers asks for that scoring will not measure."""
    problems = []
    if metric not in (BLOCK_INFLUENCE, *score.names):
        problems.append(
            f"target.depth_metric = {metric!r} is not measured: add it to score.depth.metrics, or choose one of "
            f"{', '.join((BLOCK_INFLUENCE, *score.names))}"
        )
    if contiguous and metric == BLOCK_INFLUENCE:
        problems.append(
            f"target.depth_contiguous = true needs a metric of complete blocks: set target.depth_metric to {LM_LOSS} "
            f"or another of score.depth.metrics"
        )
    elif contiguous and not score.blocks:
        problems.append("target.depth_contiguous = true needs blocks: set score.depth.blocks=true")
    if not contiguous and metric != BLOCK_INFLUENCE and not score.single_layers:
        problems.append(
            f"target.depth_metric = {metric!r} chooses layers one by one, and score.depth.single_layers = false does "
            f"not measure them so: set it to true, or target.depth_contiguous=true"
        )
    return problems
