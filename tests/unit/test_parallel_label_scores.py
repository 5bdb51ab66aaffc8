"""Labels scored token by token: torch's own cross-entropy on complete logits, at every tiling."""

import pytest
import torch

from nemo_minitron.parallel.label_scores import label_scores
from tests.tolerances import TOL

TOKENS, HIDDEN, VOCABULARY, PADDED = 13, 8, 37, 40


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tile", [None, (5, 7), (1, 40), (13, 39)])
def test_label_scores_are_those_of_whole_logits(dtype, tile):
    torch.manual_seed(0)
    hidden, weight = torch.randn(TOKENS, HIDDEN, dtype=dtype), torch.randn(PADDED, HIDDEN, dtype=dtype)
    weight[VOCABULARY:] = 100.0  # padding would win every comparison if it were looked at
    labels = torch.randint(VOCABULARY, (TOKENS,))
    logits = (hidden @ weight[:VOCABULARY].t()).double()
    labels[::3] = logits.argmax(-1)[::3]
    keep = torch.arange(TOKENS) % 4 != 1
    scores = label_scores(hidden, weight, labels, keep, vocab_size=VOCABULARY, tile=tile)
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(scores.nats, torch.where(keep, expected, 0), **TOL[dtype])
    assert torch.equal(scores.correct, keep & (labels == logits.argmax(-1)))
    assert scores.correct.any()


def test_a_label_outside_the_vocabulary_is_not_a_number_and_masked_it_is_nothing():
    hidden, weight = torch.randn(3, HIDDEN), torch.randn(PADDED, HIDDEN)
    labels = torch.tensor([1, VOCABULARY + 1, -100])
    keep = torch.tensor([True, True, False])
    nats = label_scores(hidden, weight, labels, keep, vocab_size=VOCABULARY).nats
    assert nats.isnan().tolist() == [False, True, False]
    assert label_scores(hidden, weight, labels, ~keep.fill_(True), vocab_size=VOCABULARY).nats.tolist() == [0, 0, 0]
