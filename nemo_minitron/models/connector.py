"""Saving and restoring `.nemo`: `model_weights/` in torch_dist form, by all ranks, at any layout."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from nemo.core.connectors.save_restore_connector import SaveRestoreConnector
from omegaconf import DictConfig, OmegaConf

from nemo_minitron.arch.nemo_config import nemo_config
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.checkpoints.nemo1 import pack_nemo, write_folder_files
from nemo_minitron.checkpoints.open import open_checkpoint
from nemo_minitron.checkpoints.source import TensorSource
from nemo_minitron.config.model_settings import ModelSettings
from nemo_minitron.megatron import runtime as megatron_runtime
from nemo_minitron.megatron.from_source import fill_from
from nemo_minitron.megatron.model import MinitronGPT
from nemo_minitron.megatron.runtime import Runtime
from nemo_minitron.megatron.sharded_io import load_weights, save_weights
from nemo_minitron.models import nemo_settings


class SavedModel(Protocol):
    """What is saved of a model: the attributes of `MegatronGPTModel` of these names."""

    spec: ModelSpec
    family: str
    tokenizer_files: dict[str, bytes]
    lineage: dict[str, Any]
    chunks: list[MinitronGPT]

    @property
    def runtime(self) -> Runtime: ...  # noqa: D102


class MegatronConnector(SaveRestoreConnector):
    """NeMo's connector for sharded Megatron weights.

    `save_to("x.nemo")` packs an archive; any other path becomes the unpacked folder. Both are complete or absent.
    `restore_from` also reads Hugging Face folders and GGUF files.

    Args:
        settings: What a restored model is told besides its architecture; None reads it from the configuration.
    """

    def __init__(self, settings: ModelSettings | None = None) -> None:
        super().__init__()
        self._settings = settings

    def save_to(self, model: SavedModel, save_path: str) -> None:
        """Write configuration, tokenizer and weights. Every rank calls it; the path must be on a shared file system."""
        target = Path(save_path)
        partial = target.with_name(f".{target.name}.saving")

        def begin() -> None:
            shutil.rmtree(partial, ignore_errors=True)
            write_folder_files(
                partial,
                spec=model.spec,
                family=model.family,
                dtype=model.chunks[0].config.params_dtype,
                tokenizer_files=model.tokenizer_files,
                lineage=model.lineage,
            )

        megatron_runtime.on_rank_zero(begin, doing=f"begins {target.name}")
        save_weights(model.chunks, partial)
        megatron_runtime.barrier()
        megatron_runtime.on_rank_zero(lambda: _publish(partial, target), doing=f"packs {target.name}")

    def restore_from(  # noqa: PLR0917 - NeMo's signature
        self,
        calling_cls: Any,
        restore_path: str,
        override_config_path: DictConfig | str | Mapping[str, Any] | None = None,
        map_location: Any = None,
        strict: bool = True,
        return_config: bool = False,
        trainer: Any = None,
        validate_access_integrity: bool = True,
    ) -> Any:
        """Build the model at the present layout and read this rank's shards.

        Raises:
            CheckpointError: The checkpoint is damaged, incomplete, or of no known format.
            ConfigError: `override_config_path` changes keys that nobody knows, or to values that cannot be.
        """
        source = open_checkpoint(Path(self.model_extracted_dir or restore_path))
        stored = source.config or nemo_config(source.spec, family=source.family)
        config = _configuration(stored, override_config_path)
        if return_config:
            return config
        settings = self._settings or nemo_settings.model_settings(config, inherited=stored)
        with _restoring(calling_cls, config, source, settings=settings, trainer=trainer) as model:
            model.restored_from = Path(self.model_extracted_dir or restore_path)
            if source.native is not None:
                load_weights(model.chunks, source.native)
            else:
                fill_from(model.chunks, source, model.runtime)
        return model


def model_of(kind: Any, source: TensorSource, *, settings: ModelSettings, trainer: Any = None) -> Any:
    """A model with the weights of any source, a pruned view of a checkpoint as well; nothing goes over the disk."""
    config = OmegaConf.create(nemo_config(source.spec, family=source.family))
    with _restoring(kind, config, source, settings=settings, trainer=trainer) as model:
        fill_from(model.chunks, source, model.runtime)
    return model


@contextmanager
def _restoring(
    kind: Any, config: DictConfig, source: TensorSource, *, settings: ModelSettings, trainer: Any
) -> Iterator[Any]:
    """A model that is built and has all of a source but its weights, which are read inside the block."""
    kind._set_model_restore_state(is_being_restored=True)
    try:
        model = kind.from_config_dict(config, trainer=trainer, settings=settings)
        model.family = source.family
        model.tokenizer_files = source.tokenizer_files()
        model.lineage = dict(source.lineage)
        model.configure_model()
        yield model
    finally:
        kind._set_model_restore_state(is_being_restored=False)


def _publish(partial: Path, target: Path) -> None:
    """Put a complete folder, or the archive of it, where it belongs."""
    if target.suffix == ".nemo":
        pack_nemo(partial, target)
        shutil.rmtree(partial)
        return
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)


def _configuration(stored: Mapping[str, Any], override: DictConfig | str | Mapping[str, Any] | None) -> DictConfig:
    if isinstance(override, str | Path):
        return OmegaConf.create(nemo_settings.plain(OmegaConf.load(override), resolve=False))
    if override is not None:
        return OmegaConf.create(nemo_settings.plain(override))
    return OmegaConf.create(dict(stored))
