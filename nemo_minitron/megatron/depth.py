"""A model's output without some of its layers, for many choices of layers at once, at any parallel layout.

The states before a left-out block are computed once, with the complete model, and every candidate starts from them. So
leaving out each of L layers in turn costs about L^2 / 2 layers instead of L^2.

Under a pipeline the candidates follow the complete model like micro-batches: a stage takes in what the stage before it
has made (a candidate whose block began there), or starts from its own states before the block, runs its layers but for
the block, and sends the result on. One candidate is on a stage at a time, so memory does not grow with their number:
a stage holds the complete model's states before its own layers, and a few messages.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor, nn

from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.errors import ScoresError
from nemo_minitron.megatron.documents import attention_documents
from nemo_minitron.megatron.forward import MicroBatch
from nemo_minitron.megatron.model import MinitronGPT, outside_inference_mode, unwrap
from nemo_minitron.megatron.placement import chunk_layers
from nemo_minitron.megatron.runtime import Runtime
from nemo_minitron.parallel.fused_linear import pieces
from nemo_minitron.pruning.depth import Block

WHOLE: Block = (-1, 0)
"""Stands for the model with all its layers."""


@dataclass(slots=True)
class Part:
    """One model chunk of this rank."""

    model: MinitronGPT
    index: int
    """Its place among all chunks in the order of the forward pass."""
    layers: range
    states: dict[int, Tensor]
    """The complete model's states before each layer where a candidate's block begins."""

    def run(
        self, x_SBH: Tensor, block: Block, rotary: Tensor, documents: PackedSeqParams | None
    ) -> Iterator[tuple[int, Tensor]]:
        """This chunk's layers behind the block (those before it have been run); yields number and states of each."""
        for number, layer in zip(self.layers, self.model.decoder.layers, strict=True):
            if number >= sum(block):
                x_SBH, _ = layer(
                    hidden_states=x_SBH, attention_mask=None, rotary_pos_emb=rotary, packed_seq_params=documents
                )
                yield number, x_SBH


