"""A training that goes on from a checkpoint: what it had is stored there, and compared with what is asked of it now.

The checkpoint's part is read and compared before any weight is. Every door goes through here: recipes and scripts as
soon as they know the checkpoint, and `MegatronStrategy` for whoever calls `trainer.fit(ckpt_path=...)`.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.checkpoints.identity import weights_digest
from nemo_minitron.config.distillation import Objective, TeacherConfig
from nemo_minitron.config.model_settings import ModelSettings
from nemo_minitron.config.resume import Change, Difference, differences
from nemo_minitron.config.training import OptimizerConfig
from nemo_minitron.errors import TrainingError
from nemo_minitron.megatron import optim, runtime
from nemo_minitron.megatron.sharded_io import read_common

T = TypeVar("T")
KEY = "minitron_training"
"""Where a checkpoint's common part has the record."""
_DIGITS = 16
"""Of a digest that is shown."""


@runtime_checkable
class DescribedData(Protocol):
    """A data module that says what the order of its samples follows from."""

    def described(self) -> dict[str, Any]:
        """Settings, and digests of the files."""


@dataclass(frozen=True, slots=True)
class TrainingRecord:
    """What a training has, as a checkpoint keeps it.

    Attributes:
        settings: All that is compared, by the keys of `config.resume`; plain data.
        step: Steps that were done.
        changes: Settings that have changed on the way: the last step with the old value, the key, and both values.
    """

    settings: Mapping[str, Any]
    step: int = 0
    changes: tuple[Mapping[str, Any], ...] = ()

    def as_plain(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "settings": dict(self.settings),
            "step": self.step,
            "changes": [dict(change) for change in self.changes],
        }

    @classmethod
    def read(cls, folder: Path) -> "TrainingRecord | None":
        """That of a checkpoint; None where an earlier version wrote it, or the folder is none.

        Raises:
            CheckpointError: It cannot be read.
        """
        data = read_common(folder).get(KEY)
        return None if data is None else cls(data["settings"], data["step"], tuple(data["changes"]))

    def going_on_with(self, now: Mapping[str, Any], *, checkpoint: Path) -> "TrainingRecord":
        """The record of the training that goes on from here as it is asked for now.

        Raises:
            TrainingError: With every setting that cannot change, both values, and why.
        """
        found = list(differences(self.settings, now))
        problems = [
            f"{each.name}: {_shown(each.before)} in the checkpoint, now {_shown(each.now)}; {each.rule.why}"
            for each in found
            if each.rule.change is Change.REFUSED
        ]
        if problems := problems + self._steps_problems(now):
            listing = "\n".join(f"  - {problem}" for problem in problems)
            raise TrainingError(
                f"{checkpoint} (step {self.step}): {len(problems)} setting(s) cannot change while a training goes on"
                f"\n{listing}",
                rule="learning rate, schedule, weight decay, clipping, steps, micro-batch size and layout may change",
                remedy="set them back; or begin a new training: `--from STAGE` in a run folder, "
                "exp_manager.resume_if_exists=false and another exp_manager.exp_dir in a script",
            )
        noted = [
            {"step": self.step, "key": each.key, "before": each.before, "now": each.now}
            for each in found
            if each.rule.change is Change.FROM_HERE
        ]
        return TrainingRecord(now, self.step, (*self.changes, *noted))

    def _steps_problems(self, now: Mapping[str, Any]) -> list[str]:
        """What is wrong with another number of steps."""
        change = Difference("steps", self.settings["steps"], now["steps"])
        said = f"{change.name}: {change.before} in the checkpoint, now {change.now}"
        if 0 <= change.now < self.step:
            return [f"{said}; {self.step} are done"]
        if not 0 <= change.before < change.now:
            return []
        if now["targets"] == "cache":
            return [f"{said}; the cache holds targets of the samples of so many steps"]
        if now.get("samples") == "blend":
            return [f"{said}; so many steps' samples were blended, and more would be other ones"]
        return []


