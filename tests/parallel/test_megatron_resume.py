"""A training state goes on exactly where it stopped, and at another layout goes on as that layout would have."""

from pathlib import Path

import pytest
import torch

from nemo_minitron.config.parallel import ParallelConfig, Precision
from tests.parallel.megatron_jobs import STEPS, Case, train_all
from tests.ranks import run_on_ranks

TP2 = ParallelConfig(tensor=2)
PP2 = ParallelConfig(pipeline=2)
VPP2 = ParallelConfig(pipeline=2, virtual_pipeline=2)


@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("precision", [Precision.FP32, Precision.BF16])
def test_resuming_is_bit_identical(precision: Precision, distributed: bool, tmp_path: Path) -> None:
    whole = Case("tied", precision=precision, distributed=distributed, save=tmp_path / "state")
    second = Case("tied", precision=precision, distributed=distributed, load=tmp_path / "state")
    ((all_steps, last_steps),) = run_on_ranks(1, train_all, [whole, second])
    assert last_steps["losses"] == all_steps["losses"][STEPS // 2 :]
    assert last_steps["norms"] == all_steps["norms"][STEPS // 2 :]
    for name, weight in all_steps["weights"].items():
        assert torch.equal(weight, last_steps["weights"][name]), name


def test_a_state_goes_on_at_any_other_layout(tmp_path: Path) -> None:
    """Written at five layouts of two ranks, read at one rank and at each other, the padded vocabulary included."""
    layouts = {
        "tensor": Case("tied", TP2),
        "pipeline": Case("tied", PP2),
        "interleaved": Case("tied", VPP2),
        "data": Case("tied"),
    }
    writers = [
        Case(case.spec, case.parallel, case.micro_batch_size, case.distributed, save=tmp_path / name)
        for name, case in layouts.items()
    ]
    ((alone,),) = run_on_ranks(1, train_all, [Case("tied")])
    run_on_ranks(2, train_all, writers)
    names = list(layouts)
    readers = [
        Case("tied", layouts[names[(index + 1) % len(names)]].parallel, load=tmp_path / name)
        for index, name in enumerate(names)
    ]
    (on_one_rank,) = run_on_ranks(1, train_all, [Case("tied", load=tmp_path / name) for name in names])
    for results in (on_one_rank, *run_on_ranks(2, train_all, readers)):
        for result in results:
            torch.testing.assert_close(result["losses"], alone["losses"][STEPS // 2 :], rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(result["norms"], alone["norms"][STEPS // 2 :], rtol=1e-5, atol=1e-6)


def test_distributed_optimizer_states_move_between_data_parallel_sizes(tmp_path: Path) -> None:
    ((alone,),) = run_on_ranks(1, train_all, [Case("tied", distributed=True, save=tmp_path / "one")])
    there = run_on_ranks(
        2,
        train_all,
        [
            Case("tied", distributed=True, load=tmp_path / "one"),
            Case("tied", TP2, distributed=True, load=tmp_path / "one"),
            Case("tied", distributed=True, save=tmp_path / "two"),
        ],
    )
    ((back,),) = run_on_ranks(1, train_all, [Case("tied", distributed=True, load=tmp_path / "two")])
    for result in (there[0][0], there[1][0], there[0][1], there[1][1], back):
        torch.testing.assert_close(result["losses"], alone["losses"][STEPS // 2 :], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(result["norms"], alone["norms"][STEPS // 2 :], rtol=1e-5, atol=1e-6)
