"""What a model loses without some of its layers, measured over micro-batches at any parallel layout."""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.config.depth import LM_LOSS, LOGIT_MSE, MEASURED
from nemo_minitron.megatron.depth import LayerSkipper
from nemo_minitron.megatron.forward import MicroBatch, context_places, cut
from nemo_minitron.megatron.model import MinitronGPT, unwrap
from nemo_minitron.megatron.runtime import Runtime
from nemo_minitron.parallel.collectives import sum_over
from nemo_minitron.parallel.fused_linear import pieces
from nemo_minitron.parallel.label_scores import TILE_TOKENS, label_scores
from nemo_minitron.parallel.vocab import real_columns
from nemo_minitron.pruning.depth import Block, DepthScores

_GRAM_ROWS = 4096
_TOKEN_ROWS = 1024


class DepthMetric(Protocol):
    """A measure of one's own for what a model is worth without a layer, such as the error rate on a task.

    Every rank holds its own copy and calls it with the same arguments, but for the share of batches it gets.
    """

    def batches(self, tokenizer: Any) -> Iterable[MicroBatch] | None:
        """Texts to measure on, as tokens, labels and the positions that count; None takes the calibration text.

        Args:
            tokenizer: The model's (a `transformers` one from a recipe; in Python whatever the caller passes).
        """
        ...

    def measure(self, batch: MicroBatch, nats_BS: Tensor, correct_BS: Tensor) -> tuple[float, float]:
        """Summed loss (lower is better) of a batch, and what the sum is to be divided by.

        Args:
            batch: What the model has read, `[b, s]`.
            nats_BS: -log p(label) at each position, float64; 0 where `batch.keep` is False.
            correct_BS: Whether the label is the likeliest token there; False where `batch.keep` is False.
        """
        ...


@dataclass(slots=True)
class _Sums:
    """One metric: the complete model first, then each candidate."""

    values: Tensor
    count: Tensor

    @classmethod
    def zeros(cls, candidates: int, device: torch.device) -> "_Sums":
        values = torch.zeros(1 + candidates, dtype=torch.float64, device=device)
        return cls(values, torch.zeros(1, dtype=torch.float64, device=device))


@dataclass(slots=True)
class _Text:
    """A micro-batch, and what the complete model makes of it."""

    whole: MicroBatch
    local: MicroBatch
    """This context-parallel rank's positions."""
    states: Tensor = field(default_factory=lambda: torch.empty(0))
    nats: Tensor = field(default_factory=lambda: torch.empty(0))
    correct: Tensor = field(default_factory=lambda: torch.empty(0))


