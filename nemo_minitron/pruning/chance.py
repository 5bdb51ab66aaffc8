"""Importance drawn by lot, the baseline that every score must beat: a function of the seed alone, on every machine."""

import hashlib

import torch
from torch import Tensor

from nemo_minitron.arch.spec import ModelSpec


class RandomImportance:
    """A number in [0, 1) for every unit, in place of `Scores`.

    A unit's number comes from SHAKE-256 over seed, axis and layer, so that no library's generator has a say, and that
    one axis's lots are the same whatever else is pruned. Aggregations have no say.

    Args:
        spec: The model.
        seed: Equal seeds give equal numbers.
    """

    def __init__(self, spec: ModelSpec, seed: int) -> None:
        self.spec = spec
        self.seed = seed

    def hidden(self, *, batch: str = "", sequence: str = "") -> Tensor:
        """For each channel of the residual stream `[hidden]`."""
        return self._lots("hidden", self.spec.hidden_size)

    def ffn(self, layer: int, *, batch: str = "", sequence: str = "") -> Tensor:
        """For each MLP neuron of a layer `[ffn]`."""
        return self._lots(f"ffn.{layer}", self.spec.layers[layer].ffn_hidden_size)

    def heads(self, layer: int, *, batch: str = "", sequence: str = "") -> Tensor:
        """For each query head of a layer `[heads]`."""
        return self._lots(f"heads.{layer}", self.spec.layers[layer].num_attention_heads)

    def kv_groups(self, layer: int, *, batch: str = "", sequence: str = "") -> Tensor:
        """For each KV group of a layer `[groups]`."""
        return self._lots(f"kv_groups.{layer}", self.spec.layers[layer].num_query_groups)

    def layers(self) -> Tensor:
        """For each layer `[layers]`."""
        return self._lots("layers", self.spec.num_layers)

    def _lots(self, axis: str, count: int) -> Tensor:
        drawn = hashlib.shake_256(f"nemo_minitron/{self.seed}/{axis}".encode()).digest(8 * count)
        # 53 bits, which a float64 holds exactly.
        numbers = [int.from_bytes(drawn[start : start + 8], "big") >> 11 for start in range(0, 8 * count, 8)]
        return torch.tensor(numbers, dtype=torch.float64) / 2**53
