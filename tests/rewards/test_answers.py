"""The place of the answer in a completion."""

import pytest

from vdr_cli.config import RewardsConfig
from vdr_cli.rewards.answers import answer_in
from vdr_cli.rewards.calling import compute_rewards
from vdr_cli.rewards.loading import load_rewards
from vdr_cli.samples import Prompt


@pytest.mark.parametrize(
    ("text", "how", "answer"),
    [
        (" 7 \n", "whole", "7"),
        ("", "whole", ""),
        ("<answer>1</answer> no, <answer>\n 2\n3 </answer>", "answer_tags", "2\n3"),
        ("<answer></answer>", "answer_tags", ""),
        ("<answer>7", "answer_tags", None),
        (r"\boxed{1}, or rather \boxed{\frac{1}{2}}.", "boxed", r"\frac{1}{2}"),
        (r"\boxed{3} and \boxed{4", "boxed", "3"),
        (r"\boxed 3", "boxed", None),
        ("7", "boxed", None),
    ],
)
def test_the_last_answer_counts(text, how, answer):
    assert answer_in(text, how) == answer


@pytest.mark.parametrize("as_chat", [False, True])
def test_exact_match_judges_the_answer_and_other_functions_see_the_completion(as_chat):
    texts = ["so <answer>4</answer>", "4"]
    completions = [[{"role": "assistant", "content": text}] for text in texts] if as_chat else texts
    functions = [{"name": "exact_match"}, {"name": "length"}]
    loaded = load_rewards(RewardsConfig.model_validate({"functions": functions, "extract": "answer_tags"}), "rows")
    prompts = [Prompt(row, "2+2", [1], {"answer": "4"}) for row in range(2)]
    rewards = compute_rewards(loaded, prompts, completions, [[1], [1]], 5.0)
    assert rewards.tolist() == [[1.0, 21.0], [0.0, 1.0]]
