"""The vocabulary split over tensor-parallel ranks: rank r owns tokens `r * V` and following."""

from torch.distributed import ProcessGroup

from nemo_minitron.parallel.collectives import group_rank


def real_columns(columns: int, *, vocab_size: int, tp: ProcessGroup | None) -> int:
    """How many of this rank's `columns` belong to real tokens; the rest pads the vocabulary to equal shards."""
    return min(max(vocab_size - group_rank(tp) * columns, 0), columns)
