from collections.abc import Iterator
from dataclasses import dataclass

from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import nn

@dataclass
class TransformerBlockSubmodules:
    layer_specs: list[ModuleSpec] | None = ...
    layer_norm: object = ...

class _Layers(nn.ModuleList):
    def __iter__(self) -> Iterator[TransformerLayer]: ...
    def __getitem__(self, idx: int) -> TransformerLayer: ...  # type: ignore[override]

class TransformerBlock(nn.Module):
    layers: _Layers
    final_layernorm: nn.Module
