from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

class MegatronModule(nn.Module):
    config: TransformerConfig
    def __init__(self, config: TransformerConfig) -> None: ...
