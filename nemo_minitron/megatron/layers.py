"""A decoder layer of Megatron's parallel linears with our own norm, attention and MLP between them.

It is used where Transformer Engine is not: on the CPU, and on GPUs without it. Weights are Megatron's in name, shape
and split, and modules keep Megatron's names, so hooks and checkpoints cannot tell the difference.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from nemo_minitron.arch.layer import Attention, LayerSpec, Mamba
from nemo_minitron.arch.spec import Activation, ModelSpec
from nemo_minitron.megatron import functional
from nemo_minitron.megatron.functional import (
    Starts,
    causal_attention,
    layer_norm,
    linear_layer,
    rms_norm,
    rotary_tables,
)
from nemo_minitron.megatron.mamba import LocalMamba, MambaSubmodules
from nemo_minitron.megatron.marks import device_of, mark
from nemo_minitron.ops.widening import at_least_fp32

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    Activation.SWIGLU: functional.swiglu,
    Activation.GEGLU: functional.geglu,
    Activation.GEGLU_TANH: functional.geglu_tanh,
    Activation.GELU: nn.functional.gelu,
    Activation.SQUARED_RELU: functional.squared_relu,
}


class LocalNorm(nn.Module):
    """RMSNorm or LayerNorm, with a weight that is zero-centred or not, as the config says."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.zero_centred = config.layernorm_zero_centered_gamma
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device_of(config)))
        self.bias: nn.Parameter | None = None
        if config.normalization != "RMSNorm":
            self.bias = nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype, device=device_of(config)))
        if config.sequence_parallel:
            for parameter in self.parameters():
                mark(parameter, sequence_parallel=True)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension, in fp32 inside."""
        weight = at_least_fp32(self.weight) + 1 if self.zero_centred else self.weight
        if self.bias is None:
            return rms_norm(x, weight, self.eps)
        return layer_norm(x, weight, self.bias, self.eps)


class FullWidthNorm(LocalNorm):
    """RMSNorm over the channels of all heads, those of the other tensor-parallel ranks among them.

    Args:
        config: Megatron's configuration of the layer.
        width: Channels of this rank, whose weights it has.
    """

    def __init__(self, config: TransformerConfig, width: int) -> None:
        super().__init__(config, width, config.layernorm_epsilon)
        self.group = parallel_state.get_tensor_model_parallel_group()

    def forward(self, heads: Tensor) -> Tensor:
        """Normalise the last three dimensions of `[s, b, groups, heads of a group, channels]` together."""
        x = heads.flatten(-3)
        if self.group.size() == 1:
            return super().forward(x).view_as(heads)
        wide = at_least_fp32(x)
        square = wide.square().sum(-1, keepdim=True)
        # Every rank's channels depend on the sum, so its gradient is a sum over the ranks as well.
        square = reduce_from_tensor_model_parallel_region(square, group=self.group)
        square = copy_to_tensor_model_parallel_region(square, group=self.group)
        scale = (square / (x.shape[-1] * self.group.size()) + self.eps).rsqrt()
        weight = at_least_fp32(self.weight) + (1 if self.zero_centred else 0)
        return (wide * scale * weight).to(x.dtype).view_as(heads)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Its weight, split over the ranks."""
        state = self.state_dict(prefix="", keep_vars=True)
        groups = {"tp_group": self.group, "dp_cp_group": (metadata or {})["dp_cp_group"]}
        return make_sharded_tensors_for_checkpoint(state, prefix, dict.fromkeys(state, 0), sharded_offsets, **groups)


class AttentionCache(Protocol):
    """What remembers a layer's keys and values while text is generated; see `kv_cache`."""

    def attend(
        self, qkv: Tensor, *, groups: int, head_dim: int, scale: float | None = None, window: int | None = None
    ) -> Tensor:
        """`causal_attention` of new positions to those before them too."""
        ...


