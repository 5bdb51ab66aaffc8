"""Compiles every kernel for an H100 (sm_90), which needs no GPU, and prints the registers of each as JSON."""

import json
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nemo_minitron.config.objective import DivergenceKind
from nemo_minitron.kernels import cross_entropy, divergence, moments, rest
from nemo_minitron.kernels.launch import BLOCK, WARPS

TARGET = GPUTarget("cuda", 90, 32)
TYPES = {
    **dict.fromkeys(("student", "teacher", "logits"), "*bf16"),
    **dict.fromkeys(("values", "normalisers", "slope_sum", "sums", "factors"), "*fp32"),
    **dict.fromkeys(("first", "columns", "student_stride", "teacher_stride", "stride", "tokens"), "i32"),
    **dict.fromkeys(("scale", "mixing", "kd_weight", "lm_weight"), "fp32"),
    "labels": "*i64",
    # moments
    **dict.fromkeys(("x",), "*bf16"),
    "keep": "*u8",
    "found": "*fp32",
    **dict.fromkeys(("positions", "samples", "channels", "row_stride", "sample_stride", "length"), "i32"),
}
ALIGNED = {"columns", "student_stride", "teacher_stride", "stride", "tokens", "channels", "row_stride", "sample_stride"}


def kernels():
    for kind in DivergenceKind:
        for wanted in (False, True):
            options = {"KIND": kind.value, "TOP": wanted, "LABELS": wanted, "TEMPERED": wanted}
            yield divergence._statistics, options
        if kind is not DivergenceKind.FORWARD_KL:
            yield divergence._terms, {"KIND": kind.value}
        yield divergence._gradient, {"KIND": kind.value, "LABELS": True, "TEMPERED": True}
    yield cross_entropy._statistics, {}
    yield cross_entropy._gradient, {}
    yield rest._statistics, {}
    yield rest._gradient, {}
    for keep in (False, True):
        sizes = {"KEEP": keep, "ROWS": moments.ROWS, "COLUMNS": moments.COLUMNS}
        yield moments._sums, sizes
        # Triton makes constants of arguments that are 1.
        yield moments._sums, {**sizes, "samples": 1, "channels": 1, "sample_stride": 1, "positions": 1}
    for module in (cross_entropy, rest):
        for kernel in (module._statistics, module._gradient):
            yield kernel, {"tokens": 1, "stride": 1}
    kind = DivergenceKind.FORWARD_KL.value
    one = {"tokens": 1, "student_stride": 1, "teacher_stride": 1}
    yield divergence._statistics, {"KIND": kind, "TOP": True, "LABELS": True, "TEMPERED": True, **one}
    yield divergence._gradient, {"KIND": kind, "LABELS": True, "TEMPERED": True, **one}


def compiled(kernel, constants):
    names = [parameter.name for parameter in kernel.params]
    constants = {name: value for name, value in constants.items() if name in names}
    constants |= {"BLOCK": BLOCK} if "BLOCK" in names else {}
    source = ASTSource(
        kernel,
        signature={name: "constexpr" if name in constants else TYPES[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={
            (place,): [["tt.divisibility", 16]]
            for place, name in enumerate(names)
            if name not in constants and (name in ALIGNED or TYPES[name].startswith("*"))
        },
    )
    return triton.compile(
        source, target=TARGET, options={"num_warps": moments.WARPS if "ROWS" in names else WARPS}
    ).asm["cubin"]


def resources(binary, folder):
    """Registers a thread, and bytes of the stack, where those that do not fit would be."""
    path = folder / "kernel.cubin"
    path.write_bytes(binary)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    said = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"REG:(\d+)", said)[1]), int(re.search(r"STACK:(\d+)", said)[1])


def main():
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for kernel, constants in kernels():
            registers, stack = resources(compiled(kernel, constants), Path(folder))
            rows.append({"kernel": kernel.__name__, **constants, "registers": registers, "stack_bytes": stack})
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
