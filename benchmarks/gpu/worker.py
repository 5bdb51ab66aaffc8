"""The process in which checks run: it takes their names from standard input and answers with a line of JSON each.

A check that hangs, or a GPU error after which no kernel runs any more, costs this process and no other: the runner
starts a new one for the checks that are left. What libraries print goes into a log of the runner.
"""

import argparse
import gc
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import IO, Any

from benchmarks.gpu.registry import Check, UnavailableError, load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--answers", type=int, required=True, help="file descriptor for the answers")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--module", action="append", default=[], help="a further module with checks")
    args = parser.parse_args()
    answers = os.fdopen(args.answers, "w", encoding="utf-8")
    from benchmarks.gpu.bench import Bench

    bench = Bench(tiny=args.tiny)
    checks = {each.name: each for each in load(args.module)}
    _answer(answers, {"checks": [each.described() for each in checks.values()], "machine": bench.machine()})
    for line in sys.stdin:
        _answer(answers, run_one(checks[line.strip()], bench))


def run_one(check: Check, bench: Any) -> dict[str, Any]:
    """A check's outcome as plain data; nothing it raises gets out."""
    started = time.perf_counter()
    if missing := check.missing():
        return {"state": "skipped", "figure": f"needs {', '.join(missing)}", "seconds": 0.0}
    broken = False
    try:
        outcome = check.run(bench)
        told = {
            "state": "passed" if outcome.ok else "failed",
            "figure": outcome.figure,
            "figures": outcome.figures,
            "targets": [
                {"name": each.name, "wanted": each.wanted, "found": each.found, "met": each.met}
                for each in outcome.targets
            ],
        }
    except UnavailableError as reason:
        told = {"state": "skipped", "figure": str(reason)}
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        broken = "CUDA error" in str(error) or type(error).__name__ == "AcceleratorError"
        told = {"state": "error", "figure": _short(error), "traceback": traceback.format_exc()}
    told["seconds"] = round(time.perf_counter() - started, 2)
    if not broken:
        broken = not _cleared(bench)
    return {**told, "broken": broken}


def _cleared(bench: Any) -> bool:
    """Give back what the check held; False if the device no longer answers."""
    try:
        gc.collect()
        bench.clear()
    except RuntimeError:
        return False
    return True


def _short(error: BaseException) -> str:
    """Type, first line and place of an error."""
    said = (str(error).strip().splitlines() or [""])[0]
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {said[:160]}{place}"


def _answer(stream: IO[str], value: dict[str, Any]) -> None:
    stream.write(json.dumps(value, default=str) + "\n")
    stream.flush()


if __name__ == "__main__":
    main()
