from typing import Any

from torch import Tensor, nn
from torch.distributed import ProcessGroup

def make_sharded_tensors_for_checkpoint(
    state_dict: dict[str, Tensor],
    prefix: str,
    tensor_parallel_layers_axis_map: dict[str, int] | None = ...,
    sharded_offsets: tuple[tuple[int, int, int], ...] = ...,
    *,
    tp_group: ProcessGroup | None = ...,
    dp_cp_group: ProcessGroup | None = ...,
) -> dict[str, Any]: ...
def sharded_state_dict_default(
    module: nn.Module,
    prefix: str = ...,
    sharded_offsets: tuple[tuple[int, int, int], ...] = ...,
    metadata: dict[str, Any] | None = ...,
    tp_group: ProcessGroup | None = ...,
) -> dict[str, Any]: ...
