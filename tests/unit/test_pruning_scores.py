"""Score files: arithmetic by hand, and every way a file can be wrong."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nemo_minitron.arch.axes import Axis
from nemo_minitron.errors import ScoresError
from nemo_minitron.pruning.scores import Scores
from tests.support.scores import SPEC, sums

# The paper's three functions over a list of numbers, written with Python's own arithmetic.
AGGREGATIONS: dict[str, Callable[[list[float]], float]] = {
    "mean": lambda values: sum(abs(value) for value in values) / len(values),
    "l2": lambda values: math.sqrt(sum(value * value for value in values)),
    "var": lambda values: sum((value - sum(values) / len(values)) ** 2 for value in values) / len(values),
}


@pytest.mark.parametrize("batch", ["mean", "l2", "var"])
@pytest.mark.parametrize("sequence", ["mean", "l2", "var"])
def test_all_nine_aggregations_on_every_axis(batch: str, sequence: str) -> None:
    found, single = sums()
    scores = Scores(SPEC, found)
    over = AGGREGATIONS[batch]

    def channel(layer: int, site: str, index: int) -> float:
        return over(single[f"layers.{layer}.{site}.{sequence}"][:, index].tolist())

    how = {"batch": batch, "sequence": sequence}
    hidden = [sum(channel(i, s, c) for i in (0, 1) for s in ("hidden.attention", "hidden.mlp")) for c in range(6)]
    assert scores.importance(Axis.HIDDEN, **how).tolist() == pytest.approx(hidden, rel=1e-12)
    assert scores.importance(Axis.FFN, 1, **how).tolist() == pytest.approx(
        [channel(1, "ffn", c) for c in range(3)], rel=1e-9
    )
    heads = [math.hypot(channel(1, "head", 2 * h), channel(1, "head", 2 * h + 1)) for h in range(4)]
    assert scores.importance(Axis.HEAD, 1, **how).tolist() == pytest.approx(heads, rel=1e-9)
    groups = [heads[0] + heads[1], heads[2] + heads[3]]
    assert scores.importance(Axis.KV_GROUP, 1, **how).tolist() == pytest.approx(groups, rel=1e-9)


def test_block_influence_is_a_mean_over_tokens() -> None:
    found, _ = sums()
    found["layers.0.block_influence.sum"] = torch.tensor(6.0).double()
    assert Scores(SPEC, found).block_influence()[0].item() == pytest.approx(6 / 30)


def test_file_round_trip(tmp_path: Path) -> None:
    found, _ = sums()
    Scores(SPEC, found, provenance={"data_digest": "d", "tokenizer_digest": "t"}).save(tmp_path / "s.safetensors")
    read = Scores.load(tmp_path / "s.safetensors")
    assert read.spec == SPEC
    assert read.provenance == {"data_digest": "d", "tokenizer_digest": "t"}
    assert (read.samples, read.tokens) == (3, 30)
    assert all(torch.equal(read.tensors[name], found[name]) for name in found)
    from safetensors import safe_open

    with safe_open(tmp_path / "s.safetensors", framework="pt") as file:  # anyone's tools read it
        assert set(file.keys()) == set(found)
        assert file.metadata()["spec_digest"] == SPEC.digest()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_none_name_layer_and_site(value: float) -> None:
    found, _ = sums()
    found["layers.1.ffn.l2.sumsq"][2] = value
    with pytest.raises(ScoresError, match="layer 1, site ffn"):
        Scores(SPEC, found)
    found, _ = sums()
    found["layers.0.block_influence.sum"] = torch.tensor(value).double()
    with pytest.raises(ScoresError, match="layer 0, block influence"):
        Scores(SPEC, found)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("layers.1.head.mean.sum", None, r"layers\.1\.head\.mean\.sum"),
        ("layers.2.head.mean.sum", torch.zeros(8).double(), "no site"),
        ("layers.0.ffn.var.sum", torch.zeros(4).double(), "shaped"),
        ("layers.0.ffn.var.sum", torch.zeros(5), "float32"),
        ("samples", torch.tensor(0.0).double(), "samples = 0"),
        ("tokens", torch.tensor(0.0).double(), "tokens = 0"),
    ],
)
def test_unsound_sums_are_refused(name: str, value: Tensor | None, words: str) -> None:
    found, _ = sums()
    found.pop(name, None)
    if value is not None:
        found[name] = value
    with pytest.raises(ScoresError, match=words):
        Scores(SPEC, found)


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    import safetensors.torch

    path = tmp_path / "s.safetensors"
    with pytest.raises(ScoresError, match="no such file"):
        Scores.load(path)
    safetensors.torch.save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(ScoresError, match=r"s\.safetensors: format None"):
        Scores.load(path)
    found, _ = sums()
    Scores(SPEC, found).save(path)
    data = path.read_bytes()
    for keep in (0, 100, len(data) - 8):
        path.write_bytes(data[:keep])
        with pytest.raises(ScoresError, match=r"s\.safetensors"):
            Scores.load(path)


def test_a_failed_save_leaves_the_previous_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nemo_minitron.checkpoints import safetensors_file

    found, _ = sums()
    path = tmp_path / "s.safetensors"
    Scores(SPEC, found).save(path)
    before = path.read_bytes()
    monkeypatch.setattr(safetensors_file, "write_tensor", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Scores(SPEC, sums(seed=1)[0]).save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["s.safetensors"]
