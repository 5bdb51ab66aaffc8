"""The `_extra_state` that every module of Transformer Engine writes into its state dictionary."""

import torch
from torch import Tensor, nn


class ExtraState(nn.Module):
    """A module without fp8: its extra state is an empty tensor of bytes, and it takes up an empty one.

    It overrides `set_extra_state`, so `load_state_dict` counts an absent `_extra_state` as a missing key.
    """

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor | None) -> None:
        if state is not None and state.numel() > 0:
            raise RuntimeError("an extra state that the stand-in has not written")
