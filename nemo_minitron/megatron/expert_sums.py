"""Importance statistics of experts and of their neurons, over the tokens that are routed to them.

Shapes: A tokens of all expert-parallel ranks, B their samples, F neurons of this tensor-parallel rank.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_minitron.arch.axes import TOKEN_SUMS
from nemo_minitron.megatron.forward import context_places
from nemo_minitron.megatron.runtime import Runtime
from nemo_minitron.ops.importance import SequenceMoments, SiteSums
from nemo_minitron.parallel.collectives import gather, split_group, sum_over

OUTPUT, ROUTED = TOKEN_SUMS
EXPERT_FFN = "expert_ffn"


@dataclass(frozen=True, slots=True)
class RoutedTokens:
    """The tokens that a rank's experts may see in a micro-batch, in the order in which they lie there.

    Rank after rank of the expert-parallel group, and of each the positions that its context-parallel rank has. Under
    sequence parallelism these are those of its tensor-parallel ranks, one after the other.
    """

    keep: Tensor
    """Which of them count."""
    sample: Tensor
    """Which sample each belongs to, from 0."""
    samples: int

    @classmethod
    def of(cls, keep_BS: Tensor, runtime: Runtime) -> "RoutedTokens":
        """From this rank's mask of complete sequences; the others' come from them. Collective over the EP group."""
        size, context = runtime.parallel.expert, runtime.parallel.context
        places = context_places(keep_BS.shape[1], runtime.cp_rank, context)
        keep_SB = keep_BS.t()[places.to(keep_BS.device)].to(torch.uint8)
        keeps = gather(keep_SB, split_group(runtime.groups.ep))
        length, mine = keep_SB.shape
        # Neighbours in the group are context-parallel ranks first, which see the same samples.
        samples_A = torch.cat([torch.arange(mine).repeat(length) + rank // context * mine for rank in range(size)])
        return cls(keeps.flatten().bool(), samples_A.to(keep_BS.device), mine * max(size // context, 1))


class LayerExpertSums:
    """Sums of one layer's experts on this rank; looks on while they work (`megatron.experts.ExpertObserver`).

    Args:
        first: Number of the first of this rank's experts.
        experts: How many this rank has.
        neurons: Of each, on this rank.
        runtime: The running layout.

    Attributes:
        neurons: The six rows of `expert_ffn`, `[6, experts * neurons]`.
        tokens: By name in `TOKEN_SUMS`, `[experts]` float64.
        batch: The tokens of the micro-batch that comes next.
    """

    def __init__(self, first: int, experts: int, neurons: int, runtime: Runtime) -> None:
        self.first, self.experts, self.width = first, experts, neurons
        self.runtime = runtime
        self.neurons = SiteSums.zeros(experts * neurons, runtime.device)
        zeros = torch.zeros(experts, dtype=torch.float64, device=runtime.device)
        self.tokens = {name: zeros.clone() for name in TOKEN_SUMS}
        self.batch: RoutedTokens | None = None

    def see(self, expert: int, rows: Tensor, neurons: Tensor, output: Tensor, weights: Tensor) -> None:
        """Add what one expert does to the tokens routed to it."""
        batch = self.batch
        assert batch is not None
        place = expert - self.first
        kept = batch.keep[rows]
        # Ranks that share an expert have addends of its output. All of them come by here, for the same tokens.
        whole = sum_over(output.double(), split_group(self.runtime.groups.tp))
        norms = torch.where(kept, torch.linalg.vector_norm(whole, dim=-1) * weights.double(), 0)
        self.tokens[OUTPUT][place] += norms.sum()
        self.tokens[ROUTED][place] += kept.sum()
        x_NF, sample_N = neurons[kept].double(), batch.sample[rows[kept]]
        sums = torch.zeros(3, batch.samples, self.width, dtype=torch.float64, device=neurons.device)
        for total, values in zip(sums, (x_NF.abs(), x_NF.square(), x_NF), strict=True):
            total.index_add_(0, sample_N, values)
        count = torch.zeros(batch.samples, dtype=torch.float64, device=neurons.device)
        count.index_add_(0, sample_N, torch.ones_like(sample_N, dtype=torch.float64))
        part = slice(place * self.width, (place + 1) * self.width)
        SiteSums(self.neurons.values[:, part]).add_(self._of_samples(SequenceMoments(sums, count)))

    def _of_samples(self, moments: SequenceMoments) -> SequenceMoments:
        """The same, of complete samples: their other positions may be with another rank that has the same experts."""
        context, size = self.runtime.parallel.context, self.runtime.parallel.expert
        if context <= size:
            return moments
        mine = torch.cat([moments.sums.flatten(), moments.count])
        every = gather(mine, self.runtime.groups.cp)
        flat = every[self.runtime.cp_rank % size :: size].sum(0)
        return SequenceMoments(flat[: moments.sums.numel()].view_as(moments.sums), flat[moments.sums.numel() :])
