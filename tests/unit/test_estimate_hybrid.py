"""What the estimate says of layers that lack a part or have Mamba, against what their forward pass keeps."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from nemo_minitron.arch.layer import LayerSpec, Mamba, Moe, transformer_layer
from nemo_minitron.arch.spec import Activation, ModelSpec
from nemo_minitron.checkpoints.hf import read_architecture
from nemo_minitron.cli import recipes
from nemo_minitron.config.load import load_recipe
from nemo_minitron.config.parallel import ParallelConfig, Precision
from nemo_minitron.estimate.activations import Pass, layer_activations
from nemo_minitron.estimate.compute import forward_flops
from nemo_minitron.estimate.work import Work, work_of
from nemo_minitron.megatron import functional
from nemo_minitron.megatron.build import build_chunks
from nemo_minitron.megatron.runtime import Runtime
from nemo_minitron.pruning.rounds import round_specs
from tests.support.kept_memory import kept_bytes

BOTH = transformer_layer(num_attention_heads=8, num_query_groups=2, ffn_hidden_size=640)
MAMBA = Mamba(mamba_num_heads=16, mamba_head_dim=32, mamba_state_dim=32, mamba_num_groups=4, chunk_size=64)
LAYERS = {
    "attention": BOTH.without("feed_forward"),
    "mlp": BOTH.without("mixer"),
    "mamba": LayerSpec(mixer=MAMBA, feed_forward=None),
    "experts": LayerSpec(mixer=None, feed_forward=Moe(num_experts=8, expert_ffn_hidden_size=192, top_k=2)),
    "mamba, other sizes": LayerSpec(
        mixer=replace(MAMBA, mamba_num_heads=8, mamba_state_dim=64, chunk_size=128), feed_forward=None
    ),
}
TOKENS = 256


def kept(layer: LayerSpec, here: Runtime) -> tuple[int, ModelSpec]:
    """Bytes of the different tensors that a layer's forward pass keeps, its weights aside."""
    spec = ModelSpec(
        vocab_size=64,
        hidden_size=256,
        head_dim=32,
        layers=(layer,),
        max_position_embeddings=512,
        activation=Activation.SQUARED_RELU,
        rotary_percent=0.0,
    )
    (chunk,) = build_chunks(spec, here, Precision.FP32, seed=0)
    return kept_bytes(chunk, TOKENS), spec


def test_operations_of_a_token_by_hand() -> None:
    """Each weight of the projections and of the output layer twice; the state in and out; half a chunk of scores."""
    spec = ModelSpec(
        vocab_size=64, hidden_size=256, head_dim=32, layers=(LAYERS["mamba"], BOTH), max_position_embeddings=512
    )
    inner, maps = 16 * 32, 4 * 32
    mamba = 2 * (256 * (2 * inner + 2 * maps + 16) + inner * 256) + 4 * inner * 32 + 2 * (inner + maps) * 32
    attention = 2 * (256 * 12 * 32 + 8 * 32 * 256) + 4 * 8 * 32 * 100 / 2
    mlp = 2 * 3 * 256 * 640  # gated
    assert forward_flops(spec, 100) == mamba + attention + mlp + 2 * 64 * 256


@pytest.mark.parametrize("name", LAYERS)
def test_what_a_layer_keeps_for_the_backward_pass(name: str, here: Runtime) -> None:
    measured, spec = kept(LAYERS[name], here)
    step = Pass(
        parallel=ParallelConfig(),
        precision=Precision.FP32,
        micro_batch_size=1,
        sequence_length=TOKENS,
        micro_batches=1,
        engine=False,
        gpu=False,
    )
    assert layer_activations(spec, spec.layers[0], step) == pytest.approx(measured, rel=0.1)


def planned(name: str, *changes: str) -> Work:
    """The distillation of a recipe with a cluster."""
    path = recipes.find(name)
    config = load_recipe(path, list(changes))
    teacher = read_architecture(path.parent / config.model.architecture)
    students = round_specs(config.target, teacher, config.rounds)
    work = work_of("distill", 1, config, teacher, students, ranks=config.cluster.gpus)
    assert work is not None
    return work


