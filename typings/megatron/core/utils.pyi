from torch import Tensor
from torch.distributed import ProcessGroup

def make_sharded_tensor_for_checkpoint(
    tensor: Tensor,
    key: str,
    *,
    prepend_offsets: tuple[object, ...] = ...,
    tp_group: ProcessGroup | None = ...,
    dp_cp_group: ProcessGroup | None = ...,
) -> object: ...
