"""Each recipe: its keys, its plan without a network, its prompts and rewards on rows like its data set's."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path

import pytest
import yaml

from vdr_cli import recipes
from vdr_cli.beds.registry import BEDS
from vdr_cli.cli import app
from vdr_cli.config import Config
from vdr_cli.config.load import load_config
from vdr_cli.config.messages import dotted_keys
from vdr_cli.config.recipe import bed_recipe
from vdr_cli.config.yaml_text import parse_document
from vdr_cli.data.prompts import load_prompts
from vdr_cli.rewards.base import check_columns
from vdr_cli.rewards.calling import compute_rewards
from vdr_cli.rewards.loading import load_rewards

FROM_HUB = [name for name in recipes.NAMES if name not in BEDS]
COMPLETION = {"tldr": "A cat came in.", "gsm8k": "So \\boxed{42}.", "7b": "\\boxed{42}", "32b": "\\boxed{42}"}


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.chdir(tmp_path)


def set_keys(tree: dict, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for key, value in tree.items():
        keys += set_keys(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key]
    return keys


def read(name: str) -> Config:
    return load_config(recipes.recipe_path(name))


def test_names_are_the_files():
    assert {path.stem for path in recipes.recipe_path("starter").parent.glob("*.yaml")} == set(recipes.NAMES)


@pytest.mark.parametrize("name", recipes.NAMES)
def test_every_key_is_a_setting_and_every_line_fits(name):
    config = read(name)
    known = set(dotted_keys())
    free = ("launch.env.",)
    given = [key for key in set_keys(yaml.safe_load(recipes.recipe_text(name))) if not key.startswith(free)]
    assert set(given) <= known and len(given) > 10
    assert config.disagreement.mode != "none", "what this product is for is on"
    assert all(len(line) <= 120 for line in recipes.recipe_path(name).read_text(encoding="utf-8").splitlines())
    assert recipes.summary(name) and recipes.recipe_text(name).startswith("# ")


@pytest.mark.parametrize("name", recipes.NAMES)
def test_an_editor_finds_the_schema_and_has_nothing_to_underline(name):
    jsonschema = pytest.importorskip("jsonschema")
    (named,) = re.findall(r"^# yaml-language-server: \$schema=file://(.+)$", recipes.recipe_text(name), re.MULTILINE)
    schema = json.loads(Path(named).read_text(encoding="utf-8"))
    (relative,) = re.findall(r"\$schema=(.+)$", recipes.recipe_path(name).read_text(encoding="utf-8"), re.MULTILINE)
    assert (recipes.recipe_path(name).parent / relative).resolve() == Path(named)
    settings = parse_document(recipes.recipe_text(name), name).tree
    jsonschema.validate(settings, schema)
    settings["train"]["stepz"] = 3
    with pytest.raises(jsonschema.ValidationError, match="stepz"):
        jsonschema.validate(settings, schema)


@pytest.mark.parametrize("name", BEDS)
def test_a_beds_recipe_says_what_its_model_gets_anyway(name):
    written = yaml.safe_load(recipes.recipe_text(name))
    for section, settings in bed_recipe(name).items():
        assert settings.items() <= written[section].items()


@pytest.mark.parametrize("name", recipes.NAMES)
def test_copied_recipe_shows_its_plan_without_a_network(name, monkeypatch, capsys):
    def no_network(*_args):
        raise AssertionError("a dry run must not need a network")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    Path("hosts").write_text("".join(f"node{number} slots=8\n" for number in range(1, 5)))
    assert app.run(["recipes", "copy", name]) == 0
    assert app.run(["train", f"{name}.yaml", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    processes = {"7b": 8, "32b": 32}.get(name, 1)
    assert re.search(rf"^# processes +{processes}$", shown, re.MULTILINE)
    (Path("again.yaml")).write_text(shown[shown.index("model:") :])
    assert load_config("again.yaml") == read(name), "the plan is a configuration file"
    assert not Path("runs").exists()


@pytest.mark.parametrize("name", FROM_HUB)
def test_rows_like_the_data_sets_become_prompts_and_rewards(name, rows, tokenizer):
    if name != "tldr":
        pytest.importorskip("math_verify")
    config = read(name)
    data = config.data.model_copy(update={"name": str(rows(name)), "subset": None})
    prompts = load_prompts(data, "train", tokenizer)
    prompt = prompts[0]
    text = "".join(tokenizer.convert_ids_to_tokens(prompt.token_ids))
    if config.data.as_chat:
        assert text.startswith("<|im_start|>system\nPlease reason") and text.endswith("<|im_start|>assistant\n")
    else:
        assert text.endswith("TL;DR:")
    rewards = load_rewards(config.rewards, config.data.name)
    check_columns(rewards, prompts.columns)
    right, wrong = COMPLETION[name], "no idea"
    completions = [right, wrong]
    if config.data.as_chat:
        completions = [[{"role": "assistant", "content": text}] for text in completions]
    scores = compute_rewards(rewards, [prompt, prompt], completions, [[5], [6]], config.rewards.timeout)
    expected = [len(right), len(wrong)] if name == "tldr" else [1.0, 0.0]
    assert scores[:, 0].tolist() == expected


def test_the_commands(capsys):
    assert app.run(["recipes"]) == 0
    listed = capsys.readouterr().out
    assert [line.split()[0] for line in listed.splitlines()] == list(recipes.ALL)
    assert app.run(["recipes", "list"]) == 0 and capsys.readouterr().out == listed
    assert app.run(["recipes", "show", "gsm8k"]) == 0
    assert capsys.readouterr().out == recipes.recipe_text("gsm8k")
    assert app.run(["recipes", "copy", "gsm8k", "mine.yaml"]) == 0
    assert Path("mine.yaml").read_text() == recipes.recipe_text("gsm8k")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["show", "gsm8"], "no recipe gsm8; did you mean gsm8k?"),
        (["show", "zzz"], "no recipe zzz; there are starter, countdown4"),
        (["copy", "tldr", "there.yaml"], "there.yaml already exists"),
        (["copy", "tldr", "none/x.yaml"], "no directory none"),
        (["burn"], "No such command 'burn'"),
    ],
)
def test_mistakes_are_one_line(arguments, expected, capsys):
    Path("there.yaml").write_text("mine")
    assert app.run(["recipes", *arguments]) == 2
    streams = capsys.readouterr()
    assert expected in streams.err and streams.err.count("\n") == 1 and streams.out == ""
    assert Path("there.yaml").read_text() == "mine"


def test_the_study_can_answer_its_question(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Copied and checked as a user does it: every arm's settings are valid, and 20 seeds find one deviation."""
    assert app.run(["recipes", "copy", "study", "mine.yaml"]) == 0
    assert "start with vdr study mine.yaml" in capsys.readouterr().out
    assert app.run(["study", "mine.yaml", "--dry-run"]) == 0
    said = capsys.readouterr()
    assert said.err == "" and "detectable difference  0.94" in said.out
    assert sum(line.startswith("starter/") for line in said.out.splitlines()) == 15 * 20
    assert not (tmp_path / "studies").exists()
    assert all(len(line) <= 120 for line in recipes.recipe_text("study").splitlines())
