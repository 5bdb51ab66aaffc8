"""Time of ranking all layers by leaving each one out, against the naive way, on this machine's CPU.

    python -m benchmarks.depth_ranking [--tokens 512] [--threads 1] [--json]

Both rank the 30 layers of a random model of SmolLM2-135M's shape in fp32 by the rise of the loss on one text. The naive
way runs the model once for each layer, without it, from the embedding to the loss. Ours starts each run from the states
before the layer, which the complete model has computed, and scores the labels of as many candidates together as fill a
tile of the output layer. Layers, norm and loss are the same code. The two take turns, candidate by candidate, and the
ratio is one of CPU time, so that it holds on a machine that others use too. The complete model's own pass counts in
both.

Either way computes the output layer once a candidate, and here it costs as much as six or seven layers. So the ratio is
above one half; it comes nearer to it in models with more layers, wider ones, or a smaller vocabulary.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from nemo_minitron.arch.layer import transformer_layer
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.config.parallel import ParallelConfig, Precision
from nemo_minitron.megatron import runtime as megatron_runtime
from nemo_minitron.megatron.build import build_chunks
from nemo_minitron.megatron.depth_metrics import DepthCollector
from nemo_minitron.megatron.forward import MicroBatch
from nemo_minitron.megatron.model import MinitronGPT
from nemo_minitron.parallel.label_scores import label_scores
from nemo_minitron.pruning.depth import candidate_blocks

SMOLLM2_135M = ModelSpec(
    vocab_size=49152,
    hidden_size=576,
    head_dim=64,
    layers=(transformer_layer(num_attention_heads=9, num_query_groups=3, ffn_hidden_size=1536),) * 30,
    max_position_embeddings=8192,
    tied_embeddings=True,
)


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """One comparison; the names of the fields are those of the JSON line."""

    leave_one_out_over_naive: float
    """CPU seconds of ours over the naive way's."""
    largest_difference: float
    """Between the two ways' losses, nats per token, over all layers."""
    seconds: float
    """CPU seconds of ours."""
    naive_seconds: float
    layers: int
    tokens: int
    threads: int


def leave_one_out_over_naive(tokens: int = 512, threads: int = 1) -> float:
    """The ratio alone."""
    return compare(tokens=tokens, threads=threads).leave_one_out_over_naive


@torch.no_grad()
def compare(*, tokens: int, threads: int, spec: ModelSpec = SMOLLM2_135M) -> Ranking:
    """Rank the layers in both ways.

    Raises:
        AssertionError: The two ways differ by more than 1e-6 nats per token.
    """
    torch.set_num_threads(threads)
    here = megatron_runtime.start(ParallelConfig(), seed=0)
    (model,) = build_chunks(spec, here, Precision.FP32, trainable=False, seed=1)
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(spec.vocab_size, (1, tokens + 1), generator=generator)
    batch = MicroBatch.of(text[:, :-1], text[:, 1:], torch.ones(1, tokens, dtype=torch.bool))
    _naive(model, batch, None)  # both find their buffers and caches ready

    start = time.process_time()
    collector = DepthCollector([model], here, spec, blocks=candidate_blocks(spec.num_layers))
    turns = _Turns(collector, model, batch)
    collector.add(batch)
    ours = collector.result()
    naive_seconds = turns.seconds
    seconds = time.process_time() - start - naive_seconds
    base, *without = turns.losses

    rises = (torch.stack(without) - base) / tokens
    difference = (ours.layers("lm_loss") - rises).abs().max().item()
    assert difference <= 1e-6, f"the two ways differ by {difference} nats per token"
    return Ranking(
        leave_one_out_over_naive=seconds / naive_seconds,
        largest_difference=difference,
        seconds=seconds,
        naive_seconds=naive_seconds,
        layers=spec.num_layers,
        tokens=tokens,
        threads=threads,
    )


class _Turns:
    """Lets a naive pass follow each of the collector's candidates, so that both ways see the same machine."""

    def __init__(self, collector: DepthCollector, model: MinitronGPT, batch: MicroBatch) -> None:
        self.seconds = 0.0
        self.losses: list[Tensor] = []
        outputs = collector._skipper.outputs

        def in_turns(micro_batch: MicroBatch) -> Iterator[tuple[int, Tensor]]:
            for index, states in outputs(micro_batch):
                yield index, states
                start = time.process_time()
                self.losses.append(_naive(model, batch, index - 1 if index else None))
                self.seconds += time.process_time() - start

        collector._skipper.outputs = in_turns


def _naive(model: MinitronGPT, batch: MicroBatch, skip: int | None) -> Tensor:
    """Summed loss of a complete pass, without a layer if one is named."""
    x_SBH, rotary = model._preprocess(input_ids=batch.tokens, position_ids=batch.position_ids)[:2]
    for number, layer in enumerate(model.decoder.layers):
        if number != skip:
            x_SBH, _ = layer(hidden_states=x_SBH, attention_mask=None, rotary_pos_emb=rotary)
    scores = label_scores(
        model.decoder.final_layernorm(x_SBH).flatten(0, 1),
        model.output_weight(),
        batch.labels.t().flatten(),
        vocab_size=model.spec.vocab_size,
    )
    return scores.nats.sum()


def main() -> None:
    """Print one line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--tokens", type=int, default=512, help="length of the text")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print every figure as one line of JSON")
    arguments = parser.parse_args()
    result = compare(tokens=arguments.tokens, threads=arguments.threads)
    if arguments.json:
        print(json.dumps(asdict(result)))
    else:
        print(
            f"leave-one-out over naive {result.leave_one_out_over_naive:.3f} ({result.seconds:.1f} and "
            f"{result.naive_seconds:.1f} CPU seconds), largest difference "
            f"{result.largest_difference:.1e} nats per token"
        )


if __name__ == "__main__":
    main()
