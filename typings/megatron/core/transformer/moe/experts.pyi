from collections.abc import Iterator

from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.moe_utils import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

class _Experts(nn.Module):
    def __iter__(self) -> Iterator[MLP]: ...
    def __len__(self) -> int: ...

class SequentialMLP(nn.Module):
    local_experts: _Experts
    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        submodules: MLPSubmodules,
        pg_collection: ProcessGroupCollection | None = ...,
    ) -> None: ...

class TEGroupedMLP(nn.Module):
    linear_fc1: nn.Module
    linear_fc2: nn.Module
    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        submodules: MLPSubmodules,
        pg_collection: ProcessGroupCollection | None = ...,
    ) -> None: ...
    def __call__(
        self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor
    ) -> tuple[Tensor, Tensor | None]: ...
