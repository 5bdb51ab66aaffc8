"""Recipes against the papers: names, every cited number, parameter counts; and a dry run of each."""

import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from nemo_minitron.arch.weights import parameter_count
from nemo_minitron.checkpoints.hf import read_architecture
from nemo_minitron.cli import recipes
from nemo_minitron.cli.main import app
from nemo_minitron.config.load import load_recipe
from nemo_minitron.errors import ConfigError
from nemo_minitron.pruning.rounds import round_specs
from tests.support.expert_models import write_experts
from tests.tiny import NEMOTRON_3_PATTERN, write_llama, write_nemotron_h

NAME = re.compile(r"[a-z0-9]+/[a-z0-9_]+_\d+b(_a\d+b)?_to_\d+b_(width|depth)_(?P<gpus>\d+)gpu_(?P<gpu>a100|h100)")
CITED = re.compile(r"# (table|text|section|README|guidelines)\b")
README = Path(__file__).parents[2] / "recipes/README.md"
ALL = recipes.bundled()
PAPERS = [recipe for recipe in ALL if "gpu" in recipe.name]

# arXiv:2408.11796v4. Tables 3 and 4; "Teacher correction", "Pruning" and "Distillation" in the text.
_PRACTICE = {
    "correct.tokens": 100e9,
    "correct.optimizer.warmup_steps": 120,
    "score.samples": 1024,
    "distill.batch.sequence_length": 8192,
    "distill.optimizer.lr": 1e-4,
    "distill.optimizer.schedule": "cosine",
    "distill.kd_weight": 1.0,
    "distill.lm_weight": 0.0,
    "cluster.nodes": 32,
}
_BY_WIDTH = {"target.batch_aggregation": "l2", "target.sequence_aggregation": "mean"}
_LLAMA = _PRACTICE | {
    "distill.tokens": 94e9,
    "distill.batch.global_batch_size": 1152,
    "distill.optimizer.min_lr": 1e-5,
    "distill.optimizer.warmup_steps": 40,
}
# arXiv:2407.14679v2. Tables 2, 5, 13, 15; batch, learning rates, temperature and hardware in the text.
_COMPACT = _BY_WIDTH | {
    "model.architecture": "nemotron4_15b.json",
    "score.samples": 1024,
    "distill.tokens": 94e9,
    "distill.batch.sequence_length": 4096,
    "distill.batch.global_batch_size": 1152,
    "distill.optimizer.lr": 2e-4,
    "distill.optimizer.min_lr": 4.5e-7,
    "distill.optimizer.schedule": "cosine",
    "distill.kd_weight": 1.0,
    "distill.lm_weight": 0.0,
    "distill.temperature": 1.0,
    "cluster.nodes": 16,
}
GOLDEN = {
    "llama3/llama31_8b_to_4b_width_256gpu_h100": _LLAMA
    | _BY_WIDTH
    | {"target.hidden_size": 3072, "target.ffn_hidden_size": 9216},
    # The same sizes and loss, with fewer tokens on one node.
    "llama3/llama31_8b_to_4b_width_8gpu_h100": _BY_WIDTH
    | {
        "target.hidden_size": 3072,
        "target.ffn_hidden_size": 9216,
        "score.samples": 1024,
        "distill.batch.sequence_length": 8192,
        "distill.optimizer.lr": 1e-4,
        "distill.optimizer.min_lr": 1e-5,
        "distill.optimizer.warmup_steps": 40,
        "distill.optimizer.schedule": "cosine",
        "distill.kd_weight": 1.0,
        "distill.lm_weight": 0.0,
    },
    "llama3/llama31_8b_to_4b_depth_256gpu_h100": _LLAMA | {"target.drop_layers": list(range(15, 31))},
    "mistral/mistral_nemo_12b_to_8b_width_256gpu_h100": _PRACTICE
    | _BY_WIDTH
    | {
        "target.hidden_size": 4096,
        "target.ffn_hidden_size": 11520,
        "distill.tokens": 380e9,
        "distill.batch.global_batch_size": 768,
        "distill.optimizer.min_lr": 4.5e-7,
        "distill.optimizer.warmup_steps": 60,
    },
    "nemotron/nemotron4_15b_to_8b_width_128gpu_a100": _COMPACT
    | {"target.hidden_size": 4096, "target.ffn_hidden_size": 16384},
    "nemotron/nemotron4_15b_to_4b_width_128gpu_a100": _COMPACT
    | {
        "target.hidden_size": 3072,
        "target.ffn_hidden_size": 9216,
        "target.num_attention_heads": 24,
        "target.merge_head_residuals": True,
    },
    # arXiv:2504.11409, table 1, and the tokens of the final model.
    "nemotron/nemotron_h_8b_to_4b_width_256gpu_h100": {
        "target.hidden_size": 3072,
        "target.ffn_hidden_size": 12288,
        "target.mamba_num_heads": 112,
        "distill.tokens": 380e9,
    },
    # examples/megatron_bridge/tutorials/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16/README.md of NVIDIA/Model-Optimizer.
    "nemotron/nemotron3_nano_30b_a3b_to_22b_width_32gpu_h100": {
        "score.sequence_length": 8192,
        "target.hidden_size": 2304,
        "target.num_experts": 104,
        "target.shared_ffn_hidden_size": 3072,
        "distill.tokens": 80e9,
        "distill.batch.sequence_length": 8192,
        "distill.batch.global_batch_size": 3072,
        "distill.optimizer.lr": 1e-4,
        "distill.optimizer.min_lr": 1e-5,
        "distill.optimizer.schedule": "cosine",
        "distill.optimizer.warmup_steps": 25,
        "parallel.expert": 8,
        "cluster.nodes": 4,
    },
    # examples/nemo_run/prune_distill/README.md of NVIDIA/TensorRT-Model-Optimizer, and its pruning guidelines.
    "qwen3/qwen3_8b_to_6b_depth_64gpu_h100": {
        "score.samples": 1024,
        "target.num_layers": 24,
        "distill.tokens": 90e9,
        "distill.batch.sequence_length": 4096,
        "distill.batch.global_batch_size": 768,
        "distill.optimizer.lr": 1e-4,
        "distill.optimizer.min_lr": 1e-5,
        "distill.optimizer.warmup_steps": 100,
    },
    "qwen3/qwen3_30b_a3b_to_22b_width_64gpu_h100": {
        "score.samples": 1024,
        "distill.optimizer.min_lr": 1e-5,
        "distill.optimizer.warmup_steps": 100,
    },
}
# Teacher, student, and the student without embeddings, in billions as printed: arXiv:2408.11796v4 table 3,
# arXiv:2407.14679v2 table 5; the pages of Nemotron-H-8B and 4B, and of Qwen3-8B, on the Hugging Face hub; for Nemotron
# 3 Nano the tutorial that is named above.
BILLIONS = {
    "llama3/llama31_8b_to_4b_width_256gpu_h100": (8.0, 4.5, 3.7),
    "llama3/llama31_8b_to_4b_width_8gpu_h100": (8.0, 4.5, 3.7),
    "llama3/llama31_8b_to_4b_depth_256gpu_h100": (8.0, 4.5, 3.5),
    "mistral/mistral_nemo_12b_to_8b_width_256gpu_h100": (12.2, 8.4, 7.3),
    "nemotron/nemotron4_15b_to_8b_width_128gpu_a100": (15.6, 8.3, None),
    "nemotron/nemotron4_15b_to_4b_width_128gpu_a100": (15.6, 4.2, None),
    "nemotron/nemotron_h_8b_to_4b_width_256gpu_h100": (8.1, 4.5, None),
    "nemotron/nemotron3_nano_30b_a3b_to_22b_width_32gpu_h100": (31.6, 22.3, None),
    "qwen3/qwen3_8b_to_6b_depth_64gpu_h100": (8.2, 5.9, None),
    "qwen3/qwen3_30b_a3b_to_22b_width_64gpu_h100": (30.5, 22.4, None),
}
EXACT = {  # of the checkpoints nvidia/Llama-3.1-Minitron-4B-*-Base
    "llama3/llama31_8b_to_4b_width_256gpu_h100": 4_512_746_496,
    "llama3/llama31_8b_to_4b_width_8gpu_h100": 4_512_746_496,
    "llama3/llama31_8b_to_4b_depth_256gpu_h100": 4_540_469_248,
}


