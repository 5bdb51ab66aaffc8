"""Memory and time of the distillation loss with both output layers: fused, dense, and ModelOpt's, in one run.

    python -m benchmarks.kd_loss [--json] [--tokens 2048] [--vocabulary 128256] [--hidden 512] [--rounds 2]
    torch needs no GPU for it and uses one where there is one; ModelOpt comes with `pip install -e .[bench]`.

Each line is one implementation at one tensor-parallel size:

- `seconds`: forward and backward of both output layers and the loss, the fastest of some rounds in which the
  implementations take turns; the slowest rank counts. Ranks share the machine's threads.
- `peak_buffers`: the most memory held at any moment above inputs, outputs and the gradients returned, in units of one
  float32 `[tokens, vocabulary / tensor_parallel]` tensor. Counted from the profiler's record of every allocation and
  release of torch's allocator on rank 0; buffers kept between calls are counted, what a matrix library or gloo
  holds inside is not.

All implementations must agree on the loss and on both gradients, or the run fails. `dense` is the plain torch twin that
the tests use; `modelopt` is NVIDIA's LogitsKLLoss (0.47) on the logits of two plain output layers. With `--dtype bf16`
the fused loss adds the weight's gradient to a float32 buffer, as in training (Megatron's `main_grad`), and the others
return it in bf16. Without `--json` the processor time of one rank stands beside, all its threads together: on a machine
with other work it says more than the wall clock.
"""

import argparse
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, distributed, multiprocessing
from torch.distributed import ProcessGroup
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from nemo_minitron.config.objective import DivergenceKind
from nemo_minitron.ops.divergence import Divergence
from nemo_minitron.parallel.fused_linear import WORKSPACE
from nemo_minitron.parallel.fused_linear_kd import fused_linear_kd
from tests.oracles.collectives import identity_fwd_sum_bwd, sum_fwd_identity_bwd
from tests.oracles.vocab import mask_padding, vocab_divergence

IMPLEMENTATIONS = ("fused", "dense", "modelopt")


@dataclass
class Problem:
    """Inputs of one rank: the student's two require gradients."""

    student: Tensor
    student_weight: Tensor
    teacher: Tensor
    teacher_weight: Tensor
    vocabulary: int
    divergence: Divergence
    tp: ProcessGroup | None
    main_grad: Tensor | None
    """With bf16 weights: the float32 buffer that Megatron keeps for the weight's gradient."""

    @classmethod
    def make(cls, sizes: argparse.Namespace, tp: ProcessGroup | None, device: str) -> "Problem":
        """This rank's part of the same random problem."""
        rank, world = (distributed.get_rank(tp), distributed.get_world_size(tp)) if tp else (0, 1)
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[sizes.dtype]

        def normal(seed: int, rows: int, columns: int, deviation: float) -> Tensor:
            generator = torch.Generator(device=device).manual_seed(seed)
            return (torch.randn(rows, columns, generator=generator, device=device) * deviation).to(dtype)

        shard, deviation = sizes.vocabulary // world, 2.0 / sizes.hidden**0.5
        main_grad = None if dtype == torch.float32 else torch.zeros(shard, sizes.hidden, device=device)
        return cls(
            normal(1, sizes.tokens, sizes.hidden, 1.0).requires_grad_(),
            normal(10 + rank, shard, sizes.hidden, deviation).requires_grad_(),
            normal(2, sizes.tokens, sizes.teacher_hidden, 1.0),
            normal(20 + rank, shard, sizes.teacher_hidden, deviation),
            sizes.vocabulary,
            Divergence(kind=DivergenceKind(sizes.divergence)),
            tp,
            main_grad,
        )

    def logits(self) -> tuple[Tensor, Tensor]:
        """Of student and teacher, this rank's columns of all tokens."""
        with torch.no_grad():
            teacher = functional.linear(self.teacher, self.teacher_weight)
        return functional.linear(identity_fwd_sum_bwd(self.student, self.tp), self.student_weight), teacher


def fused(problem: Problem) -> Tensor:
    return fused_linear_kd(
        problem.student,
        problem.student_weight,
        problem.teacher,
        problem.teacher_weight,
        divergence=problem.divergence,
        vocab_size=problem.vocabulary,
        tp=problem.tp,
        weight_gradient=problem.main_grad,
    ).loss_sum


def dense(problem: Problem) -> Tensor:
    logits = (mask_padding(x, vocab_size=problem.vocabulary, tp=problem.tp) for x in problem.logits())
    return vocab_divergence(*logits, problem.divergence, tp=problem.tp).sum()


def modelopt(problem: Problem) -> Tensor:
    from modelopt.torch.distill.plugins.megatron import LogitsKLLoss

    world = 1 if problem.tp is None else distributed.get_world_size(problem.tp)
    config = SimpleNamespace(tensor_model_parallel_size=world)
    reverse = problem.divergence.kind is DivergenceKind.REVERSE_KL
    per_token, _, _ = LogitsKLLoss(config, reverse=reverse)(*(x.unsqueeze(1) for x in problem.logits()))
    return sum_fwd_identity_bwd(per_token.sum(), problem.tp)  # as its caller does


