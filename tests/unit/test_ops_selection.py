import pytest
import torch

from nemo_minitron.errors import PlanError, ScoresError
from nemo_minitron.ops.packing import (
    gate_up_rows,
    head_channels,
    merge_gate_up,
    merge_qkv,
    qkv_rows,
    split_gate_up,
    split_qkv,
)
from nemo_minitron.ops.ranking import ranked, top_heads, top_indices
from nemo_minitron.ops.slicing import slice_dims

HEADS, GROUPS, HEAD_DIM, HIDDEN = 6, 2, 4, 10


def test_top_indices_breaks_ties_to_the_lower_index():
    assert top_indices(torch.tensor([1.0, 3.0, 3.0, 3.0, 0.0]), keep=2).tolist() == [1, 2]
    assert top_indices(torch.tensor([5.0, 1.0, 5.0, 9.0]), keep=3).tolist() == [0, 2, 3]
    assert top_indices(torch.zeros(4), keep=4).tolist() == [0, 1, 2, 3]
    assert top_indices(torch.zeros(4), keep=0).tolist() == []


@pytest.mark.parametrize("seed", range(20))
def test_copies_are_ranked_by_index_whatever_rounding_does_to_them(seed):
    """Groups of equal units, each moved by the noise of another order of summation."""
    generator = torch.Generator().manual_seed(seed)
    exact = torch.rand(40, generator=generator, dtype=torch.float64).repeat_interleave(5)
    exact = exact[torch.randperm(200, generator=generator)]
    noisy = exact * (1 + 2e-7 * (torch.rand(200, generator=generator, dtype=torch.float64) - 0.5))
    by_hand = sorted(range(200), key=lambda unit: (-exact[unit].item(), unit))
    assert ranked(noisy).tolist() == ranked(exact).tolist() == by_hand


def test_what_differs_by_more_than_rounding_is_no_tie():
    score = torch.tensor([1.0, 1.00001, 1.00002, -1.0, -0.99999, 0.0], dtype=torch.float64)
    assert ranked(score).tolist() == [2, 1, 0, 5, 4, 3]
    assert ranked(torch.zeros(0)).tolist() == []


@pytest.mark.parametrize("score", [torch.tensor([1.0, torch.nan]), torch.tensor([1.0, torch.inf]), torch.zeros(1)])
def test_top_indices_refuses_what_cannot_be_ranked(score):
    with pytest.raises(ScoresError):
        top_indices(score, keep=2)


def test_heads_are_ranked_inside_their_group():
    score = torch.tensor([9.0, 8.0, 7.0, 1.0, 3.0, 2.0])
    assert top_heads(score, groups=torch.tensor([0, 1]), num_groups=2, heads_per_group=2).tolist() == [0, 1, 4, 5]
    assert top_heads(score, groups=torch.tensor([1]), num_groups=2, heads_per_group=1).tolist() == [4]
    with pytest.raises(ScoresError, match="multiple"):
        top_heads(score, groups=torch.tensor([0]), num_groups=4, heads_per_group=1)


def test_slice_dims_equals_fancy_indexing_and_copies():
    x = torch.arange(60).view(5, 12)
    rows, columns = torch.tensor([0, 4]), torch.tensor([1, 2, 11])
    kept = slice_dims(x, {0: rows, 1: columns})
    assert torch.equal(kept, x[rows][:, columns])
    assert kept.is_contiguous()
    for keep in ({}, {0: torch.arange(5)}):
        same = slice_dims(x, keep)
        assert torch.equal(same, x)
        assert same.data_ptr() != x.data_ptr()
    with pytest.raises(PlanError, match=r"0\.\.4"):
        slice_dims(x, {0: torch.tensor([5])})


def labelled_qkv():
    """Every row carries (kind, head or group, channel) so that its origin can be read off."""

    def rows(kind, count):
        return torch.tensor([[kind, unit, channel] for unit in range(count) for channel in range(HEAD_DIM)])

    return rows(0, HEADS), rows(1, GROUPS), rows(2, GROUPS)


def test_qkv_packing_round_trip_and_order():
    query, key, value = labelled_qkv()
    fused = merge_qkv(query, key, value, num_groups=GROUPS, head_dim=HEAD_DIM)
    slots = [tuple(row) for row in fused[::HEAD_DIM, :2].tolist()]
    assert slots == [(0, 0), (0, 1), (0, 2), (1, 0), (2, 0), (0, 3), (0, 4), (0, 5), (1, 1), (2, 1)]
    parts = split_qkv(fused, num_groups=GROUPS, head_dim=HEAD_DIM)
    for part, expected in zip(parts, (query, key, value), strict=True):
        assert torch.equal(part, expected)
    bias = fused[:, 0]
    assert torch.equal(
        merge_qkv(*split_qkv(bias, num_groups=GROUPS, head_dim=HEAD_DIM), num_groups=2, head_dim=4), bias
    )


def test_qkv_rows_select_what_slicing_the_parts_would():
    query, key, value = labelled_qkv()
    fused = merge_qkv(query, key, value, num_groups=GROUPS, head_dim=HEAD_DIM)
    heads, groups = torch.tensor([0, 2, 3, 5]), torch.tensor([0, 1])
    rows = qkv_rows(heads, groups, num_heads=HEADS, num_groups=GROUPS, head_dim=HEAD_DIM)
    expected = merge_qkv(query[head_channels(heads, head_dim=HEAD_DIM)], key, value, num_groups=2, head_dim=HEAD_DIM)
    assert torch.equal(fused[rows], expected)
    one_group = qkv_rows(torch.tensor([4]), torch.tensor([1]), num_heads=HEADS, num_groups=GROUPS, head_dim=HEAD_DIM)
    assert fused[one_group][::HEAD_DIM, :2].tolist() == [[0, 4], [1, 1], [2, 1]]
    every = qkv_rows(torch.arange(HEADS), groups, num_heads=HEADS, num_groups=GROUPS, head_dim=HEAD_DIM)
    assert torch.equal(every, torch.arange(fused.shape[0]))


def test_gate_up_packing():
    fc1 = torch.arange(24).view(12, 2)
    gate, up = split_gate_up(fc1)
    assert torch.equal(merge_gate_up(gate, up), fc1)
    neurons = torch.tensor([1, 4])
    kept = fc1[gate_up_rows(neurons, neurons=6)]
    assert torch.equal(kept, merge_gate_up(gate[neurons], up[neurons]))
