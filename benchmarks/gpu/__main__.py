"""Everything that only a real card can show, on a machine with one: `make gpu`, or `python -m benchmarks.gpu`.

Each check prints a line with its figure as soon as it ends. None stops the others: each runs in a process beside this
one, with a time limit. The most valuable come first, and none is begun that would pass the end. torch is enough to
begin with; what megatron-core, Transformer Engine, NeMo, ModelOpt, Liger or the demo's model would add is named where
they are not there. Ends with status 1 if a check found something wrong or broke off.
"""

import argparse
import os
import shlex
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.gpu import result
from benchmarks.gpu.runner import ROOT, LostWorkerError, Plan, run

BUDGET = 480.0


def main() -> None:
    args = _arguments()
    began = time.monotonic()
    head: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "command": shlex.join(["python", "-m", "benchmarks.gpu", *sys.argv[1:]]),
        "commit": commit(),
    }

    def watch(machine: dict[str, Any], latest: dict[str, Any], results: list[dict[str, Any]]) -> None:
        if len(results) == 1:
            print(f"{machine['device']}, {machine['versions']}", flush=True)
        print(result.line(latest), flush=True)
        head.update(machine=machine, seconds=round(time.monotonic() - began, 1))
        if args.out is not None:
            result.write(args.out, result.stem(head["date"], machine["device"]), head, results)

    plan = Plan(tiny=args.tiny, budget=args.budget, only=frozenset(args.only), modules=tuple(args.module))
    try:
        machine, results = run(plan, watch)
    except LostWorkerError as lost:
        sys.exit(f"no check could be started: {lost}\n{lost.log}")
    print(f"{result.summary(results)}; {time.monotonic() - began:.0f} s")
    if args.out is not None:
        print(args.out / f"{result.stem(head['date'], machine['device'])}.md")
    sys.exit(not result.is_good(results))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tiny = os.environ.get("TINY", "") not in ("", "0")
    parser.add_argument(
        "--tiny", action="store_true", default=tiny, help="the same code on a CPU, with sizes of no meaning (TINY=1)"
    )
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for everything (480)")
    parser.add_argument("--only", nargs="+", default=[], help="names of checks")
    parser.add_argument("--module", action="append", default=[], help="a further module with checks")
    parser.add_argument("--out", type=Path, help="where the result goes: benchmarks/; nowhere with --tiny")
    args = parser.parse_args()
    if args.out is None and not args.tiny:
        args.out = ROOT / "benchmarks"
    return args


def commit() -> str:
    """Of the source tree, with `-dirty` if something is changed."""
    try:
        found = subprocess.run(
            ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=7", "--exclude=*"],
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return "unknown"
    return found.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