@pytest.mark.parametrize(
    "name",
    [
        *("llama31_8b_to_4b_width_256gpu_h100", "nemotron_h_8b_to_4b_width_256gpu_h100"),
        "qwen3_30b_a3b_to_22b_width_64gpu_h100",
    ],
)
def test_layers_on_a_cluster_are_transformer_engine_s(name: str) -> None:
    step = planned(name).training.step
    assert (step.engine, step.gpu) == (True, True)


@pytest.mark.parametrize("trait", ["windows", "norms behind", "norms over all heads"])
def test_layers_that_it_does_not_carry_are_ours_on_a_cluster_too(trait: str) -> None:
    path = recipes.find("llama31_8b_to_4b_width_256gpu_h100")
    config = load_recipe(path)
    teacher = read_architecture(path.parent / config.model.architecture)
    local = tuple(layer.looking_back(local=True) for layer in teacher.layers)
    changes: dict[str, dict[str, Any]] = {
        "windows": {"layers": local, "sliding_window": 1024},
        "norms behind": {"post_norms": True},
        "norms over all heads": {"qk_norm": True, "full_width_qk_norm": True},
    }
    other = replace(teacher, **changes[trait])
    work = work_of("distill", 1, config, other, (other,), ranks=config.cluster.gpus)
    assert work is not None
    step = work.training.step
    assert (step.engine, step.gpu) == (False, True)


def test_our_layers_on_a_gpu_keep_no_scores_and_what_their_fused_kernels_keep() -> None:
    """By hand, bytes of a token in bf16: norm, q, k, v, rotated q and k, q again, output; no scores, no chunks."""
    step = Pass(
        parallel=ParallelConfig(),
        precision=Precision.BF16,
        micro_batch_size=1,
        sequence_length=TOKENS,
        micro_batches=1,
        engine=False,
    )
    spec = ModelSpec(vocab_size=64, hidden_size=256, head_dim=32, layers=(BOTH,), max_position_embeddings=512)
    attention, keys = 8 * 32, 2 * 32
    mixer = 2 * (2 * 256) + 4 + 2 * (attention + 2 * keys + attention + keys + attention + attention) + 4 * 8
    mlp = 2 * (2 * 256) + 4 + 2 * 4 * 640  # gate and up, the gate's SiLU, their product
    assert layer_activations(spec, BOTH, step) == TOKENS * (mixer + mlp)
    mamba = replace(spec, layers=(LAYERS["mamba"],))
    on_cpu = replace(step, gpu=False)
    assert layer_activations(mamba, LAYERS["mamba"], step) < 0.5 * layer_activations(mamba, LAYERS["mamba"], on_cpu)


def test_the_fused_attention_of_our_layers_keeps_what_is_estimated() -> None:
    """The branch that a GPU takes, run here: PyTorch's fused kernel keeps queries, keys, values, and its output."""
    groups, heads, width, length = 2, 8, 32, 64
    qkv = torch.randn(length, 1, (heads + 2 * groups) * width, requires_grad=True)
    angles = torch.rand(length, 1, 1, width)
    found: dict[int, int] = {}
    saved = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        saved.append(tensor)
        return tensor

    tables = functional.rotary_tables(angles, torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        x = functional._heads_first(qkv, groups, width)
        how = functional._How(groups, width, width**-0.5, None, None)
        out = functional._fused_attention(functional._rotate(x[:, :-1], *tables), x[:, -1], 1, how)
    assert out.shape == (length, 1, heads * width)
    for table in tables:
        found.pop(table.untyped_storage().data_ptr(), None)
    kept = sum(found.values()) / length
    step = Pass(
        parallel=ParallelConfig(),
        precision=Precision.FP32,
        micro_batch_size=1,
        sequence_length=length,
        micro_batches=1,
        engine=False,
    )
    spec = ModelSpec(vocab_size=64, hidden_size=256, head_dim=width, layers=(BOTH,), max_position_embeddings=512)
    attention = BOTH.without("feed_forward")
    outside = 2 * 4 * 256 + 4  # the norm's input, the linear's, and a number of the norm
    assert layer_activations(spec, attention, step) / length - outside == pytest.approx(kept, rel=0.05)
