"""Scores to plan (a pure decision), plan to student (a pure application on a stream of tensors)."""
