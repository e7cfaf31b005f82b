"""Reward models: against transformers' own pipeline, whatever the batch and the padding, and their errors."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, BertConfig, GPT2Config, pipeline

from tests.tiny import character_tokenizer, tiny_qwen2_config
from vdr_cli.config import RewardsConfig
from vdr_cli.errors import ConfigError, DataError
from vdr_cli.rewards import model as reward_model
from vdr_cli.rewards.base import TrainerState
from vdr_cli.rewards.calling import compute_rewards
from vdr_cli.rewards.loading import check_reward, load_rewards
from vdr_cli.rewards.stream import RewardStream
from vdr_cli.samples import Completions, Prompt

PROMPTS = ["What is 6 times 7?", "Say hello to everybody in the room.", "x"]
COMPLETIONS = ["42", " Hello, hello and hello again to all of you.", ""]
KINDS = ("qwen2", "qwen2-no-pad", "gpt2", "bert")


def saved(path, kind="qwen2", labels=1, padding_side="left", **changed):
    tokenizer = character_tokenizer()
    tokenizer.padding_side = padding_side
    if kind.endswith("no-pad"):
        tokenizer.pad_token = None
    sizes = {"vocab_size": len(tokenizer), "num_labels": labels, "pad_token_id": tokenizer.pad_token_id}
    if kind.startswith("qwen2"):
        config = tiny_qwen2_config(tokenizer, num_labels=labels, **changed)
    elif kind == "gpt2":
        config = GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=512, bos_token_id=None, eos_token_id=2, **sizes)
    else:
        small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = BertConfig(max_position_embeddings=512, **small, **sizes)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)  # logits that padding or a wrong position would move visibly
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def loaded(path, **entry):
    return load_rewards(RewardsConfig.model_validate({"functions": [{"name": f"model:{path}", **entry}]}), "rows")


def rewards_of(path, prompts=PROMPTS, completions=COMPLETIONS, **entry):
    rows = [Prompt(row, value, [1]) for row, value in enumerate(prompts)]
    return compute_rewards(loaded(path, **entry), rows, completions, [[1]] * len(rows), 5.0)[:, 0]


def pipeline_logits(path, texts, label=0):
    judge = pipeline("text-classification", model=path, function_to_apply="none", top_k=None, device="cpu")
    config = AutoConfig.from_pretrained(path)
    found = []
    for text in texts:  # one at a time: nothing is padded
        scores = {entry["label"]: entry["score"] for entry in judge([text])[0]}
        found.append(scores[config.id2label[label]])
    return torch.tensor(found)


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_reward_is_the_logit_of_transformers_own_pipeline(kind, padding_side, tmp_path):
    path = saved(tmp_path, kind, padding_side=padding_side)
    ours = rewards_of(path)
    theirs = pipeline_logits(path, [a + b for a, b in zip(PROMPTS, COMPLETIONS, strict=True)])
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert ours.std() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_rewards_do_not_depend_on_the_batch(kind, tmp_path, monkeypatch):
    path = saved(tmp_path, kind)
    together = rewards_of(path, PROMPTS * 3, COMPLETIONS * 3)
    monkeypatch.setitem(reward_model.BATCH_TOKENS, "cpu", 1)
    torch.testing.assert_close(rewards_of(path, PROMPTS * 3, COMPLETIONS * 3), together, atol=1e-5, rtol=1e-5)


def test_chats_go_through_the_models_own_template(tmp_path):
    path = saved(tmp_path)
    prompts = [[{"role": "user", "content": text}] for text in PROMPTS]
    answers = [[{"role": "assistant", "content": text}] for text in COMPLETIONS]
    tokenizer = character_tokenizer()
    texts = [tokenizer.apply_chat_template(a + b, tokenize=False) for a, b in zip(prompts, answers, strict=True)]
    assert texts[0].startswith("<|im_start|>user")
    torch.testing.assert_close(rewards_of(path, prompts, answers), pipeline_logits(path, texts), atol=1e-5, rtol=1e-5)


def test_all_of_an_episode_is_judged_and_a_begun_answer_is_one_message(tmp_path):
    path = saved(tmp_path)
    asked = {"role": "user", "content": "6*7?"}
    said = ("assistant", "40"), ("user", "more"), ("assistant", "42")
    turns = [{"role": role, "content": content} for role, content in said]
    template = character_tokenizer().apply_chat_template
    begun = [asked, {"role": "assistant", "content": "It is "}]
    whole = [asked, {"role": "assistant", "content": "It is 42"}]
    texts = [template([asked, *turns], tokenize=False), template(whole, tokenize=False)]
    found = rewards_of(path, [[asked], begun], [turns, [turns[-1]]])
    torch.testing.assert_close(found, pipeline_logits(path, texts), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        rewards_of(path, ["6*7="], [turns]), pipeline_logits(path, ["6*7=40more42"]), atol=1e-5, rtol=1e-5
    )


def test_a_chat_without_a_template_is_one_line(tmp_path):
    path = saved(tmp_path)
    (reward,) = loaded(path)
    reward.function.tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="its tokenizer has no chat template; give a reward model with one"):
        reward.function.check_template(True)
    reward.function.check_template(False)


def test_one_of_several_labels_is_chosen_by_its_index(tmp_path):
    path = saved(tmp_path, labels=3)
    texts = [a + b for a, b in zip(PROMPTS, COMPLETIONS, strict=True)]
    torch.testing.assert_close(rewards_of(path, label=2), pipeline_logits(path, texts, 2), atol=1e-5, rtol=1e-5)
    with pytest.raises(ConfigError, match=r"has 3 labels \(0 LABEL_0, 1 LABEL_1, 2 LABEL_2\): set label, the index"):
        loaded(path)
    with pytest.raises(ConfigError, match="label 3 is beyond its 3 labels"):
        loaded(path, label=3)


def test_long_texts_lose_their_first_tokens(tmp_path, caplog):
    path = saved(tmp_path, max_position_embeddings=16)
    long = "0123456789" * 5
    found = rewards_of(path, [long, long[-20:]], ["theend", "theend"])
    assert found[0] == found[1]
    assert found[0] == rewards_of(path, [(long + "theend")[-16:]], [""])[0]
    assert "2 texts so far lost their first tokens: it reads 16" in caplog.text


def test_a_model_without_the_head_or_the_weights_is_one_line(tmp_path):
    from transformers import AutoModelForCausalLM

    tokenizer = character_tokenizer()
    AutoModelForCausalLM.from_config(tiny_qwen2_config(tokenizer, num_labels=1)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"score.weight.* give a complete sequence-classification model"):
        rewards_of(str(tmp_path))
    with pytest.raises(ConfigError, match="no such directory"):
        check_reward(RewardsConfig.model_validate({"functions": [{"name": "model:/nowhere/rm"}]}).functions[0])


def test_a_label_of_a_function_is_refused():
    (entry,) = RewardsConfig.model_validate({"functions": [{"name": "length", "label": 1}]}).functions
    with pytest.raises(ConfigError, match="length has label 1, which only model:PATH reads"):
        check_reward(entry)


def test_a_stream_asks_models_for_all_texts_at_the_end(tmp_path):
    path = saved(tmp_path)
    functions = [{"name": "length"}, {"name": f"model:{path}"}]
    rewards = load_rewards(RewardsConfig.model_validate({"functions": functions, "processes": 0}), "rows")
    prompts = [Prompt(row, PROMPTS[row], [1]) for row in range(2)]
    ids = torch.zeros(2, 1, dtype=torch.long)
    part = Completions(ids, ids.bool(), ids, ids.bool(), ids.float(), ids[:, 0].bool())
    texts = {0: ["42", "6"], 1: ["hello", ""]}
    stream = RewardStream(rewards, prompts, 2, 5.0, TrainerState(), lambda rows, _: texts[rows[0] // 2])
    stream.finished([1], part)
    stream.finished([0], part)
    _, found = stream.result()
    assert found[:, 0].tolist() == [2.0, 1.0, 5.0, 0.0]
    expected = rewards_of(path, [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2, ["42", "6", "hello", ""])
    torch.testing.assert_close(found[:, 1], expected)
    assert [reward.name for reward in rewards] == ["length", tmp_path.name]


def test_a_token_that_the_model_lacks_is_one_line(tmp_path):
    path = saved(tmp_path, vocab_size=30)
    with pytest.raises(DataError, match=rf"^reward {tmp_path.name}: token \d+ of tokenizer .* vocabulary of 30: use"):
        rewards_of(path)


def test_sizes_are_counted_without_weights(tmp_path):
    (reward,) = loaded(saved(tmp_path))
    whole = reward.function.load("cpu")
    assert reward.function.num_parameters == sum(weight.numel() for weight in whole.parameters())


def test_a_template_that_refuses_messages_is_one_line_with_the_row(tmp_path):
    path = saved(tmp_path)
    (reward,) = loaded(path)
    reward.function.tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}x{% endfor %}"
    )
    roles = ["user"], ["system", "user"]
    prompts = [Prompt(7 + i, [{"role": r, "content": "a"} for r in each], [1], {}) for i, each in enumerate(roles)]
    answers = [[{"role": "assistant", "content": "b"}]] * 2
    with pytest.raises(DataError, match=r"reward \w+: its chat template refuses dataset row 8: no system"):
        compute_rewards([reward], prompts, answers, [[2], [2]], 10.0)
