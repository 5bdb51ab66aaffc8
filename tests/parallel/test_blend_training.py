"""A student that is distilled on a blend of existing token files learns the same at every layout (fp32, tiny model)."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemo_minitron.checkpoints.source import open_checkpoint
from nemo_minitron.config.cache import CacheConfig, TargetKind
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.run import DataConfig
from nemo_minitron.data.tokenizer import load_tokenizer
from nemo_minitron.megatron.token_files import write_blend_files
from tests import jobs
from tests.parallel import cache_jobs
from tests.ranks import run_on_ranks
from tests.tiny import write_corpus, write_llama

pytestmark = pytest.mark.slow

LAYOUTS = {
    "TP2": ParallelConfig(tensor=2),
    "PP2": ParallelConfig(pipeline=2),
    "DP2": ParallelConfig(),
}
STEPS = 8


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, Any]:
    """Teacher, student, and two blends of three pairs of token files; one keeps documents apart."""
    folder = tmp_path_factory.mktemp("blend")
    write_llama(folder / "hf", tied=False, trained_steps=100)
    write_corpus(folder / "corpus", documents=90, sentences_each=3)
    run_on_ranks(1, jobs.prepare, folder)
    source = open_checkpoint(folder / "teacher")
    tokenizer = load_tokenizer(source.tokenizer_files())
    prefixes = [[weight, str(folder / "data" / split)] for weight, split in ((0.5, "train"), (0.3, "heldout"))]
    for name, apart in (("blend", False), ("apart", True)):
        config = DataConfig(
            blend=[*prefixes, [0.2, str(folder / "data/calibration")]],
            calibration_fraction=0.1,
            heldout_fraction=0.2,
            reset_attention_mask=apart,
        )
        write_blend_files(tokenizer, folder / name, config, seed=5, vocab_size=source.spec.vocab_size)
    config = jobs.config_for(folder / "hf", folder / "corpus")
    return {"root": folder, "config": config.model_copy(update={"distill": config.distill.with_steps(STEPS)})}


def losses(places: dict[str, Any], data: str, parallel: ParallelConfig, ranks: int) -> list[list[float]]:
    root: Path = places["root"]
    config = places["config"].model_copy(update={"parallel": parallel})
    return run_on_ranks(ranks, jobs.distill_losses, root / "student", root / "teacher", root / data, config)


@pytest.fixture(scope="module")
def alone(places) -> dict[str, list[float]]:
    """Losses of one rank, by the data."""
    return {data: losses(places, data, ParallelConfig(), 1)[0] for data in ("data", "blend", "apart")}


@pytest.mark.parametrize("data", ["blend", "apart"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_are_those_of_one_rank(places, alone, layout, data):
    for rank in losses(places, data, LAYOUTS[layout], 2):
        print(f"{data}, {layout}: losses {rank[0]:.6f} to {rank[-1]:.6f}, one rank's {alone[data][-1]:.6f}")
        np.testing.assert_allclose(rank, alone[data], rtol=1e-5)


def test_other_data_have_other_losses(alone):
    assert len({round(run[0], 5) for run in alone.values()}) == 3


def test_documents_apart_train_the_same_from_a_cache_of_every_probability(places, alone, tmp_path):
    root, config = places["root"], places["config"]
    vocabulary = open_checkpoint(root / "teacher").spec.vocab_size
    full = CacheConfig(kind=TargetKind.TOP_K, k=vocabulary, micro_batch_size=4, samples_per_shard=64)
    run_on_ranks(1, cache_jobs.write, tmp_path / "cache", root / "teacher", root / "apart", config, full)
    pipelined = config.model_copy(update={"parallel": LAYOUTS["PP2"]})
    for ranks, how in ((1, config), (2, pipelined)):
        for rows in run_on_ranks(ranks, cache_jobs.losses, root / "student", tmp_path / "cache", root / "apart", how):
            np.testing.assert_allclose([row["loss"] for row in rows], alone["apart"], rtol=1e-5)
