"""One strictness and one set of defaults through every door: recipe, hydra scripts, NeMo configurations, Python."""

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from omegaconf import OmegaConf

from nemo_minitron.arch.families import recorded_family
from nemo_minitron.arch.nemo_config import nemo_config, spec_from_nemo_config
from nemo_minitron.config import nemo_keys
from nemo_minitron.config.distillation import DistillationConfig, Objective, RampTo
from nemo_minitron.config.load import check, known_keys
from nemo_minitron.config.model_settings import ModelSettings
from nemo_minitron.config.run import RunConfig
from nemo_minitron.config.scripts import PruningSection, ScoringSection
from nemo_minitron.config.training import DistillConfig, OptimizerConfig, TrainingConfig
from nemo_minitron.errors import ConfigError, SpecError
from nemo_minitron.models import nemo_settings, scripts
from nemo_minitron.models.distillation import MegatronGPTDistillationModel
from tests.parallel.megatron_jobs import SPEC

CONF = Path(__file__).parents[2] / "examples" / "conf"
# Values of every kind, so that each key meets some that it can take.
VALUES: list[Any] = [
    *(True, False, 0, 1, 2, 3, -1, 0.5, 3e-4, 1.5),
    *("x", "bf16", "32", "full", "selective", "none", "reverse_kl", "layernorm", "gelu", "WarmupAnnealing"),
    *("before_activation", "cpu", "1:00:00"),
    *(
        [0.8, 0.9],
        [3, 0],
        ["nemo"],
        {"enabled": True},
        {"temperature": 2.0},
        {"embedding": True},
        {"ffn_hidden_size": 0.5},
    ),
]
# What NeMo 1.23's own configuration of a Llama has, but for paths.
NEMO_1: dict[str, Any] = {
    **{"mcore_gpt": True, "micro_batch_size": 4, "global_batch_size": 8, "tensor_model_parallel_size": 1},
    **{"pipeline_model_parallel_size": 1, "virtual_pipeline_model_parallel_size": None, "encoder_seq_length": 4096},
    **{"max_position_embeddings": 4096, "num_layers": 12, "hidden_size": 768, "ffn_hidden_size": 3072},
    **{"num_attention_heads": 12, "init_method_std": 0.02, "use_scaled_init_method": True, "hidden_dropout": 0.0},
    **{"attention_dropout": 0.0, "ffn_dropout": 0.0, "kv_channels": None, "normalization": "rmsnorm"},
    **{"layernorm_epsilon": 1e-6, "do_layer_norm_weight_decay": False, "make_vocab_size_divisible_by": 128},
    **{"pre_process": True, "post_process": True, "persist_layer_norm": True, "bias": False},
    **{"activation": "fast-swiglu", "headscale": False, "transformer_block_type": "pre_ln", "openai_gelu": False},
    **{"normalize_attention_scores": True, "position_embedding_type": "rope", "rotary_percentage": 1.0},
    **{"attention_type": "multihead", "share_embeddings_and_output_weights": False, "overlap_p2p_comm": False},
    **{"batch_p2p_comm": True, "num_query_groups": None, "native_amp_init_scale": 4294967296},
    **{"native_amp_growth_interval": 1000, "hysteresis": 2, "fp32_residual_connection": False},
    **{"fp16_lm_cross_entropy": False, "megatron_amp_O2": False, "grad_allreduce_chunk_size_mb": 125},
    **{"grad_div_ar_fusion": True, "gradient_accumulation_fusion": False, "bias_activation_fusion": False},
    **{"bias_dropout_add_fusion": False, "masked_softmax_fusion": True, "get_attention_mask_from_fusion": True},
    **{"apply_rope_fusion": False, "seed": 1234, "resume_from_checkpoint": None, "use_cpu_initialization": False},
    **{"onnx_safe": False, "apex_transformer_log_level": 30, "gradient_as_bucket_view": True},
    **{"sync_batch_comm": False, "activations_checkpoint_granularity": None, "activations_checkpoint_method": None},
    **{"activations_checkpoint_num_layers": None, "num_micro_batches_with_partial_activation_checkpoints": None},
    **{"activations_checkpoint_layers_per_pipeline": None, "sequence_parallel": False, "transformer_engine": True},
    **{"fp8": False, "fp8_e4m3": False, "fp8_hybrid": True, "fp8_margin": 0, "fp8_interval": 1},
    **{"fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max", "reduce_amax": True, "use_emha": False},
    **{"rampup_batch_size": None, "expert_model_parallel_size": 1, "seq_len_interpolation_factor": None},
    **{"nccl_communicator_config_path": None, "validation_param_sync_overlap": False, "fsdp": False},
    **{"fsdp_sharding_strategy": "full", "fsdp_grad_reduce_dtype": 32, "fsdp_sharded_checkpoint": False},
    **{"dist_ckpt_format": "torch_dist", "ub_tp_comm_overlap": False, "ub_tp_comm_overlap_cfg": None},
    **{"fp8_debug": False, "fp8_debug_log_dir": None, "use_flash_attention": False, "cpu_offloading": False},
    **{"cpu_offloading_num_layers": None, "cpu_offloading_activations": True, "cpu_offloading_weights": True},
    **{"sharp": False, "enable_megatron_timers": False, "megatron_timer_kwargs": None, "context_parallel_size": 1},
    **{"nsys_profile": {"enabled": False}, "qk_layernorm": False, "rotary_base": 10000.0},
    "apply_query_key_layer_scaling": False,
    "optim": {
        **{"name": "fused_adam", "lr": 2e-4, "weight_decay": 0.01, "betas": [0.9, 0.98]},
        "sched": {"name": "CosineAnnealing", "warmup_steps": 500, "constant_steps": 50000, "min_lr": 2e-5},
    },
}
NEMO_1_TRAINER: dict[str, Any] = {
    **{"devices": 1, "num_nodes": 1, "accelerator": "gpu", "precision": "bf16", "logger": False},
    **{"enable_checkpointing": False, "use_distributed_sampler": False, "max_epochs": -1, "max_steps": 100000},
    **{"log_every_n_steps": 10, "val_check_interval": 100, "limit_val_batches": 50, "limit_test_batches": 500},
    **{"accumulate_grad_batches": 1, "gradient_clip_val": 1.0, "benchmark": False, "enable_model_summary": False},
}


