"""Settings of supervised fine-tuning: which conversations, and the training on their answers."""

from enum import StrEnum
from typing import Annotated, Self

from pydantic import Field, model_validator

from nemo_minitron.config.base import NonNegativeFloat, Positive
from nemo_minitron.config.training import DistillConfig, TrainingConfig


class TooLong(StrEnum):
    """What happens to a conversation with more tokens than `batch.sequence_length`."""

    CUT = "cut"
    """Its end is cut off; it goes if no answer is left."""
    LEAVE_OUT = "leave_out"


class TuneConfig(TrainingConfig):
    """Supervised fine-tuning of the finished student: cross-entropy on answers, with KL to the teacher if wanted.

    `tokens` counts positions, those of prompts and of padding too.
    """

    sources: tuple[str, ...] = Field(min_length=1)
    """JSONL files, folders of them, or `package:...`: a line is `{"messages": [{"role": ..., "content": ...}, ...]}`,
    or a prompt with its answer."""
    prompt_key: str = "prompt"
    """Field of the prompt in lines without `messages`."""
    answer_key: str = "answer"
    """Field of the answer there."""
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share of conversations that are kept for validation; at least one."""
    too_long: TooLong = TooLong.CUT
    pack: bool = False
    """Put several conversations into one sample, as many as fit, instead of filling up one. Faster."""
    reset_attention_mask: bool = True
    """With `pack`, whether attention stops at the borders of conversations, and positions begin again there, so that
    each is read as if it stood alone. False lets later ones see those before them."""
    lm_weight: NonNegativeFloat = 1.0
    """Factor of the cross-entropy on the answers."""
    kd_weight: NonNegativeFloat = 0.0
    """Factor of the forward KL to the teacher on the answers; above 0 the teacher is held in memory too."""
    temperature: Positive = 1.0
    """As in `distill`."""

    @model_validator(mode="after")
    def _some_loss(self) -> Self:
        if self.lm_weight == 0 and self.kd_weight == 0:
            raise ValueError("lm_weight and kd_weight are both 0: there is nothing to learn")
        return self

    def as_distillation(self) -> DistillConfig:
        """The same training as a distillation, for `kd_weight` above 0."""
        shared = {name: getattr(self, name) for name in TrainingConfig.model_fields}
        return DistillConfig(**shared, kd_weight=self.kd_weight, lm_weight=self.lm_weight, temperature=self.temperature)
