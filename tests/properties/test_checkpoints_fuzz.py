"""Damaged checkpoints: every reader gives a whole model or a clear refusal, never another exception."""

import random
from collections import Counter
from pathlib import Path

import pytest
import torch

from nemo_minitron.arch.weights import weights
from nemo_minitron.checkpoints.nemo1 import pack_nemo, write_folder
from nemo_minitron.checkpoints.source import open_checkpoint
from nemo_minitron.errors import MinitronError
from tests import tiny
from tests.unit.test_checkpoints_gguf import make_gguf
from tests.unit.test_checkpoints_nemo1 import UNIFORM, RandomSource

INPUTS_EACH = 40
# Checkpoint, file in it, and how many of its first bytes to damage (headers are where readers can be misled).
TARGETS = {
    "hf weights": ("hf", "hf/model.safetensors", 4000),
    "hf config": ("hf", "hf/config.json", None),
    "tokenizer": ("hf", "hf/tokenizer.json", 2000),
    "torch_dist index": ("folder", "folder/model_weights/.metadata", None),
    "torch_dist data": ("folder", "folder/model_weights/__0_0.distcp", None),
    "torch_dist marker": ("folder", "folder/model_weights/metadata.json", None),
    "nemo config": ("folder", "folder/model_config.yaml", None),
    "nemo archive": ("x.nemo", "x.nemo", None),
    "gguf": ("x.gguf", "x.gguf", 9000),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fuzz")
    tiny.write_llama(root / "hf")
    write_folder(RandomSource(UNIFORM), root / "folder")
    pack_nemo(root / "folder", root / "x.nemo")
    make_gguf(root / "hf", root / "x.gguf")
    return root


@pytest.mark.parametrize("target", TARGETS)
def test_a_whole_model_or_a_refusal(root: Path, target: str) -> None:
    checkpoint, name, limit = TARGETS[target]
    file = root / name
    whole = file.read_bytes()
    rng = random.Random(target)
    outcomes: Counter[str] = Counter()
    try:
        for _ in range(INPUTS_EACH):
            file.write_bytes(_damaged(whole, limit, rng))
            outcomes[_read(root / checkpoint)] += 1
    finally:
        file.write_bytes(whole)
    assert outcomes["refused"] > 0
    assert set(outcomes) <= {"refused", "whole"}
    assert _read(root / checkpoint) == "whole"


def _read(path: Path) -> str:
    try:
        source = open_checkpoint(path)
        for weight in weights(source.spec):
            tensor = source.get(weight.name)
            assert (tuple(tensor.shape), tensor.dtype) == (weight.shape, source.dtype)
            assert tensor.device == torch.device("cpu")
    except MinitronError as error:
        return "refused" if str(error).strip() else "refused without a word"
    return "whole"


def _damaged(whole: bytes, limit: int | None, rng: random.Random) -> bytes:
    data = bytearray(whole)
    for _ in range(rng.choice([1, 1, 3, 10])):
        place = rng.randrange(min(len(data), limit or len(data)))
        data[place] = rng.choice([rng.randrange(256), data[place] ^ (1 << rng.randrange(8)), 0, 255])
    return bytes(data[: rng.randrange(len(data))] if rng.random() < 0.2 else data)