def keys_by_line(path: Path) -> dict[int, tuple[str, object]]:
    """Dotted key and value of every scalar or list, by the line it begins on; line numbers from 0."""
    found: dict[int, tuple[str, object]] = {}

    def visit(node: yaml.Node, prefix: str) -> None:
        for key, value in node.value:
            dotted = f"{prefix}{key.value}"
            if isinstance(value, yaml.MappingNode):
                visit(value, f"{dotted}.")
            else:
                found[key.start_mark.line] = dotted, yaml.safe_load(yaml.serialize(value))

    visit(yaml.compose(path.read_text()), "")
    return found


@pytest.mark.parametrize("recipe", PAPERS, ids=lambda recipe: recipe.name)
def test_names_say_what_a_recipe_does_and_where(recipe):
    match = NAME.fullmatch(recipe.name)
    assert match
    cluster = load_recipe(recipe.path, []).cluster
    assert (cluster.gpus, cluster.gpu) == (int(match["gpus"]), match["gpu"])


def test_every_recipe_of_a_paper_is_checked():
    assert {recipe.name for recipe in PAPERS} == GOLDEN.keys() == BILLIONS.keys()


@pytest.mark.parametrize("recipe", PAPERS, ids=lambda recipe: recipe.name)
def test_every_number_is_the_papers(recipe):
    values = dict(keys_by_line(recipe.path).values())
    assert {key: values.get(key) for key in GOLDEN[recipe.name]} == GOLDEN[recipe.name]


