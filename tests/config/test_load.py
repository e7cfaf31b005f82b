"""Layers, round trips and the lines that a refused configuration prints."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vdr_cli.config import Config, TrainConfig, recipe
from vdr_cli.config.load import config_hash, dump_config, load_config
from vdr_cli.config.yaml_text import dump_tree, parse_document
from vdr_cli.errors import ConfigError


@pytest.fixture(autouse=True)
def _fixed_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        recipe, "bed_recipe", lambda model: {"train": {"steps": 77, "seed": 5}} if model == "starter" else {}
    )


@pytest.fixture
def write(tmp_path: Path):
    def _write(text: str) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return path

    return _write


def refused(*args, **kwargs) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_precedence(write):
    path = write("train: {steps: 10, seed: 1, micro_batch_size: 4}\ndata: {split: a}\n")
    config = load_config(path, ["train.steps=20", "train.micro_batch_size=2"], {"train.steps": 30, "data.name": None})
    assert (config.train.steps, config.train.micro_batch_size, config.train.seed) == (30, 2, 1)
    assert config.data.split == "a" and config.data.name == "starter"


def test_recipe_only_for_the_starter(write):
    assert load_config().train.steps == 77
    assert load_config(write("train: {seed: 1}")).train.model_dump(include={"steps", "seed"}) == {
        "steps": 77,
        "seed": 1,
    }
    assert load_config(flags={"model.name": "other"}).train.steps == TrainConfig().steps
    assert load_config(overrides=["model.name=other"]).train.steps == TrainConfig().steps
    assert load_config(write("model: {name: other}"), ["model.name=starter"]).train.steps == 77


def test_a_config_built_in_python_has_the_defaults_of_the_command_line():
    assert Config() == load_config()
    assert Config(train=TrainConfig(seed=1)) == load_config(overrides=["train.seed=1"])
    assert Config(model={"name": "other"}).train == TrainConfig()


def test_sections_merge_and_lists_replace(write):
    path = write(
        "launch: {env: {A: '1', B: '2'}}\nrewards: {functions: [{name: x}, {name: y}]}\nmodel: {lora: {rank: 4}}\n"
    )
    config = load_config(path, ["launch.env.B='3'", "rewards.functions=[{name: z}]", "model.lora.alpha=8"])
    assert config.launch.env == {"A": "1", "B": "3"}
    assert [f.name for f in config.rewards.functions] == ["z"]
    assert config.model.lora is not None and (config.model.lora.rank, config.model.lora.alpha) == (4, 8)
    assert load_config(path, ["model.lora=null"]).model.lora is None


def test_yaml_means_what_it_says(write):
    config = load_config(write("observe: {live: off}\ntrain: {learning_rate: 1e-5}\ndata:\nmodel: {name: no}\n"))
    assert config.observe.live == "off" and config.train.learning_rate == 1e-5 and config.model.name == "no"


@pytest.mark.parametrize(
    "typed", ["The answer comes after ####.", "# Task", "One line.\n\nAnother.", "'quoted # text'"]
)
def test_text_after_set_is_taken_as_it_was_typed(typed: str):
    """To YAML a blank and # begin a comment: the prompt would end there without a word."""
    config = load_config(None, [f"data.system_prompt={typed}", "data.as_chat=true"])
    assert config.data.system_prompt == typed.strip("'")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train:\n  stepz: 3\n", "run.yaml:2: train.stepz is not a setting; did you mean train.steps?"),
        (
            "train:\n  group_size: 3\n",
            "run.yaml:2: train.group_size is not a setting; did you mean rollout.group_size?",
        ),
        ("train.steps: 3\n", "run.yaml:1: train.steps is written as a section in a file: train: {steps: ...}"),
        ("members: 3\n", "run.yaml:1: members is not a setting; did you mean rollout.members or disagreement.members?"),
        ("xyzzy: 3\n", "run.yaml:1: xyzzy is not a setting; the sections are model, data,"),
        ("model:\n  lora:\n    rnk: 3\n", "run.yaml:3: model.lora.rnk is not a setting; did you mean model.lora.rank?"),
        ("train:\n  steps: abc\n", "run.yaml:2: train.steps must be a whole number, not 'abc'"),
        ("train:\n  steps: 0\n", "run.yaml:2: train.steps must be at least 1, not 0"),
        ("train:\n  learning_rate: .nan\n", "run.yaml:2: train.learning_rate must be"),
        ("train: 3\n", "run.yaml:1: train must be a section"),
        ("disagreement:\n  mode: eos\n", "'none', 'per_token' or 'end_of_sequence', not 'eos'"),
        ("rewards:\n  functions:\n  - name: a\n  - nme: b\n", "run.yaml:4: rewards.functions[1].nme is not a setting"),
        ("train:\n  adam_betas: [0.9]\n", "run.yaml:2: train.adam_betas[1] is required"),
        ("rollout: {group_size: 1}\n", "rollout.group_size is 1: a group is compared with itself"),
        ("disagreement:\n  scope: full\n  last_k: 2\n", "run.yaml:1: disagreement: last_k is set but scope is full"),
        ("disagreement: {mode: per_token, last_k: 2}\n", "run.yaml:1: disagreement: last_k is set but scope is full"),
        ("train:\n  steps: 1\n  steps: 2\n", "run.yaml:3: train.steps is given twice (first on line 2)"),
        ("train: [1\n", "run.yaml:2: not valid YAML"),
        ("train:\n\tsteps: 1\n", "run.yaml:2: not valid YAML"),
        ("- a\n", "not a configuration"),
        ("1: 2\n", "run.yaml:1: the key 1 must be text"),
        ("train: {1: 2}\n", "run.yaml:1: the key 1 must be text"),
        ("? \n: c\n", "run.yaml:1: the key before the colon must be text"),
        ("train: {steps: 3\0}\n", "run.yaml: not valid YAML"),
        ("train: {steps: !!int abc}\n", "run.yaml: not valid YAML"),
        ("a: &a [*a]\n", "run.yaml: not valid YAML"),
        ("grpo: {loss: bnpo}\n", "grpo.loss: bnpo is TRL's mean over a micro-batch's tokens; set dapo"),
        ("train: {steps: true}\n", "run.yaml:1: train.steps must be a whole number, not true"),
        ("train: {learning_rate: false}\n", "train.learning_rate must be a number, not false"),
        ("train: {seed: 99999999999}\n", "train.seed must be at most 4294967295, not 99999999999"),
        ("train: {adam_betas: [0.9, 1]}\n", "train.adam_betas[1] must be below 1, not 1"),
        ("rollout: {stop: ['']}\n", "rollout.stop[0] must be non-empty text, not ''"),
        ("train: {output: ''}\n", "run.yaml:1: train.output is empty"),
        ("model: {name: ' '}\n", "run.yaml:1: model.name is empty"),
        ("train: {output: ~nosuchuser/x}\n", "run.yaml:1: train.output: ~nosuchuser/x: there is no such user"),
        ('data: {name: "a\\0b"}\n', "data.name: 'a\\x00b' has a character that cannot be printed"),
        ("engine: {ds_config: " + "x" * 300 + "}\n", "is longer than a file name can be"),
        ("a: !!python/object:os.system {}\n", "run.yaml:1: not valid YAML"),
    ],
)
def test_refused_file(write, text: str, expected: str):
    message = refused(write(text))
    assert expected in message


