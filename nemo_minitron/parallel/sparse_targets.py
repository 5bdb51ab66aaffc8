"""Sparse targets from the teacher's hidden states and output layer, in chunks of tokens, at any tensor-parallel size.

No `[tokens, vocabulary]` tensor of all tokens exists, and every rank ends with the same complete targets. Shapes: N
tokens, H hidden size, V this rank's shard of the (padded) vocabulary, R ranks.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from nemo_minitron.ops.sampling import SparseTargets, count_draws, uniforms
from nemo_minitron.parallel.collectives import gather, group_rank, split_group, sum_over
from nemo_minitron.parallel.fused_linear import EMPTY, chunk_rows, pieces, project, row_max, wide_dtype
from nemo_minitron.parallel.vocab import real_columns

_CUMULATIVE_BYTES = 8
"""Sums for drawing are float64: in float32 the likeliest of 100 000 tokens would swallow the least likely."""


@torch.no_grad()
def sample_targets(
    hidden: Tensor,
    weight: Tensor,
    counters: Tensor,
    *,
    draws: int,
    seed: int,
    vocab_size: int,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    tp: ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw token ids from the teacher's distribution, with replacement.

    What is drawn depends on the logits, the seed and the token's counter alone: not on the chunk, the micro-batch, nor
    on how tokens or the vocabulary are split over ranks (unless the matrix product rounds a logit differently there
    and a random number falls into the gap, which changes a draw in about a million).

    `hidden` and `weight` are the teacher's, split as in `fused_linear_kd`; `counters` `[N]` int64 are numbers of the
    tokens in the data, each its own. No id that pads the vocabulary is drawn.

    Returns:
        Distinct ids in ascending order and their counts, `[N, K]` int64; -1 and 0 where a token has fewer than K.
        `SparseTargets.from_counts` makes targets of them.
    """
    tp = split_group(tp)
    first = group_rank(tp) * weight.shape[0]
    drawn = torch.empty(hidden.shape[0], draws, dtype=torch.int64, device=hidden.device)
    for rows, logits in _chunks(hidden, weight, vocab_size, temperature, chunk_tokens, tp):
        random = uniforms(seed, counters[rows], draws)
        peak = gather(row_max(logits, logits.new_empty(logits.shape[0])), tp).amax(0)
        reached = logits.double().sub_(peak.unsqueeze(1)).exp_().cumsum_(1)
        total = reached[:, -1] if logits.shape[1] else reached.new_zeros(reached.shape[0])
        totals = gather(total, tp)  # [R, rows]
        ends = totals.cumsum(0)
        wanted = random * ends[-1].unsqueeze(1)
        owner = (wanted.unsqueeze(0) >= ends.unsqueeze(-1)).sum(0)  # the first rank whose end lies beyond
        # Rounding may push a number to the very end: it belongs to the last rank that holds any probability.
        last = (totals > 0).to(torch.int64).mul_(torch.arange(1, len(totals) + 1, device=ends.device)[:, None]).amax(0)
        owner = torch.minimum(owner, last.unsqueeze(1) - 1)
        mine = owner == group_rank(tp)
        local = _search(reached, wanted - (ends[group_rank(tp)] - total).unsqueeze(1))
        drawn[rows] = sum_over(torch.where(mine, local + first, 0), tp)
    return count_draws(drawn)


@torch.no_grad()
def top_k_targets(
    hidden: Tensor,
    weight: Tensor,
    *,
    k: int,
    vocab_size: int,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    tp: ProcessGroup | None = None,
) -> SparseTargets:
    """The teacher's `k` likeliest ids, likeliest first (the lower id among equals), and the probability of all others.

    Arguments as above. Log-probabilities are float32, or float64 for float64 states.

    Raises:
        ValueError: `k` exceeds the vocabulary.
    """
    if not 0 < k <= vocab_size:
        raise ValueError(f"k = {k} must lie between 1 and the vocabulary's {vocab_size} tokens")
    tp = split_group(tp)
    wide = wide_dtype(hidden.dtype)
    ids = torch.empty(hidden.shape[0], k, dtype=torch.int64, device=hidden.device)
    log_probs = torch.empty(hidden.shape[0], k, dtype=wide, device=hidden.device)
    tail = torch.empty(hidden.shape[0], dtype=wide, device=hidden.device)
    for rows, logits in _chunks(hidden, weight, vocab_size, temperature, chunk_tokens, tp):
        best, ids[rows], mine, local = _best(logits, k, weight.shape[0], tp)
        if logits.shape[1]:
            logits.scatter_add_(1, local, torch.where(mine, -torch.inf, 0).to(logits.dtype))
        peak = row_max(logits, logits.new_empty(logits.shape[0])).clamp_min_(EMPTY)
        mass = logits.sub_(peak.unsqueeze(1)).exp_().sum(1)
        peaks, masses = gather(torch.stack([peak, mass]).double(), tp).unbind(1)
        log_rest = torch.logsumexp(peaks + masses.log(), 0)
        log_z = torch.logaddexp(log_rest, best.double().logsumexp(1))
        log_probs[rows] = (best.double() - log_z.unsqueeze(1)).to(wide)
        tail[rows] = (log_rest - log_z).exp().to(wide)
    if k < vocab_size:
        # No tail is impossible; one that rounds to 0 would make the reverse KL infinite.
        tail.clamp_min_(torch.finfo(wide).tiny)
    return SparseTargets(ids=ids, log_probs=log_probs, tail=tail, temperature=temperature)


