"""Pictures and figures of docs/depth.md: what a teacher loses without its layers, and what each metric would drop.

    python -m benchmarks.depth_curves RUN_FOLDER [--keep 24] [--tokens 5120] [--pictures docs/img]

The run folder holds a finished `score` stage with depth metrics and blocks. Prints a Markdown table: for each way to
choose, the layers that go and the held-out perplexity of the teacher without them (fp32, nothing trained), and writes
the two pictures.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from nemo_minitron.arch.axes import Axis
from nemo_minitron.config.load import load_recipe
from nemo_minitron.config.sizes import TargetConfig
from nemo_minitron.evaluation.perplexity import Perplexity, perplexity
from nemo_minitron.megatron.data import WindowDataset
from nemo_minitron.megatron.model import MinitronGPT
from nemo_minitron.models.gpt import MegatronGPTModel
from nemo_minitron.parallel.label_scores import label_scores
from nemo_minitron.pruning.depth import kept_layers
from nemo_minitron.pruning.scores import Scores
from nemo_minitron.report import figures
from nemo_minitron.report.content import Importance
from nemo_minitron.stages.report import depth_curves
from nemo_minitron.stages.session import make_trainer, restore

WINDOW = 512
CHOICES = {
    "block influence": TargetConfig(),
    "loss, layer by layer": TargetConfig(depth_metric="lm_loss"),
    "logit MSE, layer by layer": TargetConfig(depth_metric="logit_mse"),
    "loss, best block": TargetConfig(depth_metric="lm_loss", depth_contiguous=True),
    "logit MSE, best block": TargetConfig(depth_metric="logit_mse", depth_contiguous=True),
}


def main() -> None:
    """Draw, measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("run_folder", type=Path)
    parser.add_argument("--keep", type=int, default=24, help="layers that stay")
    parser.add_argument("--tokens", type=int, default=5120, help="held-out tokens to predict")
    parser.add_argument("--pictures", type=Path, default=Path("docs/img"))
    arguments = parser.parse_args()
    stages = arguments.run_folder / "stages"
    scores = Scores.load(stages / "score" / "scores.safetensors")
    influence = scores.block_influence()
    kept = {name: kept_layers(influence, scores.depth, how, arguments.keep) for name, how in CHOICES.items()}
    draw(scores, kept["loss, best block"], arguments.pictures)

    config = load_recipe(arguments.run_folder / "config.resolved.yaml", ["precision=fp32"])
    trainer = make_trainer(config)
    model = restore(MegatronGPTModel, stages / "import/teacher", config=config, micro_batch_size=1, trainer=trainer)
    windows = WindowDataset(stages / "data", "heldout", WINDOW, -(-arguments.tokens // WINDOW))
    layers = list(model.chunks[0].decoder.layers)
    print("| chosen by | layers that go | held-out perplexity |\n| --- | --- | ---: |")
    for name, stay in {"(all layers)": range(len(layers)), **kept}.items():
        gone = ", ".join(str(number) for number in range(len(layers)) if number not in stay)
        measured = heldout(model.chunks[0], [layers[number] for number in stay], windows)
        print(f"| {name} | {gone or 'none'} | {measured.value:.2f} ± {measured.standard_error:.2f} |", flush=True)


def draw(scores: Scores, kept: Sequence[int], folder: Path) -> None:
    """The report's two figures on white ground, with one choice of layers marked."""
    spec = scores.spec
    importance = Importance(
        block_influence=scores.block_influence().numpy(),
        hidden=scores.importance(Axis.HIDDEN).numpy(),
        units={},
        kept_hidden=tuple(range(spec.hidden_size)),
        kept={layer: {} for layer in kept},
        depth=depth_curves(scores.depth),
    )
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {
        "leave_one_out": figures.leave_one_out(importance).wide,
        "blocks": figures.block_curve(importance, "lm_loss").wide,
    }
    for name, svg in pictures.items():
        head, tag, rest = svg.partition(">")
        ground = '<rect width="100%" height="100%" fill="white"/>'
        (folder / f"{name}.svg").write_text(head + tag + ground + rest, encoding="utf-8")


@torch.no_grad()
def heldout(model: MinitronGPT, layers: Sequence[nn.Module], windows: WindowDataset) -> Perplexity:
    """Perplexity of a model with some of its layers."""
    nats, tokens = [], []
    for index in range(len(windows)):
        window = windows[index]
        x_SBH, rotary = model._preprocess(input_ids=window["tokens"][None], position_ids=window["position_ids"][None])[
            :2
        ]
        for layer in layers:
            x_SBH, _ = layer(hidden_states=x_SBH, attention_mask=None, rotary_pos_emb=rotary)
        keep = window["loss_mask"].bool()
        scores = label_scores(
            model.decoder.final_layernorm(x_SBH).flatten(0, 1),
            model.output_weight(),
            window["labels"],
            keep,
            vocab_size=model.spec.vocab_size,
        )
        nats.append(float(scores.nats.sum()))
        tokens.append(float(keep.sum()))
    return perplexity(nats, tokens)


if __name__ == "__main__":
    main()
