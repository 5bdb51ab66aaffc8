import numpy as np
import torch

from nemo_minitron.ops.sampling import SparseTargets, count_draws, uniforms

WORD = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def split_mix(state):
    """SplitMix64 as published, in Python integers: one number and the next state."""
    state = (state + GOLDEN) & WORD
    z = state
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
    return z ^ (z >> 31), state


def test_the_oracle_gives_the_published_numbers():
    state, found = 1234567, []
    for _ in range(5):
        value, state = split_mix(state)
        found.append(value)
    assert found == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_uniforms_are_a_split_mix_stream_of_each_token():
    seed, counters = 12345, [0, 1, 999_999_999_999]
    found = uniforms(seed, torch.tensor(counters), 4)
    for row, counter in zip(found.tolist(), counters, strict=True):
        # A stream starts where mixing twice leads; subtracting the step makes split_mix the bare mixing function.
        mixed, _ = split_mix((counter + seed * GOLDEN - GOLDEN) & WORD)
        start, _ = split_mix((mixed - GOLDEN) & WORD)
        for value in row:
            bits, start = split_mix(start)
            assert value == (bits >> 11) / 2**53


def test_uniforms_are_uniform_and_differ():
    values = uniforms(7, torch.arange(2000), 50)
    assert values.unique().numel() == values.numel()
    counts = torch.histc(values.float(), 100, 0, 1)
    expected = values.numel() / 100
    # Chi-squared with 99 degrees of freedom: 160 is exceeded once in ten thousand seeds.
    assert ((counts - expected) ** 2 / expected).sum() < 160
    assert not torch.equal(values, uniforms(8, torch.arange(2000), 50))
    # Neighbouring tokens and neighbouring draws are uncorrelated (four standard errors).
    for a, b in ((values[1:], values[:-1]), (values[:, 1:], values[:, :-1])):
        assert abs(np.corrcoef(a.flatten(), b.flatten())[0, 1]) < 4 / a.numel() ** 0.5


def test_draws_are_counted():
    ids, counts = count_draws(torch.tensor([[5, 2, 5, 5], [1, 3, 2, 0], [7, 7, 7, 7]]))
    assert ids.tolist() == [[2, 5, -1, -1], [0, 1, 2, 3], [7, -1, -1, -1]]
    assert counts.tolist() == [[1, 3, 0, 0], [1, 1, 1, 1], [4, 0, 0, 0]]
    assert count_draws(torch.empty(0, 3, dtype=torch.int64))[0].shape == (0, 0)


def test_counts_become_shares():
    targets = SparseTargets.from_counts(torch.tensor([[4, 9, -1]]), torch.tensor([[3, 1, 0]]))
    assert targets.sampled
    torch.testing.assert_close(targets.log_probs.exp(), torch.tensor([[0.75, 0.25, 0.0]]))
    assert targets.bucket_logp(torch.float64)[0, 2:].tolist() == [-torch.inf, -torch.inf]
