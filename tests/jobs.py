"""Complete model jobs for tests: module-level functions that any rank can run, returning plain numbers."""

from pathlib import Path
from typing import Any

from nemo_minitron.config.load import check
from nemo_minitron.config.model_settings import ModelSettings
from nemo_minitron.config.run import RunConfig


def config_for(model: Path, corpus: Path, **changes: Any) -> RunConfig:
    """A run of seconds over the tiny model; `changes` replace complete sections."""
    data: dict[str, Any] = {
        "name": "tiny",
        "precision": "fp32",
        "model": {"source": str(model)},
        "data": {
            "sources": [str(corpus)],
            "calibration_fraction": 0.15,
            "heldout_fraction": 0.15,
            "min_characters": 20,
        },
        "score": {"samples": 16, "sequence_length": 64, "micro_batch_size": 2},
        "target": {"num_layers": 3, "hidden_size": 48, "ffn_hidden_size": 64, "num_attention_heads": 4},
        "distill": {
            "tokens": 20 * 8 * 64,
            "batch": {"sequence_length": 64, "micro_batch_size": 2, "global_batch_size": 8},
            "optimizer": {"lr": 1e-3, "min_lr": 1e-4, "warmup_steps": 2},
            "validate_every": 10,
            "validation_samples": 8,
            "checkpoint_every": 5,
        },
        "evaluate": {"sequence_length": 64, "max_tokens": 1024, "prompt": "the history of", "sample_tokens": 4},
    }
    return check(RunConfig, data | changes, source="test")


def distill_losses(student: Path, teacher: Path, data: Path, config: RunConfig) -> list[float]:
    """Training losses of every step."""
    from lightning.pytorch import Callback

    from nemo_minitron.models.data import TokenDataModule
    from nemo_minitron.models.distillation import MegatronGPTDistillationModel
    from nemo_minitron.stages.session import make_trainer, restore

    class Keep(Callback):
        def __init__(self) -> None:
            self.losses: list[float] = []

        def on_train_batch_end(self, trainer: Any, *unused: Any) -> None:
            self.losses.append(trainer.callback_metrics["train/loss"].item())

    keep = Keep()
    settings = config.distill
    trainer = make_trainer(
        config, [keep], max_steps=settings.steps, max_epochs=-1, limit_val_batches=0, check_val_every_n_epoch=None
    )
    model = restore(
        MegatronGPTDistillationModel,
        student,
        config=config,
        micro_batch_size=settings.batch.micro_batch_size,
        trainer=trainer,
        settings=ModelSettings.of_training(settings, settings.with_teacher(teacher)),
    )
    trainer.fit(model, datamodule=TokenDataModule(data, settings, seed=config.seed))
    return keep.losses


def score(model: Path, data: Path, config: RunConfig) -> dict[str, Any]:
    """The raw statistics of a scoring pass, as numpy arrays."""
    from nemo_minitron.callbacks.importance import ImportanceCallback
    from nemo_minitron.stages.score import calibrate

    importance = ImportanceCallback()
    calibrate(model, data, config, importance)
    return {name: tensor.numpy() for name, tensor in importance.scores.tensors.items()}


def logits(folder: Path, config: RunConfig, tokens: list[list[int]]) -> Any:
    """Logits of all tokens, gathered over the layout, as a numpy array `[b, s, V]` on every rank."""
    import torch

    from nemo_minitron.evaluation.logits import gather_logits
    from nemo_minitron.models.gpt import MegatronGPTModel
    from nemo_minitron.stages.session import make_trainer, restore

    model = restore(MegatronGPTModel, folder, config=config, micro_batch_size=1, trainer=make_trainer(config))
    return gather_logits(model.chunks, torch.tensor(tokens), model.runtime, model.spec.vocab_size).numpy()


def prepare(folder: Path, changes: dict[str, Any] | None = None) -> None:
    """`hf/` and `corpus/` to `teacher/`, `data/` and `student/`, by the functions the stages are made of."""
    from nemo_minitron.callbacks.importance import ImportanceCallback
    from nemo_minitron.checkpoints.nemo1 import write_folder
    from nemo_minitron.checkpoints.open import open_checkpoint
    from nemo_minitron.data.documents import read_documents
    from nemo_minitron.data.tokenizer import load_tokenizer
    from nemo_minitron.megatron.data import write_token_files
    from nemo_minitron.pruning.apply import PrunedSource
    from nemo_minitron.pruning.build import build_plan
    from nemo_minitron.stages.score import calibrate

    config = config_for(folder / "hf", folder / "corpus", **(changes or {}))
    source = open_checkpoint(folder / "hf")
    write_folder(source, folder / "teacher")
    tokenizer = load_tokenizer(source.tokenizer_files())
    (folder / "data").mkdir()
    documents = read_documents(folder / "corpus")
    write_token_files(documents, tokenizer, folder / "data", config.data, seed=config.seed)
    importance = ImportanceCallback()
    calibrate(folder / "teacher", folder / "data", config, importance)
    teacher = open_checkpoint(folder / "teacher")
    write_folder(PrunedSource(teacher, build_plan(importance.scores, config.target, teacher.spec)), folder / "student")


def save_nemo(source: Path, target: Path) -> None:
    """Any checkpoint to a `.nemo` file or folder through the model class, in fp32."""
    from nemo_minitron.models.gpt import MegatronGPTModel
    from nemo_minitron.stages.session import make_trainer, restore

    config = config_for(source, source)
    model = restore(MegatronGPTModel, source, config=config, micro_batch_size=1, trainer=make_trainer(config))
    model.save_to(target)
