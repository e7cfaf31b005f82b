"""`vdr train` up to the moment it trains or starts ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vdr_cli.cli import app, training
from vdr_cli.config import Config, recipe
from vdr_cli.config.load import config_hash, dump_run_record, load_config


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recipe, "bed_recipe", lambda model: {"train": {"steps": 7}})


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> dict:
    seen: dict = {}

    def train(config: Config, resume: str | None) -> int:
        seen.update(config=config, resume=resume)
        return seen.get("code", 0)

    def launch(config: Config, arguments: list[str]) -> int:
        seen.update(launched=config, arguments=arguments)
        return 0

    monkeypatch.setattr(training, "_train", train)
    monkeypatch.setattr(training, "_launch", launch)
    return seen


FLAGS = {
    "--model": ("starter", "model.name"),
    "--data": ("d.jsonl", "data.name"),
    "--mode": ("per_token", "disagreement.mode"),
    "--measure": ("rmi", "disagreement.measure"),
    "--members": (4, "disagreement.members"),
    "--bonus": ("none", "bonus.source"),
    "--weight": (0.5, "bonus.weight"),
    "--group-size": (6, "rollout.group_size"),
    "--eval-k": ([1, 4], "train.eval_k"),
    "--max-new-tokens": (9, "rollout.max_new_tokens"),
    "--learning-rate": (0.001, "train.learning_rate"),
    "--loss": ("grpo", "grpo.loss"),
    "--steps": (11, "train.steps"),
    "--seed": (3, "train.seed"),
    "--output": ("out", "train.output"),
    "--ds-config": ("zero2", "engine.ds_config"),
    "--num-processes": (1, "launch.num_processes"),
    "--include": ("a", "launch.include"),
    "--exclude": ("b", "launch.exclude"),
    "--master-addr": ("h", "launch.master_addr"),
    "--master-port": (1234, "launch.master_port"),
    "--ssh-port": (2222, "launch.ssh_port"),
    "--launcher": ("slurm", "launch.launcher"),
    "--node-rank": (1, "launch.node_rank"),
    "--max-restarts": (2, "launch.max_restarts"),
}


def test_every_flag_reaches_its_setting(started, monkeypatch):
    monkeypatch.setattr(training, "wants_ranks", lambda launch: False)
    monkeypatch.setattr(training, "world_size", lambda launch: 1)
    Path("d.jsonl").write_text('{"prompt": "a"}\n')
    Path("f.py").write_text("")
    typed = {
        flag: ",".join(map(str, value)) if isinstance(value, list) else value for flag, (value, _) in FLAGS.items()
    }
    arguments = [text for flag, value in typed.items() for text in (flag, str(value))]
    arguments += ["--set", "train.eval_every=5", "--set", "data.eval_name=d.jsonl"]  # else --eval-k is refused
    assert app.run(["train", *arguments, "--reward", "f.py:g=0.5", "--reward", "length"]) == 0
    dumped = started["config"].model_dump()
    for flag, (value, key) in FLAGS.items():
        section, name = key.split(".")
        assert dumped[section][name] == value, flag
    functions = [(entry["name"], entry["weight"]) for entry in dumped["rewards"]["functions"]]
    assert functions == [("f.py:g", 0.5), ("length", 1.0)]


def test_every_flag_is_tried():
    """A new flag needs a line in FLAGS above, so that it is known to reach its setting."""
    from vdr_cli.cli import train

    assert {flag.name: flag.key for flag in train.FLAGS if flag.name not in ("--hostfile", "--no-ssh")} == {
        name: key for name, (_, key) in FLAGS.items()
    }


def test_precedence_and_exit_code(started):
    Path("run.yaml").write_text("train: {steps: 1, seed: 1, micro_batch_size: 1}\n")
    started["code"] = 143
    assert app.run(["train", "run.yaml", "--set", "train.seed=2", "--set", "train.steps=2", "--steps", "3"]) == 143
    config = started["config"].train
    assert (config.steps, config.seed, config.micro_batch_size) == (3, 2, 1)


def test_output_is_decided_once_and_handed_to_the_ranks(started):
    assert app.run(["train"]) == 0
    assert started["config"].train.output.startswith("runs/2")
    assert not Path("runs").exists()
    assert app.run(["train", "--num-processes", "2", "--set", "data.split=train"]) == 0
    given = started["arguments"]
    assert given[:5] == ["train", "--num-processes", "2", "--set", "data.split=train"]
    assert given[5] == "--output" and given[6].startswith("runs/2")
    assert app.run(["--local_rank=0", "train", "--num-processes", "2", "--output", "o"]) == 0
    assert started["arguments"] == ["train", "--num-processes", "2", "--output", "o"]


def test_runs_of_the_same_second_do_not_meet():
    from vdr_cli.checks import default_output

    assert len({default_output() for _ in range(3)}) == 3


def test_extras_are_looked_for_before_anything_starts(started, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert app.run(["train", "--set", "observe.wandb=true"]) == 2
    assert "observe.wandb needs wandb: pip install wandb" in capsys.readouterr().err
    assert app.run(["train", "--set", "model.lora.rank=2"]) == 2
    assert "model.lora needs peft: pip install peft" in capsys.readouterr().err


def become_rank(monkeypatch, rank, size):
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500}
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))


def test_a_rank_trains(started, monkeypatch, capsys):
    become_rank(monkeypatch, 1, 2)
    monkeypatch.setattr(training, "_agreed_output", lambda config, resume: config)
    assert app.run(["train", "--num-processes", "2", "--output", "o"]) == 0
    assert started["config"].train.output == "o" and "launched" not in started
    become_rank(monkeypatch, 0, 9)
    assert app.run(["train"]) == 2
    assert "prompts_per_step 8 is below 9 processes" in capsys.readouterr().err


def test_ranks_agree_on_the_directory(started, monkeypatch, capsys):
    from vdr_cli.engine import collectives, processes

    said: list = []
    become_rank(monkeypatch, 1, 2)
    monkeypatch.setattr(processes, "start_distributed", lambda *_: None)
    monkeypatch.setattr(collectives, "is_main", lambda: said == ["main"])
    monkeypatch.setattr(collectives, "broadcast_object", lambda own: "runs/of-rank-0")
    assert app.run(["train"]) == 0
    assert started["config"].train.output == "runs/of-rank-0"
    finished_run("o", seen=started)
    assert app.run(["train", "--output", "o"]) == 0  # rank 0 looks, not this one
    said.append("main")
    monkeypatch.setenv("RANK", "0")
    assert app.run(["train", "--output", "o"]) == 2
    assert "holds this run already" in capsys.readouterr().err


def test_dry_run_prints_a_configuration_that_loads(started, capsys):
    assert app.run(["train", "--dry-run", "--steps", "12", "--set", "train.eval_every=5"]) == 0
    shown = capsys.readouterr().out
    assert started == {} and list(Path.cwd().iterdir()) == []
    Path("again.yaml").write_text(shown)
    assert load_config("again.yaml") == load_config(overrides=["train.steps=12", "train.eval_every=5"])
    assert [line for line in shown.splitlines() if line and line[0] != "#"] == [
        "model:", "  name: starter", "train:", "  steps: 12", "  eval_every: 5"
    ]  # fmt: skip
    plan = dict(line[2:].split("  ", 1) for line in shown.splitlines() if line.startswith("# "))
    plan = {name: value.strip() for name, value in plan.items()}
    assert plan["processes"] == "1"
    assert plan["completions per rollout"] == "64 = 8 groups x 8"
    assert plan["completion tokens"] == "at most 16,384 per rollout, 196,608 in the run"
    assert plan["held-out evaluations"].startswith("4,")
    assert plan["checkpoints"] == "1 written, 1 kept"


def test_dry_run_with_all_prints_every_setting(started, capsys):
    assert app.run(["train", "--dry-run", "--all", "--set", "model.lora={rank: 3}"]) == 0
    shown = capsys.readouterr().out
    Path("again.yaml").write_text(shown)
    assert load_config("again.yaml") == load_config(overrides=["model.lora.rank=3"]) and "max_grad_norm" in shown
    assert app.run(["train", "--dry-run", "--set", "model.lora={rank: 3}"]) == 0
    assert "max_grad_norm" not in capsys.readouterr().out
    assert app.run(["train", "--all"]) == 2 and "add --dry-run" in capsys.readouterr().err


def finished_run(directory: str, *arguments: str, seen: dict) -> Path:
    """A finished run's directory, as far as the command line looks at it."""
    assert app.run(["train", "--output", directory, *arguments]) == 0
    Path(directory).mkdir(parents=True)
    (Path(directory) / "config.yaml").write_text(dump_run_record(seen["config"]))
    return Path(directory)


