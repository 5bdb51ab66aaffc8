"""Where intermediate states are, without a model: pipeline ranks, and the positions of a rank."""

from types import SimpleNamespace

import pytest
import torch

from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.megatron.forward import MicroBatch
from nemo_minitron.megatron.placement import state_holder
from nemo_minitron.megatron.states import local_keep


@pytest.mark.parametrize(
    ("layers", "parallel", "ranks"),
    [
        (3, ParallelConfig(), [0, 0, 0, 0]),
        (5, ParallelConfig(pipeline=2), [0, 0, 0, 1, 1, 1]),
        (5, ParallelConfig(pipeline=2, virtual_pipeline=2), [0, 0, 1, 0, 1, 1]),
    ],
)
def test_a_state_is_where_its_norm_is(layers, parallel, ranks):
    assert [state_holder(state, layers, parallel) for state in range(layers + 1)] == ranks


@pytest.mark.parametrize(("context", "tensor"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_the_ranks_of_a_sequence_share_out_its_positions(context, tensor):
    """Each position is on one rank, and tensor-parallel ranks hold consecutive parts of what is theirs."""
    positions = torch.arange(16).expand(3, 16)
    parallel = ParallelConfig(tensor=tensor, context=context, sequence_parallel=tensor > 1)
    found = []
    for cp_rank in range(context):
        parts = [
            local_keep(
                MicroBatch(positions, positions, positions, positions),
                SimpleNamespace(parallel=parallel, cp_rank=cp_rank, tp_rank=tp_rank, device=torch.device("cpu")),
            )
            for tp_rank in range(tensor)
        ]
        assert all(part.shape == (16 // context // tensor, 3) for part in parts)
        row = torch.cat(parts)[:, 0].tolist()
        assert row == (list(range(16)) if context == 1 else [[*range(4), *range(12, 16)], [*range(4, 12)]][cp_rank])
        found += row
    assert sorted(found) == list(range(16))
