"""A stand-in for NVIDIA's Transformer Engine 2.9 on a CPU; see `tests/support/README.md`."""

__version__ = "2.9.0"

from transformer_engine import common, pytorch

__all__ = ["common", "pytorch"]
