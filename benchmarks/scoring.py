"""What scoring costs: all width sites and Block Influence against the plain forward pass, on SmolLM2-135M's shapes.

Both run in one process on one batch and take turns, so that a busy machine slows both; the ratio is that of the
quickest rounds, which other processes delay least. With `--threads 1` it is the thread's CPU time that counts. Weights
are random, which changes no speed. The leave-one-out ratio is that of `benchmarks/depth_ranking.py`.

    python -m benchmarks.scoring                # a table
    python -m benchmarks.scoring --json         # {"scoring_over_forward": ..., "leave_one_out_over_naive": ...}
"""

import argparse
import json
import statistics
import time
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from benchmarks.model_speed import SPEC
from nemo_minitron.config.parallel import ParallelConfig, Precision
from nemo_minitron.config.sites import FfnSite
from nemo_minitron.megatron import runtime
from nemo_minitron.megatron.build import build_chunks
from nemo_minitron.megatron.hooks import ImportanceCollector
from nemo_minitron.megatron.model import MinitronGPT

FEWEST_ROUNDS = 4


@dataclass(frozen=True)
class Times:
    """Seconds of each round."""

    plain: list[float]
    scoring: list[float]

    @property
    def ratio(self) -> float:
        """Of the quickest rounds."""
        return min(self.scoring) / min(self.plain)

    @property
    def median_ratio(self) -> float:
        """Median of the ratios of neighbouring rounds."""
        return statistics.median(mine / plain for mine, plain in zip(self.scoring, self.plain, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--precision", type=Precision, default=Precision.BF16, choices=list(Precision))
    parser.add_argument("--samples", type=int, default=1, help="of the batch")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sample")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=150.0, help="stop after this time, but not before 4 rounds")
    parser.add_argument("--output", choices=("logits", "hidden"), default="logits", help="what the model computes")
    parser.add_argument("--ffn-site", type=FfnSite, default=FfnSite.AFTER_ACTIVATION, choices=list(FfnSite))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-depth", action="store_true", help="leave the leave-one-out ranking out")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    times = scoring_times(args)
    depth = None if args.no_depth else leave_one_out_over_naive()
    if args.json:
        print(json.dumps({"scoring_over_forward": round(times.ratio, 4), "leave_one_out_over_naive": depth}))
        return
    print(f"{args.samples} x {args.length} tokens, {args.precision}, to {args.output}, {args.threads} thread(s)")
    print(f"plain forward pass    {min(times.plain):8.3f} s  median {statistics.median(times.plain):8.3f}")
    print(f"with all scores       {min(times.scoring):8.3f} s  median {statistics.median(times.scoring):8.3f}")
    print(f"scoring / forward     {times.ratio:8.3f}    median of neighbours {times.median_ratio:.3f}")
    if depth is not None:
        print(f"leave-one-out / naive {depth:8.3f}")


def leave_one_out_over_naive() -> float:
    """How much of the naive way's time the ranking of all layers takes."""
    from benchmarks import depth_ranking

    return round(depth_ranking.leave_one_out_over_naive(), 4)


def scoring_times(args: argparse.Namespace) -> Times:
    """Race the two, after one unmeasured round of each."""
    here = runtime.start(ParallelConfig(), seed=0)
    (model,) = build_chunks(SPEC, here, args.precision, trainable=False, seed=0)
    model.output = args.output
    tokens = torch.randint(0, SPEC.vocab_size, (args.samples, args.length))
    collector = ImportanceCollector([model], here, SPEC, ffn_site=args.ffn_site)
    try:
        return _race(model, tokens, collector, args)
    finally:
        runtime.stop()


def _race(model: MinitronGPT, tokens: torch.Tensor, collector: ImportanceCollector, args: argparse.Namespace) -> Times:
    """Plain and scoring rounds in turn; each pair begins with the other one."""
    clock = time.thread_time if args.threads == 1 else time.perf_counter
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    times = Times([], [])
    began = time.monotonic()
    for number in range(args.rounds + 1):
        for scoring in (False, True) if number % 2 else (True, False):
            with collector if scoring else nullcontext():
                start = clock()
                if scoring:
                    collector.expect([torch.ones_like(tokens, dtype=torch.bool)])
                with torch.no_grad():
                    model(tokens, positions, None)
                seconds = clock() - start
            if number:
                (times.scoring if scoring else times.plain).append(seconds)
        if number >= FEWEST_ROUNDS and time.monotonic() - began > args.seconds:
            break
    return times


if __name__ == "__main__":
    main()