def test_first_few_problems_on_one_line(write):
    message = refused(write("train: {a1: 1, steps: x, seed: -1, weight_decay: q}\nfoo: 1\n"))
    assert message.count(";") <= 6 and message.endswith("and 2 more")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.steps", "--set train.steps: needs KEY=VALUE"),
        ("=3", "needs KEY=VALUE"),
        ("train.steps=[", "not valid YAML"),
        ("train=3", "train is a section"),
        (
            "rewards.functions[0].name=b",
            "--set: rewards.functions[0] is not a setting; did you mean rewards.functions?",
        ),
        ("trian.steps=3", "--set: trian.steps is not a setting; did you mean train.steps?"),
        ("train.stepz=3", "--set: train.stepz is not a setting; did you mean train.steps?"),
        ("train.steps=x", "--set: train.steps must be a whole number, not 'x'"),
        ("train.steps=!!int abc", "not valid YAML"),
        ("train.steps=" + "9" * 5000, "not valid YAML"),
        ("train.steps.x=3", "--set: train.steps must be a whole number"),
    ],
)
def test_refused_override(override: str, expected: str):
    assert expected in refused(None, [override])


def test_refused_paths(tmp_path: Path):
    assert "no such configuration file" in refused(tmp_path / "none.yaml")
    assert "a directory" in refused(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    assert "not a text file" in refused(tmp_path / "binary")

    assert "is longer than a file name can be" in refused("x" * 300)
    assert "no such user" in refused("~nosuchuser/x.yaml")


def test_home_directories_and_numbers_in_the_environment(write, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = load_config(write("\ufefftrain: {output: ~/runs/a}\n"), ["launch.env.OMP_NUM_THREADS=4"])
    assert config.train.output == "/home/me/runs/a"
    assert config.launch.env == {"OMP_NUM_THREADS": "4"}


def test_dump_loads_back(tmp_path: Path):
    config = load_config(
        overrides=[
            "model.lora={rank: 2, targets: [q, v]}",
            "rewards.functions=[{name: 'f.py:g', weight: 0.5}]",
            "rollout.stop=['\n', 'off', '1e-3', '2024-01-01', '~', 'ü: #']",
            "launch.env={A: '010'}",
            "observe.live=off",
            "train.learning_rate=1e-7",
            "train.output=runs/x",
        ]
    )
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    assert load_config(path) == config
    assert dump_config(load_config(path)) == dump_config(config)
    assert list(parse_document(path.read_text(), "x").tree) == list(Config.model_fields)


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8"), min_size=1),
        st.text(st.characters(codec="utf-8")) | st.floats(allow_nan=False) | st.integers() | st.booleans() | st.none(),
    )
)
def test_dump_is_read_back_exactly(tree):
    if "<<" in tree:
        return
    back = parse_document(dump_tree(tree), "x").tree
    assert back == tree and [type(v) for v in back.values()] == [type(v) for v in tree.values()]


