"""What a user sees when the input cannot be right: one message, exit status 2, and everything that existed intact."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nemo_minitron.cli.main import app
from tests.tiny import write_corpus, write_llama, write_tokenizer

RECIPE = Path(__file__).parents[2] / "recipes/tiny/tiny_cpu.yaml"


@pytest.fixture
def inputs(tmp_path) -> tuple[Path, Path]:
    """A model folder and a corpus folder, to be damaged."""
    write_llama(tmp_path / "hf", trained_steps=20)
    return tmp_path / "hf", write_corpus(tmp_path / "corpus", documents=30)


def run(tmp_path, hf, corpus, *more: str, verb: str = "run") -> str:
    """Run the command line in this process; returns what it said after it has failed as it should."""
    command = [verb, str(RECIPE), f"model.source={hf}", f"data.sources=[{corpus}]", "--run-dir", str(tmp_path / "run")]
    ended = CliRunner().invoke(app, [*command, *more])
    assert ended.exit_code == 2, ended.output
    assert "Traceback" not in ended.output
    return ended.stderr


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_missing_weight_file(inputs, tmp_path):
    (inputs[0] / "model.safetensors").unlink()
    assert "safetensors" in run(tmp_path, *inputs)


def test_a_truncated_weight_file(inputs, tmp_path):
    truncate(inputs[0] / "model.safetensors")
    assert "truncated" in run(tmp_path, *inputs).lower()
    assert not (tmp_path / "run/stages/import").exists()


def test_a_model_named_as_on_the_hub(inputs, tmp_path):
    said = run(tmp_path, Path("meta-llama/Llama-3.1-8B"), inputs[1])
    assert "model.source: meta-llama/Llama-3.1-8B: no such file or folder" in said
    assert "hf download meta-llama/Llama-3.1-8B --local-dir DIR" in said
    assert "give its place on this machine" in run(tmp_path, tmp_path / "none", inputs[1])


def test_a_checkpoint_of_another_architecture(inputs, tmp_path):
    config = inputs[0] / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "bert"}))
    said = run(tmp_path, *inputs)
    assert "bert" in said
    assert "llama" in said


def test_a_tokenizer_that_does_not_fit_the_vocabulary(inputs, tmp_path):
    tokenizer = write_tokenizer(inputs[0])
    tokenizer.add_tokens([f"<extra{number}>" for number in range(200)])
    tokenizer.save_pretrained(inputs[0])
    said = run(tmp_path, *inputs)
    assert "256" in said
    assert "vocab" in said


def test_an_empty_text(inputs, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/a.txt").write_text("")
    run(tmp_path, inputs[0], tmp_path / "empty", verb="data")
    assert (tmp_path / "run/stages/import/DONE").is_file(), "what was finished stays"


def test_a_text_too_short_to_train_on(inputs, tmp_path):
    short = write_corpus(tmp_path / "short", documents=3, sentences_each=2)
    said = run(tmp_path, inputs[0], short)
    assert "tokens" in said or "documents" in said


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("target.ffn_hidden_size=4096", ["ffn_hidden_size = 4096", "96"]),
        ("target.num_layers=0", ["target.num_layers", "at least 1"]),
        ("target.num_atention_heads=4", ["did you mean target.num_attention_heads"]),
        ("target.num_attention_heads=6", ["num_attention_heads = 6", "num_query_groups = 4"]),
        ("parallel.tensor=3", ["3"]),
        ("distill.hidden.layers=[[9,1]]", ["distill.hidden.layers", "[9, 1]", "the teacher has layers 0 to 3"]),
        ("distill.hidden.layers=[[-1,-7]]", ["[-1, -7]", "the student has layers 0 to"]),
        ("distill.hidden.kind=cosine", ["nothing to compare"]),
    ],
)
def test_sizes_that_cannot_be(inputs, tmp_path, override, words):
    said = run(tmp_path, *inputs, override, "--dry-run")
    assert all(word in said for word in words), said
    assert not (tmp_path / "run").exists()


def test_a_run_folder_of_another_recipe(inputs, tmp_path):
    hf, corpus = inputs
    command = [f"model.source={hf}", f"data.sources=[{corpus}]", "--run-dir", str(tmp_path / "run")]
    assert CliRunner().invoke(app, ["data", str(RECIPE), *command]).exit_code == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run/stages").glob("*/**/*") if path.is_file()}
    said = run(tmp_path, hf, corpus, "data.heldout_fraction=0.3")
    assert "data.heldout_fraction" in said
    assert "--from data" in said
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())


def test_a_full_disk(inputs, tmp_path):
    """A limit on the size of files stands in for the disk: the model does not fit, and one message says so."""
    hf, corpus = inputs
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)); "
        "from nemo_minitron.cli.main import main; main()"
    )
    arguments = ["run", str(RECIPE), f"model.source={hf}", f"data.sources=[{corpus}]", "--run-dir", tmp_path / "run"]
    ended = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert ended.returncode == 2, ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "run/stages/import").exists()
