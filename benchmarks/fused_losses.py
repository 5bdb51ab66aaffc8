"""Speed of the fused output layers, against plain autograd on whole logits, on this machine's CPU.

    python benchmarks/fused_losses.py [--threads 2] [--tokens 1024] [--vocabulary 49152] [--hidden 576]

Prints the fastest of several runs, in wall and in CPU milliseconds per 1024 tokens (CPU time is what holds on a machine
that others use too), and the peak memory that each adds. Defaults are SmolLM2-135M's sizes.
"""

import argparse
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from nemo_minitron.ops.divergence import Divergence
from nemo_minitron.parallel.fused_linear_cross_entropy import fused_linear_cross_entropy
from nemo_minitron.parallel.fused_linear_kd import fused_linear_kd


def cases(sizes: argparse.Namespace) -> dict[str, Callable[[], None]]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, deviation: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * deviation).to(torch.bfloat16)

    student = normal(sizes.tokens, sizes.hidden).requires_grad_()
    weight = normal(sizes.vocabulary, sizes.hidden, deviation=0.15).requires_grad_()
    teacher, teacher_weight = normal(sizes.tokens, sizes.hidden), normal(sizes.vocabulary, sizes.hidden, deviation=0.15)
    labels = torch.randint(sizes.vocabulary, (sizes.tokens,), generator=generator)

    def kl(*, backward: bool = True, **options: Any) -> None:
        student.grad = weight.grad = None
        pair = (student, weight, teacher, teacher_weight)
        loss = fused_linear_kd(*pair, labels=labels, vocab_size=sizes.vocabulary, **options)
        if backward:
            loss.loss_sum.backward()

    def cross_entropy() -> None:
        student.grad = weight.grad = None
        fused_linear_cross_entropy(student, weight, labels, vocab_size=sizes.vocabulary).ce_sum.backward()

    def dense() -> None:
        student.grad = weight.grad = None
        log_q, log_p = (
            functional.log_softmax((x @ w.t()).float(), -1) for x, w in ((student, weight), (teacher, teacher_weight))
        )
        functional.kl_div(log_q, log_p, log_target=True, reduction="sum").backward()

    return {
        "fused KL": kl,
        "fused KL with statistics": lambda: kl(statistics=True),
        "fused KL, temperature 2": lambda: kl(divergence=Divergence(temperature=2.0)),
        "fused KL, validation": torch.no_grad()(lambda: kl(backward=False)),
        "fused cross-entropy": cross_entropy,
        "dense KL (autograd)": dense,
    }


def measure(name: str, sizes: argparse.Namespace) -> None:
    torch.set_num_threads(sizes.threads)
    case = cases(sizes)[name]
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the set-up
    before = _status("VmRSS")
    case()
    memory = (_status("VmHWM") - before) / 1024
    walls, loads = [], []
    for _ in range(sizes.repeats):
        wall, load = time.perf_counter(), time.process_time()
        case()
        walls.append(time.perf_counter() - wall)
        loads.append(time.process_time() - load)
    scale = 1e3 * 1024 / sizes.tokens
    print(f"{name:26} {min(walls) * scale:8.0f} ms {min(loads) * scale:8.0f} CPU ms {memory:8.0f} MiB", flush=True)


def _status(key: str) -> int:
    """A figure of this process in KiB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("threads", 2), ("tokens", 1024), ("vocabulary", 49152), ("hidden", 576), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    sizes = parser.parse_args()
    print(f"torch {torch.__version__}, {sizes}")
    for name in cases(argparse.Namespace(tokens=1, vocabulary=2, hidden=1)):
        process = multiprocessing.get_context("spawn").Process(target=measure, args=(name, sizes))  # own peak memory
        process.start()
        process.join()


if __name__ == "__main__":
    main()