def test_hash_ignores_what_does_not_compute():
    base = config_hash(load_config())
    same = load_config(overrides=["launch.num_processes=2", "observe.live=off", "train.output=a"])
    assert config_hash(same) == base
    assert config_hash(load_config(overrides=["train.seed=9"])) != base


@pytest.mark.parametrize("given", ["train.eval_k=1, 8,64", "train.eval_k=[1, 8, 64]"])
def test_several_k_are_a_list_or_a_text_with_commas(given):
    more = ["train.eval_every=5", "train.eval_samples=64"]
    assert load_config(overrides=[given, *more]).train.eval_k == [1, 8, 64]
    assert load_config(flags={"train.eval_k": "64"}, overrides=more).train.eval_k == [64]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["train.eval_k=1,64", "train.eval_every=5"], "eval_k 1,64 needs eval_samples of at least 64, not 8"),
        (["train.eval_k=8"], "eval_k needs train.eval_every"),
        (["train.eval_k=0,1", "train.eval_every=5"], "train.eval_k[0] must be at least 1"),
        (["train.eval_k=one", "train.eval_every=5"], "train.eval_k"),
        (["train.eval_k=[]", "train.eval_every=5"], "train.eval_k"),
    ],
)
def test_a_k_that_cannot_be_computed_is_refused(settings, words):
    assert words in refused(overrides=settings)
