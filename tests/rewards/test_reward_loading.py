"""From a name to a function, and what a user reads when there is none."""

import functools
import sys
from pathlib import Path

import pytest

from vdr_cli.config import RewardsConfig
from vdr_cli.errors import ConfigError, DataError
from vdr_cli.rewards import builtin
from vdr_cli.rewards.base import LoadedReward, check_columns
from vdr_cli.rewards.builtin import BUILT_IN
from vdr_cli.rewards.calling import compute_rewards
from vdr_cli.rewards.loading import find_function, load_rewards
from vdr_cli.samples import Prompt

PROGRAMS = Path(__file__).parent / "programs"
SOURCE = (PROGRAMS / "my_rewards.py").read_text(encoding="utf-8")


@pytest.fixture
def rewards_file(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    file = tmp_path / "my_rewards.py"
    file.write_text(SOURCE)
    return file


def config(*names):
    return RewardsConfig.model_validate({"functions": [{"name": name} for name in names]})


def refused(name):
    with pytest.raises(ConfigError) as caught:
        find_function(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_starter_brings_its_reward():
    (loaded,) = load_rewards(RewardsConfig(), "starter")
    assert (loaded.name, loaded.weight) == ("countdown", 1.0)


def test_other_data_need_one():
    with pytest.raises(ConfigError, match=r"rewards\.functions is empty and data\.name gsm8k"):
        load_rewards(RewardsConfig(), "gsm8k")


def test_several_with_weights_in_order(rewards_file):
    functions = [{"name": f"{rewards_file}:brief", "weight": 0.5}, {"name": "length", "weight": -1}]
    loaded = load_rewards(RewardsConfig.model_validate({"functions": functions}), "any")
    assert [(reward.name, reward.weight) for reward in loaded] == [("brief", 0.5), ("length", -1.0)]
    assert loaded[0].function(completions=["a", "abcd"]) == [1.0, 0.0]


def test_by_module_in_the_working_directory(rewards_file, monkeypatch):
    monkeypatch.chdir(rewards_file.parent)
    assert find_function("my_rewards:brief")(completions=["a"]) == [1.0]


def test_by_installed_module():
    assert find_function("vdr_cli.beds.countdown:countdown") is BUILT_IN["countdown"]


def test_file_is_read_once_and_keeps_its_state(rewards_file):
    assert (
        find_function(f"{rewards_file}:brief").__globals__ is find_function(f"{rewards_file}:Holder.inner").__globals__
    )


def test_a_callable_object(rewards_file):
    (loaded,) = load_rewards(config(f"{rewards_file}:judge"), "any")
    assert loaded.name == "Judge"
    assert loaded.function(completions=["ab"]) == [4.0]


def test_equal_names_are_told_apart(rewards_file):
    names = [reward.name for reward in load_rewards(config("length", "length", "length"), "any")]
    assert names == ["length", "length_2", "length_3"]


def test_unknown_built_in_gets_the_nearest():
    assert "did you mean countdown?" in refused("countdwon")
    assert "exact_match" in refused("zzz")


@pytest.mark.parametrize("name", [":f", "module:", ":"])
def test_half_a_name(name):
    assert "must be module:function or file.py:function" in refused(name)


def test_missing_file(tmp_path):
    assert f"no such file {tmp_path / 'none.py'}" in refused(f"{tmp_path}/none.py:f")


def test_missing_module():
    assert "no module nowhere.at_all" in refused("nowhere.at_all:f")


def test_missing_function_gets_the_nearest(rewards_file):
    assert "no function breif there; it has brief" in refused(f"{rewards_file}:breif")


def test_not_a_function(rewards_file):
    assert "limit is not a function" in refused(f"{rewards_file}:limit")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import no_such_package", "ModuleNotFoundError: No module named 'no_such_package' (broken.py:1)"),
        ("x = 1\nx / 0", "ZeroDivisionError: division by zero (broken.py:2)"),
        ("def f(:\n  pass", "SyntaxError: invalid syntax (broken.py:1)"),
        ("raise SystemExit(3)", "SystemExit: 3 (broken.py:1)"),
        ("raise ValueError('two\\nlines \\x1b[31m')", "ValueError: two lines ?[31m (broken.py:1)"),
    ],
)
def test_import_that_fails_is_one_line(rewards_file, source, expected):
    broken = rewards_file.with_name("broken.py")
    broken.write_text(source)
    assert refused(f"{broken}:f") == f"rewards.functions: importing {broken} failed: {expected}"


def test_module_whose_own_import_fails(rewards_file, monkeypatch):
    monkeypatch.chdir(rewards_file.parent)
    rewards_file.with_name("needs_more.py").write_text("import no_such_package")
    assert "importing needs_more failed: ModuleNotFoundError" in refused("needs_more:f")


def test_math_verify_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    assert "pip install math-verify" in refused("math_verify")


def test_missing_column_is_named():
    rewards = load_rewards(config("exact_match", "countdown"), "any")
    check_columns(rewards, ["answer", "numbers", "target"])
    with pytest.raises(DataError, match=r"reward exact_match needs the column answer, which .* \(it has: solution\)"):
        check_columns(rewards, ["solution"])
    with pytest.raises(DataError, match="reward countdown needs the columns numbers, target"):
        check_columns(rewards, ["answer"])


def test_columns_that_need_not_be_there():
    def free(prompts, completions, completion_ids, level=1, *rest, **columns):
        return []

    check_columns([LoadedReward("free", 1.0, free)], [])
    check_columns([LoadedReward("bound", 1.0, functools.partial(BUILT_IN["exact_match"], answer=["1"]))], [])


