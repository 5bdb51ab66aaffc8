"""NeMo-1 configuration keys to one `ModelSettings`, checked as strictly as a recipe, and back."""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_minitron.config import nemo_keys
from nemo_minitron.config.base import Section
from nemo_minitron.config.distillation import DistillationConfig
from nemo_minitron.config.dtypes import DTYPE_WORDS, dtype_name
from nemo_minitron.config.load import check, known_keys
from nemo_minitron.config.model_settings import ModelSettings
from nemo_minitron.config.parallel import ParallelConfig, Precision
from nemo_minitron.config.training import BatchConfig, GuardConfig, OptimizerConfig, Schedule
from nemo_minitron.errors import ConfigError

SectionT = TypeVar("SectionT", bound=Section)

_PRECISIONS = {"bfloat16": Precision.BF16, "float32": Precision.FP32}
_SCHEDULES = {
    "CosineAnnealing": Schedule.COSINE,
    "WarmupAnnealing": Schedule.LINEAR,
    "WarmupHoldPolicy": Schedule.CONSTANT,
    "WarmupStableDecay": Schedule.WSD,
}
_SOURCE = "model configuration"
_OURS: dict[str, type[Section]] = {"guard": GuardConfig, "parallel": ParallelConfig, "distillation": DistillationConfig}


def model_settings(
    cfg: Mapping[str, Any] | DictConfig, *, inherited: Mapping[str, Any] | DictConfig | None = None
) -> ModelSettings:
    """The settings of a NeMo configuration; absent keys have the defaults of a recipe.

    Args:
        cfg: Keys of a NeMo-1 GPT model, and our own under `minitron`.
        inherited: The configuration that came with a checkpoint. What is the same there was not asked for: such keys
            are read where they are known, and are no error where they are not.

    Raises:
        ConfigError: With every unknown key, every value that cannot be, and every request that nothing here meets.
    """
    reader = SettingsReader(plain(cfg), inherited=plain(inherited or {}))
    settings = reader.settings()
    if settings is None:
        raise ConfigError(_SOURCE, reader.problems)
    return settings


def plain(cfg: Any, *, resolve: bool = True) -> dict[str, Any]:
    """A configuration as plain data, interpolations resolved unless told otherwise.

    Raises:
        ConfigError: It is no mapping, or an interpolation leads nowhere.
    """
    if not OmegaConf.is_config(cfg):
        return dict(cfg)
    try:
        data = OmegaConf.to_container(cfg, resolve=resolve)
    except OmegaConfBaseException as error:
        raise ConfigError(_SOURCE, [" ".join(str(error).split())]) from error
    if not isinstance(data, dict):
        raise ConfigError(_SOURCE, ["a mapping of keys"])
    return {str(key): value for key, value in data.items()}