def test_directory_of_another_run(started, capsys):
    finished_run("o", seen=started)
    assert app.run(["train", "--output", "o"]) == 2
    assert "train.output o holds this run already; continue it with --resume auto" in capsys.readouterr().err
    assert app.run(["train", "--output", "o", "--seed", "4"]) == 2
    assert "holds another run (train.seed differs); give another --output" in capsys.readouterr().err
    assert app.run(["train", "--output", "o", "--resume", "auto"]) == 0
    assert started["resume"] == "auto"
    assert app.run(["train", "--output", "o", "--resume", "auto", "--seed", "4"]) == 2
    assert "holds a run with other settings (train.seed differs)" in capsys.readouterr().err
    assert app.run(["train", "--output", "o", "--resume", "auto", "--steps", "40"]) == 0
    Path("o/config.yaml").write_text("something: else\n")
    assert app.run(["train", "--output", "o"]) == 2
    assert "holds another run" in capsys.readouterr().err


def test_a_run_that_another_process_writes(started, capsys, writer_elsewhere):
    directory = finished_run("o", seen=started)
    with writer_elsewhere(directory):
        for more in ((), ("--resume", "auto"), ("--resume", "auto", "--num-processes", "2")):
            assert app.run(["train", "--output", "o", *more]) == 2
            assert "train.output o: another process is writing this run; wait for it" in capsys.readouterr().err
    assert app.run(["train", "--output", "o", "--resume", "auto"]) == 0


