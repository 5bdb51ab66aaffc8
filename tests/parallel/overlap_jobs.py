"""Train with gradients added up during the backward pass and after it, and weights gathered during the forward pass."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nemo_minitron.config.distillation import Objective
from nemo_minitron.config.parallel import ParallelConfig, Precision
from tests.parallel.megatron_jobs import ALL_SPECS, EXPERT_SPECS, Case, global_batch, optimizer_config

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
    steps: int = STEPS
    validations: tuple[int, ...] = (1,)
    """Steps that a validation follows."""
    folder: Path | None = None
    """Write a training checkpoint here after half of the steps, and go on from one that is there."""


def train(run: Run) -> dict[str, Any]:
    """Losses, norms and weights; and of each step, how many buckets were under way when the backward pass ended.

    Also, of each step, how many buckets of weights were under way, and how many neither that nor complete, when it was
    done; and the latter when a pass of a validation began.
    """
    from nemo_minitron.megatron import optim, param_gather, runtime, sharded_io
    from nemo_minitron.megatron.build import build_chunks
    from nemo_minitron.megatron.forward import MicroBatch, collect_hidden, reduce_report
    from nemo_minitron.megatron.forward import run as run_schedule
    from nemo_minitron.megatron.model import freeze_vocabulary
    from nemo_minitron.models.losses import DistillationLoss, LanguageModelLoss, tensor_group

    here = runtime.start(run.parallel, seed=0)
    spec = (ALL_SPECS | EXPERT_SPECS)[run.spec]
    teacher = build_chunks(spec, here, Precision.FP32, trainable=False, seed=3)
    chunks = build_chunks(spec, here, Precision.FP32, seed=7)
    for chunk in chunks:
        chunk.output = "hidden"
        if run.kind == "frozen":
            freeze_vocabulary(chunk)
    config = optimizer_config(Case(run.spec, distributed=run.distributed))
    wrapped = optim.wrap(chunks, config, runtime=here)
    optimizer = optim.build_optimizer(wrapped, config, Precision.FP32, run.steps)
    first = 0
    if run.folder is not None and run.folder.exists():
        first = sharded_io.load_training(wrapped, optimizer, run.folder)["step"]
    share = [part.chunk(here.dp_size)[here.dp_rank] for part in global_batch()]
    batches = MicroBatch.of(*share).split(run.micro_batch_size)
    under_way: list[int] = []
    _count_at_the_end(chunks[0].config, wrapped, under_way)
    losses, norms, validated, gathering, waiting = [], [], [], [], []
    for step in range(first + 1, run.steps + 1):
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
        groups = [group for chunk in wrapped for group in chunk.bucket_groups]
        handles = sum(group.param_gather_handle is not None for group in groups)
        gathering.append((handles, _out_of_date(groups)))
        if run.folder is not None and step == run.steps // 2:
            sharded_io.save_training(wrapped, optimizer, run.folder, common={"step": step})
        if step in run.validations:
            begins = chunks[0].register_forward_pre_hook(lambda *_, groups=groups: waiting.append(_out_of_date(groups)))
            report = reduce_report(run_schedule(chunks, batches, loss, runtime=here, forward_only=True), here)
            begins.remove()
            validated.append(report["total"])
    param_gather.disconnect(chunks)
    weights = {
        f"{index} {weight.name}": parameter.detach().clone()
        for index, chunk in enumerate(chunks)
        for weight, parameter in chunk.named_weights()
    }
    buckets = sum(len(chunk.bucket_groups) for chunk in wrapped)
    runtime.stop()
    return {
        "losses": losses,
        "norms": norms,
        "validated": validated,
        "weights": weights,
        "buckets": buckets,
        "under way": under_way,
        "gathering": gathering,
        "waiting": waiting,
    }


def _out_of_date(groups: list[Any]) -> int:
    return sum(not group.param_gather_dispatched for group in groups)


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


def train_gathering(runs: list[Run]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Each run in the same small buckets, with weights gathered after the step, and during the next forward pass."""
    results = []
    for run in runs:
        # An untied output layer fills a bucket of its own, which no module waits for.
        small = {"overlap_grad_reduce": True, "grad_bucket_size": 2000}
        ways = [run.parallel.model_copy(update={**small, "overlap_param_gather": late}) for late in (False, True)]
        results.append(tuple(train(replace(run, parallel=way)) for way in ways))
    return results


def train_and_go_on(run: Run) -> tuple[dict[str, Any], dict[str, Any]]:
    """A run that leaves a checkpoint on its way, and one that begins there."""
    return train(run), train(run)


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
