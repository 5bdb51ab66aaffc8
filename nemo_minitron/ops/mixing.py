"""Rows of a fused QKV weight that become sums over rows of the larger one."""

from collections.abc import Iterable, Sequence

from torch import Tensor

Terms = Sequence[tuple[int, int]]
"""Slots of the larger weight and their coefficients."""


def mix_slots(
    cut: Tensor, whole: Tensor, mixes: Iterable[tuple[int, Terms]], *, head_dim: int, columns: Tensor | None
) -> Tensor:
    """Replace slots of a cut QKV weight or bias by sums over slots of the uncut one.

    A slot is the `head_dim` rows of one query head, key or value. Sums are taken in float64 and rounded once.

    Args:
        cut: `[slots * head_dim, ...]`, changed in place.
        whole: `[more slots * head_dim, ...]`.
        mixes: Slot of `cut`, and what it becomes, in slots of `whole`.
        head_dim: Channels of a head.
        columns: Columns of `whole` that `cut` has; None for all, and for a bias.

    Returns:
        `cut`.
    """

    def rows(slot: int) -> slice:
        return slice(slot * head_dim, (slot + 1) * head_dim)

    for slot, terms in mixes:
        parts = [whole[rows(origin)] for origin, _ in terms]
        if columns is not None:
            parts = [part.index_select(1, columns) for part in parts]
        total = sum(part.double() * coefficient for part, (_, coefficient) in zip(parts, terms, strict=True))
        cut[rows(slot)] = total
    return cut
