"""Settings of a cache of the teacher's targets."""

from enum import StrEnum

from nemo_minitron.config.base import Count, Section
from nemo_minitron.config.objective import DivergenceKind
from nemo_minitron.config.training import DistillConfig


class TargetKind(StrEnum):
    """What a cache holds of the teacher's distribution."""

    SAMPLED = "sampled"
    """Counts of random draws: unbiased (arXiv:2503.16870)."""
    TOP_K = "top_k"
    """The likeliest ids, and the mass of the rest."""


class CacheConfig(Section):
    """Run the teacher once over the training samples and store its targets; distillation then needs no teacher."""

    kind: TargetKind = TargetKind.SAMPLED
    draws: Count = 50
    """Random draws per token of `sampled` targets. 50 give about 12 ids and 36 bytes (the same paper); a teacher that
    is less sure gives more, SmolLM2-135M on Wikipedia 17 ids and 52 bytes."""
    k: Count = 100
    """Ids a token of `top_k` targets; far fewer than 100 do harm (the same paper)."""
    micro_batch_size: Count = 1
    samples_per_shard: Count = 256
    """Samples of one file; what a stopped run loses at most."""
    folder: str | None = None
    """Where the cache lies, to be shared by several students; None: in the run folder."""

    @property
    def width(self) -> int:
        """Draws, or k."""
        return self.draws if self.kind is TargetKind.SAMPLED else self.k


def cache_problems(cache: CacheConfig, distill: DistillConfig, rounds: int) -> list[str]:
    """What a distillation asks for that a cache cannot give."""
    problems = []
    if distill.minutes is not None:
        problems.append("distill.minutes: a cache is made for a known number of samples; give distill.tokens")
    if cache.kind is TargetKind.SAMPLED and distill.divergence is not DivergenceKind.FORWARD_KL:
        problems.append(
            f"distill.divergence = {distill.divergence} from sampled targets: they are unbiased for forward_kl alone; "
            "cache.kind: top_k holds more"
        )
    if distill.ramp_to.temperature not in (None, distill.temperature):
        problems.append("distill.ramp_to.temperature: cached targets are of one temperature")
    if distill.hidden is not None:
        problems.append("distill.hidden: a cache holds no intermediate states; leave cache out")
    if distill.router_weight:
        problems.append("distill.router_weight: a cache holds no routers; leave cache out")
    if distill.top_k is not None:
        problems.append("distill.top_k is for a teacher in memory; set cache.kind: top_k and cache.k")
    if cache.folder is not None and rounds > 1:
        problems.append(f"cache.folder with rounds = {rounds}: each round sees other samples; leave cache.folder out")
    return problems
