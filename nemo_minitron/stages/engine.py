"""Run a chain of stages in a run folder: skip what is complete, go on in what was cut off, end cleanly in any case."""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar, cast

from nemo_minitron.callbacks.reporter import Reporter
from nemo_minitron.config.load import to_yaml
from nemo_minitron.config.parallel import Precision
from nemo_minitron.config.run import RunConfig
from nemo_minitron.errors import LostRankError, MinitronError
from nemo_minitron.stages import manifest, signals, speed
from nemo_minitron.stages.base import Stage, StageContext
from nemo_minitron.stages.files import as_user_error, write_json
from nemo_minitron.stages.outlook import Outlook
from nemo_minitron.stages.plan import REDO, Action, Step, decide, redo_begun, redo_mark, select
from nemo_minitron.stages.precision import PrecisionChoice, settle
from nemo_minitron.stages.processes import (
    LAUNCHED,
    Processes,
    SingleProcess,
    environment_rank,
    join,
    mark_reported,
    peer_error,
    release_memory,
    start_collectives,
)
from nemo_minitron.stages.run_folder import RunFolder
from nemo_minitron.stages.temporary import temporary_files_in
from nemo_minitron.version import __version__

T = TypeVar("T")
_CHANGES_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a command asks of a run folder."""

    config: RunConfig
    run: RunFolder
    redo_from: str | None = None
    """Redo this stage and all after it."""
    last: str | None = None
    """Stop after this stage."""
    only: str | None = None
    """Bring this stage up to date, with what it needs, and no other."""


def join_processes(config: RunConfig, run: RunFolder) -> Processes:
    """The processes of this run, which may lose one while they are meeting.

    Raises:
        LayoutError: The parallel sizes do not fit the number of processes.
        LostRankError: Another rank is gone.
    """
    with _report_lost_rank(run, environment_rank()[0]):
        return join(config.parallel, seed=config.seed)


def run_chain(
    chain: Sequence[Stage], request: Request, *, processes: Processes | None = None, reporter: Reporter | None = None
) -> None:
    """Do what a command asks. Collective: every rank calls it with equal arguments.

    Raises:
        MinitronError: Something a user can mend; what was finished stays finished.
        Stopped: A signal ended the run; the same command continues it.
    """
    processes = processes or SingleProcess()
    reporter = reporter or Reporter(silent=processes.rank > 0)
    with ExitStack() as stack:
        stack.enter_context(signals.handled())
        with _report_lost_rank(request.run, processes.rank):
            request, precision = _settle_precision(request, processes, reporter)
            doing = "looks at the run folder"
            steps = _on_rank_zero(
                processes, request.run.path, lambda: _prepare(chain, request, precision, stack), doing=doing
            )
        stack.enter_context(temporary_files_in(request.run, processes.rank))
        by_name = {stage.name: stage for stage in chain}
        outcome = "finished"
        try:
            with _report_lost_rank(request.run, processes.rank):
                outlook = _outlook(steps, by_name, request, processes)
                for position, (name, data) in enumerate(steps, start=1):
                    step = Step(stage=by_name[name], **data)
                    _run_step(step, request, processes, reporter, outlook, position=position, count=len(steps))
        except BaseException as error:  # torch's CheckpointException is no Exception
            outcome = _outcome_of(error)
            raise
        finally:
            reporter.rest()
            if processes.rank == 0:
                _record_outcome(request, outcome)


@contextmanager
def _report_lost_rank(run: RunFolder, rank: int) -> Iterator[None]:
    """Turn what the network says when another rank is gone, while connecting too, into an error that says so."""
    try:
        yield
    except MinitronError:
        raise
    except BaseException as error:
        if told := peer_error(error):
            raise _lost(told, run, rank) from error
        raise


def _lost(told: str, run: RunFolder, rank: int) -> BaseException:
    """What the ranks that are left say; `--nproc` knows more and says it for them."""
    error = LostRankError(
        f"rank {rank} lost another rank: {told}",
        rule="all ranks go on, or none does; the lost one's own output, or its machine's, says why",
        remedy=run.where_to_go_on(),
    )
    return mark_reported(error) if LAUNCHED in os.environ else error


def _settle_precision(
    request: Request, processes: Processes, reporter: Reporter
) -> tuple[Request, PrecisionChoice | None]:
    """The request with bf16 or fp32 in the place of `auto`; says which, and warns of a bf16 that is emulated."""
    is_new = not (request.run.path / "manifest.json").is_file()
    config, choice = settle(request.config, request.run, processes)
    if choice is not None and choice.asked is Precision.AUTO:
        reporter.line(f"precision {choice.chosen} (auto: {choice.reason})")
    elif choice is not None and choice.warning and is_new:
        reporter.line(choice.warning)
    return replace(request, config=config), choice


def _prepare(
    chain: Sequence[Stage], request: Request, precision: PrecisionChoice | None, stack: ExitStack
) -> list[tuple[str, dict[str, Any]]]:
    """On rank 0: take the folder, decide, set aside what is to be redone. The steps travel as plain data."""
    run, config = request.run, request.config
    selected = select(chain, first=request.redo_from, last=request.last, only=request.only)
    run.create()
    stack.enter_context(run.locked())
    run.clear_leftovers()
    run.temporary.mkdir()
    for stage in chain:
        run.adopt(stage.name)
    redo_from = None if redo_begun(run, request.redo_from, config) else request.redo_from
    steps = decide(selected, config, run, redo_from=redo_from)
    if redo_from:
        write_json(run.stages / REDO, redo_mark(redo_from, config))
    for step in steps:
        if step.action is Action.REDO:
            run.set_aside(step.stage.name)
    run.write_config(to_yaml(config))
    manifest.begin(run.path, config, precision=None if precision is None else asdict(precision))
    return [
        (
            step.stage.name,
            {field.name: getattr(step, field.name) for field in fields(step) if field.name != "stage"},
        )
        for step in steps
    ]


def _outlook(
    steps: Sequence[tuple[str, dict[str, Any]]], by_name: Mapping[str, Stage], request: Request, processes: Processes
) -> Outlook | None:
    """What is ahead, on the rank that speaks."""
    ahead = [by_name[name] for name, data in steps if data["action"] != Action.SKIP]
    if processes.rank > 0:
        return None
    return Outlook(request.config, request.run, ahead, chain=list(by_name.values()), ranks=processes.size)


def _run_step(
    step: Step,
    request: Request,
    processes: Processes,
    reporter: Reporter,
    outlook: Outlook | None,
    *,
    position: int,
    count: int,
) -> None:
    stage, run = step.stage, request.run
    if step.action is Action.SKIP:
        reporter.stage_skipped(stage.name, position, count)
        if processes.rank == 0 and stage.changed is not None and (changes := stage.changed(request.config, run)):
            reporter.line(_changed_since(stage.name, changes))
        return
    left = None if outlook is None else outlook.seconds()
    reporter.stage_started(stage.name, position, count, resumed=step.action is Action.CONTINUE, left=left)
    record = _on_rank_zero(processes, request.run.path, lambda: _begin(step, run), doing=f"begins stage {stage.name}")
    started = time.monotonic()
    manifest.reset_peak_memory()
    speed.reset_gpu_memory()
    context = StageContext(
        config=request.config,
        run=run,
        out=run.partial(stage.name),
        stage=stage,
        resumed=step.action is Action.CONTINUE,
        rank=processes.rank,
        world_size=processes.size,
        minutes_left=None if outlook is None else outlook.minutes_for(stage),
        reporter=reporter,
    )
    with signals.deferred() if stage.saves_when_stopped else nullcontext():
        try:
            result = _done(stage, context, processes)
        except BaseException:
            if processes.rank == 0:
                _note_time(run, stage.name, record, started)
            raise
        if processes.rank == 0:
            seconds = time.monotonic() - started
            record |= {"seconds": round(record["seconds"] + seconds, 3), "ranks": processes.size}
            result = {**result, "seconds": record["seconds"], "peak_memory_gb": manifest.peak_memory_gb()}
        doing = f"finishes stage {stage.name}"
        _on_rank_zero(processes, request.run.path, lambda: _finish(step, run, record, result), doing=doing)
    if outlook is not None:
        outlook.finished(stage.name, seconds)
    reporter.stage_finished(stage.name, position, count, seconds=record["seconds"], summary=result.get("summary", ""))


def _done(stage: Stage, context: StageContext, processes: Processes) -> dict[str, Any]:
    """Do a stage, by all ranks or by rank 0; returns what it returned."""
    if not stage.collective:
        work = _with_help(processes, stage, context)
        return _on_rank_zero(processes, context.run.path, work, doing=f"does stage {stage.name}")
    start_collectives(context.config.parallel, seed=context.config.seed)
    result = _guarded(stage, context)
    result |= _gpu_memory(processes)
    release_memory()
    return result


def _changed_since(name: str, changes: Sequence[str]) -> str:
    shown = [
        *changes[:_CHANGES_SHOWN],
        *([f"and {len(changes) - _CHANGES_SHOWN} more"] * (len(changes) > _CHANGES_SHOWN)),
    ]
    told = "".join(f"\n          - {change}" for change in shown)
    return f"          its sources changed since; what it made is from before (--from {name} makes it anew){told}"


def _gpu_memory(processes: Processes) -> dict[str, Any]:
    """Peak GPU memory of the rank that held most, as a part of the stage's result; empty without GPUs. Collective."""
    peaks = [peak for peak in processes.collect(speed.peak_gpu_memory()) if peak]
    most = {kind: max(peak[kind] for peak in peaks) for kind in peaks[0]} if peaks else {}
    return {"peak_gpu_memory_gb": most} if most else {}


