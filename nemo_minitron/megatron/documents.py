"""Several documents in one sample: attention that stops at their borders, and positions that begin again there.

A sample says by its positions where documents begin: wherever a position does not follow the one before it. Positions
that run through are one document, as in pretraining.

Transformer Engine's attention takes documents as Megatron's packed sequences: one sample a micro-batch, tokens in one
row ("thd"), and cumulative lengths. Our own attention goes through the documents of each sample; neither makes a mask
of `[s, s]`.
"""

from collections.abc import Sequence

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor, nn

from nemo_minitron.errors import LayoutError
from nemo_minitron.megatron.functional import Starts
from nemo_minitron.megatron.layers import EngineDocuments, LocalDocuments
from nemo_minitron.megatron.model import unwrap


def document_starts(position_ids_BS: Tensor) -> Starts | None:
    """Where positions begin again, for each sample; None where no sample has more than one document.

    Args:
        position_ids_BS: Positions `[b, s]`; best on the host, since what is on a GPU is waited for.
    """
    jumps = (position_ids_BS[:, 1:] != position_ids_BS[:, :-1] + 1).cpu()
    if not bool(jumps.any()):
        return None
    return tuple((0, *(row.nonzero().flatten() + 1).tolist()) for row in jumps)


def attention_documents(
    position_ids_BS: Tensor, chunks: Sequence[nn.Module], device: torch.device, *, context: int = 1
) -> PackedSeqParams | None:
    """What `MinitronGPT.forward` takes as `packed_seq_params`; None where attention looks at complete samples.

    Args:
        position_ids_BS: Positions of complete samples `[b, s]`, best on the host.
        chunks: This rank's model chunks.
        device: Where the model is.
        context: Context-parallel size.

    Raises:
        LayoutError: Several documents lie in a sample, and the layout cannot keep them apart.
    """
    starts = document_starts(position_ids_BS)
    if starts is None:
        return None
    if context > 1:
        raise LayoutError(
            f"several documents in a sample under parallel.context = {context}",
            rule="context parallelism splits each sample over ranks, and attention stops at borders inside of it",
            remedy="set parallel.context=1, or data.reset_attention_mask=false (tune.reset_attention_mask=false)",
        )
    samples, length = position_ids_BS.shape
    longest = max(stop - first for row in starts for first, stop in zip(row, (*row[1:], length), strict=True))
    if not uses_engine(chunks):
        positions = torch.stack([_positions(row, length) for row in starts]).to(device, non_blocking=True)
        return LocalDocuments(starts=starts, positions=positions, max_seqlen_q=longest, max_seqlen_kv=longest)
    if samples > 1:
        raise LayoutError(
            f"micro-batches of {samples} samples with several documents each",
            rule="Transformer Engine takes documents one sample at a time",
            remedy="split(1) the micro-batch; a larger sequence_length puts more tokens into one",
        )
    ends = torch.tensor([*starts[0], length], dtype=torch.int32).to(device, non_blocking=True)
    return EngineDocuments(
        starts=starts,
        qkv_format="thd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def uses_engine(chunks: Sequence[nn.Module]) -> bool:
    """Whether attention is Transformer Engine's."""
    return any(unwrap(chunk).from_engine for chunk in chunks)


def _positions(starts: Sequence[int], length: int) -> Tensor:
    """Place of each token in its document, `[s]`."""
    begins = torch.zeros(length, dtype=torch.long)
    begins[list(starts)] = torch.tensor(starts)
    return torch.arange(length) - begins.cummax(0).values
