"""From an architecture to this rank's part of a Megatron model."""

import hashlib
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from nemo_minitron.arch.axes import LAYER_AXES, Axis, Packing
from nemo_minitron.arch.families.hybrid import first_mamba
from nemo_minitron.arch.layer import LayerSpec, Mamba, Mlp
from nemo_minitron.arch.spec import Activation, ModelSpec
from nemo_minitron.arch.weights import Weight
from nemo_minitron.config.parallel import ParallelConfig, Precision, Recompute
from nemo_minitron.errors import LayoutError
from nemo_minitron.megatron.engine import engine_layer, engine_norm
from nemo_minitron.megatron.experts import with_experts
from nemo_minitron.megatron.functional import squared_relu
from nemo_minitron.megatron.layers import LocalNorm, local_layer
from nemo_minitron.megatron.marks import mark
from nemo_minitron.megatron.model import MinitronGPT, unwrap
from nemo_minitron.megatron.placement import (
    check_layout,
    chunk_layers,
    local_shard,
    padded_vocab,
)
from nemo_minitron.megatron.runtime import Runtime

_FP8_MULTIPLE = 16
INIT_STD = 0.02
"""Standard deviation of a random model's weights; Llama's `initializer_range`."""


def build_chunks(
    spec: ModelSpec,
    runtime: Runtime,
    precision: Precision,
    *,
    trainable: bool = True,
    seed: int | None = None,
    fp8: bool = False,
) -> list[MinitronGPT]:
    """This rank's chunks of a model, one per virtual pipeline stage, on this rank's device.

    Args:
        spec: The architecture; its layers may differ in size.
        runtime: The running layout.
        precision: Numbers of weights and activations.
        trainable: Whether parameters take gradients. A teacher's do not.
        seed: Draw random weights, the same ones on every layout. None leaves them NaN until weights are loaded, so
            that a model without weights cannot pass for one that has them.
        fp8: Multiply weights in fp8, with Transformer Engine; for a model that is not trained.

    Raises:
        LayoutError: The model cannot be split so.
    """
    check_layout(spec, runtime.parallel)
    needs_engine = runtime.parallel.context > 1 or runtime.parallel.sequence_parallel
    # A model on `meta` computes nothing.
    if needs_engine and runtime.device.type != "meta" and not engine_carries(spec, runtime.device, precision):
        raise LayoutError(
            "parallel.context above 1 and parallel.sequence_parallel need Transformer Engine and a GPU",
            rule="and models that it carries: in bf16, with no windows, no norms behind attention and MLP or over all "
            "heads",
            remedy="set parallel.context=1 and parallel.sequence_parallel=false",
        )
    if fp8:
        _check_fp8(spec, runtime, precision)
    config = transformer_config(spec, runtime.parallel, precision, device=runtime.device, fp8=fp8)
    chunks = []
    for virtual in range(runtime.parallel.virtual_pipeline or 1):
        chunk = _build_chunk(spec, runtime, config, virtual)
        chunk.requires_grad_(trainable)
        chunk.train(trainable)
        _mark_shards(chunk)
        chunks.append(chunk.to(runtime.device))
    if seed is None:
        for chunk in chunks:
            for _, parameter in chunk.named_weights():
                parameter.data.fill_(torch.nan)
    else:
        initialise(chunks, runtime, seed)
    return chunks


def use_transformer_engine() -> bool:
    """Whether layers come from Transformer Engine: it is installed and there is a GPU."""
    if not torch.cuda.is_available():
        return False
    from megatron.core.extensions.transformer_engine import HAVE_TE

    return bool(HAVE_TE)


def engine_carries(spec: ModelSpec, device: torch.device, precision: Precision) -> bool:
    """Whether a model's layers come from Transformer Engine.

    It is there, and they have nothing that only ours have. In fp32 ours are taken: its attention has no kernel for that
    but one that keeps all scores, `[batch * heads, positions, positions]`, and none for packed documents or context
    parallelism; and its products would be TF32.
    """
    is_carried = precision is Precision.BF16 and not spec.needs_own_layers
    return is_carried and device.type == "cuda" and use_transformer_engine()


