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

from tests.support.expert_models import write_experts
from tests.tiny import write_corpus

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
DIFFS = dict(re.findall(r"^## (?:An? )(.+?)\n.*?^```diff\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
SENTENCES = ("the river of the city was a treaty in the forest", "the poet of the village was a king")

pytestmark = pytest.mark.slow


class Extended:
    """A copy of the package with every diff applied; the axis, which the package has, was taken out before."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.copy = folder / "copy"
        for name in ("nemo_minitron", "tests", "recipes"):
            shutil.copytree(ROOT / name, self.copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "ruff.toml", self.copy)
        write_experts(folder / "experts", "qwen2_moe")
        write_corpus(folder / "corpus")
        self.run("git", "apply", "--reverse", "-", stdin=DIFFS["axis"])
        self.refusal = self.run(*self.pruning("refused", "target.shared_ffn_hidden_size=16"), status=2)
        self.run(*self.pruning("without"))
        for diff in DIFFS.values():
            self.run("git", "apply", "-", stdin=diff)
        self.run(*self.pruning("with", "target.shared_ffn_hidden_size=16"))
        self.facts = json.loads(self.python("tests.support.extended", str(folder)).splitlines()[-1])

    def run(self, *command: str, stdin: str = "", status: int = 0) -> str:
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
        assert done.returncode == status, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout if status == 0 else done.stderr

    def pruning(self, name: str, *settings: str) -> list[str]:
        """The command that scores and prunes a small mixture of experts."""
        sources = [f"model.source={self.folder / 'experts'}", f"data.sources=[{self.folder / 'corpus'}]"]
        where = ["--run-dir", str(self.folder / name), "--to", "prune"]
        recipe = "recipes/tiny/experts_cpu.yaml"
        return [sys.executable, "-m", "nemo_minitron", "run", recipe, *sources, *settings, *where]

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
    assert list(DIFFS) == ["divergence", "family", "depth metric", "axis", "stage"]
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


def numbers(ranges: str) -> list[int]:
    """`0-2,5` as 0, 1, 2, 5."""
    ends = [[int(end) for end in part.split("-")] for part in ranges.split(",")]
    return [number for first, *last in ends for number in range(first, (last or [first])[0] + 1)]


def test_the_axis_is_cut_where_it_is_in_the_table(extended: Extended) -> None:
    assert "shared_ffn_hidden_size" in extended.refusal
    before, after = (extended.folder / name / "stages" for name in ("without", "with"))
    sums = [load_file(stages / "score/scores.safetensors") for stages in (before, after)]
    assert not any(".shared_ffn." in name for name in sums[0])
    assert set(sums[0]) < set(sums[1])
    plans = [json.loads((stages / "prune/plan.json").read_text())["layers"] for stages in (before, after)]
    assert [len(plan) for plan in plans] == [3, 3]
    for layer, (old, new) in enumerate(zip(*plans, strict=True)):
        assert "shared_ffn" not in old
        norms = sums[1][f"layers.{layer}.shared_ffn.mean.sumsq"]
        assert len(norms) == 32
        assert numbers(new.pop("shared_ffn")) == sorted(norms.topk(16).indices.tolist())
        assert old == new


def test_the_stage_has_a_verb_and_runs_in_its_place(extended: Extended) -> None:
    assert re.search(r"\bnorms\b.*root mean square", extended.python("nemo_minitron", "--help"))
    norms = json.loads(extended.result("norms/norms.json").read_text())
    theirs = load_file(extended.folder / "hf/model.safetensors")["model.embed_tokens.weight"].double()
    assert norms["embedding.word_embeddings.weight"] == pytest.approx(theirs.square().mean().sqrt().item(), rel=1e-9)
    before = extended.result("norms/norms.json").stat().st_mtime_ns
    extended.chain("norms")
    assert extended.result("norms/norms.json").stat().st_mtime_ns == before
