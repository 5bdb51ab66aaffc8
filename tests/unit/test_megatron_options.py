"""Megatron's options for speed: where they are on by themselves, and what is refused and why."""

import gc
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError

from nemo_minitron.callbacks.garbage import GarbageCollection, interval_of
from nemo_minitron.config.load import load_recipe
from nemo_minitron.config.parallel import ParallelConfig, Precision
from nemo_minitron.config.training import DistillConfig, OptimizerConfig
from nemo_minitron.errors import ConfigError, LayoutError
from nemo_minitron.launchers import nemo_launcher
from nemo_minitron.megatron import build, forward, optim, overlap
from nemo_minitron.megatron.forward import MicroBatch
from nemo_minitron.models import nemo_settings
from nemo_minitron.models.distillation import MegatronGPTDistillationModel
from nemo_minitron.models.nemo_settings import SettingsReader
from nemo_minitron.ops import product_speed
from tests.parallel.megatron_jobs import EXPERT_SPECS, FAMILY_SPECS, SPECS

ROOT = Path(__file__).parents[2]
GPU, CPU = torch.device("cuda"), torch.device("cpu")


def running(device, **values):
    settings = {"dp_size": 2, **{name: values.pop(name) for name in ("dp_size",) if name in values}}
    return SimpleNamespace(device=device, parallel=ParallelConfig(**values), **settings)


def config(device, monkeypatch, *, engine=False, apex=False, **values):
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.tensor_parallel import layers

    monkeypatch.setattr(build, "engine_carries", lambda spec, where, precision: engine)
    monkeypatch.setattr(layers, "_grad_accum_fusion_available", apex)
    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb", (lambda *_: None) if engine else None)
    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb_thd", (lambda *_: None) if engine else None)
    return build.transformer_config(SPECS["tied"], ParallelConfig(**values), Precision.BF16, device=device)


@pytest.mark.parametrize(
    ("here", "wanted"),
    [
        (running(GPU), True),
        (running(GPU, dp_size=1), False),
        (running(GPU, dp_size=1, context=2), True),
        (running(CPU), False),
        (running(CPU, overlap_grad_reduce=True), True),
        (running(GPU, overlap_grad_reduce=False), False),
    ],
)
def test_gradients_overlap_on_gpus_with_several_replicas(here, wanted):
    assert overlap.is_wanted(here) == wanted


@pytest.mark.parametrize(
    ("here", "distributed", "wanted"),
    [
        (running(GPU), True, True),
        (running(GPU), False, False),
        (running(GPU, dp_size=1), True, False),
        (running(GPU, dp_size=1, context=2), True, True),
        (running(GPU, overlap_grad_reduce=False), True, False),
        (running(GPU, overlap_param_gather=False), True, False),
        (running(CPU), True, False),
        (running(CPU, overlap_grad_reduce=True), True, False),
        (running(CPU, overlap_param_gather=True), True, True),
        (None, True, False),
    ],
)
def test_weights_are_gathered_late_on_gpus_with_the_distributed_optimizer(here, distributed, wanted):
    assert overlap.gather_is_wanted(here, distributed=distributed) == wanted


def test_late_gathers_ask_for_overlapping_gradients_and_for_the_distributed_optimizer():
    late = running(CPU, overlap_param_gather=True)
    assert overlap.is_wanted(late)
    with pytest.raises(LayoutError, match=r"overlap_param_gather = true without the distributed optimizer"):
        overlap.gather_is_wanted(late, distributed=False)
    given = ["model.source=m", "data.sources=[t]", "parallel.overlap_param_gather=true"]
    recipe = ROOT / "recipes" / "tiny" / "tiny_cpu.yaml"
    assert load_recipe(recipe, given).parallel.overlap_param_gather
    with pytest.raises(ConfigError, match=r"distill\.optimizer\.distributed = false: without the distributed"):
        load_recipe(recipe, [*given, "distill.optimizer.distributed=false"])


def test_activations_overlap_under_the_interleaved_schedule_on_gpus(monkeypatch):
    interleaved = config(GPU, monkeypatch, pipeline=2, virtual_pipeline=2)
    assert (interleaved.overlap_p2p_comm, interleaved.batch_p2p_comm) == (True, False)
    plain = config(GPU, monkeypatch, pipeline=2)
    assert (plain.overlap_p2p_comm, plain.batch_p2p_comm) == (False, True)
    off = config(GPU, monkeypatch, pipeline=2, virtual_pipeline=2, overlap_p2p_comm=False)
    assert (off.overlap_p2p_comm, off.batch_p2p_comm) == (False, True)
    on_cpu = config(CPU, monkeypatch, pipeline=2, virtual_pipeline=2)
    assert (on_cpu.overlap_p2p_comm, on_cpu.batch_p2p_comm) == (False, False)
    with pytest.raises(LayoutError, match="overlap_p2p_comm = true on a CPU"):
        config(CPU, monkeypatch, pipeline=2, virtual_pipeline=2, overlap_p2p_comm=True)


