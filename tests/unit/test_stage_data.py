"""Stages data and chat as a user sees them: the table, what is skipped, the limit, going on, and changed sources."""

import io
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from nemo_minitron.callbacks.reporter import Reporter
from nemo_minitron.config.load import load_recipe
from nemo_minitron.data import shards as shards_module
from nemo_minitron.errors import DataError
from nemo_minitron.report import tables
from nemo_minitron.stages import data, sources
from nemo_minitron.stages import tokenize_chat as chat
from tests.tiny import sentences, write_llama, write_tokenizer

RECIPE = Path(__file__).parents[2] / "recipes/tiny/tiny_cpu.yaml"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    write_llama(folder)
    tokenizer = write_tokenizer(folder)
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    tokenizer.save_pretrained(folder)
    return folder


def write(path: Path, texts: list[object]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def corpus(tmp_path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    good = [sentences(seed, 8) for seed in range(40)]
    write(folder / "a.jsonl", [*good, None, "\ud800", "short", ""])
    (folder / "b.txt").write_text(sentences(99, 8))
    (folder / "c.csv").write_text("x")
    return folder


def run(stage, teacher: Path, out: Path, *overrides: str) -> tuple[dict, str]:
    config = load_recipe(RECIPE, [f"model.source={teacher}", *overrides])
    stream = io.StringIO()
    reporter = Reporter(stream=stream, terminal=False)
    context = SimpleNamespace(
        world_size=1, share=lambda job: None, config=config, out=out, input=lambda role: teacher, reporter=reporter
    )
    out.mkdir(parents=True, exist_ok=True)
    return stage.run(context), stream.getvalue()


def test_the_stage_ends_with_a_table_and_the_same_is_in_its_result(teacher, corpus, tmp_path):
    result, said = run(data, teacher, tmp_path / "out", f"data.sources={corpus}")
    account = result["sources"]
    assert account["files"] == {"used": 2, "left_out": 1}
    assert account["documents"] == 41
    assert account["documents_skipped"] == 4
    assert account["tokens"] == sum(split["tokens"] for split in result["splits"].values())
    assert [(row["kind"], row["documents"], row["skipped"]) for row in account["rows"]] == [
        (".jsonl", 40, 4),
        (".txt", 1, 0),
    ]
    for line in (
        f"skipped 1: text is null: {corpus}/a.jsonl, line 41",
        f"skipped 1: half a surrogate pair: {corpus}/a.jsonl, line 42",
        "skipped 1: empty",
        "skipped 1: shorter than data.min_characters = 20",
        "not used 1: kind unknown (.csv): c.csv",
    ):
        assert line in said
    assert "2 bad documents skipped" in result["summary"]
    assert ("skipped", "text is null") in [row[:2] for row in tables.data(account)["rows"]]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *(f"{split}.{suffix}" for split in ("train", "calibration", "heldout") for suffix in ("bin", "idx")),
        "data.json",
        "sources.json",
    }


def test_above_the_limit_it_stops_and_writes_nothing(teacher, corpus, tmp_path):
    with pytest.raises(DataError, match=r"2 of 45 documents are no texts(.|\n)*at most 0\.04 of all"):
        run(data, teacher, tmp_path / "out", f"data.sources={corpus}", "data.max_bad_fraction=0.04")
    assert not list((tmp_path / "out").glob("*.*n"))
    with pytest.raises(DataError, match=r"hold no text \(2 are shorter than data\.min_characters = 20\)"):
        run(data, teacher, tmp_path / "out", f"data.sources={write(tmp_path / 'd.jsonl', ['a', 'b'])}")
    write(tmp_path / "e.jsonl", [None] * 1000)
    with pytest.raises(DataError, match="some of the first documents are texts"):
        run(data, teacher, tmp_path / "out", f"data.sources={tmp_path / 'e.jsonl'}", "data.max_bad_fraction=1")


def test_an_attempt_that_was_cut_off_is_taken_up(teacher, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "PART_BYTES", 4000)
    keys = (f"data.sources={corpus}", "data.workers=1")  # what is replaced below, other processes do not see
    expected, _ = run(data, teacher, tmp_path / "undisturbed", *keys)
    made: list[int] = []

    def make(job, unit, real=shards_module.make_shard):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(unit.number)
        return real(job, unit)

    with monkeypatch.context() as patch:
        patch.setattr("nemo_minitron.data.shard_pool.make_shard", make)
        with pytest.raises(KeyboardInterrupt):
            run(data, teacher, tmp_path / "out", *keys)
    assert len(list((tmp_path / "out/.shards").glob("*.npz"))) == 2
    (tmp_path / "out/.tokens-killed").mkdir()
    result, said = run(data, teacher, tmp_path / "out", *keys)
    assert "MB were tokenized before" in said
    assert result == expected
    for path in (tmp_path / "undisturbed").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert not list((tmp_path / "out").glob(".*"))


def test_progress_has_tokens_a_second(teacher, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "_SHOWN_FROM", 1)
    _, said = run(data, teacher, tmp_path / "out", f"data.sources={corpus}")
    assert "data 1/1 MB" in said
    assert "tokens/s" in said


def test_changed_sources_are_told_when_the_stage_is_skipped(teacher, corpus, tmp_path):
    run(data, teacher, tmp_path / "out", f"data.sources={corpus}")
    config = load_recipe(RECIPE, [f"model.source={teacher}", f"data.sources={corpus}"])
    folder = SimpleNamespace(stage=lambda name: tmp_path / "out")
    assert sources.changed(config, folder) == []
    (corpus / "b.txt").write_text("other")
    (told,) = sources.changed(config, folder)
    assert told.startswith(f"{corpus}/b.txt: ")
    assert told.endswith("bytes then, 5 now")


def test_conversations_that_are_skipped_cut_or_left_out_are_counted_in_the_line(teacher, tmp_path):
    talk = [{"role": "user", "content": "the river"}, {"role": "assistant", "content": "the king"}]
    long_answer = [talk[0], {"role": "assistant", "content": sentences(3, 40)}]
    long_prompt = [{"role": "user", "content": sentences(4, 40)}, talk[1]]
    lines = [{"messages": [{**talk[0], "content": f"the river {n}"}, talk[1]]} for n in range(60)]
    lines += [{"messages": long_answer}] * 3 + [{"messages": long_prompt}] * 2
    lines += [{"messages": [{"role": "user", "content": None}, talk[1]]}]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    keys = (
        f"tune.sources=[{tmp_path}/chat.jsonl]",
        "tune.tokens=1024",
        "tune.batch.sequence_length=64",
        "data.sources=x",
    )
    result, said = run(chat, teacher, tmp_path / "out", *keys)
    splits = result["splits"].values()
    assert sum(split["cut"] for split in splits) == 3
    assert sum(split["left_out"] for split in splits) == 2
    assert sum(split["conversations"] for split in splits) == 63
    assert "1 faulty lines skipped" in result["summary"]
    assert "cut at 64 tokens" in result["summary"]
    assert "left out" in result["summary"]
    assert "chat.jsonl:66: message 1 needs a content (a text); it has null" in said
    tokens = np.fromfile(tmp_path / "out/train.bin", dtype=np.uint16)
    assert len(tokens) == result["splits"]["train"]["tokens"]
