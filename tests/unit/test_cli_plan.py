"""`nemo-minitron plan` on a tiny model: every command, what it leaves, and what it refuses."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from nemo_minitron.arch.axes import Axis
from nemo_minitron.checkpoints.files import FolderFiles
from nemo_minitron.checkpoints.open import open_checkpoint
from nemo_minitron.cli.main import app
from nemo_minitron.pruning.plan import PruningPlan
from nemo_minitron.pruning.scores import Scores
from tests.support.scores import sums
from tests.tiny import write_llama

runner = CliRunner()


def plan(*arguments: object, status: int = 0) -> str:
    result = runner.invoke(app, ["plan", *map(str, arguments)])
    assert result.exit_code == status, result.output + str(result.exception)
    return result.stdout if status == 0 else result.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`teacher/` and `scores.safetensors`."""
    path = tmp_path_factory.mktemp("plans")
    write_llama(path / "teacher")
    spec = open_checkpoint(path / "teacher").spec
    Scores(spec, sums(spec)[0]).save(path / "scores.safetensors")
    return path


def test_build_show_and_diff(folder: Path, tmp_path: Path) -> None:
    scored, drawn = tmp_path / "scored.json", tmp_path / "drawn.json"
    target = ("target.ffn_hidden_size=0.5", "num_layers=3")
    out = plan("build", folder / "scores.safetensors", *target, "-o", scored)
    assert re.search(r"^FFN size +96 +48 +50.0%$", out, re.MULTILINE)
    assert PruningPlan.load(scored).digest() in out
    plan("random", folder / "teacher", *target, "--seed", 7, "-o", drawn)
    assert PruningPlan.load(drawn).student == PruningPlan.load(scored).student
    assert "made from" in plan("show", drawn)
    assert json.loads(plan("show", drawn, "--json"))["digest"] == PruningPlan.load(drawn).digest()
    assert "ffn" in plan("diff", scored, drawn)
    assert json.loads(plan("diff", scored, drawn, "--json"))["same"] is False
    assert plan("diff", scored, scored) == "the same decision\n"


def test_apply_writes_either_format_and_both_alike(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan("random", folder / "teacher", "hidden_size=48", "num_query_groups=2", "--seed", 1, "-o", path)
    assert plan("apply", path, folder / "teacher", tmp_path / "hf").strip() == str(tmp_path / "hf")
    plan("apply", path, folder / "teacher", tmp_path / "one.nemo", "--to", "nemo")
    plan("apply", path, folder / "teacher", tmp_path / "unpacked", "--to", "nemo")
    out = plan("apply", path, folder / "teacher", tmp_path / "both", "--to", "both")
    assert sorted(out.split()) == [str(tmp_path / "both.nemo"), str(tmp_path / "both_hf")]
    assert (tmp_path / "both.nemo").read_bytes() == (tmp_path / "one.nemo").read_bytes()
    names = FolderFiles(tmp_path / "hf").names()
    assert names == FolderFiles(tmp_path / "both_hf").names()
    for name in names:
        assert (tmp_path / "hf" / name).read_bytes() == (tmp_path / "both_hf" / name).read_bytes(), name
    digest = PruningPlan.load(path).digest()
    for where in ("hf", "both_hf", "one.nemo", "unpacked"):
        assert digest in plan("show", tmp_path / where)
    assert not [name for name in tmp_path.iterdir() if name.name.startswith(".")]


def test_apply_takes_what_it_wrote(folder: Path, tmp_path: Path) -> None:
    """From a NeMo folder, and again with a plan for the student: the student knows its way back to the teacher."""
    once, twice = tmp_path / "once.json", tmp_path / "twice.json"
    plan("random", folder / "teacher", "ffn_hidden_size=80", "--seed", 1, "-o", once)
    plan("apply", once, folder / "teacher", tmp_path / "first", "--to", "nemo")
    plan("random", tmp_path / "first", "ffn_hidden_size=50", "num_layers=2", "--seed", 2, "-o", twice)
    plan("apply", twice, tmp_path / "first", tmp_path / "second")
    composed = PruningPlan.load(once).compose(PruningPlan.load(twice))
    found = PruningPlan.of_checkpoint(tmp_path / "second")
    assert found.digest() == composed.digest()
    teacher, student = open_checkpoint(folder / "teacher"), open_checkpoint(tmp_path / "second")
    name = "decoder.layers.{}.mlp.linear_fc2.weight"
    for index, layer in enumerate(found.layers):
        expected = teacher.get(name.format(layer.source))[:, list(layer.kept[Axis.FFN])]
        assert torch.equal(student.get(name.format(index)), expected)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["build", "{}/scores.safetensors", "ffn_size=3"], "ffn_size: unknown key; did you mean ffn_hidden_size?"),
        (["build", "{}/scores.safetensors", "num_layers=9", "hidden_size=1000"], "the teacher has 64"),
        (["build", "{}/scores.safetensors", "hidden_size"], "not of the form key=value"),
        (["build", "{}/absent.safetensors"], "absent.safetensors"),
        (["random", "{}/teacher", "hidden_size=0", "--seed", "1"], "hidden_size = 0: an integer of at least 1"),
        (["show", "{}/absent.json"], "absent.json: cannot be read"),
        (["show", "{}/scores.safetensors"], "cannot be read"),
        (["apply", "{}/absent.json", "{}/teacher", "{}/out"], "absent.json"),
    ],
)
def test_what_cannot_be_is_an_error_with_status_2(folder: Path, arguments: list[str], words: str) -> None:
    arguments = [argument.format(folder) for argument in arguments]
    error = plan(*arguments, status=2)
    assert words in error
    assert "Traceback" not in error
    assert not (folder / "out").exists()


def test_a_plan_for_another_model_leaves_what_is_there(folder: Path, tmp_path: Path) -> None:
    write_llama(tmp_path / "other", intermediate_size=64)
    plan("random", tmp_path / "other", "--seed", 1, "-o", tmp_path / "plan.json")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    error = plan("apply", tmp_path / "plan.json", folder / "teacher", tmp_path / "out", status=2)
    assert "made for another model" in error
    assert (tmp_path / "out" / "mine").read_text() == "precious"


def test_apply_replaces_a_checkpoint_if_asked_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    path, teacher, out = tmp_path / "plan.json", tmp_path / "models" / "teacher", tmp_path / "out"
    shutil.copytree(folder / "teacher", teacher)
    plan("random", teacher, "num_layers=3", "--seed", 1, "-o", path)
    plan("apply", path, teacher, out)
    before = (out / "model.safetensors").stat().st_ino
    assert "is already there" in plan("apply", path, teacher, out, status=2)
    assert (out / "model.safetensors").stat().st_ino == before
    plan("apply", path, teacher, out, "--force")
    assert (out / "model.safetensors").stat().st_ino != before
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "mine").write_text("precious")
    for place, words in (
        (teacher.parent, "around it"),
        (teacher, "is the source"),
        (tmp_path / "results", "no checkpoint"),
    ):
        assert words in plan("apply", path, teacher, place, "--force", status=2)
    assert (tmp_path / "results" / "mine").read_text() == "precious"
    assert open_checkpoint(teacher).spec.num_layers == 4
    shutil.copytree(out, tmp_path / "both_hf")
    assert "both_hf" in plan("apply", path, teacher, tmp_path / "both", "--to", "both", status=2)
    assert not (tmp_path / "both.nemo").exists()
