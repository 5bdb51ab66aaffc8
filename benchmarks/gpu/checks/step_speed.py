"""A complete distillation step: time, memory, and the share of the card's peak that it uses."""

from typing import Any

import torch

from benchmarks.gpu import models
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.registry import Kind, Outcome, check
from nemo_minitron.config.parallel import Recompute
from nemo_minitron.config.training import OptimizerConfig
from nemo_minitron.estimate.compute import forward_flops, training_flops
from nemo_minitron.megatron import forward, optim
from nemo_minitron.megatron.build import build_chunks


class Step:
    """Teacher's pass, student's forward and backward pass, update.

    Llama-3.1-8B's layers and vocabulary and those of a student of 4B, eight of each, so that all fits one card.
    """

    def __init__(self, bench: Bench) -> None:
        self.here = models.start()
        if bench.tiny:
            self.teacher_spec, self.student_spec = models.SMALL, models.TINY
        else:
            self.teacher_spec = models.llama(layers=8, hidden=4096, ffn=14336, heads=32)
            self.student_spec = models.llama(layers=8, hidden=3072, ffn=9216, heads=32)
        precision = models.precision(bench)
        self.teacher = build_chunks(self.teacher_spec, self.here, precision, trainable=False)
        student = build_chunks(self.student_spec, self.here, precision)
        models.fill([*self.teacher, *student])
        student[0].output = "hidden"
        config = OptimizerConfig(lr=1e-5, warmup_steps=0)
        self.student = optim.wrap(student, config)
        self.optimizer = optim.build_optimizer(self.student, config, precision, steps=1000)
        samples, self.length = (2, 64) if bench.tiny else (2, 8192)
        self.batches = models.batches(self.teacher_spec.vocab_size, samples=samples, length=self.length, masked=False)
        self.tokens = samples * self.length

    @property
    def flops(self) -> float:
        """Operations of a step: the teacher's forward pass, the student's three."""
        student = training_flops(self.student_spec, self.length, recompute=Recompute.NONE)
        return self.tokens * (forward_flops(self.teacher_spec, self.length) + student)

    def __call__(self) -> None:
        """One step."""
        loss: Any = self._loss(self.teacher_states())
        self.optimizer.zero_grad()
        forward.run(self.student, self.batches, loss, runtime=self.here, forward_only=False)
        self.optimizer.step()

    def teacher_states(self) -> list[torch.Tensor]:
        """The teacher's pass."""
        return forward.collect_hidden(self.teacher, self.batches, self.here)

    def _loss(self, states: list[torch.Tensor]) -> Any:
        from nemo_minitron.models.losses import DistillationLoss

        return DistillationLoss(
            student=optim.unwrap(self.student[-1]),
            teacher=self.teacher[-1],
            teacher_states=states,
            vocab_size=self.teacher_spec.vocab_size,
            tensor_group=None,
        )


@check(order=70, seconds=35, limit=120, kind=Kind.SPEED, needs=("megatron.core", "pydantic"))
def distillation_step(bench: Bench) -> Outcome:
    """A complete step of a 4B-shaped student and an 8B-shaped teacher, eight layers each: tokens/s and MFU."""
    from nemo_minitron.estimate.compute import peak_flops_of

    step = Step(bench)
    seconds = bench.seconds(step, rounds=3, warm_up=2)
    teacher = bench.seconds(step.teacher_states, rounds=3)
    rate = step.flops / seconds
    peak = peak_flops_of(torch.cuda.get_device_name()) if bench.on_gpu else None
    kernels = bench.kernels(step)
    figures = {
        "step_s": seconds,
        "teacher_s": teacher,
        "tokens_per_second": step.tokens / seconds,
        "flops_per_second": rate,
        "mfu": None if peak is None else rate / peak,
        "of_matrix_rate": rate / bench.matrix_rate,
        "peak_gb": bench.peak_gb(step),
        "held_gb": torch.cuda.memory_allocated() / 1e9 if bench.on_gpu else 0.0,
        "launches": kernels.launches,
        "busy_ms": kernels.busy_ms,
        "kernels": kernels.times,
    }
    mfu = "" if peak is None else f"MFU {rate / peak:.1%} of {peak / 1e12:.0f} TFLOP/s, "
    figure = (
        f"{seconds * 1e3:.0f} ms (teacher {teacher * 1e3:.0f}), {step.tokens / seconds:,.0f} tokens/s, {mfu}"
        f"{rate / bench.matrix_rate:.1%} of the measured matrix rate; "
        f"{figures['held_gb']:.1f} GB held, {figures['peak_gb']:.1f} GB more in a step, {figures['launches']} launches"
    )
    return Outcome(figure=figure, figures=figures)