@dataclass
class LocalDocuments(PackedSeqParams):
    """What our own attention is told of the documents in a micro-batch, in the place of Megatron's packed sequences.

    Attributes:
        starts: Where documents begin.
        positions: Place of each token in its document, `[b, s]`, on the model's device.
    """

    starts: Starts = ()
    positions: Tensor | None = None

    def turned(self, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """`rotary_tables` of `[s, rotated]` at the positions: `[b, s, rotated]`."""
        return tables[0][self.positions], tables[1][self.positions]


@dataclass
class EngineDocuments(PackedSeqParams):
    """Megatron's packed sequences, and where documents begin, which Mamba's mixers want to know on the host."""

    starts: Starts = ()


class CachingAttention(SelfAttention):
    """Megatron's self-attention, which may be given a cache to attend to while text is generated.

    Args:
        window: Positions that a query sees; None: all.
        scale: Factor of the scores; None: `1 / sqrt(head_dim)`.
        rotary_base: Rotary base of this layer; None: it turns by the model's angles.
        full_width_norms: Whether queries and keys have a `FullWidthNorm` each.
    """

    def __init__(
        self,
        *args: Any,
        window: int | None = None,
        scale: float | None = None,
        rotary_base: float | None = None,
        full_width_norms: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if full_width_norms:
            channels = self.hidden_size_per_attention_head
            self.q_layernorm = FullWidthNorm(self.config, self.num_attention_heads_per_partition * channels)
            self.k_layernorm = FullWidthNorm(self.config, self.num_query_groups_per_partition * channels)
        self.window, self.scale, self.rotary_base = window, scale, rotary_base
        self.cache: AttentionCache | None = None

    @property
    def shape(self) -> dict[str, Any]:
        """What our own attention has to know beside `projected`."""
        return {
            "groups": self.num_query_groups_per_partition,
            "head_dim": self.hidden_size_per_attention_head,
            "scale": self.scale,
            "window": self.window,
        }

    def projected(self, hidden_states: Tensor) -> Tensor:
        """Queries, keys and values of `[s, b, h]`, normed and not turned: `[s, b, G * (R + 2) * D]`."""
        qkv, _ = self.linear_qkv(hidden_states)
        return qkv if isinstance(self.q_layernorm, IdentityOp | None) else self._with_normed_heads(qkv)

    def _with_normed_heads(self, qkv: Tensor) -> Tensor:
        """`[s, b, G * (R + 2) * D]` with each query and key head normalised over its channels, or over those of all."""
        length, batch, _ = qkv.shape
        heads = qkv.view(length, batch, self.num_query_groups_per_partition, -1, self.hidden_size_per_attention_head)
        assert self.q_layernorm is not None
        assert self.k_layernorm is not None
        query, key = self.q_layernorm(heads[..., :-2, :]), self.k_layernorm(heads[..., -2:-1, :])
        return torch.cat([query, key, heads[..., -1:, :]], dim=-2).flatten(2)


class LocalSelfAttention(CachingAttention):
    """Megatron's self-attention, with everything between its two linears in one function."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotary_pos_emb: Any = None,
        packed_seq_params: LocalDocuments | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend causally over `[s, b, h]`; returns the output and the bias that is still to be added."""
        qkv = self.projected(hidden_states)
        if self.cache is not None:
            return self.linear_proj(self.cache.attend(qkv, **self.shape))
        tables = rotary_tables(layer_angles(self, rotary_pos_emb), qkv.dtype)
        context = causal_attention(
            qkv,
            tables if packed_seq_params is None else packed_seq_params.turned(tables),
            starts=None if packed_seq_params is None else packed_seq_params.starts,
            **self.shape,
        )
        return self.linear_proj(context)


def layer_angles(attention: CachingAttention, angles: Tensor) -> Tensor:
    """A layer's own rotary angles `[s, 1, 1, rotated]` in place of the model's, if it has a base of its own."""
    if attention.rotary_base is None:
        return angles
    return _angles(attention.rotary_base, angles.shape[-1], angles.shape[0], angles.device)


class LocalColumnLinear(ColumnParallelLinear):
    """Megatron's column-parallel linear; where it needs no communication its products are `functional.linear_layer`."""

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if _is_plain(input, kwargs):
            return linear_layer(input, weight)
        output: Tensor = super()._forward_impl(input, weight, *args, **kwargs)
        return output


class LocalRowLinear(RowParallelLinear):
    """Megatron's row-parallel linear, likewise; what its ranks add up stays Megatron's."""

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if _is_plain(input, kwargs):
            return linear_layer(input, weight)
        output: Tensor = super()._forward_impl(input, weight, *args, **kwargs)
        return output


def _is_plain(x: Tensor, how: dict[str, Any]) -> bool:
    """Whether nothing but a product is asked of a linear, on a CPU; no where Megatron does not say."""
    asked = ("allreduce_dgrad", "sequence_parallel", "gradient_accumulation_fusion")
    local = all(how.get(name) is False for name in asked)
    return local and x.device.type == "cpu" and how.get("bias") is None and how.get("grad_output_buffer") is None


class NormedRowParallelLinear(LocalRowLinear):
    """A linear whose output is normalised before it joins the residual stream; every rank norms all of it."""

    def __init__(self, *args: Any, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__(*args, config=config, **kwargs)
        self.post_layernorm = LocalNorm(config, config.hidden_size, config.layernorm_epsilon)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """Normed product, and no bias."""
        output, _ = super().forward(x)
        return self.post_layernorm(output), None


class LocalMLP(MLP):
    """Megatron's MLP with its activation in one function; see `local_mlp`."""

    kind: Activation
    fc2: type

    def __init__(self, config: TransformerConfig, **_: Any) -> None:
        linears = MLPSubmodules(linear_fc1=LocalColumnLinear, linear_fc2=self.fc2)
        super().__init__(config, linears, ffn_hidden_size=config.ffn_hidden_size)
        self.activation = ACTIVATIONS[self.kind]

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Transform `[s, b, h]`; returns the output and the bias that is still to be added."""
        x, bias = self.linear_fc1(hidden_states)
        return self.linear_fc2(self.activation(x if bias is None else x + bias))


@lru_cache
def local_mlp(kind: Activation, fc2: type) -> type[LocalMLP]:
    """An MLP class with an activation and a second linear; Megatron warns of every MLP given as a `ModuleSpec`."""
    return type("LocalMLP", (LocalMLP,), {"kind": kind, "fc2": fc2})


class SizedLayer(TransformerLayer):
    """A layer with sizes of its own, which need not be the config's; a part that it lacks passes on what it is given.

    Whatever its mixer is, it stands in Megatron's place for self-attention.
    """

    def __init__(self, config: TransformerConfig, *args: Any, sizes: LayerSpec, **kwargs: Any) -> None:
        own = copy.copy(config)
        for name, size in sizes.sizes.items():
            setattr(own, name, size)
        super().__init__(own, *args, **kwargs)
        self.sizes = sizes
        self.recompute_mlp = self.recompute_mlp and sizes.feed_forward is not None


def add_residual(training: bool, fused: bool) -> Any:
    """Megatron's bias-dropout-add hook without dropout, which pruning and distillation do not use."""
    return _add_residual


def _add_residual(output_and_bias: tuple[Tensor, Tensor | None], residual: Tensor, probability: float) -> Tensor:
    output, bias = output_and_bias
    if bias is not None:
        output = output + bias
    # Without a graph nobody else holds the linear's output.
    return residual + output if torch.is_grad_enabled() else output.add_(residual)


def local_layer(spec: ModelSpec, sizes: LayerSpec) -> ModuleSpec:
    """How to build one layer out of the modules above."""
    writer = NormedRowParallelLinear if spec.post_norms else LocalRowLinear
    parts: dict[str, Any] = {}
    if sizes.mixer is not None:
        mixer = _local_attention if isinstance(sizes.mixer, Attention) else _local_mamba
        parts |= {"input_layernorm": LocalNorm, "self_attention": mixer(spec, sizes, writer)}
    if sizes.feed_forward is not None:
        parts |= {"pre_mlp_layernorm": LocalNorm, "mlp": local_mlp(spec.activation, writer)}
    return ModuleSpec(
        module=SizedLayer,
        params={"sizes": sizes},
        submodules=TransformerLayerSubmodules(
            **parts,
            self_attn_bda=add_residual if sizes.mixer is not None else IdentityFuncOp,
            mlp_bda=add_residual if sizes.feed_forward is not None else IdentityFuncOp,
            sharded_state_dict_keys_map=canonical_names(sizes),
        ),
    )


def canonical_names(sizes: LayerSpec) -> dict[str, str]:
    """Beginnings of names in a local layer, and in checkpoints.

    There norms carry the names that Transformer Engine's fused layers give them, and Mamba is a mixer.
    """
    norms = {} if sizes.has_experts else {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
    if isinstance(sizes.mixer, Mamba):
        return {"input_layernorm.": "mixer.in_proj.layer_norm_", "self_attention.": "mixer."} | norms
    return {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"} | norms


def _local_attention(spec: ModelSpec, sizes: LayerSpec, writer: type) -> ModuleSpec:
    head_norm = LocalNorm if spec.norms_each_head else IdentityOp
    return ModuleSpec(
        module=LocalSelfAttention,
        params={
            "attn_mask_type": AttnMaskType.causal,
            "window": spec.sliding_window if sizes.local else None,
            "scale": spec.attention_scale,
            "rotary_base": spec.local_rotary_base if sizes.local else None,
            "full_width_norms": spec.full_width_qk_norm,
        },
        submodules=SelfAttentionSubmodules(
            linear_qkv=LocalColumnLinear,
            core_attention=IdentityOp,
            linear_proj=writer,
            q_layernorm=head_norm,
            k_layernorm=head_norm,
        ),
    )


def _local_mamba(spec: ModelSpec, sizes: LayerSpec, writer: type) -> ModuleSpec:
    linears = MambaSubmodules(in_proj=LocalColumnLinear, out_proj=LocalRowLinear)
    return ModuleSpec(module=LocalMamba, params={"sizes": sizes.mamba}, submodules=linears)


@lru_cache(maxsize=4)
def _angles(base: float, rotated: int, length: int, device: torch.device) -> Tensor:
    """Angles of each position and rotated channel, `[s, 1, 1, rotated]` fp32, the second half like the first."""
    frequencies = 1.0 / base ** (torch.arange(0, rotated, 2, dtype=torch.float32, device=device) / rotated)
    angles = torch.outer(torch.arange(length, dtype=torch.float32, device=device), frequencies)
    return torch.cat([angles, angles], dim=-1)[:, None, None]