class LayerSkipper:
    """Runs a model with blocks of its layers left out.

    Args:
        chunks: This rank's model chunks, wrapped or not; Transformer Engine's layers or the local ones.
        runtime: The running layout.
        spec: Architecture of the complete model.
        blocks: What to leave out, one after the other; the same on every rank.
    """

    def __init__(self, chunks: Sequence[nn.Module], runtime: Runtime, spec: ModelSpec, blocks: Sequence[Block]) -> None:
        self._runtime = runtime
        self._spec = spec
        self._blocks = (WHOLE, *blocks)
        self._begins = {first for first, _ in blocks}
        ranges = chunk_layers(spec.num_layers, runtime.parallel)
        places = range(runtime.pp_rank, len(ranges), runtime.parallel.pipeline)
        self._parts = [Part(unwrap(c), place, ranges[place], {}) for c, place in zip(chunks, places, strict=True)]
        self._last = len(ranges) - 1
        self._documents: PackedSeqParams | None = None
        """Of the micro-batch that is on its way."""
        self._sent: deque[tuple[dist.Work, Tensor]] = deque()
        self._finite = torch.ones(spec.num_layers, dtype=torch.bool, device=runtime.device)

    @torch.no_grad()
    def outputs(self, micro_batch: MicroBatch) -> Iterator[tuple[int, Tensor]]:
        """Final states, after the norm, of the complete model and of every candidate.

        Every rank of a model copy iterates to the end, with the same micro-batch.

        Yields:
            On the last stage, index and states `[s, b, h]`, the same on every tensor-parallel rank: index 0 is the
            complete model, `1 + i` block `i`. Positions are this context-parallel rank's. Elsewhere nothing.
        """
        size, rank = self._runtime.parallel.context, self._runtime.cp_rank
        local = micro_batch.to(self._runtime.device).on_context_rank(rank, size)
        chunks = [part.model for part in self._parts]
        position_ids = micro_batch.on_host.position_ids
        self._documents = attention_documents(position_ids, chunks, self._runtime.device, context=size)
        length = micro_batch.tokens.shape[1] if self._documents is None else self._documents.max_seqlen_q
        for part in self._parts:
            part.states.clear()
        # All of a window receive before any of it sends: two stages that are each other's next and previous one
        # (virtual stages on two ranks) then post their messages in matching order, which NCCL needs.
        window = self._runtime.parallel.pipeline if len(self._parts) > 1 else 1
        with outside_inference_mode():  # Megatron caches them
            rotary = [part.model.rotary_pos_emb(length) for part in self._parts]
        for indices in pieces(len(self._blocks), window):
            for part, angles in zip(self._parts, rotary, strict=True):
                active = [i for i in range(indices.start, indices.stop) if self._blocks[i][0] < part.layers.stop]
                inputs = [self._input(part, self._blocks[index], local) for index in active]
                results = [self._run(part, index, x, angles) for index, x in zip(active, inputs, strict=True)]
                if part.index == self._last:
                    yield from ((i, self._finish(part.model, x)) for i, x in zip(active, results, strict=True))
                else:
                    for x in results:
                        self._send(x)
        while self._sent:
            self._sent.popleft()[0].wait()

    def check_finite(self) -> None:
        """Make sure that the complete model's states were finite so far. Collective over all ranks.

        Raises:
            ScoresError: Names the first layer whose output was not.
        """
        finite = self._finite.int()
        dist.all_reduce(finite, op=dist.ReduceOp.MIN)
        if bool((finite == 0).any()):
            layer = int((finite == 0).nonzero()[0])
            raise ScoresError(
                f"NaN or infinity in what layer {layer} returns",
                rule="every activation is a finite number",
                remedy="check that the weights were loaded; score in bf16 or fp32, not fp16",
            )

    def _input(self, part: Part, block: Block, local: MicroBatch) -> Tensor | None:
        """The states that a chunk begins with; None if the block begins there: the complete model's states are kept."""
        if block[0] in part.layers:
            return None
        if part.index > 0:
            return self._receive(local)
        embedded: Tensor = part.model._preprocess(input_ids=local.tokens, position_ids=local.position_ids)[0]
        return embedded

    def _run(self, part: Part, index: int, received: Tensor | None, rotary: Tensor) -> Tensor:
        """A chunk's output for one choice of layers."""
        block = self._blocks[index]
        x_SBH = part.states[block[0]] if received is None else received
        if index == 0:
            self._keep(part, part.layers.start, x_SBH)
        output = x_SBH
        for number, output in part.run(x_SBH, block, rotary, self._documents):
            if index == 0:
                self._finite[number] &= torch.isfinite(output).all()
                self._keep(part, number + 1, output)
        return output

    def _keep(self, part: Part, number: int, x_SBH: Tensor) -> None:
        """Hold on to the states before a layer of the chunk, if a block begins there."""
        if number in part.layers and number in self._begins:
            part.states[number] = x_SBH

    def _finish(self, model: MinitronGPT, x_SBH: Tensor) -> Tensor:
        normed: Tensor = model.decoder.final_layernorm(x_SBH)
        if self._runtime.parallel.sequence_parallel:
            normed = gather_from_sequence_parallel_region(normed, group=self._runtime.groups.tp)
        return normed

    def _receive(self, local: MicroBatch) -> Tensor:
        samples, length = local.tokens.shape
        config = self._parts[0].model.config
        if self._runtime.parallel.sequence_parallel:
            length //= self._runtime.parallel.tensor
        shape = (length, samples, self._spec.hidden_size)
        states = torch.empty(shape, dtype=config.pipeline_dtype, device=self._runtime.device)
        dist.recv(states, src=self._neighbour(-1), group=self._runtime.groups.pp)
        return states

    def _send(self, x_SBH: Tensor) -> None:
        x_SBH = x_SBH.contiguous()
        work = dist.isend(x_SBH, dst=self._neighbour(1), group=self._runtime.groups.pp)
        assert work is not None, "this rank is in the group"
        self._sent.append((work, x_SBH))
        while len(self._sent) > 4 * self._runtime.parallel.pipeline:
            self._sent.popleft()[0].wait()

    def _neighbour(self, step: int) -> int:
        stages = self._runtime.parallel.pipeline
        return dist.get_global_rank(self._runtime.groups.pp, (self._runtime.pp_rank + step) % stages)
