"""Merging score files: sums add up, every sample counts once, and only what belongs together is merged."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_minitron.arch.axes import Axis
from nemo_minitron.config.sites import FfnSite
from nemo_minitron.errors import ScoresError
from nemo_minitron.pruning.coverage import Coverage, united
from nemo_minitron.pruning.depth import DepthScores
from nemo_minitron.pruning.scores import Scores
from tests.support.scores import SPEC, sums


def part(
    first: int, samples: int = 3, *, data: str = "d", length: int = 512, tokenizer: str | None = "t", **settings: Any
) -> Scores:
    provenance = {
        "data_digest": data,
        "tokenizer_digest": tokenizer,
        "calibration": [Coverage.of(data, length, first, samples).to_dict()],
    }
    found, _ = sums(settings.get("spec", SPEC), samples=samples, seed=first)
    return Scores(settings.pop("spec", SPEC), found, provenance=provenance, **settings)


def depth(value: float) -> DepthScores:
    double = torch.float64
    return DepthScores(
        SPEC,
        {
            "depth.blocks": torch.tensor([[0, 1], [1, 1]], dtype=double),
            "depth.samples": torch.tensor(2.0, dtype=double),
            "depth.lm_loss.sum": torch.tensor([value, 2 * value], dtype=double),
            "depth.lm_loss.base": torch.tensor(1.0, dtype=double),
            "depth.lm_loss.count": torch.tensor(8.0, dtype=double),
        },
    )


def test_sums_add_up_and_nothing_else_changes() -> None:
    parts = [part(0), part(3), part(6)]
    before = [dict(one.tensors) for one in parts]
    merged = parts[0].merge(*parts[1:])
    for name in before[0]:
        torch.testing.assert_close(merged.tensors[name], before[0][name] + before[1][name] + before[2][name])
        assert all(torch.equal(one.tensors[name], old[name]) for one, old in zip(parts, before, strict=True))
    assert merged.samples == 9
    assert merged.provenance == {
        "data_digest": "d",
        "tokenizer_digest": "t",
        "calibration": [{"data_digest": "d", "sequence_length": 512, "samples": [[0, 9]]}],
    }
    again = parts[2].merge(parts[0].merge(parts[1]))
    assert again.provenance == merged.provenance


def test_importance_of_the_whole_follows_from_the_merged_file() -> None:
    """The six sums answer for all aggregations of the samples of both parts together."""
    first, second = sums(samples=3, seed=0), sums(samples=3, seed=3)
    merged = part(0).merge(part(3))
    single = torch.cat([first[1]["layers.1.ffn.l2"], second[1]["layers.1.ffn.l2"]])
    torch.testing.assert_close(merged.importance(Axis.FFN, 1, batch="var", sequence="l2"), single.var(0, correction=0))


def test_other_texts_merge_too_and_what_differs_is_forgotten() -> None:
    merged = part(0).merge(part(0, data="e"))
    assert merged.provenance["tokenizer_digest"] == "t"
    assert "data_digest" not in merged.provenance
    assert [one.data_digest for one in merged.coverage] == ["d", "e"]


OTHER = replace(SPEC, rotary_base=5e5)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (lambda: part(3, spec=OTHER), "different models"),
        (lambda: part(3, tokenizer="u"), r"different tokenizers: (t and u|u and t)"),
        (lambda: part(3, tokenizer=None), "different tokenizers"),
        (lambda: part(3, ffn_site=FfnSite.BEFORE_ACTIVATION), "different FFN sites"),
        (lambda: part(0), "samples 0-2 of data d are in both"),
        (lambda: part(2), "samples 2-2 of data d are in both"),
        (lambda: part(1, 1), "samples 1-1 of data d are in both"),
        (lambda: part(3, length=256), "256 and 512 tokens"),
        (lambda: Scores(SPEC, sums()[0], provenance={"tokenizer_digest": "t"}), "do not say which calibration samples"),
    ],
)
def test_what_does_not_belong_together_is_refused(other: Any, words: str) -> None:
    with pytest.raises(ScoresError, match=words):
        part(0).merge(other())
    with pytest.raises(ScoresError, match=words):
        other().merge(part(0))


def test_a_third_file_that_overlaps_is_found() -> None:
    with pytest.raises(ScoresError, match="samples 3-5"):
        part(0).merge(part(3), part(3))


def test_gaps_stay_apart() -> None:
    (found,) = united([Coverage.of("d", 8, 5, 2), Coverage.of("d", 8, 0, 2), Coverage.of("d", 8, 2, 1)])
    assert found.ranges == ((0, 3), (5, 7))
    assert str(found) == "samples 0-2, 5-6 of 8 tokens (data d)"


def test_depth_metrics_are_merged_and_stored_with_the_rest(tmp_path: Path) -> None:
    merged = part(0, depth=depth(2.0)).merge(part(3, depth=depth(3.0)))
    merged.save(tmp_path / "s.safetensors")
    read = Scores.load(tmp_path / "s.safetensors")
    assert read.depth is not None
    assert read.depth.values("lm_loss").tolist() == [(5 - 2) / 16, (10 - 2) / 16]
    assert not any(name.startswith("depth.") for name in read.tensors)
    alone = part(0, depth=depth(2.0)).merge(part(3))
    assert alone.depth is not None
    assert alone.depth.values("lm_loss").tolist() == [1 / 8, 3 / 8]


def test_sites_and_coverage_go_with_the_file(tmp_path: Path) -> None:
    part(4, ffn_site=FfnSite.BEFORE_ACTIVATION).save(tmp_path / "s.safetensors")
    read = Scores.load(tmp_path / "s.safetensors")
    assert read.ffn_site is FfnSite.BEFORE_ACTIVATION
    assert "before the activation" in read.sites["ffn"]
    assert read.coverage == (Coverage("d", 512, ((4, 7),)),)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("ffn_site", "sideways"),
        ("spec", "{}"),
        ("spec", "["),
        ("provenance", "[1]"),
        ("version", "3"),
    ],
)
def test_metadata_that_makes_no_sense_is_refused(tmp_path: Path, key: str, value: str) -> None:
    import safetensors.torch
    from safetensors import safe_open

    path = tmp_path / "s.safetensors"
    part(0).save(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() | {key: value}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    safetensors.torch.save_file(tensors, path, metadata)
    with pytest.raises(ScoresError, match=r"s\.safetensors"):
        Scores.load(path)


def test_files_of_the_first_version_are_read(tmp_path: Path) -> None:
    import safetensors.torch
    from safetensors import safe_open

    path = tmp_path / "s.safetensors"
    Scores(SPEC, sums()[0], provenance={"tokenizer_digest": "t"}).save(path)
    with safe_open(path, framework="pt") as file:
        metadata = {key: text for key, text in file.metadata().items() if key not in ("ffn_site", "sites")}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    safetensors.torch.save_file(tensors, path, metadata | {"version": "1"})
    read = Scores.load(path)
    assert (read.ffn_site, read.coverage) == (FfnSite.AFTER_ACTIVATION, ())


def test_scores_know_whose_they_are() -> None:
    scores = part(0)
    scores.check_made_for(SPEC)
    scores.check_made_for(SPEC, tokenizer_digest="t")
    with pytest.raises(ScoresError, match="another model"):
        scores.check_made_for(OTHER)
    with pytest.raises(ScoresError, match="another tokenizer"):
        scores.check_made_for(SPEC, tokenizer_digest="u")
