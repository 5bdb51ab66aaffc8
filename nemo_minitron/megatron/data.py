"""Token files as samples and batches: Megatron's GPT dataset to train on, windows to measure on, one loader for both.

Samples are cut from one stream of documents divided by end-of-document tokens, as in pretraining: positions and
attention run on across documents, and the end of a document is a token to predict like any other. With
`data.reset_attention_mask` (noted in `data.json`) positions begin again behind each end-of-document token, which makes
attention stop there, and that token predicts nothing. No attention mask is made; attention is causal by itself.
"""

import hashlib
import json
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split as MegatronSplit
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from nemo_minitron.data.splits import Split
from nemo_minitron.errors import DataError, LayoutError
from nemo_minitron.megatron.forward import MicroBatch
from nemo_minitron.megatron.token_files import DataInfo, open_split, read_info, split_prefix, write_token_files

__all__ = ["DataInfo", "WindowDataset", "loader", "read_info", "training_dataset", "write_token_files"]


_COMPLETE = "COMPLETE"


class _Vocabulary:
    """All that Megatron's dataset asks of a tokenizer. Without a padding token none can be mistaken for one."""

    def __init__(self, info: DataInfo) -> None:
        self.vocab_size = info["vocab_size"]
        self.eod = info["end_of_document"]
        self.unique_identifiers = OrderedDict({"class": "nemo_minitron", "digest": info["tokenizer_digest"]})


def training_dataset(
    folder: Path, sequence_length: int, samples: int, seed: int
) -> "GPTDataset | BlendSamples | SeparateDocuments":
    """Megatron's shuffled samples of the train split; at least `samples` of them, over as many epochs as that takes.

    The order depends on the token files, `sequence_length`, `samples` and `seed`, and on nothing of the layout. Every
    rank calls it: rank 0 builds the index below `folder/index` (once; complete or not at all), the others wait for it,
    so all must see the same folder. An item is a dict of `tokens`, `labels`, `loss_mask` and `position_ids`, each
    `[sequence_length]`; item None is a sample that is masked throughout.

    Of a blend it is Megatron's own blended dataset over the prefixes.

    Raises:
        DataError: There are no token files, or too few tokens for one sample.
    """
    info = read_info(folder)
    blended = "blend" in info
    found = (BlendSamples if blended else _own_samples)(folder, info, sequence_length, samples, seed)
    return SeparateDocuments(found, info["end_of_document"]) if info.get("reset_attention_mask") else found


def _own_samples(folder: Path, info: DataInfo, sequence_length: int, samples: int, seed: int) -> GPTDataset:
    """Samples of the folder's own train split."""
    indexed, info = open_split(folder, Split.TRAIN)
    tokens = info["splits"][Split.TRAIN]["tokens"]
    if tokens <= sequence_length:
        raise DataError(
            f"{folder}: {tokens} training tokens",
            rule=f"at least sequence_length + 1 = {sequence_length + 1}",
            remedy="give more texts under data.sources, or lower sequence_length",
        )
    prefix = split_prefix(folder, Split.TRAIN)
    key = json.dumps([prefix, info["data_digest"], sequence_length, samples, seed])
    cache = folder / "index" / hashlib.sha256(key.encode()).hexdigest()[:16]
    config = _dataset_config(
        info, sequence_length, seed, blend_per_split=[([prefix], None), None, None], path_to_cache=str(cache)
    )
    if not dist.is_initialized() or dist.get_rank() == 0:
        _build_index(indexed, prefix, samples, config, cache)
    builder = BlendedMegatronDatasetBuilder(GPTDataset, [samples, 0, 0], lambda: True, config)
    return builder.build()[0]


class SeparateDocuments(Dataset[dict[str, Tensor]]):
    """Samples of another dataset, whose documents know nothing of each other.

    Args:
        samples: Items as `training_dataset` gives them.
        end: The end-of-document token.
    """

    def __init__(self, samples: Any, end: int) -> None:
        self._samples, self._end = samples, end

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int | None) -> dict[str, Tensor]:
        return with_borders(self._samples[index], self._end)


def with_borders(sample: dict[str, Tensor], end: int) -> dict[str, Tensor]:
    """A sample whose positions begin again behind each end-of-document token; that token predicts nothing.

    Several such tokens in a row end one document. What is left of a document that began in an earlier sample begins at
    position 0.
    """
    ended = sample["tokens"] == end
    places = torch.arange(len(ended))
    begins = torch.zeros_like(places)
    begins[1:] = torch.where(ended[:-1] & ~ended[1:], places[1:], 0)
    return sample | {
        "position_ids": places - begins.cummax(0).values,
        "loss_mask": sample["loss_mask"].masked_fill(ended, 0),
    }


