from collections.abc import Iterator

from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.moe_utils import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

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
