"""Weights of any readable checkpoint into a model, without going through a Megatron folder."""

from collections.abc import Sequence

import torch
from torch import nn

from nemo_minitron.checkpoints.source import TensorSource
from nemo_minitron.errors import CheckpointError
from nemo_minitron.megatron.model import unwrap
from nemo_minitron.megatron.placement import local_shard
from nemo_minitron.megatron.runtime import Runtime


@torch.no_grad()
def fill_from(chunks: Sequence[nn.Module], source: TensorSource, runtime: Runtime) -> None:
    """Read each weight this rank holds a part of, one at a time, and keep the part, in the model's numbers.

    Raises:
        CheckpointError: The source is another architecture.
    """
    for model in map(unwrap, chunks):
        if source.spec != model.spec:
            raise CheckpointError("the checkpoint's architecture is not the model's", rule="the same sizes throughout")
        for weight, parameter in model.named_weights():
            whole = source.get(weight.name)
            shard = local_shard(weight, whole, model.spec, rank=runtime.tp_rank, size=runtime.parallel.tensor)
            parameter.copy_(shard)
