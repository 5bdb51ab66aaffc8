from typing import Any

from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.distributed import ProcessGroup

class _RotaryEmbedding(nn.Module):
    inv_freq: Tensor
    def __call__(self, max_seq_len: int, *args: Any, **kwargs: Any) -> Tensor: ...

class GPTModel(nn.Module):
    config: TransformerConfig
    decoder: TransformerBlock
    output_layer: ColumnParallelLinear
    rotary_pos_emb: _RotaryEmbedding
    pre_process: bool
    post_process: bool
    share_embeddings_and_output_weights: bool
    tp_group: ProcessGroup
    def __init__(self, **settings: Any) -> None: ...
    def forward(self, *args: Any, **kwargs: Any) -> Tensor: ...
    def _preprocess(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]: ...
    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor: ...
    def shared_embedding_or_output_weight(self) -> nn.Parameter: ...
    def sharded_state_dict(self, prefix: str = ..., *, metadata: dict[str, Any] | None = ...) -> dict[str, Any]: ...
