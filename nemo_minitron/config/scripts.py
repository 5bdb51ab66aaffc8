"""Sections of the hydra scripts in `examples/` that NeMo has no keys for."""

from pydantic import Field

from nemo_minitron.config.base import Count, Section
from nemo_minitron.config.run import ExportConfig, ExportFormat, ScoreConfig
from nemo_minitron.config.sites import FfnSite
from nemo_minitron.config.sizes import TargetConfig

_SCORE, _EXPORT = ScoreConfig(), ExportConfig()


class ScoringSection(Section):
    """What megatron_gpt_score.py measures, and where it writes the scores."""

    path: str = "scores.safetensors"
    samples: Count = _SCORE.samples
    ffn_site: FfnSite = _SCORE.ffn_site


class PruningSection(Section):
    """What megatron_gpt_prune.py cuts, and where it writes the student."""

    folder: str = "pruned"
    scores: str | None = None
    """A file of megatron_gpt_score.py; None measures them."""
    samples: Count = _SCORE.samples
    formats: tuple[ExportFormat, ...] = Field(default=_EXPORT.formats, min_length=1)
    target: TargetConfig = TargetConfig()
