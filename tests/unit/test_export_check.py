"""The check of exports: states layer by layer, where two checkpoints begin to differ, and the model card."""

import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from nemo_minitron.checkpoints.formats import FORMATS
from nemo_minitron.checkpoints.hf import open_hf, write_hf
from nemo_minitron.checkpoints.nemo1 import open_nemo, write_folder
from nemo_minitron.checkpoints.open import open_checkpoint
from nemo_minitron.cli.main import app
from nemo_minitron.errors import CheckpointError
from nemo_minitron.evaluation import states
from nemo_minitron.evaluation.difference import first_state_difference, first_weight_difference, largest_difference
from nemo_minitron.evaluation.states import megatron_states, transformers_states
from nemo_minitron.megatron.runtime import Runtime
from nemo_minitron.pruning.apply import PrunedSource
from nemo_minitron.report.model_card import CARD, Making, model_card
from nemo_minitron.stages import export
from nemo_minitron.stages.run_folder import RunFolder
from tests import tiny
from tests.jobs import config_for
from tests.support.checkpoints import UNIFORM, RandomSource
from tests.support.expert_models import loaded
from tests.support.family_plans import plan_for
from tests.unit import report_sample

TOKENS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("export")
    tiny.write_family(root / "hf", "llama")
    return root / "hf"


@pytest.mark.parametrize("case", ["llama 3.2", "nemotron", "phi4 mini", "gemma", "gemma3"])
def test_states_are_those_of_transformers(case: str, tmp_path: Path, here: Runtime) -> None:
    """One layer in memory at a time, on both sides, gives what the complete model gives."""
    tiny.write_family(tmp_path / "hf", case)
    write_folder(open_hf(tmp_path / "hf"), tmp_path / "nemo")
    ours, theirs = (
        megatron_states(open_nemo(tmp_path / "nemo"), TOKENS, here),
        transformers_states(tmp_path / "hf", TOKENS),
    )
    assert list(ours) == ["embedding", "layer 0", "layer 1", "layer 2", "layer 3", "logits"] == list(theirs)
    assert first_state_difference(ours, theirs, tolerance=1e-4) == ""
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    with torch.no_grad():
        whole = model(TOKENS, output_hidden_states=True)
    assert torch.equal(theirs["logits"], whole.logits)
    assert torch.equal(theirs["layer 1"], whole.hidden_states[2])
    assert largest_difference(ours, theirs) < 1e-4


@pytest.mark.parametrize("pattern", [tiny.NEMOTRON_H_PATTERN, tiny.NEMOTRON_3_PATTERN])
def test_states_of_hybrids_are_those_of_transformers(pattern: str, tmp_path: Path, here: Runtime) -> None:
    tiny.write_nemotron_h(tmp_path / "hf", pattern=pattern)
    ours = megatron_states(open_hf(tmp_path / "hf"), TOKENS, here)
    theirs = transformers_states(tmp_path / "hf", TOKENS)
    assert list(ours) == ["embedding", *(f"layer {layer}" for layer in range(len(pattern))), "logits"] == list(theirs)
    assert first_state_difference(ours, theirs, tolerance=1e-4) == ""
    with torch.no_grad():
        whole = loaded(tmp_path / "hf")(TOKENS).logits
    torch.testing.assert_close(theirs["logits"], whole, rtol=1e-5, atol=1e-5)


