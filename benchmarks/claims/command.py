"""The command line of the claims."""

import argparse
import subprocess
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from statistics import fmean
from typing import Any

import benchmarks.claims
from benchmarks.claims import page
from benchmarks.claims.results import Key, Results, key_of
from benchmarks.claims.table import CLAIMS, Claim, named, trials
from nemo_minitron.cli import quiet, threads
from nemo_minitron.json_lines import append_rows, rows_to_continue

RECIPE = Path(__file__).with_name("smollm2.yaml")
SEEDS = (1234, 1, 2)
PREPARED = "preparation"
"""Stands for the student in the row of what all trials of a seed share."""


def main(argv: Sequence[str] | None = None, *, only: Sequence[str] = ()) -> int:
    """Run trials that have no result yet, and print the tables; or write the pages.

    Args:
        argv: Command line; None for this process's.
        only: Claims that run where none is named; empty for all.
    """
    args = _parsed(argv)
    claims = tuple(named(name) for name in args.claim or only) or CLAIMS
    if args.write:
        page.write(args.results or page.newest_results())
        return 0
    threads.choose()
    quiet.install()
    path: Path = args.results or args.work / "results.jsonl"
    args.work.mkdir(parents=True, exist_ok=True)
    overrides = [*args.overrides, *([f"distill.tokens={args.tokens}"] if args.tokens else [])]
    run(claims, args.work, path, recipe=args.recipe, overrides=overrides, seeds=args.seeds)
    results = Results.load(path)
    for claim in claims:
        print(f"\n## {claim.title}\n\n{page.section(claim, results)}")
    return 0


def run(
    claims: tuple[Claim, ...], work: Path, path: Path, *, recipe: Path, overrides: Sequence[str], seeds: Sequence[int]
) -> None:
    """Every trial of some claims that the results file does not have, seed by seed; each is written down at once."""
    done = {key_of(row) for row in rows_to_continue(path)}
    for seed in seeds:
        left = [trial for trial in trials(claims) if Key(*trial.key, seed) not in done]
        if not left:
            continue
        from benchmarks.claims.bench import Bench  # loads torch, after threads were chosen

        bench = Bench(work / f"seed{seed}", recipe, overrides, seed=seed)
        row = _timed(bench.prepare)
        if Key(PREPARED, "", seed) not in done:
            append_rows(path, [{"student": PREPARED, "lesson": "", "seed": seed, **row}])
        for number, trial in enumerate(left, start=1):
            row = {"student": trial.key[0], "lesson": trial.key[1], "seed": seed, **_setting(bench.config)}
            row |= _timed(partial(bench.measure, trial))
            append_rows(path, [row])
            print(f"{time.strftime('%H:%M:%S')} seed {seed}, {number}/{len(left)}: {_told(row)}", flush=True)


def _told(row: dict[str, Any]) -> str:
    loss, kl = (fmean(row[name]) for name in ("nats", "kl"))
    name = " / ".join(filter(None, (row["student"], row["lesson"])))
    return f"{name}: {loss:.3f} nats, KL {kl:.3f}, {row['seconds']:.0f} s ({row['cpu_seconds']:.0f} CPU s)"


def _timed(work: Callable[[], dict[str, Any] | None]) -> dict[str, Any]:
    """What work returned, with its seconds by the clock and on the processor."""
    clock, cpu = time.perf_counter(), time.process_time()
    found = work() or {}
    return {
        **found,
        "seconds": round(time.perf_counter() - clock, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
    }


def _setting(config: Any) -> dict[str, Any]:
    return {"tokens": config.distill.tokens, "precision": config.precision.value, "commit": _commit()}


@cache
def _commit() -> str:
    words = ["git", "rev-parse", "--short=7", "HEAD"]
    here = Path(benchmarks.claims.__file__).parent
    return subprocess.run(words, cwd=here, capture_output=True, text=True, check=False).stdout.strip()


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.claims",
        description=benchmarks.claims.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--work", type=Path, default=Path("runs/claims"), help="models, texts, scores and results")
    parser.add_argument("--claim", action="append", choices=[claim.name for claim in CLAIMS], help="all by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--tokens", type=int, help="of a distillation; the recipe's by default")
    parser.add_argument("--results", type=Path, help="JSON lines; WORK/results.jsonl by default")
    parser.add_argument("--recipe", type=Path, default=RECIPE, help="what all trials share")
    parser.add_argument("--write", action="store_true", help="run nothing; write the pages from a results file")
    parser.add_argument("overrides", nargs="*", help="key=value on top of the recipe")
    return parser.parse_args(argv)
