"""Importance scores: the sums that a calibration pass leaves, as one file, and the importance of units from them.

For a site, a sample and a channel let `m`, `n`, `v` be mean |x|, L2 norm and variance over the sequence. A file holds,
for every site of every layer, the sums over samples of `m, m^2, n, n^2, v, v^2` (float64, one number a channel). All
nine (batch, sequence) aggregations of arXiv:2407.14679, sec. 2.2, follow from them. Names:

    layers.{i}.hidden.attention.{mean|l2|var}.{sum|sumsq}   output of the norm before attention     [hidden]
    layers.{i}.hidden.mlp....                               output of the norm before the MLP       [hidden]
    layers.{i}.ffn....                                      input of the second MLP matrix          [ffn]
    layers.{i}.head....                                     input of the attention output           [heads * head_dim]
    layers.{i}.block_influence.sum                          sum over tokens of 1 - cos(in, out)     []
    samples, tokens                                         how many they rest on                   []
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.checkpoints.files import staged_file
from nemo_minitron.checkpoints.safetensors_file import Entry, SafetensorsFile, SafetensorsWriter
from nemo_minitron.errors import CheckpointError, MinitronError, ScoresError
from nemo_minitron.ops.importance import Aggregation, SiteSums, aggregate, head_importance, kv_group_importance

FORMAT = "nemo_minitron.scores"
VERSION = "1"

HIDDEN_SITES = ("hidden.attention", "hidden.mlp")
"""Both are the residual stream after a norm; their importance is added up."""


class Scores:
    """Scores of one model over one calibration set. They do not depend on any parallel layout.

    Args:
        spec: The model that was scored.
        tensors: The float64 sums by name; kept, not copied.
        provenance: JSON data: `data_digest`, `tokenizer_digest` and whatever else tells them apart.

    Raises:
        ScoresError: A sum is missing, unknown, of the wrong shape or not finite (names layer and site), or nothing was
            counted.
    """

    def __init__(
        self, spec: ModelSpec, tensors: Mapping[str, Tensor], *, provenance: Mapping[str, Any] | None = None
    ) -> None:
        self.spec = spec
        self.tensors = dict(tensors)
        self.provenance = dict(provenance or {})
        _check(self.spec, self.tensors)

    @property
    def samples(self) -> int:
        """Calibration samples."""
        return int(self.tensors["samples"])

    @property
    def tokens(self) -> int:
        """Calibration tokens that were kept."""
        return int(self.tensors["tokens"])

    def hidden(self, *, batch: Aggregation | str = "l2", sequence: Aggregation | str = "mean") -> Tensor:
        """Importance of each channel of the residual stream `[hidden]`: summed over layers and both norms."""
        sites = [(layer, site) for layer in range(self.spec.num_layers) for site in HIDDEN_SITES]
        return torch.stack([self._channels(layer, site, batch, sequence) for layer, site in sites]).sum(0)

    def ffn(self, layer: int, *, batch: Aggregation | str = "l2", sequence: Aggregation | str = "mean") -> Tensor:
        """Importance of each MLP neuron of a layer `[ffn]`."""
        return self._channels(layer, "ffn", batch, sequence)

    def heads(self, layer: int, *, batch: Aggregation | str = "l2", sequence: Aggregation | str = "mean") -> Tensor:
        """Importance of each query head of a layer `[heads]`: L2 over its channels."""
        return head_importance(self._channels(layer, "head", batch, sequence), head_dim=self.spec.head_dim)

    def kv_groups(self, layer: int, *, batch: Aggregation | str = "l2", sequence: Aggregation | str = "mean") -> Tensor:
        """Importance of each KV group of a layer `[groups]`: the sum over its query heads."""
        heads = self.heads(layer, batch=batch, sequence=sequence)
        return kv_group_importance(heads, num_groups=self.spec.layers[layer].num_query_groups)

    def block_influence(self) -> Tensor:
        """Mean over tokens of 1 - cos(input, output) of each layer `[layers]`; higher is more important.

        Source: Men et al., "ShortGPT", arXiv:2403.03853.
        """
        sums = [self.tensors[f"layers.{layer}.block_influence.sum"] for layer in range(self.spec.num_layers)]
        return torch.stack(sums) / self.tensors["tokens"]

    def save(self, path: Path) -> None:
        """Write the file under a temporary name, then put it in place."""
        metadata = {
            "format": FORMAT,
            "version": VERSION,
            "spec": json.dumps(self.spec.to_dict(), sort_keys=True),
            "spec_digest": self.spec.digest(),
            "provenance": json.dumps(self.provenance, sort_keys=True),
        }
        entries = {name: Entry(torch.float64, tuple(tensor.shape)) for name, tensor in self.tensors.items()}
        with staged_file(path) as partial, SafetensorsWriter(partial, entries, metadata) as writer:
            for name, tensor in self.tensors.items():
                writer.write(name, tensor)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a file that `save` wrote.

        Raises:
            ScoresError: It is missing, damaged, of another format or version, or holds sums that cannot be.
        """
        try:
            file = SafetensorsFile(path)
            if file.metadata.get("format") != FORMAT or file.metadata.get("version") != VERSION:
                raise ScoresError(
                    f"{path}: format {file.metadata.get('format')!r}, version {file.metadata.get('version')!r}",
                    rule=f"{FORMAT}, version {VERSION}",
                    remedy="score again with this version",
                )
            spec = ModelSpec.from_dict(json.loads(file.metadata["spec"]))
            provenance = json.loads(file.metadata["provenance"])
            return cls(spec, {name: file.get(name) for name in file.entries}, provenance=provenance)
        except ScoresError as error:
            raise ScoresError(_prefixed(error, path), rule=error.rule, remedy=error.remedy) from error
        except (KeyError, ValueError, MinitronError) as error:
            what = error.what if isinstance(error, CheckpointError) else f"{path}: {error}"
            raise ScoresError(what, remedy="the file is damaged; score again") from error

    def _channels(self, layer: int, site: str, batch: Aggregation | str, sequence: Aggregation | str) -> Tensor:
        prefix = f"layers.{layer}.{site}.{Aggregation(sequence).value}"
        return aggregate(self.tensors[f"{prefix}.sum"], self.tensors[f"{prefix}.sumsq"], self.samples, batch)


