"""A checkpoint as a Megatron model on one rank, as a model of transformers, and the logits of both."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from nemo_minitron.arch.weights import weights
from nemo_minitron.checkpoints.source import TensorSource
from nemo_minitron.config.parallel import Precision
from nemo_minitron.megatron.build import build_chunks
from nemo_minitron.megatron.forward import MicroBatch
from nemo_minitron.megatron.model import MinitronGPT
from nemo_minitron.megatron.runtime import Runtime

TOKENS = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(1))
"""What logits are of."""


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


@torch.no_grad()
def megatron_logits(source: TensorSource, here: Runtime, dtype: torch.dtype = torch.float32) -> Tensor:
    """Of `TOKENS`."""
    micro = MicroBatch.of(TOKENS, TOKENS, torch.ones_like(TOKENS, dtype=torch.bool))
    logits: Tensor = megatron_model(source, here).to(dtype)(micro.tokens, micro.position_ids, None)
    return logits


def loaded(folder: Path) -> PreTrainedModel:
    """What transformers reads from a folder, in fp32. Eager, since that is what the other implementations are after."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@torch.no_grad()
def hf_logits(model: PreTrainedModel) -> Tensor:
    """Of `TOKENS`."""
    logits: Tensor = model(TOKENS, use_cache=False).logits
    return logits
