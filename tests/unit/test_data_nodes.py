"""Several nodes that see one folder make the shards of one job together: the bytes are those of one node alone."""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemo_minitron.config.load import load_recipe
from nemo_minitron.data import shard_pool
from nemo_minitron.data import shards as shards_module
from nemo_minitron.data.claims import Claims
from nemo_minitron.data.encoder import TextEncoder
from nemo_minitron.data.shard_pool import help_with, make_shards, prepare
from nemo_minitron.data.shards import ShardJob, make_shard
from nemo_minitron.data.survey import survey
from nemo_minitron.errors import DataError
from tests.ranks import run_on_ranks
from tests.tiny import sentences, write_corpus, write_llama, write_tokenizer

RECIPE = Path(__file__).parents[2] / "recipes/tiny/tiny_cpu.yaml"


@pytest.fixture
def job(tmp_path, monkeypatch) -> ShardJob:
    """Some 30 shards."""
    monkeypatch.setattr(shards_module, "PART_BYTES", 4000)
    monkeypatch.setattr(shard_pool, "_POLL_SECONDS", 0.01)
    write_tokenizer(tmp_path / "tokenizer")
    rows = [json.dumps({"text": sentences(seed, 1 + seed % 9)}) + "\n" for seed in range(400)]
    (tmp_path / "a.jsonl").write_text("".join(rows))
    encoder = TextEncoder((tmp_path / "tokenizer/tokenizer.json").read_text(), 0, 256)
    files = survey([tmp_path / "a.jsonl"]).files
    return ShardJob(files, "text", 30, 1, encoder, "uint16", tmp_path / "shards")


def contents(job: ShardJob) -> list[Any]:
    """Every shard's tokens and counts, in order."""
    found = make_shards(job, 1, lambda unit, parts: pytest.fail("all shards are there"))
    return [(shard.array("tokens").tolist(), shard.parts()) for shard in found]


@pytest.fixture
def alone(job) -> list[Any]:
    prepare(job)
    make_shards(job, 1, lambda unit, parts: None)
    found = contents(job)
    for path in job.folder.glob("*.npz"):
        path.unlink()
    return found


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_two_nodes_share_the_work_and_every_shard_is_counted_once(job, alone):
    prepare(job)
    made: dict[str, int] = {}
    counted: list[int] = []
    met = threading.Barrier(2)

    def done(unit, parts):
        counted.append(unit.number)
        if len(counted) == 1:
            met.wait(30)  # the first shard is made; now the other node begins, and is waited for
            until(lambda: len(list(job.folder.glob("*.npz"))) >= 4)

    def other():
        met.wait(30)
        made["other"] = help_with(job, 1, Claims(job.folder))

    thread = threading.Thread(target=other)
    thread.start()
    make_shards(job, 1, done, Claims(job.folder))
    thread.join()
    assert 0 < made["other"] < len(alone)
    assert sorted(counted) == list(range(len(alone)))
    assert contents(job) == alone


def test_what_another_node_has_claimed_and_never_finishes_is_made_here(job, alone, monkeypatch):
    prepare(job)
    lost = Claims(job.folder)
    assert all(lost.take(number) for number in (0, 3, 4))
    assert not Claims(job.folder).take(3)
    monkeypatch.setattr(shard_pool, "_PATIENCE_SECONDS", 0.05)
    monkeypatch.setattr(shard_pool, "_PATIENCE", 0)
    counted: list[int] = []
    make_shards(job, 1, lambda unit, parts: counted.append(unit.number), Claims(job.folder))
    assert sorted(counted) == list(range(len(alone)))
    assert contents(job) == alone


def test_a_node_that_cannot_gives_up_what_it_has_claimed(job, alone, monkeypatch):
    """Its disk lacks the sources; the node that looks after the job has them, and does not wait."""
    prepare(job)

    def absent(job, unit):
        raise DataError("a.jsonl: no such file")

    with monkeypatch.context() as patch:
        patch.setattr(shard_pool, "make_shard", absent)
        with pytest.raises(DataError, match="no such file"):
            help_with(job, 1, Claims(job.folder))
    assert list(job.folder.glob("*.claim")) == []
    make_shards(job, 1, lambda unit, parts: None, Claims(job.folder))
    assert contents(job) == alone


def test_an_error_of_the_first_node_stops_the_others(job):
    prepare(job)

    def refuse(unit, parts):
        raise DataError("too many bad documents")

    with pytest.raises(DataError, match="too many"):
        make_shards(job, 1, refuse, Claims(job.folder))
    assert help_with(job, 1, Claims(job.folder)) == 0
    prepare(job)
    assert help_with(job, 1, Claims(job.folder)) > 10, "the next attempt begins anew"


def test_a_later_shard_of_another_node_is_waited_for(job, alone):
    prepare(job)
    claims = Claims(job.folder)
    units = list(shards_module.units(job.files, 4000))
    assert claims.take(2)
    timer = threading.Timer(0.5, make_shard, (job, units[2]))
    timer.start()
    counted: list[int] = []
    make_shards(job, 1, lambda unit, parts: counted.append(unit.number), Claims(job.folder))
    assert counted[-1] == 2
    assert contents(job) == alone


def run_data(overrides: list[str], run: Path, node: bool) -> dict[str, Any]:
    """Stages import and data; each rank is a node of its own."""
    import os

    from nemo_minitron.callbacks.reporter import Reporter
    from nemo_minitron.data import shards
    from nemo_minitron.megatron import runtime
    from nemo_minitron.stages import data
    from nemo_minitron.stages.chain import chain_for
    from nemo_minitron.stages.engine import Request, join_processes, run_chain
    from nemo_minitron.stages.run_folder import RunFolder

    os.environ["LOCAL_RANK"], os.environ["LOCAL_WORLD_SIZE"] = ("0", "1") if node else (os.environ["RANK"], "2")
    shards.PART_BYTES = 4000
    helped: list[int] = []
    original = data.help_with
    data.help_with = lambda *args: helped.append(original(*args))
    config = load_recipe(RECIPE, overrides)
    folder = RunFolder(run)
    processes = join_processes(config, folder)
    try:
        run_chain(
            chain_for(config),
            Request(config=config, run=folder, last="data"),
            processes=processes,
            reporter=Reporter(silent=True),
        )
    finally:
        runtime.stop()
    return {"helped": helped, "digest": folder.result("data")["data_digest"]}


def test_the_first_rank_of_each_node_takes_part_in_a_run(tmp_path):
    write_llama(tmp_path / "hf")
    write_corpus(tmp_path / "corpus", documents=120)
    overrides = [f"model.source={tmp_path / 'hf'}", f"data.sources=[{tmp_path / 'corpus'}]", "data.workers=1"]
    (alone,) = run_on_ranks(1, run_data, overrides, tmp_path / "alone", True)
    nodes = run_on_ranks(2, run_data, overrides, tmp_path / "nodes", True)
    together = run_on_ranks(2, run_data, overrides, tmp_path / "together", False)
    assert [len(rank["helped"]) for rank in nodes] == [0, 1], "once, on the node that rank 0 is not on"
    assert [len(rank["helped"]) for rank in together] == [0, 0]
    assert {rank["digest"] for rank in (alone, *nodes, *together)} == {alone["digest"]}
