"""Which files of a folder are used: every one is, or is named with the reason."""

import bz2
import gzip
import json
import lzma
import os
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from nemo_minitron.data.account import account, table
from nemo_minitron.data.documents import cut
from nemo_minitron.data.encoder import TextEncoder
from nemo_minitron.data.shards import ShardJob, make_shard, units
from nemo_minitron.data.survey import changes, survey
from nemo_minitron.errors import DataError
from tests.support.users import ordinary_user
from tests.tiny import sentences, write_tokenizer

DUMP = """<mediawiki><page><title>Wien</title><ns>0</ns><revision><text>{text}</text></revision></page>
<page><title>Vienna</title><ns>0</ns><redirect title="Wien"/><revision><text>#REDIRECT</text></revision></page>
<page><title>Talk:Wien</title><ns>1</ns><revision><text>Chatter.</text></revision></page></mediawiki>"""


def lines(*texts: object) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def text(number: int) -> str:
    return sentences(number, 3)


def fill(root: Path) -> dict[str, int]:
    """Twenty kinds of entries; returns the documents that lie in each file which a reader can open."""
    table = pyarrow.table({"text": [text(20), text(21), None]})
    zst = pyarrow.Codec("zstd").compress(lines(text(5), text(6)))
    contents = {
        "a.txt": text(0).encode(),
        "b.jsonl": lines(text(1), None, "\ud800", "", "short"),
        "c.jsonl.gz": gzip.compress(lines(text(2), text(3))),
        "d.ndjson.xz": lzma.compress(lines(text(4))),
        "e.jsonl.zst": zst.to_pybytes(),
        "f.txt.bz2": bz2.compress(text(7).encode()),
        "g.xml": DUMP.format(text=text(8)).encode(),
        "sub/h.txt": text(9).encode(),
        "latin.txt": "Köln liegt am Rhein".encode("latin-1"),
        "packed.jsonl": gzip.compress(lines(text(10))),  # compressed, though its name does not say so
    }
    others = {
        "read.me": b"x",
        "tokens.bin": b"\0" * 8,
        "tokens.idx": b"MMIDIDX",
        "all.tar.gz": gzip.compress(b""),
        "half.jsonl.part": lines(text(1)),
        "pointer.txt": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "pom.xml": b"<?xml version='1.0'?><!-- <mediawiki> --><project/>",
        "picture.txt": b"\x89PNG\0\0\0",
        "dump-multistream-index.txt.bz2": bz2.compress(b"600:10:Wien\n"),
        ".hidden.txt": text(1).encode(),
        ".git/config.txt": text(1).encode(),
        "_temporary/0/part.jsonl": lines(text(1)),
    }
    for name, content in {**contents, **others}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    parquet.write_table(table, root / "k.parquet")
    with pyarrow.OSFile(str(root / "l.arrow"), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(pyarrow.table({"text": [text(22), text(23)]}))
    documents = {"a.txt": 1, "b.jsonl": 5, "c.jsonl.gz": 2, "d.ndjson.xz": 1, "e.jsonl.zst": 2, "f.txt.bz2": 1}
    return documents | {"g.xml": 3, "sub/h.txt": 1, "latin.txt": 1, "packed.jsonl": 1, "k.parquet": 3, "l.arrow": 2}


def link_and_forbid(root: Path, elsewhere: Path) -> None:
    """Links of every kind, and parts that an ordinary user may not read."""
    elsewhere.mkdir()
    elsewhere.chmod(0o755)
    (elsewhere / "m.txt").write_text(text(11))
    (root / "linked").symlink_to(elsewhere)
    (root / "again.txt").symlink_to(root / "a.txt")
    (root / "broken.txt").symlink_to(root / "nowhere.txt")
    (root / "loop").symlink_to(root)
    (root / "secret.txt").write_text(text(12))
    (root / "secret.txt").chmod(0)
    (root / "closed").mkdir()
    (root / "closed/n.txt").write_text(text(13))
    (root / "closed").chmod(0)
    os.mkfifo(root / "pipe.txt")


def test_documents_given_are_documents_used_and_documents_named(public, tmp_path):
    elsewhere, public = public / "elsewhere", public / "texts"
    given = fill(public)
    public.chmod(0o755)
    link_and_forbid(public, elsewhere)
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    with ordinary_user():
        found = survey([public])
    used = {str(file.path.relative_to(public)): file for file in found.files}
    assert used.keys() == given.keys() | {"linked/m.txt"}
    encoder = TextEncoder(tokenizer.backend_tokenizer.to_str(), 0, 256)
    job = ShardJob(found.files, "text", 30, 1, encoder, "uint16", tmp_path)
    parts = [part for unit in units(found.files, 400) for part in make_shard(job, unit)]
    (public / "closed").chmod(0o755)
    sums, tally = account(found, parts)
    assert sums["documents"] + sums["documents_skipped"] == sum(given.values()) + 1
    assert {row["reason"]: row["documents"] for row in sums["skipped"]} == {
        "text is null": 2,
        "half a surrogate pair": 1,
        "not UTF-8": 1,
        "empty": 1,
        "shorter than data.min_characters = 30": 1,
        "a redirect": 1,
        "a page outside the main namespace": 1,
    }
    assert tally.bad == 4
    assert {item.path: item.reason for item in found.left_out} == {
        "read.me": "kind unknown (.me)",
        "tokens.bin": "a Megatron token file (a prefix of these goes under data.blend)",
        "tokens.idx": "a Megatron token file (a prefix of these goes under data.blend)",
        "all.tar.gz": "an archive (unpack it)",
        "half.jsonl.part": "unfinished, or a copy that an editor keeps",
        "pointer.txt": "a Git LFS pointer (get the file itself with `git lfs pull`)",
        "pom.xml": "its outermost element is <project>, not that of a MediaWiki export, <mediawiki>",
        "picture.txt": "binary data under the name of a text",
        "dump-multistream-index.txt.bz2": "kept by another tool beside its data",
        ".hidden.txt": "hidden",
        ".git/config.txt": "hidden",
        "_temporary/0/part.jsonl": "kept by another tool beside its data",
        "broken.txt": "a link to nothing",
        "again.txt": "the same file as a.txt",
        "loop/": "a link to a folder that it lies in",
        "secret.txt": "this user may not read it",
        "closed/": "this user may not read it",
        "pipe.txt": "no regular file",
    }
    told = "\n".join(table(sums, [str(public)]))
    for row in (*sums["skipped"], *sums["left_out"]):
        assert row["reason"] in told
    assert f"{public}/b.jsonl, line 2: 'text' is null" in told


def test_a_file_that_is_named_must_be_readable(public):
    (public / "a.txt").write_text("x")
    (public / "a.txt").chmod(0)
    (public / "b.txt").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with ordinary_user(), pytest.raises(DataError, match=r"a\.txt: this user may not read it"):
        survey([public / "a.txt"])
    with pytest.raises(DataError, match="Git LFS pointer"):
        survey([public / "b.txt"])
    (public / "b.txt").unlink()
    with ordinary_user(), pytest.raises(DataError, match=r"no readable file below this folder \(this user may not"):
        survey([public])


def test_a_file_becomes_unreadable_between_survey_and_reading(public):
    (public / "a.jsonl.gz").write_bytes(gzip.compress(lines("one")))
    found = survey([public])
    (public / "a.jsonl.gz").chmod(0)
    with ordinary_user(), pytest.raises(DataError, match=r"a\.jsonl\.gz: this user may not read it"):
        list(cut(found.files))


def write_arrow(path: Path) -> None:
    table = pyarrow.table({"text": [path.name]})
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def test_a_data_set_that_is_not_complete_is_refused(tmp_path):
    (tmp_path / "train").mkdir()
    write_arrow(tmp_path / "train/data-00000-of-00002.arrow")
    names = [f"data-0000{number}-of-00002.arrow" for number in range(2)]
    state = tmp_path / "train/state.json"
    state.write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    with pytest.raises(DataError, match=r"state\.json: names 'data-00001-of-00002\.arrow', which is not there"):
        survey([tmp_path])
    for damaged in ('{"_data_files": [', "[]", '{"_data_files": ["a.arrow"]}', "{}"):
        state.write_text(damaged)
        with pytest.raises(DataError, match=r"state\.json: .*\n.*datasets library"):
            survey([tmp_path])
    state.write_text(json.dumps({"_data_files": [{"filename": names[0]}]}))
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(DataError, match=r"dataset_dict\.json: names 'test', which is not there"):
        survey([tmp_path])
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    assert [file.path.name for file in survey([tmp_path]).files] == names[:1]


def test_caches_of_the_datasets_library_are_no_data(tmp_path):
    for name in ("data-00000-of-00001.arrow", "cache-1234.arrow"):
        write_arrow(tmp_path / name)
    state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_indices_files": None}
    (tmp_path / "state.json").write_text(json.dumps(state))
    found = survey([tmp_path])
    assert [file.path.name for file in found.files] == ["data-00000-of-00001.arrow"]
    assert ("cache-1234.arrow", "a cache of the datasets library") in {(i.path, i.reason) for i in found.left_out}
    (tmp_path / "state.json").write_text(json.dumps(state | {"_indices_files": [{"filename": "indices.arrow"}]}))
    with pytest.raises(DataError, match="selection of rows"):
        survey([tmp_path])


def test_changed_sources_are_told_and_touched_ones_are_not(tmp_path):
    for name in "abcd":
        (tmp_path / f"{name}.txt").write_text("x" * 200_000)
    before = survey([tmp_path]).fingerprint()
    os.utime(tmp_path / "a.txt", (1, 1))
    assert changes(before, [tmp_path]) == []
    (tmp_path / "a.txt").write_text("y" + "x" * 199_999)
    (tmp_path / "b.txt").write_text("x" * 200_001)
    (tmp_path / "c.txt").unlink()
    (tmp_path / "e.txt").write_text("new")
    told = [line.removeprefix(f"{tmp_path}/") for line in changes(before, [tmp_path])]
    assert told == [
        "a.txt: other content of the same size",
        "b.txt: 200,000 bytes then, 200,001 now",
        "e.txt: new",
        "c.txt: gone",
    ]
