"""Importance statistics of a model while it runs forward, at any parallel layout.

Sites of each layer, and what a rank sees of them (S sequence, B samples, C channels):

    hidden.attention   output of the norm before attention             all channels
    hidden.mlp         output of the norm before the MLP               all channels
    ffn                input of linear_fc2, or what the activation     this tensor-parallel rank's neurons
                       is applied to (`FfnSite`)
    head               input of linear_proj                            this tensor-parallel rank's heads
    shared_ffn         input of the shared expert's linear_fc2         this tensor-parallel rank's neurons
    expert_ffn         input of each expert's linear_fc2               those of this rank's experts (`expert_sums`)
    hidden.mamba       output of the norm before Mamba                 all channels
    mamba              x part of what in_proj returns                  this tensor-parallel rank's heads
    block_influence    1 - cos(what enters the layer, what leaves it); of mixer and feed-forward apart if asked for

Context parallelism splits the positions of a sequence, and sequence parallelism those of the first two and the last;
their sums over a sequence are added up before a square root or a square is taken. Everything else is a sum over
samples, so one sum over all ranks at the end suffices.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
import torch.distributed as dist
from megatron.core.transformer.identity_op import IdentityOp
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nemo_minitron.arch.layer import PARTS, Attention, Mamba, Mlp
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.config.sites import FfnSite
from nemo_minitron.errors import ScoresError
from nemo_minitron.kernels.available import kernels_run
from nemo_minitron.megatron.expert_sums import EXPERT_FFN, LayerExpertSums, RoutedTokens
from nemo_minitron.megatron.experts import Mixture, experts_of
from nemo_minitron.megatron.forward import MicroBatch
from nemo_minitron.megatron.functional import layer_norm, rms_norm
from nemo_minitron.megatron.model import MinitronGPT, outside_inference_mode, unwrap
from nemo_minitron.megatron.runtime import Runtime
from nemo_minitron.megatron.score_sums import RankSums, Site, deal_out, gather, passed_sites, rank_channels
from nemo_minitron.ops.block_influence import Stream, dissimilarity, stream_of
from nemo_minitron.ops.importance import (
    Block,
    SequenceMoments,
    SiteSums,
    block_rows,
    joined_moments,
    sequence_blocks,
)
from nemo_minitron.ops.memory import Workspace
from nemo_minitron.ops.widening import at_least_fp32
from nemo_minitron.parallel.collectives import sum_over
from nemo_minitron.pruning.scores import HIDDEN_SITES, two_part_layers

_HIDDEN = frozenset(HIDDEN_SITES)


@dataclass(frozen=True, slots=True)
class _Masks:
    """Which positions of a micro-batch count, `[b, s]`: where linears split the work, and outside; None for all."""

    inside: Tensor | None
    outside: Tensor | None
    routed: RoutedTokens | None = None
    """What experts may see, in a model that has some."""


@dataclass(slots=True)
class _Group:
    """Sites whose positions are split in the same way. Their channels stand side by side."""

    sites: list[Site]
    widths: list[int]
    sums: SiteSums
    positions_split_over: list[dist.ProcessGroup]


@dataclass(slots=True)
class _Chunk:
    """What is known of one model chunk, and of the micro-batch that passes through it."""

    layers: list[int]
    """Global numbers."""
    groups: list[_Group]
    influence: Tensor
    """Sum over tokens for each layer, float64."""
    experts: dict[int, LayerExpertSums]
    """By layer, of those that have experts."""
    next_micro_batch: int = 0
    masks: _Masks | None = None
    samples: int = 0
    """Of the micro-batch."""
    blocks: dict[Site, list[Block]] = field(default_factory=dict)
    changes: dict[int, Tensor] = field(default_factory=dict)
    """1 - cos of every token, `[s * b]`, by layer."""
    parts: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    """As `influence`, by layer and part; empty unless it was asked for."""
    middle: Tensor | None = None
    """What the layer that is on its way has between mixer and feed-forward."""
    latest: tuple[Tensor, Stream] | None = None
    """What the layer before returned, and the same with its lengths: the next layer's input."""


