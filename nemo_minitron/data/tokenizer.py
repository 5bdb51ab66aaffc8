"""The model's own tokenizer: from its files, checked against the vocabulary, and recognised again by a digest."""

import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from nemo_minitron.data.encoder import TextEncoder
from nemo_minitron.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

# Every way tokenizers differ shows here: cases, digits, spaces, punctuation, accents, scripts, code, emoji.
_PROBE = "The 2nd naïve café isn't   worth $1,234.56!\n\n\tdef f(x): return x**2  # Привет, 東京 👋🏽 ﬁ İ\r\n"


def load_tokenizer(files: dict[str, bytes]) -> "PreTrainedTokenizerFast":
    """The tokenizer that a checkpoint carries.

    What `tokenizer.json` says is followed to the letter; a class named in `tokenizer_config.json` is not looked up.

    Args:
        files: Hugging Face tokenizer files by name; other files are ignored.

    Raises:
        DataError: There is no `tokenizer.json`, it is damaged, or no end-of-sequence token is named.
    """
    from transformers import PreTrainedTokenizerFast

    if "tokenizer.json" not in files:
        raise DataError(
            f"tokenizer: no tokenizer.json among {', '.join(sorted(files)) or 'no files at all'}",
            rule="a checkpoint carries the tokenizer of its vocabulary in the `tokenizers` format",
            remedy="load it with transformers.AutoTokenizer and save_pretrained() it beside the weights",
        )
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / Path(name).name).write_bytes(content)
        try:
            tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # the Rust side raises bare Exception
            raise DataError(f"tokenizer: cannot be read: {error}", rule="undamaged tokenizer files") from error
    if tokenizer.eos_token_id is None:
        raise DataError(
            "tokenizer: names no end-of-sequence token",
            rule="documents are divided by that token",
            remedy="set eos_token in tokenizer_config.json",
        )
    return tokenizer


def end_of_document(tokenizer: "PreTrainedTokenizerFast", vocab_size: int) -> int:
    """Id of the token between documents: the tokenizer's end of sequence.

    Raises:
        DataError: The model has no such token.
    """
    token = tokenizer.eos_token_id
    if token is None or not 0 <= token < vocab_size:
        raise DataError(
            f"tokenizer: the end-of-sequence token is {token}",
            rule=f"below the model's vocabulary of {vocab_size}",
            remedy="use the tokenizer that the model was trained with",
        )
    return int(token)


def text_encoder(
    tokenizer: "PreTrainedTokenizerFast", vocab_size: int, *, parse_special_tokens: bool = False
) -> TextEncoder:
    """What a tokenizer does to documents, as plain data.

    Args:
        tokenizer: The model's own.
        vocab_size: Of the model, without padding.
        parse_special_tokens: Whether a text that spells a special token becomes that token.

    Raises:
        DataError: The model has no end-of-document token.
    """
    end = end_of_document(tokenizer, vocab_size)
    return TextEncoder(tokenizer.backend_tokenizer.to_str(), end, vocab_size, parse_special_tokens)


def encode_documents(
    texts: Sequence[str],
    tokenizer: "PreTrainedTokenizerFast",
    vocab_size: int,
    *,
    parse_special_tokens: bool = False,
) -> Iterator[NDArray[np.int64]]:
    """Token ids of each text as the tokenizer writes a sequence (BOS first, if it has one), then one end of document.

    All texts are encoded at once, on all cores.

    Raises:
        DataError: A token is outside the model's vocabulary.
    """
    yield from text_encoder(tokenizer, vocab_size, parse_special_tokens=parse_special_tokens).encode(texts)


def tokenizer_digest(tokenizer: "PreTrainedTokenizerFast") -> str:
    """SHA-256 of what a tokenizer does, 64 hex digits: its vocabulary, its end token, and how it cuts a probing text.

    Two files that differ in spelling only (library version, order of keys) have one digest.
    """
    content = {
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "end": tokenizer.eos_token_id,
        "probe": _whole(tokenizer).encode(_PROBE).ids,
    }
    return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()


def digest_of_files(files: dict[str, bytes]) -> str | None:
    """`tokenizer_digest` of the tokenizer that a checkpoint carries; None when it carries none.

    Raises:
        DataError: It is damaged.
    """
    return tokenizer_digest(load_tokenizer(files)) if "tokenizer.json" in files else None


def _whole(tokenizer: "PreTrainedTokenizerFast") -> "Tokenizer":
    """A copy that neither cuts nor pads: some `tokenizer.json` carry a length limit from their last use."""
    from tokenizers import Tokenizer

    whole = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    whole.no_truncation()
    whole.no_padding()
    return whole