class SettingsReader:
    """Reads the keys of a model, and notes every problem instead of ending at the first.

    Args:
        cfg: Plain data.
        inherited: See `model_settings`.
        prefix: What stands before every key in messages.
        also: Keys beside a model's that the caller reads.

    Attributes:
        problems: What was found so far.
    """

    def __init__(
        self,
        cfg: Mapping[str, Any],
        *,
        inherited: Mapping[str, Any] | None = None,
        prefix: str = "",
        also: Iterable[str] = (),
    ) -> None:
        self.problems: list[str] = []
        self._cfg = cfg
        self._prefix = prefix
        self._also = tuple(also)
        self._given = _difference(cfg, inherited or {})

    def settings(self) -> ModelSettings | None:
        """The settings; None where there are problems."""
        self._look_for_unknown_keys()
        minitron = self._mapping("minitron", self._cfg.get("minitron"))
        sections = {
            name: self._section(kind, minitron[name], f"minitron.{name}")
            for name, kind in _OURS.items()
            if minitron.get(name) is not None and kind is not ParallelConfig
        }
        values = {
            **sections,
            "parallel": self._parallel(minitron),
            "batch": self._renamed(BatchConfig, self._fields(self._cfg, nemo_keys.BATCH), nemo_keys.BATCH),
            "precision": self._precision(),
            **self._optimizer(),
            **{key: self._cfg[key] for key in ("seed",) if self._cfg.get(key) is not None},
            **{key: minitron[key] for key in ("fp8",) if minitron.get(key) is not None},
        }
        if self.problems:
            return None
        return self._section(ModelSettings, {key: value for key, value in values.items() if value is not None}, "")

    # -- what nobody knows, or nothing meets ---------------------------------------------------------------------

    def _look_for_unknown_keys(self) -> None:
        given = self._given
        optim = self._mapping("optim", given.get("optim"))
        levels: list[tuple[str, Mapping[str, Any], Iterable[str], Mapping[str, nemo_keys.Neutral]]] = [
            ("", given, (*nemo_keys.ARCHITECTURE, *nemo_keys.READ), nemo_keys.NEUTRAL),
            ("optim.", optim, nemo_keys.OPTIM, nemo_keys.NEUTRAL_OPTIM),
            (
                "optim.sched.",
                self._mapping("optim.sched", optim.get("sched")),
                nemo_keys.SCHED,
                nemo_keys.NEUTRAL_SCHED,
            ),
            (
                "minitron.",
                self._mapping("minitron", given.get("minitron")),
                nemo_keys.MINITRON,
                nemo_keys.NEUTRAL_MINITRON,
            ),
        ]
        for level, keys, known, neutral in levels:
            unread = {key: value for key, value in keys.items() if level or key not in self._also}
            for key in unread:
                if key not in known and key not in neutral:
                    self.problems.append(unknown_key(f"{level}{key}", (*_dotted_keys(), *self._also), self._prefix))
            self.problems += nemo_keys.unused(unread, neutral, self._prefix + level)
        self.problems += [
            f"{self._prefix}{key}: is missing and has no default" for key, value in _leaves(given) if value == MISSING
        ]

    # -- sections ------------------------------------------------------------------------------------------------

    def _section(self, kind: type[SectionT], data: Any, name: str) -> SectionT | None:
        """A section of ours under its own keys."""
        dot = f"{name}." if name else ""
        try:
            return check(kind, self._mapping(name, data), source=_SOURCE)
        except ConfigError as error:
            self.problems += [f"{self._prefix}{dot}{problem}" for problem in error.problems]
            return None

    def _renamed(self, kind: type[SectionT], data: dict[str, Any], names: Mapping[str, str], at: str = "") -> Any:
        """A section of ours under NeMo's keys; messages name those."""
        try:
            return check(kind, data, source=_SOURCE)
        except ConfigError as error:
            for problem in error.problems:
                field = next((name for name in names if problem.startswith((f"{name} ", f"{name}:"))), "")
                named = f"{at}{names[field]}{problem.removeprefix(field)}" if field else f"{at.rstrip('.')}: {problem}"
                self.problems.append(f"{self._prefix}{named}")
            return None

    def _mapping(self, name: str, value: Any) -> dict[str, Any]:
        if value is None:
            return {}
        if isinstance(value, Mapping):
            return {str(key): each for key, each in value.items() if each != MISSING}
        problem = f"{self._prefix}{name} = {value!r}: a mapping of keys"
        if problem not in self.problems:
            self.problems.append(problem)
        return {}

    @staticmethod
    def _fields(data: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
        return {field: data[key] for field, key in names.items() if data.get(key) not in (None, MISSING)}

    def _parallel(self, minitron: Mapping[str, Any]) -> ParallelConfig | None:
        theirs = self._fields(self._cfg, nemo_keys.PARALLEL)
        ours = self._mapping("minitron.parallel", minitron.get("parallel"))
        for name in theirs.keys() & ours.keys():
            if theirs[name] != ours[name]:
                first, second = nemo_keys.PARALLEL[name], f"{self._prefix}minitron.parallel.{name}"
                self.problems.append(f"{self._prefix}{first} = {theirs[name]!r}, but {second} = {ours[name]!r}")
        every = (*ParallelConfig.model_fields, *ours)
        names = {name: f"minitron.parallel.{name}" for name in every}
        names |= {name: key for name, key in nemo_keys.PARALLEL.items() if name not in ours}
        found: ParallelConfig | None = self._renamed(ParallelConfig, theirs | ours, names)
        return found

    def _precision(self) -> Precision | None:
        value = self._cfg.get("precision")
        if value is None or value == MISSING:
            return None
        if (found := _PRECISIONS.get(dtype_name(value) or "")) is None:
            words = ", ".join(word for name in _PRECISIONS for word in DTYPE_WORDS[name])
            self.problems.append(f"{self._prefix}precision = {value!r}: one of {words}")
        return found

    def _optimizer(self) -> dict[str, Any]:
        optim = self._cfg.get("optim")
        if optim is None:
            return {}
        before = len(self.problems)
        found = self._optimizer_values(self._mapping("optim", optim))
        if len(self.problems) > before and "optim" not in self._given:
            # The optimizer that a file was trained with; here it matters only to who trains without another.
            del self.problems[before:]
            return {}
        return found

    def _optimizer_values(self, optim: dict[str, Any]) -> dict[str, Any]:
        sched = self._mapping("optim.sched", optim.get("sched"))
        flat = {**optim, **{f"sched.{key}": value for key, value in sched.items()}}
        values = self._fields(flat, nemo_keys.OPTIMIZER)
        if (name := values.pop("schedule", None)) is not None:
            if not isinstance(name, str) or name not in _SCHEDULES:
                self.problems.append(f"{self._prefix}optim.sched.name = {name!r}: one of {', '.join(_SCHEDULES)}")
            values["schedule"] = _SCHEDULES.get(str(name), Schedule.COSINE)
        if (betas := optim.get("betas")) is not None:
            if not isinstance(betas, list | tuple) or len(betas) != 2:
                self.problems.append(f"{self._prefix}optim.betas = {betas!r}: two numbers, such as [0.9, 0.95]")
            else:
                values |= {"beta1": betas[0], "beta2": betas[1]}
        name = "adamw" if optim.get("name") is None else optim["name"]
        if not isinstance(name, str) or name not in nemo_keys.OPTIMIZERS:
            self.problems.append(f"{self._prefix}optim.name = {name!r}: one of {', '.join(nemo_keys.OPTIMIZERS)}")
        values["distributed"] = optim.get("distributed", nemo_keys.OPTIMIZERS.get(str(name)))
        if sched.get("constant_steps") and values.get("schedule", Schedule.COSINE) is not Schedule.COSINE:
            self.problems.append(
                f"{self._prefix}optim.sched.constant_steps = {sched['constant_steps']}: for name: CosineAnnealing"
            )
        found: dict[str, Any] = {"optimizer": self._renamed(OptimizerConfig, values, nemo_keys.OPTIMIZER, "optim.")}
        for field, key in (("schedule_steps", "max_steps"), ("constant_steps", "constant_steps")):
            value = sched.get(key)
            if value is None:
                continue
            if type(value) is not int or value < (field == "schedule_steps"):
                self.problems.append(f"{self._prefix}optim.sched.{key} = {value!r}: a number of optimizer steps")
            found[field] = value
        return found


def unknown_key(key: str, known: Iterable[str], prefix: str = "") -> str:
    """What to say of a key that nobody knows, with the nearest one that somebody does; `prefix` stands before both."""
    names = sorted(known, key=len)
    last = key.rpartition(".")[2]
    close = [name for name in names if name.rpartition(".")[2] == last][:1]
    close = close or difflib.get_close_matches(key, names, n=1, cutoff=0.6)
    hint = f"did you mean {prefix}{close[0]}?" if close else "no key is called anything like it"
    return f"{prefix}{key}: unknown key; {hint}"


def _difference(cfg: Mapping[str, Any], inherited: Mapping[str, Any]) -> dict[str, Any]:
    """What a configuration says that another one does not."""
    kept = {}
    for key, value in cfg.items():
        if key in inherited:
            theirs = inherited[key]
            if isinstance(value, Mapping) and isinstance(theirs, Mapping):
                if below := _difference(value, theirs):
                    kept[key] = below
                continue
            if value == theirs:
                continue
        kept[key] = value
    return kept


def _leaves(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _dotted_keys() -> list[str]:
    """Every key that somebody reads, by its place."""
    ours = [f"minitron.{name}" for name in ("fp8", *_OURS)]
    below = [f"minitron.{name}.{key}" for name, kind in _OURS.items() for key in known_keys(kind)]
    optim = [f"optim.{key}" for key in nemo_keys.OPTIM] + [f"optim.sched.{key}" for key in nemo_keys.SCHED]
    return [*nemo_keys.ARCHITECTURE, *nemo_keys.READ, *optim, *ours, *below]


# -- and back, for jobs that NeMo's own scripts run --------------------------------------------------------------


def parallel_keys(parallel: ParallelConfig) -> dict[str, Any]:
    """A layout as keys of a NeMo model configuration."""
    values = parallel.model_dump(mode="json")
    ours = {name: value for name, value in values.items() if name not in nemo_keys.PARALLEL}
    return {**{key: values[name] for name, key in nemo_keys.PARALLEL.items()}, "minitron": {"parallel": ours}}


def precision_key(value: Precision) -> str:
    """A dtype as NeMo's `precision`."""
    return {Precision.BF16: "bf16", Precision.FP32: "32"}[value]


def optimizer_keys(config: OptimizerConfig) -> dict[str, Any]:
    """An optimizer as NeMo's `optim` section."""
    names = {schedule: name for name, schedule in _SCHEDULES.items()}
    return {
        "name": "distributed_fused_adam" if config.distributed else "adamw",
        "distributed": config.distributed,
        "lr": config.lr,
        "weight_decay": config.weight_decay,
        "betas": [config.beta1, config.beta2],
        "eps": config.eps,
        "clip_grad": config.clip_grad,
        "sched": {
            "name": names[config.schedule],
            "warmup_steps": config.warmup_steps,
            "min_lr": config.min_lr,
            "decay_fraction": config.decay_fraction,
        },
    }