def _guarded(stage: Stage, context: StageContext) -> dict[str, Any]:
    try:
        return stage.run(context)
    except (MinitronError, signals.Stopped, KeyboardInterrupt):
        raise
    except BaseException as error:  # torch's CheckpointException is no Exception
        if (user_error := as_user_error(error, context.out)) is not None:
            raise user_error from error
        raise


def _begin(step: Step, run: RunFolder) -> dict[str, Any]:
    earlier = run.attempt(step.stage.name) or {"seconds": 0.0, "attempts": 0}
    record = {
        "stage": step.stage.name,
        "digest": step.digest,
        "settings": step.settings,
        "upstream": step.upstream,
        "redone": step.redone,
        "version": __version__,
        "seconds": earlier["seconds"],
        "attempts": earlier["attempts"] + 1,
    }
    run.begin(step.stage.name, record)
    return record


def _finish(step: Step, run: RunFolder, record: dict[str, Any], result: dict[str, Any]) -> None:
    run.finish(step.stage.name, {**record, "finished": manifest.now()}, result)


def _note_time(run: RunFolder, name: str, record: dict[str, Any], started: float) -> None:
    """Add the time of an attempt that ended early; a disk that is full may refuse even that."""
    try:
        run.begin(name, {**record, "seconds": round(record["seconds"] + time.monotonic() - started, 3)})
    except OSError:
        return


