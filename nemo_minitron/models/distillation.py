"""The student and where its targets come from: a divergence over the full vocabulary, at any TP x PP x DP layout.

A teacher in memory runs its own forward-only pass first and leaves its final hidden states on the last stage; then the
student's ordinary schedule runs. So no message between stages changes, 1F1B and interleaved schedules both work, and
the two models may split their layers differently. The teacher has no gradients, no optimizer state, and is never saved.
"""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from omegaconf import DictConfig

from nemo_minitron.checkpoints.source import PLAN_FILE
from nemo_minitron.config.distillation import DistillationConfig, Objective
from nemo_minitron.config.hidden import HiddenConfig
from nemo_minitron.config.model_settings import ModelSettings
from nemo_minitron.config.training import OptimizerConfig
from nemo_minitron.errors import TrainingError
from nemo_minitron.megatron.forward import Loss, MicroBatch
from nemo_minitron.megatron.model import MinitronGPT, freeze_vocabulary
from nemo_minitron.megatron.optim import StepInfo
from nemo_minitron.models.gpt import MegatronGPTModel, Report, per_token
from nemo_minitron.models.hidden import StateMatching
from nemo_minitron.models.matching import OnePass
from nemo_minitron.models.routers import RouterBalance, RouterMatching
from nemo_minitron.models.targets import CachedTargets, OffloadedTeacher, ResidentTeacher, TargetProvider
from nemo_minitron.pruning.plan import PruningPlan


