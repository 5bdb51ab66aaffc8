"""Values of padded buckets go back to where their buffer has them."""

from types import SimpleNamespace

import pytest
import torch

from nemo_minitron.megatron.optimizer_gather import gathered_once, spread

# Buckets of 5 and 3 numbers in a buffer of two times 8.
BUCKETS = [
    SimpleNamespace(offset=0, numel_unpadded=5, grad_data=torch.zeros(8)),
    SimpleNamespace(offset=8, numel_unpadded=3, grad_data=torch.zeros(8)),
]
BUFFER = SimpleNamespace(numel=16, buckets=BUCKETS)
JOINED = torch.arange(1.0, 9.0)
APART = torch.tensor([1, 2, 3, 4, 5, 0, 0, 0, 6, 7, 8, 0, 0, 0, 0, 0.0])


class Part:
    """As Megatron's distributed optimizer."""

    def __init__(self, buffer, state):
        self.buffers, self.state = [buffer], state

    def get_parameter_state_dp_zero(self, *, empty_data, return_on_all_ranks):
        self.asked = (empty_data, return_on_all_ranks)
        return self.state


def test_each_bucket_begins_where_the_buffer_has_it():
    assert torch.equal(spread(JOINED, BUFFER), APART)


def test_states_are_spread_inside_the_block_and_not_behind_it():
    part = Part(BUFFER, {0: {"fp32": {"exp_avg": JOINED, "numel_unpadded": 8}}})
    with gathered_once(SimpleNamespace(chained_optimizers=[part])):
        found = part.get_parameter_state_dp_zero(empty_data=False)[0]["fp32"]
    assert torch.equal(found["exp_avg"], APART)
    assert found["numel_unpadded"] == 8
    assert part.get_parameter_state_dp_zero.__func__ is Part.get_parameter_state_dp_zero


@pytest.mark.parametrize(("loading", "everyone"), [(False, False), (True, True)])
def test_one_rank_gathers_what_is_saved_and_all_have_what_is_loaded(loading, everyone):
    part = Part(BUFFER, None)
    with gathered_once(SimpleNamespace(chained_optimizers=[part])):
        part.get_parameter_state_dp_zero(empty_data=loading, return_on_all_ranks=True)
    assert part.asked == (loading, everyone)


@pytest.mark.parametrize("state", [None, {0: {"fp32": {"exp_avg": JOINED}}}])
def test_nothing_happens_without_padding_or_without_a_state(state):
    dense = SimpleNamespace(numel=8, buckets=[SimpleNamespace(offset=0, numel_unpadded=5, grad_data=torch.zeros(8))])
    part = Part(BUFFER if state is None else dense, state)
    with gathered_once(SimpleNamespace(chained_optimizers=[part, SimpleNamespace()])):
        assert part.get_parameter_state_dp_zero() is state
