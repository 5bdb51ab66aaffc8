"""Readers and writers of checkpoints as streams of canonical tensors: the memory of a tensor or two, no model built."""
