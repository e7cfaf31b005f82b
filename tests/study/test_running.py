"""Running a study with processes that only pretend: order, failures, tuning, locks, signals."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.study.conftest import study_with, write_counts, write_metrics
from vdr_cli.config.load import load_config
from vdr_cli.errors import ConfigError
from vdr_cli.launch import outcome
from vdr_cli.study import launching, running
from vdr_cli.study.directory import StudyDirectory, open_directory, study_locked, try_lock
from vdr_cli.study.load import Study
from vdr_cli.study.measure import fingerprint
from vdr_cli.study.plan import Shard, Task, tasks_of
from vdr_cli.study.record import record_of
from vdr_cli.study.running import Runner, Watcher

Code = Callable[[Task, str], int]


class Machine(Watcher):
    """Starts processes that have ended at once, with the files they would leave."""

    def __init__(self, study: Study, directory: StudyDirectory, code: Code) -> None:
        self.study, self.directory, self.code = study, directory, code
        self.started: list[str] = []
        self.environments: list[Mapping[str, str]] = []
        self.generator = np.random.default_rng(0)

    def start(self, command: Sequence[str], environment: Mapping[str, str], log: Path, lock: int) -> Any:
        os.fstat(lock)  # it is open
        phase = "train" if command[2] == "vdr_cli" else "measure"
        task = next(task for task in tasks_of(self.study) if self.directory.work(task, "log") == log)
        self.started.append(f"{phase} {task.name}")
        self.environments.append(environment)
        log.parent.mkdir(parents=True, exist_ok=True)
        code = self.code(task, phase)
        if code == 0:
            (self.trained if phase == "train" else self.measured)(task, Path(command[-1 if phase == "measure" else 4]))
        else:
            log.write_text("step 1\nvdr: error: reward f raised ValueError\n\n")
        return Ended(code)

    def trained(self, task: Task, settings: Path) -> None:
        run = self.directory.run(task)
        run.mkdir(parents=True, exist_ok=True)
        (run / "config.yaml").write_text(settings.read_text())
        write_metrics(self.directory, task, 0.0, self.generator)
        outcome.write_finished(run, step=40)

    def measured(self, task: Task, request: Path) -> None:
        rate = 0.5
        if not task.is_start:
            rate = load_config(self.directory.run(task) / "config.yaml").train.learning_rate * 1e3
        asked = json.loads(request.read_text())
        path = self.directory.evaluation(task)
        path.unlink(missing_ok=True)
        if not path.parent.exists():
            write_counts(self.study, self.directory, task, np.full(8, rate), self.generator)
        else:
            counts = {"samples": asked["samples"], "rows": list(range(8)), "classes": [1] * 8, "reward": [0.5] * 8}
            path.write_text(json.dumps({**counts, "solved": [round(rate * asked["samples"])] * 8}))
        path.write_text(json.dumps({**json.loads(path.read_text()), "request": fingerprint(asked)}))


class Ended:
    pid = 0

    def __init__(self, code: int) -> None:
        self.code = code

    def poll(self) -> int:
        return self.code


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[Runner, Machine]]:
    """machine(code, jobs=1, shard=None, **keys): a runner of a study with two arms and two seeds, and its machine."""
    monkeypatch.setattr(running, "POLL", 0.0)
    monkeypatch.setattr(running, "RETRY", 0.0)

    def make(
        code: Code = lambda task, phase: 0, jobs: int = 1, shard: str | None = None, resume: bool = False, **more: Any
    ) -> tuple[Runner, Machine]:
        evaluation = {"samples": 64, "start_samples": 64}
        study = study_with(["grpo", "noise"], tmp_path / "study", **{"seeds": 2, "evaluation": evaluation, **more})
        directory, _ = open_directory(study, resume or shard is not None)
        made = Machine(study, directory, code)
        monkeypatch.setattr(launching, "start", made.start)
        tasks = tasks_of(study)
        return Runner(study, directory, Shard.parse(shard).of(tasks) if shard else tasks, jobs, made), made

    return make


def test_whole_seeds_come_first_and_everything_is_measured(machine: Any) -> None:
    runner, made = machine()
    assert runner.run() == 0
    names = ["starter/grpo seed 0", "starter/noise seed 0", "starter/grpo seed 1", "starter/noise seed 1"]
    assert made.started == ["measure starter start"] + [f"{do} {name}" for name in names for do in ("train", "measure")]
    config = load_config(made.directory.path / "runs" / "starter" / "noise" / "seed_0001" / "config.yaml")
    assert (config.train.seed, config.train.steps, config.observe.tensorboard) == (1, 40, False)
    again, made = machine(resume=True)
    assert again.run() == 0 and made.started == []


def test_a_failed_run_is_named_and_stops_no_other(machine: Any) -> None:
    runner, made = machine(lambda task, phase: 3 if task.name == "starter/noise seed 0" else 0)
    assert runner.run() == 1
    (failed,) = [job for job in runner.jobs if job.phase == "failed"]
    assert failed.reason.startswith("training ended with exit code 3: vdr: error: reward f raised ValueError (")
    assert sum(job.phase == "done" for job in runner.jobs) == 4
    again, made = machine(resume=True)
    assert again.run() == 0
    assert made.started == ["train starter/noise seed 0", "measure starter/noise seed 0"]


def test_a_training_that_ends_without_its_marker_has_failed(machine: Any) -> None:
    runner, made = machine()
    made.trained = lambda task, settings: None  # type: ignore[method-assign]
    assert runner.run() == 1
    assert all(job.phase == "failed" for job in runner.jobs if not job.task.is_start)


TUNING = {
    "tuning": {
        "seeds": [100, 101],
        "trials": {
            "grpo": [{"train.learning_rate": 1e-4}, {"train.learning_rate": 4e-4}],
            "noise": [{"train.learning_rate": 3e-4}, {"train.learning_rate": 2e-4}],
        },
    },
    "endpoint": "pass@1",
}


def test_the_best_trial_of_each_arm_runs_on_the_seeds_of_record(machine: Any) -> None:
    """The pretended model solves more with a larger learning rate."""
    runner, made = machine(**TUNING)
    assert runner.run() == 0
    assert made.started.index("train starter/grpo seed 0") > made.started.index(
        "measure starter/noise trial 2 seed 101"
    )
    rates = {
        arm: load_config(made.directory.run(Task("starter", arm, 0)) / "config.yaml").train.learning_rate
        for arm in ("grpo", "noise")
    }
    assert rates == {"grpo": 4e-4, "noise": 3e-4}
    record = record_of(made.study, made.directory)
    assert {(row["arm"], row["trial"]) for row in record.tuning if row["taken"]} == {("grpo", 1), ("noise", 0)}
    assert {run.trial for run in record.runs if run.arm == "grpo"} == {1}


def test_an_arm_whose_trial_failed_waits(machine: Any) -> None:
    runner, made = machine(lambda task, phase: int(task.name == "starter/noise trial 1 seed 100"), **TUNING)
    assert runner.run() == 1
    waiting = [job.task.name for job in runner.jobs if job.phase == "waiting"]
    assert waiting == ["starter/noise seed 0", "starter/noise seed 1"]
    assert runner.jobs[-1].reason == "its arm is not tuned: a trial has not been evaluated"
    assert "train starter/grpo seed 1" in made.started


def test_shards_share_everything_out_once(machine: Any) -> None:
    for more in ({}, TUNING):
        study = machine(resume=True, **more)[1].study if not more else study_with(["grpo", "noise"], Path("x"), **more)
        tasks = tasks_of(study)
        parts = [Shard(number, 3).of(tasks) for number in (1, 2, 3)]
        assert sorted(str(task) for part in parts for task in part) == sorted(map(str, tasks))
        if more:  # an arm's runs of record are where its trials are
            arms = [{task.arm for task in part} for part in parts]
            assert sorted(map(str, arms)) == ["{'grpo'}", "{'noise'}", "{None}"]


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "1/0"])
def test_a_shard_is_one_of_n(text: str) -> None:
    with pytest.raises(ConfigError, match="give I/N"):
        Shard.parse(text)


def test_a_run_that_another_process_works_on_is_left_to_it(machine: Any) -> None:
    runner, made = machine()
    task = Task("starter", "noise", 0)
    lock = try_lock(made.directory.work(task, "lock"))
    assert lock is not None
    runner.find_done()
    for _ in range(30):
        going_on = runner.step()
    (job,) = [job for job in runner.jobs if job.phase == "elsewhere"]
    assert job.task == task and going_on
    os.close(lock)
    while runner.step():
        pass
    assert job.phase == "done"


NEW_PROBLEMS = {**TUNING, "endpoint": "new_problems"}


def test_tuning_does_not_wait_for_a_start_that_its_endpoint_does_not_need(machine: Any) -> None:
    runner, made = machine(shard="2/3", **TUNING)  # the start is in part 1
    assert runner.run() == 0
    assert "measure starter start" not in made.started and "measure starter/grpo seed 1" in made.started
    record = record_of(made.study, made.directory)
    assert [row["trial"] for row in record.tuning if row["arm"] == "grpo" and row["taken"]] == [1]


def test_a_shard_waits_for_a_start_that_its_endpoint_needs(machine: Any) -> None:
    runner, made = machine(shard="2/3", **NEW_PROBLEMS)
    lock = try_lock(made.directory.work(Task("starter"), "lock"))  # as if part 1 evaluated it
    assert lock is not None
    runner.find_done()
    for _ in range(30):
        going_on = runner.step()
    start, *_, run = runner.jobs
    assert going_on and start.task.is_start and start.phase == "elsewhere"
    assert run.phase == "waiting" and run.reason.endswith("the starting model has not been evaluated")
    os.close(lock)
    while runner.step():
        pass
    assert all(job.phase == "done" for job in runner.jobs)
    assert made.started.count("measure starter start") == 1


def test_a_shard_whose_start_fails_says_so(machine: Any) -> None:
    runner, made = machine(lambda task, phase: int(task.is_start), shard="2/3", **NEW_PROBLEMS)
    assert runner.run() == 1
    assert {job.reason for job in runner.jobs if job.phase == "waiting"} == {
        "its arm is not tuned: the starting model has not been evaluated"
    }
    assert "measure starter/grpo trial 2 seed 101" in made.started


def _open_at_once(study: Study, count: int, resume: bool) -> list[str]:
    """Open the study's directory in `count` processes at the same moment: ok, or the refusal, of each."""
    context = multiprocessing.get_context("fork")
    barrier, said = context.Barrier(count), context.Queue()

    def opened() -> None:
        barrier.wait(60)
        try:
            open_directory(study, resume)
            said.put("ok")
        except ConfigError as error:
            said.put(str(error))

    processes = [context.Process(target=opened, daemon=True) for _ in range(count)]
    for process in processes:
        process.start()
    found = [said.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    return found


def test_shards_that_start_together_share_a_new_directory(tmp_path: Path) -> None:
    for attempt in range(5):
        study = study_with(["grpo", "noise"], tmp_path / f"study_{attempt}")
        assert _open_at_once(study, 8, resume=True) == ["ok"] * 8
        assert [path.name for path in sorted(tmp_path.glob(f"study_{attempt}/*"))] == ["study.yaml", "work"]


def test_of_studies_that_start_together_one_gets_the_new_directory(tmp_path: Path) -> None:
    found = _open_at_once(study_with(["grpo", "noise"], tmp_path / "study"), 8, resume=False)
    assert found.count("ok") == 1 and sum("holds this study already" in line for line in found) == 7


def test_files_of_a_start_that_was_killed_do_not_take_the_directory(tmp_path: Path) -> None:
    study = study_with(["grpo", "noise"], tmp_path / "study")
    (tmp_path / "study" / "work").mkdir(parents=True)
    (tmp_path / "study" / "work" / "open.lock").touch()
    (tmp_path / "study" / ".study.yaml.123.partial").write_text("output")
    assert open_directory(study, resume=False)[1] == []
    assert (tmp_path / "study" / "study.yaml").is_file()


def test_a_directory_that_is_refused_stays_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    with pytest.raises(ConfigError, match="is not empty and holds no study"):
        open_directory(study_with(["a", "b"], tmp_path), resume=False)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_two_studies_in_one_directory_do_not_meet(machine: Any) -> None:
    directory = machine()[1].directory
    one, two = Shard(1, 2), Shard(2, 2)
    with study_locked(directory, one), study_locked(directory, two):
        with pytest.raises(ConfigError, match="shard 1/2 is running already"), study_locked(directory, one):
            pass
        with pytest.raises(ConfigError, match="another vdr study is running"), study_locked(directory, None):
            pass
    refused = pytest.raises(ConfigError, match="another vdr study is running")
    with study_locked(directory, None), refused, study_locked(directory, one):
        pass
    with study_locked(directory, None):
        pass


def test_a_signal_ends_the_processes_and_the_study(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, made = machine()
    asked: list[int] = []

    class Running(Ended):
        def poll(self) -> int | None:  # type: ignore[override]
            return 143 if asked else None

    monkeypatch.setattr(launching, "start", lambda *_: Running(0))
    monkeypatch.setattr(launching, "end", lambda process, number: asked.append(number))
    made.update = lambda jobs: os.kill(os.getpid(), signal.SIGTERM)  # type: ignore[method-assign]
    assert runner.run() == 143
    assert asked == [signal.SIGTERM]
    assert all(job.phase == "waiting" for job in runner.jobs) and runner.slots == [None]
    again = try_lock(made.directory.work(runner.jobs[0].task, "lock"))
    assert again is not None
    os.close(again)


def test_a_directory_belongs_to_one_study(machine: Any, tmp_path: Path) -> None:
    machine()
    with pytest.raises(ConfigError, match="holds this study already; go on with it by --resume"):
        machine()
    with pytest.raises(ConfigError, match=r"other settings \(budget differs\)"):
        machine(resume=True, budget={"steps": 41})
    with pytest.raises(ConfigError, match=r"arms\.noise differs"):
        machine(resume=True, arms={"grpo": {"train.learning_rate": 1e-4}, "noise": {"train.learning_rate": 1.0}})
    study = study_with(
        ["grpo", "noise", "new"], tmp_path / "study", seeds=3, evaluation={"samples": 64, "start_samples": 64}
    )
    assert open_directory(study, resume=True)[1] == ["differs from when the study was started: arms, seeds"]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(ConfigError, match="is not empty and holds no study"):
        open_directory(study_with(["a", "b"], tmp_path / "full"), resume=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": 3}, "seeds 3, 4, 5 missing"),
        ({"seeds": [9]}, "seeds 0, 1, 2, 3, 4 and 1 more missing"),
        ({"equivalence": 0.2}, "equivalence differs"),
        ({"contrasts": []}, r"contrasts \[noise, grpo\] missing"),
        ({"contrasts": [["grpo", "noise"]]}, r"contrasts \[noise, grpo\] missing"),
        ({"seeds": 3, "equivalence": 0.2}, "equivalence differs; seeds 3, 4, 5 missing"),
    ],
)
def test_the_result_cannot_be_chosen_afterwards(machine: Any, changes: dict[str, Any], message: str) -> None:
    before = {"seeds": 6, "contrasts": [["noise", "grpo"]]}
    machine(**before)
    with pytest.raises(ConfigError, match=rf"holds a study with other settings \({message}\)"):
        machine(resume=True, **{**before, **changes})
    machine(resume=True, seeds=[7, *range(6)], contrasts=[["grpo", "noise"], ["noise", "grpo"]], secondary=["pass@1"])


def test_an_arm_with_its_trials_joins_a_tuned_study(machine: Any) -> None:
    runner, made = machine(**TUNING)
    assert runner.run() == 0
    arms = {name: {"train.learning_rate": 1e-4 + index * 1e-5} for index, name in enumerate(["grpo", "noise", "new"])}
    trials = TUNING["tuning"]["trials"]  # type: ignore[index]
    more = [{"train.learning_rate": 5e-4}, {"train.learning_rate": 6e-4}]

    def tuned(seeds: Sequence[int] = (100, 101), **changes: Any) -> dict[str, Any]:
        return {**TUNING, "arms": arms, "tuning": {"seeds": list(seeds), "trials": {**trials, "new": more, **changes}}}

    with pytest.raises(ConfigError, match=r"\(tuning\.trials\.noise differs\)"):
        machine(resume=True, **tuned(noise=more))
    with pytest.raises(ConfigError, match=r"\(tuning\.seeds differs\)"):
        machine(resume=True, **tuned([100, 101, 102]))
    with pytest.raises(ConfigError, match=r"\(tuning differs\)"):
        machine(resume=True, **{**TUNING, "tuning": None})
    runner, made = machine(resume=True, **tuned())
    assert runner.run() == 0
    assert made.started and all("/new " in line for line in made.started)
    assert load_config(made.directory.run(Task("starter", "new", 0)) / "config.yaml").train.learning_rate == 6e-4


def test_a_study_goes_on_with_a_version_that_has_more_keys(machine: Any) -> None:
    """Keys that the earlier version did not know have their defaults: study and evaluations stay the same."""
    runner, made = machine()
    assert runner.run() == 0
    path = made.directory.path / "study.yaml"
    path.write_text(path.read_text().replace("equivalence: 0.02\n", ""))
    assert "equivalence" not in path.read_text()
    again, made = machine(resume=True)
    request = again.request(Task("starter"))
    more = {**request, "settings": {**request["settings"], "data": {**request["settings"]["data"], "new": None}}}
    assert fingerprint(more) == fingerprint(request) != fingerprint({**request, "seed": 1})
    assert again.run() == 0 and made.started == []


def test_a_finished_run_with_other_settings_is_refused(machine: Any) -> None:
    runner, made = machine()
    runner.run()
    config = made.directory.run(Task("starter", "noise", 1)) / "config.yaml"
    config.write_text(config.read_text().replace("group_size: 16", "group_size: 8"))
    with pytest.raises(ConfigError, match="a run with other settings than the study gives starter/noise seed 1"):
        machine(resume=True)[0].run()


def test_the_machine_is_shared_between_slots() -> None:
    cores = len(os.sched_getaffinity(0))
    env = {"RANK": "0", "WORLD_SIZE": "2", "PATH": "x", "CUDA_VISIBLE_DEVICES": "4,5,6,7"}
    first, last = (launching.environment_of(slot, 2, 1, env) for slot in (0, 1))
    assert first["OMP_NUM_THREADS"] == str(max(1, cores // 2)) and "RANK" not in first
    assert (first["CUDA_VISIBLE_DEVICES"], last["CUDA_VISIBLE_DEVICES"]) == ("4,5", "6,7")
    assert launching.environment_of(0, 1, 1, env)["CUDA_VISIBLE_DEVICES"] == "4,5,6,7"
    assert launching.environment_of(5, 6, 1, {**env, "OMP_NUM_THREADS": "3"})["OMP_NUM_THREADS"] == "3"
    assert [launching.share_of(["0", "1"], slot, 3) for slot in range(3)] == [["0"], ["1"], ["0"]]


def test_gpus_are_counted_by_their_devices(tmp_path: Path) -> None:
    for name in ("nvidia0", "nvidia1", "nvidiactl", "null"):
        (tmp_path / name).touch()
    assert launching.visible_gpus({}, tmp_path) == ["0", "1"]
    assert launching.visible_gpus({"CUDA_VISIBLE_DEVICES": ""}, tmp_path) == []


def test_the_last_line_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert launching.last_line(log) == ""
    log.write_text("x" * 9000 + "\nvdr: error: no\n\n")
    assert launching.last_line(log) == "vdr: error: no"
