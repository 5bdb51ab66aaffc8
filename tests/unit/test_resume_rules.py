"""Which settings may change while a training goes on: every one has a rule, and the engine decides by it."""

from pathlib import Path
from typing import Any

import pytest

from nemo_minitron.checkpoints.identity import weights_digest
from nemo_minitron.config.load import check, known_keys
from nemo_minitron.config.resume import RULES, Change, rule_of, setting_of
from nemo_minitron.config.run import RunConfig
from nemo_minitron.config.training import CorrectConfig, DistillConfig
from nemo_minitron.config.tuning import TuneConfig
from nemo_minitron.errors import RunFolderError, TrainingError
from nemo_minitron.models.resume import TrainingRecord, lines
from nemo_minitron.stages.chain import chain_for
from nemo_minitron.stages.plan import Action, decide
from nemo_minitron.stages.run_folder import RunFolder

TRAININGS = {"correct": CorrectConfig, "distill": DistillConfig, "tune": TuneConfig}
GOES_ON: dict[str, Any] = {
    **{"tokens": 8192, "batch.micro_batch_size": 2, "optimizer.lr": 5e-5, "optimizer.min_lr": 1e-6},
    **{"optimizer.warmup_steps": 3, "optimizer.schedule": "linear", "optimizer.decay_fraction": 0.4},
    **{"optimizer.weight_decay": 0.0, "optimizer.eps": 1e-6, "optimizer.clip_grad": 0.5},
    **{"validate_every": 7, "checkpoint_every": 7, "keep_last": 3, "async_save": True, "log_every": 5, "patience": 2},
    **{"guard.spike_factor": 9.0, "guard.max_consecutive_skips": 3, "loss_chunk_tokens": 64, "offload_teacher": True},
    "optimizer.distributed": True,  # the checkpoint says whether it can
}
REFUSED: dict[str, Any] = {
    **{"minutes_of": "run", "batch.sequence_length": 64, "batch.global_batch_size": 4, "optimizer.beta1": 0.8},
    **{"optimizer.beta2": 0.99, "validation_samples": 4, "finish_with": "best", "kd_weight": 0.5, "lm_weight": 0.5},
    **{"router_weight": 0.5, "balance_weight": 0.5},
    **{"hidden_weight": 0.5, "temperature": 2.0, "divergence": "reverse_kl", "beta": 0.3, "skew": 0.3, "top_k": 9},
    **{"freeze_embeddings": True, "teacher_precision": "fp32", "teacher_fp8": True},
    **{f"ramp_to.{name}": 0.5 for name in ("kd_weight", "lm_weight", "hidden_weight", "temperature")},
    **{"sources": ["other.jsonl"], "prompt_key": "p", "answer_key": "a", "validation_fraction": 0.1},
    **{"too_long": "leave_out", "pack": True, "reset_attention_mask": False},
}
TOGETHER = ("minutes", "hidden.layers", "hidden.embedding", "hidden.kind", "hidden.balance", "hidden.projection")
"""Refused too: none of these can be changed alone."""


def leaves(kind: type) -> set[str]:
    keys = known_keys(kind)
    return {key for key in keys if not any(other.startswith(f"{key}.") for other in keys)}


def recipe(section: str, key: str = "", value: Any = None, **top: Any) -> RunConfig:
    data: dict[str, Any] = {
        **{"name": "n", "precision": "fp32", "model": {"source": "m"}, "data": {"sources": ["t"]}},
        **{"correct": {"tokens": 16384}, "distill": {"tokens": 16384}},
        "tune": {"tokens": 16384, "sources": ["chat.jsonl"], "kd_weight": 1.0, "lm_weight": 1.0},
        **top,
    }
    if section == "distill":
        del data["correct"]  # it would take from `distill` what it leaves open
    place = data[section]
    *above, last = key.split(".")
    for name in above:
        place = place.setdefault(name, {})
    if key:
        place[last] = value
    return check(RunConfig, data, source="test")


