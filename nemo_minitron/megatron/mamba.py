"""Mamba-2's mixer between Megatron's parallel linears: groups of heads are split over tensor-parallel ranks.

Weights are those of Megatron's own mixer in name, shape, split and stored form, but that one needs CUDA. On a GPU with
mamba-ssm and causal-conv1d installed their kernels compute the same (`kernels.state_space`). Context-parallel ranks
exchange positions for heads around the scan (`mamba_context`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint, sharded_state_dict_default
from torch import Tensor, nn

from nemo_minitron.arch.layer import Mamba
from nemo_minitron.kernels import state_space as kernels
from nemo_minitron.megatron.mamba_context import HeadExchange
from nemo_minitron.megatron.marks import device_of
from nemo_minitron.ops.state_space import Scan, causal_convolution, gated_group_norm, state_space_scan


@dataclass(frozen=True, slots=True)
class MambaState:
    """What a mixer remembers of the positions that it has read."""

    window: Tensor
    """The last inputs of the convolution, `[b, taps - 1, channels]`."""
    state: Tensor
    """`[b, heads, channels of a head, channels of the state]`."""


class StateCache(Protocol):
    """What remembers a mixer's state while text is generated; see `kv_cache`."""

    def mix(self, mixer: "LocalMamba", projected_BSC: Tensor) -> Tensor:
        """`LocalMamba.mix` of new positions behind those before them."""
        ...


@dataclass
class MambaSubmodules:
    """The two projections.

    Attributes:
        in_proj: A column-parallel linear.
        out_proj: A row-parallel linear.
    """

    in_proj: type
    out_proj: type


class _Weight(nn.Module):
    """A weight, and a bias if there is one, whose rows are split over tensor-parallel ranks.

    It is called for them: Megatron waits for a module's weights, where they are gathered late, before it is called.
    """

    def __init__(self, *shape: int, bias: bool = False, config: TransformerConfig) -> None:
        super().__init__()
        options: dict[str, Any] = {"dtype": config.params_dtype, "device": device_of(config)}
        self.weight = nn.Parameter(torch.ones(*shape, **options))
        self.bias: nn.Parameter | None = nn.Parameter(torch.zeros(shape[0], **options)) if bias else None

    def forward(self) -> tuple[nn.Parameter, nn.Parameter | None]:
        """Both."""
        return self.weight, self.bias


class _Scanned(NamedTuple):
    """What a rank scans: its heads' rows of the weights between the projections, and of the projection's parts."""

    taps: Tensor
    """`[channels of the convolution, taps]`."""
    bias: Tensor | None
    dt_bias: Tensor
    log_rates: Tensor
    skip: Tensor
    rows: Mapping[str, int]


