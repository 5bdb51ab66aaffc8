from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ReplicaId = int | tuple[int, ...]

@dataclass
class ShardedTensor:
    key: str
    data: Tensor
    dtype: torch.dtype
    local_shape: tuple[int, ...]
    global_shape: tuple[int, ...]
    global_offset: tuple[int, ...]
    axis_fragmentations: tuple[int, ...] | None
    replica_id: ReplicaId = ...
    prepend_axis_num: int = ...
    allow_shape_mismatch: bool = ...
    def narrow(self, dim: int, start: int, length: int) -> list[ShardedTensor]: ...
    def without_data(self) -> ShardedTensor: ...

@dataclass
class ShardedTensorFactory:
    key: str
    data: Tensor
    build_fn: Callable[..., Any]
    merge_fn: Callable[..., Tensor]
    replica_id: ReplicaId = ...

def is_main_replica(replica_id: ReplicaId) -> bool: ...
