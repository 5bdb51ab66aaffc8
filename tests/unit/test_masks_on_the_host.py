"""A mask that lies on the host is read there: with states on a device whose contents cannot be read, losses still work.

`meta` stands for the GPU. Reading it raises, where reading a GPU would wait for all work that is queued.
"""

import numpy as np
import pytest
import torch

from nemo_minitron.cache.entries import SampleTargets
from nemo_minitron.cache.tensors import sparse_targets
from nemo_minitron.config.objective import HiddenLossKind
from nemo_minitron.megatron.forward import MicroBatch
from nemo_minitron.ops.divergence import Divergence
from nemo_minitron.ops.hidden_loss import hidden_loss
from nemo_minitron.ops.sampling import SparseTargets
from nemo_minitron.parallel.fused_linear_cross_entropy import fused_linear_cross_entropy
from nemo_minitron.parallel.fused_linear_kd import fused_linear_kd
from nemo_minitron.parallel.fused_linear_sparse_kd import fused_linear_sparse_kd

TOKENS, HIDDEN, VOCABULARY = 6, 4, 10
KEEP = torch.tensor([True, False, True, True, False, True])
GPU = torch.device("meta")


def on_gpu(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device=GPU)


@pytest.mark.parametrize("keep", [None, KEEP, torch.zeros(TOKENS, dtype=torch.bool)])
@pytest.mark.parametrize("triton", ["0", "1"])
def test_fused_losses(keep, triton, monkeypatch):
    monkeypatch.setenv("NEMO_MINITRON_TRITON", triton)
    hidden, weight = on_gpu(TOKENS, HIDDEN).requires_grad_(), on_gpu(VOCABULARY, HIDDEN).requires_grad_()
    labels = on_gpu(TOKENS, dtype=torch.int64)
    options = {"vocab_size": VOCABULARY, "chunk_tokens": 2}
    entries = on_gpu(TOKENS, 3, dtype=torch.int64), on_gpu(TOKENS, 3, dtype=torch.float32)
    targets = SparseTargets(ids=entries[0], log_probs=entries[1], tail=entries[1][:, 0], temperature=1.0)
    losses = [
        fused_linear_cross_entropy(hidden, weight, labels, keep, **options).ce_sum,
        fused_linear_kd(hidden, weight, hidden, weight, keep, labels, statistics=True, **options).loss_sum,
        fused_linear_sparse_kd(hidden, weight, targets, keep, labels, divergence=Divergence(), **options).loss_sum,
    ]
    for loss in losses:
        gradients = torch.autograd.grad(loss, (hidden, weight))
        assert [x.shape for x in gradients] == [hidden.shape, weight.shape]
    if keep is None:
        with pytest.raises(NotImplementedError):
            fused_linear_cross_entropy(hidden, weight, labels, KEEP.to(GPU), **options)


@pytest.mark.parametrize("kind", HiddenLossKind)
def test_losses_of_hidden_states(kind):
    student, teacher = on_gpu(3, 2, HIDDEN).requires_grad_(), on_gpu(3, 2, HIDDEN)
    found = hidden_loss(student, teacher, KEEP.view(3, 2), kind=kind)
    found.backward()
    assert student.grad.shape == student.shape
    assert found.device == GPU


def test_a_micro_batch_remembers_where_it_came_from():
    tokens = torch.arange(32).view(4, 8)
    here = MicroBatch.of(tokens, tokens + 1, tokens % 3 > 0)
    assert here.on_host is here
    there = here.to(GPU)
    assert there.tokens.device == GPU
    assert there.on_host is here
    assert there.to(GPU).on_host is here
    assert here.to(torch.device("cpu")).host is None
    for moved, kept in zip(there.split(2), here.split(2), strict=True):
        for rank in range(2):
            part, expected = moved.on_context_rank(rank, 2), kept.on_context_rank(rank, 2)
            assert part.tokens.device == GPU
            assert part.keep.shape == expected.keep.shape
            for name in MicroBatch.TENSORS:
                assert torch.equal(getattr(part.on_host, name), getattr(expected, name))


def test_cached_targets_find_their_rows_on_the_host():
    lengths = np.array([1, 2, 1])
    sample = SampleTargets(lengths, np.arange(4), np.array([1, 1, 2, 3]))
    positions = torch.tensor([[2, 0]])
    targets = sparse_targets([sample], positions, temperature=1.0, device=GPU)
    assert targets.ids.device == GPU
    assert targets.ids.shape == (2, 2)
    here = sparse_targets([sample], positions, temperature=1.0, device=torch.device("cpu"))
    assert here.ids.tolist() == [[3, -1], [0, -1]]
