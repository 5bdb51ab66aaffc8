"""The forward KL with both output layers at Llama 3.1's vocabulary: fused, dense, ModelOpt's and Liger's."""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import kd_loss
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.registry import Kind, Outcome, Target, UnavailableError, check, is_installed

PRODUCTS = 4
"""Of the complete loss: logits of student and teacher, and the gradients of the student's states and weight."""


def _sizes(bench: Bench) -> tuple[int, int, int]:
    """Tokens, vocabulary, hidden size."""
    return (64, 512, 32) if bench.tiny else (8192, 128256, 4096)


def _problem(bench: Bench) -> kd_loss.Problem:
    tokens, vocabulary, hidden = _sizes(bench)
    sizes = argparse.Namespace(
        tokens=tokens,
        vocabulary=vocabulary,
        hidden=hidden,
        teacher_hidden=hidden,
        dtype="fp32" if bench.tiny else "bf16",
        divergence="forward_kl",
    )
    return kd_loss.Problem.make(sizes, None, bench.device.type)


def _liger(problem: kd_loss.Problem) -> Tensor:
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    # Its Jensen-Shannon divergence with beta 0 is the forward KL; it is a mean over tokens.
    loss = LigerFusedLinearJSD(jsd_beta=0.0)(
        problem.student, problem.student_weight, problem.teacher, problem.teacher_weight, None
    )
    return loss * problem.student.shape[0]


def _modelopt(problem: kd_loss.Problem) -> Tensor:
    from benchmarks.gpu import models

    models.start()  # its loss asks Megatron for the tensor-parallel group
    return kd_loss.modelopt(problem)


def _labelled(problem: kd_loss.Problem) -> Tensor:
    """The fused loss with everything that training asks of it in the steps it reports."""
    from nemo_minitron.parallel.fused_linear_kd import fused_linear_kd

    return fused_linear_kd(
        problem.student,
        problem.student_weight,
        problem.teacher,
        problem.teacher_weight,
        labels=torch.zeros(problem.student.shape[0], dtype=torch.int64, device=problem.student.device),
        lm_weight=0.5,
        statistics=True,
        vocab_size=problem.vocabulary,
        weight_gradient=problem.main_grad,
    ).loss_sum


def _measured(bench: Bench, loss: Callable[[kd_loss.Problem], Tensor]) -> dict[str, Any]:
    problem = _problem(bench)

    def once() -> None:
        loss(problem).backward()
        problem.student.grad = problem.student_weight.grad = None

    tokens, vocabulary, hidden = _sizes(bench)
    seconds = bench.seconds(once)
    value = float(loss(problem).detach()) / tokens
    started = bench.kernels(once)
    return {
        "ms": seconds * 1e3,
        "peak_gb": bench.peak_gb(once),
        "launches": started.launches,
        "busy_ms": started.busy_ms,
        "of_matrix_rate": PRODUCTS * 2 * tokens * vocabulary * hidden / seconds / bench.matrix_rate,
        "nats": value,
    }


def _told(name: str, figures: dict[str, Any]) -> str:
    return (
        f"{name}: {figures['ms']:.1f} ms, {figures['peak_gb']:.2f} GB, {figures['launches']} launches "
        f"(busy {figures['busy_ms']:.1f} ms), {figures['of_matrix_rate']:.0%} of the matrix rate, "
        f"{figures['nats']:.4f} nats"
    )


@check(order=25, seconds=25, limit=90, kind=Kind.SPEED)
def fused_kl_speed(bench: Bench) -> Outcome:
    """Forward KL and gradients at N 8192, V 128256, h 4096 in bf16: fused, and dense in plain torch."""
    rows = {"fused": kd_loss.fused, "fused, labels and statistics": _labelled, "dense": kd_loss.dense}
    figures = {name: _measured(bench, loss) for name, loss in rows.items()}
    rate = f"matrix rate {bench.matrix_rate / 1e12:.0f} TFLOP/s"
    lines = [rate, *(_told(name, each) for name, each in figures.items())]
    share = figures["fused"]["of_matrix_rate"]
    target = Target(name="fused, of the matrix rate", wanted="at least 0.55", found=share, met=share >= 0.55)
    apart = abs(figures["fused"]["nats"] / figures["dense"]["nats"] - 1)
    return Outcome(
        figure="\n".join(lines),
        ok=apart < 1e-2,
        figures={**figures, "matrix_rate": bench.matrix_rate},
        targets=() if bench.tiny else (target,),
    )


@check(order=26, seconds=25, limit=90, kind=Kind.SPEED)
def fused_kl_and_others(bench: Bench) -> Outcome:
    """The same beside ModelOpt's and Liger's losses, where they are installed."""
    others = {}
    if is_installed("modelopt.torch.distill.plugins.megatron") and is_installed("megatron.core"):
        others["ModelOpt LogitsKLLoss"] = _modelopt
    if is_installed("liger_kernel") and bench.on_gpu:
        others["Liger LigerFusedLinearJSD"] = _liger
    if not others:
        raise UnavailableError("needs modelopt (with megatron.core), or liger_kernel and a GPU")
    figures = {"fused": _measured(bench, kd_loss.fused)}
    lines = [_told("fused", figures["fused"])]
    for name, loss in others.items():
        try:
            figures[name] = _measured(bench, loss)
            lines.append(_told(name, figures[name]))
        except Exception as error:  # theirs, whatever it is
            lines.append(f"{name} fails: {type(error).__name__}: {str(error)[:100]}")
    targets = ()
    if (theirs := figures.get("ModelOpt LogitsKLLoss")) and not bench.tiny:
        time, memory = (figures["fused"][key] / max(theirs[key], 1e-9) for key in ("ms", "peak_gb"))
        targets = (
            Target(name="time over ModelOpt's", wanted="at most 0.8", found=time, met=time <= 0.8),
            Target(name="memory over ModelOpt's", wanted="at most 0.1", found=memory, met=memory <= 0.1),
        )
    return Outcome(figure="\n".join(lines), figures=figures, targets=targets)
