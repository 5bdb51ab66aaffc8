"""What every checkpoint is to the rest of the package: a spec, and canonical tensors one at a time."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.arch.weights import weights
from nemo_minitron.checkpoints.parts import dtype_of
from nemo_minitron.checkpoints.read_ahead import read_ahead
from nemo_minitron.errors import CheckpointError

TOKENIZER_FILES: tuple[str, ...] = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "tekken.json",
    "generation_config.json",
)
"""Files that travel with a model from reader to writer: the tokenizer's, and the generation defaults."""

LICENCE_FILES: tuple[str, ...] = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "USE_POLICY.md")
"""Terms of the base model; they travel too."""

_SHOWN = 3
"""Tokens that a message names."""

PLAN_FILE = "minitron_plan.json"
"""What is left of the first teacher, as a pruning plan; it travels with every student."""


class TensorSource(Protocol):
    """A checkpoint, or a lazy view of one.

    Attributes:
        spec: The architecture.
        family: Key of `arch.families`: how Hugging Face names its weights and settings.
        dtype: Type of every tensor that `get` returns, but for those that are fp32 in every model (`WeightRow.fp32`).
        lineage: JSON data about where the model comes from (base model, licence, plan digest, parents).
    """

    @property
    def spec(self) -> ModelSpec: ...  # noqa: D102

    @property
    def family(self) -> str: ...  # noqa: D102

    @property
    def dtype(self) -> torch.dtype: ...  # noqa: D102

    @property
    def lineage(self) -> dict[str, Any]: ...  # noqa: D102

    def names(self) -> tuple[str, ...]:
        """Canonical names in table order, exactly those of `arch.weights.weights(spec)`."""
        ...

    def get(self, name: str) -> Tensor:
        """One canonical tensor: unsharded, contiguous, on the CPU. Nothing is kept between calls. Several threads call.

        Raises:
            KeyError: The model has no such weight.
            CheckpointError: Its bytes cannot be read.
        """
        ...

    def tokenizer_files(self) -> dict[str, bytes]:
        """Hugging Face tokenizer files, and what travels with them, by name; empty when there are none.

        That is `generation_config.json`, the licence, and the kept indices of a pruned model (`PLAN_FILE`).
        """
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A checkpoint that a reader has opened, or a view of one; itself a `TensorSource`.

    Attributes:
        spec: The architecture.
        family: Key of `arch.families`: how Hugging Face names its weights and settings.
        dtype: The type that holds every stored weight exactly, and of every tensor that `get` returns, but for
            those that are fp32 in every model (`WeightRow.fp32`).
        lineage: What the writer recorded of where the model comes from; for a foreign checkpoint its name.
        format: What the format is called.
        layout: How the weights are stored.
        files: Reads the tokenizer's files and what travels with them; see `TensorSource.tokenizer_files`.
        get: Reads one canonical tensor; see `TensorSource.get`.
        notes: Tells what the reader assumes because the checkpoint does not say it, and what of it goes nowhere.
        config: NeMo-1's configuration, where there is one.
        native: The folder of the weights, where Megatron-Core itself can load them.
    """

    spec: ModelSpec
    family: str
    dtype: torch.dtype
    lineage: dict[str, Any]
    files: Callable[[], Mapping[str, bytes]]
    get: Callable[[str], Tensor]
    format: str = ""
    layout: str = ""
    notes: Callable[[], tuple[str, ...]] = tuple
    config: Mapping[str, Any] | None = None
    native: Path | None = None

    def names(self) -> tuple[str, ...]:
        """Canonical names in table order."""
        return names_of(self.spec)

    def tokenizer_files(self) -> dict[str, bytes]:
        """Hugging Face tokenizer files, and what travels with them, by name; empty when there are none.

        Raises:
            CheckpointError: They cannot be read.
        """
        return dict(self.files())


def names_of(spec: ModelSpec) -> tuple[str, ...]:
    """Canonical names of a model's weights in table order."""
    return tuple(weight.name for weight in weights(spec))


def stream(source: TensorSource) -> Iterator[tuple[str, Tensor]]:
    """Every weight of a source in table order.

    While the caller has one tensor the next few are being read, in memory that is used again and again; a caller that
    keeps none of them needs memory for the two largest, or for half a gigabyte.
    """
    sizes = {w.name: w.numel * dtype_of(w, source.dtype).itemsize for w in weights(source.spec)}
    names = source.names()
    return zip(names, read_ahead(names, source.get, sizes.__getitem__), strict=True)


def tokenizer_digest(files: Mapping[str, bytes]) -> str:
    """SHA-256 over what decides the token ids, 64 hex digits; "" when there is no tokenizer.

    Chat template and generation defaults are left out: they change no token id.
    """
    deciding = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json", "merges.txt", "added_tokens.json")
    digest = hashlib.sha256()
    found = [name for name in deciding if name in files]
    for name in found:
        digest.update(name.encode() + b"\0" + hashlib.sha256(files[name]).digest())
    return digest.hexdigest() if found else ""


def check_tokenizer_fits(files: Mapping[str, bytes], spec: ModelSpec, *, where: str) -> tuple[str, ...]:
    """Compare the tokenizer's largest token id with the vocabulary.

    A special token may lie beyond: text models that were taken out of larger ones (Gemma 3) keep the tokenizer, with
    the special tokens of images. No text becomes such a token unless it is asked to, and then encoders refuse it.

    Returns:
        Notes: which special tokens have no embedding row.

    Raises:
        CheckpointError: `tokenizer.json` is damaged, or knows an id of another token that has no embedding row.
    """
    if "tokenizer.json" not in files:
        return ()
    try:
        data = json.loads(files["tokenizer.json"])
        vocabulary = data["model"]["vocab"]
        ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
        added = {token["id"]: token for token in data.get("added_tokens") or ()}
        special = {number: str(token.get("content")) for number, token in added.items() if token.get("special") is True}
        largest = max([*ids, *added], default=-1)
        if type(largest) is not int:
            raise TypeError(f"a token id is {str(largest)[:40]}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{where}: tokenizer.json cannot be read ({error})") from error
    if largest < spec.vocab_size:
        return ()
    beyond = {number for number in (*ids, *added) if number >= spec.vocab_size}
    if ordinary := sorted(beyond - special.keys()):
        named = [str(added[number].get("content")) for number in ordinary if number in added]
        only_added = len(named) == len(ordinary)
        raise CheckpointError(
            f"{where}: the tokenizer's largest token id is {largest}, but vocab_size is {spec.vocab_size}",
            rule="every token id has an embedding row, but for those of special tokens",
            remedy=f"take the added tokens without a row ({', '.join(named[:3])}) out of added_tokens, or add the rows"
            if only_added
            else "use the tokenizer that the model was trained with",
        )
    shown = ", ".join(f"{special[number]} ({number})" for number in sorted(beyond)[:_SHOWN])
    more = f" and {len(beyond) - _SHOWN} more" if len(beyond) > _SHOWN else ""
    return (f"special tokens without an embedding row, refused where a text has them: {shown}{more}",)
