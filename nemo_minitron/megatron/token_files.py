"""Token files: Megatron's `.bin` and `.idx` for each split, and `data.json`, which says what is in them.

One sequence a document, with one end-of-document token behind it. `data.json` is written last, so a folder that has it
is complete.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict, cast

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset

from nemo_minitron.config.run import DataConfig
from nemo_minitron.data.documents import Document
from nemo_minitron.data.encoder import TextEncoder
from nemo_minitron.data.merge import merge
from nemo_minitron.data.shards import Shard, ShardBuilder, shard_path
from nemo_minitron.data.tokenizer import end_of_document, text_encoder, tokenizer_digest
from nemo_minitron.errors import DataError
from nemo_minitron.megatron.blend import BlendInfo, blend_digest, blend_info, write_splits

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

INFO_NAME = "data.json"
UNFINISHED = ".tokens-"
"""What the names of folders with unfinished files begin with."""
_FORMAT = 1
# With fewer documents a split may come out empty by chance; such a corpus is shared out as a whole.
_SMALL_CORPUS = 1000
# Documents of one shard, where they come one by one.
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
    reset_attention_mask: NotRequired[bool]
    """Whether attention stops at the borders of documents; False if it is not there."""
    blend: NotRequired[BlendInfo]
    """Existing token files that the train split is; it has no files of its own then."""


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
        documents: Read once, in order.
        tokenizer: The model's own.
        folder: Made if missing; gets `<split>.bin`, `<split>.idx` and `data.json`.
        config: Fractions and the shortest length.
        seed: Which documents go where.
        vocab_size: Of the model, without padding; the tokenizer's own size unless given.

    Raises:
        DataError: There are too few texts, or a token is outside the vocabulary.
    """
    vocab_size = len(tokenizer) if vocab_size is None else vocab_size
    encoder = text_encoder(tokenizer, vocab_size, parse_special_tokens=config.parse_special_tokens)
    with scratch(folder) as temporary:
        shards = _write_shards(documents, encoder, temporary, config, seed)
        return merge_shards(shards, tokenizer, folder, config, seed=seed, vocab_size=vocab_size)


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """A folder for unfinished files inside another; those that a killed process has left there go."""
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(f"{UNFINISHED}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(dir=folder, prefix=UNFINISHED))
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def merge_shards(
    shards: Sequence[Shard],
    tokenizer: "PreTrainedTokenizerFast",
    folder: Path,
    config: DataConfig,
    *,
    seed: int,
    vocab_size: int,
) -> DataInfo:
    """Shards, in order, to token files and `data.json`; a failed call leaves files that were there before.

    Raises:
        DataError: There are too few documents for the splits.
    """
    dtype = token_dtype(vocab_size)
    temporary = Path(tempfile.mkdtemp(dir=folder, prefix=UNFINISHED))
    try:
        splits = merge(shards, config, temporary, dtype, small_corpus=_SMALL_CORPUS)
        if empty := [name for name, split in splits.items() if not split["documents"]]:
            raise DataError(
                f"data: no document fell to {', '.join(empty)}",
                rule="each split with a fraction above 0 has documents",
                remedy="give more texts, or a larger fraction",
            )
        info = _info(tokenizer, config, splits, _digest_of(splits), seed=seed, vocab_size=vocab_size)
        _put_in_place(temporary, folder, info)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return info


def write_blend_files(
    tokenizer: "PreTrainedTokenizerFast", folder: Path, config: DataConfig, *, seed: int, vocab_size: int
) -> DataInfo:
    """Existing token files (`config.blend`) as data: calibration and held-out documents are copied, the others named.

    Raises:
        DataError: A prefix is not there or damaged, does not fit the vocabulary, or a split has no documents.
    """
    blend = blend_info(config)
    with scratch(folder) as temporary:
        end = end_of_document(tokenizer, vocab_size)
        dtype = token_dtype(vocab_size)
        splits = write_splits(config, blend, temporary, dtype=dtype, vocab_size=vocab_size, end=end)
        info = _info(tokenizer, config, splits, blend_digest(blend, splits), seed=seed, vocab_size=vocab_size)
        info["blend"] = blend
        _put_in_place(temporary, folder, info)
    return info


def _info(
    tokenizer: "PreTrainedTokenizerFast",
    config: DataConfig,
    splits: dict[str, Any],
    digest: str,
    *,
    seed: int,
    vocab_size: int,
) -> DataInfo:
    if config.reset_attention_mask:  # other samples, of the same tokens
        digest = hashlib.sha256(f"{digest} reset_attention_mask".encode()).hexdigest()
    return DataInfo(
        format=_FORMAT,
        seed=seed,
        vocab_size=vocab_size,
        end_of_document=end_of_document(tokenizer, vocab_size),
        dtype=token_dtype(vocab_size),
        tokenizer_digest=tokenizer_digest(tokenizer),
        data_digest=digest,
        reset_attention_mask=config.reset_attention_mask,
        splits=cast("dict[str, SplitInfo]", splits),
    )


def _put_in_place(temporary: Path, folder: Path, info: DataInfo) -> None:
    (temporary / INFO_NAME).write_text(json.dumps(info, indent=2) + "\n")
    (folder / INFO_NAME).unlink(missing_ok=True)
    for path in sorted(temporary.iterdir(), key=lambda path: path.name == INFO_NAME):
        path.replace(folder / path.name)


def token_dtype(vocab_size: int) -> str:
    """The dtype of token files for a vocabulary, as Megatron chooses it."""
    return np.dtype(DType.optimal_dtype(vocab_size)).name


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


def _write_shards(
    documents: Iterable[Document], encoder: TextEncoder, folder: Path, config: DataConfig, seed: int
) -> list[Shard]:
    """Documents that come one by one, as shards."""
    long_enough = (document.text for document in documents if len(document.text) >= config.min_characters)
    shards: list[Shard] = []
    while texts := list(islice(long_enough, _BATCH_DOCUMENTS)):
        builder = ShardBuilder(encoder, seed, token_dtype(encoder.vocab_size))
        for text in texts:
            builder.add(text)
        builder.flush()
        shards.append(Shard(shard_path(folder, len(shards))))
        builder.save(shards[-1].path, [])
    return shards


def _digest_of(splits: dict[str, dict[str, Any]]) -> str:
    content = json.dumps({name: split["sha256"] for name, split in splits.items()}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()
