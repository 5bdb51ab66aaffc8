"""Files that this user may not read or write are the user's to mend: status 2, the file, the rule, the remedy."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from typer.testing import CliRunner

from nemo_minitron.cli.main import app
from nemo_minitron.errors import DeniedError, MinitronError, denied
from nemo_minitron.models.scripts import reported_errors
from nemo_minitron.stages.files import as_user_error, read_json, write_text
from tests.support.users import ordinary_user
from tests.tiny import write_llama

RECIPE = Path(__file__).parents[2] / "recipes/tiny/tiny_cpu.yaml"


@pytest.fixture(scope="module")
def checkpoint() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        write_llama(Path(name) / "hf")
        (Path(name) / "hf/model.safetensors").chmod(0o644)  # transformers lets its owner alone read it
        yield Path(name) / "hf"


def refused(*words: str):
    """How a command of an ordinary user ends."""
    with ordinary_user():
        return CliRunner().invoke(app, list(words))


def assert_told(ended, path: Path) -> None:
    assert ended.exit_code == 2, ended.stderr
    assert f"{path}: Permission denied" in ended.stderr
    assert "rule: the user who runs the command may read" in ended.stderr
    assert "remedy: change the permissions" in ended.stderr
    assert "defect" not in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_recipe(public):
    path = public / "mine.yaml"
    path.write_text(RECIPE.read_text())
    path.chmod(0)
    ended = refused("config", str(path))
    assert_told(ended, path)
    assert "(it is ---------- of user " in ended.stderr


def test_a_recipe_in_a_closed_folder(public):
    (public / "closed").mkdir()
    (public / "closed/mine.yaml").write_text(RECIPE.read_text())
    (public / "closed").chmod(0)
    ended = refused("config", str(public / "closed/mine.yaml"))
    (public / "closed").chmod(0o755)
    assert_told(ended, public / "closed/mine.yaml")
    assert f"({public}/closed is d---------" in ended.stderr


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_checkpoint(checkpoint, name):
    assert refused("inspect", str(checkpoint)).exit_code == 0
    (checkpoint / name).chmod(0)
    try:
        assert_told(refused("inspect", str(checkpoint)), checkpoint / name)
    finally:
        (checkpoint / name).chmod(0o644)


def test_what_a_library_says_without_a_name(checkpoint):
    path = checkpoint / "tokenizer.json"
    path.chmod(0)
    try:
        with ordinary_user(), pytest.raises(Exception, match=r"(?i)permission denied") as caught:
            Tokenizer.from_file(str(path))
    finally:
        path.chmod(0o644)
    assert not isinstance(caught.value, OSError)
    assert "ermission denied" in str(denied(caught.value))


def test_a_folder_that_may_not_be_written(public):
    public.chmod(0o555)
    with ordinary_user(), pytest.raises(PermissionError) as caught:
        write_text(public / "a.json", "{}")
    told = as_user_error(caught.value, public)
    assert isinstance(told, DeniedError)
    assert str(public) in told.what


def test_a_file_of_ours_is_not_called_damaged(public):
    path = public / "a.json"
    path.write_text("{}")
    path.chmod(0)
    with ordinary_user(), pytest.raises(DeniedError, match="Permission denied"):
        read_json(path)


def test_hydra_scripts_say_the_same(public, capsys):
    path = public / "tokens.bin"
    path.touch()
    path.chmod(0)
    with ordinary_user(), pytest.raises(SystemExit) as ended, reported_errors():
        path.read_bytes()
    assert ended.value.code == 2
    assert f"error: {path}: Permission denied" in capsys.readouterr().err


def test_other_errors_stay_what_they_are():
    assert denied(FileNotFoundError(2, "No such file or directory", "x")) is None
    assert denied(ValueError("a number")) is None
    cause = MinitronError("other")
    cause.__cause__ = PermissionError(13, "Permission denied", "/x")
    assert "/x: Permission denied" in str(denied(cause))
