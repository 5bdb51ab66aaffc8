"""What every way of distilling is given: the same models as Hugging Face folders, the same samples in the same order.

Needs torch, transformers and safetensors, so that it also runs in an environment of another library's.
"""

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

TEACHER, STUDENT, SAMPLES = "teacher_hf", "student_hf", "samples.safetensors"


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """One training, as every way of doing it is told."""

    folder: Path
    """Holds `TEACHER`, `STUDENT` and `SAMPLES`."""
    steps: int
    batch: int
    lr: float
    kd_weight: float = 1.0
    lm_weight: float = 0.0
    warmup: float = 0.1
    """Of all steps; after it the rate falls linearly to zero."""
    weight_decay: float = 0.01
    beta2: float = 0.95
    clip: float = 1.0
    freeze_embeddings: bool = False
    validations: int = 8
    """Besides the one before the first step."""
    seed: int = 1234

    @property
    def warmup_steps(self) -> int:
        """Steps in which the rate rises."""
        return max(1, math.ceil(self.warmup * self.steps))

    def rate(self, step: int) -> float:
        """Fraction of the peak rate at a step, from 0; the last one's is zero, as ours."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        return max(0.0, (self.steps - step - 1) / max(1, self.steps - self.warmup_steps))

    def model(self, name: str) -> PreTrainedModel:
        """`TEACHER`, frozen, or `STUDENT`."""
        found = AutoModelForCausalLM.from_pretrained(
            self.folder / name, dtype=torch.float32, attn_implementation="sdpa"
        )
        found.config.use_cache = False
        if name == TEACHER:
            return found.eval().requires_grad_(False)
        if self.freeze_embeddings:
            found.get_input_embeddings().requires_grad_(False)
        return found.train()

    def samples(self, split: str) -> Tensor:
        """Token ids `[samples, sequence_length + 1]` of "train" or "heldout"."""
        found = load_file(self.folder / SAMPLES)[split].long()
        wanted = self.steps * self.batch
        if split == "train" and len(found) < wanted:
            raise SystemExit(f"{self.folder}: {len(found)} samples, {wanted} are needed")
        return found[:wanted] if split == "train" else found


@dataclass(kw_only=True)
class Record:
    """Held-out values over tokens and seconds; the clock stands while they are measured."""

    teacher: PreTrainedModel
    heldout: Tensor
    tokens_per_step: int
    curve: list[dict[str, float]] = field(default_factory=list)
    _seconds: float = 0.0
    _started: float = field(default_factory=time.perf_counter)

    def start(self) -> None:
        """Let the clock run, from what it stood at."""
        self._started = time.perf_counter()

    def reset(self) -> None:
        """Begin at zero seconds."""
        self._seconds = 0.0
        self.start()

    def measure(self, student: PreTrainedModel, step: int) -> None:
        """Add a point of the curve; the clock stands meanwhile and runs afterwards."""
        self._seconds += time.perf_counter() - self._started
        was_training = student.training
        kl, ce = divergence(student.eval(), self.teacher, self.heldout)
        student.train(was_training)
        tokens = step * self.tokens_per_step
        self.curve.append({"tokens": tokens, "seconds": round(self._seconds, 3), "kl": kl, "ce": ce})
        print(f"  {tokens:>8,} tokens {self._seconds:8.1f} s  KL {kl:.4f}  CE {ce:.4f}", flush=True)
        self.start()


@torch.no_grad()
def divergence(student: PreTrainedModel, teacher: PreTrainedModel, heldout: Tensor) -> tuple[float, float]:
    """KL of the teacher's distribution to the student's, and the student's cross-entropy, in nats per token."""
    kl = ce = 0.0
    for sample in heldout:
        tokens, labels = sample[None, :-1], sample[1:]
        logp = F.log_softmax(teacher(tokens).logits[0].float(), -1)
        logq = F.log_softmax(student(tokens).logits[0].float(), -1)
        kl += float(F.kl_div(logq, logp, log_target=True, reduction="sum"))
        ce += float(F.nll_loss(logq, labels, reduction="sum"))
    count = heldout[:, 1:].numel()
    return kl / count, ce / count


def is_due(step: int, lesson: Lesson) -> bool:
    """Whether a validation follows the step of this number, from 1."""
    every = max(1, math.ceil(lesson.steps / lesson.validations))
    return step % every == 0 or step == lesson.steps


def write(path: Path, trainer: str, lesson: Lesson, record: Record, **more: Any) -> None:
    """The result as JSON."""
    settings = {key: str(value) if key == "folder" else value for key, value in vars(lesson).items()}
    settings.pop("folder")
    result = {"trainer": trainer, "settings": settings, "threads": torch.get_num_threads(), "torch": torch.__version__}
    path.write_text(json.dumps({**result, **more, "curve": record.curve}, indent=1) + "\n", encoding="utf-8")