def test_fusions_are_on_where_their_kernels_are(monkeypatch):
    both = config(GPU, monkeypatch, engine=True, apex=True)
    assert (both.gradient_accumulation_fusion, both.apply_rope_fusion) == (True, True)
    no_apex = config(GPU, monkeypatch, engine=True)
    assert (no_apex.gradient_accumulation_fusion, no_apex.apply_rope_fusion) == (False, True)
    # Apex alone does not do: our own layers turn positions, and give autograd their gradients.
    ours = config(GPU, monkeypatch, apex=True)
    assert (ours.gradient_accumulation_fusion, ours.apply_rope_fusion) == (False, False)
    off = config(GPU, monkeypatch, engine=True, apex=True, gradient_accumulation_fusion=False, apply_rope_fusion=False)
    assert (off.gradient_accumulation_fusion, off.apply_rope_fusion) == (False, False)


@pytest.mark.parametrize("option", ["gradient_accumulation_fusion", "apply_rope_fusion"])
def test_a_fusion_that_is_not_there_is_refused_by_name(monkeypatch, option):
    with pytest.raises(LayoutError, match=f"parallel.{option} = true"):
        config(GPU, monkeypatch, **{option: True})


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"overlap_p2p_comm": True, "pipeline": 2}, "only the interleaved schedule"),
        ({"grad_bucket_size": 10**6, "overlap_grad_reduce": False}, "cut into buckets only to overlap"),
        ({"overlap_param_gather": True, "overlap_grad_reduce": False}, "gathered bucket by bucket"),
    ],
)
def test_options_that_do_not_go_together_are_refused(values, said):
    with pytest.raises(ValidationError, match=said):
        ParallelConfig(**values)


def test_the_distributed_optimizer_is_on_by_itself_on_gpus_with_several_replicas(monkeypatch):
    from megatron.core import parallel_state

    ranks = 2
    monkeypatch.setattr(parallel_state, "get_data_parallel_world_size", lambda **_: ranks)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert optim.is_distributed(OptimizerConfig())
    assert not optim.is_distributed(OptimizerConfig(distributed=False))
    ranks = 1
    assert not optim.is_distributed(OptimizerConfig())
    ranks = 2
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not optim.is_distributed(OptimizerConfig())
    assert optim.is_distributed(OptimizerConfig(distributed=True))


@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(tensor=2),
        ParallelConfig(
            pipeline=2,
            virtual_pipeline=2,
            overlap_grad_reduce=True,
            overlap_param_gather=True,
            grad_bucket_size=5,
            overlap_p2p_comm=False,
            gradient_accumulation_fusion=False,
            apply_rope_fusion=True,
            gc_interval=7,
        ),
    ],
)
def test_options_survive_the_way_through_a_nemo_configuration(parallel):
    assert nemo_settings.model_settings(nemo_settings.parallel_keys(parallel)).parallel == parallel


@pytest.mark.parametrize("distributed", [None, True, False])
def test_so_does_the_choice_of_the_optimizer(distributed):
    settings = OptimizerConfig(distributed=distributed)
    assert nemo_settings.model_settings({"optim": nemo_settings.optimizer_keys(settings)}).optimizer == settings


@pytest.mark.parametrize(
    ("name", "distributed"), [("adamw", None), ("fused_adam", False), ("distributed_fused_adam", True)]
)
def test_a_nemo_configuration_without_our_key_goes_by_the_name(name, distributed):
    read = nemo_settings.model_settings({"optim": {"name": name, "lr": 1e-4}})
    assert read.optimizer.distributed is distributed


def test_garbage_is_collected_at_the_given_steps_alone(monkeypatch):
    collected = []
    monkeypatch.setattr(gc, "collect", lambda: collected.append(True))
    callback, trainer = GarbageCollection(3), SimpleNamespace(global_step=0)
    callback.on_train_start(trainer, None)
    assert not gc.isenabled()
    at = []
    for trainer.global_step in range(1, 8):
        collected.clear()
        callback.on_train_batch_end(trainer, None, None, None, 0)
        if collected:
            at.append(trainer.global_step)
    assert at == [3, 6]
    callback.on_exception(trainer, None, KeyboardInterrupt())
    assert gc.isenabled()


@pytest.mark.parametrize(
    ("wanted", "on_gpu", "ranks", "steps"),
    [(None, True, 8, 100), (None, True, 1, 0), (None, False, 8, 0), (5, False, 1, 5)],
)
def test_garbage_is_ours_on_several_gpus(wanted, on_gpu, ranks, steps):
    assert interval_of(wanted, on_gpu=on_gpu, ranks=ranks) == steps


def test_a_micro_batch_is_pinned_part_by_part(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: (pinned.append(x.shape), x)[1])
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    batch = MicroBatch.of(tokens, tokens, tokens.bool())
    assert torch.equal(batch.pin_memory().tokens, tokens)
    assert pinned == [(2, 3)] * 4