def test_a_run_is_not_written_over_by_another_ones_checkpoint(started, capsys):
    """A command repeated after a crash would set aside what the first attempt had done."""
    theirs = finished_run("a", seen=started) / "checkpoints" / "step_000002"
    theirs.mkdir(parents=True)
    directory = finished_run("o", seen=started)
    resumed = ["train", "--output", "o", "--resume"]
    assert app.run([*resumed, str(theirs)]) == 0  # nothing to lose yet
    own = directory / "checkpoints" / "step_000004"
    own.mkdir(parents=True)
    assert app.run([*resumed, str(theirs)]) == 2
    said = capsys.readouterr().err
    assert "train.output o holds a run with checkpoints, and --resume a/checkpoints/step_000002 is not one" in said
    assert app.run([*resumed, str(own.resolve())]) == app.run([*resumed, "auto"]) == 0


def test_a_run_directory_is_no_checkpoint(started, capsys):
    finished_run("o", "--seed", "9", seen=started)
    for more in ((), ("--output", "o")):
        assert app.run(["train", "--resume", "o", *more]) == 2
        assert "--resume o: a run directory; give --output o --resume auto" in capsys.readouterr().err


def test_resume_takes_the_runs_own_settings(started, capsys, monkeypatch):
    directory = finished_run("o", "--seed", "9", "--members", "3", seen=started)
    assert app.run(["train", "--output", "o", "--resume", "auto"]) == 0
    assert (started["config"].train.seed, started["config"].disagreement.members) == (9, 3)
    checkpoint = directory / "checkpoints" / "step_000002"
    checkpoint.mkdir(parents=True)
    assert app.run(["train", "--resume", str(checkpoint)]) == 0
    assert (started["config"].train.seed, started["config"].train.output) == (9, "o")
    monkeypatch.setenv("HOME", str(Path.cwd()))
    assert app.run(["train", "--resume=~/o/checkpoints/step_000002"]) == 0  # which no shell expands
    assert (started["config"].train.seed, started["config"].train.output) == (9, "o")
    assert app.run(["train", "--resume", "o/checkpoints/step_000009"]) == 2
    assert "no such checkpoint directory" in capsys.readouterr().err
    assert app.run(["train", "--resume", "auto"]) == 2
    assert "--resume needs --output" in capsys.readouterr().err


