"""Prune: scores and target sizes to a plan, and the plan applied to the teacher's weights, tensor by tensor."""

from typing import Any

from nemo_minitron.arch.spec import ModelSpec
from nemo_minitron.arch.weights import parameter_count
from nemo_minitron.checkpoints.formats import FORMATS
from nemo_minitron.checkpoints.nemo1 import write_folder
from nemo_minitron.checkpoints.open import open_checkpoint
from nemo_minitron.checkpoints.source import TensorSource
from nemo_minitron.config.run import RunConfig
from nemo_minitron.config.sizes import TargetConfig
from nemo_minitron.data.tokenizer import digest_of_files
from nemo_minitron.pruning.apply import PrunedSource
from nemo_minitron.pruning.build import build_plan
from nemo_minitron.pruning.merge import MergeSums, gaps_of, merge_gaps
from nemo_minitron.pruning.plan import PruningPlan
from nemo_minitron.pruning.rounds import round_specs, round_targets
from nemo_minitron.pruning.scores import Scores
from nemo_minitron.stages.base import StageContext

MERGE_FILE = "merge.safetensors"
"""Beside the scores: what layers that go are merged by."""


def run(context: StageContext) -> dict[str, Any]:
    """Write `plan.json` and `student/`; returns the student's sizes and what was cut."""
    teacher = open_checkpoint(context.input("model"))
    original = open_checkpoint(context.input("teacher")).spec
    target = context.config.target
    if "plan" in context.stage.inputs:
        plan = PruningPlan.load(context.input("plan"))
        check_export(context.config, plan.student, teacher.family)
    else:
        check_export(context.config, round_specs(target, original, context.config.rounds)[-1], teacher.family)
        scores = Scores.load(context.input("scores"))
        scores.check_made_for(teacher.spec, tokenizer_digest=digest_of_files(teacher.tokenizer_files()))
        plan = build_plan(scores, target_of(context, original), teacher.spec)
    plan.save(context.out / "plan.json")
    write_folder(_student(context, PrunedSource(teacher, plan)), context.out / "student")
    student = plan.student
    parameters = parameter_count(student)
    kept = {layer.source for layer in plan.layers}
    return {
        "spec": student.to_dict(),
        "spec_digest": student.digest(),
        "plan_digest": plan.digest(),
        "parameters": parameters,
        "non_embedding_parameters": parameter_count(student, embeddings=False),
        "teacher_parameters": parameter_count(original),
        "merged_into": [gap.layer for gap in gaps_of(plan)] if target.merge_layers else [],
        "dropped_parts": plan.dropped_parts,
        "dropped_layers": [index for index in range(teacher.spec.num_layers) if index not in kept],
        "summary": f"{student.num_layers} layers, {parameters / 1e6:.1f}M parameters "
        f"({parameters / parameter_count(original):.0%} of the teacher)",
    }


def target_of(context: StageContext, original: ModelSpec) -> TargetConfig:
    """What the stage's round asks of the model that it has."""
    config = context.config
    return round_targets(config.target, original, config.rounds)[context.stage.round - 1]


def _student(context: StageContext, pruned: PrunedSource) -> TensorSource:
    """What is written: what the plan leaves, with dropped layers merged into those before them if asked for."""
    target = context.config.target
    if not target.merge_layers:
        return pruned
    sums = MergeSums.load(context.input("scores").with_name(MERGE_FILE))
    return merge_gaps(pruned, sums, ridge=target.merge_ridge)


def check_export(config: RunConfig, student: ModelSpec, family: str) -> None:
    """Find out before a model is distilled whether it can be exported as the recipe asks.

    Raises:
        SpecError: A format cannot hold the student's sizes, or a class of its library refuses them.
    """
    for kind in config.export.formats:
        FORMATS[kind].check(student, family)
