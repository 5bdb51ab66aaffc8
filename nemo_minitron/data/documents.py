"""Text files to documents, one at a time: plain text, JSONL, parquet and MediaWiki dumps, compressed or not.

What a file holds is told by its name. Compression is undone first (`.gz`, `.bz2`, `.xz`), then `.txt`, `.jsonl`,
`.ndjson`, `.parquet`, or a name with `.xml` in it (Wikimedia writes `...articles1.xml-p10p30302.bz2`) decides.
"""

import bz2
import gzip
import json
import lzma
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast
from xml.etree import ElementTree

from nemo_minitron.data.wiki import FILE_NAMESPACES, plain_text
from nemo_minitron.errors import DataError

KINDS = ".txt, .jsonl, .ndjson, .parquet, MediaWiki .xml; each but parquet also as .gz, .bz2 or .xz"

TEXT_PART_CHARACTERS = 20_000
"""A plain text file longer than twice this is cut at blank lines into documents of about this size, so that one long
book still makes train, calibration and held-out documents."""

_COMPRESSIONS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_SILENT_NAMESPACE_KEYS = frozenset({"-2", "6", "14"})  # media, file, category, whatever the dump's language calls them
_BLANK_LINES = re.compile(r"\n[ \t]*\n\s*")


@dataclass(frozen=True, slots=True)
class Document:
    """One text, and where it comes from."""

    id: str
    """File name and the line, row, part or page title inside it; for messages, not a key."""
    text: str


def read_documents(path: Path, text_key: str = "text") -> Iterator[Document]:
    """Every document of a file, or of all readable files below a folder in the order of their paths.

    Empty texts are left out. Memory holds one document (one parquet batch, one plain text file).

    Args:
        path: A file or a folder.
        text_key: Field (JSONL) or column (parquet) that holds the text.

    Raises:
        DataError: Nothing is there, the kind is unknown, a file is damaged, or no text is in it.
    """
    found = False
    for file in _files(path):
        for document in _reader(file)(file, text_key):
            if document.text:
                found = True
                yield document
    if not found:
        raise DataError(f"{path}: holds no text", rule="at least one document that is not empty")


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder", remedy="see to data.sources in the recipe")
    inside = (file.relative_to(path) for file in path.rglob("*") if file.is_file())
    visible = sorted(file for file in inside if not any(part.startswith(".") for part in file.parts))
    files = [path / file for file in visible if _kind(file) is not None]
    if not files:
        raise DataError(f"{path}: no readable file below this folder", rule=f"kinds: {KINDS}")
    return files


def _kind(file: Path) -> str | None:
    name = file.name.lower()
    compressed = file.suffix.lower() in _COMPRESSIONS
    if compressed:
        name = name[: -len(file.suffix)]
    if re.search(r"\.xml(-|\.|$)", name):
        return "wiki"
    for suffix, kind in ((".txt", "text"), (".jsonl", "jsonl"), (".ndjson", "jsonl"), (".parquet", "parquet")):
        if name.endswith(suffix) and not (compressed and kind == "parquet"):
            return kind
    return None


def _reader(file: Path) -> Callable[[Path, str], Iterator[Document]]:
    kind = _kind(file)
    if kind is None:
        raise DataError(f"{file}: cannot tell what this file holds from its name", rule=f"kinds: {KINDS}")
    return {"text": _read_text, "jsonl": _read_jsonl, "parquet": _read_parquet, "wiki": _read_wiki}[kind]


def _open(file: Path) -> IO[bytes]:
    return cast(IO[bytes], _COMPRESSIONS.get(file.suffix.lower(), open)(file, "rb"))


def _damaged(file: Path, error: Exception, where: str = "") -> DataError:
    return DataError(f"{file}{where}: {error}", rule="a whole, undamaged file", remedy="get the file again")


def _decode(data: bytes, file: Path, where: str = "") -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file}{where}: byte {error.start} is not UTF-8",
            rule="texts are UTF-8",
            remedy="convert the file with iconv",
        ) from error