def decided(tmp_path: Path, section: str, now: RunConfig) -> Action:
    """What happens to a training that was begun with the plain recipe; those after it have none of their own yet."""
    run = RunFolder(tmp_path / "run")
    run.create()
    before = recipe(section)
    [step] = [step for step in decide(chain_for(before), before, run) if step.stage.name == section]
    record = {"digest": step.digest, "settings": step.settings, "upstream": step.upstream}
    run.begin(section, {"stage": section, **record, "seconds": 0.0, "attempts": 1})
    [found] = [step for step in decide(chain_for(now), now, run) if step.stage.name == section]
    return found.action


def test_every_setting_has_a_rule_and_a_value_here():
    settings = set().union(*map(leaves, TRAININGS.values()))
    assert settings == {*GOES_ON, *REFUSED, *TOGETHER}
    for key in settings:
        assert (rule_of(key).change is Change.REFUSED) == (key not in GOES_ON), key
        assert (rule_of(key).change is Change.REFUSED) == bool(rule_of(key).why), key


@pytest.mark.parametrize("section", TRAININGS)
def test_a_training_that_was_stopped_goes_on_with_what_may_change(section, tmp_path):
    for index, key in enumerate(sorted(leaves(TRAININGS[section]) & set(GOES_ON))):
        now = recipe(section, key, GOES_ON[key])
        assert decided(tmp_path / str(index), section, now) is Action.CONTINUE, key


@pytest.mark.parametrize("section", TRAININGS)
def test_what_may_not_change_is_refused_with_both_values_and_the_reason(section, tmp_path):
    for index, key in enumerate(sorted(leaves(TRAININGS[section]) & set(REFUSED))):
        with pytest.raises(RunFolderError) as caught:
            decided(tmp_path / str(index), section, recipe(section, key, REFUSED[key]))
        [line] = [line for line in str(caught.value).splitlines() if f"stage {section} was made with" in line]
        place = f"{section}.{key}"
        assert line.startswith(f"  - {place}: "), line
        value = recipe(section, key, REFUSED[key]).model_dump(mode="json")
        for part in place.split("."):
            value = value[part]
        assert f", now {value}; {rule_of(key).why}" in line


@pytest.mark.parametrize("top", [{"seed": 7}, {"precision": "bf16"}], ids=str)
def test_seed_and_precision_are_refused(top, tmp_path):
    [(key, value)] = top.items()
    with pytest.raises(RunFolderError, match=rf"{key}: stage distill was made with .*, now {value}; "):
        decided(tmp_path, "distill", recipe("distill", **top))