def _on_rank_zero(processes: Processes, folder: Path, work: Callable[[], T], *, doing: str) -> T:
    """Let rank 0 do something; every rank gets the value, or rank 0's error. Those that wait say what it is doing."""
    value: T | None = None
    error: BaseException | None = None
    if processes.rank == 0:
        try:
            value = work()
        except (Exception, signals.Stopped) as caught:
            error = as_user_error(caught, folder) or caught
    if processes.size > 1:
        sent = (
            error if isinstance(error, (MinitronError, signals.Stopped, type(None))) else RuntimeError("rank 0 failed")
        )
        value, received = processes.broadcast((value, sent), doing=doing)
        error = error or (mark_reported(received) if received is not None else None)
    if error is not None:
        raise error
    return cast("T", value)


def _with_help(processes: Processes, stage: Stage, context: StageContext) -> Callable[[], dict[str, Any]]:
    """What rank 0 does in a stage that it does alone; with what it shares, the other ranks help first.

    Whoever waits for it hears of rank 0 once, with or without something to do.
    """
    if stage.help is None or processes.size == 1:
        return lambda: _guarded(stage, context)
    if processes.rank > 0:
        if (job := processes.broadcast(None)) is not None:
            stage.help(context, job)
        return dict
    heard = False

    def share(job: Any) -> None:
        nonlocal heard
        heard = True
        processes.broadcast(job)

    def work() -> dict[str, Any]:
        try:
            result = _guarded(stage, replace(context, share=share))
        except (Exception, signals.Stopped):
            if not heard:
                share(None)
            raise
        if not heard:
            share(None)
        return result

    return work


def _outcome_of(error: BaseException) -> str:
    """How the manifest names the end of a command that raised this."""
    if isinstance(error, (signals.Stopped, KeyboardInterrupt)):
        return "stopped"
    if isinstance(error, MinitronError):
        return f"failed: {error.what.splitlines()[0]}"
    return f"failed: {type(error).__name__}"


def _record_outcome(request: Request, outcome: str) -> None:
    try:
        if outcome == "finished":
            (request.run.stages / REDO).unlink(missing_ok=True)
        manifest.end(request.run.path, outcome)
    except OSError:
        return  # a full disk: the error that ended the run is the one to show
