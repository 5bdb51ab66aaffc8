"""Files of every kind to documents, and what is said about files that cannot be read."""

import bz2
import gzip
import json
import lzma

import pyarrow
import pytest
from pyarrow import parquet

from nemo_minitron.data.documents import TEXT_PART_CHARACTERS, read_documents
from nemo_minitron.errors import DataError

DUMP = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/" xml:lang="de">
<siteinfo><namespaces><namespace key="6" case="first-letter">Datei</namespace><namespace key="0"/></namespaces>
</siteinfo><page><title>Wien</title><ns>0</ns><id>1</id><revision><id>9</id>
<text>[[Datei:W.jpg|mini|W]]'''Wien''' &lt;!-- x --&gt;liegt
an der [[Donau]].</text></revision></page>
<page><title>Vienna</title><ns>0</ns><redirect title="Wien"/><revision><text>#REDIRECT [[Wien]]</text></revision></page>
<page><title>Diskussion:Wien</title><ns>1</ns><revision><text>Chatter.</text></revision></page>
<page><title>Leer</title><ns>0</ns><revision><text>{{x}}</text></revision></page>
<page><title>Linz</title><ns>0</ns><revision><text>'''Linz''' auch.</text></revision></page>
</mediawiki>"""


def texts(path, **keys) -> list[str]:
    return [document.text for document in read_documents(path, **keys)]


@pytest.mark.parametrize(
    ("suffix", "pack"), [("", bytes), (".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)]
)
def test_every_kind_is_read_through_every_compression(tmp_path, suffix, pack):
    files = {
        "a.txt": "\ufeffPlain täxt.\r\nSecond line.\n".encode(),
        "b.jsonl": b'{"text": "one"}\n\n{"text": " two "}\n{"text": ""}\n',
        "wiki.xml-p10p20-part": DUMP.encode(),
    }
    for name, content in files.items():
        (tmp_path / (name + suffix)).write_bytes(pack(content))
    assert texts(tmp_path / f"a.txt{suffix}") == ["Plain täxt.\nSecond line."]
    assert texts(tmp_path / f"b.jsonl{suffix}") == ["one", "two"]
    expected = ["Wien\n\nWien liegt\nan der Donau.", "Linz\n\nLinz auch."]
    assert texts(tmp_path / f"wiki.xml-p10p20-part{suffix}") == expected


def test_parquet_gives_the_named_column(tmp_path):
    table = pyarrow.table({"body": ["one", None, "  ", "two"], "text": [1, 2, 3, 4]})
    parquet.write_table(table, tmp_path / "a.parquet")
    documents = list(read_documents(tmp_path / "a.parquet", "body", max_bad_fraction=0.25))
    assert [document.text for document in documents] == ["one", "two"]
    assert documents[1].id == "a.parquet:4"
    with pytest.raises(DataError, match="int64"):
        texts(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"no column 'story' \(found: body, text\)"):
        texts(tmp_path / "a.parquet", text_key="story")


def test_a_table_with_two_columns_of_one_name_is_refused(tmp_path):
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    parquet.write_table(table, tmp_path / "a.parquet")
    with pyarrow.OSFile(str(tmp_path / "b.arrow"), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    for name in ("a.parquet", "b.arrow"):
        with pytest.raises(DataError, match="has 2 columns 'text'"):
            texts(tmp_path / name)


def test_a_folder_is_read_in_path_order_without_hidden_and_foreign_files(tmp_path):
    for name in ("b/2.txt", "a/1.txt", "c.txt", ".cache/no.txt", "b/.no.txt", "read.me"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert texts(tmp_path) == ["a/1.txt", "b/2.txt", "c.txt"]


def test_one_long_text_file_becomes_several_documents_and_loses_nothing(tmp_path):
    paragraphs = [f"{number} " + "word " * 300 for number in range(60)]
    (tmp_path / "book.txt").write_text("\n\n".join(paragraphs))
    parts = texts(tmp_path / "book.txt")
    assert len(parts) > 2
    assert all(len(part) >= TEXT_PART_CHARACTERS for part in parts[:-1])
    assert "\n\n".join(parts).split() == "\n\n".join(paragraphs).split()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"ok \xff\xfe", "byte 3 is not UTF-8"),
        ("a.txt", b"  \n", "holds no text"),
        ("a.docx", b"x", "cannot tell what this file holds"),
        ("a.jsonl", b'{"text": "ok"}\n{"text": \n', "line 2"),
        ("a.jsonl", b'{"body": "x", "id": 1}\n', "no text under 'text' (found: body, id)"),
        ("a.jsonl", b"[1]\n", "found: a JSON list"),
        ("a.jsonl", b'{"text": "x", "id": 1, "text": "y"}\n', "key 'text' occurs twice"),
        ("a.txt.gz", gzip.compress(b"text" * 1000, mtime=0)[:-20], "undamaged"),
        ("a.jsonl.bz2", bz2.compress(b"x" * 1000)[:-20], "undamaged"),
        ("a.txt.xz", b"not xz", "undamaged"),
        ("a.parquet", b"PAR1 not parquet", "undamaged"),
        ("a.xml", DUMP[:-30].encode(), "undamaged"),
        ("a.xml", b"", "undamaged"),
        ("a.xml", b"<rss></rss>", "outermost element is <rss>"),
    ],
)
def test_bad_files_get_one_clear_message(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        texts(tmp_path / name)
    assert message in str(caught.value)


def test_missing_and_empty_places_are_told_apart(tmp_path):
    with pytest.raises(DataError, match="no such file or folder"):
        texts(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no readable file"):
        texts(tmp_path)


def test_documents_stream(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "first"}) + "\nnot json\n")
    assert next(iter(read_documents(tmp_path / "a.jsonl"))).text == "first"
