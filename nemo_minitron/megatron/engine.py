"""Layers of Transformer Engine's modules, for GPUs; norms are inside the linears that follow them.

Modules keep Megatron's names. What Transformer Engine does not have is our own between its linears: Mamba's mixer, the
choice of experts, and attention over remembered keys and values while text is generated.
"""

from dataclasses import replace
from typing import Any

from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from nemo_minitron.arch.layer import LayerSpec, Mamba
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.megatron.engine_experts import engine_moe, takes_experts
from nemo_minitron.megatron.experts import local_moe
from nemo_minitron.megatron.layers import CachingAttention, SizedLayer
from nemo_minitron.megatron.mamba import LocalMamba, MambaSubmodules


class EngineSelfAttention(CachingAttention):
    """Megatron's self-attention around Transformer Engine's; with a cache, our own."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Attend causally over `[s, b, h]`; returns the output and the bias that is still to be added."""
        if self.cache is not None:
            return self.linear_proj(self.cache.attend(self.projected(hidden_states), **self.shape))
        angles = kwargs.get("rotary_pos_emb")
        if angles is not None and not angles.shape[-1]:  # a model without positions
            kwargs["rotary_pos_emb"] = None
        return super().forward(hidden_states, attention_mask, *args, **kwargs)


def engine_layer(spec: ModelSpec, sizes: LayerSpec, parallel: ParallelConfig) -> ModuleSpec:
    """How to build one layer."""
    from megatron.core.extensions.transformer_engine import TENorm
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    layer = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=spec.norms_each_head)
    submodules: Any = layer.submodules
    parts: dict[str, Any] = {}
    if sizes.mixer is None:
        parts |= {"input_layernorm": IdentityOp, "self_attention": IdentityOp, "self_attn_bda": IdentityFuncOp}
    elif isinstance(sizes.mixer, Mamba):
        names = {**submodules.sharded_state_dict_keys_map, "self_attention.": "mixer."}
        parts |= {"self_attention": _mamba(sizes.mixer), "sharded_state_dict_keys_map": names}
    else:
        parts["self_attention"] = replace(
            submodules.self_attention,
            module=EngineSelfAttention,
            params={**submodules.self_attention.params, "scale": spec.attention_scale},
        )
    if sizes.feed_forward is None:
        parts |= {"pre_mlp_layernorm": IdentityOp, "mlp": IdentityOp, "mlp_bda": IdentityFuncOp}
    elif sizes.has_experts:
        kind = engine_moe if takes_experts(parallel) else local_moe
        parts |= {"pre_mlp_layernorm": TENorm, "mlp": kind(sizes.moe, spec.activation)}
    submodules = replace(submodules, **parts)
    return replace(layer, module=SizedLayer, submodules=submodules, params={**layer.params, "sizes": sizes})


def _mamba(sizes: Mamba) -> ModuleSpec:
    from megatron.core.extensions.transformer_engine import TELayerNormColumnParallelLinear, TERowParallelLinear

    linears = MambaSubmodules(in_proj=TELayerNormColumnParallelLinear, out_proj=TERowParallelLinear)
    return ModuleSpec(module=LocalMamba, params={"sizes": sizes}, submodules=linears)


def engine_norm() -> Any:
    """The norm behind the last layer."""
    from megatron.core.extensions.transformer_engine import TENorm

    return TENorm
