from collections.abc import Callable
from typing import Any, NamedTuple

class AsyncRequest(NamedTuple):
    async_fn: Callable[..., None]
    async_fn_args: tuple[Any, ...]
    finalize_fns: list[Callable[[], object]]
    def add_finalize_fn(self, fn: Callable[[], object]) -> None: ...
    def execute_sync(self) -> None: ...
