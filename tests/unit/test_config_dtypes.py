"""A dtype has several words, and every door takes all of them."""

import pytest
import torch
from pydantic import ValidationError
from typer.testing import CliRunner

from nemo_minitron.checkpoints.source import open_checkpoint
from nemo_minitron.cli.main import app
from nemo_minitron.config.dtypes import DTYPE_WORDS, dtype_name
from nemo_minitron.config.model_settings import ModelSettings
from nemo_minitron.config.parallel import Precision
from nemo_minitron.errors import ConfigError
from nemo_minitron.models.nemo_settings import model_settings
from tests.tiny import write_llama

WORDS = [(word, name) for name in ("float32", "bfloat16") for word in DTYPE_WORDS[name]]


def test_no_word_stands_for_two_dtypes_and_each_is_known_to_torch():
    words = [word for several in DTYPE_WORDS.values() for word in several]
    assert len(words) == len(set(words))
    assert all(str(getattr(torch, name)) in DTYPE_WORDS[name] for name in DTYPE_WORDS)
    assert dtype_name(32) == "float32"
    assert dtype_name("int8") is None


@pytest.mark.parametrize(("word", "name"), WORDS)
def test_recipes_and_nemo_configurations_take_every_word(word, name):
    expected = {"float32": Precision.FP32, "bfloat16": Precision.BF16}[name]
    assert ModelSettings.model_validate({"precision": word}).precision is expected
    assert model_settings({"precision": word}).precision is expected


@pytest.mark.parametrize("word", ["fp16", "float16", "int8", "bf8"])
def test_dtypes_that_nothing_computes_in_are_refused(word):
    with pytest.raises(ValidationError, match="precision"):
        ModelSettings.model_validate({"precision": word})
    with pytest.raises(ConfigError, match=f"precision = '{word}'"):
        model_settings({"precision": word})


@pytest.mark.parametrize("word", ["bf16", "bfloat16", "fp16", "float16"])
def test_convert_takes_every_word(word, tmp_path):
    write_llama(tmp_path / "hf")
    done = CliRunner().invoke(app, ["convert", str(tmp_path / "hf"), str(tmp_path / "out"), "--dtype", word])
    assert done.exit_code == 0, done.output
    assert str(open_checkpoint(tmp_path / "out").dtype) == f"torch.{dtype_name(word)}"
