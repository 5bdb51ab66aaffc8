"""The student with its teacher: a divergence over the full vocabulary, at any TP x PP x DP layout.

The teacher runs its own forward-only pass first and leaves its final hidden states on the last stage; then the
student's ordinary schedule runs. So no message between stages changes, 1F1B and interleaved schedules both work, and
the two models may split their layers differently. The teacher has no gradients, no optimizer state, and is never saved.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from nemo_minitron.checkpoints.source import PLAN_FILE
from nemo_minitron.config.hidden import HiddenConfig
from nemo_minitron.config.load import check
from nemo_minitron.errors import TrainingError
from nemo_minitron.megatron import forward
from nemo_minitron.megatron.forward import MicroBatch
from nemo_minitron.megatron.model import MinitronGPT, freeze_vocabulary
from nemo_minitron.megatron.offload import OffloadedLayers
from nemo_minitron.megatron.optim import StepInfo
from nemo_minitron.models import nemo_settings
from nemo_minitron.models.gpt import MegatronGPTModel, Report, per_token
from nemo_minitron.models.hidden import StateMatching
from nemo_minitron.models.losses import DistillationLoss, tensor_group
from nemo_minitron.models.ramp import at_step
from nemo_minitron.ops.divergence import Divergence
from nemo_minitron.pruning.plan import PruningPlan


class MegatronGPTDistillationModel(MegatronGPTModel):
    """A `MegatronGPTModel` that learns from a teacher instead of from the text.

    Args:
        cfg: The student's configuration. `minitron.distillation` holds `teacher` (a `.nemo` file or folder),
            `temperature`, `kd_weight`, `lm_weight`, `freeze_embeddings`, `loss_chunk_tokens`, `teacher_precision`
            (None for the student's), `teacher_fp8`, `offload_teacher` (its layers wait in host memory between passes),
            `divergence` (`kind`, `beta`, `skew`; forward KL if absent), `top_k` (teacher's tokens; None for all),
            `hidden` (intermediate states to compare; None for none) and `hidden_weight`.
        trainer: Optional; its strategy must be a `MegatronStrategy`.

    A step logs `kl` in nats a token, or `kd` where the objective is another divergence; with `statistics` also `ce`,
    `teacher_ce`, `agreement` (share of tokens whose most likely next token is the same in both) and `kl` whatever the
    objective is. Validation always has them. Where intermediate states are compared, `hidden` is the sum over pairs of
    their loss a token, before balance and weight.
    """

    objective = "loss"

    def __init__(self, cfg: DictConfig, trainer: Trainer | None = None) -> None:
        super().__init__(cfg=cfg, trainer=trainer)
        self._teacher: list[MegatronGPTModel] = []
        self._offloaded: OffloadedLayers | None = None
        self._matching: StateMatching | None = None
        self.statistics = False

    @property
    def distillation(self) -> Any:
        """The `minitron.distillation` block of the configuration."""
        return self._cfg.get("minitron", {}).get("distillation", {})

    @property
    def teacher(self) -> list[MinitronGPT]:
        """The teacher's chunks on this rank.

        Raises:
            TrainingError: None was attached.
        """
        if not self._teacher:
            raise TrainingError("no teacher", rule="minitron.distillation.teacher names one, or call attach_teacher()")
        return self._teacher[0].chunks

    def attach_teacher(self, path: str | Path) -> None:
        """Read a teacher at the student's layout, in its numbers unless told otherwise; freeze it.

        Raises:
            TrainingError: Its vocabulary or tokenizer is not the student's, or `top_k` exceeds it.
        """
        config = MegatronGPTModel.restore_from(path, return_config=True)
        for key in ("precision", "micro_batch_size"):
            config[key] = self._cfg[key]
        config["precision"] = self.distillation.get("teacher_precision") or config["precision"]
        OmegaConf.update(config, "minitron.fp8", bool(self.distillation.get("teacher_fp8")), force_add=True)
        teacher = MegatronGPTModel.restore_from(path, override_config_path=config, trainer=self._trainer)
        if teacher.spec.vocab_size != self.spec.vocab_size:
            raise TrainingError(
                f"teacher vocabulary {teacher.spec.vocab_size} is not the student's {self.spec.vocab_size}",
                rule="logits are compared token by token",
            )
        if teacher.tokenizer_files.get("tokenizer.json") != self.tokenizer_files.get("tokenizer.json"):
            raise TrainingError("teacher and student have different tokenizers", remedy="prune the student from it")
        if (self.distillation.get("top_k") or 0) > self.spec.vocab_size:
            raise TrainingError(
                f"top_k = {self.distillation['top_k']} of a vocabulary of {self.spec.vocab_size} tokens",
                rule="at most the vocabulary; leave top_k out to compare every token",
            )
        teacher.requires_grad_(False).eval()
        # In a plain list, so that torch does not register the teacher's weights as the student's.
        self._teacher = [teacher]
        if self.distillation.get("offload_teacher"):
            self._offloaded = OffloadedLayers(teacher.chunks, self.runtime.device)
        if self.distillation.get("hidden"):
            self._matching = self._match_states(teacher)

    def _match_states(self, teacher: MegatronGPTModel) -> StateMatching:
        carried = self.tokenizer_files.get(PLAN_FILE)
        plan = None if carried is None else PruningPlan.from_bytes(carried, where=PLAN_FILE)
        fits = plan is not None and plan.spec.hidden_size == teacher.spec.hidden_size
        return StateMatching(
            check(HiddenConfig, OmegaConf.to_container(self.distillation["hidden"]), source="model configuration"),
            student=self.spec,
            teacher=teacher.spec,
            runtime=self.runtime,
            optimizer=nemo_settings.optimizer_config(self._cfg.get("optim") or {}),
            kept=plan.hidden if plan and fits else None,
        )

    def configure_model(self) -> None:
        """Build the student and, if the configuration names one, read the teacher."""
        super().configure_model()
        if self.distillation.get("freeze_embeddings"):
            for chunk in self.chunks:
                freeze_vocabulary(chunk)
        if not self._teacher and self.distillation.get("teacher"):
            self.attach_teacher(self.distillation["teacher"])

    def apply_gradients(self, report: Report, values: Report) -> StepInfo:
        """The student's step and the projection's; see the base class."""
        info = super().apply_gradients(report, values)
        if self._matching is not None:
            self._matching.step(tokens=report["tokens"], lr=info.lr, skipped=info.skipped)
        return info

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The projection between hidden states goes into training checkpoints."""
        super().on_save_checkpoint(checkpoint)
        if self._matching is not None:
            checkpoint["minitron_hidden"] = self._matching.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """And comes back."""
        super().on_load_checkpoint(checkpoint)
        if self._matching is not None:
            self._matching.load_state_dict(checkpoint["minitron_hidden"])

    def run_schedule(self, batch: MicroBatch, *, training: bool) -> Report:
        """Teacher's pass, then the student's schedule; see the base class. The first step checks the teacher."""
        if not training or self.trainer.global_step > 0:
            return super().run_schedule(batch, training=training)
        wanted, self.statistics = self.statistics, True
        report = super().run_schedule(batch, training=True)
        self.statistics = wanted
        self._check_teacher(per_token(report)["teacher_ce"])
        if wanted:
            return report
        # Lightning would show what only the first step has beside every later one.
        extra = {"ce", "teacher_ce", "agreement", *(("kl",) if "kd" in report else ())}
        return {name: value for name, value in report.items() if name not in extra}

    def run_loss(self, loss: Callable[..., Any], micro_batches: list[MicroBatch], *, training: bool) -> Report:
        """One pass, which also compares intermediate states if the configuration names some; see the base class."""
        matching = self._matching
        if matching is None:
            return super().run_loss(loss, micro_batches, training=training)
        if not training:
            return self._measured(matching, loss, micro_batches)
        if matching.measures_first:
            report = self._measured(matching, loss, micro_batches)
            matching.balance(_divergence(report), report["hidden"])
        assert matching.factor is not None, "measured just now, or before"
        weight = matching.factor * at_step(self.distillation, "hidden_weight", 1.0, self.trainer, training=True)
        with matching.compared(self.chunks, weight=weight):
            report = super().run_loss(loss, micro_batches, training=True)
        report["hidden"] = matching.total()
        report["loss"] += weight * report["hidden"]
        matching.balance(_divergence(report), report["hidden"])
        return report

    def _measured(self, matching: StateMatching, loss: Callable[..., Any], micro_batches: list[MicroBatch]) -> Report:
        """Forward only; the hidden loss is reported, and no part of the loss."""
        with matching.compared(self.chunks, weight=None):
            report = super().run_loss(loss, micro_batches, training=False)
        return {**report, "hidden": matching.total()}

    def make_loss(self, micro_batches: list[MicroBatch], *, training: bool) -> DistillationLoss:
        """Run the teacher over the micro-batches and bind its states to the loss."""
        lent = self._offloaded.on_device() if self._offloaded else nullcontext()
        seen = self._matching.of_teacher(self.teacher) if self._matching else nullcontext()
        with lent, seen, torch.no_grad():
            states: list[Tensor] = forward.collect_hidden(self.teacher, micro_batches, self.runtime)
        if self._matching is not None:
            self._matching.deliver(micro_batches, self.teacher[0].config.params_dtype)
        return DistillationLoss(
            student=self.chunks[-1],
            teacher=self.teacher[-1],
            teacher_states=states,
            vocab_size=self.spec.vocab_size,
            tensor_group=tensor_group(self.runtime),
            divergence=Divergence(**(self.distillation.get("divergence") or {})),
            top_k=self.distillation.get("top_k"),
            temperature=at_step(self.distillation, "temperature", 1.0, self.trainer, training=training),
            kd_weight=at_step(self.distillation, "kd_weight", 1.0, self.trainer, training=training),
            lm_weight=at_step(self.distillation, "lm_weight", 0.0, self.trainer, training=training),
            chunk_tokens=self.distillation.get("loss_chunk_tokens"),
            statistics=self.statistics or not training,
        )

    def _check_teacher(self, cross_entropy: float) -> None:
        """A teacher whose weights were not read predicts no better than a uniform guess.

        Raises:
            TrainingError: Its loss on the first batch is that bad, or not a number.
        """
        uniform = math.log(self.spec.vocab_size)
        if not cross_entropy < uniform:
            raise TrainingError(
                f"teacher loss on the first batch is {cross_entropy:.3f} nats a token",
                rule=f"a trained teacher is below the uniform guess of {uniform:.3f}",
                remedy="check that the teacher's weights were read and that the data was made with its tokenizer",
            )


def _divergence(report: Report) -> float:
    """Sum over tokens of the divergence that the student is trained with."""
    return report["kd"] if "kd" in report else report["kl"]
