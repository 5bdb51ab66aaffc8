"""What the estimate says of layers that lack a part or have Mamba, against what their forward pass keeps."""

from dataclasses import replace

import pytest
import torch

from nemo_minitron.arch.layer import LayerSpec, Mamba, transformer_layer
from nemo_minitron.arch.spec import Activation, ModelSpec
from nemo_minitron.config.parallel import ParallelConfig, Precision
from nemo_minitron.estimate.activations import Pass, layer_activations
from nemo_minitron.estimate.compute import forward_flops
from nemo_minitron.megatron.build import build_chunks
from nemo_minitron.megatron.runtime import Runtime

BOTH = transformer_layer(num_attention_heads=8, num_query_groups=2, ffn_hidden_size=640)
MAMBA = Mamba(mamba_num_heads=16, mamba_head_dim=32, mamba_state_dim=32, mamba_num_groups=4, chunk_size=64)
LAYERS = {
    "attention": BOTH.without("feed_forward"),
    "mlp": BOTH.without("mixer"),
    "mamba": LayerSpec(mixer=MAMBA, feed_forward=None),
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
    block = chunk.decoder.layers[0]
    weights = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
    found: dict[int, int] = {}
    saved = []  # alive, so that no address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        saved.append(tensor)
        return tensor

    x_SBH = torch.randn(TOKENS, 1, 256, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        block(hidden_states=x_SBH, attention_mask=None, rotary_pos_emb=chunk.rotary_pos_emb(TOKENS))
    return sum(found.values()), spec


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
    )
    assert layer_activations(spec, spec.layers[0], step) == pytest.approx(measured, rel=0.1)