def hydra(**changes: Any) -> dict[str, Any]:
    """The distillation script's own configuration as plain data, with paths, and with changes by dotted key."""
    data = OmegaConf.load(CONF / "megatron_gpt_distillation.yaml")
    given = {"model.student": "s", "model.data": "d", "model.minitron.distillation.teacher": "t", **changes}
    for key, value in given.items():
        OmegaConf.update(data, key, value, force_add=True)
    return OmegaConf.to_container(data, resolve=True)


def read(data: dict[str, Any]) -> scripts.Script:
    return scripts.distillation_script(OmegaConf.create(data))


def refused(data: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as error:
        read(data)
    return error.value.problems


# -- one place for each default ----------------------------------------------------------------------------------


def test_hydra_and_recipe_have_the_same_defaults():
    recipe = check(RunConfig, {"name": "n", "model": {"source": "m"}, "data": {"sources": ["t"]}}, source="recipe")
    script = read(hydra())
    told = ModelSettings.of_training(recipe.distill, recipe.distill.with_teacher(Path("t")))
    assert script.settings.optimizer == told.optimizer
    assert script.settings.guard == told.guard
    assert script.settings.distillation == told.distillation
    assert script.settings.batch == recipe.distill.batch
    assert script.settings.parallel == recipe.parallel
    assert script.settings.seed == recipe.seed
    assert script.section.validation_samples == recipe.distill.validation_samples
    assert (
        nemo_settings.model_settings({"optim": {"sched": {}}, "minitron": {"distillation": {"teacher": "t"}}}) == told
    )


def test_settings_survive_the_way_through_a_nemo_configuration():
    training = check(
        DistillConfig,
        {
            **{
                "divergence": "jensen_shannon",
                "beta": 0.3,
                "temperature": 2,
                "ramp_to": {"temperature": 1},
                "top_k": 9,
            },
            **{"hidden": {"layers": [[-2, -1]], "kind": "mse"}, "hidden_weight": 0.4, "teacher_precision": "fp32"},
            **{"offload_teacher": True, "freeze_embeddings": True, "loss_chunk_tokens": 7, "kd_weight": 0.7},
            "optimizer": {"lr": 1e-3, "warmup_steps": 0.25, "schedule": "wsd", "decay_fraction": 0.3, "clip_grad": 0.5},
            "guard": {"spike_factor": 9},
        },
        source="recipe",
    )
    told = ModelSettings.of_training(training, training.with_teacher(Path("t")))
    assert nemo_settings.model_settings(keys_of(told)) == told
    assert told.distillation.objective == Objective(
        **{name: getattr(training, name) for name in Objective.model_fields}
    )


def test_configurations_of_earlier_versions_are_read():
    older = {
        "divergence": {"kind": "jensen_shannon", "beta": 0.3, "skew": 0.1},
        "teacher_precision": "32",
        "teacher": "t",
    }
    now = {"divergence": "jensen_shannon", "beta": 0.3, "teacher_precision": "fp32", "teacher": "t"}
    assert check(DistillationConfig, older, source="") == check(DistillationConfig, now, source="")
    assert check(DistillationConfig, {"divergence": None}, source="") == DistillationConfig()


def test_a_ramp_is_a_straight_line_and_leaves_the_rest():
    objective = Objective(temperature=3.0, kd_weight=0.5, top_k=7, ramp_to=RampTo(temperature=1.0, lm_weight=1.0))
    found = [objective.at(progress) for progress in (0.0, 0.25, 1.0)]
    assert [(each.temperature, each.lm_weight, each.kd_weight) for each in found] == [
        (3, 0, 0.5),
        (2.5, 0.25, 0.5),
        (1, 1, 0.5),
    ]
    assert all(each.top_k == 7 and each.ramp_to == RampTo() for each in found)


# -- misspelt keys -----------------------------------------------------------------------------------------------

MISSPELT = {
    "model.minitron.distillation.temprature": "did you mean temperature?",
    "model.temperature": "did you mean model.minitron.distillation.temperature?",
    "model.minitron.distilation.temperature": "did you mean model.minitron.distillation?",
    "model.optim.sched.warm_up_steps": "did you mean model.optim.sched.warmup_steps?",
    "trainer.max_step": "did you mean trainer.max_steps?",
    "exp_manager.resume_if_exist": "did you mean exp_manager.resume_if_exists?",
    "modle": "did you mean model?",
}


@pytest.mark.parametrize("key", MISSPELT)
def test_misspelt_keys_are_refused_by_a_script(key):
    [problem] = refused(hydra(**{key: 4}))
    named = key.removesuffix(".temperature") if "distilation" in key else key
    assert problem.startswith(f"{named}: unknown key")
    assert MISSPELT[key] in problem


def test_misspelt_keys_are_refused_by_a_model_and_by_a_recipe():
    cfg = OmegaConf.create(nemo_config(SPEC, minitron={"distillation": {"temprature": 4}}))
    with pytest.raises(ConfigError, match=r"minitron\.distillation\.temprature: unknown key; did you mean temperature"):
        MegatronGPTDistillationModel(cfg)
    recipe = {"name": "n", "model": {"source": "m"}, "data": {"sources": ["t"]}, "distill": {"temprature": 4}}
    with pytest.raises(ConfigError, match=r"distill\.temprature: unknown key; did you mean distill\.temperature"):
        check(RunConfig, recipe, source="recipe")


def test_every_problem_is_told_at_once():
    problems = refused(
        hydra(
            **{
                "model.optim.name": "sgd",
                "model.temperature": 4,
                "trainer.accumulate_grad_batches": 4,
                "model.data": None,
            },
            **{"model.hidden_dropout": 0.1, "model.minitron.distillation.kd_weight": -1},
        )
    )
    for start in ("model.optim.name = 'sgd': one of adamw", "model.temperature", "trainer.accumulate_grad_batches = 4"):
        assert any(problem.startswith(start) for problem in problems), (start, problems)
    for start in (
        "model.data: is missing",
        "model.hidden_dropout = 0.1: training is",
        "model.minitron.distillation.kd_w",
    ):
        assert any(problem.startswith(start) for problem in problems), (start, problems)
    assert len(problems) == 6


# -- what NeMo-1 configurations ordinarily have ------------------------------------------------------------------


def test_nemo_s_own_configuration_is_taken_as_it_is():
    """But for the sizes of the model, which the checkpoint has."""
    assert spec_from_nemo_config(NEMO_1 | {"override_vocab_size": 32000}).num_layers == 12
    found = read(_nemo_1())
    settings = found.settings
    assert (settings.batch.micro_batch_size, settings.batch.sequence_length) == (4, 4096)
    assert settings.optimizer == OptimizerConfig(
        lr=2e-4, min_lr=2e-5, warmup_steps=500, weight_decay=0.01, beta2=0.98, clip_grad=1.0, distributed=False
    )
    assert settings.constant_steps == 50000
    assert found.trainer["max_steps"] == 100000
    assert not {"gradient_clip_val", "precision", "accumulate_grad_batches"} & set(found.trainer)


def _nemo_1() -> dict[str, Any]:
    model = NEMO_1 | {"precision": "bf16", "student": "s", "data": "d"}
    model["minitron"] = {"distillation": {"teacher": "t"}}
    manager = {"exp_dir": None, "wandb_logger_kwargs": {"project": None}, "resume_if_exists": True}
    return {"name": "n", "restore_from_path": None, "trainer": NEMO_1_TRAINER, "exp_manager": manager, "model": model}


def test_a_gradient_norm_of_the_trainer_clips():
    assert read(hydra(**{"trainer.gradient_clip_val": 0.25})).settings.optimizer.clip_grad == 0.25
    assert read(hydra(**{"trainer.gradient_clip_val": 0})).settings.optimizer.clip_grad == 0
    both = {"trainer.gradient_clip_val": 0.25, "model.optim.clip_grad": 1.0}
    assert refused(hydra(**both)) == ["trainer.gradient_clip_val = 0.25, but model.optim.clip_grad = 1.0; give one"]


def test_keys_that_come_with_a_checkpoint_are_read_and_new_ones_are_not():
    stored = nemo_config(SPEC) | {"a_key_of_later": 1, "optim": {"name": "sgd", "lr": 1.0}, "hidden_dropout": 0.1}
    stored["tokenizer"] = {"library": "sentencepiece", "model": "nemo:x"}
    assert nemo_settings.model_settings(stored, inherited=stored).optimizer is None
    told = nemo_settings.model_settings(stored | {"micro_batch_size": 3, "optim": {"name": "adamw"}}, inherited=stored)
    assert (told.batch.micro_batch_size, told.optimizer) == (3, OptimizerConfig())
    with pytest.raises(ConfigError, match="another_key: unknown key"):
        nemo_settings.model_settings(stored | {"another_key": 1}, inherited=stored)
    with pytest.raises(ConfigError, match=r"optim\.name = 'sgd'"):
        nemo_settings.model_settings(stored | {"optim": {"name": "sgd", "lr": 2.0}}, inherited=stored)
    with pytest.raises(ConfigError, match=r"hidden_dropout = 0\.2"):
        nemo_settings.model_settings(stored | {"hidden_dropout": 0.2}, inherited=stored)


def test_what_a_cache_cannot_give_is_refused():
    for given in ({"teacher": "t"}, {"hidden": {"embedding": True}}, {"top_k": 4}, {"ramp_to": {"temperature": 2}}):
        with pytest.raises(ConfigError, match="cache"):
            check(DistillationConfig, {"cache": "c", **given}, source="")


# -- every key ---------------------------------------------------------------------------------------------------


def model_config() -> dict[str, Any]:
    """A complete NeMo configuration whose architecture is in NeMo's keys."""
    ours = {"distillation": {"teacher": "t", "hidden": {"embedding": True}}}
    return {**nemo_config(SPEC), "optim": {"sched": {}}, "minitron": ours}


def resolved(cfg: Mapping[str, Any]) -> Any:
    spec = spec_from_nemo_config(cfg)
    return spec, recorded_family(cfg.get("minitron") or {}, spec), nemo_settings.model_settings(cfg)


def attempt(read_it: Callable[[], Any]) -> Any:
    """What it returns, or the text of its refusal."""
    try:
        return read_it()
    except (ConfigError, SpecError) as error:
        return str(error)


def with_value(cfg: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    first, _, rest = key.partition(".")
    below = cfg.get(first)
    return {**cfg, first: with_value(below if isinstance(below, Mapping) else {}, rest, value) if rest else value}


def at(cfg: Any, key: str) -> Any:
    for name in key.split("."):
        cfg = cfg.get(name) if isinstance(cfg, Mapping) else None
    return cfg


def model_keys() -> Iterator[str]:
    yield from dict.fromkeys((*nemo_keys.ARCHITECTURE, *nemo_keys.READ, *nemo_keys.NEUTRAL))
    yield from (f"optim.{key}" for key in (*nemo_keys.OPTIM, *nemo_keys.NEUTRAL_OPTIM))
    yield from (f"optim.sched.{key}" for key in (*nemo_keys.SCHED, *nemo_keys.NEUTRAL_SCHED))
    yield from (f"minitron.{key}" for key in (*nemo_keys.MINITRON, *nemo_keys.NEUTRAL_MINITRON))
    for name, kind in nemo_settings._OURS.items():
        yield from (f"minitron.{name}.{key}" for key in known_keys(kind))


def neutral(key: str) -> nemo_keys.Neutral | None:
    tables = (nemo_keys.NEUTRAL, nemo_keys.NEUTRAL_OPTIM, nemo_keys.NEUTRAL_SCHED, nemo_keys.NEUTRAL_MINITRON)
    found = [table[key.rpartition(".")[2]] for table in tables if key.rpartition(".")[2] in table]
    return found[0] if found and not key.startswith("minitron.parallel") else None


WRITTEN_BY_NEMO = ("nemo_version",)
"""Put into every file by NeMo, and asked of nobody."""


def test_every_key_of_a_model_changes_something_or_is_refused(capsys):
    """Each key gets values of every kind: none leaves everything as it was, unless it says what is so anyway."""
    base = model_config()
    before = resolved(base)
    defaults = with_value(keys_of(before[2]), "minitron.parallel", before[2].parallel.model_dump(mode="json"))
    counts: Counter[str] = Counter()
    silent = []
    keys = [key for key in model_keys() if key not in WRITTEN_BY_NEMO]
    for key in keys:
        outcomes = set()
        for value in VALUES:
            present = at(base, key) if at(base, key) is not None else at(defaults, key)
            says_what_is_so = value == present or (present is None and not value)
            after = attempt(partial(resolved, with_value(base, key, value)))
            if isinstance(after, str):
                named = "architecture" if key == "minitron.spec" else key.split(".")[-1].split("_")[0]
                assert named in after or "minitron.spec" in after, (key, value, after)
                outcomes.add("refused")
            elif after != before:
                outcomes.add("changed")
            elif not says_what_is_so and not ((rule := neutral(key)) and rule.allows(value)):
                silent.append((key, value))
        counts["changes the result" if "changed" in outcomes else "refused by name"] += 1
        assert outcomes, f"{key}: no value of it does anything"
    assert not silent
    with capsys.disabled():
        print(f"\n{len(keys)} keys of a model: {dict(counts)}")
    assert counts["changes the result"] >= 75
    assert set(NEMO_1) <= set(keys)


def test_every_misspelt_key_of_a_model_is_refused(capsys):
    known = {*model_keys()}
    levels = {key.rpartition(".")[0] for key in known}
    tried = 0
    for key in known:
        level, _, name = key.rpartition(".")
        for wrong in {name[:-1], f"{name}s", f"{name[:2]}{name[3:]}", f"x_{name}"} - {""}:
            full = f"{level}.{wrong}" if level else wrong
            if full in known or full in levels:
                continue
            with pytest.raises(ConfigError, match="unknown key"):
                nemo_settings.model_settings(with_value(model_config(), full, 1))
            tried += 1
    with capsys.disabled():
        print(f"\n{tried} misspelt keys of a model: all refused")
    assert tried > 600


def test_every_key_of_a_script_changes_something_or_is_refused(capsys):
    base = hydra()
    before = read(base)
    arguments = [name for name in inspect.signature(Trainer.__init__).parameters if name != "self"]
    keys = [f"trainer.{name}" for name in dict.fromkeys((*arguments, *scripts.TRAINER))]
    keys += [f"model.{name}" for name in ("student", "data", "validation_samples", "global_batch_size", "seed")]
    counts: Counter[str] = Counter()
    for key in keys:
        outcomes = set()
        for value in VALUES:
            if value == at(base, key):
                continue
            after = attempt(partial(read, with_value(base, key, value)))
            if isinstance(after, str):
                assert key in after, (key, value, after)
                outcomes.add("refused")
            elif after != before:
                outcomes.add("changed")
            else:
                rule = scripts.TRAINER.get(key.removeprefix("trainer."))
                so_anyway = (rule and rule.allows(value)) or key in ("trainer.gradient_clip_val", "trainer.precision")
                assert so_anyway or not value, (key, value)
        assert outcomes, key
        counts["changes the result" if "changed" in outcomes else "refused by name"] += 1
    with capsys.disabled():
        print(f"\n{len(keys)} keys of the distillation script: {dict(counts)}")
    for wrong in [f"trainer.{name[:-1]}" for name in arguments] + [
        f"exp_manager.{name}x" for name in base["exp_manager"]
    ]:
        [problem] = refused(with_value(base, wrong, 1))
        assert problem.startswith(f"{wrong}: unknown key")


@pytest.mark.parametrize(
    ("script", "section", "kind"),
    [("megatron_gpt_score", "scoring", ScoringSection), ("megatron_gpt_prune", "pruning", PruningSection)],
)
def test_the_other_scripts_are_as_strict(script, section, kind):
    def found(**changes: Any) -> scripts.Script:
        data = OmegaConf.to_container(OmegaConf.load(CONF / f"{script}.yaml"))
        for key, value in {"model.restore_from_path": "m", "model.data": "d", **changes}.items():
            data = with_value(data, key, value)
        return scripts.calibration_script(OmegaConf.create(data), section, kind)

    before = found()
    assert before.section.samples == 1024
    for key in (key.replace("*", "0") for key in known_keys(kind)):
        outcomes = set()
        for value in VALUES:
            after = attempt(partial(found, **{f"{section}.{key}": value}))
            if isinstance(after, str):
                assert f"{section}." in after
            outcomes.add(after != before)
        assert True in outcomes, key
        with pytest.raises(ConfigError, match=f"{section}.*unknown key"):
            found(**{f"{section}.{key}x": 1})
    for key in ("trainer.gradient_clip_val", "exp_manager.name", "model.student"):
        with pytest.raises(ConfigError, match=key.split(".")[0]):
            found(**{key: 1})


def test_a_training_has_the_samples_that_are_asked_for():
    script = read(hydra(**{"trainer.max_steps": 7, "model.validation_samples": 3}))
    assert isinstance(script.section, TrainingConfig)
    assert (script.section.steps, script.section.validation_samples) == (7, 3)


def keys_of(settings: ModelSettings) -> dict[str, Any]:
    """Settings as keys of a NeMo model configuration, every default written out; `model_settings` reads them back."""
    layout = nemo_settings.parallel_keys(settings.parallel)
    distillation = settings.distillation
    ours = {
        **layout["minitron"],
        "guard": settings.guard.model_dump(mode="json"),
        **({"fp8": True} if settings.fp8 else {}),
        **({} if distillation is None else {"distillation": distillation.model_dump(mode="json")}),
    }
    return {
        **layout,
        **{key: getattr(settings.batch, name) for name, key in nemo_keys.BATCH.items()},
        "precision": nemo_settings.precision_key(settings.precision),
        "seed": settings.seed,
        **({} if settings.optimizer is None else {"optim": nemo_settings.optimizer_keys(settings.optimizer)}),
        "minitron": ours,
    }
