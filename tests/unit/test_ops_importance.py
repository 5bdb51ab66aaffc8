import pytest
import torch

from nemo_minitron.ops.block_influence import dissimilarity, stream_of
from nemo_minitron.ops.importance import (
    SequenceMoments,
    SiteSums,
    _reduced,
    aggregate,
    block_rows,
    head_importance,
    joined_moments,
    kv_group_importance,
    sequence_blocks,
)
from nemo_minitron.ops.memory import Workspace
from tests.oracles import importance as oracle
from tests.support.emulation import gpu_branches
from tests.tolerances import TOL

S, B, C = 37, 5, 6


def activations(dtype=torch.float64):
    return (torch.randn(S, B, C, generator=torch.Generator().manual_seed(0)) + 0.5).to(dtype)


def keep_mask():
    keep = torch.ones(B, S, dtype=torch.bool)
    keep[0, 20:] = False
    keep[2, :30] = False
    keep[4, ::2] = False
    return keep


def kept_positions(x_SBC, keep_BS):
    keep_BS = torch.ones(x_SBC.shape[1::-1], dtype=torch.bool) if keep_BS is None else keep_BS
    return keep_BS.sum(-1, dtype=torch.float64)


def sequence_moments(x_SBC, keep_BS=None):
    blocks = sequence_blocks(x_SBC, keep_BS, block_rows(*x_SBC.shape, x_SBC.device), Workspace())
    return joined_moments([blocks], kept_positions(x_SBC, keep_BS))


def kept_samples(x_SBC, keep_BS):
    return [x_SBC[keep_BS[b], b].double().tolist() for b in range(x_SBC.shape[1]) if keep_BS[b].any()]


def collect(x_SBC, keep_BS, sizes):
    sums, first = SiteSums.zeros(x_SBC.shape[-1]), 0
    for size in sizes:
        part = slice(first, first + size)
        sums.add_(sequence_moments(x_SBC[:, part], None if keep_BS is None else keep_BS[part]))
        first += size
    return sums


@pytest.mark.parametrize("batch", ["mean", "l2", "var"])
@pytest.mark.parametrize("sequence", ["mean", "l2", "var"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_all_nine_aggregations_follow_from_six_sums(batch, sequence, dtype):
    x_SBC, keep_BS = activations(dtype), keep_mask()
    named = collect(x_SBC, keep_BS, [2, 3]).named("site")
    got = aggregate(named[f"site.{sequence}.sum"], named[f"site.{sequence}.sumsq"], B, batch)
    expected = oracle.importance(kept_samples(x_SBC, keep_BS), batch=batch, sequence=sequence)
    # bfloat16 activations are summed in float32, so the float32 row applies.
    tolerance = TOL[torch.float64 if dtype == torch.float64 else torch.float32]
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), **tolerance)


@pytest.mark.parametrize("sizes", [[5], [1] * 5, [4, 1]])
def test_sums_do_not_depend_on_the_micro_batch_size(sizes):
    whole = collect(activations(), keep_mask(), [2, 3]).values
    torch.testing.assert_close(collect(activations(), keep_mask(), sizes).values, whole, **TOL[torch.float64])


def test_a_sequence_in_two_shards_adds_up():
    x_SBC, keep_BS = activations(), keep_mask()
    whole = sequence_moments(x_SBC, keep_BS).finish()
    parts = sequence_moments(x_SBC[:15], keep_BS[:, :15]), sequence_moments(x_SBC[15:], keep_BS[:, 15:])
    shards = SequenceMoments(sum(part.sums for part in parts), sum(part.count for part in parts)).finish()
    for got, expected in zip(shards, whole, strict=True):
        torch.testing.assert_close(got, expected, **TOL[torch.float64])


def test_long_sequences_cross_blocks_without_losing_precision():
    x_SBC = torch.randn(5000, 1, 300, generator=torch.Generator().manual_seed(1)) + 3
    mean, norm, variance = sequence_moments(x_SBC).finish()
    wide = x_SBC.double()
    torch.testing.assert_close(mean, wide.abs().mean(0), **TOL[torch.float32])
    torch.testing.assert_close(norm, torch.linalg.vector_norm(wide, dim=0), **TOL[torch.float32])
    torch.testing.assert_close(variance, wide.var(0, correction=0), **TOL[torch.float32])


def test_a_large_mean_does_not_drown_the_variance():
    x_SBC = (torch.randn(400, 2, 5, generator=torch.Generator().manual_seed(2)) + 100).float()
    wide = x_SBC.double()
    torch.testing.assert_close(
        sequence_moments(x_SBC).finish()[2], wide.var(0, correction=0), rtol=1e-5, atol=0.0, msg="variance"
    )


