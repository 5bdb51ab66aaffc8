from collections.abc import Callable
from typing import Any

import torch

class TransformerConfig:
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    moe_ffn_hidden_size: int | None
    num_moe_experts: int | None
    moe_router_topk: int
    moe_shared_expert_intermediate_size: int | None
    moe_grouped_gemm: bool
    num_attention_heads: int
    num_query_groups: int
    layernorm_epsilon: float
    layernorm_zero_centered_gamma: bool
    normalization: str
    params_dtype: torch.dtype
    pipeline_dtype: torch.dtype | None
    sequence_parallel: bool
    use_cpu_initialization: bool
    no_sync_func: Callable[..., Any] | list[Callable[..., Any]] | None
    grad_sync_func: Callable[..., Any] | list[Callable[..., Any]] | None
    finalize_model_grads_func: Callable[..., None] | None
    def __init__(self, **settings: object) -> None: ...
    def __getattr__(self, name: str) -> Any: ...
