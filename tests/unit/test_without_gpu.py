"""A container that has Transformer Engine and Apex, on a machine without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

USELESS = """
class NoDriver:
    def __init__(self, *args, **kwargs):
        raise RuntimeError("Found no NVIDIA driver on your system")
FusedAdam = FusedSGD = NoDriver
def multi_tensor_applier(*args, **kwargs): raise RuntimeError("Found no NVIDIA driver on your system")
multi_tensor_l2norm = multi_tensor_scale = multi_tensor_applier
"""
"""What both libraries are there: they can be imported, and nothing of them can be used."""

PROGRAM = """
import nemo_minitron.megatron
import torch
from megatron.core import optimizer
from megatron.core.optimizer import clip_grads
from megatron.core.transformer import transformer_block

parameter = torch.nn.Parameter(torch.ones(3))
optimizer.Adam([parameter], lr=0.1)
print(optimizer.Adam.__module__.partition(".")[0], transformer_block.get_cpu_offload_context)
print(clip_grads.l2_norm_impl.__module__)
"""


@pytest.fixture
def libraries(tmp_path: Path) -> Path:
    for package in ("transformer_engine/pytorch", "apex"):
        folder = tmp_path / package
        folder.mkdir(parents=True)
        (folder.parent / "__init__.py").touch() if "/" in package else None
        (folder / "__init__.py").touch()
        (folder / "optimizers.py").write_text(USELESS, encoding="utf-8")
        (folder / "multi_tensor_apply.py").write_text(USELESS, encoding="utf-8")
    (tmp_path / "amp_C.py").write_text(USELESS, encoding="utf-8")
    return tmp_path


def test_megatron_takes_torch_s_optimizer_and_sums_where_there_is_no_gpu(libraries: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(libraries)]), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["torch", "None", "megatron.core.utils"]


def test_without_us_megatron_takes_what_cannot_work(libraries: Path) -> None:
    """The test above shows something: the libraries are found where nobody hides them."""
    environment = os.environ | {"PYTHONPATH": str(libraries), "CUDA_VISIBLE_DEVICES": ""}
    program = "\n".join(line for line in PROGRAM.splitlines() if "nemo_minitron" not in line)
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0


@pytest.mark.parametrize(("before", "after"), [(None, "0"), ("1", "1")])
def test_fp32_on_a_gpu_means_fp32_unless_the_user_says_otherwise(before: str | None, after: str) -> None:
    """cuBLAS, which Transformer Engine asks for TF32, looks at this variable."""
    environment = {key: value for key, value in os.environ.items() if key != "NVIDIA_TF32_OVERRIDE"}
    environment |= {"PYTHONPATH": str(ROOT)} | ({"NVIDIA_TF32_OVERRIDE": before} if before else {})
    program = "import nemo_minitron.megatron, os; print(os.environ['NVIDIA_TF32_OVERRIDE'])"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == after
