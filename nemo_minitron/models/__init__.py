"""NeMo model classes, the Lightning strategy that trains them under Megatron, and the `.nemo` connector."""
