"""Qwen3-30B-A3B and Nemotron 3 Nano in their real shapes: planned without weights, a layer pruned expert by expert."""

import threading
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from nemo_minitron.arch.axes import Axis
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.arch.weights import parameter_count, weight_named, weights
from nemo_minitron.checkpoints.hf import read_architecture, write_hf
from nemo_minitron.cli.recipes import find
from nemo_minitron.config.load import load_recipe
from nemo_minitron.config.parallel import ParallelConfig, Precision
from nemo_minitron.megatron.meta import build_on_meta
from nemo_minitron.pruning.apply import PrunedSource
from nemo_minitron.pruning.build import random_plan

RECIPE = find("qwen3_30b_a3b_to_22b_width_64gpu_h100")
NEMOTRON = find("nemotron3_nano_30b_a3b_to_22b_width_32gpu_h100")


class Drawn:
    """Tensors of real shapes whose elements say where they are; counts how many bytes of them are alive at a time."""

    def __init__(self, spec: ModelSpec, family: str) -> None:
        self.spec, self.family, self.dtype = spec, family, torch.bfloat16
        self.lineage: dict[str, Any] = {"base_model": "a/b", "license": None}
        self.alive = self.most = 0
        self._lock = threading.RLock()

    def names(self) -> tuple[str, ...]:
        return tuple(weight.name for weight in weights(self.spec))

    def get(self, name: str) -> Tensor:
        shape = weight_named(self.spec, name).shape
        rows = torch.arange(shape[0]).remainder(251).to(torch.bfloat16)
        tensor = rows.view(-1, *[1] * (len(shape) - 1)).expand(shape).contiguous()
        nbytes = tensor.numel() * tensor.element_size()
        with self._lock:
            self.alive += nbytes
            self.most = max(self.most, self.alive)
        weakref.finalize(tensor, self._gone, nbytes)
        return tensor

    def tokenizer_files(self) -> dict[str, bytes]:
        return {}

    def _gone(self, nbytes: int) -> None:
        with self._lock:
            self.alive -= nbytes


def test_the_complete_model_is_planned_and_built_without_weights() -> None:
    config = load_recipe(RECIPE, [])
    teacher = read_architecture(Path(config.model.architecture))
    plan = random_plan(config.target, teacher, seed=0)
    student = plan.student
    assert (len(student.layers), student.layer.moe.num_experts) == (48, 96)
    assert parameter_count(student) == 22_375_249_920
    (chunk,) = build_on_meta(replace(student, layers=student.layers[:2]), ParallelConfig(expert=8), 0, Precision.BF16)
    assert all(parameter.is_meta for parameter in chunk.parameters())
    assert len(chunk.decoder.layers[0].mlp.experts.local_experts) == 12


def test_a_complete_hybrid_is_planned_and_built_without_weights() -> None:
    config = load_recipe(NEMOTRON, [])
    teacher = read_architecture(Path(config.model.architecture))
    student = random_plan(config.target, teacher, seed=0).student
    assert (student.kinds, student.hidden_size) == ({"mamba": 23, "attention": 6, "moe": 23}, 2304)
    assert parameter_count(student) == 22_276_867_992
    (chunk,) = build_on_meta(replace(student, layers=student.layers[:2]), ParallelConfig(expert=8), 0, Precision.BF16)
    assert all(parameter.is_meta for parameter in chunk.parameters())
    assert len(chunk.decoder.layers[1].mlp.experts.local_experts) == 13


def test_a_layer_of_experts_alone_is_pruned_expert_by_expert(tmp_path: Path) -> None:
    """In the real shapes of 16 of its 128 experts."""
    config = load_recipe(NEMOTRON, [])
    teacher = read_architecture(Path(config.model.architecture))
    layer = replace(teacher.layers[1], feed_forward=replace(teacher.layers[1].moe, num_experts=16))
    sample = replace(teacher, layers=(layer,), vocab_size=1024)
    source = Drawn(sample, "nemotron_h")
    plan = random_plan(config.target.model_copy(update={"num_experts": 13}), sample, seed=0)
    write_hf(PrunedSource(source, plan), tmp_path / "student")
    of_expert = sum(weight.numel for weight in weights(sample) if weight.expert == 0) * 2
    largest = max(weight.numel for weight in weights(sample)) * 2
    assert source.most <= 2 * of_expert + 2 * largest  # the reader is two tensors ahead
    neurons = [neuron % 251 for neuron in plan.layers[0].kept[Axis.SHARED_FFN]]
    with safe_open(tmp_path / "student" / "model.safetensors", framework="pt") as file:
        shared = file.get_tensor("backbone.layers.0.mixer.shared_experts.up_proj.weight")
        assert tuple(shared.shape) == (3072, 2304)
        assert shared[:, 0].tolist() == neurons
        last = file.get_tensor("backbone.layers.0.mixer.experts.12.down_proj.weight")
        assert tuple(last.shape) == (2304, 1856)
        assert last[:, 0].tolist() == [channel % 251 for channel in plan.hidden]


@pytest.mark.slow
def test_a_layer_in_its_real_shapes_is_pruned_expert_by_expert(tmp_path: Path) -> None:
    config = load_recipe(RECIPE, [])
    teacher = read_architecture(Path(config.model.architecture))
    sample = replace(teacher, layers=teacher.layers[:1], vocab_size=1024)
    source = Drawn(sample, "qwen3_moe")
    plan = random_plan(config.target, sample, seed=0)
    write_hf(PrunedSource(source, plan), tmp_path / "student")
    of_expert = sum(weight.numel for weight in weights(sample) if weight.expert == 0) * 2
    largest = max(weight.numel for weight in weights(sample)) * 2
    assert source.most <= 2 * of_expert + 2 * largest  # the reader is two tensors ahead
    assert source.most < parameter_count(sample) * 2 / 20
    kept = plan.layers[0].kept
    with safe_open(tmp_path / "student" / "model.safetensors", framework="pt") as file:
        for place in (0, 50, 95):
            expert = kept[Axis.EXPERT][place]
            neurons = [unit - expert * 768 for unit in kept[Axis.EXPERT_FFN] if unit // 768 == expert]
            gate = file.get_tensor(f"model.layers.0.mlp.experts.{place}.gate_proj.weight")
            up = file.get_tensor(f"model.layers.0.mlp.experts.{place}.up_proj.weight")
            assert tuple(gate.shape) == (736, 2048)
            assert gate[:, 0].tolist() == [neuron % 251 for neuron in neurons]
            assert up[:, -1].tolist() == [(768 + neuron) % 251 for neuron in neurons]
