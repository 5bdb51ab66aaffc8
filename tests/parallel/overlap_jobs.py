"""Train with gradients added up during the backward pass, and after it."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from nemo_minitron.config.distillation import Objective
from nemo_minitron.config.parallel import ParallelConfig, Precision
from tests.parallel.megatron_jobs import SPECS, Case, global_batch, optimizer_config

STEPS = 3


@dataclass(frozen=True)
class Run:
    """One training by distillation."""

    spec: str
    parallel: ParallelConfig
    distributed: bool
    micro_batch_size: int = 2
    kind: str = "distillation"
    """Or `text`, or `top_k`, or `frozen` (embedding and output layer)."""


def train(run: Run) -> dict[str, Any]:
    """Losses, norms and weights; and of each step, how many buckets were under way when the backward pass ended."""
    from nemo_minitron.megatron import optim, runtime
    from nemo_minitron.megatron.build import build_chunks
    from nemo_minitron.megatron.forward import MicroBatch, collect_hidden, reduce_report
    from nemo_minitron.megatron.forward import run as run_schedule
    from nemo_minitron.megatron.model import freeze_vocabulary
    from nemo_minitron.models.losses import DistillationLoss, LanguageModelLoss, tensor_group

    here = runtime.start(run.parallel, seed=0)
    spec = SPECS[run.spec]
    teacher = build_chunks(spec, here, Precision.FP32, trainable=False, seed=3)
    chunks = build_chunks(spec, here, Precision.FP32, seed=7)
    for chunk in chunks:
        chunk.output = "hidden"
        if run.kind == "frozen":
            freeze_vocabulary(chunk)
    config = optimizer_config(Case(run.spec, distributed=run.distributed))
    wrapped = optim.wrap(chunks, config, runtime=here)
    optimizer = optim.build_optimizer(wrapped, config, Precision.FP32, STEPS)
    share = [part.chunk(here.dp_size)[here.dp_rank] for part in global_batch()]
    batches = MicroBatch.of(*share).split(run.micro_batch_size)
    under_way: list[int] = []
    _count_at_the_end(chunks[0].config, wrapped, under_way)
    losses, norms = [], []
    for _ in range(STEPS):
        states = collect_hidden(teacher, batches, here)
        common = {"vocab_size": spec.vocab_size, "tensor_group": tensor_group(here)}
        loss: Any = DistillationLoss(
            student=chunks[-1],
            teacher=teacher[-1],
            teacher_states=states,
            objective=Objective(lm_weight=0.3, top_k=5 if run.kind == "top_k" else None),
            statistics=True,
            **common,
        )
        if run.kind == "text":
            loss = LanguageModelLoss(model=chunks[-1], **common)
        optimizer.zero_grad()
        report = reduce_report(run_schedule(wrapped, batches, loss, runtime=here, forward_only=False), here)
        losses.append(report["total"])
        norms.append(optimizer.step().grad_norm)
        if len(losses) == 1:  # a validation between steps
            run_schedule(wrapped, batches, loss, runtime=here, forward_only=True)
    weights = {
        f"{index} {weight.name}": parameter.detach().clone()
        for index, chunk in enumerate(chunks)
        for weight, parameter in chunk.named_weights()
    }
    buckets = sum(len(chunk.bucket_groups) for chunk in wrapped)
    runtime.stop()
    return {"losses": losses, "norms": norms, "weights": weights, "buckets": buckets, "under way": under_way}


def _count_at_the_end(config: Any, wrapped: list[Any], into: list[int]) -> None:
    finalize = config.finalize_model_grads_func

    def counted(*args: Any, **kwargs: Any) -> None:
        groups = [group for chunk in wrapped for group in chunk.bucket_groups]
        into.append(sum(group.grad_reduce_handle is not None for group in groups))
        finalize(*args, **kwargs)

    config.finalize_model_grads_func = counted


def train_both(runs: list[Run]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Each run after the backward pass, and during it in small buckets."""
    results = []
    for run in runs:
        plain = train(replace(run, parallel=run.parallel.model_copy(update={"overlap_grad_reduce": False})))
        small = {"overlap_grad_reduce": True, "grad_bucket_size": 3000}
        results.append((plain, train(replace(run, parallel=run.parallel.model_copy(update=small)))))
    return results


def same(run: Run, plain: dict[str, Any], overlapping: dict[str, Any]) -> bool:
    """Whether two runs are bit-identical.

    With the distributed optimizer to 1e-6: other buckets give every rank other shards, and the gradient norm is a sum
    over shards, whose order rounding can see.
    """
    pairs = [
        *((torch.tensor(plain[name]), torch.tensor(overlapping[name])) for name in ("losses", "norms")),
        *((weight, overlapping["weights"][name]) for name, weight in plain["weights"].items()),
    ]
    tolerance = 1e-6 if run.distributed else 0
    return all(torch.allclose(a, b, rtol=tolerance, atol=tolerance) for a, b in pairs)
