"""Training samples over several ranks: one builds the index, all read the same one."""

from pathlib import Path
from typing import Any

import pytest

from nemo_minitron.config.run import DataConfig
from nemo_minitron.data.documents import Document
from nemo_minitron.megatron.data import write_token_files
from nemo_minitron.megatron.token_files import write_blend_files
from tests.ranks import run_on_ranks
from tests.tiny import sentences, write_tokenizer

CONFIG = DataConfig(sources=("x",), min_characters=10)
LENGTH, SAMPLES = 24, 40


@pytest.fixture
def folder(tmp_path) -> Path:
    documents = [Document(str(seed), sentences(seed, 1 + seed % 7)) for seed in range(40)]
    write_token_files(documents, write_tokenizer(tmp_path / "tokenizer"), tmp_path / "tokens", CONFIG, seed=5)
    return tmp_path / "tokens"


def read_share(folder: Path) -> dict[str, Any]:
    from nemo_minitron.config.parallel import ParallelConfig
    from nemo_minitron.megatron import runtime
    from nemo_minitron.megatron.data import loader, training_dataset

    here = runtime.start(ParallelConfig(), seed=0)
    dataset = training_dataset(folder, LENGTH, SAMPLES, seed=3)
    batches = list(loader(dataset, global_batch_size=8, dp_rank=here.dp_rank, dp_size=here.dp_size, drop_last=True))
    return {
        "tokens": [batch.tokens.tolist() for batch in batches],
        "indices": sorted(path.name for path in (folder / "index").rglob("*")),
    }


def test_ranks_share_one_index_and_split_every_batch(folder):
    alone = run_on_ranks(1, read_share, folder)[0]
    for path in sorted((folder / "index").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    shares = run_on_ranks(2, read_share, folder)
    together = [first + second for first, second in zip(*(share["tokens"] for share in shares), strict=True)]
    assert together == alone["tokens"]
    assert shares[0]["indices"] == shares[1]["indices"] == alone["indices"]
    assert len([name for name in alone["indices"] if name.endswith(".npy")]) == 3


def test_ranks_share_a_blend_and_one_that_was_half_built_is_built_anew(folder, tmp_path):
    prefixes = [[0.75, str(folder / "train")], [0.25, str(folder / "heldout")]]
    config = DataConfig(blend=prefixes, calibration_fraction=0, heldout_fraction=0)
    write_blend_files(write_tokenizer(tmp_path / "t"), tmp_path / "blend", config, seed=5, vocab_size=256)
    alone = run_on_ranks(1, read_share, tmp_path / "blend")[0]
    (cache,) = (tmp_path / "blend/index").iterdir()
    (cache / "COMPLETE").unlink()
    for path in cache.glob("*.npy"):
        path.write_bytes(b"cut short")
    shares = run_on_ranks(2, read_share, tmp_path / "blend")
    together = [first + second for first, second in zip(*(share["tokens"] for share in shares), strict=True)]
    assert together == alone["tokens"]
    assert shares[0]["indices"] == shares[1]["indices"] == alone["indices"]
