"""`doctor`: what is installed, what is missing, and what that costs. Imports each library in a process of its own."""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nemo_minitron.cores import allowed_cores
from nemo_minitron.processor import processor_name
from nemo_minitron.version import __version__

OK, EXTRA, WARN, BAD = "ok", "extra", "costs", "needed"
_STYLES = {OK: "green", EXTRA: "dim", WARN: "yellow", BAD: "bold red"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor's report."""

    subject: str
    state: str
    found: str
    cost: str = ""
    """What its absence costs, and what to do about it."""


def _checked(subject: str, fine: bool, found: str, cost: str, otherwise: str = WARN) -> Finding:
    """A finding whose cost is told only where it is not fine."""
    return Finding(subject, OK, found) if fine else Finding(subject, otherwise, found, cost)


@dataclass(frozen=True, slots=True)
class Part:
    """A library that stages use."""

    distribution: str
    module: str
    needed: bool
    cost: str
    extra: bool = False
    """Wanted by some only: its absence is told, and is no reason to fail."""


PARTS: tuple[Part, ...] = (
    Part("torch", "torch", True, "no stage can run: make install, or an NGC NeMo container"),
    Part("megatron-core", "megatron.core", True, "no model can be built: pip install -e '.[train]'"),
    Part("nemo-toolkit", "nemo.core", True, "no model class can be loaded: pip install -e '.[train]'"),
    Part("lightning", "lightning.pytorch", True, "no training: pip install -e '.[train]'"),
    Part(
        "transformers",
        "transformers",
        True,
        "no tokenizer, no Hugging Face checkpoints: pip install -e '.[train]'",
    ),
    Part("psutil", "psutil", True, "Megatron's checkpoint writer hangs without it: pip install psutil"),
    Part("gguf", "gguf", False, "no GGUF import: pip install gguf"),
    Part("pyarrow", "pyarrow", False, "no parquet texts: pip install pyarrow"),
    Part("tensorboard", "tensorboard", False, "metrics.jsonl only: pip install tensorboard"),
    Part("lm_eval", "lm_eval", False, "no downstream tasks: pip install -e '.[eval]'", extra=True),
    Part("nemo-run", "nemo_run", False, "no NeMo-Run experiments: pip install -e '.[nemo-run]'", extra=True),
    Part("wandb", "wandb", False, "no exp_manager.create_wandb_logger: pip install -e '.[wandb]'", extra=True),
)
GPU_PARTS: tuple[Part, ...] = (
    Part(
        "transformer-engine",
        "transformer_engine",
        False,
        "on a GPU: slower layers, no context or sequence parallelism, no fp8",
    ),
    Part("apex", "apex", False, "on a GPU without Transformer Engine: slower optimizer and norms", extra=True),
    Part("mamba-ssm", "mamba_ssm", False, "on a GPU: hybrids of Mamba scan in plain torch", extra=True),
    Part("causal-conv1d", "causal_conv1d", False, "on a GPU: hybrids of Mamba scan in plain torch", extra=True),
)

_SELF_TEST_SECONDS = 180
_SELF_TEST_COST = "runs on this GPU would fail or be wrong: look at the driver, torch's build, and nvidia-smi"

_PROBE = """
import json, torch
from nemo_minitron.ops.product_speed import product_speedup
print(json.dumps({
    "build": "CUDA " + torch.version.cuda if torch.version.cuda else "CPU",
    "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    "bf16_over_fp32": product_speedup(torch.device("cpu"), torch.bfloat16, torch.float32),
    "bf16_gpu": torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
    "nccl": torch.distributed.is_nccl_available(), "gloo": torch.distributed.is_gloo_available(),
}))
"""


def examine() -> list[Finding]:
    """Look at everything; takes as long as the libraries take to import."""
    findings = [Finding("python", OK, sys.version.split()[0]), Finding("nemo_minitron", OK, __version__)]
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:  # each waits for another process
        findings += pool.map(_part, PARTS)
    torch = _probe_torch()
    findings += _devices(torch)
    findings += [_gpu_part(part, torch) for part in GPU_PARTS]
    if torch.get("gpus"):
        findings += self_test("cuda")
    return findings + _machine()


def self_test(device: str) -> list[Finding]:
    """What the device does when it is asked to, in a process of its own: a broken driver may take that along."""
    command = [sys.executable, "-W", "ignore", "-m", "nemo_minitron.stages.self_test", device]
    try:
        tried = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_SELF_TEST_SECONDS)
    except subprocess.TimeoutExpired as late:
        told = late.stdout.decode(errors="replace") if isinstance(late.stdout, bytes) else late.stdout or ""
        ended = f"no end in {_SELF_TEST_SECONDS} s"
    else:
        told = tried.stdout
        last = (tried.stderr.strip().splitlines() or [""])[-1]
        ended = "" if tried.returncode == 0 else f"ended with status {tried.returncode}: {last}"
    rows = [json.loads(line) for line in told.splitlines() if line.startswith("{")]
    findings = [_checked(f"GPU: {row['name']}", row["ok"], row["found"], _SELF_TEST_COST, BAD) for row in rows]
    return [*findings, Finding("GPU: self test", BAD, ended, _SELF_TEST_COST)] if ended else findings


