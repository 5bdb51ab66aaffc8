"""A Mamba mixer whose positions are split: values, gradients and memory are those of one rank."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from nemo_minitron.arch.layer import Mamba
from nemo_minitron.arch.weights import weight_named
from nemo_minitron.config.parallel import ParallelConfig, Precision
from nemo_minitron.estimate.activations import Pass, layer_activations
from nemo_minitron.megatron.placement import local_shard
from tests.parallel.mamba_context_jobs import kept, mix, spec_of
from tests.ranks import run_on_ranks
from tests.tolerances import TOL


def sized(heads: int, groups: int, *, channels: int = 6, state: int = 5, **traits: Any) -> Mamba:
    return Mamba(
        mamba_num_heads=heads,
        mamba_num_groups=groups,
        mamba_head_dim=channels,
        mamba_state_dim=state,
        chunk_size=7,
        **traits,
    )


CASES = {
    "a group a rank": sized(8, 4),
    "ranks that share groups": sized(16, 2, state=3, conv_bias=False),
    "one group": sized(4, 1, channels=1, dt_min=0.7),
    "groups that no rank has alone": sized(12, 3, channels=5, conv_kernel=2),
    "even groups": sized(24, 12, channels=2, state=2),
}
LAYOUTS = {
    "CP4": (ParallelConfig(context=4), tuple(CASES)),
    "CP2 DP2": (ParallelConfig(context=2), tuple(CASES)),
    "TP2 CP2": (ParallelConfig(tensor=2, context=2), ("a group a rank", "ranks that share groups", "even groups")),
}


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Any]]:
    ((*found,),) = run_on_ranks(1, mix, list(CASES.values()), ParallelConfig())
    return dict(zip(CASES, found, strict=True))


def assert_is_part_of(rank: dict[str, Any], whole: dict[str, Any], case: str, tensor: int) -> None:
    spec = spec_of(CASES[case])
    for name in ("out", "x"):
        torch.testing.assert_close(rank[name], whole[name][rank["places"]][:, rank["samples"]], **TOL[torch.float64])
    assert rank["grads"].keys() == whole["grads"].keys()
    for name, grad in whole["grads"].items():
        shard = local_shard(weight_named(spec, name), grad, spec, rank=rank["tp"], size=tensor)
        assert shard.abs().max() > 1e-3, "something is to be compared"
        torch.testing.assert_close(rank["grads"][name], shard, **TOL[torch.float64], msg=lambda t, n=name: f"{n}: {t}")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_and_gradients_are_those_of_one_rank(layout: str, alone: dict[str, dict[str, Any]]) -> None:
    parallel, names = LAYOUTS[layout]
    for rank in run_on_ranks(4, mix, [CASES[name] for name in names], parallel):
        for name, found in zip(names, rank, strict=True):
            assert_is_part_of(found, alone[name], name, parallel.tensor)


def test_the_kernels_of_a_gpu_scan_the_same_heads(alone: dict[str, dict[str, Any]]) -> None:
    names = ("a group a rank", "groups that no rank has alone")
    for rank in run_on_ranks(2, mix, [CASES[name] for name in names], ParallelConfig(context=2), True):
        for name, found in zip(names, rank, strict=True):
            assert_is_part_of(found, alone[name], name, 1)


@pytest.mark.parametrize("groups", [4, 1], ids=["groups apart", "one group"])
def test_a_rank_keeps_what_is_estimated(groups: int) -> None:
    """Of all positions its heads, and the maps of a group that two ranks share.

    The estimate has what arrives, too, which a GPU's convolution keeps, and the one in plain torch only as it pads it.
    """
    mamba = replace(sized(16, groups, channels=32, state=64), chunk_size=64)
    layout, length = ParallelConfig(context=2), 512
    step = Pass(
        parallel=layout,
        precision=Precision.FP32,
        micro_batch_size=1,
        sequence_length=length,
        micro_batches=1,
        engine=False,
        gpu=False,
    )
    spec = spec_of(mamba, 256)
    estimate = layer_activations(spec, spec.layers[0], step)
    assert all(0.85 * estimate < found < 1.05 * estimate for found in run_on_ranks(2, kept, mamba, length, layout))
