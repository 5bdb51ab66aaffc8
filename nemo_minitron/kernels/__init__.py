"""Triton forms of what the fused losses do to a chunk of logits; `available` says where they run."""
