"""The fused output layers against float64 logits of all tokens: value and both gradients, every kind of loss."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from benchmarks.gpu import dense
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.registry import Outcome, check
from nemo_minitron.config.objective import DivergenceKind
from nemo_minitron.ops.divergence import Divergence
from nemo_minitron.ops.sampling import SparseTargets
from nemo_minitron.parallel.fused_linear_cross_entropy import fused_linear_cross_entropy
from nemo_minitron.parallel.fused_linear_kd import fused_linear_kd
from nemo_minitron.parallel.fused_linear_sparse_kd import fused_linear_sparse_kd
from nemo_minitron.parallel.sparse_targets import sample_targets, top_k_targets

TOLERANCES = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (2e-3, 1.5e-2)}
"""Of the value and of the gradients, relative. With bf16 the gradient of every logit is rounded to 2^-9 of itself."""


TOTAL_VARIATION_GRADIENT = 2e-3
"""Of its gradients in fp32: they jump where student and teacher give a token the same probability, and a rounding
decides some of the 15 million. Plain torch in fp32 is off by 1.3e-4 and 4.1e-4 at these sizes (temperature 2, CPU)."""


@dataclass
class Problem:
    """A micro-batch: masked tokens, a vocabulary that is no multiple of anything, padded columns."""

    x: Tensor
    w: Tensor
    teacher_x: Tensor
    teacher_w: Tensor
    keep: Tensor
    labels: Tensor
    vocab_size: int
    main_grad: Tensor | None
    wide: tuple[Tensor, Tensor]
    """Student states and weight in float64, with gradients of their own."""

    @classmethod
    def make(cls, bench: Bench, dtype: torch.dtype) -> "Problem":
        """The same one every time; bf16 weights come with the fp32 buffer that Megatron keeps for their gradient."""
        tokens, vocab, padded, width = (30, 251, 256, 24) if bench.tiny else (600, 32003, 32128, 512)
        torch.manual_seed(0)

        def normal(rows: int, columns: int, deviation: float) -> Tensor:
            return (torch.randn(rows, columns, device=bench.device) * deviation).to(dtype)

        x, w = normal(tokens, width, 1.0).requires_grad_(), normal(padded, width, 2 * width**-0.5).requires_grad_()
        return cls(
            x=x,
            w=w,
            teacher_x=normal(tokens, width, 1.0),
            teacher_w=normal(padded, width, 2 * width**-0.5),
            keep=torch.rand(tokens, device=bench.device) > 0.2,
            labels=torch.randint(0, vocab, (tokens,), device=bench.device),
            vocab_size=vocab,
            main_grad=None if dtype == torch.float32 else torch.zeros(padded, width, device=bench.device),
            wide=(x.detach().double().requires_grad_(), w.detach().double().requires_grad_()),
        )

    def student_logits(self) -> Tensor:
        """Of kept tokens, in float64."""
        x, w = self.wide
        return dense.logits(x[self.keep], w, self.vocab_size, self.x.dtype)

    def teacher_logits(self) -> Tensor:
        """Likewise; nothing flows back."""
        x, w = self.teacher_x.double(), self.teacher_w.double()
        return dense.logits(x[self.keep], w, self.vocab_size, self.x.dtype)

    def cross_entropy(self) -> Tensor:
        """Of the kept tokens' labels, summed."""
        return torch.nn.functional.cross_entropy(self.student_logits(), self.labels[self.keep], reduction="sum")

    def errors(self, found: Tensor, expected: Tensor) -> tuple[float, float, float]:
        """Relative errors of the value, the states' gradient, and the weight's, after both backward passes."""
        for leaf in (self.x, self.w, *self.wide):
            leaf.grad = None
        if self.main_grad is not None:
            # The fused forward pass has added to it already.
            weight_grad = self.main_grad.clone()
            self.main_grad.zero_()
        found.backward()
        expected.backward()
        if self.main_grad is None:
            assert self.w.grad is not None
            weight_grad = self.w.grad
        assert self.x.grad is not None
        return (
            abs(float(found.detach().double() / expected.detach()) - 1),
            dense.relative_error(self.x.grad, self.wide[0].grad),
            dense.relative_error(weight_grad, self.wide[1].grad),
        )


Case = Callable[[Problem], tuple[Tensor, Tensor]]
"""The fused loss and its twin."""


def _divergence_case(kind: DivergenceKind, temperature: float, lm_weight: float) -> Case:
    what = Divergence(kind=kind, temperature=temperature)

    def case(problem: Problem) -> tuple[Tensor, Tensor]:
        found = fused_linear_kd(
            problem.x,
            problem.w,
            problem.teacher_x,
            problem.teacher_w,
            problem.keep,
            problem.labels,
            divergence=what,
            kd_weight=0.7,
            lm_weight=lm_weight,
            vocab_size=problem.vocab_size,
            weight_gradient=problem.main_grad,
            statistics=True,
        )
        expected = 0.7 * dense.divergence(problem.student_logits(), problem.teacher_logits(), what).sum()
        return found.loss_sum, expected + lm_weight * problem.cross_entropy() if lm_weight else expected

    return case


def _cross_entropy_case(problem: Problem) -> tuple[Tensor, Tensor]:
    found = fused_linear_cross_entropy(
        problem.x,
        problem.w,
        problem.labels,
        problem.keep,
        vocab_size=problem.vocab_size,
        weight_gradient=problem.main_grad,
    )
    return found.ce_sum, problem.cross_entropy()


