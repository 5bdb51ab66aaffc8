"""`precision: auto` becomes bf16 or fp32: what this device computes faster, measured once and kept by the run."""

from dataclasses import dataclass
from typing import Any

from nemo_minitron.config.parallel import Precision
from nemo_minitron.config.run import RunConfig
from nemo_minitron.errors import LayoutError
from nemo_minitron.processor import processor_name
from nemo_minitron.stages import manifest
from nemo_minitron.stages.processes import Processes
from nemo_minitron.stages.run_folder import RunFolder

WORTH = 1.25
"""bf16 is chosen on a CPU where its products are at least this many times as fast as fp32's. It rounds more, so a tie
goes to fp32. Processors with AMX or AVX-512 bf16 reach 2 to 8; where bf16 is emulated it is 0.1 to 0.8."""


@dataclass(frozen=True, kw_only=True)
class PrecisionChoice:
    """What a run computes in, and why."""

    asked: Precision
    chosen: Precision
    device: str
    """Name of the processor or GPU that it was measured on."""
    bf16_over_fp32: float
    """Speed of a matrix product in bf16 over that in fp32."""

    @property
    def reason(self) -> str:
        """In a few words."""
        return f"bf16 products are {self.bf16_over_fp32:.2g} x as fast as fp32 on {self.device}"

    @property
    def warning(self) -> str | None:
        """What is to be said of a bf16 that the user asked for and the device emulates."""
        if self.asked is not Precision.BF16 or self.bf16_over_fp32 >= 1:
            return None
        return (
            f"warning: bf16 is emulated here: its products take {1 / self.bf16_over_fp32:.1f} x the time of fp32 on "
            f"{self.device}; precision=fp32 or precision=auto is faster"
        )


def measure(asked: Precision) -> PrecisionChoice:
    """Compare both dtypes on this process's device; some tenths of a second."""
    import torch

    from nemo_minitron.ops.product_speed import product_speedup

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    ratio = product_speedup(device, torch.bfloat16, torch.float32)
    faster = Precision.BF16 if ratio >= WORTH else Precision.FP32
    return PrecisionChoice(
        asked=asked,
        chosen=faster if asked is Precision.AUTO else asked,
        device=torch.cuda.get_device_name(device) if on_gpu else processor_name(),
        bf16_over_fp32=round(ratio, 3),
    )


def agreed(choices: list[PrecisionChoice]) -> PrecisionChoice:
    """The choice of all ranks: that of rank 0, unless another device would choose otherwise.

    Ranks on one kind of device share its measurement, since they disturb each other while they measure.

    Raises:
        LayoutError: Devices of different kinds choose differently.
    """
    first = choices[0]
    for rank, choice in enumerate(choices):
        if choice.device != first.device and choice.chosen is not first.chosen:
            raise LayoutError(
                f"precision: auto is {first.chosen} on rank 0 ({first.device}) and {choice.chosen} on rank {rank} "
                f"({choice.device})",
                rule="all ranks compute in one precision",
                remedy="say which: precision=bf16 or precision=fp32",
            )
    return first


def settle(config: RunConfig, folder: RunFolder, processes: Processes) -> tuple[RunConfig, PrecisionChoice | None]:
    """The recipe with its precision settled, and how that came about; None where there is nothing to measure.

    A run keeps what it has chosen before, on whatever machine it continues. Collective.

    Raises:
        LayoutError: Ranks have devices of different kinds, which choose differently.
    """
    asked = config.precision
    if asked is Precision.FP32:
        return config, None
    choice = processes.broadcast(_recorded(folder, asked) if processes.rank == 0 else None)
    if choice is None:
        choice = agreed(processes.collect(measure(asked)))
    return config.model_copy(update={"precision": choice.chosen}), choice


def foreseen(folder: RunFolder) -> PrecisionChoice:
    """What `settle` will choose for a recipe with `precision: auto` on this machine."""
    return _recorded(folder, Precision.AUTO) or measure(Precision.AUTO)


def _recorded(folder: RunFolder, asked: Precision) -> PrecisionChoice | None:
    """What the run in a folder chose before, if it was asked the same."""
    data: dict[str, Any] | None = manifest.read(folder.path).get("precision")
    if data is None or data["asked"] != asked:
        return None
    return PrecisionChoice(**{**data, "asked": Precision(data["asked"]), "chosen": Precision(data["chosen"])})