@pytest.mark.parametrize("recipe", PAPERS, ids=lambda recipe: recipe.name)
def test_whatever_cites_a_paper_is_in_the_table_above(recipe):
    keys = keys_by_line(recipe.path)
    lines = recipe.path.read_text().splitlines()
    cited = {keys[number][0] for number, line in enumerate(lines) if CITED.search(line) and number in keys}
    assert cited == GOLDEN[recipe.name].keys()


@pytest.mark.parametrize("recipe", PAPERS, ids=lambda recipe: recipe.name)
def test_parameters_are_the_papers(recipe):
    config = load_recipe(recipe.path, [])
    teacher = read_architecture(Path(config.model.architecture))
    student = round_specs(config.target, teacher, config.rounds)[-1]
    before, after, inner = BILLIONS[recipe.name]
    assert round(parameter_count(teacher) / 1e9, 1) == before
    assert round(parameter_count(student) / 1e9, 1) == after
    assert inner is None or round(parameter_count(student, embeddings=False) / 1e9, 1) == inner
    assert parameter_count(student) == EXACT.get(recipe.name, parameter_count(student))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> list[str]:
    """What the recipes for one's own model need."""
    model = tmp_path_factory.mktemp("model")
    write_llama(model)
    return [f"model.source={model}", "data.sources=[texts]"]


@pytest.fixture(scope="module")
def tiny_experts(tmp_path_factory) -> list[str]:
    """The same for those for a model with experts."""
    model = tmp_path_factory.mktemp("experts")
    write_experts(model, "qwen2_moe")
    return [f"model.source={model}", "data.sources=[texts]"]


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory) -> list[str]:
    """The same with a hybrid of Mamba and attention."""
    model = tmp_path_factory.mktemp("hybrid")
    write_nemotron_h(model)
    return [f"model.source={model}", "data.sources=[texts]"]


@pytest.fixture(scope="module")
def hybrid_experts(tmp_path_factory) -> list[str]:
    """The same with experts in a hybrid."""
    model = tmp_path_factory.mktemp("hybrid_experts")
    write_nemotron_h(model, pattern=NEMOTRON_3_PATTERN)
    return [f"model.source={model}", "data.sources=[texts]"]


@pytest.fixture(scope="module")
def own_models(tiny, tiny_experts, hybrid, hybrid_experts) -> dict[str, list[str]]:
    """What the tiny recipes are given; "" for those for any model."""
    return {
        "": tiny,
        "tiny/experts_cpu": tiny_experts,
        "tiny/hybrid_cpu": hybrid,
        "tiny/hybrid_experts_cpu": hybrid_experts,
    }


def documented(name: str) -> str:
    """A recipe's row in the table of recipes/README.md."""
    return re.search(rf"^\| `{name}` \|.*$", README.read_text(), re.MULTILINE)[0]


