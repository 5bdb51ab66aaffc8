"""A Megatron model with a checkpoint's weights, on one rank."""

import torch

from nemo_minitron.arch.weights import weights
from nemo_minitron.checkpoints.source import TensorSource
from nemo_minitron.config.parallel import Precision
from nemo_minitron.megatron.build import build_chunks
from nemo_minitron.megatron.model import MinitronGPT
from nemo_minitron.megatron.runtime import Runtime


def megatron_model(source: TensorSource, here: Runtime, *, trainable: bool = False) -> MinitronGPT:
    """The model in fp32, every weight of it read from the checkpoint."""
    (model,) = build_chunks(source.spec, here, Precision.FP32, trainable=trainable)
    filled = set()
    with torch.no_grad():
        for weight, parameter in model.named_weights():
            parameter.copy_(source.get(weight.name))
            filled.add(weight.name)
    assert filled == {weight.name for weight in weights(source.spec)}
    return model
