"""A `.nemo` written on one rank gives the same logits at other layouts, and those of `transformers`."""

from pathlib import Path

import numpy as np
import pytest
import torch

from nemo_minitron.config.parallel import ParallelConfig
from tests import jobs
from tests.ranks import run_on_ranks
from tests.tiny import write_llama

TOKENS = torch.randint(1, 256, (2, 48), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.fixture(scope="module", params=["tied", "untied"])
def saved(request, tmp_path_factory) -> tuple[Path, np.ndarray]:
    """A `.nemo` of six layers with nine heads in three groups, and its logits by `transformers`."""
    folder = tmp_path_factory.mktemp(request.param)
    sizes = {
        "num_hidden_layers": 6,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "hidden_size": 72,
        "vocab_size": 320,
    }
    reference = write_llama(folder / "hf", tied=request.param == "tied", **sizes)
    run_on_ranks(1, jobs.save_nemo, folder / "hf", folder / "model.nemo")
    with torch.no_grad():
        return folder / "model.nemo", reference(torch.tensor(TOKENS)).logits.numpy()


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [
        (1, ParallelConfig()),
        (2, ParallelConfig(pipeline=2)),
        (3, ParallelConfig(pipeline=3)),
        (3, ParallelConfig(tensor=3)),
        (2, ParallelConfig(pipeline=2, virtual_pipeline=3)),
    ],
    ids=["one", "pp2", "pp3", "tp3", "pp2_vpp3"],
)
@pytest.mark.parametrize("form", ["archive", "folder"])
def test_nemo_gives_the_logits_of_transformers_at_every_layout(saved, world_size, parallel, form, tmp_path):
    path, expected = saved
    if form == "folder":
        run_on_ranks(1, jobs.save_nemo, path, tmp_path / "folder")
        path = tmp_path / "folder"
    config = jobs.config_for(path, path, parallel=parallel)
    for found in run_on_ranks(world_size, jobs.logits, path, config, TOKENS):
        np.testing.assert_allclose(found, expected, atol=1e-4)
