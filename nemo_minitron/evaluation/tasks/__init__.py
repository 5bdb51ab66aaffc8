"""Tasks of the LM-Evaluation-Harness that need no hub: a YAML file each, and what reads their data."""
