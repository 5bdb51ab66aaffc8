from dataclasses import dataclass, field
from typing import Any

from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

@dataclass
class TransformerLayerSubmodules:
    input_layernorm: object = ...
    self_attention: object = ...
    self_attn_bda: object = ...
    pre_mlp_layernorm: object = ...
    mlp: object = ...
    mlp_bda: object = ...
    sharded_state_dict_keys_map: dict[str, str] = field(default_factory=dict)

class TransformerLayer(nn.Module):
    config: TransformerConfig
    layer_number: int
    input_layernorm: nn.Module
    self_attention: SelfAttention
    pre_mlp_layernorm: nn.Module
    mlp: MLP
    recompute_mlp: bool
    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None: ...
    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]: ...
