"""Sums for merging dropped layers (`pruning.merge`), from forward passes of the teacher at any parallel layout.

A tensor-parallel rank sums up the rows of its own neurons; states behind a gap are sent to the pipeline rank that holds
the layer before it; data- and context-parallel ranks have different tokens. So one sum over all ranks completes them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.megatron import states
from nemo_minitron.megatron.forward import MicroBatch, collect_hidden
from nemo_minitron.megatron.model import unwrap
from nemo_minitron.megatron.placement import state_holder
from nemo_minitron.megatron.runtime import Runtime
from nemo_minitron.parallel.collectives import gather, split_group
from nemo_minitron.pruning.merge import Gap


class MergeCollector:
    """Adds up the sums over global batches; `result` puts all ranks together.

    Memory of each gap: two float64 matrices, `[ffn / tp, ffn]` and `[ffn / tp, hidden]`.

    Args:
        chunks: This rank's model chunks, wrapped or not.
        runtime: The running layout.
        spec: Architecture of the complete model.
        gaps: What goes; the same on every rank.
    """

    def __init__(self, chunks: Sequence[nn.Module], runtime: Runtime, spec: ModelSpec, gaps: Sequence[Gap]) -> None:
        self._chunks = chunks
        self._runtime = runtime
        self._spec = spec
        self._gaps = tuple(gaps)
        self._tp = split_group(runtime.groups.tp)
        states.connect(runtime)
        self._routes = [(gap.end, self._holder(gap.end - 1), self._holder(gap.layer)) for gap in self._gaps]
        self._mine = [gap for gap, (_, _, target) in zip(self._gaps, self._routes, strict=True) if self._here(target)]
        self._sums = {gap.layer: self._zeros(gap, runtime.parallel.tensor) for gap in self._mine}

    @torch.no_grad()
    def add(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Pass this data-parallel rank's share of a global batch through the model. Every rank calls it."""
        with self._watched() as (inputs, outputs):
            collect_hidden(self._chunks, micro_batches, self._runtime)
        keeps = [states.local_keep(batch, self._runtime).to(self._runtime.device) for batch in micro_batches]
        dtype = unwrap(self._chunks[0]).config.pipeline_dtype or torch.float32
        like = torch.empty((*keeps[0].shape, self._spec.hidden_size), dtype=dtype, device=self._runtime.device)
        arrived = states.send(outputs, self._routes, like=like, count=len(micro_batches), runtime=self._runtime)
        for gap in self._mine:
            moment, cross = self._sums[gap.layer]
            parts = zip(keeps, inputs[gap.layer], outputs[gap.layer + 1], arrived[gap.end], strict=True)
            for keep_SB, a_SBF, before_SBH, after_SBH in parts:
                kept = self._positions(keep_SB)
                own_TF = a_SBF.float()[kept]
                added_TH = self._positions(after_SBH.float() - before_SBH.float())[kept]
                moment += own_TF.t() @ self._neurons(own_TF)
                cross += own_TF.t() @ added_TH

    def result(self) -> dict[str, Tensor]:
        """The sums of all ranks by name, float64 on the CPU, on every rank. Collective."""
        found: dict[str, Tensor] = {}
        for gap in self._gaps:
            for part, whole in zip(("moment", "cross"), self._zeros(gap, 1), strict=True):
                if gap in self._mine:
                    own = self._sums[gap.layer][0 if part == "moment" else 1]
                    first = self._runtime.tp_rank * len(own)
                    whole[first : first + len(own)] = own
                dist.all_reduce(whole)
                found[f"layers.{gap.layer}.{part}"] = whole.cpu()
        return found

    def _holder(self, layer: int) -> int:
        return state_holder(layer, self._spec.num_layers, self._runtime.parallel)

    def _here(self, pipeline_rank: int) -> bool:
        return pipeline_rank == self._runtime.pp_rank

    def _zeros(self, gap: Gap, shards: int) -> tuple[Tensor, Tensor]:
        neurons = self._spec.layers[gap.layer].mlp.ffn_hidden_size
        options: dict[str, Any] = {"dtype": torch.float64, "device": self._runtime.device}
        rows = neurons // shards
        return torch.zeros(rows, neurons, **options), torch.zeros(rows, self._spec.hidden_size, **options)

    def _positions(self, x_SB: Tensor) -> Tensor:
        """All positions of a tensor that sequence parallelism has split over tensor-parallel ranks."""
        return gather(x_SB, self._tp).flatten(0, 1) if self._runtime.parallel.sequence_parallel else x_SB

    def _neurons(self, own_TF: Tensor) -> Tensor:
        """The neurons of all tensor-parallel ranks."""
        return gather(own_TF, self._tp).transpose(0, 1).flatten(1)

    @contextmanager
    def _watched(self) -> Iterator[tuple[dict[int, list[Tensor]], dict[int, list[Tensor]]]]:
        """Inside the block, inputs of second MLP matrices by layer, and states by the layer that they enter."""
        before = {gap.layer for gap in self._gaps}
        wanted = {layer + 1 for layer in before} | {gap.end for gap in self._gaps}
        inputs: dict[int, list[Tensor]] = {layer: [] for layer in before}
        outputs: dict[int, list[Tensor]] = {state: [] for state in wanted}
        handles: list[RemovableHandle] = []
        for chunk in map(unwrap, self._chunks):
            for layer in chunk.decoder.layers:
                number = layer.layer_number - 1
                if number in before:
                    handles.append(layer.mlp.linear_fc2.register_forward_pre_hook(_keep_input(inputs[number])))
                if number + 1 in wanted:
                    handles.append(layer.register_forward_hook(_keep_output(outputs[number + 1])))
        try:
            yield inputs, outputs
        finally:
            for handle in handles:
                handle.remove()


def _keep_input(found: list[Tensor]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        found.append(args[0].detach())

    return hook


def _keep_output(found: list[Tensor]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        found.append((output[0] if isinstance(output, tuple) else output).detach())

    return hook
