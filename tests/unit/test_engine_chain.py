"""The engine on small stages that write files: skipping, going on, redoing, conflicts, signals, full disks."""

import errno
import json
import os
import signal
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from nemo_minitron.callbacks.reporter import Reporter
from nemo_minitron.config.load import check, has_default
from nemo_minitron.config.run import RunConfig
from nemo_minitron.errors import ConfigError, RunFolderError
from nemo_minitron.stages import signals, temporary
from nemo_minitron.stages.base import Stage, StageContext
from nemo_minitron.stages.engine import Request, run_chain
from nemo_minitron.stages.plan import Action, decide, select
from nemo_minitron.stages.run_folder import RunFolder


def make_config(**changes) -> RunConfig:
    data = {"name": "small", "model": {"source": "a"}, "data": {"sources": ["b"]}, **changes}
    return check(RunConfig, data, source="test")


class Recorder:
    """Stages that note when they run and copy their input, plus their own setting, to a file."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.fail_in: str | None = None
        self.error: BaseException = RuntimeError("stop here")

    def stage(self, name: str, *, needs: tuple[str, ...] = (), sections: tuple[str, ...] = (), **more) -> Stage:
        def run(context: StageContext) -> dict:
            self.ran.append(name)
            (context.out / "begun").write_text(str(len(self.ran)))
            if self.fail_in == name:
                raise self.error
            above = [(context.run.stage(need) / "file").read_text() for need in needs]
            (context.out / "file").write_text("+".join([*above, name]))
            return {"summary": f"made {name}", "resumed": context.resumed}

        return Stage(name=name, run=run, needs=needs, sections=sections, **more)

    def chain(self) -> tuple[Stage, ...]:
        return (
            self.stage("import", sections=("model",)),
            self.stage("score", needs=("import",), sections=("score",)),
            self.stage("prune", needs=("import", "score"), sections=("target",)),
            self.stage("report", needs=("prune",), sections=("name",)),
        )


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def go(recorder: Recorder, run: RunFolder, config: RunConfig | None = None, chain=None, **request) -> list[str]:
    recorder.ran.clear()
    config = config or make_config()
    run_chain(chain or recorder.chain(), Request(config=config, run=run, **request), reporter=Reporter(silent=True))
    return list(recorder.ran)


def test_stages_run_in_order_and_each_reads_what_it_needs(recorder, run):
    assert go(recorder, run) == ["import", "score", "prune", "report"]
    assert (run.stage("prune") / "file").read_text() == "import+import+score+prune"
    assert run.result("prune")["summary"] == "made prune"
    assert run.result("prune")["seconds"] >= 0
    assert run.result("prune")["peak_memory_gb"] > 0
    assert not list(run.stages.glob(".*.partial"))


def test_the_same_command_again_runs_nothing_and_changes_no_stage(recorder, run):
    go(recorder, run)
    before = {path: path.read_bytes() for path in run.stages.rglob("*") if path.is_file()}
    assert go(recorder, run) == []
    assert {path: path.read_bytes() for path in run.stages.rglob("*") if path.is_file()} == before


def test_a_failed_stage_goes_on_in_its_own_folder(recorder, run):
    recorder.fail_in = "score"
    with pytest.raises(RuntimeError, match="stop here"):
        go(recorder, run)
    assert not run.is_complete("score")
    recorder.fail_in = None
    (run.partial("score") / "half").write_text("kept")
    assert go(recorder, run) == ["score", "prune", "report"]
    assert run.result("score")["resumed"] is True
    assert (run.stage("score") / "half").read_text() == "kept"
    assert run.done("score")["attempts"] == 2


def test_another_recipe_is_refused_with_every_key_that_differs(recorder, run):
    go(recorder, run)
    other = make_config(score={"samples": 8}, target={"num_layers": 3})
    with pytest.raises(RunFolderError) as caught:
        go(recorder, run, other)
    text = str(caught.value)
    assert "score.samples: stage score was made with 1024, now 8" in text
    assert "target.num_layers: stage prune was made with None, now 3" in text
    assert "--run-dir" in text
    assert "`run --from score`, or `score --redo`" in text
    assert recorder.ran == []
    assert go(recorder, run) == []  # nothing was lost


def test_a_key_no_begun_stage_depends_on_may_change(recorder, run):
    go(recorder, run, last="score")
    assert go(recorder, run, make_config(target={"num_layers": 3}, parallel={"tensor": 2})) == ["prune", "report"]


def test_a_key_of_a_later_version_refuses_nothing_at_its_default(recorder, run):
    """What an earlier version has made knows no `score.sublayers`, and nothing is made again."""
    key = "score.sublayers"
    go(recorder, run)
    for stage in recorder.chain()[1:]:
        done = run.stage(stage.name) / "DONE"
        record = json.loads(done.read_text())
        record["settings"].pop(key, None)
        record["upstream"] = {need: run.done(need)["digest"] for need in record["upstream"]}
        record["digest"] = stage.digest_of(record["settings"], record["upstream"])
        done.write_text(json.dumps(record))
    assert go(recorder, run) == []
    asked = make_config(score={"sublayers": True, "depth": {"samples": 2}})
    with pytest.raises(RunFolderError, match=r"score\.sublayers: stage score was made with None, now True"):
        go(recorder, run, asked)


def test_a_section_that_was_null_is_no_key_of_a_later_version(recorder, run):
    """All keys of `search.layerwise` at their defaults are another recipe than no `search.layerwise`."""
    chain = (recorder.stage("search", sections=("search",)),)
    go(recorder, run, chain=chain)
    with pytest.raises(RunFolderError, match=r"search\.layerwise\.ffn_hidden_size"):
        go(recorder, run, make_config(search={"layerwise": {}}), chain=chain)


def test_a_section_that_a_later_version_knows_is_no_default_once_a_recipe_has_it():
    assert has_default(
        RunConfig, "search.samples", RunConfig.model_fields["search"].get_default(call_default_factory=True).samples
    )
    assert has_default(RunConfig, "search.layerwise", None)
    layerwise = make_config(search={"layerwise": {}}).search.layerwise
    assert not has_default(RunConfig, "search.layerwise.samples", layerwise.samples)


@pytest.mark.parametrize(
    "changed", [{"log_every": 7}, {"checkpoint_every": 7}, {"keep_last": 7}, {"async_save": True}], ids=str
)
def test_how_often_a_training_saves_and_logs_may_change_while_it_goes_on(changed, recorder, run):
    chain = (recorder.stage("import", sections=("model",)), recorder.stage("distill", sections=("distill",)))
    recorder.fail_in = "distill"
    with pytest.raises(RuntimeError):
        go(recorder, run, chain=chain)
    recorder.fail_in = None
    assert go(recorder, run, make_config(distill=changed), chain=chain) == ["distill"]
    assert run.result("distill")["resumed"]
    assert go(recorder, run, chain=chain) == []
    with pytest.raises(RunFolderError, match=r"distill\.batch\.sequence_length"):
        go(recorder, run, make_config(distill={**changed, "batch": {"sequence_length": 64}}), chain=chain)


def test_redo_from_a_stage_does_it_and_all_after_it(recorder, run):
    go(recorder, run)
    assert go(recorder, run, make_config(target={"num_layers": 3}), redo_from="prune") == ["prune", "report"]
    assert run.done("prune")["settings"]["target.num_layers"] == 3
    assert not any((run.stages / ".replaced").iterdir())


def test_a_redo_keeps_the_old_stage_until_the_new_one_is_whole_and_can_be_continued(recorder, run):
    go(recorder, run)
    recorder.fail_in = "prune"
    with pytest.raises(RuntimeError):
        go(recorder, run, redo_from="score")
    assert recorder.ran == ["score", "prune"]
    assert [(folder / "file").read_text() for folder in run.set_aside_folders("prune")] == ["import+import+score+prune"]
    recorder.fail_in = None
    assert go(recorder, run, redo_from="score") == ["prune", "report"]  # the same command: score is not done again
    assert go(recorder, run, redo_from="score") == ["score", "prune", "report"]  # finished, so this is a new redo


def test_a_stage_whose_upstream_was_redone_with_other_settings_is_redone(recorder, run):
    go(recorder, run)
    other = make_config(score={"samples": 8})
    assert go(recorder, run, other, redo_from="score", last="score") == ["score"]
    assert go(recorder, run, other) == ["prune", "report"]


def test_a_stage_whose_upstream_was_redone_with_the_same_settings_is_redone(recorder, run):
    """What lies outside the run folder, such as texts, may have changed."""
    go(recorder, run)
    names = [stage.name for stage in recorder.chain()]
    assert go(recorder, run, redo_from="score", only="score") == ["score"]
    assert list(run.current(names)) == ["import", "score"]
    assert go(recorder, run) == ["prune", "report"]
    assert list(run.current(names)) == names
    assert go(recorder, run) == []
    assert go(recorder, run, redo_from="score", only="score") == ["score"]
    assert go(recorder, run) == ["prune", "report"]


def test_a_redo_that_was_killed_before_it_began_is_still_one(recorder, run):
    go(recorder, run)
    run.set_aside("score")
    assert go(recorder, run) == ["score", "prune", "report"]


def test_a_redo_that_changes_an_earlier_stage_is_refused(recorder, run):
    go(recorder, run)
    with pytest.raises(RunFolderError, match=r"score\.samples"):
        go(recorder, run, make_config(score={"samples": 8}), redo_from="prune")


def test_only_brings_one_stage_up_to_date_with_what_it_needs(recorder, run):
    assert go(recorder, run, only="score") == ["import", "score"]
    assert go(recorder, run, only="score") == []


def test_a_kill_between_done_and_rename_costs_nothing(recorder, run):
    go(recorder, run)
    run.stage("prune").rename(run.partial("prune"))
    assert go(recorder, run) == []
    assert run.is_complete("prune")


def test_deciding_changes_nothing(recorder, run):
    go(recorder, run, last="score")
    before = sorted(run.path.rglob("*"))
    steps = decide(recorder.chain(), make_config(), run)
    assert [step.action for step in steps] == [Action.SKIP, Action.SKIP, Action.DO, Action.DO]
    assert sorted(run.path.rglob("*")) == before


@pytest.mark.parametrize("names", [{"first": "nope", "last": None}, {"first": "prune", "last": "score"}])
def test_selecting_what_is_not_there_is_an_error(recorder, names):
    with pytest.raises(ConfigError, match="stages: import, score, prune, report"):
        select(recorder.chain(), **names)


def test_a_full_disk_is_one_message_and_the_stage_can_go_on(recorder, run):
    recorder.fail_in = "score"
    recorder.error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "big.bin")
    with pytest.raises(RunFolderError, match=r"big.bin: no space left on the disk"):
        go(recorder, run)
    assert run.is_complete("import")
    recorder.fail_in = None
    assert go(recorder, run) == ["score", "prune", "report"]


def test_a_full_disk_is_known_behind_a_library_that_hides_it(recorder, run):
    recorder.fail_in = "score"
    recorder.error = RuntimeError('IoError(Os { code: 28, kind: StorageFull, message: "No space left on device" })')
    with pytest.raises(RunFolderError, match="no space left"):
        go(recorder, run)


def test_a_really_full_device_is_told_as_such(recorder, run):
    def fill(context: StageContext) -> dict:
        with open("/dev/full", "wb", buffering=0) as file:
            file.write(b"x")
        return {}

    with pytest.raises(RunFolderError, match="no space left"):
        go(recorder, run, chain=(Stage(name="import", run=fill),))


def test_a_defect_of_ours_is_not_dressed_up(recorder, run):
    recorder.fail_in = "score"
    recorder.error = KeyError("ours")
    with pytest.raises(KeyError):
        go(recorder, run)


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (ZeroDivisionError("by zero"), "failed: ZeroDivisionError"),
        (ConfigError("recipe", ["a: b"]), "failed: recipe: 1 problem"),
        (KeyboardInterrupt(), "stopped"),
        (signals.Stopped(signal.SIGTERM), "stopped"),
    ],
)
def test_the_manifest_tells_a_crash_from_a_stop(recorder, run, error, outcome):
    recorder.fail_in, recorder.error = "score", error
    with pytest.raises(type(error)):
        go(recorder, run)
    assert json.loads((run.path / "manifest.json").read_text())["commands"][-1]["outcome"].startswith(outcome)


def test_a_signal_ends_an_ordinary_stage_at_once(recorder, run):
    def wait(context: StageContext) -> dict:
        os.kill(os.getpid(), signal.SIGTERM)
        (context.out / "after").write_text("never")
        return {}

    with pytest.raises(signals.Stopped) as caught:
        go(recorder, run, chain=(Stage(name="import", run=wait),))
    assert caught.value.exit_status == 75
    assert not (run.partial("import") / "after").exists()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert json.loads((run.path / "manifest.json").read_text())["commands"][-1]["outcome"] == "stopped"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_training_stage_saves_before_it_stops(recorder, run, number):
    def train(context: StageContext) -> dict:
        if context.resumed:
            return {"from": (context.out / "saved").read_text()}
        assert not context.stop_requested()
        os.kill(os.getpid(), number)
        assert context.stop_requested()
        (context.out / "saved").write_text("step 7")
        context.stop()
        raise AssertionError("stop() must not return")

    chain = (Stage(name="import", run=train, saves_when_stopped=True),)
    with pytest.raises(signals.Stopped) as caught:
        go(recorder, run, chain=chain)
    assert caught.value.exit_status == (130 if number == signal.SIGINT else 75)
    go(recorder, run, chain=chain)
    assert run.result("import")["from"] == "step 7"


def test_a_rank_stops_with_the_others_although_no_signal_reached_it():
    assert not signals.requested()
    with pytest.raises(signals.Stopped) as caught:
        signals.stop()
    assert caught.value.exit_status == 75


def test_a_training_stage_that_ends_in_spite_of_a_signal_is_whole(recorder, run):
    def train(context: StageContext) -> dict:
        os.kill(os.getpid(), signal.SIGTERM)
        return {}

    chain = (Stage(name="import", run=train, saves_when_stopped=True), recorder.stage("score"))
    with pytest.raises(signals.Stopped):
        go(recorder, run, chain=chain)
    assert run.is_complete("import")
    assert recorder.ran == []


def test_temporary_files_of_libraries_lie_in_the_run_folder(recorder, run, monkeypatch):
    """What a killed process has left there goes when the next one begins, and its own when it ends."""
    monkeypatch.setattr(temporary, "_LONGEST", 1000)
    (run.path / ".tmp/tmpx1wandb-media").mkdir(parents=True)
    run.stages.mkdir()
    seen = []

    def library(context: StageContext) -> dict:
        assert not list((run.path / ".tmp").iterdir())
        seen.append(tempfile.mkdtemp())
        return {}

    before = tempfile.gettempdir()
    go(recorder, run, chain=(Stage(name="import", run=library),))
    assert Path(seen[0]).parent == run.path / ".tmp"
    assert tempfile.gettempdir() == before
    assert not (run.path / ".tmp").exists()


def test_a_run_folder_too_deep_for_sockets_leaves_the_system_s(recorder, tmp_path, monkeypatch):
    monkeypatch.setattr(temporary, "_LONGEST", 60)
    deep = RunFolder(tmp_path / ("a" * 60))
    seen = []
    stage = Stage(name="import", run=lambda context: {"in": seen.append(tempfile.gettempdir())})
    go(recorder, deep, chain=(stage,))
    assert seen == [tempfile.gettempdir()]
    assert not (deep.path / ".tmp").exists()


def test_seconds_add_up_over_attempts(recorder, run, monkeypatch):
    recorder.fail_in = "import"
    chain = (replace(recorder.stage("import")),)
    clock = iter([0.0, 10.0, 100.0, 105.0])
    monkeypatch.setattr("nemo_minitron.stages.engine.time.monotonic", lambda: next(clock))
    with pytest.raises(RuntimeError):
        go(recorder, run, chain=chain)
    recorder.fail_in = None
    go(recorder, run, chain=chain)
    assert run.result("import")["seconds"] == 15.0
