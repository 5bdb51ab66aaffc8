"""The model class called like any module: logits of tokens, those of transformers."""

from pathlib import Path

import numpy as np
import pytest
import torch

from nemo_minitron.errors import DataError
from tests.ranks import run_on_ranks
from tests.tiny import write_llama


def logits(folder: Path, tokens: list[list[int]]) -> tuple[np.ndarray, str, str]:
    """Logits on one rank, what the model's chunk returns afterwards, and what is said of texts that are too long."""
    from nemo_minitron import MegatronGPTModel
    from nemo_minitron.megatron.forward import MicroBatch

    config = MegatronGPTModel.restore_from(folder, return_config=True)
    config.precision = "32"
    model = MegatronGPTModel.restore_from(folder, override_config_path=config)
    with torch.no_grad():
        found = model(torch.tensor(tokens))
    long = torch.zeros(1, 257, dtype=torch.int64)
    with pytest.raises(DataError) as refused:
        model.micro_batches(MicroBatch.of(long, long, torch.ones_like(long, dtype=torch.bool)))
    return found.numpy(), model.chunks[0].output, str(refused.value)


def changed_too_late(folder: Path) -> list[str]:
    """What is said of a key that is changed in a built model."""
    from nemo_minitron import MegatronGPTModel
    from nemo_minitron.errors import ConfigError

    model = MegatronGPTModel.restore_from(folder)
    model.cfg.micro_batch_size = 4
    try:
        model.setup("fit")
    except ConfigError as error:
        return error.problems
    return []


def test_a_configuration_that_is_changed_after_it_was_read_is_refused(tmp_path):
    write_llama(tmp_path / "hf")
    [[problem]] = run_on_ranks(1, changed_too_late, tmp_path / "hf")
    assert problem.startswith("micro_batch_size = 4: changed after the model was built")


def test_calling_the_model_gives_logits_and_leaves_it_as_it_was(tmp_path):
    reference = write_llama(tmp_path / "hf").float().eval()
    tokens = torch.randint(0, reference.config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
    [(found, output, refused)] = run_on_ranks(1, logits, tmp_path / "hf", tokens.tolist())
    with torch.no_grad():
        expected = reference(tokens).logits.numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert output == "hidden", "the losses hold the output layer"
    assert "sequences of 257 tokens" in refused
    assert "at most 256" in refused