def _check_fp8(spec: ModelSpec, runtime: Runtime, precision: Precision) -> None:
    """Raise LayoutError unless a model's products can be fp8."""
    if precision is not Precision.BF16 or not engine_carries(spec, runtime.device, precision):
        raise LayoutError(
            "distill.teacher_fp8 = true",
            rule="fp8 needs Transformer Engine's layers, a GPU that multiplies it (H100 or later), and precision bf16",
            remedy="set distill.teacher_fp8=false",
        )
    if spec.has_experts or first_mamba(spec) is not None:
        raise LayoutError(
            "distill.teacher_fp8 = true with experts or Mamba",
            rule="products of attention and of MLPs can be fp8",
            remedy="set distill.teacher_fp8=false",
        )
    size = _FP8_MULTIPLE * runtime.parallel.tensor
    sizes = {part.ffn_hidden_size for layer in spec.layers for part in layer.parts if isinstance(part, Mlp)}
    odd = {neurons for neurons in sizes if neurons % size}
    if odd or spec.hidden_size % _FP8_MULTIPLE:
        raise LayoutError(
            f"distill.teacher_fp8 = true with hidden size {spec.hidden_size} and FFN {sorted(odd)}",
            rule=f"fp8 products have sizes that are multiples of {_FP8_MULTIPLE} on every rank",
            remedy="set distill.teacher_fp8=false",
        )


def transformer_config(
    spec: ModelSpec, parallel: ParallelConfig, precision: Precision, *, device: torch.device, fp8: bool = False
) -> TransformerConfig:
    """Megatron's configuration of a model; where layers differ, its sizes are those of the first that has them."""
    dtype = torch_dtype(precision)
    engine = engine_carries(spec, device, precision)
    return TransformerConfig(
        num_layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        **_layer_sizes(spec, parallel),
        kv_channels=spec.head_dim,
        normalization="LayerNorm" if spec.norm.subtracts_mean else "RMSNorm",
        layernorm_zero_centered_gamma=spec.norm.zero_centred,
        layernorm_epsilon=spec.norm_eps,
        gated_linear_unit=spec.activation.gated,
        activation_func=_activation(spec.activation),
        add_bias_linear=spec.linear_bias,
        add_qkv_bias=spec.qkv_bias,
        # Megatron adds gradients of such norms up over tensor-parallel ranks, each of which has its part of a wide one.
        qk_layernorm=spec.norms_each_head,
        softmax_scale=spec.attention_scale,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_softmax_in_fp32=True,
        masked_softmax_fusion=False,
        # Megatron's fusions are torch.compile: worth their start-up time with Transformer Engine only. Its GEGLU is by
        # tanh, whatever the config says.
        bias_activation_fusion=engine and spec.activation is Activation.SWIGLU,
        bias_dropout_fusion=engine,
        gradient_accumulation_fusion=_fused_accumulation(parallel.gradient_accumulation_fusion, engine=engine),
        apply_rope_fusion=_fused_rope(parallel.apply_rope_fusion, engine=engine),
        init_method_std=INIT_STD,
        perform_initialization=False,
        use_cpu_initialization=device.type != "cuda",
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=precision is Precision.BF16,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
        pipeline_model_parallel_layout=_uneven_layout(spec.num_layers, parallel),
        context_parallel_size=parallel.context,
        **_experts(spec, parallel),
        sequence_parallel=parallel.sequence_parallel,
        calculate_per_token_loss=True,
        **_recomputation(parallel.recompute),
        deallocate_pipeline_outputs=True,
        **_stage_exchange(parallel, device),
        # Each tensor is scaled by its own maximum, so that nothing has to be known of the batches before. Without the
        # cache no fp8 weights stay in memory beside those in bf16, which may be elsewhere by then.
        **({"fp8": "hybrid", "fp8_recipe": "tensorwise", "disable_parameter_transpose_cache": True} if fp8 else {}),
    )


def _layer_sizes(spec: ModelSpec, parallel: ParallelConfig) -> dict[str, int]:
    """Where no layer has attention or an MLP, sizes that Megatron takes, and that nothing is made of."""
    sizes = {"num_attention_heads": parallel.tensor, "num_query_groups": parallel.tensor, "ffn_hidden_size": 1}
    return sizes | {row.size: size for row in LAYER_AXES if row.size in sizes and (size := spec.common_size(row))}


