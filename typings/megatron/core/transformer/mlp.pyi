from dataclasses import dataclass
from typing import Any

from megatron.core.tensor_parallel import _ParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

@dataclass
class MLPSubmodules:
    linear_fc1: object = ...
    linear_fc2: object = ...

class MLP(nn.Module):
    linear_fc1: _ParallelLinear
    linear_fc2: _ParallelLinear
    def __init__(
        self, config: TransformerConfig, submodules: MLPSubmodules, *, ffn_hidden_size: int | None = ...
    ) -> None: ...
    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]: ...
