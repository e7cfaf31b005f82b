"""Real runs on tasks of reasoning-gym."""

import pytest
from transformers import AutoModelForCausalLM

from tests.tiny import character_tokenizer, tiny_qwen2_config
from vdr_cli.audit.audit import audit_run

pytest.importorskip("reasoning_gym", reason="the extra gym is not installed")

TEN = (
    "reasoning_gym:leg_counting=2,spell_backward,gcd,coin_flip,word_sorting,basic_arithmetic,isomorphic_strings,"
    "string_insertion,countdown,ransom_note"
)
SETTINGS = {
    "data.name": TEN,
    "data.options": {"size": 40, "eval_size": 10, "gcd": {"max_numbers": 3}},
    "data.max_prompt_tokens": 400,
    "rollout.max_new_tokens": 6,
    "train.steps": 3,
    "train.eval_every": 3,
    "train.eval_prompts": 4,
    "train.eval_samples": 2,
    "train.keep_best": False,
    "disagreement.mode": "none",
    "observe.audit_every": 1,
    "train.checkpoint_every": 1,
    "train.keep_last": 4,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = character_tokenizer()
    AutoModelForCausalLM.from_config(tiny_qwen2_config(tokenizer)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def test_ten_tasks_train_and_evaluate_on_two_ranks(train, read, model, tmp_path):
    settings = {"model.name": model, **SETTINGS}
    done = train(tmp_path / "run", settings=settings, ranks=2)
    assert done.returncode == 0, done.stderr
    lines = read.metrics(tmp_path / "run")
    assert [line["step"] for line in lines if "rewards/reasoning_gym/mean" in line] == [1, 2, 3]
    assert lines[-1]["eval/reward"] == pytest.approx(lines[-1]["eval/rewards/reasoning_gym/mean"])
    tables = [table.to_pydict() for table in read.completions(tmp_path / "run")]
    assert sum(len(set(table["row"])) for table in tables) > 5 and "reward" in tables[0]
    audited = audit_run(tmp_path / "run")
    assert not [f"step {each.step} {each.quantity}: {each.difference}" for each in audited if each.within is False]
    assert sum(each.quantity == "update of the weights" and each.within is True for each in audited) == 3


def test_a_wrong_task_is_one_line_before_anything_starts(train, tmp_path):
    done = train(tmp_path / "run", settings={"data.name": "reasoning_gym:leg_countin"})
    assert done.returncode == 2 and done.stderr.strip().count("\n") == 0, done.stderr
    assert "did you mean leg_counting?" in done.stderr and not (tmp_path / "run").exists()
