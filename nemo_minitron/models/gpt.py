"""A NeMo model around Megatron-Core's GPT: configuration in NeMo-1 keys, any TP x PP x DP layout, CPU or GPU."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from nemo.core.classes import ModelPT
from nemo.core.connectors.save_restore_connector import SaveRestoreConnector
from nemo.utils import AppState
from omegaconf import DictConfig
from torch import Tensor

from nemo_minitron.arch.families import recorded_family
from nemo_minitron.arch.nemo_config import spec_from_nemo_config
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.config.model_settings import ModelSettings
from nemo_minitron.errors import CheckpointError, ConfigError, DataError, MinitronError, TrainingError
from nemo_minitron.megatron import build, forward, optim, overlap, param_gather
from nemo_minitron.megatron import runtime as megatron_runtime
from nemo_minitron.megatron.documents import attention_documents
from nemo_minitron.megatron.forward import Loss, MicroBatch
from nemo_minitron.megatron.model import MinitronGPT
from nemo_minitron.megatron.optim import StepInfo
from nemo_minitron.megatron.runtime import Runtime
from nemo_minitron.models import nemo_settings
from nemo_minitron.models.connector import MegatronConnector
from nemo_minitron.models.guard import StepGuard
from nemo_minitron.models.losses import LanguageModelLoss, tensor_group
from nemo_minitron.models.optimizer import MegatronOptimizer

Report = dict[str, float]


class MegatronGPTModel(ModelPT):
    """A decoder-only language model that Lightning trains and validates under Megatron.

    Args:
        cfg: NeMo-1 keys (`num_layers`, `hidden_size`, `kv_channels`, ...). `optim` is needed for training,
            `micro_batch_size` for both. The trainer's `MegatronStrategy` decides the layout; without one,
            `tensor_model_parallel_size` and its siblings do.
        trainer: Optional; its strategy must be a `MegatronStrategy`.
        settings: Everything but the architecture; None reads it from `cfg`, which then may have no key that nobody
            knows. A `cfg` that was changed since ends the next `fit` or `validate`.

    Attributes:
        spec: The architecture.
        family: Key of `arch.families`; saved with the model.
        settings: The rest.
        chunks: This rank's part of the model, one per virtual pipeline stage.
        tokenizer_files: Hugging Face tokenizer files by name; saved with the model.
        validation_reports: What each batch of the latest validation summed up to.
        lineage: Where the model comes from (base model, licence, plan); saved with the model.
        restored_from: The checkpoint that the weights were read from; None for a model made from scratch.

    Weights are made in `configure_model` (random, the same at every layout) or read by `restore_from`.
    A batch holds this data-parallel rank's share of one global batch; a step returns sums and counts over all ranks.
    Between training steps call `gather_weights` before you read parameters: see `parallel.overlap_param_gather`.

    Raises:
        ConfigError: `cfg` has unknown keys, or values that cannot be.
    """

    loss_name = "ce"
    """What a report calls the quantity that is minimised."""

    def __init__(
        self, cfg: DictConfig, trainer: Trainer | None = None, *, settings: ModelSettings | None = None
    ) -> None:
        settings = nemo_settings.model_settings(cfg) if settings is None else settings
        super().__init__(cfg=cfg, trainer=trainer)
        self.settings = settings
        self._read_cfg = nemo_settings.plain(self._cfg, resolve=False)
        # ModelPT's constructor sets the stock connector, which cannot write sharded weights.
        self._save_restore_connector = MegatronConnector()
        self.automatic_optimization = False
        self.spec: ModelSpec = spec_from_nemo_config(nemo_settings.plain(self._cfg))
        self.family = recorded_family(self._read_cfg.get("minitron") or {}, self.spec)
        self.tokenizer_files: dict[str, bytes] = {}
        self.lineage: dict[str, Any] = {}
        self.restored_from: Path | None = None
        self.chunks: list[MinitronGPT] = []
        self.training_chunks: list[optim.Wrapped] = []
        self.validation_reports: list[Report] = []
        self.guard = StepGuard(settings.guard)

    def setup(self, stage: str | None = None) -> None:
        """Refuse a configuration that was changed since it was read.

        Raises:
            ConfigError: With the keys.
        """
        now = nemo_settings.plain(self._cfg, resolve=False)
        data = ("train_ds", "validation_ds", "test_ds")
        changed = [key for key in now if key not in data and now[key] != self._read_cfg.get(key)]
        if changed:
            said = "changed after the model was built; give override_config_path or settings to restore_from instead"
            raise ConfigError("model configuration", [f"{key} = {str(now[key])[:60]}: {said}" for key in changed])
        super().setup(stage)

    # -- building ------------------------------------------------------------------------------------------------

    @property
    def teacher_path(self) -> Path | None:
        """The checkpoint of the teacher that is in memory; None without one."""
        return None

    @property
    def runtime(self) -> Runtime:
        """This process's place in the layout: the strategy's, or one started from the configuration."""
        strategy = getattr(self._trainer, "strategy", None) if self._trainer is not None else None
        runtime = getattr(strategy, "runtime", None)
        return (
            runtime if runtime is not None else megatron_runtime.start(self.settings.parallel, seed=self.settings.seed)
        )

    def configure_model(self) -> None:
        """Build this rank's chunks, once.

        Raises:
            LayoutError: `overlap_param_gather` is set, and the optimizer's states are not split.
        """
        if self.chunks:
            return
        runtime = self.runtime
        if (optimizer := self.settings.optimizer) is not None:  # before weights are read
            overlap.gather_is_wanted(runtime, distributed=optim.is_distributed(optimizer))
        # NeMo saves through rank 0 alone unless it knows that the model is parallel; ours is saved by all ranks.
        AppState().model_parallel_size = runtime.parallel.model_parallel_size
        # While restoring, weights stay NaN until they are read: what is forgotten cannot go unnoticed.
        seed = None if self._is_model_being_restored() else runtime.seed
        self.chunks = build.build_chunks(
            self.spec,
            runtime,
            self.settings.precision,
            seed=seed,
            fp8=self.settings.fp8,
        )
        for chunk in self.chunks:
            chunk.output = "hidden"  # the losses hold the output layer
        self.module = torch.nn.ModuleList(self.chunks)

    def configure_optimizers(self) -> MegatronOptimizer:
        """Wrap the chunks in Megatron's DDP and make its optimizer with the schedule inside.

        Raises:
            MinitronError: The configuration has no `optim`.
            TrainingError: The schedule has no steps in which the learning rate could fall.
        """
        settings = self.settings
        if settings.optimizer is None:
            raise MinitronError(
                "model configuration: optim is missing, or came with the checkpoint and is of another optimizer",
                rule="training needs optim, as {name: adamw, lr: 1e-4}",
            )
        steps = settings.schedule_steps or self.trainer.max_steps
        if settings.constant_steps and not 0 < settings.constant_steps < steps:
            raise TrainingError(
                f"optim.sched.constant_steps = {settings.constant_steps} in a schedule of {steps} steps",
                rule="they are the last of its steps, and the learning rate falls before them",
                remedy="set optim.sched.constant_steps=0, or raise trainer.max_steps or optim.sched.max_steps",
            )
        self.training_chunks = optim.wrap(self.chunks, settings.optimizer, runtime=self.runtime)
        made = optim.build_optimizer(
            self.training_chunks, settings.optimizer, settings.precision, steps, constant_steps=settings.constant_steps
        )
        return MegatronOptimizer(made)

    # -- steps ---------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, batch: MicroBatch, batch_idx: int, unused: int = 0) -> int | None:
        """Lightning's loggers put this step beside the number of steps before it, in a resumed training too.

        Lightning saves its own count before it counts the step that has just ended, so that all later ones would stand
        one too early.
        """
        self.trainer.fit_loop.epoch_loop._batches_that_stepped = self.trainer.global_step
        return super().on_train_batch_start(batch, batch_idx, unused)

    def training_step(self, batch: MicroBatch, batch_idx: int) -> None:
        """Loss, report, update over one global batch; logs `train/*`."""
        micro_batches = self.micro_batches(batch)
        self.lightning_optimizer.zero_grad()
        report = self.run_pass(self.text_loss(), micro_batches, training=True)
        info = self.update(report)
        self.log_step(report, info)

    @property
    def lightning_optimizer(self) -> LightningOptimizer:
        """What `configure_optimizers` made, as Lightning counts its steps."""
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer), "there is one"
        return optimizer

    def micro_batches(self, batch: MicroBatch) -> list[MicroBatch]:
        """This rank's share of a global batch in the pieces that it is computed in.

        Raises:
            DataError: Its sequences are longer than the model's context.
            LayoutError: It is no multiple of `micro_batch_size`.
        """
        if (length := batch.tokens.shape[-1]) > (limit := self.spec.max_position_embeddings):
            raise DataError(
                f"sequences of {length} tokens",
                rule=f"at most {limit}, the model's context (max_position_embeddings)",
                remedy="give shorter ones: encoder_seq_length in a script, sequence_length of the section in a recipe",
            )
        return forward.cut(batch, self.settings.batch.micro_batch_size, self._readers())

    def _readers(self) -> list[MinitronGPT]:
        """Chunks of all models that read a batch."""
        return self.chunks

    def validation_step(self, batch: MicroBatch, batch_idx: int, dataloader_idx: int = 0) -> Report:
        """Forward over one global batch; returns sums over all ranks and keeps them for the epoch."""
        report = self.validation_report(self.micro_batches(batch))
        self.validation_reports.append(report)
        return report

    def validation_report(self, micro_batches: list[MicroBatch]) -> Report:
        """What a validation measures on one global batch: sums over all tokens of all ranks."""
        return self.run_pass(self.text_loss(), micro_batches, training=False)

    def text_loss(self) -> LanguageModelLoss:
        """Cross-entropy of the next token."""
        return LanguageModelLoss(
            model=self.chunks[-1], vocab_size=self.spec.vocab_size, tensor_group=tensor_group(self.runtime)
        )

    def run_pass(self, loss: Loss, micro_batches: list[MicroBatch], *, training: bool) -> Report:
        """Megatron's schedule over one global batch: forward, and back if training.

        Returns:
            Sums over all tokens of all ranks, the same on every rank; always with `tokens`.
        """
        chunks: Sequence[torch.nn.Module] = self.training_chunks if training else self.chunks
        reports = forward.run(chunks, micro_batches, loss, runtime=self.runtime, forward_only=not training)
        sums = forward.reduce_report(reports, self.runtime)
        sums.pop("total", None)
        return sums

    def update(self, report: Report) -> StepInfo:
        """One optimizer step, unless the guard refuses it by the report of the pass that left the gradients."""
        optimizer = self.lightning_optimizer
        optimizer.step(refuse=partial(self._refuse, per_token(report)[self.loss_name]))
        inner = optimizer.optimizer
        assert isinstance(inner, MegatronOptimizer)
        assert inner.last is not None
        return inner.last

    def log_step(self, report: Report, info: StepInfo) -> None:
        """Log what a step measured and did: the loss under the weights before it, and how they were updated.

        `train/skipped` counts the steps skipped so far, this one included.

        Raises:
            TrainingError: Too many steps in a row were skipped.
        """
        values = {f"train/{name}": value for name, value in per_token(report).items()}
        values["train/loss"] = values[f"train/{self.loss_name}"]
        values["train/lr"] = info.lr
        values["train/grad_norm"] = info.grad_norm
        values["train/skipped"] = float(self.guard.skipped)
        _forget_others(self.trainer, values)
        self.log_dict(values, on_step=True, on_epoch=False, batch_size=1, sync_dist=True)
        self.guard.check()

    def _refuse(self, loss: float, grad_norm: float) -> bool:
        """The guard's word on a step. Ranks agree on a spike, whose threshold rounding might put on either side."""
        return self.guard.refuses(loss, grad_norm, agree=megatron_runtime.agree)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What the guard remembers goes into training checkpoints."""
        checkpoint["minitron_guard"] = self.guard.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """And comes back."""
        if (state := checkpoint.get("minitron_guard")) is not None:
            self.guard.load_state_dict(state)

    def on_validation_epoch_start(self) -> None:
        """Start anew."""
        self.validation_reports = []

    def on_validation_epoch_end(self, sync_metrics: bool = False) -> None:
        """Log means over all kept tokens of the epoch as `val/*`."""
        totals = {name: sum(report[name] for report in self.validation_reports) for name in self.validation_reports[0]}
        means = per_token(totals)
        values = {f"val/{name}": value for name, value in means.items()}
        values["val/loss"] = values[f"val/{self.loss_name}"]
        values["val_loss"] = values["val/loss"]  # the name that NeMo's exp_manager looks for
        self.log_dict(values, on_step=False, on_epoch=True, batch_size=1, sync_dist=True)

    def gather_weights(self) -> None:
        """Wait until this rank's weights are those of the latest step. Every data-parallel rank calls it.

        What reads weights by itself between training steps needs it under `parallel.overlap_param_gather`; validating
        and saving do it.
        """
        param_gather.finish(self.chunks)

    def forward(self, tokens: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Logits `[b, s, V / TP]` of tokens `[b, s]`; one pipeline stage only.

        Where `position_ids` begin again, so does a document, which sees nothing of those before it.

        Raises:
            MinitronError: The model is split over pipeline stages; use `run_pass`.
        """
        if self.runtime.parallel.pipeline > 1 or len(self.chunks) != 1:
            raise MinitronError("forward() needs the complete depth of the model on one rank", remedy="use run_pass()")
        if position_ids is None:
            position_ids = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        self.gather_weights()
        [model] = self.chunks
        documents = attention_documents(position_ids, self.chunks, self.runtime.device)
        before, model.output = model.output, "logits"
        try:
            logits: Tensor = model(tokens, position_ids, None, packed_seq_params=documents)
            return logits
        finally:
            model.output = before

    # -- data: loaders come from a data module; ModelPT wants these to exist -------------------------------------

    def setup_training_data(self, train_data_config: DictConfig | dict[str, Any]) -> None:
        """Keep the configuration; loaders are built by `TokenDataModule`, which knows the layout."""
        self._update_dataset_config(dataset_name="train", config=train_data_config)

    def setup_validation_data(self, val_data_config: DictConfig | dict[str, Any]) -> None:
        """Keep the configuration; see `setup_training_data`."""
        self._update_dataset_config(dataset_name="validation", config=val_data_config)

    @classmethod
    def list_available_models(cls) -> list[Any]:
        """None are published."""
        return []

    # -- saving and restoring ------------------------------------------------------------------------------------

    @classmethod
    def from_config_dict(
        cls, config: DictConfig, trainer: Trainer | None = None, *, settings: ModelSettings | None = None
    ) -> Self:
        """Build this class, whatever `target` the configuration names.

        Exported models carry NeMo-1's target so that NeMo-1 tools read them; newer NeMo refuses to import it.
        """
        return cls(cfg=config, trainer=trainer, settings=settings)

    @classmethod
    def restore_from(  # noqa: PLR0917 - NeMo's signature
        cls,
        restore_path: str | Path,
        override_config_path: DictConfig | str | None = None,
        map_location: torch.device | None = None,
        strict: bool = True,
        return_config: bool = False,
        save_restore_connector: SaveRestoreConnector | None = None,
        trainer: Trainer | None = None,
        settings: ModelSettings | None = None,
        **kwargs: Any,
    ) -> Self:
        """Read a `.nemo` file, its unpacked folder, a Hugging Face folder or a GGUF file at the trainer's layout.

        Every rank calls it. `settings` is everything but the architecture; None reads it from the configuration. What
        `override_config_path` changes there is checked like a recipe; keys that came with the file are not.

        Raises:
            CheckpointError: There is nothing readable at the path.
            ConfigError: Unknown keys, or values that cannot be.
        """
        if not Path(restore_path).exists():
            raise CheckpointError(f"{restore_path}: no such file or folder")
        return super().restore_from(
            restore_path=str(restore_path),
            override_config_path=override_config_path,
            map_location=map_location,
            strict=strict,
            return_config=return_config,
            save_restore_connector=save_restore_connector or MegatronConnector(settings),
            trainer=trainer,
            **kwargs,
        )


def gpt_model(module: LightningModule | None) -> MegatronGPTModel:
    """What a trainer hands to a callback, as a model of ours.

    Raises:
        MinitronError: It is another module.
    """
    if not isinstance(module, MegatronGPTModel):
        raise MinitronError(f"{type(module).__name__} is no MegatronGPTModel", rule="the callback works on one")
    return module


def _forget_others(trainer: Trainer, values: Mapping[str, float]) -> None:
    """Make Lightning forget what only earlier steps measured: it would show it beside every later one."""
    for metric in (trainer._results or {}).values():
        if metric.meta.name.startswith("train/") and metric.meta.name not in values:
            metric.reset()
    metrics = trainer.callback_metrics
    for name in [name for name in metrics if name.startswith("train/") and name not in values]:
        del metrics[name]


def per_token(report: Mapping[str, float]) -> Report:
    """Sums divided by the number of kept tokens; a report without kept tokens gives zeros."""
    count = max(report["tokens"], 1.0)
    return {name: value / count for name, value in report.items() if name != "tokens"}
