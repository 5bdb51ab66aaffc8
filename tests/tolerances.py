"""How far two numbers may lie apart: one table. Widening an entry at a place of use needs a sentence there."""

import torch

TOL: dict[torch.dtype, dict[str, float]] = {
    # Sums of a few thousand terms in another order.
    torch.float64: {"rtol": 1e-10, "atol": 1e-10},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    # Two roundings to 8 bits of mantissa.
    torch.bfloat16: {"rtol": 1.6e-2, "atol": 1e-2},
}