def site_names(spec: ModelSpec) -> Iterator[tuple[int, str, int]]:
    """Layer, name and number of channels of every site, in order."""
    for index, layer in enumerate(spec.layers):
        for site in HIDDEN_SITES:
            yield index, site, spec.hidden_size
        yield index, "ffn", layer.ffn_hidden_size
        yield index, "head", layer.num_attention_heads * spec.head_dim


def _expected(spec: ModelSpec) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and place (for messages) of every sum."""
    found: dict[str, tuple[tuple[int, ...], str]] = {"samples": ((), "samples"), "tokens": ((), "tokens")}
    for index, site, channels in site_names(spec):
        for row in SiteSums.ROWS:
            found[f"layers.{index}.{site}.{row}"] = ((channels,), f"layer {index}, site {site}")
    for index in range(spec.num_layers):
        found[f"layers.{index}.block_influence.sum"] = ((), f"layer {index}, block influence")
    return found


def _check(spec: ModelSpec, tensors: Mapping[str, Tensor]) -> None:
    expected = _expected(spec)
    if missing := [name for name in expected if name not in tensors]:
        raise ScoresError(f"scores: {len(missing)} sum(s) missing, {missing[0]} first")
    if extra := sorted(set(tensors) - set(expected)):
        raise ScoresError(f"scores: {len(extra)} sum(s) that the model has no site for, {extra[0]} first")
    for name, (shape, place) in expected.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != shape or tensor.dtype != torch.float64:
            raise ScoresError(
                f"scores: {name} is {tensor.dtype} shaped {tuple(tensor.shape)}", rule=f"float64 shaped {shape}"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise ScoresError(
                f"scores: NaN or infinity at {place} ({name})",
                rule="activations are finite",
                remedy="look for overflow in that layer; calibrate in bf16 or fp32, not fp16",
            )
    for name in ("samples", "tokens"):
        if float(tensors[name]) < 1:
            raise ScoresError(f"scores: {name} = {float(tensors[name]):g}", rule="at least 1")


def _prefixed(error: ScoresError, path: Path) -> str:
    return error.what if error.what.startswith(str(path)) else f"{path}: {error.what}"
