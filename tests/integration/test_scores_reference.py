"""Scores against a float64 reference written from the paper, on what `transformers` computes.

The forward pass is ours in fp32 and theirs in float64, so the tolerance covers a complete model's rounding.
"""

import itertools

import pytest
import torch
from transformers import PreTrainedModel

from nemo_minitron.config.load import load_recipe
from nemo_minitron.data.assets import resolve
from nemo_minitron.ops.importance import aggregate
from tests.oracles import importance as oracle
from tests.parallel.hooks_jobs import score_tokens
from tests.ranks import run_on_ranks
from tests.support.real_model import DEMO, theirs
from tests.tiny import write_qwen2

# Our site, the site of the reference, and at which choice of FFN site it is there.
SITES = (
    ("hidden.attention", "hidden.attention", "after_activation"),
    ("hidden.mlp", "hidden.mlp", "after_activation"),
    ("head", "head", "after_activation"),
    ("ffn", "ffn", "after_activation"),
    ("ffn", "gate", "before_activation"),
)


def samples(vocabulary):
    """Two samples, the second one masked from its 19th token on."""
    tokens = torch.randint(0, vocabulary, (2, 32), generator=torch.Generator().manual_seed(0))
    keep = torch.ones(2, 32, dtype=torch.bool)
    keep[1, 19:] = False
    return tokens, keep


def activations(model: PreTrainedModel, tokens, keep, starts=((0,), (0,))):
    """`{(layer, site): [[kept tokens, channels] of each sample]}`, float64; each document is run alone."""
    found = {}

    def note(key):
        return lambda module, args: found.setdefault(key, []).append(args[0].flatten(0, -2))

    for index, layer in enumerate(model.model.layers):
        layer.self_attn.o_proj.register_forward_pre_hook(note((index, "head")))
        layer.self_attn.q_proj.register_forward_pre_hook(note((index, "hidden.attention")))
        layer.mlp.up_proj.register_forward_pre_hook(note((index, "hidden.mlp")))
        layer.mlp.act_fn.register_forward_pre_hook(note((index, "gate")))
        layer.mlp.down_proj.register_forward_pre_hook(note((index, "ffn")))
        layer.register_forward_pre_hook(note((index, "in")))
        layer.register_forward_hook(
            lambda module, args, out, i=index: note((i, "out"))(module, out if isinstance(out, tuple) else (out,))
        )
    counts = []
    with torch.no_grad():
        for sample, mask, begins in zip(tokens, keep, starts, strict=True):
            # Causal: what follows the kept tokens is not seen.
            spans = list(itertools.pairwise([*begins, int(mask.sum())]))
            for first, stop in spans:
                model(sample[None, first:stop], use_cache=False)
            counts.append(len(spans))
    return {key: joined(parts, counts) for key, parts in found.items()}


def joined(parts, counts):
    """The documents of each sample together."""
    left = iter(parts)
    return [torch.cat(list(itertools.islice(left, count))) for count in counts]


def assert_scores_are_the_papers(model: PreTrainedModel, scored, tokens, keep, starts=((0,), (0,))):
    found = activations(model.double(), tokens, keep, starts)
    for layer in range(model.config.num_hidden_layers):
        for site, theirs_site, ffn_site in SITES:
            sums = scored[ffn_site]
            single = [oracle.sample_statistics(rows) for rows in found[layer, theirs_site]]
            for sequence in ("mean", "l2", "var"):
                values = [sample[sequence] for sample in single]
                prefix = f"layers.{layer}.{site}.{sequence}"
                second_moment = oracle.over_samples(values, "l2") ** 2 / len(values)
                for batch in ("mean", "l2", "var"):
                    got = aggregate(sums[f"{prefix}.sum"], sums[f"{prefix}.sumsq"], sums["samples"], batch)
                    expected = oracle.over_samples(values, batch)
                    # A variance over samples is a small difference of large moments, whatever computes it.
                    size = second_moment if batch == "var" else expected
                    off = (got - expected).abs()
                    place = f"{prefix}, {batch} over samples ({theirs_site})"
                    assert off.norm() < 1e-5 * size.norm(), place
                    # In a single channel a square carries twice the forward pass's error, which the library decides.
                    assert (off < (3e-5 if sequence == "var" else 2e-5) * (size + size.mean())).all(), place
        change = [oracle.block_influence(*pair) for pair in token_lists(found, layer)]
        weights = keep.sum(-1).tolist()
        expected = sum(one * weight for one, weight in zip(change, weights, strict=True)) / sum(weights)
        got = scored["after_activation"][f"layers.{layer}.block_influence.sum"].item() / sum(weights)
        assert got == pytest.approx(expected, rel=1e-5), f"block influence of layer {layer}"


def token_lists(found, layer):
    return ([rows.tolist() for rows in pair] for pair in zip(found[layer, "in"], found[layer, "out"], strict=True))


def test_a_model_with_qkv_bias(tmp_path):
    model = write_qwen2(tmp_path / "hf")
    tokens, keep = samples(256)
    assert any(layer.self_attn.q_proj.bias.abs().max() > 0.1 for layer in model.model.layers)
    (scored,) = run_on_ranks(1, score_tokens, tmp_path / "hf", tokens, keep)
    assert_scores_are_the_papers(model, scored, tokens, keep)


def test_samples_of_several_documents(tmp_path):
    """What each document gives alone; a sample is all of its documents."""
    model = write_qwen2(tmp_path / "hf")
    tokens, keep = samples(256)
    starts = ((0, 9, 10, 27), (0, 14))
    begins = torch.zeros_like(tokens)
    for sample, own in enumerate(starts):
        begins[sample, list(own)] = torch.tensor(own)
    positions = torch.arange(32) - begins.cummax(1).values
    (scored,) = run_on_ranks(1, score_tokens, tmp_path / "hf", tokens, keep, positions)
    assert_scores_are_the_papers(model, scored, tokens, keep, starts)


@pytest.mark.model
@pytest.mark.slow
def test_smollm2():
    gguf = resolve(load_recipe(DEMO).model.source)
    tokens, keep = samples(49152)
    (scored,) = run_on_ranks(1, score_tokens, gguf, tokens, keep)
    assert_scores_are_the_papers(theirs(gguf), scored, tokens, keep)
