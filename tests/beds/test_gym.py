"""Suites of reasoning-gym: their rows, the verifiers as rewards, and what model text may do to these."""

import json
import subprocess
import sys

import pytest

gym_package = pytest.importorskip("reasoning_gym", reason="the extra gym is not installed")

from tests.conftest import environment  # noqa: E402
from vdr_cli.beds import gym, gym_generate, gym_verifier  # noqa: E402
from vdr_cli.config import Config, DataConfig, RewardsConfig  # noqa: E402
from vdr_cli.data.sources import check_options, open_table  # noqa: E402
from vdr_cli.errors import ConfigError, DataError  # noqa: E402
from vdr_cli.rewards.calling import compute_rewards  # noqa: E402
from vdr_cli.rewards.loading import load_rewards  # noqa: E402
from vdr_cli.samples import Prompt  # noqa: E402

TASKS = sorted(name for name in gym_package.factory.DATASETS if name != "composite")
SLOW = ("arc_agi", "figlet_font", "futoshiki", "intermediate_integration", "knight_swap", "puzzle24", "zebra_puzzles")
"""Tasks that take a second for some problems; scripts/verify/gym_tasks.py has them."""
NO_REFERENCE = ("boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour")
"""Tasks whose problems hold no reference answer."""

LENIENT = ("game_of_life_halting",)
"""Tasks whose verifier gives 1 to an answer that says nothing."""


def rows_of(name, split="train", **options):
    table = open_table(DataConfig(name=name, options=options), "train" if split == "train" else "eval")
    return [table.rows[index] for index in range(len(table))]


def rewards_of(name, rows, completions, extract="whole"):
    prompts = [
        Prompt(at, row["prompt"], [1], {key: value for key, value in row.items() if key != "prompt"})
        for at, row in enumerate(rows)
    ]
    loaded = load_rewards(RewardsConfig(extract=extract), name)
    return compute_rewards(loaded, prompts, completions, [[1]] * len(rows), 60.0)[:, 0].tolist()


