"""Text files to documents, one at a time: plain text, JSONL, parquet, Arrow and MediaWiki dumps, compressed or not.

A file is cut into parts (`cut`) that can be read apart and in any order (`PartReader`); put one behind the other they
are the file. A document that is no text (null, half a surrogate pair, a line that is not JSON) becomes a fault that is
counted, and the documents around it stay.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from nemo_minitron.data.streams import READ_ERRORS, damaged, opened
from nemo_minitron.data.survey import SourceFile, survey
from nemo_minitron.data.tally import EMPTY, MAX_BAD_FRACTION, Fault, Tally
from nemo_minitron.data.wiki import FILE_NAMESPACES, plain_text
from nemo_minitron.errors import DataError

TEXT_PART_CHARACTERS = 20_000
"""A plain text file longer than twice this is cut at blank lines into documents of about this size, so that one long
book still makes train, calibration and held-out documents."""

PART_BYTES = 8 << 20
"""About how much text one part holds, unless the caller says otherwise."""

_WIKI_SHARE = 4
"""Markup takes longer than text: its parts are smaller by this factor."""
_READ = 1 << 20
_READ_ERRORS: tuple[type[Exception], ...] = (*READ_ERRORS, ElementTree.ParseError)
_SILENT_NAMESPACE_KEYS = frozenset({"-2", "6", "14"})  # media, file, category, whatever the dump's language calls them
_BLANK_LINES = re.compile(r"\n[ \t]*\n\s*")


@dataclass(frozen=True, slots=True)
class Document:
    """One text, and where it comes from."""

    id: str
    """File name and the line, row, part or page title inside it; for messages, not a key."""
    text: str


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of one file."""

    file: int
    """Which file: its index in the survey."""
    first: int = 0
    """JSONL: byte; parquet: row group; Arrow: batch."""
    stop: int | None = None
    """Behind the last one; None for the end of the file."""
    content: Any = None
    """What it holds, if it cannot be read by itself: bytes (compressed JSONL), pages (MediaWiki)."""
    weight: int = 0
    """Bytes of the file on the disk that it stands for."""

    @property
    def load(self) -> int:
        """How much work it is, in bytes of plain text."""
        if isinstance(self.content, bytes):
            return len(self.content)
        if self.content is not None:
            return _WIKI_SHARE * sum(len(page[1]) for page in self.content)
        return self.weight


@dataclass(frozen=True, slots=True)
class Item:
    """A document or a fault."""

    number: int
    """Line, row or part, from 1 at the beginning of the part of the file; 0 where `label` says it."""
    text: str
    label: str = ""
    """Title of a page."""
    fault: Fault | None = None


def read_documents(
    path: Path, text_key: str = "text", *, max_bad_fraction: float = MAX_BAD_FRACTION
) -> Iterator[Document]:
    """Every document of a file, or of all readable files below a folder in the order of their paths.

    Empty texts are left out, and so are documents that are no texts. Memory holds one part of a file.

    Args:
        path: A file or a folder.
        text_key: Field (JSONL) or column (parquet, Arrow) that holds the text.
        max_bad_fraction: More documents than this fraction that are no texts are an error.

    Raises:
        DataError: Nothing is there, the kind is unknown, a file is damaged, or no text is in it; too many documents are
            no texts.
    """
    files = survey([path]).files
    tally = Tally()
    before: dict[int, int] = {}
    for part in cut(files):
        file = files[part.file]
        reader = PartReader(file, part, text_key)
        base = before.get(part.file, 0)
        for item in reader:
            if item.fault is None:
                tally.documents += 1
                yield Document(place(file.path.name, item, base), item.text)
            else:
                tally.skip(item.fault, fault_place(file, item.label, item.number + base if item.number else 0))
        before[part.file] = base + reader.length
    tally.check(max_bad_fraction)
    if not tally.documents:
        raise DataError(f"{path}: holds no text", rule="at least one document that is not empty")


def place(name: str, item: Item, base: int) -> str:
    """A document's name: `a.jsonl:7`, `dump.xml:Title`, or the file alone.

    Args:
        name: The file's.
        item: The document.
        base: Lines or rows before the part that it lies in.
    """
    if item.label:
        return f"{name}:{item.label}"
    return f"{name}:{item.number + base}" if item.number else name


