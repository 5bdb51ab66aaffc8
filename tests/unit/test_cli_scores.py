"""`nemo-minitron scores`: what it prints, leaves and refuses."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nemo_minitron.cli.main import app
from nemo_minitron.pruning.coverage import Coverage
from nemo_minitron.pruning.scores import Scores
from tests.support.scores import SPEC, sums

runner = CliRunner()


def scores(*arguments: object, status: int = 0) -> str:
    result = runner.invoke(app, ["scores", *map(str, arguments)])
    assert result.exit_code == status, result.output + str(result.exception)
    return result.stdout if status == 0 else result.stderr


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    """Score files of samples 0-2 and 3-5."""
    paths = []
    for part in (0, 1):
        provenance = {
            "tokenizer_digest": "t",
            "data_digest": "d",
            "calibration": [Coverage.of("d", 512, 3 * part, 3).to_dict()],
        }
        paths.append(tmp_path / f"{part}.safetensors")
        Scores(SPEC, sums(seed=part)[0], provenance=provenance).save(paths[-1])
    return paths


def test_merge_and_show(parts: list[Path], tmp_path: Path) -> None:
    merged = tmp_path / "merged.safetensors"
    assert scores("merge", *parts, "--out", merged) == f"{merged}: 6 samples, 60 tokens of 2 files\n"
    told = scores("show", merged)
    assert "6 samples, 60 tokens: samples 0-5 of 512 tokens (data d)" in told
    assert "ffn               input of mlp.linear_fc2" in told
    influence = Scores.load(merged).block_influence()
    bars = {line.split()[0]: line for line in told.split("layer  block influence\n")[1].splitlines()}
    assert f"{influence[1]:.4f}" in bars["1"]
    assert max(bars.values(), key=lambda line: line.count("#")) == bars[str(int(influence.argmax()))]
    facts = json.loads(scores("show", merged, "--json"))
    assert facts["block_influence"] == influence.tolist()
    assert facts["provenance"]["calibration"][0]["samples"] == [[0, 6]]


def test_what_cannot_be_merged_leaves_nothing(parts: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "merged.safetensors"
    assert "samples 0-2 of data d are in both" in scores("merge", parts[0], parts[0], "--out", out, status=2)
    assert "1 score file" in scores("merge", parts[0], "--out", out, status=2)
    parts[1].write_bytes(parts[1].read_bytes()[:500])
    assert "1.safetensors" in scores("merge", *parts, "--out", out, status=2)
    assert "1.safetensors" in scores("show", parts[1], status=2)
    assert not out.exists()
