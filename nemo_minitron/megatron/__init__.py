"""Everything that touches Megatron-Core: processes, models, schedules, optimizers and sharded checkpoints."""

import warnings

from nemo_minitron.megatron.without_gpu import hide_kernel_libraries

# Megatron-Core says so on every import; which one is in use is part of our own report.
for _message in ("Transformer Engine and Apex are not installed", "Apex is not installed", "full scope is deprecated"):
    warnings.filterwarnings("ignore", message=_message, category=UserWarning)

hide_kernel_libraries()
