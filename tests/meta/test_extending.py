"""docs/extending.md: its diffs apply to the package as it is, all together, and what they add works."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
DIFFS = dict(re.findall(r"^## (?:An? )(.+?)\n.*?^```diff\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
SENTENCES = ("the river of the city was a treaty in the forest", "the poet of the village was a king")

pytestmark = pytest.mark.slow


class Extended:
    """A copy of the package with every diff applied."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.copy = folder / "copy"
        for name in ("nemo_minitron", "tests", "recipes"):
            shutil.copytree(ROOT / name, self.copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "ruff.toml", self.copy)
        for diff in DIFFS.values():
            self.run("git", "apply", "-", stdin=diff)
        self.facts = json.loads(self.python("tests.support.extended", str(folder)).splitlines()[-1])

    def run(self, *command: str, stdin: str = "") -> str:
        paths = {"PYTHONPATH": str(self.copy), "GIT_CEILING_DIRECTORIES": str(self.folder), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command,
            cwd=self.copy,
            input=stdin,
            env=os.environ | paths,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def python(self, module: str, *arguments: str) -> str:
        return self.run(sys.executable, "-m", module, *arguments)

    def chain(self, last: str) -> None:
        """The tiny chain up to a stage."""
        sources = [f"model.source={self.folder / 'hf'}", f"data.sources=[{self.folder / 'corpus'}]"]
        settings = ["distill.divergence=hellinger", "distill.tokens=2048"]
        where = ["--run-dir", str(self.folder / "run"), "--to", last]
        self.python("nemo_minitron", "run", "recipes/tiny/tiny_cpu.yaml", *sources, *settings, *where)

    def result(self, path: str) -> Path:
        return self.folder / "run/stages" / path


@pytest.fixture(scope="module")
def extended(tmp_path_factory) -> Extended:
    made = Extended(tmp_path_factory.mktemp("extended"))
    assert made.facts["package"] == str(made.copy / "nemo_minitron")
    made.chain("distill")
    return made


def changed(diff: str) -> set[str]:
    return set(re.findall(r"^diff --git a/(\S+)", diff, re.MULTILINE))


def test_the_page_has_what_it_announces(extended: Extended) -> None:
    assert list(DIFFS) == ["divergence", "family", "depth metric", "stage"]
    assert PAGE.count("```diff") == len(DIFFS)
    assert not any(path.startswith("nemo_minitron/") for path in changed(DIFFS["depth metric"]))
    ruff = str(Path(sys.executable).parent / "ruff")
    extended.run(ruff, "check", "--no-cache", "nemo_minitron")
    extended.run(ruff, "format", "--check", "--no-cache", "nemo_minitron", "my_tasks.py")


def test_the_divergence_equals_its_closed_form_and_trains_a_student(extended: Extended) -> None:
    assert all(value < 1e-12 for value in extended.facts["torch"].values()), extended.facts["torch"]
    assert extended.facts["has_kernels"]
    assert all(value < 1e-5 for value in extended.facts["triton"].values()), extended.facts["triton"]
    settings = json.loads(extended.result("distill/DONE").read_text())["settings"]
    assert settings["distill.divergence"] == "hellinger"


def test_the_family_computes_what_transformers_computes(extended: Extended) -> None:
    assert extended.facts["logits"] < 1e-5
    assert extended.facts["written_again"]
    assert json.loads(extended.result("import/result.json").read_text())["family"] == "arcee"


def without_each_layer(folder: Path) -> torch.Tensor:
    """Rise of the mean nats of the last token of `SENTENCES` when a layer of transformers' model is taken out."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    layers = model.model.layers

    def nats(left_out: int | None) -> float:
        model.model.layers = torch.nn.ModuleList(x for index, x in enumerate(layers) if index != left_out)
        model.config.num_hidden_layers = len(model.model.layers)
        total = 0.0
        for sentence in SENTENCES:
            tokens = torch.tensor([tokenizer.encode(sentence)])
            with torch.no_grad():
                logits = model(tokens[:, :-1], use_cache=False).logits[0, -1]
            total -= float(logits.double().log_softmax(-1)[tokens[0, -1]])
        return total / len(SENTENCES)

    return torch.tensor([nats(layer) - nats(None) for layer in range(len(layers))], dtype=torch.float64)


def test_the_depth_metric_ranks_layers_as_transformers_does(extended: Extended) -> None:
    sums = load_file(extended.result("score/scores.safetensors"))
    name = "depth.LastToken."
    found = (sums[name + "sum"] - sums[name + "base"]) / sums[name + "count"]
    expected = without_each_layer(extended.folder / "hf")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    layers = json.loads(extended.result("prune/plan.json").read_text())["layers"]
    assert set(range(len(expected))) - {layer["source"] for layer in layers} == {int(expected.argmin())}


def test_the_stage_has_a_verb_and_runs_in_its_place(extended: Extended) -> None:
    assert re.search(r"\bnorms\b.*root mean square", extended.python("nemo_minitron", "--help"))
    norms = json.loads(extended.result("norms/norms.json").read_text())
    theirs = load_file(extended.folder / "hf/model.safetensors")["model.embed_tokens.weight"].double()
    assert norms["embedding.word_embeddings.weight"] == pytest.approx(theirs.square().mean().sqrt().item(), rel=1e-9)
    before = extended.result("norms/norms.json").stat().st_mtime_ns
    extended.chain("norms")
    assert extended.result("norms/norms.json").stat().st_mtime_ns == before