def _read_text(file: Path, text_key: str) -> Iterator[Document]:
    try:
        with _open(file) as stream:
            data = stream.read()
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise _damaged(file, error) from error
    text = _decode(data, file).replace("\r\n", "\n").strip()
    if len(text) <= 2 * TEXT_PART_CHARACTERS:
        yield Document(file.name, text)
        return
    part: list[str] = []
    size = count = 0
    for block in _BLANK_LINES.split(text):
        part.append(block)
        size += len(block)
        if size >= TEXT_PART_CHARACTERS:
            count += 1
            yield Document(f"{file.name}:part {count}", "\n\n".join(part))
            part, size = [], 0
    if part:
        yield Document(f"{file.name}:part {count + 1}", "\n\n".join(part))


def _read_jsonl(file: Path, text_key: str) -> Iterator[Document]:
    try:
        with _open(file) as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield Document(f"{file.name}:{number}", _text_of_line(line, file, number, text_key))
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise _damaged(file, error) from error


def _text_of_line(line: bytes, file: Path, number: int, text_key: str) -> str:
    where = f", line {number}"
    try:
        record = json.loads(_decode(line, file, where))
    except json.JSONDecodeError as error:
        raise DataError(f"{file}{where}: {error}", rule="one JSON object a line") from error
    if not isinstance(record, dict) or not isinstance(record.get(text_key), str):
        keys = ", ".join(record) if isinstance(record, dict) else f"a JSON {type(record).__name__}"
        raise DataError(
            f"{file}{where}: no text under {text_key!r} (found: {keys})", remedy="name the field in data.text_key"
        )
    return str(record[text_key]).strip()


def _read_parquet(file: Path, text_key: str) -> Iterator[Document]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(file)
        if text_key not in table.schema_arrow.names:
            columns = ", ".join(table.schema_arrow.names)
            raise DataError(
                f"{file}: no column {text_key!r} (found: {columns})", remedy="name the column in data.text_key"
            )
        row = 0
        for batch in table.iter_batches(batch_size=1024, columns=[text_key]):
            for text in batch.column(0).to_pylist():
                row += 1
                if text is not None and not isinstance(text, str):
                    raise DataError(
                        f"{file}: column {text_key!r} holds {batch.schema.types[0]}", rule="a column of strings"
                    )
                yield Document(f"{file.name}:{row}", (text or "").strip())
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(file, error) from error


def _read_wiki(file: Path, text_key: str) -> Iterator[Document]:
    """Articles (namespace 0, no redirects) of a MediaWiki export; each begins with its title."""
    try:
        with _open(file) as stream:
            for title, markup, silent in _wiki_pages(stream, file):
                text = plain_text(markup, silent)
                yield Document(f"{file.name}:{title}", f"{title}\n\n{text}" if text else "")
    except (ElementTree.ParseError, OSError, EOFError, lzma.LZMAError) as error:
        raise _damaged(file, error) from error


def _wiki_pages(stream: IO[bytes], file: Path) -> Iterator[tuple[str, str, frozenset[str]]]:
    events: Iterator[tuple[str, Any]] = iter(ElementTree.iterparse(stream, events=("start", "end")))
    root = next(events)[1]
    prefix, _, name = root.tag.rpartition("}")
    prefix += "}" if prefix else ""
    if name != "mediawiki":
        raise DataError(f"{file}: its outermost element is <{name}>", rule="a MediaWiki export begins with <mediawiki>")
    silent = set(FILE_NAMESPACES)
    for event, element in events:
        if event != "end":
            continue
        if element.tag == f"{prefix}namespace" and element.get("key") in _SILENT_NAMESPACE_KEYS:
            silent.add((element.text or "").lower())
        elif element.tag == f"{prefix}page":
            markup = element.findtext(f"{prefix}revision/{prefix}text")
            if markup and element.findtext(f"{prefix}ns") == "0" and element.find(f"{prefix}redirect") is None:
                yield element.findtext(f"{prefix}title") or "", markup, frozenset(silent)
            root.clear()  # or every page read so far stays in memory below the root
