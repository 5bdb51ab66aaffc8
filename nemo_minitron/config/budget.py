"""What a student may cost: limits on parameters, memory, operations and time, and the conditions they hold under."""

import re
from enum import StrEnum
from fractions import Fraction
from math import isfinite
from typing import Annotated, Any

from pydantic import BeforeValidator

from nemo_minitron.config.base import Count, OpenFraction, Positive, Section

_NUMBER = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?(?:[eE][0-9]+)?)\s*([A-Za-z]*)\s*")
_COUNTS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_BYTES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_BYTES |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def _amount(value: Any, units: dict[str, int], example: str) -> Any:
    found = _NUMBER.fullmatch(value) if isinstance(value, str) else None
    if found is not None and found[2].upper() in units:
        # Decimal digits are taken as they stand: the nearest binary fraction of 4.1, times 10^9, is no integer.
        number = Fraction(found[1]) * units[found[2].upper()]
        if found[2].upper().endswith("IB"):
            number = Fraction(int(number))  # 0.3GiB is no whole number of bytes; the limit is what lies within it
    elif isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value):
        number = Fraction(value)
    else:
        raise ValueError(f"a number, or one with a unit ({', '.join(filter(None, units))}), as {example}")
    if number < 1 or number.denominator > 1:
        raise ValueError(f"a whole number of at least 1, as {example}")
    return int(number)


Amount = Annotated[int, BeforeValidator(lambda value: _amount(value, _COUNTS, "100M"))]
"""A number of things, with `K`, `M`, `B` or `T` behind it if wanted: `4.5B`."""
Bytes = Annotated[int, BeforeValidator(lambda value: _amount(value, {"": 1, **_BYTES}, "8GB"))]
"""A number of bytes: `8GB` is 8 x 10^9, `8GiB` is 8 x 2^30; parts of a byte are left out."""


class StorageType(StrEnum):
    """What a number is stored as where the student is deployed."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"
    FP8 = "fp8"
    INT8 = "int8"
    INT4 = "int4"

    @property
    def bits(self) -> int:
        """Bits of one number, scales of quantization left aside."""
        return {"fp32": 32, "bf16": 16, "fp16": 16, "fp8": 8, "int8": 8, "int4": 4}[self.value]


class DeploymentConfig(Section):
    """The conditions that memory, operations and latency are counted under."""

    dtype: StorageType = StorageType.BF16
    """Of weights."""
    cache_dtype: StorageType | None = None
    """Of keys and values, and of what Mamba's convolutions remember; None for `dtype` where that has at least 8 bits,
    else 8."""
    state_dtype: StorageType = StorageType.FP32
    """Of the states of Mamba layers."""
    batch_size: Count = 1
    """Sequences in memory, and of a step whose latency counts."""
    sequence_length: Count = 4096
    """Tokens of each sequence: what the cache holds, what a generated token attends to, what prefill reads."""
    tensor_parallel: Count = 1
    """Ranks that share each weight where the student is deployed: heads, KV groups and FFN must be multiples of it."""
    device: str | None = None
    """Name of the device that the student will run on, as its latency table has it; None for this machine's."""
    latency_table: str | None = None
    """A file of `nemo-minitron latency`; needed for `prefill_ms` and `decode_ms`."""

    @property
    def cache_bits(self) -> int:
        """Bits of one number in the KV cache."""
        return max(self.dtype.bits, 8) if self.cache_dtype is None else self.cache_dtype.bits


class BudgetConfig(Section):
    """Upper limits of the student, any of them together; with at least one, stage `search` chooses the sizes."""

    params: Amount | None = None
    """Parameters, as `100M`; a tied embedding counts once."""
    active_params: Amount | None = None
    """Parameters that one token passes through; for a dense model, all of them."""
    non_embedding_params: Amount | None = None
    """Parameters without embedding and output layer."""
    ratio: OpenFraction | None = None
    """Parameters as a fraction of the teacher's."""
    weight_memory: Bytes | None = None
    """Bytes of the weights in `deployment.dtype`, as `8GB`."""
    kv_cache: Bytes | None = None
    """Bytes of keys and values of `deployment.batch_size` sequences of `deployment.sequence_length` tokens."""
    ssm_state: Bytes | None = None
    """Bytes of what Mamba layers remember of `deployment.batch_size` sequences, however long: the state, and the last
    inputs of the convolution."""
    memory: Bytes | None = None
    """Bytes of weights, keys, values and Mamba states together, as `20GiB`."""
    flops_per_token: Amount | None = None
    """Operations of one generated token that attends to `deployment.sequence_length` tokens, itself among them."""
    prefill_ms: Positive | None = None
    """Milliseconds for a batch of prompts, from `deployment.latency_table`."""
    decode_ms: Positive | None = None
    """Milliseconds for one token of each sequence of a batch, from `deployment.latency_table`."""
    deployment: DeploymentConfig = DeploymentConfig()

    @property
    def budgets(self) -> dict[str, float]:
        """The limits that are set, by name."""
        names = [name for name in BudgetConfig.model_fields if name != "deployment"]
        return {name: value for name in names if (value := getattr(self, name)) is not None}
