from typing import Any

class SaveRestoreConnector:
    model_extracted_dir: str | None
    def __init__(self) -> None: ...
    def save_to(self, model: Any, save_path: str) -> None: ...
    def restore_from(
        self,
        calling_cls: Any,
        restore_path: str,
        override_config_path: Any = ...,
        map_location: Any = ...,
        strict: bool = ...,
        return_config: bool = ...,
        trainer: Any = ...,
        validate_access_integrity: bool = ...,
    ) -> Any: ...
