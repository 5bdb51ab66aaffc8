"""How a recipe becomes the processes that run it: command lines, Slurm, the NeMo launcher, NeMo-Run."""
