"""LayerNorm and RMSNorm: computed in fp32, zero-centred weights too, and rounded once."""

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor, nn

from transformer_engine.pytorch.state import ExtraState


def normalised(x: Tensor, weight: Tensor, bias: Tensor | None, *, kind: str, eps: float, zero_centred: bool) -> Tensor:
    """The norm of the last dimension, in the dtype of `x`."""
    wide, factor = x.float(), weight.float() + (1 if zero_centred else 0)
    if kind == "RMSNorm":
        out = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * factor
    else:
        out = F.layer_norm(wide, (x.shape[-1],), factor, bias.float(), eps)
    return out.to(x.dtype)


def first_weight(size: int, *, zero_centred: bool, device: object, dtype: torch.dtype | None) -> nn.Parameter:
    """A norm's weight that changes nothing."""
    return nn.Parameter(torch.full((size,), 0.0 if zero_centred else 1.0, device=device, dtype=dtype))


class _Norm(ExtraState):
    kind = ""

    def __init__(
        self,
        hidden_size: int,
        *,
        eps: float = 1e-5,
        sequence_parallel: bool | None = None,
        params_dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False,
        device: object = "cuda",
    ) -> None:
        super().__init__()
        self.eps, self.zero_centered_gamma = eps, zero_centered_gamma
        self.weight = first_weight(hidden_size, zero_centred=zero_centered_gamma, device=device, dtype=params_dtype)
        if self.kind == "LayerNorm":
            self.bias = nn.Parameter(torch.zeros(hidden_size, device=device, dtype=params_dtype))
        for parameter in self.parameters():
            parameter.sequence_parallel = sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        return normalised(
            x,
            self.weight,
            getattr(self, "bias", None),
            kind=self.kind,
            eps=self.eps,
            zero_centred=self.zero_centered_gamma,
        )


class RMSNorm(_Norm):
    kind = "RMSNorm"


class LayerNorm(_Norm):
    kind = "LayerNorm"
