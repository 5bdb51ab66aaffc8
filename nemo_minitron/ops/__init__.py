"""The maths, on plain tensors: torch only, no ranks, no configuration."""
