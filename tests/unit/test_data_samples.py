"""Samples, windows and global batches, against the plain stream of tokens in the files."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from nemo_minitron.config.run import DataConfig
from nemo_minitron.data.documents import Document
from nemo_minitron.errors import DataError, LayoutError
from nemo_minitron.megatron.data import (
    GlobalBatches,
    WindowDataset,
    loader,
    read_info,
    training_dataset,
    with_borders,
    write_token_files,
)
from nemo_minitron.megatron.forward import MicroBatch
from tests.tiny import sentences, write_tokenizer

CONFIG = DataConfig(sources=("x",), calibration_fraction=0.1, heldout_fraction=0.2, min_characters=10)
LENGTH = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data")
    documents = [Document(str(seed), sentences(seed, 1 + seed % 7)) for seed in range(40)]
    write_token_files(documents, write_tokenizer(path / "tokenizer"), path / "tokens", CONFIG, seed=5)
    return path / "tokens"


def stream(folder: Path, split: str) -> list[int]:
    return np.fromfile(folder / f"{split}.bin", dtype=np.uint16).tolist()


def tokens_of(dataset, count: int) -> torch.Tensor:
    return torch.stack([dataset[index]["tokens"] for index in range(count)])


# -- documents that are kept apart ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def apart(tmp_path_factory) -> Path:
    """The same token files, whose samples keep documents apart."""
    path = tmp_path_factory.mktemp("apart")
    documents = [Document(str(seed), sentences(seed, 1 + seed % 7)) for seed in range(40)]
    config = CONFIG.model_copy(update={"reset_attention_mask": True})
    write_token_files(documents, write_tokenizer(path / "tokenizer"), path / "tokens", config, seed=5)
    return path / "tokens"


def by_the_letter(tokens: list[int], counted: list[float]) -> tuple[list[int], list[float]]:
    """Positions and mask of a sample, token by token; 0 ends a document."""
    positions, kept, place = [], [], 0
    for index, token in enumerate(tokens):
        if index and tokens[index - 1] == 0 != token:
            place = 0
        positions.append(place)
        kept.append(counted[index] if token else 0.0)
        place += 1
    return positions, kept


@pytest.mark.parametrize("kind", ["training", "windows"])
def test_positions_begin_again_behind_each_end_and_ends_predict_nothing(kind, folder, apart):
    made = {
        "training": lambda path: training_dataset(path, LENGTH, 60, seed=3),
        "windows": lambda path: WindowDataset(path, "heldout", LENGTH),
    }[kind]
    plain, separate = made(folder), made(apart)
    assert len(plain) == len(separate)
    borders = 0
    for index in range(len(separate)):
        before, sample = plain[index], separate[index]
        assert sample["tokens"].tolist() == before["tokens"].tolist()
        assert sample["labels"].tolist() == before["labels"].tolist()
        positions, kept = by_the_letter(sample["tokens"].tolist(), before["loss_mask"].tolist())
        assert sample["position_ids"].tolist() == positions
        assert sample["loss_mask"].tolist() == kept
        borders += sum(place == 0 for place in positions[1:])
    assert borders > 10
    assert not separate[None]["loss_mask"].any()


def test_a_run_of_ends_is_one_border():
    sample = {"tokens": torch.tensor([5, 0, 0, 0, 7, 8]), "loss_mask": torch.ones(6)}
    found = with_borders(sample, 0)
    assert found["position_ids"].tolist() == [0, 1, 2, 3, 0, 1]
    assert found["loss_mask"].tolist() == [1, 0, 0, 0, 1, 1]


def test_data_that_are_read_otherwise_are_other_data(folder, apart):
    assert stream(folder, "train") == stream(apart, "train")
    assert read_info(folder)["data_digest"] != read_info(apart)["data_digest"]


# -- training samples ------------------------------------------------------------------------------------------------


def test_one_epoch_cuts_whole_shuffled_documents_without_loss(folder):
    tokens = stream(folder, "train")
    samples = (len(tokens) - 1) // LENGTH
    dataset = training_dataset(folder, LENGTH, samples, seed=3)
    assert len(dataset) == samples
    seen: Counter[int] = Counter()
    documents = {tuple(part.split()) for part in " ".join(map(str, tokens)).split(" 0 ")}
    whole = 0
    for sample in (dataset[index] for index in range(samples)):
        assert sample["tokens"][1:].tolist() == sample["labels"][:-1].tolist()
        assert sample["position_ids"].tolist() == list(range(LENGTH)), "no reset at the end of a document"
        assert sample["loss_mask"].tolist() == [1.0] * LENGTH, "the end of a document is predicted too"
        assert "attention_mask" not in sample
        seen.update(sample["tokens"].tolist())
        inside = " ".join(map(str, sample["tokens"].tolist())).split(" 0 ")[1:-1]
        whole += len(inside)
        assert all(tuple(part.split()) in documents for part in inside)
    assert whole > 0
    missing = Counter(tokens) - seen
    assert not seen - Counter(tokens)
    assert missing.total() == len(tokens) - samples * LENGTH <= LENGTH


def test_the_order_hangs_on_the_seed_and_is_kept_on_disk(folder):
    first = tokens_of(training_dataset(folder, LENGTH, 30, seed=3), 30)
    built = {path: path.stat().st_mtime_ns for path in (folder / "index").rglob("*.npy")}
    assert torch.equal(tokens_of(training_dataset(folder, LENGTH, 30, seed=3), 30), first)
    assert {path: path.stat().st_mtime_ns for path in (folder / "index").rglob("*.npy")} == built
    assert not torch.equal(tokens_of(training_dataset(folder, LENGTH, 30, seed=4), 30), first)


def test_more_samples_than_the_text_has_take_more_epochs(folder):
    once = (len(stream(folder, "train")) - 1) // LENGTH
    dataset = training_dataset(folder, LENGTH, 5 * once, seed=3)
    assert len(dataset) >= 5 * once
    assert len({tuple(row) for row in tokens_of(dataset, 5 * once).tolist()}) > 2 * once, "epochs are cut differently"


def test_an_index_cut_short_by_a_kill_is_not_used(folder, monkeypatch):
    calls = []
    save = np.save

    def killed(path, array, **keys):
        calls.append(path)
        save(path, array[: len(array) // 2], **keys)
        if len(calls) == 3:  # all files are there, the last one is half there
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            training_dataset(folder, LENGTH, 17, seed=9)
    assert len(calls) == 3
    dataset = training_dataset(folder, LENGTH, 17, seed=9)
    assert len(dataset) >= 17
    assert tokens_of(dataset, 17).shape == (17, LENGTH)
    assert not list((folder / "index").glob(".building-*"))


def test_too_short_a_text_is_refused(folder):
    count = len(stream(folder, "train"))
    assert len(training_dataset(folder, count - 1, 1, seed=0)) == 1
    with pytest.raises(DataError, match=f"{count} training tokens\n.*= {count + 1}"):
        training_dataset(folder, count, 1, seed=0)


# -- windows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 7, 10_000])
def test_windows_predict_every_token_but_the_first_exactly_once(folder, length):
    tokens = stream(folder, "heldout")
    dataset = WindowDataset(folder, "heldout", length)
    items = [dataset[index] for index in range(len(dataset))]
    kept = [item["labels"][item["loss_mask"].bool()] for item in items]
    assert torch.cat(kept).tolist() == tokens[1:]
    assert items[0]["tokens"][: len(kept[0])].tolist() == tokens[:-1][:length]
    assert {len(item[name]) for item in items for name in item} == {length}
    assert all(item["position_ids"].tolist() == list(range(length)) for item in items)


def test_windows_can_be_limited_and_end_where_they_end(folder):
    dataset = WindowDataset(folder, "heldout", 7, 3)
    assert len(dataset) == 3
    with pytest.raises(IndexError):
        dataset[3]
    assert dataset[None]["loss_mask"].sum() == 0


@pytest.mark.parametrize("wanted", [1, 3, 5])
def test_windows_can_be_spread_over_the_split(folder, wanted):
    complete = WindowDataset(folder, "heldout", 7)
    few = WindowDataset(folder, "heldout", 7, wanted, spread=True)
    assert len(few) == wanted
    places = [int(index * len(complete) / wanted) for index in range(wanted)]
    assert len(set(places)) == wanted
    for index, place in enumerate(places):
        assert torch.equal(few[index]["tokens"], complete[place]["tokens"])


def test_more_windows_than_there_are_spread_to_all_of_them(folder):
    complete = WindowDataset(folder, "heldout", 7)
    spread = WindowDataset(folder, "heldout", 7, 10 * len(complete), spread=True)
    assert len(spread) == len(complete)
    assert all(torch.equal(spread[index]["tokens"], complete[index]["tokens"]) for index in range(len(complete)))


# -- global batches --------------------------------------------------------------------------------------------------


def union(dataset, dp_size: int, **keys) -> list[MicroBatch]:
    ranks = [loader(dataset, global_batch_size=8, dp_rank=rank, dp_size=dp_size, **keys) for rank in range(dp_size)]
    return [
        MicroBatch(*(torch.cat([getattr(share, name) for share in shares]) for name in MicroBatch.TENSORS))
        for shares in zip(*ranks, strict=True)
    ]


def same(one: list[MicroBatch], other: list[MicroBatch]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(getattr(a, name), getattr(b, name))
        for a, b in zip(one, other, strict=True)
        for name in MicroBatch.TENSORS
    )


@pytest.mark.parametrize("dp_size", [2, 4, 8])
@pytest.mark.parametrize("drop_last", [False, True])
def test_the_ranks_together_see_what_one_rank_sees(folder, dp_size, drop_last):
    for dataset in (training_dataset(folder, LENGTH, 30, seed=3), WindowDataset(folder, "heldout", 7)):
        one = union(dataset, 1, drop_last=drop_last)
        assert all(batch.tokens.shape[0] == 8 for batch in one)
        assert same(union(dataset, dp_size, drop_last=drop_last), one)


@pytest.mark.parametrize("dp_size", [1, 2])
def test_a_resumed_loader_goes_on_where_another_stopped(folder, dp_size):
    dataset = training_dataset(folder, LENGTH, 40, seed=3)
    whole = union(dataset, 1)
    assert same(union(dataset, dp_size, consumed_samples=16), whole[2:])
    # Lightning compares its count of batches, those before the restart included, with the loader's length.
    assert len(loader(dataset, global_batch_size=8, dp_rank=0, dp_size=1, consumed_samples=16)) == len(whole)


def test_the_last_batch_is_filled_with_masked_samples(folder):
    dataset = WindowDataset(folder, "heldout", 7, 11)
    batches = union(dataset, 2)
    assert [batch.keep.any(1).sum().item() for batch in batches] == [8, 3]
    assert batches[0].keep.dtype == torch.bool
    assert len(union(dataset, 2, drop_last=True)) == 1


def test_nothing_is_left_after_the_end():
    assert list(GlobalBatches(16, 8, dp_rank=0, dp_size=1, consumed_samples=16, drop_last=False)) == []
    assert list(GlobalBatches(16, 8, dp_rank=0, dp_size=1, consumed_samples=99, drop_last=False)) == []


def test_workers_change_nothing(folder):
    dataset = WindowDataset(folder, "heldout", 7, 11)
    assert same(union(dataset, 1, workers=1), union(dataset, 1))


def test_batches_that_do_not_divide_are_refused(folder):
    with pytest.raises(LayoutError, match="global_batch_size = 8 on 3 data-parallel ranks"):
        loader(WindowDataset(folder, "heldout", 7), global_batch_size=8, dp_rank=0, dp_size=3)
