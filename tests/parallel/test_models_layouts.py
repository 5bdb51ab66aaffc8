"""The complete trainer and the complete scoring pass give the same numbers at every layout (fp32, tiny model)."""

from pathlib import Path

import numpy as np
import pytest

from nemo_minitron.config.objective import DivergenceKind
from nemo_minitron.config.parallel import ParallelConfig, Precision, Recompute
from tests import jobs
from tests.ranks import run_on_ranks
from tests.tiny import write_corpus, write_llama

LAYOUTS = {
    "tp2": (2, ParallelConfig(tensor=2)),
    "pp2": (2, ParallelConfig(pipeline=2)),
    "dp2": (2, ParallelConfig()),
    "tp2_pp2": (4, ParallelConfig(tensor=2, pipeline=2)),
}
OTHER_WAYS = {
    "vpp2": (2, ParallelConfig(pipeline=2, virtual_pipeline=2), 2),
    "recompute": (1, ParallelConfig(recompute=Recompute.FULL), 2),
    "pp2_recompute": (2, ParallelConfig(pipeline=2, recompute=Recompute.SELECTIVE), 2),
    "micro_batch_1": (1, ParallelConfig(), 1),
    "micro_batch_4": (1, ParallelConfig(), 4),
}
"""Processes, layout, and samples of a micro-batch; a step has 8 samples."""
SIZES = {"num_layers": 4, "hidden_size": 48, "ffn_hidden_size": 64, "num_attention_heads": 4}
"""Of the student. Two stages of two chunks each want four layers; the teacher has five."""


@pytest.fixture(scope="module", params=["tied", "untied"])
def artefacts(request, tmp_path_factory) -> dict[str, Path]:
    """Teacher, token files and student, made by the ordinary stages on one rank."""
    folder = tmp_path_factory.mktemp(request.param)
    write_llama(folder / "hf", tied=request.param == "tied", trained_steps=100, num_hidden_layers=5)
    write_corpus(folder / "corpus")
    run_on_ranks(1, jobs.prepare, folder, {"target": SIZES})
    return {"teacher": folder / "teacher", "data": folder / "data", "student": folder / "student", "root": folder}


@pytest.fixture(scope="module")
def one_rank(artefacts) -> dict[str, object]:
    config = jobs.config_for(artefacts["root"] / "hf", artefacts["root"] / "corpus")
    return {
        "losses": run_on_ranks(
            1, jobs.distill_losses, artefacts["student"], artefacts["teacher"], artefacts["data"], config
        )[0],
        "scores": run_on_ranks(1, jobs.score, artefacts["teacher"], artefacts["data"], config)[0],
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_twenty_distillation_steps_are_those_of_one_rank(artefacts, one_rank, layout):
    world_size, parallel = LAYOUTS[layout]
    config = jobs.config_for(artefacts["root"] / "hf", artefacts["root"] / "corpus", parallel=parallel)
    found = run_on_ranks(
        world_size, jobs.distill_losses, artefacts["student"], artefacts["teacher"], artefacts["data"], config
    )
    assert len(found[0]) == 20
    assert one_rank["losses"][-1] < 0.9 * one_rank["losses"][0], "the student learns"
    for losses in found:
        np.testing.assert_allclose(losses, one_rank["losses"], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("way", OTHER_WAYS)
def test_twenty_distillation_steps_are_the_same_in_another_way(artefacts, one_rank, way):
    world_size, parallel, micro_batch_size = OTHER_WAYS[way]
    config = jobs.config_for(artefacts["root"] / "hf", artefacts["root"] / "corpus", parallel=parallel)
    batch = config.distill.batch.model_copy(update={"micro_batch_size": micro_batch_size})
    config = config.model_copy(update={"distill": config.distill.model_copy(update={"batch": batch})})
    places = artefacts["student"], artefacts["teacher"], artefacts["data"]
    for losses in run_on_ranks(world_size, jobs.distill_losses, *places, config):
        np.testing.assert_allclose(losses, one_rank["losses"], rtol=1e-5)


def test_a_teacher_that_waits_in_host_memory_or_computes_in_bf16_teaches_the_same(artefacts, one_rank):
    config = jobs.config_for(artefacts["root"] / "hf", artefacts["root"] / "corpus")
    distill = config.distill.model_copy(update={"offload_teacher": True})
    places = artefacts["student"], artefacts["teacher"], artefacts["data"]
    offloaded = run_on_ranks(1, jobs.distill_losses, *places, config.model_copy(update={"distill": distill}))[0]
    assert offloaded == one_rank["losses"]
    distill = config.distill.model_copy(update={"teacher_precision": Precision.BF16})
    coarse = run_on_ranks(1, jobs.distill_losses, *places, config.model_copy(update={"distill": distill}))[0]
    assert coarse != one_rank["losses"]
    np.testing.assert_allclose(coarse, one_rank["losses"], rtol=0.03)  # a bf16 number has 8 bits


OBJECTIVES = {
    "js": {"divergence": DivergenceKind.JENSEN_SHANNON, "beta": 0.3, "temperature": 1.5, "lm_weight": 0.2},
    "top_k": {"divergence": DivergenceKind.SKEWED_KL, "skew": 0.3, "top_k": 20},
}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_another_objective_is_the_same_at_another_layout(artefacts, one_rank, objective):
    losses = []
    for world_size, parallel in ((1, ParallelConfig()), LAYOUTS["tp2_pp2"]):
        config = jobs.config_for(artefacts["root"] / "hf", artefacts["root"] / "corpus", parallel=parallel)
        distill = config.distill.model_copy(update={"tokens": 6 * 8 * 64, **OBJECTIVES[objective]})
        config = config.model_copy(update={"distill": distill})
        places = artefacts["student"], artefacts["teacher"], artefacts["data"]
        losses += run_on_ranks(world_size, jobs.distill_losses, *places, config)
    assert abs(losses[0][0] / one_rank["losses"][0] - 1) > 0.05, "another objective"
    assert losses[0][-1] < losses[0][0], "the student learns"
    for found in losses[1:]:
        np.testing.assert_allclose(found, losses[0], rtol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_are_those_of_one_rank(artefacts, one_rank, layout):
    world_size, parallel = LAYOUTS[layout]
    config = jobs.config_for(artefacts["root"] / "hf", artefacts["root"] / "corpus", parallel=parallel)
    for scores in run_on_ranks(world_size, jobs.score, artefacts["teacher"], artefacts["data"], config):
        assert scores.keys() == one_rank["scores"].keys()
        for name, expected in one_rank["scores"].items():
            np.testing.assert_allclose(scores[name], expected, rtol=1e-5, atol=1e-7, err_msg=name)
