"""Everything that touches Megatron-Core: processes, models, schedules, optimizers and sharded checkpoints."""

import os
import warnings

from nemo_minitron.megatron.without_gpu import hide_kernel_libraries
from nemo_minitron.megatron.without_wandb import hide_wandb

# Megatron-Core says so on every import; which one is in use is part of our own report.
for _message in ("Transformer Engine and Apex are not installed", "Apex is not installed", "full scope is deprecated"):
    warnings.filterwarnings("ignore", message=_message, category=UserWarning)

hide_kernel_libraries()
hide_wandb()
# Transformer Engine multiplies fp32 in TF32 (10 bits) and asks nobody; cuBLAS obeys this when it starts. Where a run
# says fp32, or compares an export with what was trained, it means fp32. Set it to 1 to have TF32.
os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")
