"""A complete distillation step: against what its parts cost, and against the same step with `transformers`.

    python -m benchmarks.kd_step --json
    python -m benchmarks.kd_step --precision bf16 --objective demo --samples 1

Two ratios, on the demo's shapes (SmolLM2-135M to 101M) with random weights, all in one process with the same threads:

- `efficiency`: `(teacher forward + student training step) / distillation step`. The teacher's forward pass ends in
  logits, the student's step is forward, fused cross-entropy, backward and AdamW.
- `over_transformers`: the time of `transformers_step` over that of our distillation step. Both begin with the same
  weights, take the same micro-batches and compute the same loss, which is checked.

The contestants take turns in every round, in an order that is reversed from round to round, and each ratio is the
median of the rounds' own ratios: what else the machine does hits both sides. With one thread it is the process's CPU
time that counts, which other processes change less. The default precision is bf16 where the hardware multiplies it.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks.transformers_step import Objective, TransformersStep
from nemo_minitron.arch.layer import transformer_layer
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.config import distillation
from nemo_minitron.config.parallel import ParallelConfig, Precision
from nemo_minitron.config.training import OptimizerConfig
from nemo_minitron.megatron import forward, optim, runtime
from nemo_minitron.megatron.build import build_chunks
from nemo_minitron.megatron.forward import MicroBatch
from nemo_minitron.megatron.model import freeze_vocabulary
from nemo_minitron.megatron.runtime import Runtime
from nemo_minitron.models.losses import DistillationLoss, LanguageModelLoss

TEACHER = ModelSpec(
    vocab_size=49152,
    hidden_size=576,
    head_dim=64,
    layers=(transformer_layer(num_attention_heads=9, num_query_groups=3, ffn_hidden_size=1536),) * 30,
    max_position_embeddings=8192,
    rotary_base=100000.0,
    tied_embeddings=True,
)
STUDENT = TEACHER.with_sizes(num_layers=24, ffn_hidden_size=1248)

OBJECTIVES = {
    "kl": Objective(),
    "demo": Objective(kd_weight=0.5, lm_weight=0.5, freeze_embeddings=True),
}
LOSS_TOLERANCE = {Precision.FP32: 1e-4, Precision.BF16: 2e-2}


class Contest:
    """All contestants, on one batch.

    Args:
        here: The running layout.
        samples: Sequences of a step.
        micro_batch: Sequences of a micro-batch.
        length: Tokens of a sequence.
        precision: Of all models.
        objective: What the student is trained on.
        teacher: Architecture of the teacher.
        student: And of the student.
    """

    def __init__(
        self,
        here: Runtime,
        *,
        samples: int,
        length: int,
        precision: Precision,
        objective: Objective,
        micro_batch: int = 1,
        teacher: ModelSpec = TEACHER,
        student: ModelSpec = STUDENT,
    ) -> None:
        self.here, self.objective, self.spec = here, objective, student
        self.teacher = build_chunks(teacher, here, precision, trainable=False, seed=0)
        self.teacher[0].output = "hidden"
        chunks = build_chunks(student, here, precision, seed=1)
        chunks[0].output = "hidden"
        if objective.freeze_embeddings:
            freeze_vocabulary(chunks[0])
        config = OptimizerConfig(warmup_steps=1)
        self.theirs = TransformersStep(self.teacher[0], chunks[0], objective, config)
        self.student = optim.wrap(chunks, config)
        self.optimizer = optim.build_optimizer(self.student, config, precision, steps=1000)
        tokens = torch.randint(0, teacher.vocab_size, (samples, length), device=here.device)
        keep = torch.ones_like(tokens, dtype=torch.bool)
        self.batches = MicroBatch.of(tokens, tokens.roll(-1, 1), keep).split(micro_batch)

    def teacher_forward(self) -> None:
        """The teacher's logits."""
        forward.collect_logits(self.teacher, self.batches, self.here)

    def student_step(self) -> float:
        """One step on the text alone; returns the mean loss."""
        model = optim.unwrap(self.student[-1])
        return self._step(LanguageModelLoss(model=model, vocab_size=self.spec.vocab_size, tensor_group=None))

    def distillation_step(self) -> float:
        """One step on the teacher's distribution; returns the mean loss."""
        states = forward.collect_hidden(self.teacher, self.batches, self.here)
        return self._step(
            DistillationLoss(
                student=optim.unwrap(self.student[-1]),
                teacher=self.teacher[-1],
                teacher_states=states,
                vocab_size=self.spec.vocab_size,
                tensor_group=None,
                objective=distillation.Objective(
                    kd_weight=self.objective.kd_weight, lm_weight=self.objective.lm_weight
                ),
            )
        )

    def transformers_step(self) -> float:
        """The same with `transformers`."""
        return self.theirs.step([(batch.tokens, batch.labels) for batch in self.batches])

    def _step(self, loss: Any) -> float:
        self.optimizer.zero_grad()
        reports = forward.run(self.student, self.batches, loss, runtime=self.here, forward_only=False)
        self.optimizer.step()
        sums = forward.reduce_report(reports, self.here)
        return sums["total"] / sums["tokens"]

    def check(self, precision: Precision) -> None:
        """Take both distillation steps, of which every weight and gradient has a part in the loss of the second.

        Raises:
            AssertionError: The losses differ.
        """
        for _ in range(2):
            ours, theirs = self.distillation_step(), self.transformers_step()
            if not abs(ours - theirs) <= LOSS_TOLERANCE[precision] * abs(theirs):
                raise AssertionError(f"loss {ours} here and {theirs} with transformers")


