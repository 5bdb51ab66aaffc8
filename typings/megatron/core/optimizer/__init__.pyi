from collections.abc import Sequence

from megatron.core.optimizer.optimizer import ChainedOptimizer
from torch import nn

class OptimizerConfig:
    def __init__(self, **settings: object) -> None: ...

def get_megatron_optimizer(
    config: OptimizerConfig, model_chunks: Sequence[nn.Module], *, use_gloo_process_groups: bool = ...
) -> ChainedOptimizer: ...
