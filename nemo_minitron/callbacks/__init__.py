"""Lightning callbacks: importance, distillation monitor, metrics, progress, throughput."""
