"""What experts do to the tokens routed to them, token by token in float64, with no code of the package's."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class ExpertStatistics:
    """Of one layer: sums over tokens for each expert, and per neuron of each the values at routed tokens by sample."""

    output: list[float]
    routed: list[int]
    neurons: list[dict[int, list[Tensor]]]
    width: int

    def site(self, statistic: str, kind: str) -> Tensor:
        """A row of the site `expert_ffn`, `[experts * neurons]`."""
        rows = []
        for by_sample in self.neurons:
            total = torch.zeros(self.width, dtype=torch.float64)
            for values in by_sample.values():
                x = torch.stack(values)
                found = {
                    "mean": x.abs().mean(0),
                    "l2": x.square().sum(0).sqrt(),
                    "var": (x - x.mean(0)).square().mean(0),
                }[statistic]
                total += found if kind == "sum" else found.square()
            rows.append(total)
        return torch.cat(rows)


def statistics(mlp: nn.Module, inputs_BSH: Tensor, keep_BS: Tensor, config: object) -> ExpertStatistics:
    """Route every token by itself, and apply each chosen expert to it by itself.

    Args:
        mlp: A layer's block of experts in transformers, in float64; SwiGLU, or squared ReLU where there is no gate.
        inputs_BSH: What enters it.
        keep_BS: Which tokens count.
        config: Of the model in transformers.
    """
    router = mlp.gate.weight
    gated = hasattr(mlp.experts, "gate_up_proj")
    first, second = mlp.experts.gate_up_proj if gated else mlp.experts.up_proj, mlp.experts.down_proj
    count, width = router.shape[0], second.shape[2]
    bias = getattr(mlp.gate, "e_score_correction_bias", None)
    normalised = getattr(config, "norm_topk_prob", True)
    found = ExpertStatistics([0.0] * count, [0] * count, [{} for _ in range(count)], width)
    for sample, token in keep_BS.nonzero().tolist():
        x = inputs_BSH[sample, token]
        logits = [float(row @ x) for row in router]
        if bias is not None:
            scores = [1 / (1 + math.exp(-value)) for value in logits]
        else:
            exponents = [math.exp(value - max(logits)) for value in logits]
            scores = [value / sum(exponents) for value in exponents]
        order = sorted(range(count), key=lambda e: -(scores[e] + (0.0 if bias is None else float(bias[e]))))
        chosen = order[: config.num_experts_per_tok]
        whole = sum(scores[expert] for expert in chosen) if normalised else 1.0
        for expert in chosen:
            neurons = first[expert] @ x
            if gated:
                gate, up = neurons.chunk(2)
                neurons = gate * torch.sigmoid(gate) * up
            else:
                neurons = torch.where(neurons > 0, neurons, 0) ** 2
            weight = scores[expert] / whole * getattr(config, "routed_scaling_factor", 1.0)
            found.output[expert] += weight * math.sqrt(float((second[expert] @ neurons).square().sum()))
            found.routed[expert] += 1
            found.neurons[expert].setdefault(sample, []).append(neurons)
    return found