def _buckets(problem: Problem, targets: SparseTargets, kind: DivergenceKind) -> Tensor:
    """The divergence of kept tokens over each target's ids and one bucket of all others, summed."""
    temperature = targets.temperature
    logq = (problem.student_logits() / temperature).log_softmax(-1)
    kept = targets.select(problem.keep)
    used = kept.ids >= 0
    share = torch.where(used, kept.log_probs.double().exp(), 0)
    at_ids = torch.where(used, logq.gather(1, kept.ids.clamp_min(0).long()), 0)
    if kept.tail is None:
        value = (share * torch.where(share > 0, share.log() - at_ids, 0)).sum(-1)
    else:
        p = torch.cat([share, kept.tail.double().unsqueeze(1)], 1)
        rest = 1 - at_ids.exp().sum(1, keepdim=True)
        value = dense._kl(p, torch.cat([at_ids.exp(), rest], 1))
        if kind is DivergenceKind.REVERSE_KL:
            value = dense._kl(torch.cat([at_ids.exp(), rest], 1), p)
    return value.sum() * temperature**2


def _sparse(problem: Problem, targets: SparseTargets, kind: DivergenceKind) -> tuple[Tensor, Tensor]:
    found = fused_linear_sparse_kd(
        problem.x,
        problem.w,
        targets,
        problem.keep,
        problem.labels,
        divergence=Divergence(kind=kind, temperature=targets.temperature),
        lm_weight=0.3,
        vocab_size=problem.vocab_size,
        weight_gradient=problem.main_grad,
    )
    return found.loss_sum, _buckets(problem, targets, kind) + 0.3 * problem.cross_entropy()


def _top_k_case(kind: DivergenceKind) -> Case:
    def case(problem: Problem) -> tuple[Tensor, Tensor]:
        targets = top_k_targets(
            problem.teacher_x, problem.teacher_w, k=16, vocab_size=problem.vocab_size, temperature=2.0
        )
        best = (problem.teacher_logits() / 2).softmax(-1).topk(16).values.sum(-1)
        told = targets.select(problem.keep).log_probs.double().exp().sum(-1)
        if not torch.allclose(best, told, rtol=1e-3):
            raise ValueError("top-k targets are not the teacher's likeliest tokens")
        return _sparse(problem, targets, kind)

    return case


def _sampled_case(problem: Problem) -> tuple[Tensor, Tensor]:
    counters = torch.arange(problem.x.shape[0], device=problem.x.device)
    ids, counts = sample_targets(
        problem.teacher_x, problem.teacher_w, counters, draws=32, seed=3, vocab_size=problem.vocab_size
    )
    return _sparse(problem, SparseTargets.from_counts(ids, counts), DivergenceKind.FORWARD_KL)


def _compare(bench: Bench, cases: dict[str, Case]) -> Outcome:
    worst = [(0.0, "")] * 3
    figures: dict[str, list[float]] = {}
    wrong: list[str] = []
    for name, dtype, errors in _all_errors(bench, cases):
        label = f"{name} {str(dtype).removeprefix('torch.')}"
        figures[label] = list(errors)
        value, gradient = TOLERANCES[dtype]
        if DivergenceKind.TOTAL_VARIATION.value in name:
            gradient = max(gradient, TOTAL_VARIATION_GRADIENT)
        if not (errors[0] <= value and max(errors[1:]) <= gradient):  # NaN is wrong too
            wrong.append(f"{label}: value {errors[0]:.1e}, gradients {errors[1]:.1e} {errors[2]:.1e}")
        worst = [max(old, (error, label)) for old, error in zip(worst, errors, strict=True)]
    parts = zip(("value", "d states", "d weight"), worst, strict=True)
    said = "; ".join(f"{part} {error:.1e} ({label})" for part, (error, label) in parts)
    figure = "\n".join([f"{len(figures)} cases, largest relative errors: {said}", *wrong])
    return Outcome(figure=figure, ok=not wrong, figures=figures)


def _all_errors(bench: Bench, cases: dict[str, Case]) -> Iterator[tuple[str, torch.dtype, tuple[float, float, float]]]:
    for dtype in TOLERANCES:
        problem = Problem.make(bench, dtype)
        for name, case in cases.items():
            yield name, dtype, problem.errors(*case(problem))


@check(order=20, seconds=20)
def fused_divergences(bench: Bench) -> Outcome:
    """Every divergence at temperatures 1 and 2, with and without cross-entropy, against dense float64."""
    cases = {
        f"{kind.value} T{temperature:g} lm{lm:g}": _divergence_case(kind, temperature, lm)
        for kind, temperature, lm in product(DivergenceKind, (1.0, 2.0), (0.0, 0.3))
    }
    return _compare(bench, cases)


@check(order=21, seconds=6)
def fused_sparse_and_text(bench: Bench) -> Outcome:
    """Cross-entropy, top-k and sampled targets, against dense float64."""
    return _compare(
        bench,
        {
            "cross-entropy": _cross_entropy_case,
            "top-k forward": _top_k_case(DivergenceKind.FORWARD_KL),
            "top-k reverse": _top_k_case(DivergenceKind.REVERSE_KL),
            "sampled": _sampled_case,
        },
    )
