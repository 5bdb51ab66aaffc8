"""The front door of the hydra scripts in `examples/`: every key is checked, or refused by name, before anything starts.

A script's configuration has NeMo's form: `trainer` (Lightning's arguments), `exp_manager`, `model` (NeMo-1 keys), and a
section of the script's own. What NeMo-1 says in `trainer` and we say elsewhere is taken over from there.
"""

import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from lightning.pytorch import Trainer
from nemo.utils.exp_manager import ExpManagerConfig
from omegaconf import DictConfig, OmegaConf

from nemo_minitron.config.base import Section
from nemo_minitron.config.load import check
from nemo_minitron.config.model_settings import ModelSettings
from nemo_minitron.config.nemo_keys import Neutral, unused
from nemo_minitron.config.parallel import Precision
from nemo_minitron.config.training import OptimizerConfig, TrainingConfig
from nemo_minitron.errors import ConfigError, MinitronError, denied
from nemo_minitron.models import nemo_settings, resume
from nemo_minitron.models.data import TokenDataModule
from nemo_minitron.models.nemo_settings import SettingsReader, unknown_key

SectionT = TypeVar("SectionT", bound=Section)

USER_ERROR = 2
_OWN_TRAINER = "the script makes it; write a script of your own to take another"
TRAINER: Mapping[str, Neutral] = {
    "accumulate_grad_batches": Neutral((1,), "model.global_batch_size says how many micro-batches are accumulated"),
    "gradient_clip_algorithm": Neutral(("norm",), "gradients are clipped by their global norm"),
    "use_distributed_sampler": Neutral((False,), "the data module gives each data-parallel rank its share"),
    "replace_sampler_ddp": Neutral((False,), "the data module gives each data-parallel rank its share"),
    "limit_train_batches": Neutral((1.0,), "trainer.max_steps is the number of steps, each on samples of its own"),
    "overfit_batches": Neutral((0.0, 0), "every step has samples of its own"),
    **dict.fromkeys(("strategy", "callbacks", "plugins"), Neutral((), _OWN_TRAINER)),
    "barebones": Neutral((False,), "losses are logged"),
    "sync_batchnorm": Neutral((False,), "no layer normalises over batches"),
}
"""Arguments of Lightning's trainer that are not passed on, and what they may be."""
_TAKEN_OVER = ("gradient_clip_val", "precision")
_TOP = ("name", "trainer", "exp_manager", "model", "run")
"""`run` is NeMo-Framework-Launcher's."""


@dataclass(frozen=True, kw_only=True)
class Script(Generic[SectionT]):
    """What a script was asked for, checked; `trainer` are arguments of Lightning's, `section` is the script's own."""

    checkpoint: Path
    data: Path
    settings: ModelSettings
    trainer: Mapping[str, Any]
    section: SectionT


def distillation_script(cfg: DictConfig) -> Script[TrainingConfig]:
    """The configuration of megatron_gpt_distillation.py; its section is made of `trainer` and `model`.

    Raises:
        ConfigError: With every problem found.
    """
    door = _Door(nemo_settings.plain(cfg), checkpoint="student", also=("validation_samples",), trains=True)
    door.exp_manager()
    settings = door.settings()
    held = settings.distillation if settings is not None else None
    if settings is not None and (held is None or held.teacher is held.cache is None):
        door.problems.append("model.minitron.distillation.teacher: is missing; name a checkpoint, or a cache")
    steps = door.trainer.get("max_steps")
    if type(steps) is not int or steps < 1:
        door.problems.append(f"trainer.max_steps = {steps!r}: the number of optimizer steps")
    if settings is None or door.problems or type(steps) is not int:
        raise ConfigError("hydra configuration", door.problems)
    values = {"batch": settings.batch, "tokens": steps * settings.batch.tokens_per_step}
    if "validation_samples" in door.model:
        values["validation_samples"] = door.model["validation_samples"]
    try:
        training = check(TrainingConfig, values, source="")
    except ConfigError as error:
        raise ConfigError("hydra configuration", [f"model.{problem}" for problem in error.problems]) from error
    return door.script(settings, training)


def calibration_script(cfg: DictConfig, section: str, kind: type[SectionT]) -> Script[SectionT]:
    """The configuration of megatron_gpt_score.py or megatron_gpt_prune.py.

    Raises:
        ConfigError: With every problem found.
    """
    door = _Door(nemo_settings.plain(cfg), checkpoint="restore_from_path", section=section, trains=False)
    settings = door.settings()
    try:
        own = check(kind, door.part(section), source="")
    except ConfigError as error:
        door.problems += [f"{section}.{problem}" for problem in error.problems]
    if settings is None or door.problems:
        raise ConfigError("hydra configuration", door.problems)
    return door.script(settings, own)


def resumed_settings(script: Script[TrainingConfig], trainer: Trainer, data: TokenDataModule) -> ModelSettings:
    """The settings of a script's model, compared with the checkpoint that `exp_manager` goes on from, if there is one.

    It is done before any model is read. What the configuration leaves open about the form of the optimizer's states is
    as it is there.

    Raises:
        TrainingError: Something was changed that cannot change while a training goes on.
        CheckpointError: It is no training checkpoint.
    """
    settings = script.settings
    if trainer.ckpt_path is None:
        return settings
    checkpoint = Path(trainer.ckpt_path)
    if settings.optimizer is not None:
        optimizer = resume.with_states_of(settings.optimizer, checkpoint)
        settings = settings.model_copy(update={"optimizer": optimizer})
    now = resume.asked(settings, steps=script.trainer["max_steps"], data=data, student=script.checkpoint)
    resume.compare(checkpoint, now, tell=lambda line: None)
    return settings


