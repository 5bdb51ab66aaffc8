"""Offloaded layers: home outside the block, on the device inside, the same numbers, never with gradients."""

import pytest
import torch

from nemo_minitron.arch.layer import transformer_layer
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.config.parallel import ParallelConfig, Precision
from nemo_minitron.megatron import runtime
from nemo_minitron.megatron.build import build_chunks
from nemo_minitron.megatron.forward import MicroBatch, collect_hidden
from nemo_minitron.megatron.offload import OffloadedLayers

SPEC = ModelSpec(
    vocab_size=64,
    hidden_size=24,
    head_dim=8,
    layers=(transformer_layer(num_attention_heads=6, num_query_groups=2, ffn_hidden_size=36),) * 2,
    max_position_embeddings=128,
)


@pytest.fixture
def here():
    yield runtime.start(ParallelConfig(), seed=1)
    runtime.stop()


def test_layers_leave_and_return_and_change_no_number(here):
    chunks = build_chunks(SPEC, here, Precision.FP32, trainable=False, seed=3)
    tokens = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))
    batch = [MicroBatch.of(tokens, tokens, torch.ones_like(tokens, dtype=torch.bool))]
    expected = collect_hidden(chunks, batch, here)[0]

    offloaded = OffloadedLayers(chunks, here.device)
    layers = dict(chunks[0].decoder.layers.named_parameters())
    homes = {name: parameter.data_ptr() for name, parameter in layers.items()}
    with offloaded.on_device():
        assert not set(homes.values()) & {parameter.data_ptr() for parameter in layers.values()}
        found = collect_hidden(chunks, batch, here)[0]
    assert homes == {name: parameter.data_ptr() for name, parameter in layers.items()}
    assert torch.equal(found, expected)


def test_the_rest_of_the_model_stays(here):
    chunks = build_chunks(SPEC, here, Precision.FP32, trainable=False, seed=3)
    before = chunks[0].output_weight().data_ptr()
    with OffloadedLayers(chunks, here.device).on_device():
        assert chunks[0].output_weight().data_ptr() == before


def test_weights_in_training_are_refused(here):
    with pytest.raises(ValueError, match="frozen"):
        OffloadedLayers(build_chunks(SPEC, here, Precision.FP32, seed=3), here.device)


def test_layers_return_when_the_pass_fails(here):
    chunks = build_chunks(SPEC, here, Precision.FP32, trainable=False, seed=3)
    offloaded = OffloadedLayers(chunks, here.device)
    parameter = next(chunks[0].decoder.layers.parameters())
    home = parameter.data_ptr()
    with pytest.raises(RuntimeError), offloaded.on_device():
        raise RuntimeError
    assert parameter.data_ptr() == home
