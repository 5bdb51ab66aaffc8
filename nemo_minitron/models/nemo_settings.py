"""NeMo-1 configuration keys to our sections and back: layout, numbers, batches, optimizer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_minitron.config.load import check
from nemo_minitron.config.parallel import ParallelConfig, Precision
from nemo_minitron.config.training import DistillConfig, GuardConfig, OptimizerConfig, Schedule, TrainingConfig
from nemo_minitron.errors import ConfigError

_PARALLEL_KEYS = {
    "tensor": "tensor_model_parallel_size",
    "pipeline": "pipeline_model_parallel_size",
    "virtual_pipeline": "virtual_pipeline_model_parallel_size",
    "context": "context_parallel_size",
    "sequence_parallel": "sequence_parallel",
    "recompute": "activations_checkpoint_granularity",
}
_PRECISIONS = {"bf16": Precision.BF16, "bf16-mixed": Precision.BF16, "32": Precision.FP32, "fp32": Precision.FP32}
_SCHEDULES = {
    "CosineAnnealing": Schedule.COSINE,
    "WarmupAnnealing": Schedule.LINEAR,
    "WarmupHoldPolicy": Schedule.CONSTANT,
    "WarmupStableDecay": Schedule.WSD,
}


def parallel_config(cfg: Mapping[str, Any]) -> ParallelConfig:
    """The layout a NeMo configuration asks for; absent keys mean 1."""
    wanted = {name: cfg[key] for name, key in _PARALLEL_KEYS.items() if cfg.get(key) is not None}
    ours = (cfg.get("minitron") or {}).get("parallel") or {}
    return check(ParallelConfig, {**wanted, **ours}, source="model configuration")


def parallel_keys(parallel: ParallelConfig) -> dict[str, Any]:
    """The inverse of `parallel_config`, as plain data."""
    values = parallel.model_dump(mode="json")
    ours = {name: value for name, value in values.items() if name not in _PARALLEL_KEYS}
    return {**{key: values[name] for name, key in _PARALLEL_KEYS.items()}, "minitron": {"parallel": ours}}


def precision(cfg: Mapping[str, Any]) -> Precision:
    """The numbers a NeMo configuration asks for.

    Raises:
        ConfigError: A precision we do not compute in.
    """
    value = str(cfg.get("precision", "32"))
    if value not in _PRECISIONS:
        raise ConfigError("model configuration", [f"precision = {value!r}: one of {', '.join(sorted(_PRECISIONS))}"])
    return _PRECISIONS[value]


def precision_key(value: Precision) -> str:
    """The inverse of `precision`."""
    return {Precision.BF16: "bf16", Precision.FP32: "32"}[value]


def optimizer_config(optim: Mapping[str, Any]) -> OptimizerConfig:
    """`cfg.optim` (name, lr, weight_decay, betas, sched) as our section.

    Raises:
        ConfigError: With every problem found.
    """
    sched = optim.get("sched") or {}
    name = sched.get("name", "CosineAnnealing")
    if name not in _SCHEDULES:
        raise ConfigError("model configuration", [f"optim.sched.name = {name!r}: one of {', '.join(_SCHEDULES)}"])
    beta1, beta2 = optim.get("betas", (0.9, 0.95))
    values = {
        "lr": optim["lr"],
        "min_lr": sched.get("min_lr", 0.0),
        "warmup_steps": sched.get("warmup_steps", 0),
        "schedule": _SCHEDULES[name],
        "decay_share": sched.get("decay_share", 0.2),
        "weight_decay": optim.get("weight_decay", 0.01),
        "beta1": beta1,
        "beta2": beta2,
        "eps": optim.get("eps", 1e-8),
        "clip_grad": optim.get("clip_grad", 1.0),
        "distributed": optim.get("distributed", optim.get("name") == "distributed_fused_adam"),
    }
    return check(OptimizerConfig, values, source="model configuration: optim")


def optimizer_keys(config: OptimizerConfig) -> dict[str, Any]:
    """The inverse of `optimizer_config`."""
    names = {schedule: name for name, schedule in _SCHEDULES.items()}
    return {
        "name": "distributed_fused_adam" if config.distributed else "adamw",
        "distributed": config.distributed,
        "lr": config.lr,
        "weight_decay": config.weight_decay,
        "betas": [config.beta1, config.beta2],
        "eps": config.eps,
        "clip_grad": config.clip_grad,
        "sched": {
            "name": names[config.schedule],
            "warmup_steps": config.warmup_steps,
            "min_lr": config.min_lr,
            "decay_share": config.decay_share,
        },
    }


def guard_config(minitron: Mapping[str, Any]) -> GuardConfig:
    """`cfg.minitron.guard` as our section; absent keys mean the defaults.

    Raises:
        ConfigError: With every problem found.
    """
    return check(GuardConfig, dict(minitron.get("guard") or {}), source="model configuration: minitron.guard")


def base_keys(settings: TrainingConfig) -> dict[str, Any]:
    """The settings that every kind of training has, as keys of a NeMo model configuration."""
    return {
        "optim": optimizer_keys(settings.optimizer),
        "minitron": {"guard": settings.guard.model_dump(mode="json")},
    }


def training_keys(settings: DistillConfig, teacher: Path) -> dict[str, Any]:
    """The settings as keys of a NeMo model configuration."""
    keys = base_keys(settings)
    return {
        **keys,
        "minitron": {
            **keys["minitron"],
            "distillation": {
                **objective_keys(settings),
                "teacher": str(teacher),
                "top_k": settings.top_k,
                "temperature": settings.temperature,
                "teacher_precision": settings.teacher_precision and precision_key(settings.teacher_precision),
                "teacher_fp8": settings.teacher_fp8,
                "offload_teacher": settings.offload_teacher,
                "hidden_weight": settings.hidden_weight,
                "hidden": settings.hidden and settings.hidden.model_dump(mode="json"),
            },
        },
    }


def objective_keys(settings: DistillConfig) -> dict[str, Any]:
    """Keys that a student has with or without a teacher in memory."""
    return {
        "divergence": {"kind": settings.divergence.value, "beta": settings.beta, "skew": settings.skew},
        "kd_weight": settings.kd_weight,
        "lm_weight": settings.lm_weight,
        "ramp_to": settings.ramp_to.model_dump(mode="json"),
        "freeze_embeddings": settings.freeze_embeddings,
        "loss_chunk_tokens": settings.loss_chunk_tokens,
    }
