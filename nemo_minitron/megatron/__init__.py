"""Everything that touches Megatron-Core: processes, models, schedules, optimizers and sharded checkpoints."""

import warnings

# Megatron-Core says so on every import; which one is in use is part of our own report.
warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed", category=UserWarning)
