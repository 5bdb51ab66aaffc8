"""Which intermediate states of student and teacher are compared, and how much that counts."""

from enum import StrEnum
from typing import Self

from pydantic import Field, model_validator

from nemo_minitron.config.base import Section
from nemo_minitron.config.objective import HiddenLossKind

StatePair = tuple[int, int]
"""A teacher's state and a student's. State `k` is what enters layer `k`, after that layer's first norm; state
`num_layers` is what the final norm returns."""


class HiddenBalance(StrEnum):
    """What makes the intermediate losses as large as the divergence of the logits."""

    PREVIOUS_STEP = "previous_step"
    """The ratio of the two in the step before. The first step's is measured by a forward pass of its own."""
    SAME_STEP = "same_step"
    """The ratio in the step itself, known before its backward passes from a forward pass of the student beforehand:
    about a fifth more time."""
    NONE = "none"
    """Nothing: the sum as it is."""


class HiddenConfig(Section):
    """Losses between states after a norm, summed over pairs of layers, through one learned projection for all pairs.

    The papers use them where many layers go, between the last layers but two (arXiv:2407.14679, table 17).
    """

    layers: tuple[StatePair, ...] = Field(default=())
    """Pairs [teacher's layer, student's layer] whose outputs are compared, after the norm that follows; counted from
    0, or from the end as -3."""
    embedding: bool = False
    """Compare the embeddings too, after the first layer's norm."""
    kind: HiddenLossKind = HiddenLossKind.COSINE
    """`cosine`: 1 - the cosine of the angle between two states; `mse`: mean over channels of the squared difference."""
    balance: HiddenBalance = HiddenBalance.PREVIOUS_STEP
    projection: bool | None = None
    """Map the student's states by a learned matrix, which begins as the choice of channels that pruning kept; None:
    where hidden sizes differ."""

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not self.layers and not self.embedding:
            raise ValueError("nothing to compare: give pairs of layers, or embedding: true")
        return self

    def states(self, teacher_layers: int, student_layers: int) -> tuple[tuple[StatePair, ...], list[str]]:
        """The pairs of states that are compared, and what is wrong with the pairs of layers."""
        pairs: list[StatePair] = [(0, 0)] if self.embedding else []
        problems = []
        for theirs, own in self.layers:
            for layer, count, model in ((theirs, teacher_layers, "teacher"), (own, student_layers, "student")):
                if not -count <= layer < count:
                    problems.append(
                        f"distill.hidden.layers: [{theirs}, {own}]: the {model} has layers 0 to {count - 1}"
                    )
            pairs.append((theirs % teacher_layers + 1, own % student_layers + 1))
        if len(set(pairs)) < len(pairs):
            problems.append("distill.hidden.layers: a pair is named twice")
        return tuple(pairs), problems
