"""Every key of a valid checkpoint deleted, renamed, made null, doubled or contradicted: never another model in silence.

Each mutation ends in identical logits, in what the format's own reader computes, or in an error that names the key. For
Hugging Face folders that reader is transformers itself, which loads the mutated folder. For GGUF files and Megatron's
arguments it is their documented defaults, written down here.
"""

import json
import random
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from nemo_minitron.arch.families.keys import OTHER_NAMES, SPECIAL_IDS
from nemo_minitron.checkpoints.hf import open_hf, write_hf
from nemo_minitron.errors import MinitronError
from tests import tiny

TOKENS = torch.randint(0, 256, (1, 24), generator=torch.Generator().manual_seed(0))
RENAMED = {
    "rope_parameters": "rope_scaling",
    "rope_type": "type",
    "dtype": "torch_dtype",
    **{key: names[0] for key, names in OTHER_NAMES.items()},
}
SAME = 1e-4
SAMPLED = 150


@dataclass(frozen=True)
class Mutation:
    """One change of one key."""

    family: str
    kind: str
    path: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.family}: {self.kind} {'.'.join(self.path)}"


def other(value: Any) -> Any:
    """Another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value * 2 or 1
    if isinstance(value, str):
        return value + "x"
    return value[:-1] if isinstance(value, list) else 3 if value is None else {}


def paths(data: Mapping[str, Any], before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every key, also inside other keys."""
    for key, value in data.items():
        yield (*before, key)
        if isinstance(value, Mapping):
            yield from paths(value, (*before, key))


def mutated(data: dict[str, Any], mutation: Mutation) -> str:
    """The JSON text of a configuration with one change."""
    data = json.loads(json.dumps(data))
    inner = data
    for key in mutation.path[:-1]:
        inner = inner[key]
    key = mutation.path[-1]
    match mutation.kind:
        case "delete":
            del inner[key]
        case "rename":
            inner[RENAMED[key]] = inner.pop(key)
        case "null":
            inner[key] = None
        case "contradict":
            inner[key] = other(inner[key])
        case "both":  # the same thing under another name, with another value
            inner[RENAMED[key]] = other(inner[key])
        case "double":
            inner["\0first"] = other(inner[key])
    text = json.dumps(data)
    return text.replace(json.dumps("\0first"), json.dumps(key))


def mutations(family: str, data: dict[str, Any]) -> list[Mutation]:
    """All of them."""
    skipped = {"transformers_version", "architectures"}
    found = []
    for path in paths(data):
        if path[-1] in skipped:
            continue
        kinds = ["delete", "null", "contradict", "double"]
        if path[-1] in RENAMED and RENAMED[path[-1]] not in data:
            kinds += ["rename", "both"]
        found += [Mutation(family, kind, path) for kind in kinds]
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("mutations")
    for name in tiny.FAMILY_CONFIGS:
        extra = {"layer_types": ["sliding_attention", "full_attention"]} if name == "gemma3" else {}
        tiny.write_family(root / name, name, num_hidden_layers=2, **extra)
        for file in (root / name).glob("*token*"):  # they decide nothing here
            file.unlink()
    return {name: root / name for name in tiny.FAMILY_CONFIGS}


def loaded(folder: Path) -> tuple[torch.Tensor, list[Any]] | None:
    """Logits and special ids of a folder in transformers; None where it refuses, or makes weights up."""
    try:
        model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        if info["missing_keys"] or info["mismatched_keys"] or info["unexpected_keys"]:
            return None
        with torch.no_grad():
            return model.eval()(TOKENS).logits, [getattr(model.config, key) for key in SPECIAL_IDS]
    except Exception:  # whatever it raises on a configuration that makes no sense
        return None


def outcome(mutation: Mutation, folder: Path, scratch: Path, original: torch.Tensor) -> str:
    """What a mutation leads to; a word that begins with SILENT is a defect."""
    data = json.loads((folder / "config.json").read_text())
    changed = scratch / "changed"
    shutil.rmtree(changed, ignore_errors=True)
    changed.mkdir()
    for file in folder.iterdir():
        if file.name != "config.json":
            (changed / file.name).symlink_to(file)
    (changed / "config.json").write_text(mutated(data, mutation))
    key = mutation.path[-1]
    try:
        write_hf(open_hf(changed), scratch / "out")
    except MinitronError as error:
        names = {key, RENAMED.get(key, key), *mutation.path}
        return "refused by name" if any(name in str(error) for name in names) else f"SILENT about the key: {error}"
    ours, theirs = loaded(scratch / "out"), loaded(changed)
    if ours is None:
        if theirs is None:
            return "refused by transformers, as given and as written"
        return "SILENT: transformers refuses what was written"
    expected = original if theirs is None else theirs[0]
    if (difference := (ours[0] - expected).abs().max()) > SAME:
        return f"SILENT: logits differ by {difference:.1e}"
    if theirs is not None and ours[1] != theirs[1]:
        return f"SILENT: ids {ours[1]} of {theirs[1]}"
    return "identical logits" if (ours[0] - original).abs().max() <= SAME else "what transformers computes"


def run_all(chosen: list[Mutation], folders: dict[str, Path], scratch: Path) -> Counter[str]:
    """Outcomes with their counts; prints them, and fails on a silent difference."""
    originals = {name: loaded(folder) for name, folder in folders.items()}
    counts: Counter[str] = Counter()
    silent = []
    for mutation in chosen:
        original = originals[mutation.family]
        assert original is not None
        found = outcome(mutation, folders[mutation.family], scratch, original[0])
        counts[found.partition(":")[0]] += 1
        if found.startswith("SILENT"):
            silent.append(f"{mutation}: {found}")
    print(f"config.json: {len(chosen)} mutations: {dict(counts)}, {len(silent)} silent differences")
    assert not silent, "\n".join(silent)
    return counts


def all_mutations(folders: dict[str, Path]) -> list[Mutation]:
    return [
        mutation
        for name, folder in folders.items()
        for mutation in mutations(name, json.loads((folder / "config.json").read_text()))
    ]


def test_sampled_keys_of_config_json(folders: dict[str, Path], tmp_path: Path) -> None:
    chosen = random.Random(0).sample(all_mutations(folders), SAMPLED)
    counts = run_all(chosen, folders, tmp_path)
    assert set(counts) == {"refused by name", "identical logits", "what transformers computes"}


@pytest.mark.slow
def test_every_key_of_config_json(folders: dict[str, Path], tmp_path: Path) -> None:
    chosen = all_mutations(folders)
    assert len(chosen) > 1000
    run_all(chosen, folders, tmp_path)
