"""The dated result of a run: one file for people, one for programs."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SYMBOLS = {"passed": "ok", "failed": "WRONG", "error": "ERROR", "skipped": "skipped"}


def line(result: dict[str, Any]) -> str:
    """A check's result as it is printed."""
    first, *more = str(result["figure"]).splitlines() or [""]
    text = f"{SYMBOLS[result['state']]:8}{result['name']:34} {first}  [{result['seconds']:.1f} s]"
    missed = [f"MISSED: {each['name']} {each['found']:.3g}, wanted {each['wanted']}" for each in _missed(result)]
    return "\n".join([text, *(" " * 43 + each for each in (*more, *missed))])


def summary(results: Sequence[dict[str, Any]]) -> str:
    """How many of each state."""
    counts = {state: sum(result["state"] == state for result in results) for state in SYMBOLS}
    missed = sum(len(_missed(result)) for result in results)
    parts = [f"{count} {state}" for state, count in counts.items() if count]
    return ", ".join([*parts, *([f"{missed} target(s) missed"] if missed else [])])


def is_good(results: Sequence[dict[str, Any]]) -> bool:
    """Whether nothing was wrong and nothing broke off; skipped checks and missed targets are allowed."""
    return all(result["state"] in ("passed", "skipped") for result in results)


def write(folder: Path, stem: str, head: dict[str, Any], results: Sequence[dict[str, Any]]) -> None:
    """Write `<stem>.json` and `<stem>.md`, each complete or not at all."""
    _replace(folder / f"{stem}.json", json.dumps({**head, "checks": list(results)}, indent=1) + "\n")
    _replace(folder / f"{stem}.md", _markdown(head, results))


def stem(date: str, device: str) -> str:
    """The name of a result without its ending, as `2026-01-31-gpu-nvidia-h100-80gb-hbm3`."""
    return f"{date}-gpu-{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}"


def _markdown(head: dict[str, Any], results: Sequence[dict[str, Any]]) -> str:
    machine = head["machine"]
    facts = {name: value for name, value in machine.items() if name not in ("versions", "device")}
    lines = [
        f"# One GPU: {machine['device']}, {head['date']}",
        "",
        f"`{head['command']}` at commit {head['commit']}; {head['seconds']:.0f} s in all. {summary(results)}.",
        ", ".join(f"{name} {value}" for name, value in (facts | machine["versions"]).items()) + ".",
        "",
        "| check | what it shows | state | found | s |",
        "| --- | --- | --- | --- | ---: |",
    ]
    for result in results:
        figure = "<br>".join(each.replace("|", "\\|") for each in str(result["figure"]).splitlines())
        for target in result.get("targets", ()):
            met = "met" if target["met"] else "MISSED"
            figure += f"<br>target {target['name']}: {target['found']:.3g}, wanted {target['wanted']}: {met}"
        cells = (f"`{result['name']}`", result["title"], result["state"], figure, f"{result['seconds']:.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Tracebacks, further figures and kernel names stand in the JSON of the same name.", ""]
    return "\n".join(lines)


def _missed(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [target for target in result.get("targets", ()) if not target["met"]]


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
