"""SmolLM2-135M-Instruct as we import it, against `transformers`' own reading of the same file."""

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from nemo_minitron.config.load import load_recipe
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.data.assets import resolve
from tests import jobs
from tests.ranks import run_on_ranks
from tests.support.real_model import DEMO, theirs

TEXT = "The history of the city begins with a small settlement on the bank of the river, founded in 1204 by traders."


@pytest.mark.model
@pytest.mark.slow
def test_imported_teacher_has_the_logits_of_transformers_alone_and_over_stages(tmp_path):
    gguf = resolve(load_recipe(DEMO).model.source)
    tokens = [AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).encode(TEXT)]
    reference = theirs(gguf)
    with torch.no_grad():
        expected = reference(torch.tensor(tokens)).logits.numpy()
    del reference
    run_on_ranks(1, jobs.save_nemo, gguf, tmp_path / "teacher")
    for world_size, parallel in ((1, ParallelConfig()), (2, ParallelConfig(pipeline=2))):
        config = jobs.config_for(tmp_path, tmp_path, parallel=parallel)
        found = run_on_ranks(world_size, jobs.logits, tmp_path / "teacher", config, tokens)[0]
        np.testing.assert_allclose(found, expected, atol=1e-4)
