"""What stage evaluate measured, as rows of tables: tasks with the share of the teacher's score that is kept, and speed.

The page, the card and the terminal show the same rows.
"""

from collections.abc import Mapping
from typing import Any

from nemo_minitron.callbacks.reporter import compact

TEACHER = "teacher"


def kept(tasks: Mapping[str, Any], name: str, task: str) -> float | None:
    """A model's score on a task over the teacher's, or the teacher's over its where lower is better.

    None without a teacher's score, or where that is zero.
    """
    rows = [tasks.get(one, {}).get(task) for one in (name, TEACHER)]
    if any(row is None for row in rows):
        return None
    metric = rows[1]["metric"]
    mine, base = (row["metrics"][metric] for row in rows)
    above, below = (mine, base) if base["higher_is_better"] else (base, mine)
    return float(above["value"] / below["value"]) if below["value"] else None


def shares(tasks: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """`kept` by model and task, for other programs; the teacher itself is left out."""
    found: dict[str, dict[str, float]] = {}
    for name, rows in tasks.items():
        values = {task: kept(tasks, name, task) for task in rows}
        if name != TEACHER:
            found[name] = {task: round(value, 4) for task, value in values.items() if value is not None}
    return found


def task_table(tasks: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows, a row a task: score and standard error of each model, and percent of the teacher's kept."""
    names = list(tasks)
    headings = ["task", "items", "metric", *(f"{name}" for name in names)]
    rows = []
    for task in dict.fromkeys(task for row in tasks.values() for task in row):
        first = next(row[task] for row in tasks.values() if task in row)
        cells = [task, "" if first["items"] is None else f"{first['items']:,}", _shots(first)]
        rows.append([*cells, *(task_cell(tasks, name, task) for name in names)])
    return headings, rows


def task_cell(tasks: Mapping[str, Any], name: str, task: str) -> str:
    """A model's score on a task, its standard error and what is kept of the teacher's; empty where there is none."""
    row = tasks.get(name, {}).get(task)
    if row is None:
        return ""
    return _score(row["metrics"][row["metric"]], kept(tasks, name, task), name)


def task_note(tasks: Mapping[str, Any]) -> str:
    """How to read the table of tasks."""
    models = "models" if len(tasks) > 1 else "model"
    return (
        f"Score of each of the {len(tasks)} {models} ± its standard error (percentage of the teacher's score that is "
        "kept). Chance is part of every score, so that a model that only guesses keeps a good part too."
    )


def speed_table(speed: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows, a row a model, and one with the ratio of the two."""
    headings = ["model", "prefill tokens/s", "decode tokens/s", "first token", "weights", "cache"]
    has_peak = any("peak_bytes" in row for row in speed["models"].values())
    rows = []
    for name, row in speed["models"].items():
        rows.append(
            [
                name,
                compact(row["prefill_tokens_per_second"]),
                f"{row['decode_tokens_per_second']:,.1f}",
                f"{1000 * row['time_to_first_token']:,.0f} ms",
                f"{row['weights_bytes'] / 1e9:.2f} GB",
                f"{row['cache_bytes'] / 1e6:.1f} MB",
                *([f"{row.get('peak_bytes', 0) / 1e9:.2f} GB"] if has_peak else []),
            ]
        )
    for name, ratio in speed["ratio"].items():
        spreads = [_spread(ratio[key]) for key in _RATIOS]
        base = speed["models"][TEACHER]
        weights = speed["models"][name]["weights_bytes"] / base["weights_bytes"]
        rows.append([f"{name} / {TEACHER}", *spreads, f"{weights:.2f} x", "", *([""] if has_peak else [])])
    return [*headings, *(["peak GPU memory"] if has_peak else [])], rows


_RATIOS = ("prefill_tokens_per_second", "decode_tokens_per_second", "time_to_first_token")


def speed_note(speed: Mapping[str, Any]) -> str:
    """How the speeds were measured, in a sentence."""
    cache = "with" if speed["kv_cache"] else "without"
    return (
        f"{speed['batch_size']} prompt(s) of {speed['prompt_tokens']:,} tokens, {speed['new_tokens']} new tokens, "
        f"{cache} a cache of keys and values, on {speed['device']}; medians of {speed['rounds']} rounds in which the "
        f"models took turns, ratios round by round (least to most).{_whose_memory(speed)}"
    )


def _whose_memory(speed: Mapping[str, Any]) -> str:
    ranks = speed.get("ranks", 1)
    return f" Memory is that of the first of the {ranks} ranks that a model is divided over." if ranks > 1 else ""


def _shots(row: Mapping[str, Any]) -> str:
    shots = row.get("num_fewshot")
    return str(row["metric"]) + (f", {shots}-shot" if shots is not None else "")


def _score(metric: Mapping[str, Any], share: float | None, name: str) -> str:
    error = "" if metric["standard_error"] is None else f" ± {metric['standard_error']:.3f}"
    percent = "" if share is None or name == TEACHER else f" ({share:.0%})"
    return f"{metric['value']:.3f}{error}{percent}"


def _spread(row: Mapping[str, float]) -> str:
    return f"{row['median']:.2f} x ({row['least']:.2f} to {row['most']:.2f})"
