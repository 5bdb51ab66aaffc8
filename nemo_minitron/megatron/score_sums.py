"""Where the sums of a complete model's scores lie on its ranks: put together for a file, and dealt out again.

A rank holds the sums of its own layers. Those of `ffn`, `head`, `mamba`, `shared_ffn` and `expert_ffn` are split over
tensor-parallel ranks by channel, and the last over expert-parallel ranks too; all ranks of a tensor-parallel group hold
equal sums of the hidden sites, and all context-parallel ranks equal sums of every site, so only one of them is counted
(of `expert_ffn`, those that have the same experts). Data-parallel ranks hold sums of different samples, which add up.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_minitron.arch.axes import SITES
from nemo_minitron.arch.layer import PARTS
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.errors import ScoresError
from nemo_minitron.megatron.expert_sums import EXPERT_FFN
from nemo_minitron.megatron.runtime import Runtime
from nemo_minitron.ops.importance import SiteSums
from nemo_minitron.pruning.scores import (
    HIDDEN_SITES,
    has_site,
    site_channels,
    site_names,
    token_sum_names,
    two_part_layers,
)

Site = tuple[int, str]
"""Global layer number from 0, and site."""

PASSED = ("hidden.attention", "head", "hidden.mamba", "mamba", "hidden.mlp", "ffn", "shared_ffn")
"""Sites of a layer in the order in which a forward pass meets them; those of routed experts apart."""
_SITES = {site.name: site for site in SITES}


@dataclass(slots=True)
class RankSums:
    """What one rank has summed up, float64."""

    sites: dict[Site, Tensor]
    """The six rows of each site, `[6, channels of this rank]`."""
    influence: dict[int, Tensor]
    """By layer, a scalar; of this rank's positions."""
    samples: Tensor
    tokens: Tensor
    parts: dict[tuple[int, str], Tensor] | None = None
    """As `influence`, by layer and part, of layers that have both; None where it is not measured."""
    experts: dict[Site, Tensor] = field(default_factory=dict)
    """Of each sum over tokens by expert, `[experts of this rank]`."""


def rank_channels(site: str, layer: int, spec: ModelSpec, runtime: Runtime) -> int:
    """How many channels of a site this rank sees."""
    row = _SITES[site]
    ranks = runtime.parallel.tensor if row.is_split else 1
    if site == EXPERT_FFN:
        ranks *= runtime.parallel.expert
    return site_channels(spec, row, layer) // ranks


def _experts_of(layer: int, spec: ModelSpec, runtime: Runtime) -> slice:
    """This rank's experts of a layer."""
    count = spec.layers[layer].moe.num_experts // runtime.parallel.expert
    return slice(runtime.ep_rank * count, (runtime.ep_rank + 1) * count)


def _of_rank(rows: Tensor, site: Site, spec: ModelSpec, runtime: Runtime) -> Tensor:
    """This rank's part of a site's rows `[6, channels]`, as a view."""
    number, name = site
    if name in HIDDEN_SITES:
        return rows
    if name == EXPERT_FFN:
        cube = rows.view(len(rows), spec.layers[number].moe.num_experts, -1)
        width = cube.shape[2] // runtime.parallel.tensor
        start = runtime.tp_rank * width
        return cube[:, _experts_of(number, spec, runtime), start : start + width]
    width = rank_channels(name, number, spec, runtime)
    return rows[:, runtime.tp_rank * width : (runtime.tp_rank + 1) * width]


def passed_sites(layer: int, spec: ModelSpec) -> list[str]:
    """The sites that a layer has, in the order in which a forward pass meets them."""
    return [site for site in PASSED if has_site(spec, _SITES[site], layer)]


def gather(mine: RankSums, spec: ModelSpec, runtime: Runtime) -> dict[str, Tensor]:
    """The complete model's sums under the names of `pruning.scores`, on the CPU, the same on every rank. Collective.

    Raises:
        ScoresError: A sum is NaN or infinite; names layer and site.
    """
    flat = _reduced(mine, spec, runtime)
    found: dict[str, Tensor] = {}
    size = 0
    for (number, site), channels, place in _layout(spec):
        _check_finite(flat[place], f"layer {number}, site {site}")
        found |= SiteSums(flat[place].view(-1, channels).clone()).named(f"layers.{number}.{site}")
        size = place.stop
    for (number, name), _, place in _token_layout(spec, size):
        _check_finite(flat[place], f"layer {number}, {name}")
        found[f"layers.{number}.{name}.sum"] = flat[place].clone()
        size = place.stop
    for number in range(spec.num_layers):
        _check_finite(flat[size + number], f"layer {number}, block influence")
        found[f"layers.{number}.block_influence.sum"] = flat[size + number].clone()
    if mine.parts is not None:
        for index, (number, part) in enumerate(_part_keys(spec), start=size + spec.num_layers):
            _check_finite(flat[index], f"layer {number}, block influence of its {part}")
            found[f"layers.{number}.block_influence.{part}.sum"] = flat[index].clone()
    return found | {"samples": flat[-2].clone(), "tokens": flat[-1].clone()}


