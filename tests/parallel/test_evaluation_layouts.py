"""Logits and greedy text at every layout are those of transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.errors import DataError
from tests.ranks import run_on_ranks
from tests.tiny import write_llama
from tests.tolerances import TOL

PROMPT = [5, 17, 200, 3, 90]
COUNT = 12
# Odd, so that TP 2 pads the vocabulary; the padded column must not be seen.
VOCABULARY = 251
LAYOUTS = {
    "one": (1, ParallelConfig()),
    "tp2": (2, ParallelConfig(tensor=2)),
    "pp2": (2, ParallelConfig(pipeline=2)),
    "pp2 vpp2": (2, ParallelConfig(pipeline=2, virtual_pipeline=2)),
    "dp2": (2, ParallelConfig()),
    "tp2 pp2": (4, ParallelConfig(tensor=2, pipeline=2)),
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> dict[str, Any]:
    """A random model on disk, and what transformers says of it."""
    from nemo_minitron.checkpoints.nemo1 import write_folder
    from nemo_minitron.checkpoints.open import open_checkpoint

    folder = tmp_path_factory.mktemp("model")
    model = write_llama(folder / "hf", vocab_size=VOCABULARY, max_position_embeddings=32)
    write_folder(open_checkpoint(folder / "hf"), folder / "checkpoint")
    prompt = torch.tensor([PROMPT])
    with torch.no_grad():
        logits = model(prompt).logits
        text = model.generate(prompt, max_new_tokens=COUNT, do_sample=False, eos_token_id=None)
    return {"folder": folder / "checkpoint", "logits": logits, "text": text[0, len(PROMPT) :].tolist()}


def evaluate(folder: Path, parallel: ParallelConfig, end: int) -> dict[str, Any]:
    from nemo_minitron.checkpoints.open import open_checkpoint
    from nemo_minitron.config.parallel import Precision
    from nemo_minitron.evaluation.generate import greedy
    from nemo_minitron.evaluation.logits import gather_logits
    from nemo_minitron.megatron import runtime, sharded_io
    from nemo_minitron.megatron.build import build_chunks

    here = runtime.start(parallel, seed=0)
    spec = open_checkpoint(folder).spec
    chunks = build_chunks(spec, here, Precision.FP32, trainable=False)
    sharded_io.load_weights(chunks, folder)
    for chunk in chunks:
        chunk.output = "hidden"
    tokens = torch.tensor([PROMPT])
    result = {
        "logits": gather_logits(chunks, tokens, here, spec.vocab_size),
        "some": gather_logits(chunks, tokens, here, spec.vocab_size, positions=[3, 1]),
        "text": greedy(chunks, here, PROMPT, COUNT),
        "ended": greedy(chunks, here, PROMPT, COUNT, ends={end}),
        "full": len(greedy(chunks, here, PROMPT * 6, COUNT)),
        "output": {chunk.output for chunk in chunks},
        "errors": [],
    }
    for prompt in ([], [VOCABULARY], PROMPT * 7):
        try:
            greedy(chunks, here, prompt, 1)
        except DataError as error:
            result["errors"].append(str(error))
    return result


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_says_what_transformers_says(teacher, layout):
    world_size, parallel = LAYOUTS[layout]
    end = teacher["text"][6]
    assert len(set(teacher["text"])) > 3, "a text worth comparing"
    for found in run_on_ranks(world_size, evaluate, teacher["folder"], parallel, end):
        torch.testing.assert_close(found["logits"], teacher["logits"], **TOL[torch.float32])
        torch.testing.assert_close(found["some"], teacher["logits"][:, [3, 1]], **TOL[torch.float32])
        assert found["text"] == teacher["text"]
        assert found["ended"] == teacher["text"][: teacher["text"].index(end)]
        assert found["full"] == 32 - 30, "the context ends"
        assert found["output"] == {"hidden"}, "the model is left as it was"
        assert [error.split("\n")[0] for error in found["errors"]] == [
            "prompt of 0 tokens",
            "prompt: holds tokens outside the model's vocabulary",
            "prompt of 35 tokens",
        ]
