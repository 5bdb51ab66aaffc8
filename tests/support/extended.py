"""What `tests.meta.test_extending` runs on a copy of the package that has the extensions of docs/extending.md.

`python -m tests.support.extended FOLDER` writes `hf/` and `corpus/` there, checks the family and the divergence, and
prints what it found as JSON. Errors are relative to the largest expected value.
"""

import json
import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is first imported

import torch
from transformers import ArceeConfig, PreTrainedModel

import nemo_minitron
from nemo_minitron.checkpoints.convert import convert
from nemo_minitron.checkpoints.open import open_checkpoint
from nemo_minitron.checkpoints.safetensors_file import SafetensorsFile
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.kernels.available import kernels_run
from nemo_minitron.megatron import runtime
from nemo_minitron.megatron.forward import MicroBatch
from nemo_minitron.ops.divergence import Divergence
from nemo_minitron.ops.sampling import SparseTargets
from nemo_minitron.parallel.fused_linear_kd import fused_linear_kd
from nemo_minitron.parallel.fused_linear_sparse_kd import fused_linear_sparse_kd
from tests import tiny
from tests.support.loaded import megatron_model


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


def logits_error(folder: Path, theirs: PreTrainedModel) -> float:
    """Of the checkpoint as it is read here, against transformers' model."""
    source = open_checkpoint(folder)
    here = runtime.start(ParallelConfig(), seed=0)
    try:
        ours = megatron_model(source, here)
        tokens = torch.randint(0, 256, (2, 18), generator=torch.Generator().manual_seed(5))
        micro = MicroBatch.of(tokens[:, :-1], tokens[:, 1:], torch.ones(2, 17, dtype=torch.bool))
        with torch.no_grad():
            return error(ours(micro.tokens, micro.position_ids, None), theirs(micro.tokens, use_cache=False).logits)
    finally:
        runtime.stop()


def written_again(folder: Path) -> bool:
    """Whether a Hugging Face folder that went through this package has the same tensors."""
    convert(folder, folder.with_name("again"), to="hf")
    before, after = (SafetensorsFile(path / "model.safetensors") for path in (folder, folder.with_name("again")))
    return set(before.entries) == set(after.entries) and all(
        torch.equal(before.get(name), after.get(name)) for name in before.entries
    )


def divergence_errors(dtype: torch.dtype, *, temperature: float, k: int = 4) -> dict[str, float]:
    """Of the dense form, the fused loss and its gradients, and the loss on the teacher's best k tokens and the rest.

    Against 1 - sum(sqrt(p q)) in float64.
    """
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    hidden, weight, teacher_hidden, teacher_weight = random(7, 6), random(13, 6), random(7, 5), random(13, 5)
    exact = [x.double().requires_grad_() for x in (hidden, weight)]
    student = exact[0] @ exact[1].T / temperature
    teacher = teacher_hidden.double() @ teacher_weight.double().T / temperature
    p, q = teacher.softmax(-1), student.softmax(-1)
    expected = (1 - (p * q).sqrt().sum(-1)) * temperature**2
    expected.sum().backward()
    divergence = Divergence(kind="hellinger", temperature=temperature)
    dense = divergence.per_token(student.detach().log_softmax(-1), teacher.log_softmax(-1))
    logp, ids = teacher.log_softmax(-1).topk(k)
    p_k, q_k = logp.exp(), q.detach().gather(1, ids)
    rest = ((1 - p_k.sum(-1)) * (1 - q_k.sum(-1))).sqrt()
    expected_k = (1 - (p_k * q_k).sqrt().sum(-1) - rest).sum() * temperature**2
    tail = (1 - p_k.sum(-1)).to(dtype)
    targets = SparseTargets(ids=ids, log_probs=logp.to(dtype), tail=tail, temperature=temperature)
    sparse = fused_linear_sparse_kd(hidden, weight, targets, divergence=divergence, vocab_size=13)
    for x in (hidden, weight):
        x.requires_grad_()
    loss = fused_linear_kd(hidden, weight, teacher_hidden, teacher_weight, divergence=divergence, vocab_size=13)
    loss.loss_sum.backward()
    return {
        "dense": error(dense, expected.detach()),
        "loss": error(loss.loss_sum.detach(), expected.sum().detach()),
        "top k": error(sparse.loss_sum, expected_k),
        "d_hidden": error(hidden.grad, exact[0].grad),
        "d_weight": error(weight.grad, exact[1].grad),
    }


def main(folder: Path) -> None:
    tiny.FAMILY_CONFIGS["arcee"] = (ArceeConfig, {})
    # Trained, since distillation refuses a teacher that is worse than a uniform guess.
    theirs = tiny.write_family(folder / "hf", "arcee", trained_steps=60)
    tiny.write_corpus(folder / "corpus")
    facts = {
        "package": str(Path(nemo_minitron.__file__).parent),
        "logits": logits_error(folder / "hf", theirs),
        "written_again": written_again(folder / "hf"),
        "torch": divergence_errors(torch.float64, temperature=1.7),
        "has_kernels": kernels_run(torch.device("cpu"), torch.float32),
        "triton": divergence_errors(torch.float32, temperature=1.7),
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