class BlendSamples(Dataset[dict[str, Tensor]]):
    """Samples of existing token files by Megatron's own builder, as `training_dataset` gives them.

    Args:
        folder: What `write_blend_files` wrote; the index is built below it, by rank 0 first.
        info: Its `data.json`.
        sequence_length: Tokens of a sample.
        samples: How many there are at least.
        seed: Order of the samples.

    Raises:
        DataError: The files hold fewer samples, and no weights say which to repeat.
    """

    def __init__(self, folder: Path, info: DataInfo, sequence_length: int, samples: int, seed: int) -> None:
        blend = info["blend"]
        names = (blend["prefixes"], blend["weights"])
        key = json.dumps([blend["prefixes"], info["data_digest"], sequence_length, samples, seed])
        cache = folder / "index" / hashlib.sha256(key.encode()).hexdigest()[:16]
        given: dict[str, Any] = (
            {"blend_per_split": [names, None, None]}
            if blend["split"] is None
            else {"blend": names, "split": blend["split"]}
        )
        is_first = not dist.is_initialized() or dist.get_rank() == 0
        if is_first and not (cache / _COMPLETE).is_file():
            shutil.rmtree(cache, ignore_errors=True)  # of a build that was killed: its files may be cut short
        # Without ranks Megatron's blend can be built in memory only.
        given["path_to_cache"] = str(cache) if dist.is_initialized() else None
        if dist.is_initialized():
            dist.barrier()
        config = _dataset_config(info, sequence_length, seed, **given)
        self._dataset: Any = BlendedMegatronDatasetBuilder(GPTDataset, [samples, 0, 0], lambda: True, config).build()[0]
        if is_first and dist.is_initialized():
            (cache / _COMPLETE).touch()
        if len(self._dataset) < samples:
            raise DataError(
                f"data.blend: {len(self._dataset)} samples of {sequence_length} tokens, and {samples} are wanted",
                rule="without weights each prefix is read once at most",
                remedy="give weights, as in [[0.7, prefix], [0.3, prefix]]; or train on fewer tokens",
            )

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int | None) -> dict[str, Tensor]:
        if index is None and hasattr(self._dataset, "datasets"):
            sample = self._dataset.datasets[0][None]
        else:
            sample = self._dataset[index]
        return {name: value for name, value in sample.items() if name != "dataset_id"}


def _dataset_config(info: DataInfo, sequence_length: int, seed: int, **given: Any) -> GPTDatasetConfig:
    return GPTDatasetConfig(
        random_seed=seed,
        sequence_length=sequence_length,
        **given,
        tokenizer=_Vocabulary(info),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )


def _build_index(indexed: IndexedDataset, prefix: str, samples: int, config: GPTDatasetConfig, cache: Path) -> None:
    """Let Megatron write its index files aside, then rename: it would take files cut short by a kill for complete."""
    if cache.is_dir():
        return
    cache.parent.mkdir(exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=cache.parent, prefix=".building-"))
    try:
        config.path_to_cache = str(temporary)
        GPTDataset(indexed, prefix, np.arange(len(indexed), dtype=np.int32), samples, MegatronSplit.train, config)
        temporary.rename(cache)
    finally:
        config.path_to_cache = str(cache)
        shutil.rmtree(temporary, ignore_errors=True)


