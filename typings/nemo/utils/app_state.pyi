class AppState:
    model_parallel_size: int | None