class MegatronGPTDistillationModel(MegatronGPTModel):
    """A `MegatronGPTModel` that learns from a teacher instead of from the text.

    Args:
        cfg: The student's configuration. `minitron.distillation` holds the keys of `DistillationConfig`: the objective,
            as a recipe's `distill` has it, and `teacher` (a checkpoint) or `cache` (a folder of stored targets).
        trainer: Optional; its strategy must be a `MegatronStrategy`.
        settings: See the base class.

    Attributes:
        objective: What is minimised.
        statistics_every: Steps between those that log everything a validation has; 0 for none.

    A step logs `kl` in nats per token, or `kd` where the objective is another divergence; every `statistics_every`
    steps also `ce`, `teacher_ce`, `agreement` (fraction of tokens whose most likely next token is the same in both) and
    `kl` whatever the objective is. Validation always has them. Where intermediate states are compared, `hidden` is the
    sum over pairs of their loss per token, before balance and weight; where routers are, `router` is their divergence.
    Where their load is balanced, `balance` is that loss: 1 for equal loads.

    From a cache a step logs `kd` and `ce`. Of sampled targets `kd` exceeds the divergence from the teacher by what the
    draws miss of its entropy. Validation is over text that has no targets, and has the cross-entropy alone.

    Raises:
        ConfigError: See the base class.
    """

    loss_name = "loss"

    def __init__(
        self, cfg: DictConfig, trainer: Trainer | None = None, *, settings: ModelSettings | None = None
    ) -> None:
        super().__init__(cfg=cfg, trainer=trainer, settings=settings)
        self.distillation = self.settings.distillation or DistillationConfig()
        self.objective: Objective = self.distillation.objective
        self.statistics_every = 0
        # In a list, so that torch does not register the teacher's weights as the student's.
        self._provider: list[TargetProvider] = []
        self._matching: StateMatching | None = None
        self._routers: RouterMatching | None = None
        self._balance: RouterBalance | None = None

    # -- building ------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Build the student, and read the teacher or open the cache that the configuration names."""
        super().configure_model()
        if self.objective.freeze_embeddings:
            for chunk in self.chunks:
                freeze_vocabulary(chunk)
        if self.objective.balance_weight > 0:
            self._balance = RouterBalance(student=self.spec, runtime=self.runtime)
        if self._provider:
            return
        if self.distillation.cache is not None:
            self.attach_cache(Path(self.distillation.cache))
        elif self.distillation.teacher is not None:
            self.attach_teacher(self.distillation.teacher)

    @property
    def targets(self) -> TargetProvider:
        """Where targets come from.

        Raises:
            TrainingError: Nothing was named or attached.
        """
        if not self._provider:
            raise TrainingError(
                "no teacher",
                rule="minitron.distillation.teacher or minitron.distillation.cache names one",
                remedy="name one, or call attach_teacher()",
            )
        return self._provider[0]

    @property
    def teacher(self) -> list[MinitronGPT]:
        """The teacher's chunks on this rank; none where targets come from a cache."""
        model = self.targets.teacher
        return [] if model is None else model.chunks

    @property
    def teacher_path(self) -> Path | None:
        """The checkpoint of the teacher that is in memory; None without one."""
        teacher = self._provider[0].teacher if self._provider else None
        return None if teacher is None else teacher.restored_from

    def _readers(self) -> list[MinitronGPT]:
        return [*self.chunks, *(self.teacher if self._provider else ())]

    def attach_teacher(self, path: str | Path) -> None:
        """Read a teacher at the student's layout, in its dtype unless told otherwise; freeze it.

        Raises:
            TrainingError: Its vocabulary or tokenizer is not the student's, or `top_k` exceeds it.
        """
        held = self.distillation
        settings = self.settings.model_copy(
            update={
                "precision": held.teacher_precision or self.settings.precision,
                "fp8": held.teacher_fp8,
                "optimizer": None,
                "distillation": None,
            }
        )
        teacher = MegatronGPTModel.restore_from(path, settings=settings, trainer=self._trainer)
        self._check_fits(teacher)
        teacher.requires_grad_(False).eval()
        self._provider = [OffloadedTeacher(teacher) if held.offload_teacher else ResidentTeacher(teacher)]
        if self.objective.hidden is not None:
            self._matching = self._match_states(self.objective.hidden, teacher)
        if self.objective.router_weight > 0:
            plan = self._carried_plan()
            self._routers = RouterMatching(student=self.spec, teacher=teacher.spec, plan=plan, runtime=self.runtime)

    def attach_cache(self, folder: Path, *, order: Sequence[int] | None = None) -> None:
        """Learn from stored targets.

        `order` has the number in the cache of each training sample in order; None if they are the same.

        Raises:
            CacheError: The cache does not fit the model or the objective.
        """
        self._provider = [CachedTargets(folder, self, self.objective, order=order)]

    def _check_fits(self, teacher: MegatronGPTModel) -> None:
        if teacher.spec.vocab_size != self.spec.vocab_size:
            raise TrainingError(
                f"teacher vocabulary {teacher.spec.vocab_size} is not the student's {self.spec.vocab_size}",
                rule="logits are compared token by token",
            )
        if teacher.tokenizer_files.get("tokenizer.json") != self.tokenizer_files.get("tokenizer.json"):
            raise TrainingError("teacher and student have different tokenizers", remedy="prune the student from it")
        if (self.objective.top_k or 0) > self.spec.vocab_size:
            raise TrainingError(
                f"top_k = {self.objective.top_k} of a vocabulary of {self.spec.vocab_size} tokens",
                rule="at most the vocabulary; leave top_k out to compare every token",
            )

    def _match_states(self, compared: HiddenConfig, teacher: MegatronGPTModel) -> StateMatching:
        plan = self._carried_plan()
        fits = plan is not None and plan.spec.hidden_size == teacher.spec.hidden_size
        return StateMatching(
            compared,
            student=self.spec,
            teacher=teacher.spec,
            runtime=self.runtime,
            optimizer=self.settings.optimizer or OptimizerConfig(),
            kept=plan.hidden if plan and fits else None,
        )

    def _carried_plan(self) -> PruningPlan | None:
        """What the student has of its first teacher; None where it does not say."""
        carried = self.tokenizer_files.get(PLAN_FILE)
        return None if carried is None else PruningPlan.from_bytes(carried, where=PLAN_FILE)

    # -- steps ---------------------------------------------------------------------------------------------------

    def training_step(self, batch: MicroBatch, batch_idx: int) -> None:
        """Targets, loss, report, update over one global batch; logs `train/*`. The first step checks the teacher."""
        step = self.trainer.global_step
        micro_batches = self.micro_batches(batch)
        objective = self.objective.at(min(step / max(self.trainer.max_steps - 1, 1), 1.0))
        is_watched = self.statistics_every > 0 and step % self.statistics_every == 0
        self.lightning_optimizer.zero_grad()

        targets = self.fetch_targets(micro_batches)
        loss = self.bind_loss(targets, objective, statistics=is_watched or step == 0)
        report = self.compare(loss, micro_batches, objective, training=True)
        if step == 0:
            self._check_teacher(report)
        info = self.update(report)
        self.log_step(report if is_watched else self._ordinary(report), info)

    def validation_report(self, micro_batches: list[MicroBatch]) -> Report:
        """Targets, loss, report, with the objective that training ends with. From a cache: the cross-entropy alone."""
        if self.targets.teacher is None:
            report = super().validation_report(micro_batches)
            return {**report, "loss": report["ce"]}
        objective = self.objective.at(1.0)
        targets = self.fetch_targets(micro_batches)
        loss = self.bind_loss(targets, objective, statistics=True)
        return self.compare(loss, micro_batches, objective, training=False)

    def fetch_targets(self, micro_batches: list[MicroBatch]) -> Any:
        """What the teacher knows of the micro-batches; its intermediate states go to where they are compared."""
        step = self.trainer.global_step
        with ExitStack() as stack:
            for compared in (self._matching, self._routers):
                if compared is not None:
                    stack.enter_context(compared.capture_teacher(self.teacher))
            targets = self.targets.fetch(micro_batches, step=step)
        if self._matching is not None:
            self._matching.send_targets(micro_batches, self.teacher[0].config.params_dtype)
        if self._routers is not None:
            self._routers.send_targets(micro_batches)
        return targets

    def bind_loss(self, targets: Any, objective: Objective, *, statistics: bool) -> Loss:
        """The loss of one pass over the micro-batches that the targets are of."""
        return self.targets.loss(self, targets, objective, statistics=statistics)

    def compare(self, loss: Loss, micro_batches: list[MicroBatch], objective: Objective, *, training: bool) -> Report:
        """One pass of the student, with the losses at its routers and intermediate states that the objective names."""
        one_pass: OnePass = partial(self.run_pass, loss, micro_batches)
        if self._balance is not None:
            self._balance.expect(micro_batches)
            one_pass = self._balance.around(one_pass, self.chunks, weight=objective.balance_weight)
        if self._routers is not None:
            one_pass = self._routers.around(one_pass, self.chunks, weight=objective.router_weight)
        if self._matching is None:
            return one_pass(training=training)
        return self._matching.run(one_pass, self.chunks, weight=objective.hidden_weight, training=training)

    def update(self, report: Report) -> StepInfo:
        """The student's step and the projection's; see the base class."""
        info = super().update(report)
        if self._matching is not None:
            self._matching.step(tokens=report["tokens"], lr=info.lr, skipped=info.skipped)
        return info

    def _ordinary(self, report: Report) -> Report:
        """Without what only some steps measure: Lightning would show it beside every later one."""
        if self.targets.teacher is None:
            return report  # a cache gives the same at every step
        extra = {"ce", "teacher_ce", "agreement", *(("kl",) if "kd" in report else ())}
        return {name: value for name, value in report.items() if name not in extra}

    def _check_teacher(self, report: Report) -> None:
        """A teacher whose weights were not read predicts no better than a uniform guess.

        Raises:
            TrainingError: Its loss on the first batch is that bad, or not a number.
        """
        if "teacher_ce" not in report:
            return
        cross_entropy, uniform = per_token(report)["teacher_ce"], math.log(self.spec.vocab_size)
        if not cross_entropy < uniform:
            raise TrainingError(
                f"teacher loss on the first batch is {cross_entropy:.3f} nats per token",
                rule=f"a trained teacher is below the uniform guess of {uniform:.3f}",
                remedy="check that the teacher's weights were read and that the data was made with its tokenizer",
            )

    # -- checkpoints ---------------------------------------------------------------------------------------------

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