def test_weights_come_and_go_with_the_call(hf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At no time does the transformers model hold more weights than the modules that are being called."""
    most = 0
    built: list[Any] = []
    original = states._read_when_called

    def watch(model: Any, read: Any) -> None:
        def counting(name: str) -> torch.Tensor:
            nonlocal most
            held = sum(p.numel() for p in model.parameters() if p.device.type != "meta")
            tensor: torch.Tensor = read(name)
            most = max(most, held + tensor.numel())
            return tensor

        built.append(model)
        original(model, counting)

    monkeypatch.setattr(states, "_read_when_called", watch)
    transformers_states(hf, TOKENS)
    assert most == 256 * 64  # the embedding, the largest of them
    assert all(parameter.device.type == "meta" for parameter in built[0].parameters())


def damaged(hf: Path, target: Path, name: str, **edits: Any) -> Path:
    """A copy of a folder with one value of one weight changed."""
    write_hf(open_hf(hf), target, **edits)
    state = load_file(target / "model.safetensors")
    state[name].view(-1)[7] += 0.5
    save_file(state, target / "model.safetensors", {"format": "pt"})
    return target


def test_the_first_difference_is_found_weight_by_weight(hf: Path, tmp_path: Path) -> None:
    source = open_hf(hf)
    assert first_weight_difference(source, open_hf(hf)) == ""
    other = damaged(hf, tmp_path / "one", "model.layers.2.mlp.down_proj.weight")
    told = first_weight_difference(source, open_hf(other))
    assert told.startswith("weight decoder.layers.2.mlp.linear_fc2.weight: 1 of 6144 values, by 5.00e-01")
    assert "(0, 7) first" in told
    pruned = PrunedSource(source, plan_for(source))
    assert "the architecture: hidden_size = 48, was 64" in first_weight_difference(source, pruned)


def test_the_first_difference_is_found_layer_by_layer(hf: Path, tmp_path: Path, here: Runtime) -> None:
    expected = megatron_states(open_hf(hf), TOKENS, here)
    other = damaged(hf, tmp_path / "one", "model.layers.2.mlp.down_proj.weight")
    told = first_state_difference(expected, megatron_states(open_hf(other), TOKENS, here), tolerance=1e-4)
    assert told.startswith("layer 2: differs by")
    assert first_state_difference(expected, {"embedding": expected["embedding"]}, tolerance=1).endswith("is missing")
    nan = expected | {"layer 1": expected["layer 1"] * torch.nan}
    assert first_state_difference(expected, nan, tolerance=1e9).startswith("layer 1: differs by nan")


class Export:
    """The stage on its own, for a student that is a folder."""

    def __init__(self, hf: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_folder(open_hf(hf), folder / "student")
        config = config_for(hf, hf, export={"formats": ["hf"]})
        run, student = RunFolder(folder / "run"), folder / "student"
        self.context: Any = SimpleNamespace(config=config, run=run, out=folder, rank=0, input=lambda role: student)
        monkeypatch.setattr(export, "_check_tokens", lambda context: TOKENS[:1])

    def error(self) -> str:
        with pytest.raises(CheckpointError, match=r"logits of .* differ by .* from the finished model's") as caught:
            export.run(self.context)
        return str(caught.value)


def test_an_export_that_gives_the_model_back_passes(
    hf: Path, tmp_path: Path, here: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = export.run(Export(hf, tmp_path, monkeypatch).context)
    assert result["largest_logit_difference"]["hf"] < 1e-4
    assert "seed: 1234" in (tmp_path / "tiny_hf" / CARD).read_text()


def writing(monkeypatch: pytest.MonkeyPatch, write: Callable[..., None]) -> None:
    """Hugging Face folders are written by another function."""
    monkeypatch.setitem(FORMATS, "hf", replace(FORMATS["hf"], write=write))


def test_an_export_that_loses_a_value_says_which(
    hf: Path, tmp_path: Path, here: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"
    writing(monkeypatch, lambda source, folder, **_: damaged(hf, folder, name))
    words = "weight decoder.layers.1.self_attention.linear_qkv.weight: 1 of"
    assert f"first difference: {words}" in Export(hf, tmp_path, monkeypatch).error()


def test_an_export_with_another_setting_says_which(
    hf: Path, tmp_path: Path, here: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(source: Any, folder: Path, **_: Any) -> None:
        write_hf(source, folder)
        text = (folder / "config.json").read_text()
        (folder / "config.json").write_text(text.replace("10000.0", "300.0"))

    writing(monkeypatch, write)
    words = "the architecture: rotary_base = 300.0, was 10000.0"
    assert f"first difference: {words}" in Export(hf, tmp_path, monkeypatch).error()


def test_a_class_that_computes_something_else_is_found_by_layer(
    hf: Path, tmp_path: Path, here: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(folder: Path, tokens: torch.Tensor) -> Any:
        found = transformers_states(folder, tokens)
        return found | {name: found[name] + 1 for name in ("layer 2", "layer 3", "logits")}

    monkeypatch.setattr(export, "transformers_states", other)
    told = Export(hf, tmp_path, monkeypatch).error()
    assert (
        "all weights are the same; of what the layers compute, the first to differ is layer 2: differs by 1.00" in told
    )


@pytest.mark.parametrize("units", [0.9, 1.1])
def test_what_rounding_may_do_grows_with_the_logits(
    units: float, hf: Path, tmp_path: Path, here: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    def larger(*where: Any) -> Any:
        found = megatron_states(*where)
        return found | {"logits": 1e4 * found["logits"]}

    def off(folder: Path, tokens: torch.Tensor) -> Any:
        logits = larger(open_hf(hf), tokens, here)["logits"]
        return {"logits": logits + units * 1e-4 * logits.double().pow(2).mean().sqrt().float()}

    monkeypatch.setattr(export, "megatron_states", larger)
    monkeypatch.setattr(export, "transformers_states", off)
    one = Export(hf, tmp_path, monkeypatch)
    if units < 1:
        assert export.run(one.context)["largest_logit_difference"]["hf"] > 1e-2
    else:
        assert "at most export.check_tolerance = 1e-04 of them" in one.error()


# -- the card --------------------------------------------------------------------------------------------------------


def front_matter(card: str) -> dict[str, Any]:
    _, front, _ = card.split("---\n", 2)
    return yaml.safe_load(front)


def test_the_card_says_what_is_known(hf: Path) -> None:
    source = open_hf(hf)
    pruned = PrunedSource(source, plan_for(source))
    pruned._lineage.update(base_model="org/base", license="apache-2.0", quantisation=["F32", "Q4_1", "Q8_0"])
    making = Making(
        recipe="seed: 7\n",
        objective="forward KL over the full vocabulary",
        tokens=204_800,
        sources=("texts/a.jsonl", "org/corpus"),
        evaluation={
            "perplexity": {"teacher": 23.31, "pruned": 90.12, "distilled": 36.45},
            "standard_error": {"distilled": 0.61, "teacher": None},  # None: too little text to tell
            "tokens": 20480,
        },
        checks={"hf": 3e-6},
        content=report_sample.content(),
    )
    card = model_card(pruned, name="small", library="transformers", making=making)
    assert front_matter(card) == {
        "base_model": "org/base",
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["nemo_minitron", "llama", "pruning", "distillation"],
        "datasets": ["org/corpus"],
    }
    for words in ("# small", "| distilled | 36.45 ± 0.61 |", "| base model | 23.31 |", "204,800", "20,480 tokens"):
        assert words in card
    # The report's own tables, from the sample of the report's tests: headline, sizes, curve, stages, texts, machine.
    for words in (
        "| parameters | 134,515,008 | 97,351,488 | 72.4% |",
        "| 204,800 | 0.3579 |",
        "| distill | 6 min 50 s",
    ):
        assert words in card
    for words in ("| parameters, 72% of the teacher's | 134.5M → 97.4M |", "`The history of the city", "- seed: 1234"):
        assert words in card
    for words in (
        "quantised as Q4_1, Q8_0.",
        "hidden size",
        "layers dropped: 1",
        "seed: 7",
        "apache-2.0",
        "forward KL",
        "3.0e-06",
    ):
        assert words in card


def test_the_card_leaves_out_what_is_not_known() -> None:
    source = RandomSource(UNIFORM)
    source.lineage = {}
    card = model_card(source, name="x", library="nemo")
    assert set(front_matter(card)) == {"library_name", "pipeline_tag", "tags"}
    for placeholder in ("None", "null", "unknown", "[More Information Needed]", "{", "nan"):
        assert placeholder not in card
    assert [line for line in card.splitlines() if line.startswith("## ")] == ["## Use"]


def test_a_stranger_s_words_stay_words() -> None:
    source = RandomSource(UNIFORM)
    source.lineage = {"base_model": "a/b\nlicense: mit", "license": "x: [y]\n---\n# <script>"}
    card = model_card(source, name="na\nme", library="nemo")
    front = front_matter(card)
    assert front["license"] == "other"
    assert "base_model" not in front
    assert "<script>" not in card
    assert "\nlicense: mit" not in card


def test_cards_lie_beside_the_weights(hf: Path, tmp_path: Path) -> None:
    for name in ("out", "x.nemo"):
        done = CliRunner().invoke(app, ["convert", str(hf), str(tmp_path / name)])
        assert done.exit_code == 0, done.stderr
    assert "library_name: transformers" in (tmp_path / "out" / CARD).read_text()
    with tarfile.open(tmp_path / "x.nemo") as archive:
        member = archive.extractfile(f"./{CARD}")
        assert member is not None
        assert b"library_name: nemo" in member.read()
    assert open_checkpoint(tmp_path / "x.nemo").spec == open_hf(hf).spec