def with_states_of(optimizer: OptimizerConfig, checkpoint: Path) -> OptimizerConfig:
    """An optimizer's settings for a training that goes on: what they leave open is as the checkpoint has it.

    Optimizer states that are split over data-parallel ranks lie in another form than those that are not.

    Raises:
        CheckpointError: The checkpoint cannot be read.
    """
    record = TrainingRecord.read(checkpoint)
    if record is None or optimizer.distributed is not None:
        return optimizer
    return optimizer.model_copy(update={"distributed": record.settings["split_states"]})


def lines(before: TrainingRecord | None, after: TrainingRecord) -> list[str]:
    """What to tell the user of a training that goes on."""
    if before is None:
        return ["the checkpoint is of an earlier version: what it was trained with is not known, and not compared"]
    return [
        f"{Difference(change['key'], None, None).name}: {_shown(change['before'])} up to step {change['step']}, "
        f"{_shown(change['now'])} from step {change['step'] + 1} on"
        for change in after.changes[len(before.changes) :]
    ]


def asked(
    settings: ModelSettings,
    *,
    steps: int,
    data: object = None,
    student: Path | None = None,
    teacher: Path | None = None,
    spec: ModelSpec | None = None,
) -> dict[str, Any]:
    """All that is compared, as it is asked for now. Every rank calls it; rank 0 looks at the checkpoints.

    Args:
        settings: What the model is told.
        steps: Of the training in all.
        data: The data module; what is not `DescribedData` is not compared.
        student: The checkpoint that training began with, where it began with one.
        teacher: The teacher's, where it is not named in the settings.
        spec: The architecture, where it is known already.
    """
    held = settings.distillation
    if held is not None:
        teacher = teacher or (None if held.teacher is None else Path(held.teacher))
    paths = {
        "student": student,
        "teacher": teacher,
        "cache": None if held is None or held.cache is None else Path(held.cache) / "cache.json",
    }
    found = {
        "steps": steps,
        **_plain(settings),
        **({} if spec is None else {f"architecture.{key}": value for key, value in spec.to_dict().items()}),
        **runtime.on_rank_zero(lambda: _identities(paths), doing="looks at teacher and student"),
        **(data.described() if isinstance(data, DescribedData) else {}),
    }
    plain: dict[str, Any] = json.loads(json.dumps(found))
    return plain


def compare(checkpoint: Path, now: Mapping[str, Any], *, tell: Callable[[str], None]) -> TrainingRecord:
    """Compare what a checkpoint had with what is asked for now; tells what changes. Every rank calls it.

    Raises:
        TrainingError: See `TrainingRecord.going_on_with`.
        CheckpointError: The folder is no training checkpoint.
    """
    before = TrainingRecord.read(checkpoint)
    after = TrainingRecord(now) if before is None else before.going_on_with(now, checkpoint=checkpoint)
    for line in lines(before, after):
        tell(line)
    return after


def _plain(settings: ModelSettings) -> dict[str, Any]:
    """Settings as plain data, by the keys of a recipe's section."""
    whole = settings.model_dump(mode="json")
    sections = {"optimizer": whole["optimizer"] or {}, "guard": whole["guard"]}
    found = {f"{name}.{key}": value for name, values in sections.items() for key, value in values.items()}
    found |= {key: whole[key] for key in ("precision", "seed", "schedule_steps", "constant_steps")}
    found["batch.micro_batch_size"] = settings.batch.micro_batch_size
    # Where it is left open, the devices and the layout decide.
    found.pop("optimizer.distributed", None)
    found["split_states"] = settings.optimizer is not None and optim.is_distributed(settings.optimizer)
    held = settings.distillation
    if held is None:
        return {**found, "targets": "text"}
    told = whole["distillation"]
    found |= {key: told[key] for kind in (Objective, TeacherConfig) for key in kind.model_fields}
    found["teacher_precision"] = told["teacher_precision"] or whole["precision"]
    return {**found, "targets": "teacher" if held.cache is None else "cache"}


def _identities(paths: Mapping[str, Path | None]) -> dict[str, str]:
    """A digest of each checkpoint that can be read; training says what is wrong with one that cannot."""
    found = {}
    for name, path in paths.items():
        try:
            if path is not None and path.exists():
                found[name] = weights_digest(path)[:_DIGITS]
        except OSError:
            continue
    return found


def _shown(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{', '.join(map(_shown, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)