def _experts(spec: ModelSpec, parallel: ParallelConfig) -> dict[str, Any]:
    """What Megatron's training loop has to know of experts; layers have sizes of their own."""
    first = next((layer.moe for layer in spec.layers if layer.has_experts), None)
    if first is None:
        return {}
    return {
        "num_moe_experts": first.num_experts,
        "moe_ffn_hidden_size": first.expert_ffn_hidden_size,
        "moe_router_load_balancing_type": "none",
        "moe_router_dtype": "fp32" if first.router_fp32 else None,  # read by a warning alone: routers are our own
        "expert_model_parallel_size": parallel.expert,
    }


def _stage_exchange(parallel: ParallelConfig, device: torch.device) -> dict[str, bool]:
    """How pipeline stages exchange activations: while they compute, or all at one time.

    Raises:
        LayoutError: They are to, and there is no GPU.
    """
    on_gpu = device.type == "cuda"
    if parallel.overlap_p2p_comm and not on_gpu:
        raise LayoutError(
            "parallel.overlap_p2p_comm = true on a CPU",
            rule="Gloo sends while the sender waits",
            remedy="leave it unset",
        )
    overlapping = on_gpu and parallel.virtual_pipeline is not None and parallel.overlap_p2p_comm is not False
    # In one batch under Gloo, the loss is right and the gradients are not.
    batched = on_gpu and not overlapping
    return {"overlap_p2p_comm": overlapping, "batch_p2p_comm": batched, "batch_p2p_sync": batched}


def _fused_accumulation(wanted: bool | None, *, engine: bool) -> bool:
    """Whether matrix products add to the fp32 gradients themselves.

    Raises:
        LayoutError: They are to, and cannot.
    """
    if wanted is False or not engine:
        able = False
    else:
        from megatron.core.tensor_parallel import layers

        able = bool(layers._grad_accum_fusion_available)
    if wanted and not able:
        raise LayoutError(
            "parallel.gradient_accumulation_fusion = true",
            rule="it needs Transformer Engine's layers on a GPU, and Apex's fused_weight_gradient_mlp_cuda",
            remedy="leave it unset, or take an NGC container, which has both",
        )
    return able


def _fused_rope(wanted: bool | None, *, engine: bool) -> bool:
    """Whether rotary positions are Transformer Engine's kernel.

    Raises:
        LayoutError: They are to, and cannot.
    """
    if wanted is False or not engine:
        able = False
    else:
        from megatron.core.models.common.embeddings import rope_utils

        able = rope_utils.fused_apply_rotary_pos_emb is not None
    if wanted and not able:
        raise LayoutError(
            "parallel.apply_rope_fusion = true",
            rule="it is part of Transformer Engine's layers, which need a GPU",
            remedy="leave it unset; our own layers turn positions inside their attention",
        )
    return able


def _recomputation(recompute: Recompute) -> dict[str, Any]:
    match recompute:
        case Recompute.NONE:
            return {}
        case Recompute.SELECTIVE:
            return {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}
        case Recompute.FULL:
            return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def torch_dtype(precision: Precision) -> torch.dtype:
    """The torch dtype of a precision."""
    return {Precision.BF16: torch.bfloat16, Precision.FP32: torch.float32}[precision]


@torch.no_grad()
def initialise(chunks: Sequence[nn.Module], runtime: Runtime, seed: int) -> None:
    """Fill a model with random weights that depend on the seed and the weight's name only, not on the layout.

    Normal with deviation `INIT_STD`, divided by `sqrt(2 L)` for the matrices that write into the residual stream
    (Radford et al., 2019, section 2.3); norms start as the identity, biases at zero.
    """
    for chunk in chunks:
        model = unwrap(chunk)
        for weight, parameter in model.named_weights():
            full = _random_weight(weight, model.spec, seed)
            shard = local_shard(weight, full, model.spec, rank=runtime.tp_rank, size=runtime.parallel.tensor)
            parameter.copy_(shard)


