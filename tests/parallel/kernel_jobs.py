"""What the ranks of `test_kernels.py` do: fused losses in their Triton form, in Triton's interpreter."""

from dataclasses import dataclass

import torch
from torch import distributed
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_minitron.ops.divergence import Divergence
from nemo_minitron.ops.sampling import SparseTargets
from nemo_minitron.parallel.fused_linear_cross_entropy import fused_linear_cross_entropy
from nemo_minitron.parallel.fused_linear_kd import fused_linear_kd
from nemo_minitron.parallel.fused_linear_sparse_kd import fused_linear_sparse_kd

TOKENS, HIDDEN, TEACHER_HIDDEN = 7, 5, 6


@dataclass(frozen=True)
class Case:
    """A loss: the divergence, or the cross-entropy alone."""

    divergence: Divergence | None
    vocabulary: int
    padded: int
    """Columns of all ranks together."""
    keep: tuple[int, ...]
    lm_weight: float = 0.0
    chunk: int | None = None
    statistics: bool = True
    deviation: float = 1.0
    dtype: torch.dtype = torch.float32
    entries: int = 0
    """Of the teacher's distribution that are compared; 0 for all tokens."""
    sampled: bool = False
    """Whether they are draws, instead of the likeliest."""


def problem(case):
    generator = torch.Generator().manual_seed(case.vocabulary)

    def normal(*shape):
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * case.deviation).to(case.dtype)

    keep = torch.zeros(TOKENS, dtype=torch.bool)
    keep[list(case.keep)] = True
    return {
        "student_hidden": normal(TOKENS, HIDDEN),
        "student_weight": normal(case.padded, HIDDEN),
        "teacher_hidden": normal(TOKENS, TEACHER_HIDDEN),
        "teacher_weight": normal(case.padded, TEACHER_HIDDEN),
        "keep": keep,
        "labels": torch.randint(case.vocabulary, (TOKENS,), generator=generator),
    }


def sparse(case):
    """The teacher's likeliest tokens with their probabilities, or tokens drawn by hand; in float64 arithmetic."""
    data = problem(case)
    logits = (data["teacher_hidden"].double() @ data["teacher_weight"].double().t())[:, : case.vocabulary]
    probabilities = torch.softmax(logits / case.divergence.temperature, -1)
    likeliest, ids = probabilities.topk(case.entries, -1)
    if case.sampled:
        counts = torch.arange(1, case.entries + 1).expand_as(ids)
        return SparseTargets.from_counts(ids, counts, temperature=case.divergence.temperature)
    tail = (1 - likeliest.sum(-1)).clamp_min(0) if case.entries < case.vocabulary else torch.zeros(TOKENS)
    return SparseTargets(
        ids=ids, log_probs=likeliest.log().float(), tail=tail.float(), temperature=case.divergence.temperature
    )


class Operators(TorchDispatchMode):
    """Names of the kernels' operators that ran."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "nemo_minitron":
            self.names.append(func._schema.name.partition("::")[2])
        return func(*args, **(kwargs or {}))


def fused(case):
    """Loss, statistics, gradients of states and of this rank's rows of the weight, and the kernels that ran."""
    rank, world = distributed.get_rank(), distributed.get_world_size()
    data = problem(case)
    tp = distributed.group.WORLD if world > 1 else None
    hidden = data["student_hidden"].clone().requires_grad_()
    weights = [data[f"{who}_weight"].chunk(world)[rank].clone() for who in ("student", "teacher")]
    weight = weights[0].requires_grad_()
    common = {"vocab_size": case.vocabulary, "chunk_tokens": case.chunk, "tp": tp}
    with Operators() as ran:
        if case.divergence is None:
            result = fused_linear_cross_entropy(hidden, weight, data["labels"], data["keep"], **common)
            loss, found = result.ce_sum, {"loss": result.ce_sum, "correct": result.correct}
        elif case.entries:
            result = fused_linear_sparse_kd(
                hidden,
                weight,
                sparse(case),
                data["keep"],
                data["labels"],
                divergence=case.divergence,
                kd_weight=0.7,
                lm_weight=case.lm_weight,
                statistics=case.statistics,
                **common,
            )
            loss, found = result.loss_sum, {"loss": result.loss_sum, "kd": result.kd_sum}
            if case.statistics:
                found |= {"ce": result.student_ce_sum, "agreement": result.top1_agreement}
        else:
            options = {"divergence": case.divergence, "kd_weight": 0.7, "lm_weight": case.lm_weight}
            result = fused_linear_kd(
                hidden,
                weight,
                data["teacher_hidden"],
                weights[1],
                data["keep"],
                data["labels"],
                statistics=case.statistics,
                **options,
                **common,
            )
            loss, found = result.loss_sum, {"loss": result.loss_sum, "kd": result.kd_sum}
            if case.statistics:
                found |= {"ce": result.student_ce_sum, "teacher_ce": result.teacher_ce_sum}
                found["agreement"] = result.top1_agreement
    (loss * 3).backward()
    found = {name: value.detach().double() for name, value in found.items()}
    return {**found, "d_hidden": hidden.grad / 3, "d_weight": weight.grad / 3}, ran.names


def every(cases):
    """One start of the ranks for all cases."""
    return [fused(case) for case in cases]
