"""What the README and other pages say exists, exists; what they show, runs."""

import os
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from typer.main import get_command

from nemo_minitron.checkpoints.open import open_checkpoint
from nemo_minitron.cli import recipes
from nemo_minitron.cli.main import app
from nemo_minitron.config.load import load_recipe
from nemo_minitron.pruning.plan import PruningPlan
from nemo_minitron.pruning.scores import Scores
from nemo_minitron.stages.chain import chain_for
from tests.tiny import write_corpus, write_llama

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CHAIN = chain_for(load_recipe(recipes.find("smollm2/demo"), []))
PAGES = sorted(
    page for pattern in ("*.md", "docs/**/*.md", "recipes/**/*.md", "examples/*.md") for page in ROOT.glob(pattern)
)


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    lines = [line.split("#")[0].strip() for block in blocks("console") for line in block.splitlines()]
    return [shlex.split(line) for line in lines if line]


def ours(words: list[str]) -> list[str] | None:
    """The arguments of `nemo-minitron` in a command line, also behind torchrun or srun."""
    for name in ("nemo-minitron", "nemo_minitron"):
        if name in words:
            return words[words.index(name) + 1 :]
    return None


def test_it_starts_with_one_sentence_a_table_and_two_commands():
    first_screen = "\n".join(README.splitlines()[:25])
    assert "| perplexity |" in first_screen
    assert (
        first_screen.index("| teacher |") < first_screen.index("make demo    #") < first_screen.index("make test    #")
    )


@pytest.mark.parametrize("words", [words for words in commands() if ours(words)], ids=" ".join)
def test_commands_options_and_keys_exist(words):
    command, arguments = get_command(app), ours(words)
    while hasattr(command, "commands"):
        command, arguments = command.commands[arguments[0]], arguments[1:]
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in arguments if word.startswith("--")} <= known
    keys = [word for word in arguments if re.match(r"[a-z_.]+=", word)]
    load_recipe(recipes.find("smollm2/demo"), keys)
    for option, following in pairwise(arguments):
        if option == "--from" or (option == "--to" and command.name == "run"):
            assert following in [stage.name for stage in CHAIN]


@pytest.mark.parametrize("words", [words for words in commands() if words[0] == "make"], ids=" ".join)
def test_make_targets_exist(words):
    assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_the_table_of_stages_is_the_chain():
    assert re.findall(r"^\| `([a-z]+)` \|", README, re.MULTILINE) == [stage.name for stage in CHAIN]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        assert target.startswith("http") or (page.parent / target).exists(), target


def headings(page: Path) -> set[str]:
    """A page's headings as the anchors that GitHub makes of them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return {
        re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_to_headings_name_one_that_is_there(page):
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert anchor in headings(page.parent / target if target else page), f"{target}#{anchor}"


def test_the_python_example_runs(tmp_path):
    [example] = blocks("python")
    write_llama(tmp_path / "model", num_hidden_layers=6)
    write_corpus(tmp_path / "corpus")
    command = [sys.executable, "-m", "nemo_minitron", "data", "tiny_cpu"]
    command += [f"model.source={tmp_path / 'model'}", f"data.sources=[{tmp_path / 'corpus'}]"]
    subprocess.run([*command, "--run-dir", tmp_path / "runs/demo"], check=True, capture_output=True, timeout=120)
    example = example.replace("sequence_length=512", "sequence_length=64").replace("26", "2")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", example],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    pruned = tmp_path / "pruned"
    assert PruningPlan.load(pruned / "plan.json").student.num_layers == 2
    assert Scores.load(pruned / "scores.safetensors").spec.num_layers == 6
    assert open_checkpoint(pruned / "student.nemo").spec.num_layers == 2
    assert open_checkpoint(pruned / "student_hf").spec.num_layers == 2