def step(implementation: str, problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients of the student's hidden states and weight."""
    if problem.main_grad is not None:
        problem.main_grad.zero_()
    loss = globals()[implementation](problem)
    student, weight = torch.autograd.grad(loss, (problem.student, problem.student_weight), allow_unused=True)
    return loss.detach(), student, problem.main_grad if weight is None else weight


def peak_bytes(call: Callable[[], tuple[Tensor, ...]]) -> int:
    """The most bytes held at any moment of the call, without those of what it returns."""
    if not torch.cuda.is_available():
        WORKSPACE.clear()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    with profile(activities=activities, profile_memory=True) as record:
        returned = call()
    device = returned[0].device.type
    events = [
        (node.start_time_ns, node.extra_fields.ptr, node.extra_fields.alloc_size)
        for node in _walk(record.profiler.kineto_results.experimental_event_tree())
        if str(node.tag).endswith("Allocation") and node.extra_fields.device.type == device
    ]
    events.sort(key=lambda event: event[0])
    kept = {x.untyped_storage().data_ptr() for x in returned}
    # An address may be used again; what is returned is the last allocation there.
    last = {pointer: index for index, (_, pointer, size) in enumerate(events) if pointer in kept and size > 0}
    held = peak = 0
    for index, (_, pointer, size) in enumerate(events):
        held += 0 if last.get(pointer) == index else size
        peak = max(peak, held)
    return peak


def _walk(nodes: list[Any]) -> Iterator[Any]:
    for node in nodes:
        yield node
        yield from _walk(node.children)


def on_rank(rank: int, world: int, rendezvous: str, sizes: argparse.Namespace, results: Any) -> None:
    """Measure all implementations; rank 0 puts its rows into `results`."""
    warnings.simplefilter("ignore")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(max(1, sizes.threads // world))
    init = f"file://{rendezvous}"
    distributed.init_process_group("gloo", init_method=init, rank=rank, world_size=world)
    tp = distributed.group.WORLD if world > 1 else None
    if "modelopt" in sizes.implementations:
        from megatron.core import parallel_state

        parallel_state.initialize_model_parallel(tensor_model_parallel_size=world)
    problem = Problem.make(sizes, tp, device)
    peaks, checks = {}, {}
    for name in sizes.implementations:
        checks[name] = []
        peaks[name] = peak_bytes(lambda name=name: _keep(step(name, problem), checks[name]))
        checks[name] = [_summary(x) for x in checks[name]]
    seconds = {name: [float("inf")] * 2 for name in sizes.implementations}
    for _ in range(sizes.rounds):
        for name in sizes.implementations:
            distributed.barrier()
            began = torch.tensor([time.perf_counter(), time.process_time()], dtype=torch.float64)
            step(name, problem)
            if device == "cuda":
                torch.cuda.synchronize()
            took = torch.tensor([time.perf_counter(), time.process_time()], dtype=torch.float64) - began
            distributed.all_reduce(took, distributed.ReduceOp.MAX)
            seconds[name] = [min(pair) for pair in zip(seconds[name], took.tolist(), strict=True)]
    if rank == 0:
        unit = 4 * sizes.tokens * sizes.vocabulary / world
        results.put([(name, world, peaks[name] / unit, seconds[name], checks[name]) for name in peaks])
    distributed.destroy_process_group()


def _keep(values: tuple[Tensor, ...], into: list[Tensor]) -> tuple[Tensor, ...]:
    into.extend(values)
    return values


def _summary(x: Tensor) -> float:
    """A number that depends on every entry and its place."""
    flat = x.detach().double().flatten()
    return float(flat @ torch.linspace(1, 2, flat.numel(), dtype=torch.float64, device=flat.device).cos()) + float(
        flat.norm()
    )


def measure(world: int, sizes: argparse.Namespace) -> list[Any]:
    """Rows of one tensor-parallel size; starts the ranks."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        results = context.SimpleQueue()
        ranks = multiprocessing.spawn(
            on_rank, (world, os.path.join(folder, "ranks"), sizes, results), nprocs=world, join=False
        )
        rows: list[Any] = results.get() if ranks is not None and _finished(ranks, results) else []
    tolerance = 1e-3 if sizes.dtype == "fp32" else 5e-2
    for name, *_, check in rows:
        for found, expected in zip(check, rows[0][-1], strict=True):
            if abs(found - expected) > tolerance * abs(expected):
                sys.exit(f"{name} disagrees with {rows[0][0]} at tensor_parallel {world}: {check}, {rows[0][-1]}")
    return rows


def _finished(ranks: Any, results: Any) -> bool:
    """Wait until there is a result; a rank that fails raises here."""
    while results.empty():
        if ranks.join(timeout=0.5):
            break
    return not results.empty()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 2048), ("vocabulary", 128256), ("hidden", 512), ("rounds", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--teacher-hidden", type=int, help="default: as the student's")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--divergence", choices=[kind.value for kind in DivergenceKind], default="forward_kl")
    parser.add_argument("--implementations", nargs="+", choices=IMPLEMENTATIONS, default=IMPLEMENTATIONS)
    parser.add_argument("--tensor-parallel", type=int, nargs="+", default=(1, 2))
    parser.add_argument("--json", action="store_true", help="a JSON object a line, and nothing else")
    sizes = parser.parse_args()
    sizes.teacher_hidden = sizes.teacher_hidden or sizes.hidden
    if not sizes.json:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {sizes.threads} threads"
        print(f"torch {torch.__version__}, {device}; {vars(sizes)}")
    for world in sizes.tensor_parallel:
        for name, parallel, peak, (seconds, processor), _ in measure(world, sizes):
            row = {
                "implementation": name,
                "tensor_parallel": parallel,
                "peak_buffers": round(peak, 3),
                "seconds": round(seconds, 3),
            }
            text = "  ".join(f"{k} {v}" for k, v in row.items()) + f"  processor {processor:.3f}"
            print(json.dumps(row) if sizes.json else text, flush=True)


if __name__ == "__main__":
    main()
