"""From the targets of a micro-batch on the teacher's side to bytes, and from bytes to the student's loss.

Shapes: b samples of s tokens; N = s * b tokens in the order of Megatron's hidden states, sequence first; K entries.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from nemo_minitron.cache.entries import SampleTargets
from nemo_minitron.ops.sampling import SparseTargets


def sampled_rows(ids_NK: Tensor, counts_NK: Tensor, samples: int) -> list[SampleTargets]:
    """Draws of N tokens, as `parallel.sparse_targets.sample_targets` returns them, sample by sample."""
    ids, counts = (_by_sample(x, samples) for x in (ids_NK, counts_NK))
    drawn = counts > 0
    return [
        SampleTargets(own.sum(1), rows[own].astype(np.int64), numbers[own].astype(np.int64))
        for rows, numbers, own in zip(ids, counts, drawn, strict=True)
    ]


def top_k_rows(targets: SparseTargets, samples: int) -> list[SampleTargets]:
    """Top-k targets of N tokens, sample by sample."""
    assert targets.tail is not None, "sampled targets have no tail"
    ids, values = (_by_sample(x, samples) for x in (targets.ids, targets.log_probs.float()))
    tails = _by_sample(targets.tail.float().unsqueeze(1), samples)
    return [
        SampleTargets(
            np.full(len(rows), rows.shape[1]),
            rows.astype(np.int64).ravel(),
            logs.ravel(),
            np.ascontiguousarray(tail[:, 0]),
        )
        for rows, logs, tail in zip(ids, values, tails, strict=True)
    ]


def sparse_targets(
    samples: Sequence[SampleTargets], positions_BS: Tensor, *, temperature: float, device: torch.device
) -> SparseTargets:
    """Targets of a micro-batch for the loss.

    Args:
        samples: Stored targets of its samples, complete sequences.
        positions_BS: Which tokens of each sequence this rank holds; all of them but under context parallelism. Best on
            the host: what is on a GPU is waited for.
        temperature: At which they were taken.
        device: Where the loss is computed.
    """
    widest = max((int(sample.lengths.max(initial=0)) for sample in samples), default=0)
    padded = [_padded(sample, widest) for sample in samples]
    ids, values = (np.stack([one[index] for one in padded]) for index in range(2))
    rows = torch.arange(len(samples))[:, None], positions_BS.cpu()
    ids_NK = _sequence_first(torch.from_numpy(ids)[rows], device)
    values_NK = _sequence_first(torch.from_numpy(values)[rows], device)
    if samples[0].tail is None:
        return SparseTargets.from_counts(ids_NK, values_NK, temperature=temperature)
    tails = torch.from_numpy(np.stack([sample.tail for sample in samples if sample.tail is not None]))
    tail_N = tails[rows].t().flatten().to(device, non_blocking=True)
    return SparseTargets(ids=ids_NK, log_probs=values_NK, tail=tail_N, temperature=temperature)


def _by_sample(x_NK: Tensor, samples: int) -> np.ndarray:
    """`[s * b, K]` as `[b, s, K]`."""
    whole = x_NK.cpu()
    rows: np.ndarray = whole.view(-1, samples, whole.shape[1]).transpose(0, 1).contiguous().numpy()
    return rows


def _sequence_first(x_BSK: Tensor, device: torch.device) -> Tensor:
    return x_BSK.transpose(0, 1).flatten(0, 1).to(device, non_blocking=True)


def _padded(sample: SampleTargets, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and values `[s, width]`; -1, and 0 or -inf, where a token has fewer entries."""
    used = np.arange(width) < sample.lengths[:, None]
    empty = 0 if sample.tail is None else -np.inf
    ids = np.full(used.shape, -1, np.int64)
    values = np.full(used.shape, empty, sample.values.dtype)
    ids[used], values[used] = sample.ids, sample.values
    return ids, values
