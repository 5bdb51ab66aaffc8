"""The maths across ranks. Process groups are arguments; `None` means "not split"."""
