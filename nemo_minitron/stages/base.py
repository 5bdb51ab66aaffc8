"""What a stage is, and what it is given."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from nemo_minitron.callbacks.reporter import Reporter
from nemo_minitron.config.resume import RULES, SECTIONS, Change, Rule, rule_of, setting_of
from nemo_minitron.stages import signals
from nemo_minitron.stages.run_folder import RunFolder

if TYPE_CHECKING:  # pydantic takes longer to import than the command line may take to answer --help
    from nemo_minitron.config.run import RunConfig


_HOW_OFTEN = frozenset(key for key, rule in RULES.items() if rule.change is Change.FREE)
_BY_HOW_MANY = frozenset({"ranks_per_candidate"})
_MADE_OF = Rule(Change.REFUSED, "what is there was made with it")


@dataclass(frozen=True, kw_only=True)
class StageContext:
    """What a running stage is given; the same on every rank, but for `rank` and the reporter (silent above rank 0)."""

    config: "RunConfig"
    run: RunFolder
    """`run.stage("prune")` is the folder of a complete stage, `run.result("prune")` what it returned."""
    out: Path
    """Where the stage writes. It survives a kill and is renamed when the stage returns."""
    stage: "Stage"
    """Which stage this is: its name, its round, what it reads."""
    resumed: bool = False
    """Whether `out` holds what an earlier attempt with the same inputs left."""
    rank: int = 0
    world_size: int = 1
    minutes_left: float | None = None
    """What the other stages leave of a time budget for the complete run, on rank 0; None without such a budget."""
    reporter: Reporter = field(default_factory=Reporter)
    """Progress and lines for the user; metrics files. Rank 0 speaks, the others' is silent."""
    share: Callable[[Any], None] = lambda job: None
    """On rank 0 of a stage with `help`: give the other ranks, once, what they help with."""
    stop_requested: Callable[[], bool] = signals.requested
    """For stages that save when stopped: poll between steps, save, then call `stop`."""
    stop: Callable[[], NoReturn] = signals.stop
    """Ends the run (raises `signals.Stopped`). All ranks call it, if `stop_requested()` holds on any."""

    def input(self, role: str) -> Path:
        """Where what the stage reads under a name lies (`input("teacher")`); the chain says which stage made it.

        Raises:
            RunFolderError: That stage is not finished.
        """
        name, _, file = self.stage.inputs[role].partition("/")
        return self.run.stage(name) / file


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A function from artefacts to artefacts."""

    name: str
    run: Callable[[StageContext], dict[str, Any]]
    """Returns JSON data, saved as `result.json`. `summary`, if there, is one line shown to the user."""
    title: str = ""
    """What it does, in a few words; the help text of its verb."""
    inputs: Mapping[str, str] = field(default_factory=dict)
    """What it reads, by the stage's own word for it: `{"teacher": "import/teacher"}` is that folder of stage import."""
    needs: tuple[str, ...] = ()
    """Stages whose files it reads; those of `inputs` are added."""
    round: int = 1
    """Which round of scoring, pruning and distilling it belongs to."""
    sections: tuple[str, ...] = ()
    """Keys of the recipe its result depends on (`"distill"`, `"data.text_key"`); never parallel sizes."""
    collective: bool = False
    """Whether all ranks run it; otherwise rank 0 does and the others wait."""
    help: Callable[[StageContext, Any], None] | None = None
    """What the other ranks do, given what rank 0 shares, while they wait for it; of stages that are not collective."""
    changed: Callable[["RunConfig", RunFolder], list[str]] | None = None
    """What has changed outside the run folder since it was finished, to be said when it is skipped."""
    saves_when_stopped: bool = False
    """Whether it polls `stop_requested` and saves; a signal ends any other stage at once."""

    def __post_init__(self) -> None:
        named = (path.partition("/")[0] for path in self.inputs.values())
        object.__setattr__(self, "needs", tuple(dict.fromkeys([*self.needs, *named])))

    @property
    def kind(self) -> str:
        """What it does: its name without the round (`prune` of `prune.1`)."""
        return self.name.partition(".")[0]

    def settings(self, config: "RunConfig") -> dict[str, Any]:
        """The part of a recipe that the stage depends on, as dotted keys."""
        whole = config.model_dump(mode="json")
        found: dict[str, Any] = {}
        for section in self.sections:
            value: Any = whole
            for part in section.split("."):
                value = value[part]
            found.update(flatten(value, section))
        return found

    def digest_of(self, settings: Mapping[str, Any], upstream: Mapping[str, str], *, redone: int = 0) -> str:
        """SHA-256 of all that its result follows from: settings as `settings` gives them, and its inputs' digests.

        How often it was `redone` at a user's word counts as well: what lies outside the run folder has changed then, or
        may have, and what was made from it before is not made from it now.
        """
        inputs: dict[str, Any] = {
            "stage": self.name,
            "settings": {key: value for key, value in settings.items() if shapes_result(key)},
            "upstream": dict(upstream),
        }
        if redone:
            inputs["redone"] = redone
        return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()

    def resumed_with(self, key: str) -> Rule:
        """What may be done with a key of `settings` while the stage goes on where it was stopped."""
        setting = setting_of(key) if self.kind in SECTIONS else None
        return rule_of(setting) if setting is not None else _MADE_OF


def shapes_result(key: str) -> bool:
    """Whether a stage's result depends on a key: not on how often it saves and logs, or how ranks share the work."""
    return key.rpartition(".")[2] not in _HOW_OFTEN | _BY_HOW_MANY


def lazy(target: str) -> Callable[..., Any]:
    """A stage function given as `module:name`, imported when it is called: a skipped stage costs no import of torch."""
    module, _, name = target.partition(":")

    def call(*arguments: Any) -> Any:
        return getattr(import_module(module), name)(*arguments)

    return call


def flatten(value: Any, prefix: str) -> dict[str, Any]:
    """Nested mappings as one with dotted keys; anything else stays as it is."""
    if not isinstance(value, dict):
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, item in value.items():
        found.update(flatten(item, f"{prefix}.{key}"))
    return found