def fault_place(file: SourceFile, label: str, number: int) -> str:
    """Where a fault lies, for messages: `a.jsonl, line 7`."""
    if label:
        return f"{file.path}: {label}"
    unit = "line" if file.kind == "jsonl" else "row"
    return f"{file.path}, {unit} {number}" if number else str(file.path)


def cut(files: Iterable[SourceFile], part_bytes: int = PART_BYTES) -> Iterator[Part]:
    """The files in order, in parts of about so many bytes; the same parts for the same files.

    Raises:
        DataError: A file is damaged, or this user may not read it.
    """
    for index, file in enumerate(files):
        with _damage_told(file.path):
            yield from _CUTTERS[file.kind](index, file, part_bytes)


@contextmanager
def _damage_told(path: Path) -> Iterator[None]:
    """Turn what reading a damaged or forbidden file raises into an error for the user."""
    try:
        yield
    except _READ_ERRORS as error:
        raise damaged(path, error) from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] == "pyarrow":
            raise damaged(path, error) from error
        raise


class PartReader:
    """The items of one part, in order.

    Args:
        file: The file.
        part: The part.
        text_key: Field or column with the text.

    Attributes:
        length: Lines or rows of the part, once it has been read: what the numbers of the next part begin behind.

    Raises:
        DataError: The file is damaged, or has no such column.
    """

    def __init__(self, file: SourceFile, part: Part, text_key: str) -> None:
        self.file = file
        self.part = part
        self.text_key = text_key
        self.length = 0
        self._quoted_key = json.dumps(text_key, ensure_ascii=False).encode()

    def __iter__(self) -> Iterator[Item]:
        with _damage_told(self.file.path):
            yield from getattr(self, f"_{self.file.kind}")()

    def _text(self) -> Iterator[Item]:
        with opened(self.file.path, self.file.compression) as stream:
            data = stream.read()
        try:
            text = data.decode("utf-8-sig").replace("\r\n", "\n").strip()
        except UnicodeDecodeError as error:
            yield Item(0, "", fault=Fault("not UTF-8", f"byte {error.start} is not UTF-8; convert it with iconv"))
            return
        if len(text) <= 2 * TEXT_PART_CHARACTERS:
            yield _item(0, text)
            return
        for number, piece in enumerate(_pieces(text), start=1):
            yield _item(0, piece, label=f"part {number}")

    def _jsonl(self) -> Iterator[Item]:
        lines = self._content().split(b"\n")
        self.length = len(lines) - 1
        for number, line in enumerate(lines, start=1):
            if line and not line.isspace():
                yield self._line(number, line)

    def _content(self) -> bytes:
        if self.part.content is not None:
            return bytes(self.part.content)
        with self.file.path.open("rb") as stream:
            stream.seek(self.part.first)
            return stream.read(-1 if self.part.stop is None else self.part.stop - self.part.first)

    def _line(self, number: int, line: bytes) -> Item:
        # To look at every pair takes several times as long as to read the line.
        hook = self._one_text if line.count(self._quoted_key) > 1 else None
        try:
            record = json.loads(line.decode("utf-8-sig"), object_pairs_hook=hook)
        except UnicodeDecodeError as error:
            return Item(number, "", fault=Fault("not UTF-8", f"byte {error.start} of the line is not UTF-8"))
        except (ValueError, RecursionError) as error:
            return Item(number, "", fault=Fault("not JSON", f"{error}; one JSON object a line"))
        text = record.get(self.text_key) if isinstance(record, dict) else None
        if isinstance(text, str):
            return _item(number, text.strip())
        return Item(number, "", fault=_no_text(record, self.text_key))

    def _one_text(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if sum(key == self.text_key for key, _ in pairs) > 1:
            raise ValueError(f"key {self.text_key!r} occurs twice")
        return dict(pairs)

    def _parquet(self) -> Iterator[Item]:
        from pyarrow import parquet

        with parquet.ParquetFile(self.file.path) as table:
            _check_column(self.file.path, table.schema_arrow.names, self.text_key)
            stop = table.num_row_groups if self.part.stop is None else self.part.stop
            groups = list(range(self.part.first, stop))
            for batch in table.iter_batches(batch_size=1024, row_groups=groups, columns=[self.text_key]):
                yield from self._rows(batch)

    def _arrow(self) -> Iterator[Item]:
        batches = arrow_batches(self.file.path)
        for index, batch in enumerate(batches):
            if self.part.stop is not None and index >= self.part.stop:
                return
            if index >= self.part.first:
                _check_column(self.file.path, batch.schema.names, self.text_key)
                yield from self._rows(batch.select([self.text_key]))

    def _rows(self, batch: Any) -> Iterator[Item]:
        for text in batch.column(0).to_pylist():
            self.length += 1
            if isinstance(text, str):
                yield _item(self.length, text.strip())
            elif text is None:
                yield Item(self.length, "", fault=Fault("text is null"))
            else:
                raise DataError(
                    f"{self.file.path}: column {self.text_key!r} holds {batch.schema.types[0]}",
                    rule="a column of strings",
                    remedy="name the column in data.text_key",
                )

    def _wiki(self) -> Iterator[Item]:
        for page in self.part.content:
            if len(page) == 2:
                yield Item(0, "", label=page[0], fault=Fault(page[1], bad=False))
                continue
            title, markup, silent = page
            text = plain_text(markup, silent)
            yield _item(0, f"{title}\n\n{text}" if text else "", label=title)


def _item(number: int, text: str, *, label: str = "") -> Item:
    """A document; a text that is empty or cannot be written as UTF-8 is a fault."""
    if not text:
        return Item(number, "", label, Fault(EMPTY, bad=False))
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            lone = text[error.start]
            return Item(number, "", label, Fault("half a surrogate pair", f"character {error.start} is {lone!a}"))
    return Item(number, text, label)


def _no_text(record: Any, text_key: str) -> Fault:
    if not isinstance(record, dict):
        return Fault("no JSON object", f"no text under {text_key!r} (found: a JSON {type(record).__name__})")
    if text_key not in record:
        return Fault("no text", f"no text under {text_key!r} (found: {', '.join(record)}); name it in data.text_key")
    if record[text_key] is None:
        return Fault("text is null", f"{text_key!r} is null")
    return Fault("text is no string", f"{text_key!r} is a JSON {type(record[text_key]).__name__}")


def _pieces(text: str) -> Iterator[str]:
    piece: list[str] = []
    size = 0
    for block in _BLANK_LINES.split(text):
        piece.append(block)
        size += len(block)
        if size >= TEXT_PART_CHARACTERS:
            yield "\n\n".join(piece)
            piece, size = [], 0
    if piece:
        yield "\n\n".join(piece)


def _check_column(path: Path, names: list[str], text_key: str) -> None:
    if text_key not in names:
        raise DataError(
            f"{path}: no column {text_key!r} (found: {', '.join(names)})", remedy="name the column in data.text_key"
        )
    if names.count(text_key) > 1:
        raise DataError(
            f"{path}: has {names.count(text_key)} columns {text_key!r}",
            rule="one column of texts",
            remedy="rename all but one of them",
        )


def arrow_batches(path: Path) -> Iterator[Any]:
    """Record batches of an Arrow file, a stream (as `datasets` writes it) or with a footer, memory-mapped."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as source:
        try:
            reader = pyarrow.ipc.open_file(source)
        except pyarrow.ArrowInvalid:
            source.seek(0)
            yield from pyarrow.ipc.open_stream(source)
            return
        yield from (reader.get_batch(index) for index in range(reader.num_record_batches))


# -- cutting -----------------------------------------------------------------------------------------------------------


def _cut_text(index: int, file: SourceFile, part_bytes: int) -> Iterator[Part]:
    yield Part(index, weight=file.size)


def _cut_jsonl(index: int, file: SourceFile, part_bytes: int) -> Iterator[Part]:
    if file.compression:
        yield from _cut_stream(index, file, part_bytes)
        return
    with file.path.open("rb") as stream:
        first = 0
        while first < file.size:
            stream.seek(first + part_bytes)
            stream.readline()
            stop = min(stream.tell(), file.size)
            yield Part(index, first, stop, weight=stop - first)
            first = stop


def _cut_stream(index: int, file: SourceFile, part_bytes: int) -> Iterator[Part]:
    """Complete lines of a compressed file; what a part stands for on the disk is spread evenly over what is known."""
    rest = b""
    with opened(file.path, file.compression) as stream:
        while data := _read(stream, part_bytes):
            content, newline, rest = (rest + data).rpartition(b"\n")
            if newline:
                yield Part(index, content=content + newline)
    yield Part(index, content=rest, weight=file.size)


def _read(stream: Any, size: int) -> bytes:
    pieces = []
    while size > 0 and (piece := stream.read(min(size, _READ))):
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)


def _cut_parquet(index: int, file: SourceFile, part_bytes: int) -> Iterator[Part]:
    from pyarrow import parquet

    with parquet.ParquetFile(file.path) as table:
        groups = [table.metadata.row_group(number).total_byte_size for number in range(table.num_row_groups)]
    total = max(sum(groups), 1)
    yield from _grouped(index, groups, part_bytes, file.size / total)


def _cut_arrow(index: int, file: SourceFile, part_bytes: int) -> Iterator[Part]:
    batches = [batch.nbytes for batch in arrow_batches(file.path)]
    yield from _grouped(index, batches, part_bytes, file.size / max(sum(batches), 1))


def _grouped(index: int, sizes: list[int], part_bytes: int, share: float) -> Iterator[Part]:
    """Consecutive pieces of known sizes as parts of at least `part_bytes`."""
    first = held = 0
    for number, size in enumerate(sizes, start=1):
        held += size
        if held >= part_bytes or number == len(sizes):
            yield Part(index, first, number, weight=round(held * share))
            first, held = number, 0


def _cut_wiki(index: int, file: SourceFile, part_bytes: int) -> Iterator[Part]:
    pages: list[tuple[Any, ...]] = []
    held = 0
    with opened(file.path, file.compression) as stream:
        for page in _wiki_pages(stream, file.path):
            pages.append(page)
            held += len(page[1])
            if held >= part_bytes // _WIKI_SHARE:
                yield Part(index, content=pages)
                pages, held = [], 0
    yield Part(index, content=pages, weight=file.size)


def _wiki_pages(stream: Any, path: Path) -> Iterator[tuple[Any, ...]]:
    """Pages of a MediaWiki export: title, markup and silent namespaces of an article, title and reason of another."""
    events: Iterator[tuple[str, Any]] = iter(ElementTree.iterparse(stream, events=("start", "end")))
    root = next(events)[1]
    prefix, _, name = root.tag.rpartition("}")
    prefix += "}" if prefix else ""
    if name != "mediawiki":
        raise DataError(f"{path}: its outermost element is <{name}>", rule="a MediaWiki export begins with <mediawiki>")
    silent = set(FILE_NAMESPACES)
    for event, element in events:
        if event != "end":
            continue
        if element.tag == f"{prefix}namespace" and element.get("key") in _SILENT_NAMESPACE_KEYS:
            silent.add((element.text or "").lower())
        elif element.tag == f"{prefix}page":
            title = element.findtext(f"{prefix}title") or ""
            markup = element.findtext(f"{prefix}revision/{prefix}text")
            if element.findtext(f"{prefix}ns") != "0":
                yield title, "a page outside the main namespace"
            elif element.find(f"{prefix}redirect") is not None:
                yield title, "a redirect"
            elif not markup:
                yield title, EMPTY
            else:
                yield title, markup, frozenset(silent)
            root.clear()  # or every page read so far stays in memory below the root


_CUTTERS: dict[str, Callable[[int, SourceFile, int], Iterator[Part]]] = {
    "text": _cut_text,
    "jsonl": _cut_jsonl,
    "parquet": _cut_parquet,
    "arrow": _cut_arrow,
    "wiki": _cut_wiki,
}
