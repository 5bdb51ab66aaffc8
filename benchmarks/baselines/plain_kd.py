"""Distil with what others have: a plain loop over `transformers` models, TRL's GKDTrainer, or ModelOpt's KDTrainer.

    python -m benchmarks.baselines.plain_kd --folder WORK --trainer plain --steps 60 --lr 3e-4 --out plain.json

WORK is what `compare` writes for a seed. The plain loop is meant to be the best that fits on a page: no KV cache, the
teacher without gradients, one log-softmax a model that both parts of the loss share, torch's fused AdamW. TRL (1.16.0)
and ModelOpt (0.47.0) train on KL alone, and then take the loop's steps to rounding, which a test shows where they are
installed: what they differ in is time. Held-out KL and cross-entropy against tokens and seconds go into a JSON file;
loading and validating are not timed.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
import transformers
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import AutoTokenizer, PreTrainedModel, TrainerCallback, TrainingArguments

from benchmarks.baselines.lessons import STUDENT, TEACHER, Lesson, Record, is_due, write


def plain(lesson: Lesson, student: PreTrainedModel, record: Record) -> None:
    """The loop that one writes by hand."""
    samples = lesson.samples("train").split(lesson.batch)
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": lesson.weight_decay},
        {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lesson.lr, betas=(0.9, lesson.beta2), eps=1e-8, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lesson.rate)
    record.start()
    for step, batch in enumerate(samples, start=1):
        optimizer.zero_grad()
        loss(lesson, student, record.teacher, batch).backward()
        torch.nn.utils.clip_grad_norm_(trained, lesson.clip)
        optimizer.step()
        schedule.step()
        if is_due(step, lesson):
            record.measure(student, step)


def loss(lesson: Lesson, student: PreTrainedModel, teacher: PreTrainedModel, batch: Tensor) -> Tensor:
    """Mean over the tokens of a batch `[b, s + 1]`."""
    tokens, labels = batch[:, :-1], batch[:, 1:]
    with torch.no_grad():
        logp = F.log_softmax(teacher(tokens).logits.float(), -1)
    logq = F.log_softmax(student(tokens).logits.float(), -1)
    total = lesson.kd_weight * F.kl_div(logq, logp, log_target=True, reduction="sum")
    if lesson.lm_weight:
        total = total + lesson.lm_weight * F.nll_loss(logq.flatten(0, 1), labels.flatten(), reduction="sum")
    return total / labels.numel()


class Watch(TrainerCallback):
    """Validates as the plain loop does."""

    def __init__(self, lesson: Lesson, record: Record) -> None:
        self.lesson, self.record = lesson, record

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock."""
        self.record.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Validate where it is due."""
        if is_due(state.global_step, self.lesson):
            self.record.measure(given["model"], state.global_step)


class Rows(torch.utils.data.Dataset):
    """Samples as a Trainer takes them."""

    def __init__(self, samples: Tensor) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One sample; every token but the first is predicted."""
        ids = self._samples[index]
        return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


def stacked(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch."""
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def arguments(lesson: Lesson, kind: type[TrainingArguments], **more: Any) -> TrainingArguments:
    """The lesson in a Trainer's words."""
    return kind(
        output_dir=str(lesson.folder / "trainer"),
        max_steps=lesson.steps,
        per_device_train_batch_size=lesson.batch,
        learning_rate=lesson.lr,
        weight_decay=lesson.weight_decay,
        adam_beta2=lesson.beta2,
        max_grad_norm=lesson.clip,
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        seed=lesson.seed,
        **more,
    )


def as_told(trainer: Any, lesson: Lesson) -> None:
    """Let a Trainer read its samples as they come, at the rates of the lesson (of its own, the first is zero)."""

    def schedule(num_training_steps: int, optimizer: Any = None) -> torch.optim.lr_scheduler.LambdaLR:
        trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or trainer.optimizer, lesson.rate)
        return trainer.lr_scheduler

    trainer._get_train_sampler = lambda *_: SequentialSampler(trainer.train_dataset)
    trainer.create_scheduler = schedule


def trl(lesson: Lesson, student: PreTrainedModel, record: Record) -> None:
    """`GKDTrainer` off-policy (`lmbda=0`) with forward KL (`beta=0`)."""
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    config = arguments(lesson, GKDConfig, lmbda=0.0, beta=0.0, temperature=1.0, gradient_checkpointing=False)
    trainer = GKDTrainer(
        model=student,
        teacher_model=record.teacher,
        args=config,
        data_collator=stacked,
        train_dataset=_as_dataset(lesson),
        processing_class=AutoTokenizer.from_pretrained(lesson.folder / STUDENT),
        callbacks=[Watch(lesson, record)],
    )
    as_told(trainer, lesson)
    trainer.train()


def _as_dataset(lesson: Lesson) -> Any:
    from datasets import Dataset

    samples = lesson.samples("train")
    rows = {
        "input_ids": samples.tolist(),
        "labels": samples.tolist(),
        "attention_mask": torch.ones_like(samples).tolist(),
    }
    return Dataset.from_dict(rows).with_format("torch")


def modelopt(lesson: Lesson, student: PreTrainedModel, record: Record) -> None:
    """ModelOpt's `KDTrainer` with its KL of logits."""
    from modelopt.torch.distill.plugins.huggingface import KDTrainer

    trainer = KDTrainer(
        model=student,
        args=arguments(lesson, TrainingArguments, gradient_checkpointing=False),
        data_collator=stacked,
        train_dataset=Rows(lesson.samples("train")),
        callbacks=[Watch(lesson, record)],
        distill_args={"distill": True, "teacher_model": record.teacher, "criterion": "logits_loss", "temperature": 1.0},
    )
    as_told(trainer, lesson)
    trainer.train()


TRAINERS: dict[str, Callable[[Lesson, PreTrainedModel, Record], None]] = {
    "plain": plain,
    "trl": trl,
    "modelopt": modelopt,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--trainer", choices=TRAINERS, default="plain")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--kd-weight", type=float, default=1.0)
    parser.add_argument("--lm-weight", type=float, default=0.0)
    parser.add_argument("--freeze-embeddings", action="store_true")
    parser.add_argument("--validations", type=int, default=8)
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--threads", type=int, help="of torch; all that there are if left out")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.trainer != "plain" and (args.kd_weight, args.lm_weight) != (1.0, 0.0):
        parser.error(f"{args.trainer} trains on KL alone: leave --kd-weight and --lm-weight out")
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    lesson = Lesson(
        **{key: getattr(args, key) for key in ("folder", "steps", "batch", "lr", "kd_weight", "lm_weight", "seed")},
        freeze_embeddings=args.freeze_embeddings,
        validations=args.validations,
    )
    heldout = lesson.samples("heldout")
    per_step = args.batch * (heldout.shape[1] - 1)
    student, record = (
        lesson.model(STUDENT),
        Record(teacher=lesson.model(TEACHER), heldout=heldout, tokens_per_step=per_step),
    )
    record.reset()
    record.measure(student, 0)
    record.curve[0]["seconds"] = 0.0
    record.reset()
    TRAINERS[args.trainer](lesson, student, record)
    write(args.out, args.trainer, lesson, record, transformers=transformers.__version__)


if __name__ == "__main__":
    main()
