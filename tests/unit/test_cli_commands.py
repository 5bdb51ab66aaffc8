"""The command line as a user sees it: what it prints, and the status it ends with."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nemo_minitron.cli import quiet, recipes
from nemo_minitron.cli.main import app
from nemo_minitron.stages.chain import TITLES
from nemo_minitron.version import __version__
from tests.tiny import write_llama

runner = CliRunner()


def invoke(*arguments: str, status: int = 0) -> tuple[str, str]:
    result = runner.invoke(app, list(arguments))
    assert result.exit_code == status, result.output + str(result.exception)
    return result.stdout, result.stderr


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_llama(path)
    return path


@pytest.fixture
def given(model, tmp_path) -> list[str]:
    (tmp_path / "text.txt").write_text("the history of the city " * 50)
    return [
        "tiny_cpu",
        f"model.source={model}",
        f"data.sources=[{tmp_path / 'text.txt'}]",
        "--run-dir",
        str(tmp_path / "run"),
    ]


def test_version():
    assert invoke("--version")[0] == f"{__version__}\n"


def test_help_names_every_verb():
    out, _ = invoke("--help")
    assert all(re.search(rf"\b{verb}\b", out) for verb in (*TITLES, "run", "demo", "ls", "cp", "config", "doctor"))


def test_ls_shows_every_recipe_with_its_purpose():
    out, _ = invoke("ls")
    assert len(out.splitlines()) == len(recipes.bundled())
    assert re.search(r"^tiny/tiny_cpu +A recipe for tests", out, re.MULTILINE)


def test_cp_copies_and_does_not_overwrite(tmp_path):
    invoke("cp", "tiny_cpu", str(tmp_path))
    assert (tmp_path / "tiny_cpu.yaml").read_bytes() == recipes.find("tiny/tiny_cpu").read_bytes()
    _, err = invoke("cp", "tiny_cpu", str(tmp_path), status=2)
    assert "exists" in err


def test_an_unknown_recipe_is_an_error_with_a_suggestion():
    _, err = invoke("run", "tiny_cpuu", status=2)
    assert "did you mean tiny_cpu?" in err
    assert "Traceback" not in err


def test_config_prints_defaults_and_overrides():
    out, _ = invoke("config", "tiny_cpu", "model.source=m", "data.sources=[t]", "distill.optimizer.lr=0.5")
    assert "lr: 0.5" in out
    assert "beta2: 0.95" in out


def test_all_that_is_wrong_is_said_at_once_and_nothing_is_made(tmp_path):
    _, err = invoke(
        "run",
        "tiny_cpu",
        "model.source=m",
        "data.sources=[t]",
        "distill.tokns=5",
        "seed=-1",
        "target.num_layers=0",
        "--run-dir",
        str(tmp_path / "run"),
        status=2,
    )
    assert "distill.tokns: unknown key; did you mean distill.tokens?" in err
    assert "seed = -1" in err
    assert "target.num_layers = 0" in err
    assert not (tmp_path / "run").exists()


def test_debug_shows_where_an_error_came_from():
    _, err = invoke("run", "tiny_cpu", "distill.tokns=5", "--debug", status=2)
    assert "Traceback" in err


def test_an_override_that_is_none_is_named():
    _, err = invoke("config", "tiny_cpu", "seed", status=2)
    assert "'seed' is not of the form key=value" in err


def test_dry_run_tells_sizes_steps_and_writes_nothing(given, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    out, _ = invoke("run", *given, "--dry-run")
    # Llama, hidden 64, 8 heads and 4 groups of 8, FFN 96, tied vocabulary of 256, by hand:
    teacher = 4 * (64 * (8 + 2 * 4) * 8 + 8 * 8 * 64 + 3 * 64 * 96 + 2 * 64) + 256 * 64 + 64
    student = 3 * (48 * (4 + 2 * 4) * 8 + 4 * 8 * 48 + 3 * 48 * 64 + 2 * 48) + 256 * 48 + 48
    assert re.search(rf"parameters +{teacher:,} +{student:,} +{student / teacher:.1%}", out)
    assert re.search(r"layers +4 +3 +75.0%", out)
    assert re.search(r"distill +20 +512 +10,240", out)
    assert "import: do" in out
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("parallel.tensor=3", "parallel.tensor"),
        ("parallel.pipeline=5", "pipeline"),
        ("target.hidden_size=65", "hidden_size"),
        ("target.num_layers=9", "num_layers"),
        ("target.num_attention_heads=7", "heads"),
    ],
)
def test_dry_run_refuses_what_a_run_would_refuse(given, override, expected):
    _, err = invoke("run", *given, override, "--dry-run", status=2)
    assert expected in err


def test_what_cannot_be_is_shown_before_it_is_refused(given):
    out, err = invoke("run", *given, "parallel.tensor=3", "--dry-run", status=2)
    assert re.search(r"query heads +TP 3 +8 / 3 does not divide +4 / 3 does not divide", out)
    assert "num_attention_heads = 8 is not a multiple of parallel.tensor = 3" in err
    out, err = invoke("run", *given, "parallel.pipeline=5", "--dry-run", status=2)
    assert re.search(r"layers +PP 5 +4 < 5 +3 < 5", out)
    assert "4 layer(s) cannot fill 5 pipeline stages (parallel.pipeline)" in err


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("distill.batch.global_batch_size=7", "distill.batch.global_batch_size = 7 is not a multiple"),
        ("parallel.context=5", "distill.batch.sequence_length = 64 is not a multiple of 10, which parallel.context"),
        ("parallel.context=5", "score.sequence_length = 64 is not a multiple of 10"),
        ("cluster={gpus_per_node: 3}", "distill.batch.global_batch_size = 8 is not a multiple"),
        ("parallel.sequence_parallel=true", "parallel.sequence_parallel = true without tensor parallelism"),
    ],
)
def test_dry_run_names_the_key_of_a_batch_or_layout_that_cannot_be(given, override, expected):
    out, err = invoke("run", *given, override, "--dry-run", status=2)
    assert "layout: " in out
    assert expected in err


def test_sequences_beyond_the_model_s_context_are_refused_by_key(given, tmp_path):
    chat = given[2].removeprefix("data.sources=[").removesuffix("]")
    longer = (
        *("score.sequence_length=512", "distill.batch.sequence_length=264", "evaluate.sequence_length=257"),
        *("correct={tokens: 4096}", "correct.batch.sequence_length=512", f"tune={{sources: [{chat}]}}"),
    )
    said = [
        f"{key} = {length} is above the model's context of 256 tokens"
        for key, length in {
            "correct.batch.sequence_length": 512,
            "score.sequence_length": 512,
            "distill.batch.sequence_length": 264,
            "tune.batch.sequence_length": 512,
            "evaluate.sequence_length": 257,
        }.items()
    ]
    for how in ((), ("--dry-run",)):
        _, err = invoke("run", *given, *longer, *how, status=2)
        assert [problem for problem in said if problem not in err] == []
    _, err = invoke("score", *given, *longer, status=2)
    assert said[1] in err
    assert "evaluate.sequence_length" not in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"name: caf\xe9\n", "byte 9 is not UTF-8"),
        (b"- name: a\n- model: b\n", "a recipe is a mapping of sections"),
        (b"5\n", "a recipe is a mapping of sections"),
        (b"name: [\n", "expected the node content"),
        (b"", "model: is missing"),
    ],
)
def test_what_is_no_recipe_is_refused(content, told, tmp_path):
    (tmp_path / "mine.yaml").write_bytes(content)
    _, err = invoke("config", str(tmp_path / "mine.yaml"), status=2)
    assert err.startswith(f"error: {tmp_path / 'mine.yaml'}")
    assert told in err


def test_too_little_memory_is_a_warning():
    name = "qwen3_8b_to_6b_depth_64gpu_h100"
    large = ("parallel.tensor=1", "parallel.sequence_parallel=false", "distill.batch.micro_batch_size=4")
    out, _ = invoke("run", name, *large, "--dry-run")
    assert re.search(r"^fits +no: distill needs \d+ GB .* parallel.recompute=full would do$", out, re.MULTILINE)
    out, _ = invoke("run", name, *large, "parallel.recompute=full", "--dry-run")
    assert re.search(r"^fits +yes: ", out, re.MULTILINE)


def test_processes_that_do_not_fit_the_layout_are_refused(given):
    _, err = invoke("run", *given, "parallel.tensor=2", "--nproc", "3", status=2)
    assert "3 process(es) for parallel.tensor 2" in err
    assert "--nproc 2" in err


def test_a_missing_model_is_one_message(given, tmp_path):
    command = [sys.executable, "-m", "nemo_minitron", "run", *given, f"model.source={tmp_path / 'nowhere'}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "nowhere" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_verb_does_its_stage_and_what_it_needs(given, tmp_path):
    command = [sys.executable, "-m", "nemo_minitron", "import", *given]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "1/1 import" in done.stdout
    assert (tmp_path / "run" / "stages" / "import" / "DONE").is_file()
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["commands"][0]["outcome"] == "finished"
    assert "import tiny_cpu" in manifest["commands"][0]["command"]


def test_doctor_finds_what_is_here():
    out, _ = invoke("doctor")
    assert re.search(r"megatron-core +ok +0\.", out)
    assert "everything that is needed is here" in out


def test_known_noise_goes_and_the_rest_stays():
    code = (
        "from nemo_minitron.cli import quiet; quiet.install(); import logging, warnings\n"
        "import megatron.core, nemo.core\n"
        "warnings.warn('a warning of ours')\n"
        "logging.getLogger('nemo_minitron.data').warning('a log line of ours')\n"
        "logging.getLogger('megatron.core').error('an error of theirs')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "a warning of ours" in done.stderr
    assert "a log line of ours" in done.stderr
    assert "an error of theirs" in done.stderr
    assert "Transformer Engine" not in done.stderr
    assert "OneLogger" not in done.stderr
    assert len(done.stderr.split("\n")) <= 7


@pytest.mark.parametrize(
    ("name", "level", "text", "known"),
    [
        ("lightning.pytorch.utilities.rank_zero", 20, "GPU available: False, used: False", True),
        ("lightning.pytorch.utilities.rank_zero", 30, "Loss is NaN", False),
        ("nemo_logger", 30, "/x/megatron/core/a.py:1: UserWarning: Apex is not installed. Falling back", True),
        ("nemo_logger", 30, "/x/nemo_minitron/a.py:1: UserWarning: Something of ours", False),
        ("nemo_minitron.data.assets", 20, "fetching", False),
        ("lightningly", 20, "not a child of that logger", False),
    ],
)
def test_what_counts_as_noise(name, level, text, known):
    assert quiet.is_known_record(name, level, text) is known


def test_closed_output_is_no_defect():
    command = (
        f"{sys.executable} -m nemo_minitron config tiny_cpu model.source=m data.sources=[t] | head -c 1 > /dev/null"
    )
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, env=os.environ)
    assert "Traceback" not in done.stderr


def test_a_run_refuses_what_a_dry_run_refuses_before_it_begins(given, tmp_path):
    _, err = invoke("run", *given, "target.ffn_hidden_size=4096", status=2)
    assert "ffn_hidden_size = 4096" in err
    _, err = invoke("run", *given, "rounds=40", status=2)
    assert "would cut nothing" in err
    assert not (tmp_path / "run").exists()


def test_dry_run_shows_every_round_and_every_training(given):
    chat = given[2].removeprefix("data.sources=[").removesuffix("]")
    out, _ = invoke(
        "run",
        *given,
        "--dry-run",
        "rounds=2",
        "correct={tokens: 1024}",
        f"tune={{sources: [{chat}], batch: {{sequence_length: 64}}}}",
    )
    assert re.search(r"round 1 +student", out)
    assert re.search(r"FFN size +96 +80 +64", out)
    assert re.search(r"correct +2 +512 +1,024", out)
    assert re.search(r"distill\.1 +20 +512 +10,240", out)
    assert re.search(r"evaluate +<= 4 x 2,048", out)
    order = (
        "import",
        "data",
        "tokenize_chat",
        "correct",
        "score.1",
        "prune.1",
        "distill.1",
        "score",
        "prune",
        "distill",
        "tune",
    )
    assert [name for name in re.findall(r"([a-z_]+(?:\.\d)?):\s+do\b", out)][: len(order)] == list(order)


def test_a_verb_without_its_section_says_so(given):
    _, err = invoke("tune", *given, status=2)
    assert "no stage 'tune'" in err
    assert "tune:" in err
