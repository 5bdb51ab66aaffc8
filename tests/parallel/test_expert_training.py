"""Mixtures of experts on several ranks: training, gradients of routers, and training states are one rank's."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_minitron.arch.weights import weight_named, weights
from nemo_minitron.config.parallel import ParallelConfig, Recompute
from nemo_minitron.megatron.placement import local_shard
from tests.parallel.expert_jobs import cut_with_documents
from tests.parallel.megatron_jobs import EXPERT_SPECS, STEPS, Case, train_all
from tests.ranks import RankError, run_on_ranks

EP2, TP2, PP2 = ParallelConfig(expert=2), ParallelConfig(tensor=2), ParallelConfig(pipeline=2)
PP2_VPP2 = ParallelConfig(pipeline=2, virtual_pipeline=2)
TP2_EP2, PP2_EP2 = ParallelConfig(tensor=2, expert=2), ParallelConfig(pipeline=2, expert=2)
LAYOUTS = {
    "EP2": (2, Case("experts", EP2)),
    "EP2, micro-batches of 2, alike": (2, Case("alike", EP2, micro_batch_size=2)),
    "EP2 distributed optimizer": (2, Case("experts", EP2, distributed=True)),
    "EP2 recomputed": (2, Case("experts", ParallelConfig(expert=2, recompute=Recompute.SELECTIVE))),
    "TP2": (2, Case("experts", TP2, micro_batch_size=2)),
    "PP2": (2, Case("experts", PP2)),
    "PP2, experts on the second stage alone": (2, Case("late", PP2)),
    "PP2 VPP2, experts in the second chunks alone": (2, Case("late", PP2_VPP2)),
    "DP2": (2, Case("experts", micro_batch_size=2)),
    "TP2, norms over all heads": (2, Case("olmoe", TP2, micro_batch_size=2)),
    "PP2, norms over all heads": (2, Case("olmoe", PP2)),
    "TP2 EP2, norms over all heads": (4, Case("olmoe", TP2_EP2)),
    "EP2, a hybrid": (2, Case("hybrid", EP2)),
    "EP2, a hybrid recomputed": (2, Case("hybrid", ParallelConfig(expert=2, recompute=Recompute.SELECTIVE))),
    "TP2, a hybrid": (2, Case("hybrid", TP2, micro_batch_size=2)),
    "PP2, a hybrid": (2, Case("hybrid", PP2)),
    "DP2, a hybrid, distributed optimizer": (2, Case("hybrid", distributed=True)),
    "TP2 EP2": (4, Case("experts", TP2_EP2, micro_batch_size=2)),
    "PP2 EP2, a hybrid": (4, Case("hybrid", PP2_EP2)),
    "PP2 EP2": (4, Case("experts", PP2_EP2)),
    "PP2 EP2, experts on the second stage alone": (4, Case("late", PP2_EP2, distributed=True)),
    "EP2 in DP4": (4, Case("experts", EP2, distributed=True)),
}


@cache
def _runs(world_size: int) -> dict[str, list[dict[str, Any]]]:
    """Every case of a world size in one start of the ranks; 0 stands for the plain runs they are compared with."""
    cases = {name: case for name, (size, case) in LAYOUTS.items() if size == world_size}
    cases = cases or {name: Case(name) for name in EXPERT_SPECS}
    results = run_on_ranks(max(world_size, 1), train_all, list(cases.values()))
    return {name: [rank[index] for rank in results] for index, name in enumerate(cases)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_is_the_same_at_every_layout(layout: str) -> None:
    world_size, case = LAYOUTS[layout]
    (alone,) = _runs(0)[case.spec]
    spec = EXPERT_SPECS[case.spec]
    assert alone["losses"][-1] < alone["losses"][0]
    ranks = _runs(world_size)[layout]
    for rank in ranks:
        torch.testing.assert_close(rank["losses"], alone["losses"], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(rank["norms"], alone["norms"], rtol=1e-5, atol=1e-6)
        for name, mine in rank["weights"].items():
            whole = alone["weights"][name]
            part = local_shard(weight_named(spec, name), whole, spec, rank=rank["tp"], size=case.parallel.tensor)
            torch.testing.assert_close(mine, part, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
        if not case.distributed:  # which leaves every rank a part of the sum
            for name, grad in rank["router_grads"].items():
                expected = alone["router_grads"][name]
                largest = float(expected.abs().max())
                assert largest > 1e-5
                torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5 * largest)
    assert {name for rank in ranks for name in rank["weights"]} == {weight.name for weight in weights(spec)}


def test_a_training_state_goes_on_with_experts_elsewhere(tmp_path: Path) -> None:
    """Written at EP2, read at one rank, at TP2 and at EP2; written at one rank, read at EP2.

    And with norms over all heads, whose weights are split: written at TP2, read at one rank.
    """
    cases = [Case("experts", EP2, save=tmp_path / "two"), Case("olmoe", TP2, save=tmp_path / "split")]
    (written, split), _ = run_on_ranks(2, train_all, cases)
    ((written_alone, read_alone, split_alone),) = run_on_ranks(
        1,
        train_all,
        [
            Case("experts", save=tmp_path / "one"),
            Case("experts", load=tmp_path / "two"),
            Case("olmoe", load=tmp_path / "split"),
        ],
    )
    for key in ("losses", "norms"):
        torch.testing.assert_close(split_alone[key], split[key][STEPS // 2 :], rtol=1e-5, atol=1e-6)
    readers = [
        Case("experts", EP2, load=tmp_path / "one"),
        Case("experts", EP2, load=tmp_path / "two"),
        Case("experts", TP2, load=tmp_path / "two"),
    ]
    rest = [result for rank in run_on_ranks(2, train_all, readers) for result in rank]
    for result in (read_alone, *rest):
        for key in ("losses", "norms"):
            torch.testing.assert_close(result[key], written_alone[key][STEPS // 2 :], rtol=1e-5, atol=1e-6)
    assert written["losses"] == pytest.approx(written_alone["losses"], rel=1e-6)


def clipped_as_on_a_gpu(case: Case) -> tuple[dict[str, Any], int]:
    """A training whose kernel for scaling refuses lists without tensors, as those of Transformer Engine and Apex do.

    Returns:
        What `train_all` returns of it, and how often gradients were scaled.
    """
    from megatron.core.optimizer import clip_grads

    apply, counts = clip_grads.multi_tensor_applier, []

    def applied(operation: Any, overflow: Any, lists: list[list[torch.Tensor]], *args: Any) -> Any:
        if operation is clip_grads.multi_tensor_scale_impl:
            assert all(lists), "tensor_lists[0].size() is not > 0"
            counts.append(len(lists[0]))
        return apply(operation, overflow, lists, *args)

    clip_grads.multi_tensor_applier = applied
    [result] = train_all([case])
    return result, len(counts)


def test_a_stage_without_experts_clips_what_it_has() -> None:
    """Megatron gives every stage an optimizer of experts, that of the middle one of three is empty."""
    (alone,) = _runs(0)["experts"]
    results = run_on_ranks(3, clipped_as_on_a_gpu, Case("experts", ParallelConfig(pipeline=3)))
    for result, _ in results:
        torch.testing.assert_close(result["norms"], alone["norms"], rtol=1e-5, atol=1e-6)
    (_, first), (_, middle), (_, last) = results
    assert first == last == 2 * middle > 0


def test_ranks_that_share_experts_pass_equally_many_micro_batches() -> None:
    assert run_on_ranks(2, cut_with_documents, EP2) == [4, 4]
    assert run_on_ranks(2, cut_with_documents, ParallelConfig()) == [4, 2]


def test_a_layout_that_cannot_be_is_named_before_work() -> None:
    with pytest.raises(RankError, match=r"2 process\(es\) for parallel\.tensor 2 .*, with expert 2"):
        run_on_ranks(2, train_all, [Case("experts", TP2_EP2)])
