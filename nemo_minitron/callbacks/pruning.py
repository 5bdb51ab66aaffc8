"""A pruned student from an ordinary `trainer.validate` over calibration data: scores, plan and checkpoint."""

import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from nemo_minitron.arch.layer import COUNT_KEYS
from nemo_minitron.callbacks.importance import ImportanceCallback
from nemo_minitron.checkpoints.formats import FORMATS
from nemo_minitron.checkpoints.open import open_checkpoint
from nemo_minitron.config.depth import BLOCK_INFLUENCE
from nemo_minitron.config.load import check
from nemo_minitron.config.run import ExportFormat
from nemo_minitron.config.sizes import TargetConfig
from nemo_minitron.data.tokenizer import digest_of_files
from nemo_minitron.errors import MinitronError, PlanError
from nemo_minitron.megatron import runtime as megatron_runtime
from nemo_minitron.megatron.forward import MicroBatch
from nemo_minitron.models.gpt import MegatronGPTModel, gpt_model
from nemo_minitron.models.nemo_settings import plain
from nemo_minitron.pruning.apply import PrunedSource
from nemo_minitron.pruning.build import build_plan
from nemo_minitron.pruning.plan import PruningPlan
from nemo_minitron.pruning.sizes import student_spec
from nemo_minitron.pruning.write import write_checkpoint


class PruningCallback(Callback):
    """Prunes a model at the end of a validation over calibration data.

    It takes its scores from the `ImportanceCallback` that stands before it in the trainer's list, or measures them
    itself where there is none. Rank 0 decides and writes; the others wait. Every validation but the sanity check
    replaces what the last one left.

    Args:
        target: Sizes of the student: a `TargetConfig`, or its keys as a mapping.
        folder: Gets `scores.safetensors`, `plan.json`, and the student as `student.nemo`, `student_hf/` or both. All
            ranks see it.
        formats: What to write the student as.
        source: The checkpoint to cut, tensor by tensor, in its own numbers. None: the one that the model was restored
            from; a model made from scratch, or trained since, is saved by all ranks first, and cut from there.

    Attributes:
        plan: What stays, the same on every rank; None before a validation has ended.
        students: Where each format is.

    Raises:
        ConfigError: `target` has keys that it should not, or sizes that no model has; at once.
    """

    def __init__(
        self,
        target: TargetConfig | Mapping[str, Any],
        folder: str | Path,
        *,
        formats: Sequence[ExportFormat | str] = tuple(ExportFormat),
        source: str | Path | None = None,
    ) -> None:
        self.target = _target(target)
        self.folder = Path(folder)
        self.formats = tuple(ExportFormat(kind) for kind in formats)
        self.source = None if source is None else Path(source)
        self.plan: PruningPlan | None = None
        self.students: dict[ExportFormat, Path] = {}
        self._own: ImportanceCallback | None = None
        self._others: ImportanceCallback | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot come out well, before the model runs.

        Raises:
            PlanError: A size that cannot be, or layers to be chosen by what a validation does not measure.
            SpecError: `config.json` cannot say the student's architecture.
            CheckpointError: The source cannot be read, or holds another model.
            MinitronError: The folder cannot be made, or the `ImportanceCallback` comes later in the trainer's list.
        """
        model = gpt_model(pl_module)
        _claim(self.folder)
        student = student_spec(self.target, model.spec)
        _check_depth(self.target)
        check_merging(self.target, where="PruningCallback")
        for kind in self.formats:
            FORMATS[kind].check(student, model.family)
        if (source := self._checkpoint(model)) is not None:
            PruningPlan.keep_all(model.spec).check_fits(open_checkpoint(source).spec, where=str(source))
        self._others = _importance_before(self, trainer)
        self._own = ImportanceCallback() if self._others is None else None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach the hooks, unless another callback has."""
        if self._own is not None:
            self._own.on_validation_start(trainer, pl_module)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: MicroBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Tell the hooks which tokens count."""
        if self._own is not None:
            self._own.on_validation_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Decide, and write scores, plan and student.

        Raises:
            ScoresError: The scores are another model's or another tokenizer's, or not finite.
            CheckpointError: The student could not be written; what was there before is complete.
        """
        if self._own is not None:
            self._own.on_validation_end(trainer, pl_module)
        if trainer.sanity_checking:
            return
        scratch, model = None, gpt_model(pl_module)
        if (source := self._checkpoint(model)) is None:
            source = scratch = self.folder / ".teacher"
            model.save_to(scratch)
        try:
            work = partial(self._prune, model, source)
            self.plan, self.students = megatron_runtime.on_rank_zero(work, doing="prunes")
        finally:
            if scratch is not None and trainer.is_global_zero:
                shutil.rmtree(scratch, ignore_errors=True)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take the hooks off when validation breaks."""
        if self._own is not None:
            self._own.on_exception(trainer, pl_module, exception)

    def _checkpoint(self, model: MegatronGPTModel) -> Path | None:
        """The checkpoint that holds the model's weights as they are; None when there is none."""
        if self.source is not None:
            return self.source
        trained = bool(model.training_chunks)
        return None if trained else model.restored_from

    def _prune(self, model: MegatronGPTModel, source: Path) -> tuple[PruningPlan, dict[ExportFormat, Path]]:
        importance = self._own or self._others
        scores = None if importance is None else importance.scores
        assert scores is not None, "validation has ended"
        scores.check_made_for(model.spec, tokenizer_digest=digest_of_files(model.tokenizer_files))
        plan = build_plan(scores, self.target, model.spec)
        student = PrunedSource(open_checkpoint(source), plan)
        name = "student" + (FORMATS[self.formats[0]].suffix if len(self.formats) == 1 else "")
        try:
            scores.save(self.folder / "scores.safetensors")
            plan.save(self.folder / "plan.json")
            return plan, write_checkpoint(student, self.folder / name, self.formats)
        except OSError as error:
            raise MinitronError(f"PruningCallback: rank 0 could not write ({error})") from error