def test_the_directory_that_is_named_anywhere_gets_the_run(started):
    """Not the checkpoint's own, whose later steps a run from there would set aside."""
    checkpoint = finished_run("a", "--seed", "9", seen=started) / "checkpoints" / "step_000002"
    checkpoint.mkdir(parents=True)
    assert app.run(["train", "--resume", str(checkpoint), "--set", "train.output=b"]) == 0
    assert (started["config"].train.seed, started["config"].train.output) == (9, "b")
    Path("branch.yaml").write_text("train: {seed: 9, output: c}\n")
    assert app.run(["train", "branch.yaml", "--resume", str(checkpoint)]) == 0
    assert started["config"].train.output == "c"
    Path("same.yaml").write_text("train: {seed: 9}\n")
    assert app.run(["train", "same.yaml", "--resume", str(checkpoint)]) == 0
    assert started["config"].train.output == "a"


def test_a_checkpoint_of_another_run(started, capsys):
    checkpoint = finished_run("a", "--seed", "9", seen=started) / "checkpoints" / "step_000002"
    checkpoint.mkdir(parents=True)
    assert app.run(["train", "--resume", str(checkpoint), "--output", "b", "--learning-rate", "0.5"]) == 0
    assert (started["config"].train.seed, started["config"].train.output) == (9, "b")
    Path("other").mkdir()
    Path("other/config.json").write_text("{}")
    for other in (["--model", "other"], ["--ds-config", "zero2"]):
        assert app.run(["train", "--resume", str(checkpoint), "--output", "b", *other]) == 2
        assert "differs in its run" in capsys.readouterr().err


def test_results_without_settings_are_not_written_over(started, capsys):
    Path("o").mkdir()
    Path("o/metrics.jsonl").write_text("")
    assert app.run(["train", "--output", "o"]) == 2
    assert "train.output o holds metrics.jsonl of a run whose config.yaml is gone" in capsys.readouterr().err


