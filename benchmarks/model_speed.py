"""Tokens per second of our Megatron model against transformers' Llama, on the shapes of SmolLM2-135M.

The two take turns, so that a busy machine slows both; read the ratios. With `--threads 1` it is the thread's CPU time
that counts, which other processes change less. Weights are random, which changes no speed.

    python benchmarks/model_speed.py --precision bf16 --rounds 5 --threads 2
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nemo_minitron.arch.layer import transformer_layer
from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.config.parallel import ParallelConfig, Precision
from nemo_minitron.megatron import runtime
from nemo_minitron.megatron.build import build_chunks, torch_dtype

SPEC = ModelSpec(
    vocab_size=49152,
    hidden_size=576,
    head_dim=64,
    layers=(transformer_layer(num_attention_heads=9, num_query_groups=3, ffn_hidden_size=1536),) * 30,
    max_position_embeddings=8192,
    rotary_base=100000.0,
    tied_embeddings=True,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--precision", type=Precision, default=Precision.BF16)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    here = runtime.start(ParallelConfig(), seed=0)
    ours = build_chunks(SPEC, here, args.precision, seed=0)[0]
    theirs = transformers_model().to(torch_dtype(args.precision))
    tokens = torch.randint(0, SPEC.vocab_size, (args.samples, args.length))
    positions = torch.arange(args.length).expand_as(tokens)

    def our_states() -> torch.Tensor:
        ours.output = "hidden"
        return ours(tokens, positions, None)

    def our_logits() -> torch.Tensor:
        ours.output = "logits"
        return ours(tokens, positions, None)

    contests = {
        "hidden states": (our_states, lambda: theirs.model(tokens, use_cache=False).last_hidden_state),
        "logits": (our_logits, lambda: theirs(tokens, use_cache=False).logits),
    }
    for name, runners in contests.items():
        for backward in (False, True):
            our_time, their_time = race(runners, backward, args.rounds)
            step = "forward + backward" if backward else "forward"
            rates = [tokens.numel() / seconds for seconds in (our_time, their_time)]
            print(
                f"{name:14} {step:18}  ours {rates[0]:6.0f}  transformers {rates[1]:6.0f}  x{rates[0] / rates[1]:.2f}"
            )
    runtime.stop()


def race(runners: tuple[Callable[[], torch.Tensor], ...], backward: bool, rounds: int) -> list[float]:
    """Median seconds of each, taking turns after one unmeasured round."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    times: list[list[float]] = [[] for _ in runners]
    for _ in range(rounds + 1):
        for mine, runner in zip(times, runners, strict=True):
            start = clock()
            with torch.set_grad_enabled(backward):
                output = runner()
            if backward:
                output.backward(torch.ones_like(output))
            mine.append(clock() - start)
    return [statistics.median(mine[1:]) for mine in times]


def transformers_model() -> LlamaForCausalLM:
    layer = SPEC.layer
    config = LlamaConfig(
        vocab_size=SPEC.vocab_size,
        hidden_size=SPEC.hidden_size,
        intermediate_size=layer.mlp.ffn_hidden_size,
        num_hidden_layers=SPEC.num_layers,
        num_attention_heads=layer.attention.num_attention_heads,
        num_key_value_heads=layer.attention.num_query_groups,
        head_dim=SPEC.head_dim,
        max_position_embeddings=SPEC.max_position_embeddings,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


if __name__ == "__main__":
    main()