def deal_out(whole: Mapping[str, Tensor], layers: Iterable[int], spec: ModelSpec, runtime: Runtime) -> RankSums:
    """A rank's part of what `gather` gave, so that gathering again gives the same; not collective.

    One data-parallel rank gets everything and the others zeros.

    Args:
        whole: The sums of the complete model.
        layers: Global numbers of this rank's layers.
        spec: Architecture of the complete model.
        runtime: The running layout; need not be the one the sums were gathered at.
    """
    device, first = runtime.device, runtime.dp_rank == 0
    # Of experts, the first data- and context-parallel rank that has them.
    first_of_experts = runtime.dp_rank * runtime.parallel.context + runtime.cp_rank < runtime.parallel.expert
    sites, influence, experts = {}, {}, {}
    numbers = list(layers)
    for number, site, _ in site_names(spec):
        if number in numbers:
            rows = torch.stack([whole[f"layers.{number}.{site}.{row}"] for row in SiteSums.ROWS])
            part = _of_rank(rows, (number, site), spec, runtime).reshape(len(rows), -1).clone()
            mine = first_of_experts if site == EXPERT_FFN else first
            sites[number, site] = (part if mine else torch.zeros_like(part)).to(device, torch.float64)
    for number, name, _ in token_sum_names(spec):
        if number in numbers:
            part = whole[f"layers.{number}.{name}.sum"][_experts_of(number, spec, runtime)].clone()
            mine = first_of_experts and runtime.tp_rank == 0
            experts[number, name] = (part if mine else torch.zeros_like(part)).to(device, torch.float64)
    for number in numbers:
        counted = first and runtime.tp_rank == 0 and runtime.cp_rank == 0
        total = whole[f"layers.{number}.block_influence.sum"] if counted else torch.zeros(())
        influence[number] = total.clone().to(device, torch.float64)
    parts: dict[tuple[int, str], Tensor] = {}
    for key in _part_keys(spec):
        name = f"layers.{key[0]}.block_influence.{key[1]}.sum"
        if key[0] in influence and name in whole:
            counted = first and runtime.tp_rank == 0 and runtime.cp_rank == 0
            total = whole[name] if counted else torch.zeros(())
            parts[key] = total.clone().to(device, torch.float64)
    counts = [(whole[name] if first else torch.zeros(())).clone() for name in ("samples", "tokens")]
    samples, tokens = (count.to(device, torch.float64) for count in counts)
    return RankSums(sites, influence, samples, tokens, parts, experts)


def _layout(spec: ModelSpec) -> Iterator[tuple[Site, int, slice]]:
    """Where each site's six rows of channels lie in the flat tensor: site, channels, place."""
    start = 0
    for number, site, channels in site_names(spec):
        size = len(SiteSums.ROWS) * channels
        yield (number, site), channels, slice(start, start + size)
        start += size


def _token_layout(spec: ModelSpec, start: int) -> Iterator[tuple[Site, int, slice]]:
    """Where the sums over tokens lie behind the sites: name, units, place."""
    for number, name, units in token_sum_names(spec):
        yield (number, name), units, slice(start, start + units)
        start += units


def _part_keys(spec: ModelSpec) -> list[tuple[int, str]]:
    return [(number, part) for number in two_part_layers(spec) for part in PARTS]


def _reduced(mine: RankSums, spec: ModelSpec, runtime: Runtime) -> Tensor:
    """Every sum of the complete model in one flat tensor, added up over all ranks, each part counted once."""
    places = list(_layout(spec))
    size = places[-1][2].stop
    tokens_of = list(_token_layout(spec, size))
    size = tokens_of[-1][2].stop if tokens_of else size
    keys = [] if mine.parts is None else _part_keys(spec)
    flat = torch.zeros(size + spec.num_layers + len(keys) + 2, dtype=torch.float64, device=runtime.device)
    once_a_copy = runtime.cp_rank == 0  # sums over a sequence are complete on every context-parallel rank
    for site, channels, place in places:
        values = mine.sites.get(site)
        counted = runtime.cp_rank < runtime.parallel.expert if site[1] == EXPERT_FFN else once_a_copy
        if values is None or not counted or (site[1] in HIDDEN_SITES and runtime.tp_rank != 0):
            continue
        part = _of_rank(flat[place].view(-1, channels), site, spec, runtime)
        part.copy_(values.view(part.shape))
    for site, _, place in tokens_of:
        if site in mine.experts and runtime.tp_rank == 0:  # of the tokens that its expert-parallel group has
            flat[place][_experts_of(site[0], spec, runtime)] = mine.experts[site]
    if runtime.parallel.sequence_parallel or runtime.tp_rank == 0:
        for number, total in mine.influence.items():
            flat[size + number] = total
        for key, total in (mine.parts or {}).items():
            flat[size + spec.num_layers + keys.index(key)] = total
    if once_a_copy and runtime.tp_rank == 0 and runtime.is_first_stage:
        flat[-2], flat[-1] = mine.samples, mine.tokens
    dist.all_reduce(flat)
    return flat.cpu()


def _check_finite(sums: Tensor, place: str) -> None:
    if not bool(torch.isfinite(sums).all()):
        raise ScoresError(
            f"NaN or infinity in the activations of {place}",
            rule="every activation is a finite number",
            remedy="check that the weights were loaded; score in bf16 or fp32, not fp16",
        )
