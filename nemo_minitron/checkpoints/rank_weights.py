"""NeMo-1's older layouts: one `model_weights.ckpt` a rank, merged by the weight table.

    model_weights.ckpt                               one rank
    mp_rank_00/model_weights.ckpt, tp_rank_00/...    tensor parallel
    tp_rank_00_pp_rank_000/model_weights.ckpt        tensor and pipeline parallel

Names are Megatron-Core's (of either layer specification) or those of NeMo's own Megatron before it. Layers are counted
from 0 on every pipeline stage.
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_minitron.arch.axes import Packing
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.arch.weights import Weight, part_shapes, weights
from nemo_minitron.checkpoints.files import Files
from nemo_minitron.checkpoints.megatron_weights import EMBEDDING, check_names, check_shape
from nemo_minitron.checkpoints.parts import widest
from nemo_minitron.checkpoints.torch_file import TorchFile
from nemo_minitron.errors import CheckpointError

FILE = "model_weights.ckpt"
_FOLDER = re.compile(r"^(?:(?:mp|tp)_rank_(\d+)(?:_(?:pp_rank_)?(\d+))?/)?model_weights\.ckpt$")
_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.(.+)$")
_PREFIX = re.compile(r"^(?:model\.|module\.)*")
_OUTPUT = "output_layer.weight"

# Older and local names to those of the weight table, in this order.
_RENAMES = tuple(
    (re.compile(pattern), new)
    for pattern, new in (
        (r"^language_model\.embedding\.", "embedding."),
        (r"^language_model\.(?:encoder|decoder)\.", "decoder."),
        (r"^language_model\.output_layer\.", "output_layer."),
        (r"^word_embeddings\.weight$", _OUTPUT),  # the last stage's copy of a tied embedding
        (r"^(decoder\.layers\.\d+)\.input_layernorm\.", r"\1.self_attention.linear_qkv.layer_norm_"),
        (r"^(decoder\.layers\.\d+)\.(?:pre_mlp|post_attention)_layernorm\.", r"\1.mlp.linear_fc1.layer_norm_"),
        (r"\.self_attention\.query_key_value\.", ".self_attention.linear_qkv."),
        (r"\.self_attention\.dense\.", ".self_attention.linear_proj."),
        (r"\.mlp\.dense_h_to_4h\.", ".mlp.linear_fc1."),
        (r"\.mlp\.dense_4h_to_h\.", ".mlp.linear_fc2."),
    )
)
_DERIVED = re.compile(r"rotary_(?:pos_)?emb.*\.inv_freq$|\.core_attention\.|\.attention_mask$")


def has_rank_files(files: Files) -> bool:
    """Whether a checkpoint is in one of the older layouts."""
    return any(name.rpartition("/")[2] == FILE for name in files.names())


@dataclass(frozen=True)
class _Stage:
    """The files of one pipeline stage by tensor-parallel rank, and the stored name of each canonical one."""

    files: tuple[TorchFile, ...]
    names: dict[str, str]


class RankWeights:
    """Weights in one file per rank.

    Raises:
        CheckpointError: A rank's file is missing or damaged, asks for code, or ranks do not agree about what they hold.
    """

    def __init__(self, files: Files) -> None:
        self.label = files.label
        self._stages = _stages(files)
        tensor, pipeline = len(self._stages[0].files), len(self._stages)
        self.layout = f"a file per rank (tensor parallel {tensor}, pipeline {pipeline})"
        self._places: dict[str, tuple[_Stage, str]] = {}
        first_layer = 0
        for stage in self._stages:
            layers = [int(match.group(1)) for name in stage.names if (match := _LAYER.match(name))]
            for name, stored in stage.names.items():
                match = _LAYER.match(name)
                whole = (
                    name if match is None else f"decoder.layers.{first_layer + int(match.group(1))}.{match.group(2)}"
                )
                self._places.setdefault(whole, (stage, stored))
            first_layer += max(layers, default=-1) + 1
        if EMBEDDING not in self._places:
            raise CheckpointError(f"{self.label}: has no {EMBEDDING}", rule="the weights of a GPT model")

    def vocab_rows(self) -> int:
        """Rows of the embedding, padding included."""
        stage, stored = self._places[EMBEDDING]
        return sum(_shape(file, stored)[0] for file in stage.files)

    def check(self, spec: ModelSpec) -> None:
        """Compare names and merged shapes with those that a model has.

        Raises:
            CheckpointError: A weight is missing, unknown or of another shape.
        """
        expected = {weight.name: weight for weight in weights(spec)}
        found = set(self._places) - ({_OUTPUT} if spec.tied_embeddings else set())
        check_names(expected.keys(), found, label=self.label)
        for weight in expected.values():
            self._check_shapes(weight)

    def dtype(self, spec: ModelSpec) -> torch.dtype:
        """Type that holds every weight of the model exactly."""
        places = [self._places[weight.name] for weight in weights(spec) if not weight.row.fp32]
        return widest([file.entries[stored].dtype for stage, stored in places for file in stage.files])

    def get(self, weight: Weight, spec: ModelSpec) -> Tensor:
        """One canonical tensor, put together from its ranks' shards; of a padded vocabulary only the real rows."""
        stage, stored = self._places[weight.name]
        dim = weight.row.tensor_parallel_dim
        if dim is None or len(stage.files) == 1:
            return stage.files[0].get(stored)[: weight.shape[0]].contiguous()
        shards = [file.get(stored) for file in stage.files]
        if weight.row.packing not in (Packing.PLAIN, Packing.QKV):  # a rank holds its share of each part
            rows = [shape[0] // len(shards) for shape in part_shapes(weight, spec)]
            ranks = [torch.split(shard, rows) for shard in shards]
            return torch.cat([part for of_ranks in zip(*ranks, strict=True) for part in of_ranks])
        return torch.cat(shards, dim)[: weight.shape[0]].contiguous()

    def _check_shapes(self, weight: Weight) -> None:
        stage, stored = self._places[weight.name]
        shapes = {_shape(file, stored) for file in stage.files}
        where = f"{self.label}: {weight.name}"
        if len(shapes) > 1:
            raise CheckpointError(f"{where} has different shapes on its ranks: {sorted(shapes)}")
        merged = list(shapes.pop())
        dim = weight.row.tensor_parallel_dim
        if dim is not None and len(merged) == len(weight.shape):
            merged[dim] *= len(stage.files)
        check_shape(weight, tuple(merged), weight.shape, where=where)


def _stages(files: Files) -> list[_Stage]:
    ranks: dict[int, dict[int, str]] = {}
    for name in files.names():
        if name.rpartition("/")[2] != FILE:
            continue
        match = _FOLDER.match(name)
        if match is None:
            raise CheckpointError(
                f"{files.label}: {name} is of no known rank", rule="tp_rank_00_pp_rank_000/ or mp_rank_00/"
            )
        tensor, pipeline = (int(number or 0) for number in match.groups())
        if tensor in ranks.setdefault(pipeline, {}):
            raise CheckpointError(f"{files.label}: {name} and {ranks[pipeline][tensor]} are of the same rank")
        ranks[pipeline][tensor] = name
    sizes = {len(stage) for stage in ranks.values()}
    whole = len(sizes) == 1 and all(sorted(stage) == list(range(len(stage))) for stage in ranks.values())
    if not whole or sorted(ranks) != list(range(len(ranks))):
        raise CheckpointError(
            f"{files.label}: files of some ranks are missing",
            rule="every tensor-parallel rank of every pipeline stage, counted from 0",
        )
    return [_stage(files, ranks[pipeline]) for pipeline in sorted(ranks)]


def _stage(files: Files, ranks: dict[int, str]) -> _Stage:
    opened = tuple(TorchFile(files, ranks[tensor]) for tensor in sorted(ranks))
    for other in opened[1:]:
        if set(other.entries) != set(opened[0].entries):
            raise CheckpointError(f"{other.label}: holds other weights than {opened[0].label}")
    names = {_canonical(stored): stored for stored in opened[0].entries if not _DERIVED.search(stored)}
    return _Stage(opened, names)


def _canonical(stored: str) -> str:
    name = _PREFIX.sub("", stored)
    for pattern, new in _RENAMES:
        name = pattern.sub(new, name)
    return name


def _shape(file: TorchFile, stored: str) -> tuple[int, ...]:
    return file.entries[stored].shape
