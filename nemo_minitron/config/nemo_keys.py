"""Every key that a NeMo-1 GPT configuration ordinarily has, and what each one means here. Plain data.

A key is either read (it decides the architecture, or one of our settings), or it has no counterpart: then only values
that change nothing here are accepted, and any other one is refused with the key that does it instead. Keys in neither
table are unknown.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

ARCHITECTURE = (
    *("name", "encoder_seq_length", "max_position_embeddings", "num_layers", "hidden_size", "ffn_hidden_size"),
    *("num_attention_heads", "num_query_groups", "kv_channels", "normalization", "layernorm_zero_centered_gamma"),
    *("layernorm_epsilon", "activation", "openai_gelu", "apply_embedding_scaling", "bias", "qkv_bias"),
    *("qk_layernorm", "position_embedding_type", "rotary_percentage", "rotary_base", "rotary_interleaved"),
    *("window_size", "seq_len_interpolation_factor", "scale_positional_embedding"),
    *("share_embeddings_and_output_weights", "override_vocab_size", "transformer_block_type", "headscale"),
    *("normalize_attention_scores", "multi_query_attention", "attention_type", "num_moe_experts"),
    "mcore_customization_config",
)
"""Keys that say what is computed; `nemo_minitron.arch.nemo_config` reads them, or refuses what we do not compute."""

PARALLEL = {
    "tensor": "tensor_model_parallel_size",
    "pipeline": "pipeline_model_parallel_size",
    "virtual_pipeline": "virtual_pipeline_model_parallel_size",
    "context": "context_parallel_size",
    "sequence_parallel": "sequence_parallel",
    "recompute": "activations_checkpoint_granularity",
}
"""Fields of `ParallelConfig` that NeMo-1 has keys for; the others are keys of `minitron.parallel`."""

BATCH = {
    "sequence_length": "encoder_seq_length",
    "micro_batch_size": "micro_batch_size",
    "global_batch_size": "global_batch_size",
}
"""Fields of `BatchConfig`, all of which NeMo-1 has keys for."""

READ = (*PARALLEL.values(), *BATCH.values(), "precision", "seed", "optim", "minitron", "nemo_version")
"""Other keys that are read; the last one NeMo writes itself, and only into files."""

MINITRON = ("spec", "family", "parallel", "guard", "distillation", "fp8")
"""Keys of our own section. The first one is an architecture, and written by us."""

OPTIMIZER = {
    "lr": "lr",
    "weight_decay": "weight_decay",
    "eps": "eps",
    "clip_grad": "clip_grad",
    "distributed": "distributed",
    "schedule": "sched.name",
    "min_lr": "sched.min_lr",
    "warmup_steps": "sched.warmup_steps",
    "decay_fraction": "sched.decay_fraction",
    "beta1": "betas",
    "beta2": "betas",
}
"""Fields of `OptimizerConfig` by their keys below `optim`."""
OPTIM = ("name", "lr", "weight_decay", "betas", "eps", "clip_grad", "distributed", "sched")
SCHED = ("name", "warmup_steps", "constant_steps", "min_lr", "max_steps", "decay_fraction")


@dataclass(frozen=True)
class Neutral:
    """A key that nothing here acts on.

    Attributes:
        values: What may stand there, besides null: it asks for nothing that is not so anyway.
        instead: The key that does it here, or why there is none.
    """

    values: tuple[Any, ...]
    instead: str

    def allows(self, value: Any) -> bool:
        """Whether a value may stand there."""
        return value is None or any(type(value) is type(each) and value == each for each in self.values)


_NO_DROPOUT = "training is without dropout; set it to 0.0"
_ONE_BODY = "all of the model is Megatron-Core's GPT; leave it out"
_FP16 = "the scale of fp16 losses; precision is bf16 or 32"
_FUSION = "chosen where Transformer Engine's layers are; leave it out"
_FP8 = "minitron.distillation.teacher_fp8 multiplies a teacher's weights in fp8; a student is trained in bf16 or fp32"
_RECOMPUTE = "activations_checkpoint_granularity: selective or full, the same in every layer"
_FSDP = "optim.distributed splits optimizer states over data-parallel ranks"
_MOE = "experts are not supported"
_DATA = "data come with the data module, from a folder that the data stage wrote"
_BORDERS = "the data stage's data.reset_attention_mask; it is noted in model.data and does all three; leave it out"
_RUNTIME = "not part of training here; leave it out"
_FIRST_WEIGHTS = "weights are read from a checkpoint; a model from scratch is drawn with deviation 0.02"

_CLASSES = (
    "nemo.collections.nlp.models.language_modeling.megatron_gpt_model.MegatronGPTModel",
    "nemo_minitron.models.gpt.MegatronGPTModel",
    "nemo_minitron.models.distillation.MegatronGPTDistillationModel",
)

NEUTRAL: Mapping[str, Neutral] = {
    "mcore_gpt": Neutral((True,), _ONE_BODY),
    "transformer_engine": Neutral((True,), "its layers are taken wherever it and a GPU are; leave it out"),
    "target": Neutral(_CLASSES, "the class is the one that is called; leave it out"),
    "tokenizer": Neutral(({},), "the tokenizer is part of the checkpoint; leave it out"),
    "make_vocab_size_divisible_by": Neutral(
        (1, 2, 4, 8, 16, 32, 64, 128),
        "the vocabulary is padded for the tensor-parallel size; leave it out",
    ),
    "init_method_std": Neutral((0.02,), _FIRST_WEIGHTS),
    "use_scaled_init_method": Neutral((True,), _FIRST_WEIGHTS),
    "use_cpu_initialization": Neutral((False,), _FIRST_WEIGHTS),
    **dict.fromkeys(("hidden_dropout", "attention_dropout", "ffn_dropout"), Neutral((0.0, 0), _NO_DROPOUT)),
    **dict.fromkeys(("pre_process", "post_process"), Neutral((True,), _ONE_BODY)),
    "apply_query_key_layer_scaling": Neutral((False,), "only fp16 needs it; set it to false"),
    "do_layer_norm_weight_decay": Neutral((False,), "norms and biases have no weight decay; set it to false"),
    "native_amp_init_scale": Neutral((4294967296,), _FP16),
    "native_amp_growth_interval": Neutral((1000,), _FP16),
    "hysteresis": Neutral((2,), _FP16),
    **dict.fromkeys(("fp32_residual_connection", "fp16_lm_cross_entropy"), Neutral((False,), _FP16)),
    # Both say that bf16 weights have fp32 master weights, or that all are fp32, as `precision` does.
    "megatron_amp_O2": Neutral((True, False), "precision: bf16 has fp32 master weights and gradients"),
    "grad_allreduce_chunk_size_mb": Neutral((125,), "minitron.parallel.grad_bucket_size"),
    **dict.fromkeys(
        ("grad_div_ar_fusion", "masked_softmax_fusion", "get_attention_mask_from_fusion"), Neutral((True,), _FUSION)
    ),
    "gradient_accumulation_fusion": Neutral((False,), "minitron.parallel.gradient_accumulation_fusion"),
    "apply_rope_fusion": Neutral((False,), "minitron.parallel.apply_rope_fusion"),
    "overlap_p2p_comm": Neutral((False,), "minitron.parallel.overlap_p2p_comm"),
    "batch_p2p_comm": Neutral((True,), "minitron.parallel.overlap_p2p_comm"),
    "gc_interval": Neutral((0,), "minitron.parallel.gc_interval"),
    **dict.fromkeys(
        ("persist_layer_norm", "bias_activation_fusion", "bias_dropout_add_fusion"), Neutral((True, False), _FUSION)
    ),
    "cross_entropy_loss_fusion": Neutral((False,), "losses are fused with the output layer; leave it out"),
    "use_flash_attention": Neutral((False,), "Transformer Engine chooses the kernel; leave it out"),
    "use_emha": Neutral((False,), _FUSION),
    **dict.fromkeys(("fp8", "fp8_e4m3", "fp8_debug", "fp8_params", "fp8_wgrad"), Neutral((False,), _FP8)),
    "fp8_hybrid": Neutral((True, False), _FP8),
    "fp8_margin": Neutral((0,), _FP8),
    "fp8_interval": Neutral((1,), _FP8),
    "fp8_amax_history_len": Neutral((1, 1024), _FP8),
    "fp8_amax_compute_algo": Neutral(("most_recent", "max"), _FP8),
    "reduce_amax": Neutral((True,), _FP8),
    "fp8_debug_log_dir": Neutral((), _FP8),
    "activations_checkpoint_method": Neutral(("uniform",), _RECOMPUTE),
    "activations_checkpoint_num_layers": Neutral((1,), _RECOMPUTE),
    **dict.fromkeys(
        ("activations_checkpoint_layers_per_pipeline", "num_micro_batches_with_partial_activation_checkpoints"),
        Neutral((), _RECOMPUTE),
    ),
    **dict.fromkeys(("fsdp", "fsdp_sharded_checkpoint"), Neutral((False,), _FSDP)),
    "fsdp_sharding_strategy": Neutral(("full",), _FSDP),
    "fsdp_grad_reduce_dtype": Neutral((32, "32"), _FSDP),
    "expert_model_parallel_size": Neutral((1,), _MOE),
    **dict.fromkeys(("moe_router_topk", "moe_grouped_gemm", "moe_token_dispatcher_type"), Neutral((), _MOE)),
    "rampup_batch_size": Neutral((), "global_batch_size is the same at every step; leave it out"),
    "pipeline_model_parallel_split_rank": Neutral((), "of encoder-decoder models; leave it out"),
    "dist_ckpt_format": Neutral(("torch_dist",), "checkpoints are written as torch_dist and read as either"),
    "dist_ckpt_load_strictness": Neutral((), "every weight must be there; leave it out"),
    "resume_from_checkpoint": Neutral((), "exp_manager.resume_if_exists=true goes on from the newest checkpoint"),
    **dict.fromkeys(("restore_from_path", "restore_from_ckpt"), Neutral((), "model.student names the checkpoint")),
    "kd_teacher_restore_from_path": Neutral((), "minitron.distillation.teacher"),
    "nemo_path": Neutral((), "exp_manager.checkpoint_callback_params.save_nemo_on_train_end"),
    **dict.fromkeys(("reset_lr", "reset_lr_steps"), Neutral((False,), "optim.sched begins at the first step")),
    "data": Neutral((), _DATA),
    **dict.fromkeys(("reset_attention_mask", "reset_position_ids", "eod_mask_loss"), Neutral((), _BORDERS)),
    **dict.fromkeys(("train_ds", "validation_ds", "test_ds"), Neutral((), _DATA)),
    **dict.fromkeys(
        ("ub_tp_comm_overlap", "validation_param_sync_overlap", "sharp", "sync_batch_comm", "enable_megatron_timers"),
        Neutral((False,), _RUNTIME),
    ),
    **dict.fromkeys(("ub_tp_comm_overlap_cfg", "nccl_communicator_config_path"), Neutral((), _RUNTIME)),
    **dict.fromkeys(("megatron_timer_kwargs", "cpu_offloading_num_layers"), Neutral((), _RUNTIME)),
    "cpu_offloading": Neutral((False,), "minitron.distillation.offload_teacher, for a teacher's layers"),
    **dict.fromkeys(("cpu_offloading_activations", "cpu_offloading_weights"), Neutral((True,), _RUNTIME)),
    "gradient_as_bucket_view": Neutral((True,), _RUNTIME),
    "onnx_safe": Neutral((False,), "convert and export write checkpoints; leave it out"),
    "apex_transformer_log_level": Neutral((30,), _RUNTIME),
    "nsys_profile": Neutral(({"enabled": False},), "run the command under `nsys profile`"),
    "memory_profile": Neutral(({"enabled": False},), _RUNTIME),
    "inference": Neutral((), "the evaluate stage, or transformers on the exported model"),
    "peft": Neutral((), "every weight is trained; leave it out"),
}
"""Keys of a model that nothing here acts on."""

_BUCKETS = "minitron.parallel.grad_bucket_size"
_OVERLAP = "minitron.parallel.overlap_grad_reduce"
_PRECISE = "gradients, moments and master weights are fp32"
NEUTRAL_OPTIM: Mapping[str, Neutral] = {
    **dict.fromkeys(("bucket_cap_mb", "bucket_size"), Neutral((), _BUCKETS)),
    "overlap_grad_sync": Neutral((), _OVERLAP),
    "overlap_param_sync": Neutral((False,), "parameters are gathered after the step; leave it out"),
    **dict.fromkeys(("contiguous_grad_buffer", "contiguous_param_buffer"), Neutral((True, False), _BUCKETS)),
    **dict.fromkeys(("grad_sync_dtype", "param_sync_dtype", "dtype"), Neutral(("fp32", 32, "32"), _PRECISE)),
    "store_params": Neutral((True,), _PRECISE),
    "store_param_remainders": Neutral((False,), _PRECISE),
    "average_in_collective": Neutral((False,), "gradients are sums over tokens, divided once; leave it out"),
    **dict.fromkeys(("fused", "capturable"), Neutral((True, False), "Megatron's optimizer decides; leave it out")),
    "amsgrad": Neutral((False,), "AdamW without it"),
}
"""Keys of `optim` that nothing here acts on."""

NEUTRAL_MINITRON: Mapping[str, Neutral] = {
    **dict.fromkeys(("lineage", "tokenizer_files"), Neutral((), "comes with the checkpoint; leave it out")),
}
"""Keys of our own section that are written by us, and read from files alone."""

NEUTRAL_SCHED: Mapping[str, Neutral] = {
    "warmup_ratio": Neutral((), "sched.warmup_steps, which also takes a fraction of all steps such as 0.05"),
    "constant_ratio": Neutral((), "sched.constant_steps"),
    **dict.fromkeys(
        ("hold_steps", "hold_ratio"), Neutral((), "sched.name: WarmupStableDecay with sched.decay_fraction")
    ),
    **dict.fromkeys(("power", "cycle", "decay_rate"), Neutral((), "sched.name: CosineAnnealing or WarmupAnnealing")),
    "last_epoch": Neutral((-1,), "exp_manager.resume_if_exists=true goes on where training stopped"),
    **dict.fromkeys(("monitor", "reduce_on_plateau"), Neutral((), "the schedule knows only steps")),
    **dict.fromkeys(("t_max", "t_accumulate_grad_batches"), Neutral((), "sched.max_steps")),
}
"""Keys of `optim.sched` that nothing here acts on."""

OPTIMIZERS: Mapping[str, bool | None] = {
    "adamw": None,
    "fused_adam": False,
    "megatron_fused_adam": False,
    "distributed_fused_adam": True,
    "mcore_distributed_optim": True,
}
"""Names of AdamW in NeMo, and whether each splits its states over data-parallel ranks; None: as a recipe."""


def unused(given: Mapping[str, Any], neutral: Mapping[str, Neutral], prefix: str = "") -> Iterator[str]:
    """Problems of keys that ask for something that no key of that name does here."""
    for name, value in given.items():
        if (rule := neutral.get(name)) is None or rule.allows(value):
            continue
        accepted = f"; accepted: {', '.join(map(repr, rule.values))}" if rule.values else ""
        yield f"{prefix}{name} = {_short(value)}: {rule.instead}{accepted}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
