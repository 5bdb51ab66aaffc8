"""A whole distillation step against what its parts cost: the teacher's forward pass, and plain training of the student.

    python -m benchmarks.kd_step --json

Efficiency is `(teacher forward + student training step) / distillation step`, on the demo's shapes (SmolLM2-135M to
101M) with random weights, all in one process and taking turns; the least time of each over the rounds counts. The
numbers are bf16 where the hardware multiplies them, else fp32.
The teacher's forward pass ends in logits, the student's step is forward, fused cross-entropy, backward and AdamW.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from nemo_minitron.arch.spec import LayerSpec, ModelSpec
from nemo_minitron.config.parallel import ParallelConfig, Precision
from nemo_minitron.config.training import OptimizerConfig
from nemo_minitron.megatron import forward, optim, runtime
from nemo_minitron.megatron.build import build_chunks
from nemo_minitron.megatron.forward import MicroBatch
from nemo_minitron.megatron.runtime import Runtime
from nemo_minitron.models.losses import DistillationLoss, LanguageModelLoss

TEACHER = ModelSpec(
    family="llama",
    vocab_size=49152,
    hidden_size=576,
    head_dim=64,
    layers=(LayerSpec(num_attention_heads=9, num_query_groups=3, ffn_hidden_size=1536),) * 30,
    max_position_embeddings=8192,
    rotary_base=100000.0,
    tied_embeddings=True,
)
STUDENT = TEACHER.with_sizes(num_layers=24, ffn_hidden_size=1248)


class Contest:
    """The three parts, on one batch.

    Args:
        here: The running layout.
        samples: Sequences of a step, one micro-batch each.
        length: Tokens of a sequence.
        precision: Of both models.
    """

    def __init__(self, here: Runtime, *, samples: int, length: int, precision: Precision) -> None:
        self.here = here
        self.teacher = build_chunks(TEACHER, here, precision, trainable=False, seed=0)
        student = build_chunks(STUDENT, here, precision, seed=1)
        student[0].output = "hidden"
        config = OptimizerConfig()
        self.student = optim.wrap(student, config)
        self.optimizer = optim.build_optimizer(self.student, config, precision, steps=1000)
        tokens = torch.randint(0, TEACHER.vocab_size, (samples, length), device=here.device)
        keep = torch.ones_like(tokens, dtype=torch.bool)
        self.batches = [
            MicroBatch.of(row, row.roll(-1, 1), own) for row, own in zip(tokens.split(1), keep.split(1), strict=True)
        ]

    def teacher_forward(self) -> None:
        """The teacher's logits."""
        forward.collect_logits(self.teacher, self.batches, self.here)

    def student_step(self) -> None:
        """One step on the text alone."""
        model = optim.unwrap(self.student[-1])
        self._step(LanguageModelLoss(model=model, vocab_size=STUDENT.vocab_size, tensor_group=None))

    def distillation_step(self) -> None:
        """One step on the teacher's distribution."""
        states = forward.collect_hidden(self.teacher, self.batches, self.here)
        self._step(
            DistillationLoss(
                student=optim.unwrap(self.student[-1]),
                teacher=self.teacher[-1],
                teacher_states=states,
                vocab_size=STUDENT.vocab_size,
                tensor_group=None,
            )
        )

    def _step(self, loss: Any) -> None:
        self.optimizer.zero_grad()
        forward.run(self.student, self.batches, loss, runtime=self.here, forward_only=False)
        self.optimizer.step()


def least_times(parts: Sequence[Callable[[], None]], *, rounds: int) -> list[float]:
    """Seconds of each, the least of all rounds after one to warm up; they take turns."""
    times: list[list[float]] = [[] for _ in parts]
    for _ in range(rounds + 1):
        for part, own in zip(parts, times, strict=True):
            start = time.perf_counter()
            part()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            own.append(time.perf_counter() - start)
    return [min(own[1:]) for own in times]


def native_precision() -> Precision:
    """bf16 on GPUs and on processors with AMX; others compute it many times as slowly as fp32."""
    fast = torch.cuda.is_available() or torch.cpu._is_amx_tile_supported()
    return Precision.BF16 if fast else Precision.FP32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--precision", type=Precision, default=native_precision())
    args = parser.parse_args()
    here = runtime.start(ParallelConfig(), seed=0)
    try:
        contest = Contest(here, samples=args.samples, length=args.length, precision=args.precision)
        parts = (contest.teacher_forward, contest.student_step, contest.distillation_step)
        teacher, student, both = least_times(parts, rounds=args.rounds)
    finally:
        runtime.stop()
    efficiency = (teacher + student) / both
    if args.json:
        print(json.dumps({"efficiency": round(efficiency, 3)}))
        return
    tokens = args.samples * args.length
    print(f"teacher forward    {teacher:7.3f} s")
    print(f"student step       {student:7.3f} s")
    print(f"distillation step  {both:7.3f} s   {tokens / both:,.0f} tokens/s")
    print(f"efficiency         {efficiency:7.3f}")


if __name__ == "__main__":
    main()
