"""Lightning callbacks: importance, pruning, distillation monitor, metrics, progress, throughput."""
