"""Importance scores: the sums that a calibration pass leaves, as one file, and the importance of units from them.

For a site, a sample and a channel let `m`, `n`, `v` be mean |x|, L2 norm and variance over the sequence. A file holds,
for every site of every layer, the sums over samples of `m, m^2, n, n^2, v, v^2` (float64, one number per channel). All
nine (batch, sequence) aggregations of arXiv:2407.14679, sec. 2.2, follow from them. Names:

    layers.{i}.hidden.attention.{mean|l2|var}.{sum|sumsq}   output of the norm before attention     [hidden]
    layers.{i}.hidden.mlp....                               output of the norm before the MLP       [hidden]
    layers.{i}.ffn....                                      input of the second MLP matrix, or      [ffn]
                                                            argument of the activation (`ffn_site`)
    layers.{i}.head....                                     input of the attention output           [heads * head_dim]
    layers.{i}.expert_ffn....                               input of each expert's linear_fc2       [experts * its ffn]
    layers.{i}.shared_ffn....                               input of the shared expert's            [shared ffn]
    layers.{i}.expert.output.sum                            weight * |output| of each expert        [experts]
    layers.{i}.expert.routed.sum                            tokens routed to each expert            [experts]
    layers.{i}.hidden.mamba....                             output of the norm before Mamba         [hidden]
    layers.{i}.mamba....                                    x part of Mamba's input projection      [heads * head size]
    layers.{i}.block_influence.sum                          sum over tokens of 1 - cos(in, out)     []
    layers.{i}.block_influence.{part}.sum                   the same of the mixer, the feed-forward []
    layers.{i}.lm_loss.{part}.sum                           sum of nats without it                  []
    sublayers.lm_loss.{base|count}                          nats with all, and tokens               []
    samples, tokens                                         how many they rest on                   []
    depth....                                               see `pruning.depth`

Sums of other samples add up, so files that were made from parts of a calibration set merge into the file of the
complete. What concerns a part of a layer is there if it was asked for, for layers that have both.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from nemo_minitron.arch.axes import LAYER_AXES, SITES, TOKEN_SUMS, Axis, PrunableAxis, Scope, Site, row_of
from nemo_minitron.arch.layer import PARTS
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.checkpoints.files import staged_file
from nemo_minitron.checkpoints.safetensors_file import Entry, SafetensorsFile, SafetensorsWriter
from nemo_minitron.config.depth import BLOCK_INFLUENCE, LM_LOSS
from nemo_minitron.config.sites import Aggregation, ExpertMetric, FfnSite
from nemo_minitron.errors import CheckpointError, MinitronError, ScoresError
from nemo_minitron.ops.importance import SiteSums, aggregate, head_importance, kv_group_importance
from nemo_minitron.pruning.coverage import Coverage, read_coverage, united
from nemo_minitron.pruning.depth import PREFIX as DEPTH_PREFIX
from nemo_minitron.pruning.depth import DepthScores

FORMAT = "nemo_minitron.scores"
VERSION = "2"
READABLE = ("1", VERSION)
"""Version 1 knew one FFN site, the one after the activation, and not which samples it rests on."""

HIDDEN_SITES = tuple(site.name for site in SITES if not site.is_split)
"""Sites of which every tensor-parallel rank holds all channels."""

LOSSES = "sublayers.lm_loss"
"""What names of sums that all sublayer losses share begin with."""

_OTHER_SITES = {
    FfnSite.BEFORE_ACTIVATION: {
        "ffn": "output of mlp.linear_fc1 before the activation (the gate's, where there is one)"
    },
}
"""Sites that lie elsewhere than `arch.axes.SITES` says."""


_SITE_PLACES = {site.name: site.where for site in SITES} | TOKEN_SUMS


class Scores:
    """Scores of one model over one calibration set. They do not depend on any parallel layout.

    Args:
        spec: The model that was scored.
        tensors: The float64 sums by name; kept, not copied.
        ffn_site: What neurons were measured on.
        depth: What leaving layers out costs, if it was measured.
        provenance: JSON data: `data_digest`, `tokenizer_digest` and whatever else tells them apart. `calibration` lists
            the samples they rest on (`Coverage.to_dict`); only scores that have it can be merged.

    Raises:
        ScoresError: A sum is missing, unknown, of the wrong shape or not finite (names layer and site), or nothing was
            counted.
    """

    def __init__(
        self,
        spec: ModelSpec,
        tensors: Mapping[str, Tensor],
        *,
        ffn_site: FfnSite = FfnSite.AFTER_ACTIVATION,
        depth: DepthScores | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        self.spec = spec
        self.tensors = dict(tensors)
        self.ffn_site = FfnSite(ffn_site)
        self.depth = depth
        self.provenance = dict(provenance or {})
        _check(self.spec, self.tensors)

    @property
    def sites(self) -> dict[str, str]:
        """Where in a layer each site lies."""
        return {
            **{name: where for name, where in _SITE_PLACES.items() if name in self._measured},
            **{name: where for name, where in _OTHER_SITES.get(self.ffn_site, {}).items() if name in self._measured},
            "block_influence": "1 - cos(input, output) of the layer, summed over tokens",
        }

    @property
    def _measured(self) -> set[str]:
        """Sites that some layer has."""
        sites = {name for _, name, _ in site_names(self.spec)}
        return sites | {name for _, name, _ in token_sum_names(self.spec)}

    @property
    def coverage(self) -> tuple[Coverage, ...]:
        """The calibration samples they rest on; empty if that is not known."""
        return read_coverage(self.provenance)

    @property
    def samples(self) -> int:
        """Calibration samples."""
        return int(self.tensors["samples"])

    @property
    def tokens(self) -> int:
        """Calibration tokens that were kept."""
        return int(self.tensors["tokens"])

    def importance(
        self,
        axis: Axis,
        layer: int | None = None,
        *,
        batch: Aggregation | str = "l2",
        sequence: Aggregation | str = "mean",
        experts: ExpertMetric | str = ExpertMetric.REAP,
        kept: Mapping[Axis, Tensor] | None = None,
    ) -> Tensor:
        """Importance of each unit of an axis, `[units]`; higher is more important.

        Units of the model's own axes add up what all sites of all layers show, those of a layer's axes what its sites
        do. A head is the L2 norm over its channels, a unit that holds heads their sum; a layer is its block influence,
        on which aggregations have no say. A Mamba head is the L2 norm over its channels that stay, a channel of Mamba
        heads that over heads (arXiv:2504.11409, section 3.1).

        Args:
            axis: An axis of `arch.axes.PRUNABLE`.
            layer: For an axis of layers, which layer.
            batch: Aggregation over samples.
            sequence: Aggregation over the positions of a sample.
            experts: What experts are ranked by; aggregations have no say in it.
            kept: Units of other axes of the layer that stay, for axes that cross them; others count as complete.
        """
        row = row_of(axis)
        if axis is Axis.LAYER:
            return self.block_influence()
        if row.sums is not None:
            inside = self.importance(row.sums, layer, batch=batch, sequence=sequence, kept=kept)
            return kv_group_importance(inside, num_groups=self.spec.size(row, layer))
        if row.token_sums and layer is not None:
            return self._expert_importance(layer, ExpertMetric(experts))
        layers = range(self.spec.num_layers) if layer is None else (layer,)
        sites = [(index, site) for index in layers for site in row.sites if has_site(self.spec, site, index)]
        total = torch.stack([self._channels(index, site.name, batch, sequence) for index, site in sites]).sum(0)
        if row.crosses is not None and layer is not None:
            return self._crossed(total, row, layer, (kept or {}).get(row.crosses))
        return head_importance(total, head_dim=self.spec.head_dim) if row.is_head else total

    def _expert_importance(self, layer: int, metric: ExpertMetric) -> Tensor:
        output, routed = (self.tensors[f"layers.{layer}.{name}.sum"] for name in TOKEN_SUMS)
        match metric:
            case ExpertMetric.REAP:
                return output / routed.clamp_min(1)
            case ExpertMetric.OUTPUT:
                return output / self.tensors["tokens"]
            case ExpertMetric.FREQUENCY:
                return routed / self.tensors["tokens"]

    def block_influence(self) -> Tensor:
        """Mean over tokens of 1 - cos(input, output) of each layer `[layers]`; higher is more important.

        Source: Men et al., "ShortGPT", arXiv:2403.03853.
        """
        sums = [self.tensors[f"layers.{layer}.block_influence.sum"] for layer in range(self.spec.num_layers)]
        return torch.stack(sums) / self.tensors["tokens"]

    def sublayers(self, part: str, metric: str = "block_influence") -> dict[int, float]:
        """What a part is worth in each layer that has both: Block Influence, or what the loss rises by without it.

        Args:
            part: `mixer` or `feed_forward`.
            metric: `block_influence`, or `lm_loss` (nats per token).

        Raises:
            ScoresError: It was not measured.
        """
        layers = two_part_layers(self.spec)
        names = [f"layers.{layer}.{metric}.{part}.sum" for layer in layers]
        if any(name not in self.tensors for name in names):
            raise ScoresError(
                f"sublayer metric {metric} is not in the scores",
                rule="score.sublayers measures parts of layers",
                remedy="set score.sublayers=true and score again (--from score), or name the layers in a list",
            )
        base, count = torch.zeros(()), self.tensors["tokens"]
        if metric == LM_LOSS:
            base, count = (self.tensors[f"{LOSSES}.{which}"] for which in ("base", "count"))
        values = [(self.tensors[name] - base) / count for name in names]
        return {layer: float(value) for layer, value in zip(layers, values, strict=True)}

    def with_sums(self, sums: Mapping[str, Tensor]) -> "Scores":
        """The same with more sums, as of sublayers."""
        return Scores(
            self.spec, {**self.tensors, **sums}, ffn_site=self.ffn_site, depth=self.depth, provenance=self.provenance
        )

    def merge(self, *others: "Scores") -> "Scores":
        """The scores over all samples together: sums add up. What all agree on stays of the provenance.

        Raises:
            ScoresError: They are of another model, tokenizer or FFN site, share samples, or do not say which samples
                they rest on.
        """
        for other in others:
            _check_mergeable(self, other)
        everyone = (self, *others)
        coverage = united(part for scores in everyone for part in scores.coverage)
        depths = [scores.depth for scores in everyone if scores.depth is not None]
        return Scores(
            self.spec,
            {
                name: sum((other.tensors[name] for other in others), tensor)
                for name, tensor in self.tensors.items()
                if all(name in other.tensors for other in others)
            },
            ffn_site=self.ffn_site,
            depth=reduce(lambda left, right: left.merge(right), depths) if depths else None,
            provenance=_agreed([scores.provenance for scores in everyone])
            | {"calibration": [part.to_dict() for part in coverage]},
        )

    def check_made_for(self, spec: ModelSpec, *, tokenizer_digest: str | None = None) -> None:
        """Make sure that they are a model's.

        Args:
            spec: The model's architecture.
            tokenizer_digest: Of its tokenizer (`data.tokenizer.tokenizer_digest`); None, or scores that name none, skip
                the comparison.

        Raises:
            ScoresError: They are another model's, or were taken on text that another tokenizer cut.
        """
        if self.spec != spec:
            raise ScoresError(
                f"scores of another model (spec {self.spec.digest()[:12]}, this model {spec.digest()[:12]})",
                rule="scores and model have the same architecture",
                remedy="score this model",
            )
        own = self.provenance.get("tokenizer_digest")
        if own is not None and tokenizer_digest is not None and own != tokenizer_digest:
            raise ScoresError(
                f"scores of another tokenizer ({own[:12]}, this model's {tokenizer_digest[:12]})",
                rule="scores rest on text cut by the model's own tokenizer",
                remedy="score this model on token files made with its tokenizer",
            )

    def save(self, path: Path) -> None:
        """Write the file under a temporary name, then put it in place."""
        metadata = {
            "format": FORMAT,
            "version": VERSION,
            "spec": json.dumps(self.spec.to_dict(), sort_keys=True),
            "spec_digest": self.spec.digest(),
            "ffn_site": self.ffn_site.value,
            "sites": json.dumps(self.sites, sort_keys=True),
            "provenance": json.dumps(self.provenance, sort_keys=True),
        }
        tensors = self.tensors | (self.depth.tensors if self.depth is not None else {})
        entries = {name: Entry(torch.float64, tuple(tensor.shape)) for name, tensor in tensors.items()}
        with staged_file(path) as partial, SafetensorsWriter(partial, entries, metadata) as writer:
            for name, tensor in tensors.items():
                writer.write(name, tensor)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a file that `save` wrote.

        Raises:
            ScoresError: It is missing, damaged, of another format or version, or holds sums that cannot be.
        """
        try:
            file = SafetensorsFile(path)
            if file.metadata.get("format") != FORMAT or file.metadata.get("version") not in READABLE:
                raise ScoresError(
                    f"{path}: format {file.metadata.get('format')!r}, version {file.metadata.get('version')!r}",
                    rule=f"{FORMAT}, version {' or '.join(READABLE)}",
                    remedy="score again with this version",
                )
            spec = ModelSpec.from_dict(json.loads(file.metadata["spec"]))
            tensors = {name: file.get(name) for name in file.entries}
            return cls(
                spec,
                {name: tensor for name, tensor in tensors.items() if not name.startswith(DEPTH_PREFIX)},
                ffn_site=FfnSite(file.metadata.get("ffn_site", FfnSite.AFTER_ACTIVATION)),
                depth=DepthScores.from_tensors(spec, tensors),
                provenance=json.loads(file.metadata["provenance"]),
            )
        except ScoresError as error:
            raise ScoresError(_prefixed(error, path), rule=error.rule, remedy=error.remedy) from error
        except (KeyError, TypeError, ValueError, MinitronError) as error:
            what = error.what if isinstance(error, CheckpointError) else f"{path}: {error}"
            raise ScoresError(what, remedy="the file is damaged; score again") from error

    def _crossed(self, pairs: Tensor, row: PrunableAxis, layer: int, kept: Tensor | None) -> Tensor:
        """L2 norms of a site's pairs of units, `[units * crossed units]` of its own axis, over the crossed ones."""
        (site,) = row.sites
        grid = pairs.view(self.spec.size(row_of(site.axis), layer), -1)
        grid = grid if site.axis is row.axis else grid.t()
        norms: Tensor = torch.linalg.vector_norm(grid if kept is None else grid[:, kept], dim=1)
        return norms

    def _channels(self, layer: int, site: str, batch: Aggregation | str, sequence: Aggregation | str) -> Tensor:
        prefix = f"layers.{layer}.{site}.{Aggregation(sequence).value}"
        return aggregate(self.tensors[f"{prefix}.sum"], self.tensors[f"{prefix}.sumsq"], self.samples, batch)


