"""Importance statistics of a model while it runs forward, at any parallel layout.

Sites of each layer, and what a rank sees of them (S sequence, B samples, C channels):

    hidden.attention   output of the norm before attention             all channels
    hidden.mlp         output of the norm before the MLP               all channels
    ffn                input of linear_fc2                             this tensor-parallel rank's neurons
    head               input of linear_proj                            this tensor-parallel rank's heads
    block_influence    1 - cos(what enters the layer, what leaves it)

Context parallelism splits the positions of a sequence, and sequence parallelism those of the first two and the last;
their sums over a sequence are added up before a square root or a square is taken. Everything else is a sum over
samples, so one sum over all ranks at the end suffices.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
import torch.distributed as dist
from megatron.core.transformer.identity_op import IdentityOp
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.errors import ScoresError
from nemo_minitron.megatron.forward import MicroBatch
from nemo_minitron.megatron.functional import rms_norm
from nemo_minitron.megatron.model import unwrap
from nemo_minitron.megatron.runtime import Runtime
from nemo_minitron.ops.block_influence import token_dissimilarity
from nemo_minitron.ops.importance import SequenceMoments, SiteSums, sequence_moments
from nemo_minitron.parallel.collectives import sum_over
from nemo_minitron.pruning.scores import HIDDEN_SITES, site_names

Site = tuple[int, str]
"""Global layer number from 0, and site."""


@dataclass(frozen=True, slots=True)
class _Masks:
    """Which positions of a micro-batch count, `[b, s]`: where linears split the work, and outside; None for all."""

    inside: Tensor | None
    outside: Tensor | None


@dataclass(slots=True)
class _Chunk:
    """What is known of one model chunk during the forward pass of one micro-batch."""

    next_micro_batch: int = 0
    masks: _Masks | None = None
    moments: dict[Site, SequenceMoments] = field(default_factory=dict)
    sums: SiteSums | None = None
    """Of all sites side by side, in the order of `widths`."""
    widths: dict[Site, int] = field(default_factory=dict)


class ImportanceCollector:
    """Context manager that collects the statistics of `ops.importance` from forward passes of a model.

    Before each global batch the caller tells with `expect` which positions count. Costs a few passes over each site's
    activations, and one transfer of masks a micro-batch; no layer waits for the device. Nothing is changed in the
    model, and hooks are taken off on exit.

    Args:
        chunks: This rank's model chunks, wrapped or not; Transformer Engine's layers or the local ones.
        runtime: The running layout.
        spec: Architecture of the whole model.
    """

    def __init__(self, chunks: Sequence[nn.Module], runtime: Runtime, spec: ModelSpec) -> None:
        self._chunks = [unwrap(chunk) for chunk in chunks]
        self._runtime = runtime
        self._spec = spec
        self._influence: dict[int, Tensor] = {}
        self._samples = torch.zeros((), dtype=torch.float64, device=runtime.device)
        self._tokens = torch.zeros((), dtype=torch.float64, device=runtime.device)
        self._masks: list[_Masks] = []
        self._states = [_Chunk() for _ in self._chunks]
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        for chunk, state in zip(self._chunks, self._states, strict=True):
            self._handles.append(chunk.register_forward_pre_hook(self._begin(state)))
            self._handles.append(chunk.register_forward_hook(self._end(state)))
            for layer in chunk.decoder.layers:
                self._attach(layer, layer.layer_number - 1, state)
        return self

    def __exit__(self, *exception: object) -> None:
        while self._handles:
            self._handles.pop().remove()

    def expect(self, keeps: Sequence[Tensor]) -> None:
        """Announce the micro-batches that come next: for each, `[b, s]` bool, True where a position counts.

        All ranks of a model copy pass the same masks, of whole sequences. Fully masked samples count as none.
        """
        self._masks = []
        for state in self._states:
            state.next_micro_batch = 0
        for keep_BS in keeps:
            keep = keep_BS.to(self._runtime.device, torch.bool)
            self._tokens += keep.sum()
            self._samples += keep.any(-1).sum()
            self._masks.append(self._split(keep))

    def result(self) -> dict[str, Tensor]:
        """All sums under the names of `nemo_minitron.pruning.scores`, float64 on the CPU, the same on every rank.

        Collective: every rank calls it.

        Raises:
            ScoresError: A sum is NaN or infinite; names layer and site.
        """
        flat = self._reduced()
        result: dict[str, Tensor] = {}
        size = 0
        for (number, site), channels, place in self._layout():
            _check_finite(flat[place], f"layer {number}, site {site}")
            result |= SiteSums(flat[place].view(-1, channels).clone()).named(f"layers.{number}.{site}")
            size = place.stop
        for number in range(self._spec.num_layers):
            _check_finite(flat[size + number], f"layer {number}, block influence")
            result[f"layers.{number}.block_influence.sum"] = flat[size + number].clone()
        return result | {"samples": flat[-2].clone(), "tokens": flat[-1].clone()}

    def _split(self, keep_BS: Tensor) -> _Masks:
        """This rank's positions of a mask."""
        if bool(keep_BS.all()):
            return _Masks(None, None)
        runtime = self._runtime
        whole = MicroBatch(keep_BS, keep_BS, keep_BS, keep_BS)
        inside = whole.on_context_rank(runtime.cp_rank, runtime.parallel.context).keep
        if not runtime.parallel.sequence_parallel:
            return _Masks(inside, inside)
        return _Masks(inside, inside.chunk(runtime.parallel.tensor, dim=1)[runtime.tp_rank])

    def _begin(self, state: _Chunk) -> Callable[..., None]:
        def hook(chunk: nn.Module, args: tuple[Any, ...]) -> None:
            if state.next_micro_batch >= len(self._masks):
                raise ScoresError(
                    f"the model ran micro-batch {state.next_micro_batch} of {len(self._masks)} announced",
                    rule="ImportanceCollector.expect() announces every micro-batch of a global batch",
                )
            state.masks = self._masks[state.next_micro_batch]
            state.next_micro_batch += 1

        return hook

    def _end(self, state: _Chunk) -> Callable[..., None]:
        def hook(chunk: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            moments = SequenceMoments.joined(list(self._over_sequence(state.moments).values()))
            if state.sums is None:
                state.widths = {site: value.sums.shape[-1] for site, value in state.moments.items()}
                state.sums = SiteSums.zeros(sum(state.widths.values()), moments.sums.device)
            state.sums.add_(moments)
            state.moments.clear()

        return hook

    def _attach(self, layer: nn.Module, number: int, state: _Chunk) -> None:
        attention, mlp = layer.self_attention, layer.mlp
        self._watch_norm(layer.input_layernorm, attention.linear_qkv, (number, "hidden.attention"), state)
        self._watch_norm(layer.pre_mlp_layernorm, mlp.linear_fc1, (number, "hidden.mlp"), state)
        for linear, site in ((attention.linear_proj, "head"), (mlp.linear_fc2, "ffn")):
            self._handles.append(linear.register_forward_pre_hook(self._take_input((number, site), state)))
        self._handles.append(layer.register_forward_hook(self._take_influence(number, state), with_kwargs=True))

    def _watch_norm(self, norm: nn.Module, linear: nn.Module, site: Site, state: _Chunk) -> None:
        """Watch what a norm returns; where it is fused into the linear that follows, compute it once more."""
        if isinstance(norm, IdentityOp):

            def recompute(linear: nn.Module, args: tuple[Any, ...]) -> None:
                self._take(site, fused_norm(linear, args[0]), state)

            self._handles.append(linear.register_forward_pre_hook(recompute))
        else:

            def take(norm: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
                self._take(site, output, state)

            self._handles.append(norm.register_forward_hook(take))

    def _take_input(self, site: Site, state: _Chunk) -> Callable[..., None]:
        def hook(linear: nn.Module, args: tuple[Any, ...]) -> None:
            self._take(site, args[0], state)

        return hook

    @torch.no_grad()
    def _take(self, site: Site, x_SBC: Tensor, state: _Chunk) -> None:
        masks = _announced(state)
        keep_BS = masks.outside if site[1] in HIDDEN_SITES else masks.inside
        state.moments[site] = sequence_moments(x_SBC.detach(), keep_BS)

    def _take_influence(self, number: int, state: _Chunk) -> Callable[..., None]:
        @torch.no_grad()
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            x_in = args[0] if args else kwargs["hidden_states"]
            x_out = output[0] if isinstance(output, tuple) else output
            change_SB = token_dissimilarity(x_in, x_out)
            if (keep_BS := _announced(state).outside) is not None:
                change_SB = torch.where(keep_BS.t(), change_SB, 0)
            total = change_SB.sum(dtype=torch.float64)
            self._influence[number] = self._influence[number] + total if number in self._influence else total

        return hook

    def _over_sequence(self, moments: dict[Site, SequenceMoments]) -> dict[Site, SequenceMoments]:
        """Add up the moments of ranks that hold other positions of the same samples."""
        parallel, groups = self._runtime.parallel, self._runtime.groups
        if parallel.context > 1:
            moments = _summed(moments, groups.cp)
        if parallel.sequence_parallel:
            split = {site: value for site, value in moments.items() if site[1] in HIDDEN_SITES}
            moments = moments | _summed(split, groups.tp)
        return moments

    def _layout(self) -> Iterator[tuple[Site, int, slice]]:
        """Where each site's six rows of channels lie in the flat tensor: site, channels, place."""
        start = 0
        for number, site, channels in site_names(self._spec):
            size = len(SiteSums.ROWS) * channels
            yield (number, site), channels, slice(start, start + size)
            start += size

    def _own_sums(self) -> dict[Site, Tensor]:
        """The six rows of each site that this rank has seen."""
        found: dict[Site, Tensor] = {}
        for state in self._states:
            if state.sums is not None:
                parts = state.sums.values.split(list(state.widths.values()), dim=1)
                found |= dict(zip(state.widths, parts, strict=True))
        return found

    def _reduced(self) -> Tensor:
        """Every sum of the whole model in one flat tensor, added up over all ranks, each part counted once."""
        runtime, parallel = self._runtime, self._runtime.parallel
        places, mine = list(self._layout()), self._own_sums()
        size = places[-1][2].stop
        flat = torch.zeros(size + self._spec.num_layers + 2, dtype=torch.float64, device=runtime.device)
        once_a_copy = runtime.cp_rank == 0  # sums over a sequence are complete on every context-parallel rank
        for site, channels, place in places:
            values = mine.get(site)
            if values is None or not once_a_copy or (site[1] in HIDDEN_SITES and runtime.tp_rank != 0):
                continue
            first = 0 if site[1] in HIDDEN_SITES else runtime.tp_rank * values.shape[1]
            flat[place].view(-1, channels)[:, first : first + values.shape[1]] = values
        if parallel.sequence_parallel or runtime.tp_rank == 0:
            for number, total in self._influence.items():
                flat[size + number] = total
        if once_a_copy and runtime.tp_rank == 0 and runtime.is_first_stage:
            flat[-2], flat[-1] = self._samples, self._tokens
        dist.all_reduce(flat)
        return flat.cpu()


def fused_norm(linear: nn.Module, x: Tensor) -> Tensor:
    """What the norm inside a Transformer Engine LayerNormLinear returns for `x`."""
    weight = linear.layer_norm_weight + 1 if linear.zero_centered_gamma else linear.layer_norm_weight
    if linear.normalization == "RMSNorm":
        return rms_norm(x, weight, linear.eps)
    return nn.functional.layer_norm(x, (x.shape[-1],), weight, linear.layer_norm_bias, linear.eps)


def _announced(state: _Chunk) -> _Masks:
    if state.masks is None:
        raise ScoresError(
            "a layer ran outside its model's forward pass", rule="hooks need the model chunk to be called"
        )
    return state.masks


def _summed(moments: dict[Site, SequenceMoments], group: dist.ProcessGroup) -> dict[Site, SequenceMoments]:
    """The moments of all sites added up over a group, in one transfer."""
    parts = [part for value in moments.values() for part in (value.sums, value.count)]
    flat = sum_over(torch.cat([part.flatten() for part in parts]), group)
    summed = iter(
        piece.view_as(part) for piece, part in zip(flat.split([p.numel() for p in parts]), parts, strict=True)
    )
    return {site: SequenceMoments(next(summed), next(summed)) for site in moments}


def _check_finite(sums: Tensor, place: str) -> None:
    if not bool(torch.isfinite(sums).all()):
        raise ScoresError(
            f"NaN or infinity in the activations of {place}",
            rule="every activation is a finite number",
            remedy="check that the weights were loaded; score in bf16 or fp32, not fp16",
        )
