"""Decide, before anything is done, which stages of a run to skip, continue, do and redo. Changes nothing."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from nemo_minitron.config.load import has_default
from nemo_minitron.config.resume import Change
from nemo_minitron.config.run import RunConfig
from nemo_minitron.errors import ConfigError, RunFolderError
from nemo_minitron.stages.base import Stage, shapes_result
from nemo_minitron.stages.files import read_json
from nemo_minitron.stages.run_folder import RunFolder

REDO = ".redo"
"""File of a run folder in which stages are being done again, until all of them are."""


class Action(StrEnum):
    """What happens to a stage."""

    SKIP = "skip"
    """It is complete, and made from the same inputs."""
    CONTINUE = "continue"
    """An attempt with the same inputs was cut off: go on in its folder."""
    DO = "do"
    """Nothing of it is there."""
    REDO = "redo"
    """What is there is set aside until the new one is complete."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """A stage, what happens to it, and the digest of what it is made from."""

    stage: Stage
    action: Action
    digest: str
    settings: dict[str, Any]
    upstream: dict[str, str]
    redone: int = 0
    """How often a user has had it done again, whether or not its settings changed."""


def select(
    chain: Sequence[Stage], *, first: str | None, last: str | None, only: str | None = None
) -> tuple[Stage, ...]:
    """The stages a command is about, in order: all up to `last`, or those that `only` needs and itself.

    Raises:
        ConfigError: There is no such stage, or `first` comes after `last`.
    """
    names = [stage.name for stage in chain]
    unknown = [name for name in (first, last, only) if name is not None and name not in names]
    if unknown:
        raise ConfigError("command line", [_unknown(name, names) for name in unknown])
    if only is not None:
        wanted = upstream_of(chain, only) | {only}
        return tuple(stage for stage in chain if stage.name in wanted)
    end = names.index(last) if last else len(names) - 1
    if first and names.index(first) > end:
        raise ConfigError("command line", [f"--from {first} comes after --to {last}; stages: {', '.join(names)}"])
    return tuple(chain[: end + 1])


def _unknown(name: str, names: list[str]) -> str:
    section = {"correct": "correct", "tokenize_chat": "tune", "tune": "tune", "cache": "cache"}.get(name)
    asked = f"; the recipe has no section `{section}:`" if section else ""
    if name == "search":
        asked = "; the recipe's target has no budget, as target.ratio=0.75 or target.params=100M"
    return f"no stage {name!r}{asked}; stages: {', '.join(names)}"


def upstream_of(chain: Sequence[Stage], name: str) -> set[str]:
    """Every stage that a stage needs, directly or through others."""
    needs = {stage.name: stage.needs for stage in chain}
    found: set[str] = set()
    waiting = list(needs[name])
    while waiting:
        one = waiting.pop()
        if one not in found:
            found.add(one)
            waiting += needs[one]
    return found


def decide(
    chain: Sequence[Stage], config: RunConfig, run: RunFolder, *, redo_from: str | None = None
) -> tuple[Step, ...]:
    """One step for each stage of `chain` (as `select` gives them).

    A stage made with other settings, or from other stages (a recipe that got more rounds), is an error unless the user
    asked to redo it (`redo_from`): its settings are his word, and hours may be in it. A training that was stopped goes
    on with other settings where `config.resume` says that they may change. A stage whose own settings still hold, but
    whose upstream was redone, with other settings or the same, is redone.

    Raises:
        RunFolderError: The folder holds stages of another recipe; names the keys that differ.
    """
    redo = forced(chain, redo_from)
    digests: dict[str, str] = {}
    steps: list[Step] = []
    conflicts: list[str] = []
    for stage in chain:
        upstream = {name: digests[name] for name in stage.needs}
        record = run.done(stage.name) or run.attempt(stage.name)
        settings = stage.settings(config)
        if record and stage.name not in redo:
            settings = _as_made(record["settings"], settings)
        redone = _times_redone(run, stage, record, forced=stage.name in redo)
        digests[stage.name] = digest = stage.digest_of(settings, upstream, redone=redone)
        if stage.name in redo:
            action = Action.REDO if record else Action.DO
        else:
            whole = run.is_complete(stage.name)
            if record:
                conflicts += _conflicts(stage, record, settings, whole=whole)
            action = _action(stage, record, digest, upstream, whole=whole)
        step = Step(stage=stage, action=action, digest=digest, settings=settings, upstream=upstream, redone=redone)
        steps.append(step)
    if conflicts:
        first = next(
            step.stage.name for step in steps if any(f"stage {step.stage.name} was" in line for line in conflicts)
        )
        again = f"`run --from {first}`" + ("" if "." in first else f", or `{first} --redo`")
        raise RunFolderError(
            f"{run.path}: holds a run of another recipe\n" + "\n".join(f"  - {line}" for line in conflicts),
            rule="a run folder belongs to one recipe",
            remedy=f"repeat its settings, name another folder with --run-dir, or redo from there: {again}",
        )
    return tuple(steps)


def _times_redone(run: RunFolder, stage: Stage, record: dict[str, Any] | None, *, forced: bool) -> int:
    """How often a stage will have been redone; one that was set aside and never begun again counts as redone."""
    if record is not None:
        return int(record.get("redone", 0)) + forced
    return max((int(old.get("redone", 0)) + 1 for old in run.set_aside_records(stage.name)), default=0)


def _as_made(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Settings without keys that came with a later version than what was made: their defaults change nothing.

    Keys of a section that was null then are not such keys.
    """

    def is_later(key: str, value: Any) -> bool:
        parts = key.split(".")
        known = any(".".join(parts[:count]) in old for count in range(1, len(parts) + 1))
        return not known and has_default(RunConfig, key, value)

    return {key: value for key, value in new.items() if not is_later(key, value)}