def test_columns_of_a_wider_tensor_are_taken_as_they_are():
    x_SBC = activations(torch.float32)
    narrow = x_SBC[..., 1:4]
    assert torch.equal(sequence_moments(narrow).sums, sequence_moments(narrow.clone()).sums)


def test_plain_reductions_say_the_same():
    """What runs on a GPU."""
    x_SBC = activations(torch.float32)
    got = joined_moments([[_reduced(x_SBC)]], kept_positions(x_SBC, None)).finish()
    for mine, expected in zip(got, sequence_moments(x_SBC).finish(), strict=True):
        torch.testing.assert_close(mine, expected, **TOL[torch.float32])


def test_masked_positions_have_no_effect_even_if_not_a_number():
    x_SBC, keep_BS = activations(), keep_mask()
    spoiled = torch.where(keep_BS.t()[..., None], x_SBC, torch.nan)
    copy = spoiled.clone()
    assert torch.equal(collect(spoiled, keep_BS, [5]).values, collect(x_SBC, keep_BS, [5]).values)
    assert torch.equal(spoiled.nan_to_num(7), copy.nan_to_num(7)), "the input was changed"


def test_a_sample_without_kept_positions_adds_nothing():
    x_SBC = activations()
    keep_BS = torch.ones(B, S, dtype=torch.bool)
    keep_BS[3] = False
    others = [0, 1, 2, 4]
    torch.testing.assert_close(
        collect(x_SBC, keep_BS, [5]).values, collect(x_SBC[:, others], None, [4]).values, **TOL[torch.float64]
    )


def test_head_and_group_importance():
    channels = torch.tensor([3.0, 4.0, 5.0, 12.0, 8.0, 15.0, 0.0, 2.0])  # Pythagorean heads of two channels
    heads = head_importance(channels, head_dim=2)
    assert heads.tolist() == [5.0, 13.0, 17.0, 2.0]
    assert kv_group_importance(heads, num_groups=2).tolist() == [18.0, 19.0]


def token_dissimilarity(x, y):
    workspace = Workspace()
    return dissimilarity(stream_of(x, workspace, "in"), stream_of(y, workspace, "out")).view(x.shape[:2])


def test_token_dissimilarity_closed_forms():
    x = torch.tensor([[[1.0, 0.0], [1.0, 1.0], [2.0, 2.0], [0.0, 0.0]]])
    y = torch.tensor([[[0.0, 3.0], [2.0, 2.0], [-1.0, -1.0], [1.0, 0.0]]])
    torch.testing.assert_close(token_dissimilarity(x, y), torch.tensor([[1.0, 0.0, 2.0, 1.0]]))


def test_token_dissimilarity_matches_block_influence_of_the_paper():
    x, y = activations(), activations().roll(1, 0)
    got = token_dissimilarity(x, y).mean().item()
    expected = oracle.block_influence(x.flatten(0, 1).tolist(), y.flatten(0, 1).tolist())
    assert got == pytest.approx(expected, abs=1e-10)


def test_a_layer_that_does_next_to_nothing_keeps_its_digits():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(6, 2, 64, generator=generator)
    y = x + 1e-3 * torch.randn(6, 2, 64, generator=generator)
    wide = 1 - torch.cosine_similarity(x.double(), y.double(), dim=-1)
    torch.testing.assert_close(token_dissimilarity(x, y).double(), wide, rtol=2e-4, atol=0.0)


@pytest.mark.parametrize("mean", [0.0, 30.0, 300.0])
@pytest.mark.parametrize("masked", [False, True])
def test_a_large_mean_costs_no_digits_on_a_gpu(mean, masked):
    """Channels whose mean is hundreds of deviations: a difference of squares would leave nothing of the variance."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 2, 16, generator=generator) + mean
    keep = torch.rand(2, 512, generator=generator) < 0.7 if masked else None
    with gpu_branches():
        found = sequence_moments(x, keep).finish()
    kept = [x[:, sample][keep[sample] if masked else slice(None)].double() for sample in range(2)]
    expected = [(y.abs().mean(0), y.square().sum(0).sqrt(), y.var(0, correction=0)) for y in kept]
    expected = torch.stack([torch.stack(rows) for rows in zip(*expected, strict=True)])
    # Masked positions are zeros among the rest: the deviations from the mean of all are as large as the mean.
    digits = 1e-5 if not masked else 1e-5 * max(1.0, mean**2 / 10)
    torch.testing.assert_close(found, expected, rtol=digits, atol=1e-6)
