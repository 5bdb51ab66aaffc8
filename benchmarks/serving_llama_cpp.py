"""Exported folders under llama.cpp: converted by its converter, read back by our reader, run beside `transformers`.

    python -m benchmarks.serving_llama_cpp --source LLAMA_CPP --work DIR FOLDER [FOLDER ...]
    python -m benchmarks.serving_llama_cpp --source LLAMA_CPP --work DIR --families

LLAMA_CPP is a source folder of llama.cpp (the archive of llama-cpp-python has one in `vendor/`); the package llama_cpp
must be importable. Of a FOLDER the commands of its model card are run. `--families` makes a toy of every family, heads
wider than `hidden_size / num_attention_heads` as in a model that lost width, exports it, and finds out whether
llama.cpp computes the same; what `report.serving` says against it must then be why it does not. Toys have a toy's
tokenizer, whose kind the converter is told; only weights and settings are compared there.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_minitron.checkpoints.hf import open_hf, write_hf
from nemo_minitron.checkpoints.open import open_checkpoint
from nemo_minitron.report.serving import LLAMA_CPP, UNTRIED, objections
from tests import tiny
from tests.support import expert_models

PROMPT = "The history of the city begins"
SAME = 1e-2
"""Largest difference of logits, of their root mean square, that rounding explains; GELU is a table in fp16 there."""
SQUARE = {"head_dim": 8}
"""Hidden 64 and 8 heads: heads as wide as `hidden_size / num_attention_heads`."""
_TRIMMED = {"vocab_size": 170}
"""As many words as the toys' tokenizer has: the converter of Gemma 3 drops the embeddings of others."""
_FREE_STEPS = {"time_step_min": 1e-30}
"""transformers raises Mamba's steps to `time_step_min`, llama.cpp takes them as they are: here both do."""
TOYS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in tiny.FAMILY_CONFIGS},
    **{f"{name}, square": (name, SQUARE) for name in ("qwen2", "nemotron", "phi3")},
    **{name: (name, {}) for name in expert_models.CONFIGS if name not in UNTRIED},
    "qwen3_moe, weights not normalised": ("qwen3_moe", {"norm_topk_prob": False}),
    "qwen2_moe, square": ("qwen2_moe", {"head_dim": 12}),
    "qwen2_moe, square, weights normalised": ("qwen2_moe", {"head_dim": 12, "norm_topk_prob": True}),
    "dots1, no groups": ("dots1", {"num_key_value_heads": 4}),
    "gemma3": ("gemma3", _TRIMMED),
    "gemma3, every sixth": (
        "gemma3",
        {"layer_types": ["sliding_attention"] * 4, "query_pre_attn_scalar": 16, **_TRIMMED},
    ),
    "nemotron_h": ("nemotron_h", {"mamba_head_dim": 16, **_FREE_STEPS}),
    "nemotron_h, 64 Mamba channels": ("nemotron_h", _FREE_STEPS),
    "nemotron_h, 72 Mamba channels": ("nemotron_h", {"mamba_head_dim": 9}),
}

_RUN = """
import json, sys
import numpy as np
from llama_cpp import Llama
gguf, out, ids = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
fp32 = 0
model = Llama(gguf, n_ctx=512, logits_all=True, verbose=True, n_threads=1, type_k=fp32, type_v=fp32)
if not ids:
    ids = model.tokenize(sys.argv[4].encode(), add_bos=False)
    text = model(sys.argv[4], max_tokens=24, temperature=0.0)["choices"][0]["text"]
    print(json.dumps({"ids": ids, "text": text}))
    model.reset()
model.eval(ids)
np.save(out, model.scores[: len(ids)])
"""
_CONVERT_TOYS = """
import sys
sys.path.insert(0, sys.argv[1])
import convert_hf_to_gguf as converter
base = converter.ModelBase
kinds = converter.get_model_class
def with_toy_vocabulary(name, mmproj=False):
    kind = kinds(name, mmproj=mmproj)
    kind.get_vocab_base_pre = lambda *_: "gpt-2"
    kind.set_vocab = kind._set_vocab_gpt2
    return kind
converter.get_model_class = with_toy_vocabulary
for folder in sys.argv[2:]:
    sys.argv = ["convert", folder, "--outfile", folder + ".gguf", "--outtype", "f32"]
    try:
        converter.main()
    except Exception as error:
        with open(folder + ".error", "w") as file:
            file.write(f"the converter: {type(error).__name__}: {error}")
"""

