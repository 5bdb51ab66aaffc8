"""Stages from artefacts to artefacts, and the engine that chains them in a run folder. Importing it loads no torch."""
