"""What ranks do in the tests of Mamba under context parallelism: one mixer, its values and all of its gradients."""

from itertools import chain, repeat
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from nemo_minitron.arch.layer import LayerSpec, Mamba
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.config.parallel import ParallelConfig, Precision
from tests.support.emulation import split_angles_on_cpu
from tests.support.kept_memory import kept_bytes

SAMPLES, LENGTH, HIDDEN = 2, 24, 10


def spec_of(mamba: Mamba, hidden: int = HIDDEN) -> ModelSpec:
    return ModelSpec(
        vocab_size=96,
        hidden_size=hidden,
        head_dim=8,
        layers=(LayerSpec(mixer=mamba, feed_forward=None),),
        max_position_embeddings=4096,
        rotary_percent=0.0,
    )


def build(spec: ModelSpec, here: Any) -> Any:
    """This rank's part of a model of the project's own layers.

    A layout that splits positions is refused without Transformer Engine, on account of attention, which is not here.
    The first question is the refusal's, the others choose the layers.
    """
    from nemo_minitron.megatron import build

    answers = chain([here.parallel.context > 1], repeat(False))
    with patch.object(build, "engine_carries", side_effect=answers):
        (chunk,) = build.build_chunks(spec, here, Precision.FP32, seed=0)
    return chunk


def mix(cases: list[Mamba], parallel: ParallelConfig, kernels: bool = False) -> list[dict[str, Any]]:
    """Of each mixer what its rank computes in float64, and sums of gradients over copies of the weights."""
    from nemo_minitron.megatron import mamba, runtime

    if kernels:
        from tests.support import mamba_kernels

        mamba_kernels.install()
        mamba.kernels.run = lambda device, dtype, *, taps: True
    here = runtime.start(parallel, seed=0)
    found = [_mixed(spec_of(case), here) for case in cases]
    if kernels:
        assert len(mamba_kernels.CALLS) == 2 * len(cases)
    runtime.stop()
    return found


def _mixed(spec: ModelSpec, here: Any) -> dict[str, Any]:
    from nemo_minitron.megatron.forward import context_places
    from nemo_minitron.megatron.placement import local_shard

    chunk = build(spec, here).double()
    mixer = chunk.decoder.layers[0].self_attention
    inside = {id(parameter) for parameter in mixer.parameters()}
    named = ((weight, parameter) for weight, parameter in chunk.named_weights() if id(parameter) in inside)
    weights = {weight.name: (weight, parameter) for weight, parameter in named}
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name in sorted(weights):
            weight, parameter = weights[name]
            whole = torch.randn(weight.shape, generator=generator, dtype=torch.float64) / 2
            parameter.copy_(local_shard(weight, whole, spec, rank=here.tp_rank, size=here.parallel.tensor))
    x, scale = torch.randn(2, LENGTH, SAMPLES, spec.hidden_size, generator=generator, dtype=torch.float64)
    places = context_places(LENGTH, here.cp_rank, here.parallel.context)
    samples = range(here.dp_rank, SAMPLES, here.dp_size)
    x, scale = (each[places][:, samples].requires_grad_(each is x) for each in (x, scale))
    out, _ = mixer(x)
    (out * scale).sum().backward()
    grads = {name: parameter.grad.clone() for name, (_, parameter) in weights.items()}
    for grad in grads.values():
        dist.all_reduce(grad, group=here.groups.dp_cp)
    return {
        "places": places,
        "samples": list(samples),
        "tp": here.tp_rank,
        "out": out.detach(),
        "x": x.grad,
        "grads": grads,
    }


def kept(mamba: Mamba, length: int, parallel: ParallelConfig) -> int:
    """Bytes that a layer with a mixer keeps for the backward pass of one sample."""
    from nemo_minitron.megatron import runtime

    here = runtime.start(parallel, seed=0)
    split_angles_on_cpu()
    chunk = build(spec_of(mamba, 256), here)
    size = kept_bytes(chunk, length // parallel.context)
    runtime.stop()
    return size