def take_turns(parts: Mapping[str, Callable[[], Any]], *, rounds: int) -> dict[str, list[float]]:
    """Seconds of each part in each round; the order is turned round every time, and nothing is collected on the way."""
    clock = time.process_time if torch.get_num_threads() == 1 and not torch.cuda.is_available() else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in parts}
    gc.collect()
    gc.disable()
    try:
        for index in range(rounds):
            for name in list(parts) if index % 2 else reversed(list(parts)):
                start = clock()
                parts[name]()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                times[name].append(clock() - start)
    finally:
        gc.enable()
    return times


def ratios(times: Mapping[str, list[float]]) -> dict[str, list[float]]:
    """Efficiency and advantage of each round."""
    rounds = list(zip(*(times[name] for name in ("teacher", "student", "ours", "transformers")), strict=True))
    return {
        "efficiency": [(teacher + student) / ours for teacher, student, ours, _ in rounds],
        "over_transformers": [theirs / ours for _, _, ours, theirs in rounds],
    }


def native_precision() -> Precision:
    """bf16 on GPUs and on processors with AMX; others compute it many times as slowly as fp32."""
    fast = torch.cuda.is_available() or torch.cpu._is_amx_tile_supported()
    return Precision.BF16 if fast else Precision.FP32


def arguments() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    parser.add_argument("--samples", type=int, default=2, help="sequences of a step")
    parser.add_argument("--micro-batch", type=int, default=1, help="sequences of a micro-batch")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--objective", choices=OBJECTIVES, default="kl")
    parser.add_argument("--precision", type=Precision, default=native_precision())
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    here = runtime.start(ParallelConfig(), seed=0)
    try:
        contest = Contest(
            here,
            samples=args.samples,
            micro_batch=args.micro_batch,
            length=args.length,
            precision=args.precision,
            objective=OBJECTIVES[args.objective],
        )
        contest.check(args.precision)
        contest.student_step()  # warms up what the check has not
        parts = {
            "teacher": contest.teacher_forward,
            "student": contest.student_step,
            "ours": contest.distillation_step,
            "transformers": contest.transformers_step,
        }
        times = take_turns(parts, rounds=args.rounds)
    finally:
        runtime.stop()
    measured = ratios(times)
    if args.json:
        print(json.dumps({name: round(statistics.median(values), 3) for name, values in measured.items()}))
        return
    tokens = args.samples * args.length
    for name, seconds in times.items():
        typical = statistics.median(seconds)
        print(f"{name:18} {typical:7.3f} s  {tokens / typical:7,.0f} tokens/s   least {min(seconds):.3f} s")
    for name, values in measured.items():
        print(f"{name:18} {statistics.median(values):7.3f}    rounds from {min(values):.3f} to {max(values):.3f}")


if __name__ == "__main__":
    main()
