from contextlib import AbstractContextManager
from typing import Any

from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

class DistributedDataParallelConfig:
    overlap_grad_reduce: bool
    overlap_param_gather: bool
    def __init__(
        self,
        *,
        grad_reduce_in_fp32: bool = ...,
        overlap_grad_reduce: bool = ...,
        overlap_param_gather: bool = ...,
        bucket_size: int | None = ...,
        use_distributed_optimizer: bool = ...,
        check_for_nan_in_grad: bool = ...,
        average_in_collective: bool = ...,
    ) -> None: ...

class DistributedDataParallel(nn.Module):
    module: nn.Module
    ddp_config: DistributedDataParallelConfig
    bucket_groups: list[_ParamAndGradBucketGroup]
    expert_parallel_bucket_groups: list[_ParamAndGradBucketGroup]
    param_to_bucket_group: dict[Tensor, _ParamAndGradBucketGroup]
    def __init__(
        self,
        config: TransformerConfig,
        ddp_config: DistributedDataParallelConfig,
        module: nn.Module,
        disable_bucketing: bool = ...,
    ) -> None: ...
    def no_sync(self) -> AbstractContextManager[None]: ...
    def start_grad_sync(self, *unused: Any) -> None: ...
    def zero_grad_buffer(self) -> None: ...
    def disable_forward_pre_hook(self, param_sync: bool = ...) -> None: ...

def finalize_model_grads(model: list[nn.Module], num_tokens: Tensor | None = ..., **kwargs: Any) -> None: ...