class ImportanceCollector:
    """Context manager that collects the statistics of `ops.importance` from forward passes of a model.

    Before each global batch the caller tells with `expect` which positions count. Costs a few passes over each site's
    activations, a single-precision copy of one site and of two layers' states, and one transfer of masks a micro-batch;
    no layer without experts waits for the device. Nothing is changed in the model, and hooks are taken off on exit.

    Args:
        chunks: This rank's model chunks, wrapped or not; Transformer Engine's layers or the local ones.
        runtime: The running layout.
        spec: Architecture of the complete model.
        ffn_site: What neurons are measured on.
        sublayers: Whether mixer and feed-forward of a layer are measured apart as well.
    """

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        runtime: Runtime,
        spec: ModelSpec,
        *,
        ffn_site: FfnSite = FfnSite.AFTER_ACTIVATION,
        sublayers: bool = False,
    ) -> None:
        self._sublayers = sublayers
        self._chunks = [unwrap(chunk) for chunk in chunks]
        self._runtime = runtime
        self._spec = spec
        self._ffn_site = ffn_site
        self._samples = torch.zeros((), dtype=torch.float64, device=runtime.device)
        self._tokens = torch.zeros((), dtype=torch.float64, device=runtime.device)
        self._masks: list[_Masks] = []
        with outside_inference_mode():  # the model adds to the sums outside of it
            self._states = [self._state(chunk) for chunk in self._chunks]
        self._handles: list[RemovableHandle] = []
        self._workspace = Workspace()

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
        for chunk in self._chunks:
            for layer in chunk.decoder.layers:
                if (moe := experts_of(layer)) is not None:
                    moe.observer = None
        self._workspace = Workspace()

    def expect(self, keeps: Sequence[Tensor]) -> None:
        """Announce the micro-batches that come next: for each, `[b, s]` bool, True where a position counts.

        All ranks of a model copy pass the same masks, of complete sequences. Fully masked samples count as none.
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
        sites: dict[Site, Tensor] = {}
        influence: dict[int, Tensor] = {}
        parts: dict[tuple[int, str], Tensor] = {}
        for state in self._states:
            parts |= state.parts
            for group in state.groups:
                sites |= dict(zip(group.sites, torch.split(group.sums.values, group.widths, 1), strict=True))
            influence |= dict(zip(state.layers, state.influence.unbind(), strict=True))
            sites |= {(number, EXPERT_FFN): found.neurons.values for number, found in state.experts.items()}
        experts = {
            (number, name): sums
            for state in self._states
            for number, found in state.experts.items()
            for name, sums in found.tokens.items()
        }
        apart = parts if self._sublayers else None
        sums = RankSums(sites, influence, self._samples, self._tokens, apart, experts)
        return gather(sums, self._spec, self._runtime)

    def load(self, sums: Mapping[str, Tensor]) -> None:
        """Go on from sums that `result` gave at any layout, instead of what has been collected.

        Every rank passes the same; then `result` gives them back, and what comes is added to them.
        """
        layers = [number for state in self._states for number in state.layers]
        mine = deal_out(sums, layers, self._spec, self._runtime)
        for state in self._states:
            for group in state.groups:
                torch.cat([mine.sites[site] for site in group.sites], dim=1, out=group.sums.values)
            state.influence.copy_(torch.stack([mine.influence[number] for number in state.layers]))
            for number, found in state.experts.items():
                found.neurons.values.copy_(mine.sites[number, EXPERT_FFN])
                found.tokens = {name: mine.experts[number, name] for name in found.tokens}
            for key in state.parts:
                state.parts[key] = (mine.parts or {})[key]
        self._samples, self._tokens = mine.samples, mine.tokens

    def _state(self, chunk: MinitronGPT) -> _Chunk:
        runtime, spec = self._runtime, self._spec
        layers = [layer.layer_number - 1 for layer in chunk.decoder.layers]
        every = [(number, site) for number in layers for site in passed_sites(number, spec)]
        split = [runtime.groups.cp] if runtime.parallel.context > 1 else []
        if runtime.parallel.sequence_parallel:
            hidden = [site for site in every if site[1] in _HIDDEN]
            inside = [site for site in every if site[1] not in _HIDDEN]
            parts = [(hidden, [*split, runtime.groups.tp]), (inside, split)]
        else:
            parts = [(every, split)]
        groups = []
        for sites, over in parts:
            widths = [rank_channels(site, number, spec, runtime) for number, site in sites]
            groups.append(_Group(sites, widths, SiteSums.zeros(sum(widths), runtime.device), over))
        experts = {
            layer.layer_number - 1: self._expert_sums(moe)
            for layer in chunk.decoder.layers
            if (moe := experts_of(layer)) is not None
        }
        influence = torch.zeros(len(layers), dtype=torch.float64, device=runtime.device)
        both = [number for number in two_part_layers(spec) if self._sublayers and number in layers]
        apart = {(number, part): torch.zeros_like(influence[0]) for number in both for part in PARTS}
        return _Chunk(layers, groups, influence, experts, parts=apart)

    def _expert_sums(self, moe: Mixture) -> LayerExpertSums:
        neurons = moe.sizes.expert_ffn_hidden_size // self._runtime.parallel.tensor
        return LayerExpertSums(moe.first, moe.count, neurons, self._runtime)

    def _split(self, keep_BS: Tensor) -> _Masks:
        """This rank's positions of a mask."""
        runtime = self._runtime
        routed = RoutedTokens.of(keep_BS, runtime) if self._spec.has_experts else None
        if bool(keep_BS.all()):
            return _Masks(None, None, routed)
        whole = MicroBatch(keep_BS, keep_BS, keep_BS, keep_BS)
        inside = whole.on_context_rank(runtime.cp_rank, runtime.parallel.context).keep
        if not runtime.parallel.sequence_parallel:
            return _Masks(inside, inside, routed)
        return _Masks(inside, inside.chunk(runtime.parallel.tensor, dim=1)[runtime.tp_rank], routed)

    def _begin(self, state: _Chunk) -> Callable[..., None]:
        def hook(chunk: nn.Module, args: tuple[Any, ...]) -> None:
            if state.next_micro_batch >= len(self._masks):
                raise ScoresError(
                    f"the model ran micro-batch {state.next_micro_batch} of {len(self._masks)} announced",
                    rule="ImportanceCollector.expect() announces every micro-batch of a global batch",
                )
            state.masks = self._masks[state.next_micro_batch]
            state.next_micro_batch += 1
            for found in state.experts.values():
                found.batch = state.masks.routed
            state.blocks.clear()
            state.changes.clear()
            state.latest = None

        return hook

    def _end(self, state: _Chunk) -> Callable[..., None]:
        @torch.no_grad()
        def hook(chunk: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            masks = _announced(state)
            for group in state.groups:
                keep_BS = masks.outside if group.sites[0][1] in _HIDDEN else masks.inside
                blocks = [state.blocks[site] for site in group.sites]
                moments = joined_moments(blocks, _kept(keep_BS, state.samples, blocks[0], group.sums))
                for over in group.positions_split_over:
                    moments = _summed(moments, over)
                group.sums.add_(moments)
            changes_LN = torch.stack([state.changes[number] for number in state.layers])
            if masks.outside is not None:
                changes_LN = torch.where(masks.outside.t().flatten(), changes_LN, 0)
            state.influence += changes_LN.sum(-1, dtype=torch.float64)
            state.blocks.clear()
            state.changes.clear()
            state.latest = None

        return hook

    def _attach(self, layer: Any, number: int, state: _Chunk) -> None:
        sizes = self._spec.layers[number]
        if isinstance(sizes.mixer, Attention):
            attention = layer.self_attention
            self._watch_norm(layer.input_layernorm, attention.linear_qkv, (number, "hidden.attention"), state)
            self._watch_input(attention.linear_proj, (number, "head"), state)
        elif isinstance(sizes.mixer, Mamba):
            mamba = layer.self_attention
            self._watch_norm(layer.input_layernorm, mamba.in_proj, (number, "hidden.mamba"), state)
            self._watch_output(mamba.in_proj, mamba.inputs_of, (number, "mamba"), state)
        if (moe := experts_of(layer)) is not None:
            self._watch_norm(layer.pre_mlp_layernorm, moe, (number, "hidden.mlp"), state)
            moe.observer = state.experts[number]
            if moe.shared_experts is not None:
                self._watch_input(moe.shared_experts.linear_fc2, (number, "shared_ffn"), state)
        elif isinstance(sizes.feed_forward, Mlp):
            mlp = layer.mlp
            self._watch_norm(layer.pre_mlp_layernorm, mlp.linear_fc1, (number, "hidden.mlp"), state)
            if self._ffn_site is FfnSite.AFTER_ACTIVATION:
                self._watch_input(mlp.linear_fc2, (number, "ffn"), state)
            else:
                self._watch_activation(mlp.linear_fc1, (number, "ffn"), state)
        if (number, "mixer") in state.parts:
            self._watch_middle(layer.pre_mlp_layernorm, state)
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

    def _watch_middle(self, norm: nn.Module, state: _Chunk) -> None:
        """Watch what a layer's feed-forward is given, before its norm."""

        def take(norm: nn.Module, args: tuple[Any, ...]) -> None:
            state.middle = args[0]

        self._handles.append(norm.register_forward_pre_hook(take))

    def _watch_input(self, linear: nn.Module, site: Site, state: _Chunk) -> None:
        def take(linear: nn.Module, args: tuple[Any, ...]) -> None:
            self._take(site, args[0], state)

        self._handles.append(linear.register_forward_pre_hook(take))

    def _watch_output(self, linear: nn.Module, part: Callable[[Tensor], Tensor], site: Site, state: _Chunk) -> None:
        """Watch a part of what a linear without bias returns."""

        def take(linear: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._take(site, part(output[0]), state)

        self._handles.append(linear.register_forward_hook(take))

    def _watch_activation(self, linear: nn.Module, site: Site, state: _Chunk) -> None:
        """Watch what the activation will be applied to: a linear's output, `[gate; up]` if gated, and its bias."""

        def take(linear: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            x, bias = output if isinstance(output, tuple) else (output, None)
            width = rank_channels(site[1], site[0], self._spec, self._runtime)
            x = x[..., :width]
            self._take(site, x if bias is None else x + bias[:width], state)

        self._handles.append(linear.register_forward_hook(take))

    @torch.no_grad()
    def _take(self, site: Site, x_SBC: Tensor, state: _Chunk) -> None:
        masks = _announced(state)
        keep_BS = masks.outside if site[1] in _HIDDEN else masks.inside
        widest = max(width for group in state.groups for width in group.widths)
        state.samples = x_SBC.shape[1]
        if kernels_run(x_SBC.device, x_SBC.dtype):
            from nemo_minitron.kernels.moments import moments_block

            state.blocks[site] = [moments_block(x_SBC.detach(), keep_BS)]
            return
        rows = block_rows(x_SBC.shape[0], x_SBC.shape[1], widest, x_SBC.device)
        state.blocks[site] = sequence_blocks(x_SBC.detach(), keep_BS, rows, self._workspace)

    def _take_influence(self, number: int, state: _Chunk) -> Callable[..., None]:
        @torch.no_grad()
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            x_in = args[0] if args else kwargs["hidden_states"]
            x_out = output[0] if isinstance(output, tuple) else output
            _announced(state)
            if state.latest is not None and state.latest[0] is x_in:
                before = state.latest[1]
            else:
                before = stream_of(x_in, self._workspace, "odd" if number % 2 else "even")
            after = stream_of(x_out, self._workspace, "even" if number % 2 else "odd")
            state.changes[number] = dissimilarity(before, after)
            if state.middle is not None:
                self._take_parts(number, state, x_in, after)
            state.latest = x_out, after

        return hook

    def _take_parts(self, number: int, state: _Chunk, x_in: Tensor, after: Stream) -> None:
        """How much each part of a layer changes the stream."""
        assert state.middle is not None
        entering = stream_of(x_in, self._workspace, "entering")
        middle = stream_of(state.middle, self._workspace, "middle")
        state.middle = None
        keep_BS = _announced(state).outside
        # The first of two streams is overwritten.
        for part, ends in (("mixer", (entering, middle)), ("feed_forward", (middle, after))):
            change_N = dissimilarity(*ends)
            if keep_BS is not None:
                change_N = torch.where(keep_BS.t().flatten(), change_N, 0)
            state.parts[number, part] += change_N.sum(dtype=torch.float64)


def fused_norm(linear: Any, x: Tensor) -> Tensor:
    """What the norm inside a Transformer Engine LayerNormLinear returns for `x`."""
    weight = linear.layer_norm_weight
    if linear.zero_centered_gamma:
        weight = at_least_fp32(weight) + 1
    if linear.normalization == "RMSNorm":
        return rms_norm(x, weight, linear.eps)
    return layer_norm(x, weight, linear.layer_norm_bias, linear.eps)


def _announced(state: _Chunk) -> _Masks:
    if state.masks is None:
        raise ScoresError(
            "a layer ran outside its model's forward pass", rule="hooks need the model chunk to be called"
        )
    return state.masks


def _kept(keep_BS: Tensor | None, samples: int, blocks: Sequence[Block], sums: SiteSums) -> Tensor:
    """Kept positions of each sample on this rank, `[b]` float64."""
    if keep_BS is not None:
        return keep_BS.sum(-1, dtype=torch.float64)
    return sums.values.new_full((samples,), sum(block.rows for block in blocks))


def _summed(moments: SequenceMoments, group: dist.ProcessGroup) -> SequenceMoments:
    """Moments added up over ranks that hold other positions of the same samples."""
    flat = sum_over(torch.cat([moments.sums.flatten(), moments.count]), group)
    size = moments.sums.numel()
    return SequenceMoments(flat[:size].view_as(moments.sums), flat[size:])
