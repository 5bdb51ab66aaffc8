"""Several documents in a sample: each is computed as if it stood alone, in logits, losses, gradients and scores."""

import itertools
from functools import cache

import pytest
import torch

from nemo_minitron.config.parallel import ParallelConfig, Recompute
from tests.parallel import documents_jobs
from tests.parallel.megatron_jobs import Case, train_all
from tests.ranks import run_on_ranks
from tests.tiny import write_family
from tests.tolerances import TOL

TP2, PP2 = ParallelConfig(tensor=2), ParallelConfig(pipeline=2)
LENGTH = 150
STARTS = ((0, 40, 41, 139), (0, 131))
"""In two samples; documents of 1 to 131 tokens, so shorter and longer than the blocks that attention works in."""
FAMILIES = ("llama 3.2", "gemma3")
"""Rotary scaling; windows of 5 tokens, another rotary base inside of them, norms of queries and keys."""

TRAININGS = {
    "micro-batches of 2": (1, Case("tied", micro_batch_size=2, documents="packed")),
    "recomputation": (1, Case("tied", ParallelConfig(recompute=Recompute.FULL), documents="packed")),
    "TP2": (2, Case("tied", TP2, micro_batch_size=4, documents="packed")),
    "PP2": (2, Case("tied", PP2, micro_batch_size=2, documents="packed")),
    "PP2 VPP2": (2, Case("tied", ParallelConfig(pipeline=2, virtual_pipeline=2), 2, documents="packed")),
    "DP2 distributed optimizer": (2, Case("tied", micro_batch_size=2, distributed=True, documents="packed")),
}


def texts() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and positions `[2, LENGTH]`."""
    tokens = torch.randint(0, 256, (len(STARTS), LENGTH), generator=torch.Generator().manual_seed(3))
    rows = [[torch.arange(stop - first) for first, stop in itertools.pairwise((*s, LENGTH))] for s in STARTS]
    return tokens, torch.stack([torch.cat(row) for row in rows])


@pytest.fixture(scope="module", params=FAMILIES)
def model_and_logits(request, tmp_path_factory):
    """A checkpoint, and what `transformers` says of each document alone."""
    folder = tmp_path_factory.mktemp("model")
    model = write_family(folder, request.param)
    tokens, _ = texts()
    alone = []
    with torch.no_grad():
        for row, starts in zip(tokens, STARTS, strict=True):
            spans = itertools.pairwise((*starts, LENGTH))
            alone.append(torch.cat([model(row[None, first:stop]).logits[0] for first, stop in spans]))
    return folder, torch.stack(alone)


@pytest.mark.parametrize("parallel", [ParallelConfig(), TP2, PP2], ids=["one", "TP2", "PP2"])
def test_logits_of_a_document_are_those_of_it_alone(parallel, model_and_logits):
    folder, expected = model_and_logits
    tokens, positions = texts()
    ranks = parallel.tensor * parallel.pipeline
    size = expected.square().mean().sqrt()
    for found in run_on_ranks(ranks, documents_jobs.logits, folder, parallel, tokens, positions):
        furthest = (found - expected).abs().max() / size
        print(f"logits of {size:.3g} (root mean square) differ by {furthest:.1e} of that at most")
        assert furthest < 1e-5


@cache
def trainings(world: int) -> dict[str, list[dict]]:
    """Training runs by name, rank by rank; world 0 has the one in which each document is a sample of its own."""
    if world == 0:
        return {"alone": run_on_ranks(1, train_all, [Case("tied", documents="alone")])[0]}
    names = [name for name, (size, _) in TRAININGS.items() if size == world]
    ranks = run_on_ranks(world, train_all, [TRAININGS[name][1] for name in names])
    return {name: [rank[index] for rank in ranks] for index, name in enumerate(names)}


@pytest.mark.parametrize("name", TRAININGS)
def test_losses_gradients_and_weights_are_those_of_documents_that_are_samples_of_their_own(name):
    from nemo_minitron.arch.weights import weight_named
    from nemo_minitron.megatron.placement import local_shard
    from tests.parallel.megatron_jobs import SPECS

    world, case = TRAININGS[name]
    (alone,) = trainings(0)["alone"]
    for rank in trainings(world)[name]:
        torch.testing.assert_close(rank["losses"], alone["losses"], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(rank["norms"], alone["norms"], rtol=1e-5, atol=1e-6)
        for weight, mine in rank["weights"].items():
            whole = alone["weights"][weight]
            row = weight_named(SPECS["tied"], weight)
            shard = local_shard(row, whole, SPECS["tied"], rank=rank["tp"], size=case.parallel.tensor)
            torch.testing.assert_close(mine, shard, rtol=1e-5, atol=1e-5, msg=lambda text, n=weight: f"{n}: {text}")


def test_without_borders_the_losses_are_others():
    ((leaking,),) = run_on_ranks(1, train_all, [Case("tied")])
    assert abs(leaking["losses"][-1] - trainings(0)["alone"][0]["losses"][-1]) > 1e-3


def test_scores_that_are_sums_over_tokens_are_those_of_documents_alone():
    """Block influence, and what the model loses without each layer."""
    (results,) = run_on_ranks(1, documents_jobs.sums_all, [(ParallelConfig(), kind) for kind in ("alone", "packed")])
    alone, packed = results
    split = run_on_ranks(2, documents_jobs.sums_all, [(TP2, "packed"), (PP2, "packed")])
    assert len(alone) > 10
    for found in (packed, *(result for rank in split for result in rank)):
        assert found.keys() == alone.keys()
        for name, expected in alone.items():
            torch.testing.assert_close(found[name], expected, **TOL[torch.float32], msg=lambda t, n=name: f"{n}: {t}")


def test_context_parallelism_is_refused_by_name():
    said = documents_jobs.refused(2)
    assert "parallel.context = 2" in said
    assert "data.reset_attention_mask=false" in said
    assert documents_jobs.refused(1) == ""
