"""The real model of the demo, in our hands and in those of transformers."""

from pathlib import Path

from transformers import AutoConfig, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

DEMO = Path(__file__).parents[2] / "recipes/smollm2/demo.yaml"


def theirs(gguf: Path) -> LlamaForCausalLM:
    """The model as `transformers` dequantises and names it."""
    model = LlamaForCausalLM(AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)).float()
    tensors = load_gguf_checkpoint(str(gguf), return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    model.tie_weights()
    return model.eval()