def has_site(spec: ModelSpec, site: Site, layer: int) -> bool:
    """Whether a layer has the part that a site lies in, and the axis that is measured there."""
    sizes, row = spec.layers[layer], row_of(site.axis)
    part = getattr(sizes, site.part)
    if part is None or site.kind not in ("", type(part).__name__):
        return False
    return row.scope is Scope.MODEL or sizes.size(row) > 0


def site_channels(spec: ModelSpec, site: Site, layer: int) -> int:
    """Number of channels of a site."""
    row = row_of(site.axis)
    each = spec.head_dim if row.is_head else 1 if row.crosses is None else spec.size(row_of(row.crosses), layer)
    return (spec.size(row) if row.scope is Scope.MODEL else spec.units(row, layer)) * each


def site_names(spec: ModelSpec) -> Iterator[tuple[int, str, int]]:
    """Layer, name and number of channels of every site, in order."""
    for index in range(spec.num_layers):
        for site in SITES:
            if has_site(spec, site, index):
                yield index, site.name, site_channels(spec, site, index)


def token_sum_names(spec: ModelSpec) -> Iterator[tuple[int, str, int]]:
    """Layer, name and number of units of every sum over tokens by unit, in order."""
    for index, layer in enumerate(spec.layers):
        for row in LAYER_AXES:
            for name in row.token_sums if layer.size(row) else ():
                yield index, name, layer.units(row)


