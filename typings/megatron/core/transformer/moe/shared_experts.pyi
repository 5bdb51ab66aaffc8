from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.moe_utils import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

class SharedExpertMLP(nn.Module):
    linear_fc1: nn.Module
    linear_fc2: nn.Module
    def __init__(
        self,
        config: TransformerConfig,
        submodules: MLPSubmodules,
        gate: bool,
        pg_collection: ProcessGroupCollection | None = ...,
    ) -> None: ...
    def __call__(self, hidden_states: Tensor) -> Tensor: ...