@pytest.mark.parametrize("recipe", ALL, ids=lambda recipe: recipe.name)
def test_every_recipe_dry_runs(recipe, own_models, tmp_path, monkeypatch):
    monkeypatch.setenv("NEMO_MINITRON_CACHE", str(tmp_path / "nothing is here"))
    overrides = own_models.get(recipe.name, own_models[""]) if recipe.name.startswith("tiny/") else []
    before = time.process_time()
    done = CliRunner().invoke(app, ["run", recipe.name, *overrides, "--run-dir", str(tmp_path / "run"), "--dry-run"])
    assert time.process_time() - before < 10
    assert done.exit_code == 0, done.output
    assert re.search(r"^fits +yes: ", done.stdout, re.MULTILINE)
    torchrun = "torchrun --standalone --nproc-per-node 8 -m nemo_minitron"
    command = torchrun if "_8gpu_" in recipe.name else "nemo-minitron"
    assert re.search(rf"^run +{command} ", done.stdout, re.MULTILINE)
    assert re.search(r"parameters, built on meta", done.stdout)
    if recipe in PAPERS:
        takes = re.search(r"^takes +[\d.,]+ hours.*, ([\d,]+) GPU hours on \d+ (\w+)", done.stdout, re.MULTILINE)
        parameters = re.search(r"parameters +[\d,]+ +([\d,]+)", done.stdout)
        assert f"| {parameters[1]} |" in documented(recipe.name)
        assert f"| {takes[1]} {takes[2]} |" in documented(recipe.name)
    assert not list(tmp_path.iterdir())


def test_a_dry_run_takes_seconds_and_no_network(tmp_path):
    """A whole process, with every import; in processor time, which other work on the machine does not stretch."""
    alone = "import socket; socket.socket.connect = socket.getaddrinfo = None"
    command = [
        sys.executable,
        "-c",
        f"{alone}; from nemo_minitron.cli.main import app; app()",
        "run",
        "nemotron4_15b_to_4b_width_128gpu_a100",
        "--dry-run",
    ]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=os.environ)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 10


def test_a_copied_recipe_works_where_it_is(tmp_path):
    runner = CliRunner()
    name = "qwen3_8b_to_6b_depth_64gpu_h100"
    assert runner.invoke(app, ["cp", name, str(tmp_path / "mine" / "my.yaml")]).exit_code == 0
    config = load_recipe(tmp_path / "mine" / "my.yaml", [])
    assert Path(config.model.architecture) == tmp_path / "mine" / "qwen3_8b.json"
    assert read_architecture(Path(config.model.architecture)).num_layers == 36
    # A second recipe of the family finds that file there; another file of its name is not replaced.
    assert runner.invoke(app, ["cp", name, str(tmp_path / "mine" / "other.yaml")]).exit_code == 0
    (tmp_path / "mine" / "qwen3_8b.json").write_text("{}")
    done = runner.invoke(app, ["cp", name, str(tmp_path / "mine" / "third.yaml")])
    assert done.exit_code == 2
    assert "qwen3_8b.json" in done.stderr
    assert not (tmp_path / "mine" / "third.yaml").exists()


def test_a_run_names_every_key_whose_path_is_not_there(tmp_path):
    name = "llama31_8b_to_4b_width_256gpu_h100"
    done = CliRunner().invoke(app, ["run", name, "--nproc", "2", "--run-dir", str(tmp_path / "run")], env=ONE_OF_TWO)
    assert done.exit_code == 2
    for key in ("model.source: /models/", "data.sources: /data/text", "tune.sources: /data/chat.jsonl"):
        assert key in done.stderr
    assert not (tmp_path / "run").exists()


ONE_OF_TWO = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}


def test_a_source_that_is_another_model_than_described_is_refused(tiny, tmp_path):
    (tmp_path / "other.json").write_text((recipes.find("smollm2/demo").parent / "smollm2_135m.json").read_text())
    arguments = ["run", "tiny_cpu", *tiny, f"model.architecture={tmp_path / 'other.json'}", "--dry-run"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2
    assert "model.architecture" in done.stderr
    assert "hidden_size is 576 in the one and 64 in the other" in done.stderr
    assert "vocab_size" in done.stderr


@pytest.mark.parametrize(
    ("given", "now"),
    [
        ("steps=2", "rounds"),
        ("distill.optimizer.decay_share=0.1", "distill.optimizer.decay_fraction"),
        ("distill.guard.most_skipped=3", "distill.guard.max_consecutive_skips"),
    ],
)
def test_keys_that_had_another_name_are_refused_with_the_new_one(given: str, now: str) -> None:
    with pytest.raises(ConfigError, match=rf"{given.partition('=')[0]}: is called {now} now"):
        load_recipe(recipes.find("tiny_cpu"), ["model.source=m", "data.sources=[t]", given])
