"""The student with a cache of its teacher's targets in place of the teacher."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from omegaconf import DictConfig
from torch import Tensor
from torch.distributed import ProcessGroup

from nemo_minitron.cache.entries import SampleTargets
from nemo_minitron.cache.folder import TargetCache
from nemo_minitron.cache.tensors import sparse_targets
from nemo_minitron.megatron import overlap
from nemo_minitron.megatron.forward import LossResult, MicroBatch
from nemo_minitron.megatron.model import MinitronGPT, freeze_vocabulary
from nemo_minitron.models.gpt import MegatronGPTModel, Report
from nemo_minitron.models.losses import main_gradient, sequence_first, tensor_group
from nemo_minitron.models.ramp import at_step
from nemo_minitron.ops.divergence import Divergence
from nemo_minitron.parallel.fused_linear_sparse_kd import fused_linear_sparse_kd


@dataclass(frozen=True, kw_only=True)
class CachedDistillationLoss:
    """`kd_weight * D + lm_weight * CE` from stored targets, in nats, summed over kept tokens.

    Attributes:
        student: The student's chunk that owns the output layer.
        targets: Stored targets of each micro-batch's samples.
        divergence: D, at the temperature of the targets.
        vocab_size: Real vocabulary; padded columns carry no probability.
        tensor_group: Ranks that share the vocabulary; None when it is whole.
        kd_weight: Factor of D.
        lm_weight: Factor of the student's next-token cross-entropy.
        chunk_tokens: Tokens whose logits exist at one time; None chooses.
    """

    student: MinitronGPT
    targets: Sequence[Sequence[SampleTargets]]
    divergence: Divergence
    vocab_size: int
    tensor_group: ProcessGroup | None
    kd_weight: float = 1.0
    lm_weight: float = 0.0
    chunk_tokens: int | None = None

    def __call__(self, hidden_SBH: Tensor, micro_batch: MicroBatch, index: int) -> LossResult:
        """Loss of micro-batch `index` from the student's states after the final norm, `[s, b, h]`."""
        targets = sparse_targets(
            self.targets[index],
            micro_batch.on_host.position_ids,
            temperature=self.divergence.temperature,
            device=hidden_SBH.device,
        )
        weight = self.student.output_weight()
        result = fused_linear_sparse_kd(
            hidden_SBH.flatten(0, 1),
            overlap.for_loss(weight),
            targets,
            keep=sequence_first(micro_batch.on_host.keep),
            labels=sequence_first(micro_batch.labels),
            divergence=self.divergence,
            kd_weight=self.kd_weight,
            lm_weight=self.lm_weight,
            vocab_size=self.vocab_size,
            chunk_tokens=self.chunk_tokens,
            tp=self.tensor_group,
            weight_gradient=main_gradient(weight),
            statistics=True,
        )
        assert result.student_ce_sum is not None, "statistics and labels were given"
        report = {"loss": result.loss_sum.detach(), "kd": result.kd_sum, "ce": result.student_ce_sum}
        return LossResult(total=overlap.ready_after(result.loss_sum, weight), tokens=result.tokens, report=report)


class MegatronGPTCachedDistillationModel(MegatronGPTModel):
    """A `MegatronGPTModel` that learns from a cache of its teacher's targets; no teacher is in memory.

    Args:
        cfg: The student's configuration. `minitron.distillation` holds `cache` (a folder), `kd_weight`, `lm_weight`,
            `ramp_to`, `divergence`, `freeze_embeddings` and `loss_chunk_tokens`.
        trainer: Optional; its strategy must be a `MegatronStrategy`. Its data are those the cache was made of, in
            order: every sample's tokens are compared with the checksum stored beside its targets.

    A step logs `kd` and `ce` in nats a token. Of sampled targets `kd` exceeds the divergence from the teacher by what
    the draws miss of its entropy. Validation is over text that has no targets, and has the cross-entropy alone.
    """

    objective = "loss"

    def __init__(self, cfg: DictConfig, trainer: Trainer | None = None) -> None:
        super().__init__(cfg=cfg, trainer=trainer)
        self._cache: TargetCache | None = None

    @property
    def distillation(self) -> Any:
        """The `minitron.distillation` block of the configuration."""
        return self._cfg.get("minitron", {}).get("distillation", {})

    @property
    def cache(self) -> TargetCache:
        """The targets; opened and compared with the model when first asked for.

        Raises:
            CacheError: It is none, is of another vocabulary, or a shard is missing.
        """
        if self._cache is None:
            cache = TargetCache(Path(self.distillation["cache"]))
            cache.check_fits(vocab_size=self.spec.vocab_size)
            cache.check()
            self._cache = cache
        return self._cache

    def configure_model(self) -> None:
        """Build the student."""
        super().configure_model()
        if self.distillation.get("freeze_embeddings"):
            for chunk in self.chunks:
                freeze_vocabulary(chunk)

    def run_schedule(self, batch: MicroBatch, *, training: bool) -> Report:
        """One pass; validation's loss is the cross-entropy."""
        report = super().run_schedule(batch, training=training)
        return report if training else {**report, "loss": report["ce"]}

    def make_loss(self, micro_batches: list[MicroBatch], *, training: bool) -> Callable[..., Any]:
        """Read the targets of the step's samples on the last pipeline stage, and bind them to the loss."""
        if not training:
            return super().make_loss(micro_batches, training=training)
        return CachedDistillationLoss(
            student=self.chunks[-1],
            targets=self._targets(micro_batches) if self.runtime.is_last_stage else (),
            divergence=Divergence(
                temperature=self.cache.manifest.temperature, **(self.distillation.get("divergence") or {})
            ),
            vocab_size=self.spec.vocab_size,
            tensor_group=tensor_group(self.runtime),
            kd_weight=at_step(self.distillation, "kd_weight", 1.0, self.trainer, training=training),
            lm_weight=at_step(self.distillation, "lm_weight", 0.0, self.trainer, training=training),
            chunk_tokens=self.distillation.get("loss_chunk_tokens"),
        )

    def _targets(self, micro_batches: list[MicroBatch]) -> list[list[SampleTargets]]:
        """Targets of this data-parallel rank's samples: step `g` takes samples `g * size` and following, in order."""
        share = sum(len(batch.tokens) for batch in micro_batches)
        first = (self.trainer.global_step * self.runtime.dp_size + self.runtime.dp_rank) * share
        found: list[list[SampleTargets]] = []
        for batch in micro_batches:
            own = range(first, first + len(batch.tokens))
            rows = batch.on_host.tokens.cpu().numpy()
            found.append([self.cache.get(sample, tokens) for sample, tokens in zip(own, rows, strict=True)])
            first = own.stop
        return found
