"""Token files: Megatron's `.bin` and `.idx` for each split, and `data.json`, which says what is in them.

One sequence a document, with one end-of-document token behind it. `data.json` is written last, so a folder that has it
is whole.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder
from numpy.typing import NDArray

from nemo_minitron.config.run import DataConfig
from nemo_minitron.data.documents import Document
from nemo_minitron.data.splits import Split, assign, requested, split_of
from nemo_minitron.data.tokenizer import encode_documents, end_of_document, tokenizer_digest
from nemo_minitron.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

INFO_NAME = "data.json"
_FORMAT = 1
# With fewer documents a split may come out empty by chance; such a corpus is held in memory and shared out as a whole.
_SMALL_CORPUS = 1000
# Texts tokenized at one time: enough for every core, little enough for memory.
_BATCH_CHARACTERS = 4_000_000
_BATCH_DOCUMENTS = 1000


class SplitInfo(TypedDict):
    """One pair of token files."""

    documents: int
    tokens: int
    """With the end-of-document tokens."""
    bytes: int
    """Size of the texts in UTF-8: bits per byte = nats per token * tokens / bytes / ln 2."""
    sha256: str
    """Of the `.bin` file, then the `.idx` file."""


class DataInfo(TypedDict):
    """What `data.json` holds."""

    format: int
    seed: int
    vocab_size: int
    end_of_document: int
    dtype: str
    tokenizer_digest: str
    data_digest: str
    """Of all splits' token files: the same texts, tokenizer, fractions and seed give the same digest."""
    splits: dict[str, SplitInfo]


def write_token_files(
    documents: Iterable[Document],
    tokenizer: "PreTrainedTokenizerFast",
    folder: Path,
    config: DataConfig,
    *,
    seed: int,
    vocab_size: int | None = None,
) -> DataInfo:
    """Tokenize documents and share them out between the splits.

    Called by one rank. Documents shorter than `config.min_characters` are left out. A failed call leaves files that
    were there before as they were.

    Args:
        documents: Read once, in order; held in memory only while they are few.
        tokenizer: The model's own.
        folder: Made if missing; gets `<split>.bin`, `<split>.idx` and `data.json`.
        config: Fractions and the shortest length.
        seed: Which documents go where.
        vocab_size: Of the model, without padding; the tokenizer's own size unless given.

    Raises:
        DataError: There are too few texts, or a token is outside the vocabulary.
    """
    vocab_size = len(tokenizer) if vocab_size is None else vocab_size
    dtype = DType.optimal_dtype(vocab_size)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder, prefix=".tokens-"))
    try:
        files = {split: _SplitFiles(temporary / split, dtype) for split in requested(config)}
        for texts, owners in _batches(_share_out(documents, config, seed)):
            for text, split, tokens in zip(texts, owners, encode_documents(texts, tokenizer, vocab_size), strict=True):
                files[split].add(text, tokens)
        splits = {str(split): file.finish() for split, file in files.items()}
        if empty := [name for name, split in splits.items() if not split["documents"]]:
            raise DataError(
                f"data: no document fell to {', '.join(empty)}",
                rule="each split with a fraction above 0 has documents",
                remedy="give more texts, or a larger fraction",
            )
        info = DataInfo(
            format=_FORMAT,
            seed=seed,
            vocab_size=vocab_size,
            end_of_document=end_of_document(tokenizer, vocab_size),
            dtype=np.dtype(dtype).name,
            tokenizer_digest=tokenizer_digest(tokenizer),
            data_digest=_digest_of(splits),
            splits=splits,
        )
        (temporary / INFO_NAME).write_text(json.dumps(info, indent=2) + "\n")
        (folder / INFO_NAME).unlink(missing_ok=True)
        for path in sorted(temporary.iterdir(), key=lambda path: path.name == INFO_NAME):
            path.replace(folder / path.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return info


def read_info(folder: Path) -> DataInfo:
    """What the token files of a folder hold.

    Raises:
        DataError: There is no `data.json`, or it is damaged or of another format.
    """
    path = folder / INFO_NAME
    try:
        info: DataInfo = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise DataError(f"{folder}: no {INFO_NAME}", rule="token files made by `nemo-minitron data`") from error
    except ValueError as error:
        raise DataError(f"{path}: {error}", remedy="run the data stage again") from error
    if not isinstance(info, dict) or info.get("format") != _FORMAT:
        raise DataError(f"{path}: of an unknown format", rule=f"format {_FORMAT}", remedy="run the data stage again")
    return info


def open_split(folder: Path, split: str) -> tuple[IndexedDataset, DataInfo]:
    """The documents of a split, memory-mapped.

    Raises:
        DataError: The split has no documents, or its files are missing or cut short.
    """
    info = read_info(folder)
    if split not in info["splits"]:
        raise DataError(
            f"{folder}: holds no {split} documents",
            rule=f"splits here: {', '.join(info['splits'])}",
            remedy="see data.*_fraction",
        )
    prefix = split_prefix(folder, split)
    data, index = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    expected = info["splits"][split]["tokens"] * np.dtype(info["dtype"]).itemsize
    if not index.is_file() or not data.is_file() or data.stat().st_size != expected:
        found = data.stat().st_size if data.is_file() else "no"
        raise DataError(
            f"{data}: {found} bytes", rule=f"{expected} bytes, and an .idx beside it", remedy="run the data stage again"
        )
    return IndexedDataset(prefix, mmap=True), info


def split_prefix(folder: Path, split: str) -> str:
    """Path of a split's files without `.bin` and `.idx`."""
    return str(folder.resolve() / split)


@dataclass
class _SplitFiles:
    prefix: Path
    dtype: type[np.number]
    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    _builder: IndexedDatasetBuilder = field(init=False)

    def __post_init__(self) -> None:
        self._builder = IndexedDatasetBuilder(f"{self.prefix}.bin", dtype=self.dtype)

    def add(self, text: str, tokens: NDArray[np.int64]) -> None:
        self._builder.add_document(tokens, [len(tokens)])
        self.documents += 1
        self.tokens += len(tokens)
        self.bytes += len(text.encode())

    def finish(self) -> SplitInfo:
        self._builder.finalize(f"{self.prefix}.idx")
        digest = hashlib.sha256()
        for suffix in (".bin", ".idx"):
            with Path(f"{self.prefix}{suffix}").open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return SplitInfo(documents=self.documents, tokens=self.tokens, bytes=self.bytes, sha256=digest.hexdigest())


def _share_out(documents: Iterable[Document], config: DataConfig, seed: int) -> Iterator[tuple[str, Split]]:
    long_enough = (document for document in documents if len(document.text) >= config.min_characters)
    head = list(islice(long_enough, _SMALL_CORPUS))
    if len(head) < _SMALL_CORPUS:
        splits = assign(head, config, seed)
        yield from ((document.text, split) for document, split in zip(head, splits, strict=True))
        return
    for document in chain(head, long_enough):
        yield document.text, split_of(document, config, seed)


def _batches(items: Iterator[tuple[str, Split]]) -> Iterator[tuple[list[str], list[Split]]]:
    texts: list[str] = []
    splits: list[Split] = []
    characters = 0
    for text, split in items:
        texts.append(text)
        splits.append(split)
        characters += len(text)
        if characters >= _BATCH_CHARACTERS or len(texts) >= _BATCH_DOCUMENTS:
            yield texts, splits
            texts, splits, characters = [], [], 0
    if texts:
        yield texts, splits


def _digest_of(splits: dict[str, SplitInfo]) -> str:
    content = json.dumps({name: split["sha256"] for name, split in splits.items()}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()