def test_a_runs_configuration_repeats_it_elsewhere(started):
    directory = finished_run("o", "--seed", "9", seen=started)
    first = started["config"]
    assert app.run(["train", str(directory / "config.yaml")]) == 0
    assert started["config"].train.output != "o"
    assert config_hash(started["config"]) == config_hash(first)


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["--model", "./none"], 2, "model.name ./none: no such directory"),
        (["--model", "empty"], 2, "neither config.json nor model/config.json"),
        (["--data", "none.jsonl", "--reward", "length"], 2, "data.name none.jsonl: no such file"),
        (["--data", "notes.txt", "--reward", "length"], 2, "must end in one of"),
        (["--data", "empty.jsonl", "--reward", "length"], 3, "the file is empty"),
        (["--data", "d.jsonl"], 2, "has no reward of its own"),
        (["--data", "typo.jsonl"], 3, "typo.jsonl: no column prompt; the columns are promt, answer; did you mean"),
        (["--data", "typo.csv"], 3, "typo.csv: no column prompt; the columns are promt, answer; did you mean promt?"),
        (["--data", "d.jsonl", "--reward", "length", "--set", "train.eval_every=5"], 2, "give data.eval_name"),
        (["--ds-config", "zero9"], 2, "engine.ds_config zero9"),
        (["--num-processes", "9"], 2, "below 9 processes"),
        (["--hostfile", "none"], 2, "launch.hostfile none: no such file"),
        (["--hostfile", "hosts", "--num-processes", "3"], 2, "host node1 has 2 slots"),
        (["--hostfile", "hosts", "--set", "train.prompts_per_step=2", "--dry-run"], 2, "below 4 processes"),
        (["--no-ssh", "--node-rank", "0", "--hostfile", "hosts"], 2, "--output is needed"),
        (["--hostfile", "hosts", "--set", "launch.env.A=$(id)", "--dry-run"], 2, "launch.env.A: '$(id)' has '$' in it"),
        (
            ["--hostfile", "hosts", "--master-addr", "a;b", "--dry-run"],
            2,
            "launch.master_addr 'a;b' is not a host name",
        ),
        (["--hostfile", "hosts", "--node-rank", "0", "--dry-run"], 2, "launch.node_rank is set without launch.no_ssh"),
        (
            ["--hostfile", "hosts", "--output", "a$b", "--dry-run"],
            2,
            "a$b' has a character that a shell on the hosts could interpret",
        ),
        (["--output", "notes.txt/run"], 4, "is a file"),
        (["--output", "/proc/run"], 4, "train.output /proc/run: cannot write in /proc"),
        (["--reward", "length=much"], 2, "--reward length=much: the weight 'much' is not a number"),
        (["--members", "1"], 2, "--members: disagreement.members must be at least 2, not 1"),
        (["--mode", "eos"], 2, "--mode: disagreement.mode must be 'none', 'per_token' or 'end_of_sequence', not 'eos'"),
        (["--set", "disagreement.credit=token"], 2, "need mode per_token"),
        (["--reward", "lenght"], 2, "no built-in lenght; did you mean length?"),
        (["--reward", ""], 2, "no built-in without a name"),
        (["--reward", "none.py:f"], 2, "rewards.functions: none.py:f: no such file"),
        (["--reward", ":f"], 2, "must be module:function or file.py:function"),
        (["--reward", "~nosuchuser/a.py:f"], 2, "there is no such user"),
        (["--model", "x" * 300], 2, "is longer than a file name can be"),
        (["--output", ""], 2, "--output: train.output is empty"),
        (["--output", "x" * 300], 2, "is longer than a file name can be"),
        (["--resume", "x" * 300, "--output", "o"], 2, "is longer than a file name can be"),
        (["--data", "/dev/null", "--reward", "length"], 2, "neither a file nor a directory"),
        (["--ds-config", "binary.json"], 2, "engine.ds_config binary.json: cannot be read as JSON"),
        (["--ds-config", "list.json"], 2, "zero_optimization must be an object"),
    ],
)
def test_refused_before_anything_starts(arguments, code, expected, started, capsys):
    Path("empty").mkdir()
    Path("typo.jsonl").write_text('{"promt": "a", "answer": 1}\n')
    Path("typo.csv").write_text("promt,answer\na,1\n")
    Path("notes.txt").write_text("x")
    Path("hosts").write_text("node1 slots=2\nnode2 slots=2\n")
    Path("empty.jsonl").write_text("")
    Path("binary.json").write_bytes(b"\xff\xfe\x00")
    Path("list.json").write_text('{"zero_optimization": []}')
    Path("d.jsonl").write_text(json.dumps({"prompt": "a"}))
    before = sorted(Path.cwd().iterdir())
    assert app.run(["train", *arguments]) == code
    streams = capsys.readouterr()
    assert expected in streams.err and streams.err.count("\n") == 1 and started == {}
    assert sorted(Path.cwd().iterdir()) == before


@pytest.mark.parametrize("more", [[], ["--dry-run"], ["--num-processes", "2"]])
@pytest.mark.parametrize("given", ["environment", "launch.env"])
def test_a_variable_that_deepspeed_cannot_read_is_named(
    started, more: list[str], given: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if given == "environment":
        monkeypatch.setenv("DEEPSPEED_TIMEOUT", "1h")
    else:
        more = [*more, "--set", "launch.env.DEEPSPEED_TIMEOUT=1h"]
    assert app.run(["train", *more]) == 2 and not started
    assert "the environment variable DEEPSPEED_TIMEOUT is '1h', not a whole number" in capsys.readouterr().err
