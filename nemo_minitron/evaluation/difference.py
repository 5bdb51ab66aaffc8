"""Where two checkpoints of one model begin to differ: weight by weight, then layer by layer."""

from itertools import zip_longest

import torch

from nemo_minitron.checkpoints.source import TensorSource
from nemo_minitron.evaluation.states import States


def first_weight_difference(expected: TensorSource, found: TensorSource) -> str:
    """The first weight in table order that is not the same, in words; "" when all are.

    One tensor of each is in memory at a time.
    """
    if expected.spec != found.spec:
        mine, theirs = expected.spec.to_dict(), found.spec.to_dict()
        keys = [key for key in mine if mine[key] != theirs.get(key)]
        if keys:
            return f"the architecture: {keys[0]} = {theirs.get(keys[0])}, was {mine[keys[0]]}"
    for name, other in zip_longest(expected.names(), found.names()):
        if name is None or name != other:
            return f"the list of weights: {other or 'an end'} where {name or 'an end'} was"
        one, two = expected.get(name), found.get(name)
        if one.shape != two.shape:
            return f"weight {name}: shaped {tuple(two.shape)}, was {tuple(one.shape)}"
        unequal = one != two.to(one.dtype)
        if unequal.any():
            worst = (one.double() - two.double()).abs().max().item()
            where = tuple(unequal.nonzero()[0].tolist())
            return f"weight {name}: {int(unequal.sum())} of {one.numel()} values, by {worst:.2e} at most, {where} first"
    return ""


def first_state_difference(expected: States, found: States, *, tolerance: float) -> str:
    """The first state that differs by more than a tolerance, in words; "" when none does."""
    for name, one in expected.items():
        if name not in found:
            return f"{name}: is missing"
        difference = (one - found[name]).abs().max().item() if one.shape == found[name].shape else float("nan")
        if not difference <= tolerance:
            return f"{name}: differs by {difference:.2e}, its values reach {one.abs().max().item():.2e}"
    return ""


def largest_difference(expected: States, found: States) -> float:
    """Largest difference of logits; NaN if any is no number."""
    return torch.sub(expected["logits"], found["logits"]).abs().max().item()