def fp8_config(monkeypatch, spec, *, engine, precision=Precision.BF16):
    """The configuration of a teacher's chunk; building stops there."""

    class BuiltError(Exception):
        pass

    found = []

    def stop(spec, runtime, made, virtual):
        found.append(made)
        raise BuiltError

    monkeypatch.setattr(build, "engine_carries", lambda spec, where, precision: engine)
    monkeypatch.setattr(build, "_build_chunk", stop)
    here = running(CPU)
    with pytest.raises(BuiltError):
        build.build_chunks(spec, here, precision, trainable=False, fp8=True)
    return found[0]


def test_a_teacher_in_fp8_scales_each_tensor_by_its_own_maximum(monkeypatch):
    sizes = SPECS["tied"].with_sizes(hidden_size=32, ffn_hidden_size=64)
    monkeypatch.setattr(build, "_fused_rope", lambda *_, **__: False)
    monkeypatch.setattr(build, "_fused_accumulation", lambda *_, **__: False)
    made = fp8_config(monkeypatch, sizes, engine=True)
    assert (made.fp8, made.fp8_recipe) == ("hybrid", "tensorwise")


def test_fp8_is_refused_where_it_cannot_be(monkeypatch):
    even = SPECS["tied"].with_sizes(hidden_size=32, ffn_hidden_size=64)
    with pytest.raises(LayoutError, match="teacher_fp8 = true"):
        fp8_config(monkeypatch, even, engine=False)
    with pytest.raises(LayoutError, match="precision bf16"):
        fp8_config(monkeypatch, even, engine=True, precision=Precision.FP32)
    for mixed in (EXPERT_SPECS["alike"], FAMILY_SPECS["nemotron_h"]):
        with pytest.raises(LayoutError, match="with experts or Mamba"):
            fp8_config(monkeypatch, mixed, engine=True)
    with pytest.raises(LayoutError, match=r"FFN \[36\]"):
        fp8_config(monkeypatch, SPECS["tied"].with_sizes(hidden_size=32), engine=True)


def test_the_recipe_s_choice_of_fp8_reaches_the_teacher(tmp_path):
    assert DistillConfig(teacher_fp8=True).with_teacher(tmp_path).teacher_fp8
    assert not DistillConfig().with_teacher(tmp_path).teacher_fp8


def test_the_nemo_launcher_passes_options_on_beside_the_objective(tmp_path):
    given = ["model.source=m", "data.sources=[t]", "parallel.overlap_grad_reduce=true", "distill.guard.spike_factor=9"]
    config = load_recipe(ROOT / "recipes" / "tiny" / "tiny_cpu.yaml", given)
    model = nemo_launcher._distill(config, tmp_path)["model"]
    read = SettingsReader(model, also=("student", "data", "validation_samples")).settings()
    assert read.parallel == config.parallel
    assert read.guard == config.distill.guard
    assert read.guard.spike_factor == 9
    assert read.distillation == config.distill.with_teacher(tmp_path / "stages/import/teacher")


@pytest.mark.parametrize(
    ("spec", "device", "precision", "engine"),
    [
        ("tied", GPU, Precision.BF16, True),
        ("tied", GPU, Precision.FP32, False),
        ("tied", CPU, Precision.BF16, False),
        ("windowed", GPU, Precision.BF16, False),
    ],
)
def test_which_models_are_made_of_the_engine_s_layers(spec, device, precision, engine, monkeypatch):
    """It computes attention in 16 bits; in fp32 it would keep all scores."""
    monkeypatch.setattr(build, "use_transformer_engine", lambda: True)
    model = SPECS["tied"]
    if spec == "windowed":
        model = replace(model, sliding_window=8, layers=tuple(layer.looking_back(local=True) for layer in model.layers))
    assert build.engine_carries(model, device, precision) is engine


@pytest.mark.parametrize(("kind", "least"), [("cpu", 1e7), ("cuda", 1e11)])
def test_products_that_choose_a_precision_take_longer_than_their_launch(kind, least):
    """A launch takes some microseconds, in which a GPU multiplies and adds 1e9 times in bf16."""
    assert 2 * math.prod(product_speed._shape(torch.device(kind))) > least


def test_a_batch_is_cut_as_every_model_that_reads_it_asks(monkeypatch):
    """A student in fp32 is of our own layers, and its teacher in bf16 of the engine's, which takes documents apart."""
    student, teacher = (SimpleNamespace(from_engine=engine) for engine in (False, True))
    asked = []
    monkeypatch.setattr(forward, "cut", lambda batch, size, chunks: asked.append(chunks) or [])
    model = object.__new__(MegatronGPTDistillationModel)
    provider = SimpleNamespace(teacher=SimpleNamespace(chunks=[teacher]))
    settings = SimpleNamespace(batch=SimpleNamespace(micro_batch_size=2))
    vars(model).update(chunks=[student], _provider=[provider], spec=SPECS["tied"], settings=settings)
    model.micro_batches(MicroBatch.of(*(torch.zeros(2, 8, dtype=torch.long),) * 2, torch.ones(2, 8, dtype=torch.bool)))
    assert asked == [[student, teacher]]
