"""A decoder layer of Megatron's parallel linears with our own norm, attention and MLP between them.

It is used where Transformer Engine is not: on the CPU, and on GPUs without it. Weights are Megatron's in name, shape
and split, and modules keep Megatron's names, so hooks and checkpoints cannot tell the difference.
"""

import copy
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from nemo_minitron.arch.spec import LayerSpec, ModelSpec
from nemo_minitron.megatron.functional import causal_attention, rms_norm, rotary_tables, swiglu


class LocalNorm(nn.Module):
    """RMSNorm, LayerNorm, or LayerNorm with a zero-centred weight (`layernorm1p`), as the config says."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.zero_centred = config.layernorm_zero_centered_gamma
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=_device(config)))
        self.bias: nn.Parameter | None = None
        if config.normalization != "RMSNorm":
            self.bias = nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype, device=_device(config)))
        if config.sequence_parallel:
            for parameter in self.parameters():
                parameter.sequence_parallel = True

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        weight = self.weight + 1 if self.zero_centred else self.weight
        if self.bias is None:
            return rms_norm(x, weight, self.eps)
        return nn.functional.layer_norm(x, (x.shape[-1],), weight, self.bias, self.eps)


class LocalCoreAttention(nn.Module):
    """Causal attention over split heads, `[s, b, heads, d]`; used when heads are normalised one by one."""

    def __init__(self, config: TransformerConfig, **_: Any) -> None:
        super().__init__()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        """Attend; returns `[s, b, heads * d]`."""
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.permute(2, 0, 1, 3).flatten(2)


class LocalSelfAttention(SelfAttention):
    """Megatron's self-attention, with everything between its two linears in one function."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, rotary_pos_emb: Any = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Attend causally over `[s, b, h]`; returns the output and the bias that is still to be added."""
        plain = isinstance(self.q_layernorm, IdentityOp | None)
        if not plain or rotary_pos_emb is None:
            return super().forward(hidden_states, attention_mask, rotary_pos_emb=rotary_pos_emb, **kwargs)
        qkv, _ = self.linear_qkv(hidden_states)
        context = causal_attention(
            qkv,
            rotary_tables(rotary_pos_emb, qkv.dtype),
            groups=self.num_query_groups_per_partition,
            head_dim=self.hidden_size_per_attention_head,
        )
        return self.linear_proj(context)


class LocalMLP(MLP):
    """Megatron's MLP with the gated activation in one function."""

    def __init__(self, config: TransformerConfig, **_: Any) -> None:
        linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        super().__init__(config, linears, ffn_hidden_size=config.ffn_hidden_size)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Transform `[s, b, h]`; returns the output and the bias that is still to be added."""
        if not (self.config.gated_linear_unit and self.config.activation_func is nn.functional.silu):
            return super().forward(hidden_states, *args, **kwargs)
        gate_up, bias = self.linear_fc1(hidden_states)
        if bias is not None:
            gate_up = gate_up + bias
        return self.linear_fc2(swiglu(gate_up))


class SizedLayer(TransformerLayer):
    """A transformer layer with sizes of its own, which need not be the config's."""

    def __init__(self, config: TransformerConfig, *args: Any, sizes: LayerSpec, **kwargs: Any) -> None:
        own = copy.copy(config)
        own.num_attention_heads = sizes.num_attention_heads
        own.num_query_groups = sizes.num_query_groups
        own.ffn_hidden_size = sizes.ffn_hidden_size
        super().__init__(own, *args, **kwargs)


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
    head_norm = LocalNorm if spec.qk_norm else IdentityOp
    return ModuleSpec(
        module=SizedLayer,
        params={"sizes": sizes},
        submodules=TransformerLayerSubmodules(
            input_layernorm=LocalNorm,
            self_attention=ModuleSpec(
                module=LocalSelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=LocalCoreAttention,
                    linear_proj=RowParallelLinear,
                    q_layernorm=head_norm,
                    k_layernorm=head_norm,
                ),
            ),
            self_attn_bda=add_residual,
            pre_mlp_layernorm=LocalNorm,
            mlp=LocalMLP,
            mlp_bda=add_residual,
            # In checkpoints the norms carry the names that Transformer Engine's fused layers give them.
            sharded_state_dict_keys_map={
                "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
                "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
            },
        ),
    )


def _device(config: TransformerConfig) -> torch.device:
    return torch.device("cpu" if config.use_cpu_initialization else torch.cuda.current_device())
