"""What a checkpoint's weights are, whatever file they lie in."""

import hashlib

import torch

from nemo_minitron.checkpoints.source import TensorSource, stream


def weights_digest(source: TensorSource) -> str:
    """SHA-256 over architecture, names and bytes of all weights, 64 hex digits; reads every one of them."""
    digest = hashlib.sha256(source.spec.digest().encode())
    for name, tensor in stream(source):
        digest.update(f"\0{name} {tensor.dtype}\0".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
