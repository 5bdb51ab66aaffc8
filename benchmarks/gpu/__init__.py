"""Checks for a machine with one NVIDIA GPU: what only a real card can show, in minutes. Run as `make gpu`."""
