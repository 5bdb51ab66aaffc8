"""Groups of ranks that work apart: what each one's world is, who gets which work, what a loss does to the others."""

import os
import time
from typing import Any

import pytest
import torch
from torch import distributed

from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.errors import LayoutError
from nemo_minitron.megatron import groups, runtime
from nemo_minitron.stages.processes import peer_error
from tests.ranks import RankError, run_on_ranks
from tests.support.own_groups import connecting_themselves, free_port

TICKETS = 13


def on_ranks(count: int, function: Any, *arguments: Any) -> list[Any]:
    return run_on_ranks(count, connecting_themselves, free_port(), function, *arguments, timeout=60)


def total() -> float:
    """The sum of what the ranks of this world were in the beginning, by its default group."""
    value = torch.tensor(float(os.environ["RANK"]))
    distributed.all_reduce(value)
    return value.item()


def seen(group: groups.RankGroup) -> dict[str, Any]:
    here = runtime.current()
    names = ("rank", "world_size", "local_rank", "dp_rank", "dp_size", "tp_rank")
    return {
        **{name: getattr(here, name) for name in names},
        "sum": total(),
        "tickets": list(group.tickets(TICKETS)),
        "draw": torch.rand(()).item(),
    }


def apart_and_back(parallel: ParallelConfig, counts: list[int]) -> tuple[list[Any], float, int]:
    runtime.start(parallel, seed=1)
    try:
        found = [groups.in_groups(count, seen) for count in counts]
        return found, total(), runtime.current().dp_size
    finally:
        runtime.stop()


@pytest.mark.slow
def test_each_group_is_a_world_of_its_own_and_the_large_one_comes_back():
    results = on_ranks(4, apart_and_back, ParallelConfig(), [2, 4, 1])
    assert all(result == results[0] for result in results), "every rank has what every group's first rank returned"
    (pairs, single, together), after, copies = results[0]
    assert [(found["world_size"], found["dp_size"], found["sum"]) for found in pairs] == [(2, 2, 1.0), (2, 2, 5.0)]
    assert [found["sum"] for found in single] == [0.0, 1.0, 2.0, 3.0]
    assert [found["local_rank"] for found in single] == [0, 1, 2, 3], "the device stays"
    assert [found["sum"] for found in together] == [6.0]
    for found in (pairs, single, together):
        drawn = [number for each in found for number in each["tickets"]]
        assert sorted(drawn) == list(range(TICKETS))
    assert len({found["draw"] for found in single}) == 1, "generators begin alike in every group"
    assert (after, copies) == (6.0, 4)


def test_a_group_holds_complete_copies_of_the_model():
    results = on_ranks(4, apart_and_back, ParallelConfig(tensor=2), [2])
    [found], after, copies = results[0]
    assert [(each["world_size"], each["dp_size"], each["tp_rank"]) for each in found] == [(2, 1, 0)] * 2
    assert (after, copies) == (6.0, 2)


def most(parallel: ParallelConfig) -> int:
    runtime.start(parallel, seed=1)
    try:
        return groups.most_groups()
    finally:
        runtime.stop()


def test_there_are_as_many_groups_as_copies_and_one_in_a_world_of_somebody_elses():
    assert on_ranks(2, most, ParallelConfig()) == [2, 2]
    assert on_ranks(2, most, ParallelConfig(tensor=2)) == [1, 1]
    assert run_on_ranks(2, most, ParallelConfig()) == [1, 1]


def moving_a_world_of_somebody_elses() -> str:
    runtime.start(ParallelConfig(), seed=1)
    try:
        runtime.move(distributed.HashStore(), 0, 1)
    except LayoutError as error:
        return error.what
    finally:
        runtime.stop()
    return ""


def test_a_world_of_somebody_elses_is_left_alone():
    assert run_on_ranks(1, moving_a_world_of_somebody_elses) == [
        "process groups that somebody else made cannot be replaced"
    ]


def ending(how: str) -> tuple[str, str, float]:
    """One group of two ends; what the other one meets when it is done, and after how many seconds."""

    def work(group: groups.RankGroup) -> None:
        if group.number == 1:
            if how == "killed":
                os._exit(1)
            raise MemoryError("no room\nfor more")

    runtime.start(ParallelConfig(), seed=1)
    began = time.monotonic()
    try:
        groups.in_groups(2, work)
    except MemoryError:
        os._exit(1)
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - began
    return "", "", 0.0


@pytest.mark.parametrize("how", ["killed", "raised"])
def test_a_group_that_ends_does_not_keep_the_others_waiting(how):
    with pytest.raises(RankError) as caught:
        run_on_ranks(2, connecting_themselves, free_port(), asserted, how, timeout=60)
    told = str(caught.value)
    assert "--- rank 1 ---\nthe process died without a word" in told
    assert "--- rank 0 ---" in told
    if how == "raised":
        assert "LostRankError: another group of ranks has ended: rank 1: MemoryError: no room" in told
    else:
        assert "noticed at once" in told


def asserted(how: str) -> None:
    """Raises what rank 0 has met, since of ranks that die `run_on_ranks` keeps errors only."""
    kind, message, seconds = ending(how)
    if kind == "LostRankError":
        raise RuntimeError(f"{kind}: {message}")
    assert kind == "RuntimeError"
    assert peer_error(RuntimeError(message)), message
    assert seconds < 20
    raise RuntimeError("noticed at once")
