"""Weights that wait in host memory while they are not needed."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from nemo_minitron.megatron.model import unwrap


class OffloadedLayers:
    """Keeps the layers of frozen chunks in host memory, and lends them to a device for the length of a block.

    Embedding, final norm and output layer stay where they are: the loss needs the output layer after the block. The
    weights never change, so nothing is copied back. Buffers are left alone.

    Args:
        chunks: This rank's chunks of a frozen model.
        device: Where they compute.

    Raises:
        ValueError: A weight takes gradients.
    """

    def __init__(self, chunks: Sequence[nn.Module], device: torch.device) -> None:
        self._device = device
        layers = [unwrap(chunk).decoder.layers for chunk in chunks]
        parameters = [parameter for module in layers for parameter in module.parameters()]
        if any(parameter.requires_grad for parameter in parameters):
            raise ValueError("only frozen weights can wait in host memory")
        self._homes: list[tuple[nn.Parameter, Tensor]] = [(each, self._host_copy(each.data)) for each in parameters]
        self._return()

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """The weights are on the device inside the block; copies are queued before its first kernel."""
        for parameter, home in self._homes:
            parameter.data = home.to(self._device, non_blocking=True, copy=True)
        try:
            yield
        finally:
            self._return()

    def _return(self) -> None:
        for parameter, home in self._homes:
            parameter.data = home

    def _host_copy(self, weight: Tensor) -> Tensor:
        host = weight.to("cpu", copy=True)
        # Pinned memory is what makes the copy to a GPU run beside other work.
        return host.pin_memory() if self._device.type == "cuda" else host
