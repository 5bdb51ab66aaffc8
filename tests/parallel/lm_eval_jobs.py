"""What ranks do in the tests of the LM-Evaluation-Harness: answer a task's items, one rank leading."""

import json
from pathlib import Path
from typing import Any

from nemo_minitron.config.parallel import ParallelConfig


def run_tasks_at(folder: Path, parallel: ParallelConfig, tasks: list[str], include: Path, out: Path) -> dict[str, Any]:
    """Results of tasks on a Hugging Face folder in fp32, the same on every rank; samples go into `out`."""
    from nemo_minitron.config.model_settings import ModelSettings
    from nemo_minitron.data.tokenizer import load_tokenizer
    from nemo_minitron.evaluation.answers import AnswerFile
    from nemo_minitron.evaluation.generate import end_tokens
    from nemo_minitron.evaluation.leading import led
    from nemo_minitron.evaluation.scoring import TokenScorer
    from nemo_minitron.models.gpt import MegatronGPTModel

    model = MegatronGPTModel.restore_from(folder, settings=ModelSettings(parallel=parallel, seed=0))
    tokenizer = load_tokenizer(model.tokenizer_files)
    scorer = TokenScorer(
        model.chunks,
        model.runtime,
        batch_size=8,
        decode=tokenizer.decode,
        ends=end_tokens(tokenizer, model.tokenizer_files),
    )
    passes = {"count": 0}

    def counted(method: Any) -> Any:
        def call(requests: Any, *rest: Any) -> Any:
            passes["count"] += len(requests)
            return method(requests, *rest)

        return call

    def work(leader: Any) -> dict[str, Any]:
        from nemo_minitron.evaluation.harness import run_tasks
        from nemo_minitron.evaluation.lm_eval_model import MinitronLM

        leader.score, leader.generate = counted(leader.score), counted(leader.generate)
        lm = MinitronLM(leader, tokenizer, answers=AnswerFile(out / "answers.jsonl"))
        return run_tasks(lm, tasks, include_path=[str(include)], samples_folder=out)

    results = led(scorer, work)
    return {"results": results, "asked": passes["count"]}


def samples_of(out: Path, task: str) -> list[dict[str, Any]]:
    """What `run_tasks` wrote of a task's items."""
    return [json.loads(line) for line in (out / f"{task}.jsonl").read_text().splitlines()]


def run_by_name(folder: Path, tasks: Path, task: str) -> dict[str, float] | None:
    """Metrics of a task as `lm_eval` itself gives them; every rank runs it, and local rank 0 has the result."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    import nemo_minitron.evaluation.lm_eval_model  # noqa: F401 - registers the model

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    arguments = f"pretrained={folder},tensor=2,precision=fp32"
    found = simple_evaluate("nemo_minitron", arguments, tasks=[task], task_manager=manager, bootstrap_iters=0)
    return None if found is None else dict(found["results"][task])
