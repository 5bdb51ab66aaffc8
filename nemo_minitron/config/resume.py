"""What a training that was stopped had, compared with what is asked now: one table of settings for every door.

A setting that may change holds from the next step on. One that may not is refused, with both values and the reason.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from nemo_minitron.config import nemo_keys


class Change(StrEnum):
    """What becomes of a setting that is another one when a training goes on."""

    FREE = "free"
    """Nothing of the result depends on it."""
    FROM_HERE = "from here"
    """It holds from the next step on, as if it had been asked for from the beginning: a schedule is that of all
    steps, of which those that are left are done."""
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Rule:
    """What may be done with a setting, and why not more."""

    change: Change
    why: str = ""


_FREE, _FROM_HERE = Rule(Change.FREE), Rule(Change.FROM_HERE)
_ORDER = Rule(Change.REFUSED, "the order of samples, and the place in it, follow from it")
_MOMENTS = Rule(Change.REFUSED, "the optimizer's moments and their bias correction are of it")
_OBJECTIVE = Rule(Change.REFUSED, "one training has one objective; its measurements could not be compared")
_TARGETS = Rule(Change.REFUSED, "the targets follow from it")
_BUDGET = Rule(Change.REFUSED, "the number of steps was fixed by it at the start; give `tokens` instead")
_CONVERSATIONS = Rule(Change.REFUSED, "the samples are made of them")
_MEASURED = Rule(Change.REFUSED, "validations before and after could not be compared")

RULES: Mapping[str, Rule] = {
    "tokens": _FROM_HERE,
    **dict.fromkeys(("minutes", "minutes_of"), _BUDGET),
    **dict.fromkeys(("batch.sequence_length", "batch.global_batch_size"), _ORDER),
    "batch.micro_batch_size": _FROM_HERE,
    **dict.fromkeys(("optimizer.lr", "optimizer.min_lr", "optimizer.warmup_steps", "optimizer.schedule"), _FROM_HERE),
    **dict.fromkeys(("optimizer.decay_fraction", "optimizer.weight_decay", "optimizer.eps"), _FROM_HERE),
    **dict.fromkeys(("optimizer.clip_grad", "optimizer.distributed"), _FROM_HERE),
    **dict.fromkeys(("optimizer.beta1", "optimizer.beta2"), _MOMENTS),
    "validate_every": _FROM_HERE,
    "validation_samples": _MEASURED,
    **dict.fromkeys(("checkpoint_every", "keep_last", "async_save", "log_every"), _FREE),
    "patience": _FROM_HERE,
    "finish_with": Rule(Change.REFUSED, "the best weights of the steps before were kept, or not"),
    "guard": _FROM_HERE,
    **dict.fromkeys(("kd_weight", "lm_weight", "hidden_weight", "hidden", "temperature", "divergence"), _OBJECTIVE),
    **dict.fromkeys(("router_weight", "balance_weight"), _OBJECTIVE),
    **dict.fromkeys(("beta", "skew", "top_k", "ramp_to"), _OBJECTIVE),
    "freeze_embeddings": Rule(
        Change.REFUSED, "the optimizer has moments of the weights that are trained, and no other"
    ),
    "loss_chunk_tokens": _FROM_HERE,
    **dict.fromkeys(("teacher_precision", "teacher_fp8"), _TARGETS),
    "offload_teacher": _FROM_HERE,
    **dict.fromkeys(
        ("sources", "prompt_key", "answer_key", "validation_fraction", "too_long", "pack", "reset_attention_mask"),
        _CONVERSATIONS,
    ),
    # What other sections of a recipe say, and keys of hydra scripts.
    "precision": Rule(Change.REFUSED, "weights and moments are kept in it"),
    "seed": _ORDER,
    "parallel": _FROM_HERE,
    **dict.fromkeys(("schedule_steps", "constant_steps"), _FROM_HERE),
    # What is not a setting, and is noted beside them.
    "steps": _FROM_HERE,
    "split_states": Rule(Change.REFUSED, "the checkpoint has the optimizer's states in this form; say which is wanted"),
    "samples": _ORDER,
    "data": Rule(Change.REFUSED, "the place in the order of samples is one of these token files"),
    "student": Rule(Change.REFUSED, "the weights come from the training that was stopped, which began with this one"),
    "architecture": Rule(Change.REFUSED, "the weights are of it"),
    "targets": _TARGETS,
    **dict.fromkeys(("teacher", "cache"), _TARGETS),
}
"""Of each setting of a training by its key in a recipe's section; of a section below that, one rule for all of it."""

SECTIONS = ("correct", "distill", "tune")
"""Sections of a recipe that are a training."""

_NAMES = {
    **{f"optimizer.{field}": f"optimizer.{field} (optim.{key})" for field, key in nemo_keys.OPTIMIZER.items()},
    **{f"batch.{field}": f"batch.{field} ({key})" for field, key in nemo_keys.BATCH.items()},
    "schedule_steps": "optim.sched.max_steps",
    "constant_steps": "optim.sched.constant_steps",
    "steps": "steps (tokens; trainer.max_steps)",
    "split_states": "optimizer.distributed (optim.distributed)",
}
"""What a setting is called in a recipe, and in NeMo's configurations where that is another name."""


@dataclass(frozen=True, slots=True)
class Difference:
    """A setting that is not what it was."""

    key: str
    before: Any
    now: Any

    @property
    def name(self) -> str:
        """The key, with NeMo's where that is another one."""
        return _NAMES.get(self.key, self.key)

    @property
    def rule(self) -> Rule:
        """What may be done about it."""
        return rule_of(self.key)


def rule_of(key: str) -> Rule:
    """The rule of a setting, or of the section that it is in.

    Raises:
        KeyError: Nobody has said what may be done with it.
    """
    place = key
    while place not in RULES and "." in place:
        place = place.rpartition(".")[0]
    return RULES[place]


def setting_of(key: str) -> str | None:
    """A recipe's key as a setting of a training; None where it is none (`score.samples`).

    `distill.optimizer.lr` is `optimizer.lr`; `precision` and `seed` are settings as they stand.
    """
    section, _, rest = key.partition(".")
    if section in SECTIONS:
        return rest
    return key if key in {"precision", "seed"} else None


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Difference]:
    """Settings that both have with unequal values, in the order of the first; what only one of them has is left out."""
    for key, value in before.items():
        if key in now and now[key] != value:
            yield Difference(key, value, now[key])
