from dataclasses import dataclass
from typing import Any

from megatron.core.tensor_parallel import _ParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

@dataclass
class SelfAttentionSubmodules:
    linear_qkv: object = ...
    core_attention: object = ...
    linear_proj: object = ...
    q_layernorm: object = ...
    k_layernorm: object = ...

class SelfAttention(nn.Module):
    linear_qkv: _ParallelLinear
    linear_proj: _ParallelLinear
    q_layernorm: nn.Module | None
    k_layernorm: nn.Module | None
    config: TransformerConfig
    num_attention_heads_per_partition: int
    num_query_groups_per_partition: int
    hidden_size_per_attention_head: int
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]: ...