def two_part_layers(spec: ModelSpec) -> tuple[int, ...]:
    """Layers with a mixer and a feed-forward."""
    return tuple(index for index, layer in enumerate(spec.layers) if len(layer.parts) == len(PARTS))


def _optional(spec: ModelSpec) -> Iterator[dict[str, tuple[tuple[int, ...], str]]]:
    """Groups of sums of which all are there or none, as `_expected` gives them."""
    for metric in (BLOCK_INFLUENCE, LM_LOSS):
        found: dict[str, tuple[tuple[int, ...], str]] = {
            f"layers.{index}.{metric}.{part}.sum": ((), f"layer {index}, {metric} of its {part}")
            for index in two_part_layers(spec)
            for part in PARTS
        }
        if metric == LM_LOSS:
            found |= {f"{LOSSES}.{which}": ((), "sublayer losses") for which in ("base", "count")}
        yield found


def _expected(spec: ModelSpec) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and place (for messages) of every sum."""
    found: dict[str, tuple[tuple[int, ...], str]] = {"samples": ((), "samples"), "tokens": ((), "tokens")}
    for index, site, channels in site_names(spec):
        for row in SiteSums.ROWS:
            found[f"layers.{index}.{site}.{row}"] = ((channels,), f"layer {index}, site {site}")
    for index, name, units in token_sum_names(spec):
        found[f"layers.{index}.{name}.sum"] = ((units,), f"layer {index}, {name}")
    for index in range(spec.num_layers):
        found[f"layers.{index}.block_influence.sum"] = ((), f"layer {index}, block influence")
    return found


def _check(spec: ModelSpec, tensors: Mapping[str, Tensor]) -> None:
    expected = _expected(spec)
    for group in _optional(spec):
        if any(name in tensors for name in group):
            expected |= group
    if missing := [name for name in expected if name not in tensors]:
        raise ScoresError(f"scores: {len(missing)} sum(s) missing, {missing[0]} first")
    if extra := sorted(set(tensors) - set(expected)):
        raise ScoresError(f"scores: {len(extra)} sum(s) that the model has no site for, {extra[0]} first")
    for name, (shape, place) in expected.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != shape or tensor.dtype != torch.float64:
            raise ScoresError(
                f"scores: {name} is {tensor.dtype} shaped {tuple(tensor.shape)}", rule=f"float64 shaped {shape}"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise ScoresError(
                f"scores: NaN or infinity at {place} ({name})",
                rule="activations are finite",
                remedy="look for overflow in that layer; calibrate in bf16 or fp32, not fp16",
            )
    for name in ("samples", "tokens"):
        if float(tensors[name]) < 1:
            raise ScoresError(f"scores: {name} = {float(tensors[name]):g}", rule="at least 1")


def _check_mergeable(first: Scores, other: Scores) -> None:
    digests = [scores.provenance.get("tokenizer_digest") for scores in (first, other)]
    differing = {
        "models": (first.spec.digest()[:12], other.spec.digest()[:12]),
        "FFN sites": (first.ffn_site.value, other.ffn_site.value),
        "tokenizers": tuple(str(digest)[:12] for digest in digests),
    }
    for what, (mine, others) in differing.items():
        if mine != others:
            raise ScoresError(
                f"scores of different {what}: {mine} and {others}",
                rule="scores that are merged measure the same thing on different samples",
                remedy="merge scores of one model, taken at the same sites on text cut by one tokenizer",
            )
    if not (first.coverage and other.coverage):
        raise ScoresError(
            "scores that do not say which calibration samples they rest on",
            rule="merging must know that no sample counts twice",
            remedy="score again with this version; with ImportanceCallback, pass coverage=Coverage.of(...)",
        )


def _agreed(provenances: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The entries that all have, with the same value."""
    first, *rest = provenances
    return {key: value for key, value in first.items() if all(key in one and one[key] == value for one in rest)}


def _prefixed(error: ScoresError, path: Path) -> str:
    return error.what if error.what.startswith(str(path)) else f"{path}: {error.what}"