def _chunks(  # noqa: PLR0917 - its callers' arguments, in their order
    hidden: Tensor,
    weight: Tensor,
    vocab_size: int,
    temperature: float,
    chunk_tokens: int | None,
    tp: ProcessGroup | None,
) -> Iterator[tuple[slice, Tensor]]:
    """Rows and their logits over T, `[rows, real columns]` in the wide dtype; meant to be overwritten."""
    wide = wide_dtype(hidden.dtype)
    real = real_columns(weight.shape[0], vocab_size=vocab_size, tp=tp)
    bytes_per_logit = hidden.dtype.itemsize + wide.itemsize + _CUMULATIVE_BYTES
    size = chunk_rows(hidden.shape[0], weight.shape[0], bytes_per_logit, chunk_tokens, hidden.device)
    for rows in pieces(hidden.shape[0], size):
        logits = project("teacher", hidden[rows], weight[:real]).to(wide)
        yield rows, logits if temperature == 1 else logits.mul_(1 / temperature)


def _search(reached: Tensor, wanted: Tensor) -> Tensor:
    """`[rows, draws]` first columns whose cumulated weight exceeds `wanted`; the last with any weight if none does."""
    if not reached.shape[1]:
        return torch.zeros(wanted.shape, dtype=torch.int64, device=wanted.device)
    last = torch.searchsorted(reached, reached[:, -1:].contiguous())  # the first that reaches the total
    return torch.minimum(torch.searchsorted(reached, wanted.contiguous(), right=True), last)


def _best(logits: Tensor, k: int, columns: int, tp: ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The k largest logits over all ranks and their ids, `[rows, k]`; which are this rank's, and in what columns."""
    held = min(k, logits.shape[1])
    # A stable order makes ties fall to the lower id at every world size; topk promises none.
    values, places = _stable_top(logits, held)
    values = torch.nn.functional.pad(values, (0, k - held), value=-torch.inf)
    ids = torch.nn.functional.pad(places + group_rank(tp) * columns, (0, k - held), value=-1)
    all_values, all_ids = (gather(x, tp).transpose(0, 1).flatten(1) for x in (values, ids))
    order = all_values.sort(dim=1, descending=True, stable=True).indices[:, :k]
    best, chosen = all_values.gather(1, order), all_ids.gather(1, order)
    local = chosen - group_rank(tp) * columns
    mine = (local >= 0) & (local < logits.shape[1])
    return best, chosen, mine, torch.where(mine, local, 0)


def _stable_top(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row with their columns, larger first, the lower column among equals."""
    if not k:
        return logits[:, :0], torch.empty(logits.shape[0], 0, dtype=torch.int64, device=logits.device)
    least = logits.topk(k, 1).values[:, -1:]
    # At most k - 1 columns lie above the least; of those equal to it, the first ones fill up.
    above = logits > least
    equal = logits == least
    needed = k - above.sum(1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(1, dtype=torch.int32) <= needed))
    nth = torch.arange(1, k + 1, device=logits.device, dtype=torch.int32).expand(logits.shape[0], k).contiguous()
    places = torch.searchsorted(chosen.cumsum(1, dtype=torch.int32), nth).clamp_max_(logits.shape[1] - 1)
    picked = logits.gather(1, places)
    order = picked.sort(dim=1, descending=True, stable=True).indices
    return picked.gather(1, order), places.gather(1, order)
