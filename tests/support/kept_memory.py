"""What a layer's forward pass keeps for the backward pass."""

from typing import Any

import torch


def kept_bytes(chunk: Any, length: int) -> int:
    """Bytes of the different tensors that a model's first layer keeps of one sample, its weights aside."""
    block = chunk.decoder.layers[0]
    weights = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
    found: dict[int, int] = {}
    saved = []  # alive, so that no address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        saved.append(tensor)
        return tensor

    x_SBH = torch.randn(length, 1, chunk.spec.hidden_size, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        block(hidden_states=x_SBH, attention_mask=None, rotary_pos_emb=chunk.rotary_pos_emb(length))
    return sum(found.values())