@contextmanager
def reported_errors() -> Iterator[None]:
    """Errors of users as one message and exit status 2, as the command line has them, instead of hydra's traceback."""
    try:
        yield
    except MinitronError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(USER_ERROR) from None
    except Exception as error:
        if (refused := denied(error)) is None:
            raise
        print(f"error: {refused}", file=sys.stderr, flush=True)
        raise SystemExit(USER_ERROR) from None


class _Door:
    """Notes every problem of a script's configuration."""

    def __init__(
        self,
        cfg: Mapping[str, Any],
        *,
        checkpoint: str,
        trains: bool,
        section: str | None = None,
        also: tuple[str, ...] = (),
    ) -> None:
        self.problems: list[str] = []
        self._cfg, self._checkpoint, self._trains = cfg, checkpoint, trains
        known = [name for name in (*_TOP, section) if name and (trains or name != "exp_manager")]
        self.model, self.trainer = self.part("model"), self.part("trainer")
        self._own = (checkpoint, "data", *also)
        self._reader = SettingsReader(self.model, prefix="model.", also=self._own)
        for name in cfg:
            if name == "restore_from_path" and cfg[name] is None:
                continue
            if name not in known:
                self.problems.append(unknown_key(name, known))

    def part(self, name: str) -> dict[str, Any]:
        """A section of the configuration; noted if it is none."""
        found = self._cfg.get(name) or {}
        if isinstance(found, dict):
            return found
        self.problems.append(f"{name} = {found!r}: a mapping of keys")
        return {}

    def settings(self) -> ModelSettings | None:
        """What the model is told, with what `trainer` says of it."""
        for key in (self._checkpoint, "data"):
            if not isinstance(self.model.get(key), str):
                shown = "is missing" if self.model.get(key) is None else f"= {self.model[key]!r}"
                self.problems.append(
                    f"model.{key}: {shown}; the path of a {'folder' if key == 'data' else 'checkpoint'}"
                )
        found = self._reader.settings()
        self.problems += self._reader.problems
        clip = self._trainer_problems(found)
        if found is None or not self._trains:
            return found
        optimizer = found.optimizer or OptimizerConfig()
        if clip is not None:
            optimizer = optimizer.model_copy(update={"clip_grad": float(clip)})
        return found.model_copy(update={"optimizer": optimizer})

    def script(self, settings: ModelSettings, section: SectionT) -> Script[SectionT]:
        """All of it."""
        passed = {key: value for key, value in self.trainer.items() if key not in (*TRAINER, *_TAKEN_OVER)}
        return Script(
            checkpoint=Path(self.model[self._checkpoint]),
            data=Path(self.model["data"]),
            settings=settings,
            trainer=passed | {"use_distributed_sampler": False},
            section=section,
        )

    def exp_manager(self) -> None:
        """Look for keys that NeMo's exp_manager does not know; it would end with a traceback, later."""
        self._compare(self.part("exp_manager"), OmegaConf.structured(ExpManagerConfig), "exp_manager.")

    def _compare(self, given: Mapping[str, Any], known: Any, prefix: str) -> None:
        for key, value in given.items():
            if key not in known:
                self.problems.append(unknown_key(f"{prefix}{key}", [f"{prefix}{name}" for name in known]))
            elif (
                isinstance(value, Mapping)
                and OmegaConf.is_dict(known[key])
                and OmegaConf.get_type(known[key]) is not dict
            ):
                self._compare(value, known[key], f"{prefix}{key}.")

    def _trainer_problems(self, settings: ModelSettings | None) -> float | None:
        """Note what cannot be; returns the gradient norm that `trainer` clips to."""
        arguments = [name for name in inspect.signature(Trainer.__init__).parameters if name != "self"]
        for key in self.trainer:
            if key not in arguments and key not in TRAINER:
                self.problems.append(unknown_key(f"trainer.{key}", [f"trainer.{name}" for name in arguments]))
        self.problems += unused(self.trainer, TRAINER, "trainer.")
        self._precision(settings)
        clip = self.trainer.get("gradient_clip_val")
        if clip is None:
            return None
        if not self._trains:
            self.problems.append(f"trainer.gradient_clip_val = {clip!r}: nothing is trained; leave it out")
        elif isinstance(clip, bool) or not isinstance(clip, int | float) or clip < 0:
            self.problems.append(f"trainer.gradient_clip_val = {clip!r}: a gradient norm, or 0 for no clipping")
        elif (own := (self.model.get("optim") or {}).get("clip_grad", clip)) != clip:
            self.problems.append(f"trainer.gradient_clip_val = {clip!r}, but model.optim.clip_grad = {own!r}; give one")
        else:
            return float(clip)
        return None

    def _precision(self, settings: ModelSettings | None) -> None:
        """Lightning is never told the precision; what `trainer` says must be what the model computes in."""
        value = self.trainer.get("precision")
        if value is None or settings is None:
            return
        wanted = SettingsReader({"precision": value}, prefix="trainer.")
        found: ModelSettings | None = wanted.settings()
        self.problems += wanted.problems
        if found is not None and found.precision is not settings.precision:
            model = nemo_settings.precision_key(settings.precision or Precision.FP32)
            self.problems.append(
                f"trainer.precision = {value!r}, but model.precision = {model!r}; give the second alone"
            )