def show(findings: list[Finding], console: Console) -> None:
    """Print the findings as a table."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("", "state", "found", "what that costs"):
        table.add_column(heading, overflow="fold")
    for finding in findings:
        state = Text(finding.state, style=_STYLES[finding.state])
        table.add_row(finding.subject, state, Text(finding.found), Text(finding.cost))
    console.print(table)
    worst = [finding.subject for finding in findings if finding.state == BAD]
    console.print(
        f"[bold red]needed and missing: {', '.join(worst)}[/]" if worst else "everything that is needed is here"
    )


def healthy(findings: list[Finding], *, strict: bool) -> bool:
    """Whether stages can run; `strict` lets a container image fail that lacks what it is built for."""
    bad = {BAD, WARN} if strict else {BAD}
    subjects = {part.distribution for part in (*PARTS, *GPU_PARTS)}
    return not any(
        finding.state in bad and (finding.state == BAD or finding.subject in subjects) for finding in findings
    )


def _gpu_part(part: Part, torch: dict[str, object]) -> Finding:
    """A part for GPUs. Without one it is not tried; where torch is built for them, as in an image, it must be there."""
    if torch.get("gpus"):
        return _part(part)
    version = _version(part.distribution)
    if version:
        return Finding(part.distribution, OK, version, "not tried: there is no GPU")
    if str(torch.get("build", "")).startswith("CUDA"):
        return Finding(part.distribution, EXTRA if part.extra else WARN, "absent", part.cost)
    return Finding(part.distribution, OK, "absent", "nothing here: torch is a CPU build")


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def _part(part: Part) -> Finding:
    version = _version(part.distribution)
    error = _import_error(part.module)
    if error is None:
        return Finding(part.distribution, OK, version or "imports")
    found = f"{version} is installed but fails: {error}" if version else "absent"
    state = BAD if part.needed else EXTRA if part.extra and not version else WARN
    return Finding(part.distribution, state, found, part.cost)


def _import_error(module: str) -> str | None:
    tried = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", f"import {module}"], capture_output=True, text=True, check=False
    )
    if tried.returncode == 0:
        return None
    lines = tried.stderr.strip().splitlines()
    return lines[-1] if lines else f"ended with status {tried.returncode}"


def _probe_torch() -> dict[str, object]:
    tried = subprocess.run([sys.executable, "-W", "ignore", "-c", _PROBE], capture_output=True, text=True, check=False)
    found: dict[str, object] = json.loads(tried.stdout) if tried.returncode == 0 else {}
    return found


def _devices(torch: dict[str, object]) -> list[Finding]:
    if not torch:
        return []
    gpus = torch["gpus"]
    if isinstance(gpus, list) and gpus:
        names = ", ".join(map(str, gpus))
        return [_checked("GPU", bool(torch["bf16_gpu"]), names, "no bf16; precision=auto takes fp32")]
    ratio, gloo = float(str(torch["bf16_over_fp32"])), bool(torch["gloo"])
    speed = f"{ratio:.2g} x the speed of fp32 (measured)"
    slow = "bf16 is emulated and slow here; precision=auto takes fp32"
    cost = "CPU speed: fine for models up to a few hundred million parameters"
    return [
        Finding("GPU", WARN, f"none ({torch['build']} build of torch)", cost),
        _checked("bf16 on CPU", ratio >= 1, speed, slow),
        _checked("gloo", gloo, "available" if gloo else "absent", "no parallel run on CPU", BAD),
    ]


def _machine() -> list[Finding]:
    memory = psutil.virtual_memory()
    free = shutil.disk_usage(Path.cwd()).free / 1e9
    pip = _import_error("pip") is None
    gigabytes = f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB free"
    no_pip = "package: models and texts cannot be fetched: python -m ensurepip"
    return [
        Finding("processor", OK, f"{processor_name()}, {allowed_cores()} cores"),
        _checked("memory", memory.available > 6e9, gigabytes, "the demo takes up to 6 GB"),
        _checked("disk here", free > 5, f"{free:.1f} GB free", "the demo writes about 3 GB"),
        _checked("pip", pip, "imports" if pip else "absent", no_pip),
    ]