class LocalMamba(MegatronModule):
    """A Mamba-2 mixer.

    Args:
        config: Megatron's configuration of the model.
        submodules: Classes of its linears.
        sizes: Of the complete mixer, and its traits.
        pg_collection: Megatron's process groups.
    """

    def __init__(
        self, config: TransformerConfig, submodules: MambaSubmodules, *, sizes: Mamba, pg_collection: Any, **_: Any
    ) -> None:
        super().__init__(config)
        self.sizes = sizes
        self.tp_group = pg_collection.tp
        ranks = self.tp_group.size()
        self.parts = {letters: rows // ranks for letters, rows in sizes.parts().items()}
        """Rows of this rank's part of the input projection."""
        self.groups = sizes.mamba_num_groups // ranks
        self.exchange: HeadExchange | None = None
        if pg_collection.cp.size() > 1:
            self.exchange = HeadExchange(self.parts, self.groups, pg_collection.cp)
        how: dict[str, Any] = {
            "config": config,
            "bias": False,
            "is_expert": False,
            "tp_group": self.tp_group,
        }
        self.in_proj = submodules.in_proj(
            config.hidden_size,
            sum(sizes.parts().values()),
            init_method=config.init_method,
            gather_output=False,
            skip_bias_add=False,
            **how,
        )
        self.convolved = sum(self.parts[letters] for letters in "xBC")
        self.cache: StateCache | None = None
        self.conv1d = _Weight(self.convolved, 1, sizes.conv_kernel, bias=sizes.conv_bias, config=config)
        options: dict[str, Any] = {"dtype": config.params_dtype, "device": device_of(config)}
        heads = self.parts["dt"]
        self.dt_bias = nn.Parameter(torch.zeros(heads, **options))
        self.A_log = nn.Parameter(torch.zeros(heads, **options))
        self.D = nn.Parameter(torch.ones(heads, **options))
        self.norm = _Weight(self.parts["x"], config=config)
        self.out_proj = submodules.out_proj(
            sizes.inner_size,
            config.hidden_size,
            init_method=config.output_layer_init_method,
            input_is_parallel=True,
            skip_bias_add=True,
            **how,
        )

    def forward(
        self, hidden_states: Tensor, *_: Any, packed_seq_params: PackedSeqParams | None = None, **__: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Mix `[s, b, h]` along positions; returns the output and the bias that is still to be added: none.

        Documents of a sample do not see one another.
        """
        projected_BSC = self.in_proj(hidden_states)[0].transpose(0, 1)
        starts = getattr(packed_seq_params, "starts", None)
        if self.cache is not None:
            mixed = self.cache.mix(self, projected_BSC)
        elif starts is None:
            mixed = self.mix(projected_BSC).output
        else:
            mixed = torch.cat([self._documents(x[None], at) for x, at in zip(projected_BSC, starts, strict=True)])
        found: tuple[Tensor, Tensor | None] = self.out_proj(mixed.transpose(0, 1))
        return found

    def inputs_of(self, projected: Tensor) -> Tensor:
        """This rank's heads' channels, `[..., heads * channels]`, out of what the input projection returns."""
        first = self.parts["z"]
        return projected[..., first : first + self.parts["x"]]

    def _documents(self, x_1SC: Tensor, starts: tuple[int, ...]) -> Tensor:
        """A sample whose documents begin at `starts`."""
        sizes = [stop - begin for begin, stop in zip(starts, (*starts[1:], x_1SC.shape[1]), strict=True)]
        return torch.cat([self.mix(part).output for part in torch.split(x_1SC, sizes, dim=1)], dim=1)

    def mix(self, projected_BSC: Tensor, *, before: MambaState | None = None, keep_BS: Tensor | None = None) -> Scan:
        """What is between the projections: `[b, s, heads * channels]`, and the state behind the last position.

        Args:
            projected_BSC: What the input projection returns.
            before: What was read before; None for nothing.
            keep_BS: Positions that change the state, those of the others being padding; None for all.
        """
        parts, exchange = self.parts, self.exchange
        gate, inner, dt = torch.split(projected_BSC, [parts["z"], self.convolved, parts["dt"]], dim=-1)
        if exchange is None:
            found = self._scan(inner, dt, before, keep_BS)
            y = found.output
        else:
            gate = gate.contiguous()  # so that what has been sent is not kept beside what has arrived
            found = self._scan(*exchange.to_heads(inner, dt), before, keep_BS)
            y = exchange.to_positions(found.output)
        scale, _ = self.norm()
        normed = gated_group_norm(y, gate, scale, groups=self.groups, eps=self.config.layernorm_epsilon)
        return Scan(normed, found.state)

    def _scan(self, inner: Tensor, dt: Tensor, before: MambaState | None, keep_BS: Tensor | None) -> Scan:
        """Convolution and scan of `inner`, x, B and C side by side; the output is `[b, s, heads * channels]`."""
        batch, length, _ = inner.shape
        sizes, scanned = self.sizes, self._scanned()
        dtype, rows = inner.dtype, scanned.rows
        fast = kernels.run(inner.device, inner.dtype, taps=sizes.conv_kernel) and before is None
        convolve = kernels.causal_convolution if fast else causal_convolution
        seen = inner if before is None else torch.cat([before.window, inner], dim=1)
        inner = convolve(seen, scanned.taps, scanned.bias)[:, -length:]
        x, b, c = torch.split(inner, [rows["x"], rows["B"], rows["C"]], dim=-1)
        x = x.reshape(batch, length, -1, sizes.mamba_head_dim)
        wide = torch.promote_types(dt.dtype, torch.float32)
        steps = F.softplus(dt.to(wide) + scanned.dt_bias.to(wide)).clamp(min=sizes.dt_min)
        if keep_BS is not None:
            steps = torch.where(keep_BS[..., None], steps, 0)
        decay = -scanned.log_rates.to(wide).exp()
        b, c = (each.reshape(batch, length, -1, sizes.mamba_state_dim) for each in (b, c))
        if fast:
            found = kernels.scan(x, steps, decay, b, c, chunk=sizes.chunk_size)
        else:
            state = None if before is None else before.state
            found = state_space_scan(x, steps, decay, b, c, chunk=sizes.chunk_size, state_BHPN=state)
        y = (found.output + x * scanned.skip.to(wide)[:, None]).to(dtype).flatten(2)
        return Scan(y, found.state)

    def _scanned(self) -> _Scanned:
        """What this rank scans: all its heads, or under context parallelism some of them."""
        weight, bias = self.conv1d()
        taps, exchange = weight[:, 0], self.exchange
        if exchange is None:
            return _Scanned(taps, bias, self.dt_bias, self.A_log, self.D, self.parts)
        dt_bias, log_rates, skip = (exchange.weight(each, "dt") for each in (self.dt_bias, self.A_log, self.D))
        taps = exchange.convolved(taps)
        bias = None if bias is None else exchange.convolved(bias)
        return _Scanned(taps, bias, dt_bias, log_rates, skip, exchange.rows)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """As Megatron stores its own mixer: parts of a fused weight under names of their own."""
        assert metadata is not None
        found: dict[str, Any] = {}
        own: dict[str, Any] = {}
        self._save_to_state_dict(own, "", keep_vars=True)
        groups = {"tp_group": self.tp_group, "dp_cp_group": metadata["dp_cp_group"]}
        split = dict.fromkeys(own, 0)
        found |= make_sharded_tensors_for_checkpoint(own, prefix, split, sharded_offsets, **groups)
        for name, module in self.named_children():
            where = f"{prefix}{name}."
            if isinstance(module, _Weight):
                state = module.state_dict(prefix="", keep_vars=True)
                split = dict.fromkeys(state, 0)
                found |= make_sharded_tensors_for_checkpoint(state, where, split, sharded_offsets, **groups)
            else:
                found |= sharded_state_dict_default(module, where, sharded_offsets, metadata, tp_group=self.tp_group)
        convolved = {letters: self.parts[letters] for letters in ("x", "B", "C")}
        for name, parts in (("in_proj.weight", self.parts), ("conv1d.weight", convolved), ("conv1d.bias", convolved)):
            if prefix + name in found:
                found[prefix + name] = _in_parts(found[prefix + name], parts)
        return found


def _in_parts(whole: ShardedTensor, parts: dict[str, int]) -> ShardedTensorFactory:
    """A sharded tensor as one for each part of its rows, each split over the ranks by itself."""
    bare = whole.without_data()

    def build(key: str, data: Tensor, replica_id: Any, flattened_range: Any = None) -> list[ShardedTensor]:
        mine = replace(bare, key=key, data=data, dtype=data.dtype, replica_id=replica_id)
        found, first = [], 0
        for letters, rows in parts.items():
            for piece in mine.narrow(0, first, rows):
                piece.key = f"{piece.key}.{letters}"
                found.append(piece)
            first += rows
        return found

    return ShardedTensorFactory(whole.key, whole.data, build, torch.cat, whole.replica_id)
