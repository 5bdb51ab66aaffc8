"""Shards: made by any number of processes, killed at any moment, the bytes are the same, and they are Megatron's."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from nemo_minitron.config.run import DataConfig
from nemo_minitron.data import shards as shards_module
from nemo_minitron.data.encoder import TextEncoder
from nemo_minitron.data.merge import SplitWriter, merge
from nemo_minitron.data.shard_pool import default_workers, make_shards, prepare
from nemo_minitron.data.shards import ShardJob
from nemo_minitron.data.survey import survey
from nemo_minitron.errors import DataError
from tests.tiny import sentences, write_tokenizer

CONFIG = DataConfig(sources=("x",), calibration_fraction=0.2, heldout_fraction=0.2, min_characters=30)
DRIVER = """
import sys
from pathlib import Path
from nemo_minitron.data import shards
from nemo_minitron.data.encoder import TextEncoder
from nemo_minitron.data.shard_pool import make_shards, prepare
from nemo_minitron.data.survey import survey
shards.PART_BYTES = 4000
corpus, tokenizer, folder, workers = sys.argv[1:]
files = survey([Path(corpus)]).files
encoder = TextEncoder(Path(tokenizer).read_text(), 0, 256)
job = shards.ShardJob(files, "text", 30, 1, encoder, "uint16", Path(folder))
prepare(job)
print("begins", flush=True)
make_shards(job, int(workers), lambda unit, parts: print(unit.number, flush=True))
"""


@pytest.fixture(scope="module")
def definition(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder / "tokenizer.json"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Some 160 shards of 4,000 bytes: JSONL, plain and compressed, and text."""
    import gzip

    folder = tmp_path_factory.mktemp("corpus")
    rows = [json.dumps({"text": sentences(seed, 1 + seed % 9)}) + "\n" for seed in range(2800)]
    (folder / "a.jsonl").write_text("".join(rows[:1400]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("".join(rows[1400:]).encode(), mtime=0))
    (folder / "c.txt").write_text(sentences(7, 30))
    return folder


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(shards_module, "PART_BYTES", 4000)


def job_for(corpus: Path, definition: Path, folder: Path, **changes) -> ShardJob:
    encoder = TextEncoder(definition.read_text(), 0, 256)
    settings = {"text_key": "text", "min_characters": 30, "seed": 1, "encoder": encoder, "dtype": "uint16"}
    return ShardJob(files=survey([corpus]).files, folder=folder, **settings | changes)


def token_files(job: ShardJob, out: Path) -> dict[str, bytes]:
    out.mkdir()
    found = make_shards(job, 1, lambda unit, parts: pytest.fail("all shards are there"))
    merge(found, CONFIG, out, "uint16", small_corpus=10)
    return {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.fixture(scope="module")
def undisturbed(corpus, definition, tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards_module, "PART_BYTES", 4000)
        job = job_for(corpus, definition, folder / "shards")
        assert prepare(job) == 0
        assert len(make_shards(job, 1, lambda unit, parts: None)) > 140
        return token_files(job, folder / "out")


def test_the_files_are_what_megatron_writes(corpus, definition, undisturbed, tmp_path):
    """The same documents, tokenized one by one and handed to Megatron's own builder."""
    from transformers import PreTrainedTokenizerFast

    from nemo_minitron.data.documents import read_documents
    from nemo_minitron.data.splits import split_of

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(definition))
    builders = {
        name: IndexedDatasetBuilder(str(tmp_path / f"{name}.bin"), dtype=np.uint16)
        for name in ("train", "calibration", "heldout")
    }
    for document in read_documents(corpus):
        if len(document.text) >= 30:
            tokens = [*tokenizer(document.text).input_ids, 0]
            builders[split_of(document, CONFIG, 1)].add_document(np.array(tokens), [len(tokens)])
    for name, builder in builders.items():
        builder.finalize(str(tmp_path / f"{name}.idx"))
        for suffix in (".bin", ".idx"):
            assert (tmp_path / (name + suffix)).read_bytes() == undisturbed[name + suffix], name + suffix


def test_several_processes_make_the_same_bytes(corpus, definition, undisturbed, tmp_path):
    job = job_for(corpus, definition, tmp_path / "shards")
    prepare(job)
    seen: list[int] = []
    make_shards(job, 2, lambda unit, parts: seen.append(unit.number))
    assert sorted(seen) == list(range(len(seen)))
    assert token_files(job, tmp_path / "out") == undisturbed


def test_killed_at_ten_random_moments_the_bytes_are_the_same(corpus, definition, undisturbed, tmp_path):
    (tmp_path / "driver.py").write_text(DRIVER)
    folder = tmp_path / "shards"
    command = [sys.executable, str(tmp_path / "driver.py"), str(corpus), str(definition), str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    rng = random.Random(5)
    kept: dict[str, int] = {}
    for attempt in range(10):
        workers = 1 + attempt % 2
        process = subprocess.Popen(
            [*command, str(workers)], env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        assert process.stdout.readline() == "begins\n"
        told = [process.stdout.readline() for _ in range(rng.randrange(4))]
        time.sleep(rng.random() * 0.02)
        process.send_signal(signal.SIGKILL)
        told += process.stdout.read().splitlines()
        process.wait()
        now = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.npz")}
        assert now.items() >= kept.items(), "a finished shard is never made again"
        said = {f"{int(line):06d}.npz" for line in told if line.strip()}
        assert said <= now.keys()
        kept = now
    assert 0 < len(kept) < 140, "the kills came in the middle"
    subprocess.run([*command, "2"], env=environment, check=True, stdout=subprocess.DEVNULL)
    assert token_files(job_for(corpus, definition, folder), tmp_path / "out") == undisturbed
    assert not list(folder.glob(".*"))


def test_shards_of_other_sources_or_settings_do_not_count(corpus, definition, tmp_path):
    job = job_for(corpus, definition, tmp_path / "shards")
    prepare(job)
    count = len(make_shards(job, 1, lambda unit, parts: None))
    assert prepare(job) == 0
    assert prepare(job_for(corpus, definition, tmp_path / "shards", seed=2)) == count
    assert not list((tmp_path / "shards").glob("*.npz"))


def test_an_error_in_a_process_is_told_as_in_this_one(corpus, definition, tmp_path):
    encoder = TextEncoder(definition.read_text(), 0, 40)
    for workers in (1, 2):
        job = job_for(corpus, definition, tmp_path / str(workers), encoder=encoder)
        prepare(job)
        with pytest.raises(DataError, match="vocabulary of 40"):
            make_shards(job, workers, lambda unit, parts: None)


def test_an_exception_of_the_caller_ends_the_work(corpus, definition, tmp_path):
    def stop(unit: object, parts: object) -> None:
        raise KeyboardInterrupt

    job = job_for(corpus, definition, tmp_path / "shards")
    prepare(job)
    with pytest.raises(KeyboardInterrupt):
        make_shards(job, 2, stop)
    assert len(list(job.folder.glob("*.npz"))) < 10


def test_a_damaged_shard_is_named(corpus, definition, tmp_path):
    job = job_for(corpus, definition, tmp_path / "shards")
    prepare(job)
    found = make_shards(job, 1, lambda unit, parts: None)
    found[3].path.write_bytes(found[3].path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"000003\.npz"):
        merge(found, CONFIG, tmp_path, "uint16", small_corpus=10)


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_an_index_is_megatrons(tmp_path, dtype):
    rng = np.random.default_rng(3)
    writer = SplitWriter(tmp_path / "ours", dtype)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=getattr(np, dtype))
    for _ in range(3):
        documents = [rng.integers(0, 60_000, rng.integers(1, 50)) for _ in range(5)]
        writer.add(np.concatenate(documents), np.array([len(tokens) for tokens in documents], dtype=np.int32))
        for tokens in documents:
            builder.add_document(tokens, [len(tokens)])
    digest = writer.finish()
    builder.finalize(str(tmp_path / "theirs.idx"))
    digests = b""
    for suffix in (".bin", ".idx"):
        content = (tmp_path / f"theirs{suffix}").read_bytes()
        assert (tmp_path / f"ours{suffix}").read_bytes() == content
        digests += hashlib.sha256(content).digest()
    assert digest == hashlib.sha256(digests).hexdigest()


def test_workers_follow_from_the_threads_of_all_ranks_here(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    for name in ("LOCAL_WORLD_SIZE", "OMP_NUM_THREADS", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    assert default_workers() == 8
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert default_workers() == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert default_workers() == 6
    monkeypatch.setenv("OMP_NUM_THREADS", "16")
    assert default_workers() == 8
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert default_workers() == 2
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "torchrun sets one thread a rank")
    assert default_workers() == 8