class WindowDataset(Dataset[dict[str, Tensor]]):
    """A split's tokens as windows in order; every token but the very first is predicted exactly once.

    Where documents are kept apart, that is every token but the first of each document.

    Window `i` reads tokens `i * s` up to `(i + 1) * s` and predicts the one after each; the last one is filled up with
    end-of-document tokens that do not count. Items are as in `training_dataset`, None included.

    Args:
        folder: What `write_token_files` wrote.
        split: Name of the split.
        sequence_length: Tokens of a window.
        max_samples: Take only so many; None for all.
        first_window: Which window of the split is item 0.
        spread: Take `max_samples` at even distances over the complete split instead of the first ones: windows of one
            document resemble each other, so that those of many say more.

    Raises:
        DataError: The split has no token files, or holds nothing to predict.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        sequence_length: int,
        max_samples: int | None = None,
        *,
        first_window: int = 0,
        spread: bool = False,
    ) -> None:
        self._indexed, info = open_split(folder, split)
        self._tokens = info["splits"][split]["tokens"]
        self._fill = info["end_of_document"]
        self._separate = info.get("reset_attention_mask", False)
        self._length = sequence_length
        if self._tokens < 2:
            raise DataError(f"{folder}: {self._tokens} {split} tokens", rule="at least 2", remedy="give more texts")
        windows = -(-(self._tokens - 1) // sequence_length) - first_window
        if windows < 1:
            raise DataError(
                f"{folder}: {windows + first_window} {split} samples of {sequence_length} tokens, the first wanted is "
                f"number {first_window}",
                rule="samples are counted from 0",
                remedy="begin earlier (score.first_sample), or give more texts",
            )
        self._first = first_window
        self._windows = windows if max_samples is None else min(windows, max_samples)
        self._among = windows if spread else self._windows

    def __len__(self) -> int:
        return self._windows

    def start_of(self, index: int) -> int:
        """Where in the split's tokens a window begins to read."""
        return (self._first + index * self._among // self._windows) * self._length

    def __getitem__(self, index: int | None) -> dict[str, Tensor]:
        if index is not None and not 0 <= index < self._windows:
            raise IndexError(index)
        start = self.start_of(index or 0)
        count = min(self._length + 1, self._tokens - start)
        window = torch.full((self._length + 1,), self._fill)
        dtype = self._indexed.index.dtype
        # Documents lie one behind the other in the file, so a window is one read.
        read = self._indexed.bin_reader.read(dtype=dtype, count=count, offset=start * np.dtype(dtype).itemsize)
        window[:count] = torch.from_numpy(read.astype(np.int64))
        counted = 0 if index is None else count - 1
        sample = {
            "tokens": window[:-1],
            "labels": window[1:],
            "loss_mask": (torch.arange(self._length) < counted).float(),
            "position_ids": torch.arange(self._length),
        }
        return with_borders(sample, self._fill) if self._separate else sample


class GlobalBatches(Sampler[list[int | None]]):
    """The indices of one data-parallel rank in every global batch.

    Global batch `g` is samples `g * size` up to `(g + 1) * size`, in order; each rank takes one contiguous share, so
    the ranks' shares together, in rank order, are the same for every number of ranks. None stands for a masked sample.
    """

    def __init__(
        self, samples: int, size: int, *, dp_rank: int, dp_size: int, consumed_samples: int, drop_last: bool
    ) -> None:
        if size % dp_size:
            raise LayoutError(
                f"global_batch_size = {size} on {dp_size} data-parallel ranks",
                rule="every rank takes equally many samples",
                remedy=f"make global_batch_size a multiple of {dp_size}",
            )
        self._samples, self._size, self._consumed = samples, size, consumed_samples
        self._share = size // dp_size
        self._offset = dp_rank * self._share
        left = max(samples - consumed_samples, 0)
        self._left = left // size if drop_last else -(-left // size)

    def __len__(self) -> int:
        """Global batches in all, those before `consumed_samples` included: what a resumed run counts against."""
        return -(-self._consumed // self._size) + self._left

    def __iter__(self) -> Iterator[list[int | None]]:
        for batch in range(self._left):
            first = self._consumed + batch * self._size + self._offset
            yield [index if index < self._samples else None for index in range(first, first + self._share)]


def loader(
    dataset: Dataset[dict[str, Tensor]],
    *,
    global_batch_size: int,
    dp_rank: int,
    dp_size: int,
    consumed_samples: int = 0,
    drop_last: bool = False,
    workers: int = 0,
) -> DataLoader[MicroBatch]:
    """Batches of one data-parallel rank: an item is its share of one global batch, a `MicroBatch` of `[share, s]`.

    Args:
        dataset: `training_dataset` or `WindowDataset`.
        global_batch_size: Samples of one item over all data-parallel ranks.
        dp_rank: This data-parallel rank.
        dp_size: Number of data-parallel ranks.
        consumed_samples: Where to begin: samples that were seen before, over all ranks. The loader's length counts
            their batches, though it does not give them again.
        drop_last: Leave out a last batch that is not full, instead of filling it up with masked samples.
        workers: Processes that read ahead.

    Raises:
        LayoutError: The batch does not divide by the number of ranks.
    """
    batches = GlobalBatches(
        len(dataset),  # type: ignore[arg-type]
        global_batch_size,
        dp_rank=dp_rank,
        dp_size=dp_size,
        consumed_samples=consumed_samples,
        drop_last=drop_last,
    )
    return DataLoader(
        dataset,  # type: ignore[arg-type]  # collate_fn makes MicroBatches of its items
        batch_sampler=batches,
        collate_fn=_collate,
        num_workers=workers,
        persistent_workers=workers > 0,
        # Only from pinned memory does a copy to the GPU run beside other work.
        pin_memory=torch.cuda.is_available(),
    )


def _collate(samples: Sequence[dict[str, Any]]) -> MicroBatch:
    stacked = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
    return MicroBatch(stacked["tokens"], stacked["labels"], stacked["loss_mask"].bool(), stacked["position_ids"])