def test_built_in_values():
    assert BUILT_IN["length"](["abc", ""]) == [3.0, 0.0]
    assert BUILT_IN["length"](["abc", "abcde"], target_length=[4, 4]) == [-1.0, -1.0]
    assert BUILT_IN["length"](["abc"], target_length=["4"]) == [-1.0]  # a CSV's text
    assert BUILT_IN["countdown"](["1+2*3", "1+2*3"], numbers=["1 2 3", [1, 2, 3]], target=["7", 8]) == [1.0, 0.0]
    message = [{"role": "assistant", "content": " 42\n"}]
    assert BUILT_IN["exact_match"]([message, "42", "4 2"], answer=[42, "42 ", "42"]) == [1.0, 1.0, 0.0]
    found = BUILT_IN["exact_match"](["42", "42.0", "0.5", "42"], answer=[42.0, 42.0, 0.5, "42.0"])
    assert found == [1.0, 1.0, 1.0, 0.0]  # pandas' floats, and a text that says what it says
    assert BUILT_IN["exact_match"](["None", "b", "c"], answer=[None, ["a", "b"], ["a", "b"]]) == [None, 1.0, 0.0]


def test_math_verify_values():
    pytest.importorskip("math_verify")
    scores = BUILT_IN["math_verify"](["so $\\frac{1}{2}$", "it is 3", "2"], answer=["0.5", "4", ""])
    assert scores == [1.0, 0.0, None]


def test_math_that_no_computer_can_finish_is_not_equal(monkeypatch):
    """The run goes on: the function is called on a main thread, where its limits hold."""
    pytest.importorskip("math_verify")
    monkeypatch.setattr(builtin, "MATH_SECONDS", 1)
    tower = "$9^{9^{9^{9}}}$"
    assert BUILT_IN["math_verify"]([tower, tower, "5"], answer=["5", "5", "5"]) == [0.0, 0.0, 1.0]
    (reward,) = load_rewards(RewardsConfig.model_validate({"functions": [{"name": "math_verify"}]}), "rows")
    assert reward.own_process is not None and reward.own_process.is_used
    rows = [Prompt(0, "2+3=", [1], {"answer": "5"})] * 2
    assert compute_rewards([reward], rows, ["so 5", tower], [[1]] * 2, 60.0)[:, 0].tolist() == [1.0, 0.0]


def test_the_readme_function_takes_strings_and_messages():
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    source = next(block for block in readme.split("```python\n")[1:] if "def correct(" in block).split("```")[0]
    names: dict = {}
    exec(source, names)
    messages = [[{"role": "assistant", "content": text}] for text in (" 42", "7")]
    for completions in ([" 42", "7"], messages):
        assert names["correct"](["p"] * 2, completions, [[1]] * 2, answer=["42", "8"]) == [1.0, 0.0]


SPREAD = """
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from beside import double

def one(text):
    return double(len(text))

def spread(completions, method, **columns):
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(method[0])) as pool:
        return list(pool.map(one, completions))
"""


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_children_can_import_a_reward_file(tmp_path, monkeypatch, method):
    monkeypatch.setattr(sys, "path", list(sys.path))
    folder = tmp_path / "a folder, ü"
    folder.mkdir()
    (folder / "my-rewards.v2.py").write_text(SPREAD)
    (folder / "beside.py").write_text("def double(n):\n    return 2.0 * n\n")
    function = find_function(f"{folder}/my-rewards.v2.py:spread")
    assert function(completions=["a", "bb"], method=[method]) == [2.0, 4.0]


def test_files_of_one_name_are_two_modules(rewards_file):
    other = rewards_file.parent / "other" / rewards_file.name
    other.parent.mkdir()
    other.write_text("def brief(completions, **_):\n    return [9.0]\n")
    assert find_function(f"{rewards_file}:brief")(completions=["a"]) == [1.0]
    assert find_function(f"{other}:brief")(completions=["a"]) == [9.0]


def test_solution_classes_lie_beside_the_reward_function(tmp_path, monkeypatch):
    (tmp_path / "classified.py").write_text(
        "def right(completions, **_):\n    return [1.0] * len(completions)\n\n\n"
        "def solution_class(completions, **_):\n    return [text.lower() for text in completions]\n"
    )
    (reward,) = load_rewards(RewardsConfig(functions=[{"name": f"{tmp_path / 'classified.py'}:right"}]), "rows.jsonl")
    assert reward.solution_class(["A"]) == ["a"]
    assert reward.known_classes is None
    (built_in,) = load_rewards(RewardsConfig(), "starter")
    assert built_in.solution_class(["5+3"]) == ["3+5"]
    assert built_in.known_classes(numbers=[[3, 5, 7]], target=[22]) == [1]
    (length,) = load_rewards(RewardsConfig(functions=[{"name": "length"}]), "starter")
    assert length.solution_class is None


def test_an_attribute_goes_before_the_file(tmp_path):
    (tmp_path / "attributed.py").write_text(
        "def right(completions, **_):\n    return [1.0] * len(completions)\n\n\n"
        "def solution_class(completions, **_):\n    return completions\n\n\n"
        "right.solution_class = lambda completions, **_: ['one'] * len(completions)\n"
    )
    (reward,) = load_rewards(RewardsConfig(functions=[{"name": f"{tmp_path / 'attributed.py'}:right"}]), "rows.jsonl")
    assert reward.solution_class(["A"]) == ["one"]