def test_a_finished_training_is_what_it_was_made_with(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.create()
    before = recipe("distill")
    for step in decide(chain_for(before), before, run):
        record = {"digest": step.digest, "settings": step.settings, "upstream": step.upstream}
        run.begin(step.stage.name, record)
        run.finish(step.stage.name, record, {})
    with pytest.raises(RunFolderError, match=r"distill\.optimizer\.lr: stage distill was made with 0\.0001, now 5e-05"):
        decide(chain_for(before), recipe("distill", "optimizer.lr", 5e-5), run)


def test_a_training_whose_inputs_were_made_anew_is_not_gone_on_with(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.create()
    before = recipe("distill")
    [step] = [step for step in decide(chain_for(before), before, run) if step.stage.name == "distill"]
    upstream = {**step.upstream, "data": "of other texts"}
    digest = step.stage.digest_of(step.settings, upstream)
    run.begin("distill", {"digest": digest, "settings": step.settings, "upstream": upstream})
    now = recipe("distill", "optimizer.lr", 5e-5)
    [step] = [step for step in decide(chain_for(now), now, run) if step.stage.name == "distill"]
    assert step.action is Action.REDO


def test_keys_of_a_recipe_as_settings():
    assert setting_of("distill.optimizer.lr") == "optimizer.lr"
    assert setting_of("seed") == "seed"
    assert setting_of("score.samples") is None
    assert "cache" in RULES
    assert setting_of("cache.kind") is None
    with pytest.raises(KeyError):
        rule_of("what.nobody.knows")


# -- the record of a checkpoint ----------------------------------------------------------------------------------

HAD = {"steps": 20, "targets": "teacher", "samples": "documents", "optimizer.lr": 1e-3, "temperature": 1.0, "seed": 1}


def going_on(step: int = 8, **now: Any) -> TrainingRecord:
    keys = {"lr": "optimizer.lr"}
    asked = HAD | {keys.get(key, key): value for key, value in now.items()}
    return TrainingRecord(HAD, step).going_on_with(asked, checkpoint=Path("00000008.ckpt"))


def test_what_changes_is_noted_and_told():
    first = going_on(lr=5e-4, steps=30)
    assert first.changes == (
        {"step": 8, "key": "steps", "before": 20, "now": 30},
        {"step": 8, "key": "optimizer.lr", "before": 1e-3, "now": 5e-4},
    )
    assert lines(TrainingRecord(HAD, 8), first) == [
        "steps (tokens; trainer.max_steps): 20 up to step 8, 30 from step 9 on",
        "optimizer.lr (optim.lr): 0.001 up to step 8, 0.0005 from step 9 on",
    ]
    plain = first.as_plain()
    again = TrainingRecord(plain["settings"], 12, tuple(plain["changes"]))
    assert lines(again, again.going_on_with(first.settings, checkpoint=Path("c"))) == []
    assert "earlier version" in lines(None, first)[0]


def test_all_that_cannot_change_is_told_at_once():
    with pytest.raises(TrainingError) as caught:
        going_on(temperature=2.0, seed=2, lr=1e-4)
    text = str(caught.value)
    assert "00000008.ckpt (step 8): 2 setting(s) cannot change" in text
    assert "temperature: 1 in the checkpoint, now 2; one training has one objective" in text
    assert "seed: 1 in the checkpoint, now 2; the order of samples" in text
    assert "optimizer.lr" not in text
    assert "rule: " in text
    assert "remedy: " in text


@pytest.mark.parametrize(
    ("now", "words"),
    [
        ({"steps": 7}, "8 are done"),
        ({"steps": 21, "targets": "cache"}, "the cache holds targets"),
        ({"steps": 21, "samples": "blend"}, "were blended"),
    ],
)
def test_steps_that_cannot_be(now, words):
    had = HAD | {key: value for key, value in now.items() if key != "steps"}
    with pytest.raises(TrainingError, match=words):
        TrainingRecord(had, 8).going_on_with(had | now, checkpoint=Path("c"))


def test_the_steps_that_are_done_are_enough():
    assert going_on(steps=8).changes[0]["now"] == 8


# -- which checkpoint it is --------------------------------------------------------------------------------------


def test_a_checkpoint_is_known_by_its_weights_wherever_it_lies(tmp_path):
    for name, size in {"here": 5_000_000, "there": 5_000_000}.items():
        folder = tmp_path / name / "model_weights"
        folder.mkdir(parents=True)
        (folder / "__0_0.distcp").write_bytes(bytes(range(256)) * (size // 256))
        (folder / "metadata.json").write_text(name)
    digest = weights_digest(tmp_path / "here")
    assert digest == weights_digest(tmp_path / "there")
    for place in (0, 2_000_000, 4_990_000):
        with (tmp_path / "there/model_weights/__0_0.distcp").open("r+b") as file:
            file.seek(place)
            file.write(b"\xff" * 25_000)  # a hundredth of the weights of a layer
        assert weights_digest(tmp_path / "there") != digest
        digest = weights_digest(tmp_path / "there")
    (tmp_path / "one.gguf").write_bytes(b"abc")
    (tmp_path / "other.gguf").write_bytes(b"abc")
    assert weights_digest(tmp_path / "one.gguf") != weights_digest(tmp_path / "here")
