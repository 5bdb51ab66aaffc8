"""Import: any supported checkpoint to a checkpoint folder in canonical form, tensor by tensor."""

from typing import Any

from nemo_minitron.arch.weights import parameter_count
from nemo_minitron.checkpoints.nemo1 import write_folder
from nemo_minitron.checkpoints.open import open_checkpoint
from nemo_minitron.data.assets import resolve
from nemo_minitron.stages.base import StageContext


def run(context: StageContext) -> dict[str, Any]:
    """Write `teacher/`; returns its sizes and where it came from."""
    source = open_checkpoint(resolve(context.config.model.source))
    write_folder(source, context.out / "teacher")
    spec = source.spec
    return {
        "source": context.config.model.source,
        "family": source.family,
        "spec": spec.to_dict(),
        "spec_digest": spec.digest(),
        "dtype": str(source.dtype).removeprefix("torch."),
        "parameters": parameter_count(spec),
        "non_embedding_parameters": parameter_count(spec, embeddings=False),
        "summary": f"{source.family}, {spec.num_layers} layers, {parameter_count(spec) / 1e6:.1f}M parameters",
    }