def _check_depth(target: TargetConfig) -> None:
    counts = any(getattr(target, key) is not None for key in ("num_layers", *COUNT_KEYS))
    chosen = counts and target.drop_layers is None and target.random_seed is None
    if chosen and (target.depth_metric != BLOCK_INFLUENCE or target.depth_contiguous):
        raise PlanError(
            f"PruningCallback: depth_metric = {target.depth_metric}, depth_contiguous = {target.depth_contiguous}",
            rule="one validation measures the block influence of each layer, and no more of depth",
            remedy="name the layers with drop_layers, or score and prune with a recipe (score.depth.metrics)",
        )


def check_merging(target: TargetConfig, *, where: str) -> None:
    """Whether a target can be met from scores alone.

    Args:
        target: What is wanted.
        where: Who is asked, for the message.

    Raises:
        PlanError: Layers are to be merged.
    """
    if target.merge_layers:
        raise PlanError(
            f"{where}: merge_layers = true",
            rule="merging needs a second pass over calibration text, when it is known which layers go",
            remedy="leave it out, or score and prune with a recipe",
        )


def _claim(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MinitronError(
            f"PruningCallback: {folder} cannot be made ({error})", remedy="name another folder"
        ) from error


def _target(target: TargetConfig | Mapping[str, Any]) -> TargetConfig:
    if isinstance(target, TargetConfig):
        return target
    return check(TargetConfig, plain(target), source="target of PruningCallback")


def _importance_before(callback: PruningCallback, trainer: Trainer) -> ImportanceCallback | None:
    """The trainer's `ImportanceCallback`, which must have ended when the pruning begins."""
    callbacks: list[Callback] = getattr(trainer, "callbacks", [])
    found = next((other for other in callbacks if isinstance(other, ImportanceCallback)), None)
    if found is not None and callbacks.index(found) > callbacks.index(callback):
        raise MinitronError(
            "PruningCallback stands before ImportanceCallback in the trainer's list",
            rule="callbacks end in the order of the list, and pruning needs the scores",
            remedy="exchange the two, or leave ImportanceCallback out",
        )
    return found