def _random_weight(weight: Weight, spec: ModelSpec, seed: int) -> Tensor:
    name_hash = hashlib.sha256(f"{seed} {weight.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(name_hash[:7], "little"))
    if (name := weight.row.name.rpartition("mixer.")[2]) in _MAMBA_STARTS and weight.row.part is Mamba:
        return _MAMBA_STARTS[name](torch.rand(weight.shape, generator=generator))
    if weight.name.endswith("bias"):
        return torch.zeros(weight.shape)
    if len(weight.shape) == 1:
        return torch.zeros(weight.shape) if spec.norm.zero_centred else torch.ones(weight.shape)
    writes_residual = weight.row.axes[0] is Axis.HIDDEN
    deviation = INIT_STD / math.sqrt(2 * spec.num_layers) if writes_residual else INIT_STD
    return torch.randn(weight.shape, generator=generator).mul_(deviation)


def _steps(drawn: Tensor) -> Tensor:
    """What softplus turns into steps of 0.001 to 0.1, evenly spread in their logarithms."""
    steps = (math.log(1e-3) + drawn * math.log(100)).exp_()
    return steps + (-torch.expm1(-steps)).log_()


# What Mamba-2 begins with where it is not what others begin with, out of numbers from 0 to 1: decay rates of 1 to 16.
# Source: the authors' code (state-spaces/mamba), whose values Megatron takes.
_MAMBA_STARTS: dict[str, Callable[[Tensor], Tensor]] = {
    "A_log": lambda drawn: (1 + 15 * drawn).log_(),
    "dt_bias": _steps,
    "conv1d.weight": lambda drawn: (2 * drawn - 1) / math.sqrt(drawn.shape[-1]),
    "D": torch.ones_like,
    "norm.weight": torch.ones_like,
}


def _build_chunk(spec: ModelSpec, runtime: Runtime, config: TransformerConfig, virtual: int) -> MinitronGPT:
    parallel = runtime.parallel
    ranges = chunk_layers(spec.num_layers, parallel)
    index = virtual * parallel.pipeline + runtime.pp_rank
    engine = engine_carries(spec, runtime.device, Precision.BF16 if config.bf16 else Precision.FP32)
    layers = [_layer(spec, spec.layers[number], parallel, engine=engine) for number in ranges[index]]
    final_norm = engine_norm() if engine else LocalNorm
    return MinitronGPT(
        config=config,
        transformer_layer_spec=TransformerBlockSubmodules(layer_specs=layers, layer_norm=final_norm),
        vocab_size=padded_vocab(spec, parallel.tensor),
        max_sequence_length=spec.max_position_embeddings,
        pre_process=index == 0,
        post_process=index == len(ranges) - 1,
        parallel_output=True,
        share_embeddings_and_output_weights=spec.tied_embeddings,
        position_embedding_type="rope",
        rotary_percent=spec.rotary_percent,
        rotary_base=spec.rotary_base,
        vp_stage=virtual if parallel.virtual_pipeline is not None else None,
        spec=spec,
        from_engine=engine,
    )


def _mark_shards(chunk: MinitronGPT) -> None:
    """Say which parameters are split over tensor-parallel ranks.

    Megatron does so while it draws random weights, which we leave out; without the marks gradient norms would count
    the shards of the first rank only.
    """
    for weight, parameter in chunk.named_weights():
        dim = weight.row.tensor_parallel_dim
        mark(
            parameter,
            tensor_model_parallel=dim is not None,
            partition_dim=-1 if dim is None else dim,
            partition_stride=2 if weight.row.packing is Packing.GATE_UP else 1,
        )


def _layer(spec: ModelSpec, sizes: LayerSpec, parallel: ParallelConfig, *, engine: bool) -> ModuleSpec:
    if engine:
        return engine_layer(spec, sizes, parallel)
    layer = local_layer(spec, sizes)
    return with_experts(layer, sizes.moe, spec.activation) if sizes.has_experts else layer


def _uneven_layout(num_layers: int, parallel: ParallelConfig) -> list[list[str]] | None:
    """Megatron's description of stages that do not hold equally many layers, or None where they do."""
    chunks = parallel.pipeline * (parallel.virtual_pipeline or 1)
    if num_layers % chunks == 0:
        return None
    stages = [["decoder"] * len(layers) for layers in chunk_layers(num_layers, parallel)]
    stages[0].insert(0, "embedding")
    stages[-1].append("loss")
    return stages


def _activation(activation: Activation) -> Any:
    match activation:
        case Activation.SWIGLU:
            return nn.functional.silu
        case Activation.GEGLU | Activation.GELU:
            return nn.functional.gelu
        case Activation.GEGLU_TANH:
            return partial(nn.functional.gelu, approximate="tanh")
        case Activation.SQUARED_RELU:
            return squared_relu
