"""Names of the divergences that a student can be trained with; the formulas are in `nemo_minitron.ops.divergence`."""

from enum import StrEnum


class DivergenceKind(StrEnum):
    """What is measured between the teacher's distribution p and the student's q."""

    FORWARD_KL = "forward_kl"
    """KL(p || q): mode-covering."""
    REVERSE_KL = "reverse_kl"
    """KL(q || p): mode-seeking."""
    JENSEN_SHANNON = "jensen_shannon"
    """Generalised by `beta`: between the two above."""
    SKEWED_KL = "skewed_kl"
    """KL(p || skew p + (1 - skew) q)."""
    SKEWED_REVERSE_KL = "skewed_reverse_kl"
    """KL(q || (1 - skew) p + skew q)."""
    TOTAL_VARIATION = "total_variation"
    """Half the sum of |p - q|; between 0 and 1."""


class HiddenLossKind(StrEnum):
    """How far a student's intermediate state lies from the teacher's."""

    COSINE = "cosine"
    """1 - the cosine of the angle between them."""
    MSE = "mse"
    """Mean over channels of the squared difference."""