def _action(
    stage: Stage, record: dict[str, Any] | None, digest: str, upstream: dict[str, str], *, whole: bool
) -> Action:
    """What happens to a stage whose settings are no conflict."""
    if record is None:
        return Action.DO
    if whole:
        return Action.SKIP if record["digest"] == digest else Action.REDO
    as_begun = stage.digest_of(record["settings"], upstream, redone=record.get("redone", 0))
    is_begun = record["digest"] in {digest, as_begun}
    return Action.CONTINUE if is_begun else Action.REDO


def _conflicts(stage: Stage, record: dict[str, Any], settings: dict[str, Any], *, whole: bool) -> list[str]:
    """How what was made, or begun, differs from what the recipe now says."""
    found = []
    for key, old, new in _differences(record["settings"], settings):
        rule = stage.resumed_with(key)
        if not shapes_result(key) or (rule.change is Change.FROM_HERE and not whole):
            continue
        why = "" if whole or rule.change is not Change.REFUSED else f"; {rule.why}"
        found.append(f"{key}: stage {stage.name} was made with {old}, now {new}{why}")
    if set(record["upstream"]) != set(stage.needs):
        before, now = (", ".join(sorted(names)) for names in (record["upstream"], stage.needs))
        found.append(f"stages: stage {stage.name} was made from {before}; now from {now}")
    return found


def redo_mark(redo_from: str, config: RunConfig) -> dict[str, Any]:
    """What tells a redo from another; which precision `auto` is comes later."""
    return {"from": redo_from, "config": config.model_dump(mode="json", exclude={"precision"})}


def redo_begun(run: RunFolder, redo_from: str | None, config: RunConfig) -> bool:
    """Whether the same redo was begun and cut off: then the stages it has made since stay."""
    path = run.stages / REDO
    return redo_from is not None and path.is_file() and read_json(path) == redo_mark(redo_from, config)


def forced(chain: Sequence[Stage], redo_from: str | None) -> set[str]:
    """Names of the stages that a user has done again."""
    names = [stage.name for stage in chain]
    return set(names[names.index(redo_from) :]) if redo_from in names else set()


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    keys = [*new, *(key for key in old if key not in new)]
    return [(key, old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)]
