"""Training on the card: validate, train, save, resume; and no wait for the card inside a step."""

import threading
import time

import torch

from benchmarks.gpu import models
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.registry import Outcome, UnavailableError, check
from nemo_minitron.config.distillation import Objective
from nemo_minitron.megatron import runtime, sharded_io
from nemo_minitron.megatron.checkpoint_writer import BackgroundWriter
from nemo_minitron.megatron.forward import collect_hidden

NEEDS = ("megatron.core", "pydantic", "psutil")
RESUMED = 1e-5
"""Relative difference of a resumed run's losses: on a GPU, sums may be taken in another order."""


def _train_and_resume(bench: Bench, *, distributed: bool, kind: str = "dense") -> Outcome:
    first = models.training(bench, distributed=distributed, kind=kind)
    with torch.inference_mode():  # as Lightning validates over NCCL
        try:
            before = first.validate()
            inference = "under inference mode"
        except RuntimeError as error:
            before, inference = float("nan"), f"FAILS under inference mode ({str(error)[:60]})"
    bench.clear()  # a CPU keeps buffers between calls, and inference mode has marked them
    losses = [first.step() for _ in range(3)]
    folder = bench.folder() / "training.ckpt"
    sharded_io.save_training(first.chunks, first.optimizer, folder, common={"step": 3})
    rest = [first.step() for _ in range(3)]
    second = models.training(bench, distributed=distributed, kind=kind)
    common = sharded_io.load_training(second.chunks, second.optimizer, folder)
    again = [second.step() for _ in range(3)]
    apart = max(abs(a / b - 1) for a, b in zip(again, rest, strict=True))
    falling = rest[-1] < losses[0]
    ok = falling and apart <= RESUMED and common == {"step": 3} and abs(before / losses[0] - 1) < 1e-3
    figure = (
        f"validated {inference}: {before:.4f}; trained {losses[0]:.4f} -> {rest[-1]:.4f}; "
        f"resumed apart by {apart:.1e} (relative, at most {RESUMED:g})"
    )
    return Outcome(figure=figure, ok=ok, figures={"losses": losses + rest, "resumed": again, "validated": before})


@check(order=10, seconds=20, limit=90, needs=NEEDS)
def resume_ordinary(bench: Bench) -> Outcome:
    """Validate, train, save, resume, with Megatron's ordinary optimizer."""
    return _train_and_resume(bench, distributed=False)


@check(order=11, seconds=10, limit=60, needs=NEEDS)
def resume_distributed(bench: Bench) -> Outcome:
    """Validate, train, save, resume, with Megatron's distributed optimizer."""
    return _train_and_resume(bench, distributed=True)


@check(order=15, seconds=10, limit=90, needs=NEEDS)
def resume_experts(bench: Bench) -> Outcome:
    """Validate, train, save, resume, of a mixture of experts."""
    return _train_and_resume(bench, distributed=True, kind="experts")


@check(order=16, seconds=10, limit=90, needs=NEEDS)
def resume_hybrid(bench: Bench) -> Outcome:
    """Validate, train, save, resume, of a hybrid of Mamba and attention."""
    return _train_and_resume(bench, distributed=True, kind="hybrid")


@check(order=12, seconds=5, needs=NEEDS)
def one_rank_of_nccl(bench: Bench) -> Outcome:
    """Process groups of one rank, and the collectives that stages use, over the card's own backend."""
    import torch.distributed as dist

    here = models.start()
    for dtype in (torch.float64, torch.float32, torch.int64, torch.int32):
        ones = torch.ones(4, device=here.device, dtype=dtype)
        dist.all_reduce(ones, op=dist.ReduceOp.MIN, group=here.groups.dp_cp)
        if int(ones.sum()) != 4:
            raise ValueError(f"all_reduce of {dtype} changed its numbers")
    runtime.barrier()
    told = (runtime.agree(True), runtime.agree(False), runtime.broadcast_object({"a": 1}, patient=True))
    ok = told == (True, False, {"a": 1})
    return Outcome(figure=f"{dist.get_backend()} on {here.device}", ok=ok)


@check(order=30, seconds=8, needs=NEEDS)
def no_hidden_waits(bench: Bench) -> Outcome:
    """A distillation step's forward pass, loss and backward pass never wait for the card."""
    from nemo_minitron.models.losses import DistillationLoss

    train = models.training(bench)
    teacher = models.build_chunks(models.small(bench), train.here, models.precision(bench), trainable=False, seed=2)
    batch = train.batches[0].to(train.here.device)
    loss = DistillationLoss(
        student=train.model,
        teacher=teacher[0],
        teacher_states=collect_hidden(teacher, train.batches, train.here),
        vocab_size=models.VOCABULARY,
        tensor_group=None,
        objective=Objective(lm_weight=0.5),
    )
    for attempt in range(2):  # the first makes buffers and handles of libraries, which may wait
        bench.sync()
        if bench.on_gpu and attempt:
            torch.cuda.set_sync_debug_mode("error")
        try:
            hidden = train.chunks[0](batch.tokens, batch.position_ids, None)
            loss(hidden, batch, 0).total.backward()
        finally:
            if bench.on_gpu:
                torch.cuda.set_sync_debug_mode("default")
    if not bench.on_gpu:
        raise UnavailableError("a CPU has no queue to wait for; the step itself ran")
    return Outcome(figure="none")


@check(order=50, seconds=20, limit=90, needs=NEEDS)
def background_save(bench: Bench) -> Outcome:
    """A checkpoint written beside a busy card is complete, equal, and not held up by it."""
    train = models.training(bench)
    train.step()
    writer, folder, took = BackgroundWriter(), bench.folder(), {}
    size = 64 if bench.tiny else 8192
    x = bench.normal(size, size)
    for busy in (False, True):
        path = folder / f"{busy}.ckpt"
        started = time.perf_counter()
        sharded_io.save_training(train.chunks, train.optimizer, path, common={}, background=writer)
        while _is_writing(path.name) and time.perf_counter() - started < 30:
            if busy:  # the queue is never empty
                for _ in range(20):
                    x = (x @ x).mul_(1e-3)
            else:
                time.sleep(0.005)
        took[busy] = time.perf_counter() - started
        bench.sync()
        if writer.finished(wait=True) != path:
            raise ValueError("the checkpoint did not become complete")
    expected = train.step()
    second = models.training(bench)
    sharded_io.load_training(second.chunks, second.optimizer, folder / "True.ckpt")
    apart = abs(second.step() / expected - 1)
    ok = apart <= RESUMED and took[True] < 3 * took[False] + 2
    figure = f"idle {took[False]:.2f} s, busy {took[True]:.2f} s; resumed apart by {apart:.1e}"
    return Outcome(figure=figure, ok=ok, figures={"idle_s": took[False], "busy_s": took[True], "apart": apart})


def _is_writing(name: str) -> bool:
    return any(name in thread.name for thread in threading.enumerate() if thread is not threading.main_thread())