_REASONS = ("error loading model", "fatal error", "ASSERT")
"""What a line has with which llama.cpp says why it ends."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="*", metavar="FOLDER")
    parser.add_argument("--source", type=Path, required=True, help="source folder of llama.cpp")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--packages", type=Path, help="folder with the transformers that the converter asks for")
    parser.add_argument("--families", nargs="*", metavar="NAME", help="toys of every family, or of some")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    for folder in args.folders:
        print(json.dumps(export(folder, args), indent=1), flush=True)
    if args.families is not None:
        print("| toy | obstacle, by the model card | what happens |\n| --- | --- | --- |")
        wrong = []
        for name, stated, happened, agrees in families(args):
            print(f"| {name} | {'; '.join(stated) or 'nothing'} | {happened} |", flush=True)
            wrong += [] if agrees else [name]
        if wrong:
            raise SystemExit(f"the card is wrong about {', '.join(wrong)}")


def export(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The commands of a model card on one export, with what our reader and `transformers` say."""
    found: dict[str, Any] = {"folder": folder.name}
    for kind in ("f32", "bf16"):
        gguf = args.work / f"{folder.name}-{kind}.gguf"
        convert = [sys.executable, args.source.resolve() / "convert_hf_to_gguf.py", ".", "--outfile", gguf.resolve()]
        subprocess.run([*map(str, convert), "--outtype", kind], cwd=folder, check=True, env=environment(args))
        ran = run(gguf, PROMPT)
        found |= {"prompt": ran["ids"], f"text, {kind}": ran["text"]}
        found[f"logits, {kind}"] = compare(ran["logits"], reference(folder, ran["ids"]))
    found["same token ids"] = ran["ids"] == AutoTokenizer.from_pretrained(folder)(PROMPT)["input_ids"]
    found["weights read back"] = read_back(folder, args.work / f"{folder.name}-f32.gguf")
    return found


def environment(args: argparse.Namespace) -> dict[str, str]:
    """Of the converter."""
    paths = [str(args.packages.resolve())] if args.packages else []
    return {**os.environ, "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])}


def read_back(folder: Path, gguf: Path) -> str:
    """Whether our reader finds every weight of a folder in its GGUF file, bit for bit."""
    ours, theirs = open_checkpoint(gguf), open_hf(folder)
    assert ours.names() == theirs.names(), (gguf, folder)
    same = sum(torch.equal(ours.get(name), theirs.get(name).float()) for name in ours.names())
    return f"{same} of {len(ours.names())} identical; specs {'identical' if ours.spec == theirs.spec else 'differ'}"


def run(gguf: Path, prompt: str = "", ids: list[int] | None = None) -> dict[str, Any]:
    """Logits `[tokens, vocabulary]` of llama.cpp, in a process of its own: what it does not like ends the process."""
    out = gguf.with_suffix(".npy")
    words = [sys.executable, "-c", _RUN, gguf, out, json.dumps(ids or []), prompt]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if any(word in line for word in _REASONS)]
        return {"error": (lines or [f"exit code {done.returncode}"])[0].rpartition("error loading model: ")[2].strip()}
    said = json.loads(done.stdout) if prompt else {}
    return {**said, "logits": torch.from_numpy(np.load(out))}


@torch.no_grad()
def reference(folder: Path, ids: list[int]) -> torch.Tensor:
    """Logits of `transformers` in fp32, `[tokens, vocabulary]`."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    logits: torch.Tensor = model(torch.tensor([ids])).logits[0].float()
    return logits


def compare(found: torch.Tensor, expected: torch.Tensor) -> dict[str, float]:
    """How far logits are from each other, and how often the same token is the likeliest."""
    logp, logq = (logits.double().log_softmax(-1) for logits in (expected, found))
    return {
        "largest difference": (found - expected).abs().max().item(),
        "root mean square": expected.square().mean().sqrt().item(),
        "KL in nats per token": (logp.exp() * (logp - logq)).sum(-1).mean().item(),
        "same likeliest token": (found.argmax(-1) == expected.argmax(-1)).float().mean().item(),
    }


def families(args: argparse.Namespace) -> Iterator[tuple[str, list[str], str, bool]]:
    """Name, what the card says, what happens, and whether the two agree, of each toy."""
    folders = {
        name: args.work / f"toy-{number:02}" for number, name in enumerate(TOYS) if name in (args.families or TOYS)
    }
    for name, folder in folders.items():
        make(name, folder)
    words = [sys.executable, "-c", _CONVERT_TOYS, args.source, *folders.values()]
    subprocess.run(list(map(str, words)), check=True, capture_output=True, env=environment(args))
    ids = torch.randint(1, 170, (24,), generator=torch.Generator().manual_seed(0)).tolist()
    for name, folder in folders.items():
        stated = [words for words in objections(LLAMA_CPP, open_hf(folder)) if "tokenizer.model" not in words]
        failed = Path(f"{folder}.error")
        ran = {"error": failed.read_text()} if failed.exists() else run(Path(f"{folder}.gguf"), ids=ids)
        if "error" in ran:
            yield name, stated, ran["error"][:160], bool(stated)
            continue
        apart = compare(ran["logits"], reference(folder, ids))
        share = apart["largest difference"] / apart["root mean square"]
        same = share < SAME
        yield name, stated, f"runs; logits differ by {share:.1e} of their size", same != bool(stated)


def make(name: str, folder: Path) -> None:
    """A toy as our export writes it."""
    kind, changes = TOYS[name]
    made = folder.with_name(f"{folder.name}-made")
    if kind == "nemotron_h":
        tiny.write_nemotron_h(made, **changes)
    elif kind in expert_models.CONFIGS:
        expert_models.write_experts(made, kind, **changes)
    else:
        tiny.write_family(made, kind, **changes)
    write_hf(open_hf(made), folder)
    # transformers 5 names a class that the converter's does not have.
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}))


if __name__ == "__main__":
    main()