class DepthCollector:
    """Adds up depth metrics over micro-batches; `result` puts all ranks together.

    Costs, for each micro-batch, the layers behind each candidate's block and one output layer a candidate. Logits exist
    a chunk of tokens at a time, and for `logit_mse` not at all.

    Args:
        chunks: This rank's model chunks, wrapped or not.
        runtime: The running layout.
        spec: Architecture of the complete model.
        blocks: Candidates, from `pruning.depth.candidate_blocks`.
        metrics: `lm_loss`, `logit_mse`, and names of `own`.
        own: Metrics of one's own by name.
    """

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        runtime: Runtime,
        spec: ModelSpec,
        *,
        blocks: Sequence[Block],
        metrics: Sequence[str] = (LM_LOSS,),
        own: Mapping[str, DepthMetric] | None = None,
    ) -> None:
        self._model: MinitronGPT = unwrap(chunks[-1])
        self._runtime = runtime
        self._spec = spec
        self._blocks = tuple(blocks)
        self._own = dict(own or {})
        self._built_in = [metric for metric in metrics if metric in MEASURED]
        self._skipper = LayerSkipper(chunks, runtime, spec, blocks)
        self._sums = {m: _Sums.zeros(len(blocks), runtime.device) for m in (*self._built_in, *self._own)}
        self._samples = torch.zeros(1, dtype=torch.float64, device=runtime.device)
        self._gram: Tensor | None = None
        self._added = False

    @property
    def measured(self) -> bool:
        """Whether any micro-batch has been added, on this rank."""
        return self._added

    def add(self, micro_batch: MicroBatch, own: Sequence[str] = ()) -> None:
        """Measure on this data-parallel rank's next calibration micro-batch; fully masked ones cost nothing.

        Where data-parallel ranks share experts they all call it equally often, and masked ones cost as much as others:
        the others' tokens may need the experts of this rank.

        Args:
            micro_batch: Tokens, labels and which positions count; all ranks of a model copy pass the same.
            own: Which of one's own metrics are measured on it too.
        """
        self._added = True
        self._samples += micro_batch.keep.any(-1).sum()
        for part in cut(micro_batch, len(micro_batch.tokens), [self._model]):
            self._measure(part, self._built_in, own)

    def add_own(self, name: str, batches: Iterable[MicroBatch]) -> None:
        """Evaluate a custom metric on its own text; data-parallel ranks take turns with the batches.

        Those that share experts take the same batches, and the first of them counts.
        """
        here, sharing = self._runtime, self._runtime.expert_peers
        for index, batch in enumerate(batches):
            if index % (here.dp_size // sharing) == here.dp_rank // sharing:
                self._measure(batch, (), [name], counted=here.dp_rank % sharing == 0)

    def result(self) -> DepthScores:
        """All sums of all ranks, on every rank. Collective.

        Raises:
            ScoresError: A state or a loss was NaN or infinite; names the layer.
        """
        self._skipper.check_finite()
        runtime = self._runtime
        flat = torch.cat([self._samples, *(part for s in self._sums.values() for part in (s.count, s.values))])
        # The last stage has the losses, the same on every tensor-parallel rank.
        if not runtime.is_last_stage or runtime.tp_rank:
            flat.zero_()
        if runtime.cp_rank:
            flat[0] = 0
        dist.all_reduce(flat)
        flat = flat.cpu()
        found = {
            "depth.blocks": torch.tensor(self._blocks, dtype=torch.float64).view(-1, 2),
            "depth.samples": flat[0].clone(),
        }
        parts = torch.split(flat[1:], 2 + len(self._blocks)) if self._sums else ()
        for metric, part in zip(self._sums, parts, strict=True):
            found[f"depth.{metric}.sum"] = part[2:].clone()
            found[f"depth.{metric}.base"] = part[1].clone()
            found[f"depth.{metric}.count"] = part[0].clone()
        return DepthScores(self._spec, found)

    @torch.no_grad()
    def _measure(self, whole: MicroBatch, built_in: Sequence[str], own: Sequence[str], *, counted: bool = True) -> None:
        if not (built_in or own):
            return
        if not (counted and bool(whole.keep.any())):
            if self._runtime.expert_peers > 1:
                deque(self._skipper.outputs(whole.to(self._runtime.device)), maxlen=0)
            return
        whole = whole.to(self._runtime.device)
        text = _Text(whole, whole.on_context_rank(self._runtime.cp_rank, self._runtime.parallel.context))
        together = max(1, TILE_TOKENS // text.local.tokens.numel())  # so many fill a tile of the output layer
        waiting: dict[int, Tensor] = {}
        for index, states_SBH in self._skipper.outputs(whole):
            if index == 0:
                text.states = states_SBH
            if LOGIT_MSE in built_in:
                self._add_change(index, states_SBH, text)
            if LM_LOSS in built_in or own:
                waiting[index] = states_SBH
            if len(waiting) == together:
                self._add_scores(waiting, text, LM_LOSS in built_in, own)
                waiting.clear()
        if waiting:
            self._add_scores(waiting, text, LM_LOSS in built_in, own)

    def _add_change(self, index: int, states_SBH: Tensor, text: "_Text") -> None:
        """Squared logits of the complete model, or of the difference to it."""
        wide = states_SBH.double() if index == 0 else text.states.double() - states_SBH.double()
        kept = wide.transpose(0, 1)[text.local.keep]
        self._add(LOGIT_MSE, index, self._squared_logits(kept), text.local.keep.sum())

    def _add_scores(self, states: Mapping[int, Tensor], text: "_Text", lm_loss: bool, own: Sequence[str]) -> None:
        """Losses of several candidates, whose output layer is one matrix product."""
        samples, length = text.local.tokens.shape
        scores = label_scores(
            torch.cat([x_SBH.flatten(0, 1) for x_SBH in states.values()]),
            self._model.output_weight(),
            text.local.labels.t().flatten().repeat(len(states)),
            text.local.keep.t().flatten().repeat(len(states)),
            vocab_size=self._spec.vocab_size,
            tp=self._runtime.groups.tp,
        )
        every = (x.view(len(states), length, samples).transpose(1, 2) for x in (scores.nats, scores.correct))
        for (index, x_SBH), own_nats, own_correct in zip(states.items(), *every, strict=True):
            if index == 0:
                text.nats, text.correct = own_nats, own_correct
            # A row's logits may depend on where in the product it stands; equal states cost exactly nothing.
            same = (x_SBH == text.states).all()
            nats, correct = torch.where(same, text.nats, own_nats), torch.where(same, text.correct, own_correct)
            if lm_loss:
                self._add(LM_LOSS, index, nats.sum(), text.local.keep.sum())
            for name in own:
                self._add_own(name, index, text.whole, nats, correct)

    def _add(self, metric: str, index: int, value: Tensor | float, count: Tensor | float) -> None:
        sums = self._sums[metric]
        sums.values[index] += value
        if index == 0:
            sums.count += count

    def _add_own(self, name: str, index: int, whole: MicroBatch, nats_BS: Tensor, correct_BS: Tensor) -> None:
        """Ask for a metric; context-parallel ranks put their positions together first."""
        value, count = self._own[name].measure(whole, self._whole(nats_BS), self._whole(correct_BS.double()) > 0)
        if self._runtime.cp_rank == 0:
            self._add(name, index, value, count)

    def _whole(self, local_BS: Tensor) -> Tensor:
        """All positions of a value that is split over context-parallel ranks."""
        size = self._runtime.parallel.context
        if size == 1:
            return local_BS
        samples, length = local_BS.shape
        mine = context_places(length * size, self._runtime.cp_rank, size).to(local_BS.device).expand(samples, -1)
        return sum_over(local_BS.new_zeros(samples, length * size).scatter(1, mine, local_BS), self._runtime.groups.cp)

    def _squared_logits(self, states_NH: Tensor) -> Tensor:
        """Sum over tokens and vocabulary of `(W x)^2`, as `x (W^T W) x`: the logits themselves are not needed."""
        if self._gram is None:
            self._gram = gram(self._model.output_weight(), self._spec.vocab_size, self._runtime)
        total = states_NH.new_zeros(())
        for rows in pieces(states_NH.shape[0], _TOKEN_ROWS):
            x = states_NH[rows]
            # Rounding may put a vanishing square below zero.
            total += ((x @ self._gram) * x).sum(-1).clamp_min(0).sum()
        return total


def gram(weight_VH: Tensor, vocab_size: int, runtime: Runtime) -> Tensor:
    """`W^T W` of the output layer over the real vocabulary of all tensor-parallel ranks, `[h, h]` float64."""
    tp = runtime.groups.tp
    real = real_columns(weight_VH.shape[0], vocab_size=vocab_size, tp=tp)
    product = weight_VH.new_zeros(weight_VH.shape[1], weight_VH.shape[1], dtype=torch.float64)
    for rows in pieces(real, _GRAM_ROWS):
        part = weight_VH[rows].double()
        product.addmm_(part.t(), part)
    return sum_over(product, tp)
