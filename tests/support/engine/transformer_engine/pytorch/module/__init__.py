"""`transformer_engine.pytorch.module`."""