@pytest.fixture(scope="module", autouse=True)
def in_this_process():
    """Problems are generated here: a process that imports the package takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gym, "generated", lambda requests: [gym_generate.entry(*request)[0] for request in requests])
        patch.setattr(gym, "_entries", {})
        yield


@pytest.fixture(scope="module")
def every_task():
    """Two rows of every quick task."""
    tasks = [task for task in TASKS if task not in SLOW]
    return rows_of("reasoning_gym:" + ",".join(tasks), size=2 * len(tasks))


def test_every_task_gives_rows_whose_reference_answer_scores_its_maximum(every_task):
    name, tasks = "reasoning_gym:any", [task for task in TASKS if task not in SLOW]
    assert sorted(row["task"] for row in every_task) == sorted(tasks * 2) and all(row["prompt"] for row in every_task)
    rows = [row for row in every_task if row["task"] not in NO_REFERENCE]
    assert {row["task"] for row in every_task if row["answer"] is None} == set(NO_REFERENCE)
    ours = rewards_of(name, rows, [f" {row['answer']}\n" for row in rows])
    assert {row["task"]: reward for row, reward in zip(rows, ours, strict=True) if reward != 1.0} == {}
    wrong = rewards_of(name, rows, ["no idea at all"] * len(rows))
    assert {row["task"] for row, reward in zip(rows, wrong, strict=True) if reward == 1.0} <= set(LENIENT)


def test_rows_do_not_depend_on_the_hash_seed(monkeypatch):
    monkeypatch.setattr(gym, "generated", gym_generate.generated)
    monkeypatch.setattr(gym, "_entries", {})
    code = (
        "import json, sys; from vdr_cli.beds import gym; request = json.loads(sys.argv[1]);"
        "print(json.dumps(gym.train_rows(gym.suite_of(*request))))"
    )
    tasks = ("isomorphic_strings", "ransom_note", "word_ladder", "list_functions")
    request = "reasoning_gym:" + ",".join(tasks), {"size": 8}
    command = [sys.executable, "-c", code, json.dumps(request)]
    found = subprocess.run(command, env=environment(PYTHONHASHSEED="7"), capture_output=True, text=True, check=True)
    assert json.loads(found.stdout) == gym.train_rows(gym.suite_of(*request))


def test_weights_share_out_every_prefix():
    rows = rows_of("reasoning_gym:leg_counting=2,spell_backward", size=30)
    names = [row["task"] for row in rows]
    assert all(abs(names[:n].count("leg_counting") - 2 * n / 3) < 1 for n in range(1, 31))
    assert [row["index"] for row in rows if row["task"] == "spell_backward"] == list(range(10))


def test_settings_sizes_and_seed_are_the_generators():
    (row,) = rows_of("reasoning_gym:leg_counting", size=1, seed=5, min_animals=2, max_animals=2)
    assert json.loads(row["settings"]) == {"max_animals": 2, "min_animals": 2, "seed": 5, "size": 1}
    own = gym_package.create_dataset("leg_counting", seed=5, size=1, min_animals=2, max_animals=2)[0]
    assert (row["prompt"], row["answer"]) == (own["question"], own["answer"])
    mixed = rows_of("reasoning_gym:leg_counting,gcd", size=2, leg_counting={"max_animals": 4}, gcd={"max_numbers": 3})
    assert [json.loads(row["settings"]).get("max_animals") for row in mixed] == [4, None]


def test_held_out_rows_do_not_occur_in_training(caplog):
    options = {"size": 40, "eval_size": 30, "min_word_len": 3, "max_word_len": 3}
    name = "reasoning_gym:spell_backward"
    train, held_out = rows_of(name, **options), rows_of(name, split="test", **options)
    prompts = [row["prompt"] for row in held_out]
    assert not {row["prompt"] for row in train} & set(prompts) and len(set(prompts)) == len(prompts)
    assert "held-out problems occur in training" in caplog.text


def test_held_out_rows_of_a_part_are_kept_apart_from_the_whole_training_set():
    cfg = DataConfig(
        name="reasoning_gym:coin_flip,gcd", eval_name="reasoning_gym:gcd", options={"size": 400, "eval_size": 9}
    )
    held_out, train = open_table(cfg, "eval").rows, open_table(cfg, "train").rows
    assert not {row["prompt"] for row in held_out} & {row["prompt"] for row in train}


def test_too_few_held_out_problems_are_refused():
    options = {"size": 60, "eval_size": 50, "min_trials": 1, "max_trials": 1}
    with pytest.raises(DataError, match=r"only \d+ of data.options.eval_size 50 held-out problems are left") as error:
        rows_of("reasoning_gym:coin_flip", split="test", **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("reasoning_gym:leg_countin", {}, "data.name .* has no task leg_countin; did you mean leg_counting"),
        ("reasoning_gym:", {}, "has no task without a name"),
        ("reasoning_gym:gcd,gcd", {}, "gcd stands there twice"),
        ("reasoning_gym:gcd=0", {}, "the weight of gcd is 0; give a number above 0"),
        ("reasoning_gym:gcd=x", {}, "the weight of gcd is x"),
        ("reasoning_gym:gcd", {"size": 0}, "data.options.size is 0"),
        ("reasoning_gym:gcd", {"seed": -1}, "data.options.seed is -1"),
        ("reasoning_gym:gcd", {"max_number": 3}, "gcd has no setting max_number; did you mean max_numbers"),
        ("reasoning_gym:gcd", {"max_numbers": 1}, "data.options: reasoning-gym's gcd refuses its settings"),
        ("reasoning_gym:gcd,lcm", {"max_value": 3}, "put max_value under its task, such as data.options.gcd.max_value"),
        ("reasoning_gym:gcd,lcm", {"gcd": {"seed": 3}}, "data.options.gcd.seed: give data.options.seed"),
        ("reasoning_gym:gcd,lcm", {"gcd": 3}, "data.options.gcd must be keys and values"),
        ("reasoning_gym:gcd", {"lcm": {"max_value": 3}}, "data.options.lcm: no such task in reasoning_gym:gcd"),
        ("starter", {"size": 3}, "data.options are settings of reasoning_gym tasks, and data.name starter has none"),
    ],
)
def test_bad_names_and_options_are_one_line(name, options, message):
    with pytest.raises(ConfigError, match=message) as error:
        check_options(DataConfig(name=name, options=options))
        open_table(DataConfig(name=name, options=options), "train")
    assert "\n" not in str(error.value)


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(gym.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"data.name reasoning_gym:gcd needs reasoning-gym: pip install 'vdr-cli\[gym\]'"
    ):
        rows_of("reasoning_gym:gcd")


@pytest.mark.parametrize(
    ("extract", "template"),
    [("whole", "{}"), ("answer_tags", "I think <answer> {} </answer>."), ("boxed", r"So \boxed{{{}}}.")],
)
def test_the_answer_is_extracted_for_the_verifier(extract, template):
    rows = rows_of("reasoning_gym:gcd", size=2)
    answers = [template.format(row["answer"]) for row in rows]
    assert rewards_of("reasoning_gym:gcd", rows, answers, extract) == [1.0, 1.0]
    bare = [row["answer"] for row in rows]
    assert rewards_of("reasoning_gym:gcd", rows, bare, extract) == [float(extract == "whole")] * 2


HOSTILE = "[open('{}', 'w').close()]"


@pytest.mark.parametrize("task", ["string_insertion", "spiral_matrix", "binary_matrix", "n_queens"])
def test_answers_are_never_evaluated(task, tmp_path):
    (row,) = rows_of(f"reasoning_gym:{task}", size=1)
    rewards_of("reasoning_gym:any", [row], [HOSTILE.format(tmp_path / "evaluated")])
    assert list(tmp_path.iterdir()) == []
    assert rewards_of("reasoning_gym:any", [row], [row["answer"]]) == [1.0]


@pytest.mark.parametrize(
    "answer",
    [
        "eval(chr(49))",
        "x.__class__",
        "().__class__",
        "9**9**9",
        "9**9999",
        "(2)**(3**9)",
        "f(9)",
        "print(1)",
        "9!",
        "'a'",
        "N(3)",
    ],
)
def test_sympy_reads_mathematics_alone(answer):
    assert all(not gym_verifier.is_harmless(answer, task) for task in gym_verifier.ALGEBRA + gym_verifier.ARITHMETIC)


@pytest.mark.parametrize(
    "answer", ["3*x**2 - sin(x)/2 + C", "x**(1/2)", "-3*Integral(x**2*sin(x), x) + C", "4 * (7 - 1)"]
)
def test_sympy_reads_mathematics(answer):
    assert all(gym_verifier.is_harmless(answer, task) for task in gym_verifier.ALGEBRA)


def test_an_answer_on_which_a_verifier_raises_scores_0(monkeypatch, caplog):
    (row,) = rows_of("reasoning_gym:gcd", size=1)

    class Fragile:
        def score_answer(self, answer, entry):
            raise KeyError(answer)

    monkeypatch.setattr(gym_verifier, "generator", lambda *_: Fragile())
    assert rewards_of("reasoning_gym:gcd", [row], ["3"]) == [0.0]
    assert "the verifier of reasoning-gym's gcd raised KeyError" in caplog.text


def test_the_configuration_carries_the_options():
    config = Config.model_validate({"data": {"name": "reasoning_gym:gcd", "options": {"size": 7}}})
    assert config.data.options == {"size": 7} and config.rewards.extract == "whole"
