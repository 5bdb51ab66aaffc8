"""Where importance is measured and how it is put together, as far as it can be chosen."""

from enum import StrEnum


class FfnSite(StrEnum):
    """What an MLP neuron's importance is measured on."""

    AFTER_ACTIVATION = "after_activation"
    """The input of the second matrix: what the neuron says to the rest of the model."""
    BEFORE_ACTIVATION = "before_activation"
    """The argument of the activation, as arXiv:2407.14679, section 2.2, writes it: `X (W1^i)^T`, plus the bias where
    there is one. A gated MLP has two rows a neuron, and only the gate's product is an argument of the activation."""


class ExpertMetric(StrEnum):
    """What an expert's importance is."""

    REAP = "reap"
    """Mean over the tokens routed to it of the router's weight times the L2 norm of its output (arXiv:2510.13999)."""
    OUTPUT = "output"
    """The same, summed over those tokens and divided by the number of all tokens: what it adds to an average token."""
    FREQUENCY = "frequency"
    """Fraction of all tokens that are routed to it."""


class Aggregation(StrEnum):
    """How values are put together over one dimension (arXiv:2407.14679, section 2.2): mean, L2 norm, variance."""

    MEAN = "mean"
    L2 = "l2"
    VAR = "var"
