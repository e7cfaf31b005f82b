"""A sequence-classification model as a reward: `model:PATH`. Its logit for prompt and completion is the reward."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vdr_cli.errors import ConfigError, DataError
from vdr_cli.models import loading
from vdr_cli.models.limits import JUDGED_TOKENS
from vdr_cli.models.sizes import foreign_token, language_part, largest, usable_length
from vdr_cli.rewards.base import LoadedReward, RefusedMessagesError
from vdr_cli.system.text import reason

logger = logging.getLogger(__name__)

BATCH_TOKENS = {"cpu": 2048}
"""Tokens of one forward, padding included; JUDGED_TOKENS on an accelerator. Memory, never the result."""
NO_PAD = -1
"""Stands for the pad token of a model without one: an id that no row has."""
NO_LIMIT = 10**9
"""Tokenizers without a longest input say a number beyond this."""


class RewardModel:
    """The reward function of a sequence-classification model; loads its weights when it is first called.

    Prompts that are chats go through the model's own template with the completion as the assistant's answer, or, of an
    episode, with all its messages; otherwise the text is the prompt followed by the completion. A text longer than the
    model reads loses its first tokens.
    """

    def __init__(self, path: str, label: int | None = None) -> None:
        """path: local directory or hub id. label: which logit, where there are several.

        Reads tokenizer and configuration, no weights. Raises ConfigError, naming the setting, for a label that is
        missing or is not there.
        """
        self.path = path
        self.__name__ = Path(path).name
        self.tokenizer = loading.load_classifier_tokenizer(path)
        self.config = loading.load_model_config(path)
        self.label = self._label(label)
        self.limit = self._longest()
        self._model: nn.Module | None = None
        self._cut = 0

    def _label(self, label: int | None) -> int:
        count = int(self.config.num_labels)
        named = f"rewards.functions model:{self.path}"
        if label is None and count > 1:
            names = ", ".join(f"{index} {self.config.id2label.get(index, '')}".strip() for index in range(count))
            raise ConfigError(f"{named} has {count} labels ({names}): set label, the index of one, beside its name")
        if label is not None and label >= count:
            raise ConfigError(f"{named}: label {label} is beyond its {count} label{'s' * (count > 1)}, counted from 0")
        return label or 0

    def _longest(self) -> int | None:
        usable = usable_length(self.config)
        limits = [usable.tokens] if usable else []
        if self.tokenizer.model_max_length < NO_LIMIT:
            limits.append(int(self.tokenizer.model_max_length))
        return min(limits, default=None)

    @property
    def num_parameters(self) -> int:
        """Counted without making them."""
        with torch.device("meta"):
            return sum(weight.numel() for weight in loading.classifier_without_weights(self.config).parameters())

    def check_template(self, has_messages: bool) -> None:
        """Raises ConfigError when prompts are chats and the tokenizer has no chat template."""
        if has_messages and getattr(self.tokenizer, "chat_template", None) is None:
            raise ConfigError(
                f"rewards.functions model:{self.path}: the prompts are chat messages, but its tokenizer has no chat "
                "template; give a reward model with one, or plain prompts (data.as_chat false)"
            )

    @contextmanager
    def reading_with(self, model: nn.Module) -> Iterator[None]:
        """Inside the block calls read with these weights, which are whole and on the device."""
        before, self._model = self._model, model
        try:
            yield
        finally:
            self._model = before

    def load(self, device: torch.device | str | None) -> nn.Module:
        """The model with its weights, in eval mode. device: None leaves them where they were loaded."""
        model: nn.Module = loading.load_classifier(self.path, loading.resolve_dtype("auto"))
        return model if device is None else model.to(device)

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
        """One logit for each completion."""
        if self._model is None:
            self._model = self.load(torch.device("cuda") if torch.cuda.is_available() else "cpu")
        has_messages = any(not isinstance(prompt, str) for prompt in prompts)
        self.check_template(has_messages)
        pairs = zip(prompts, completions, strict=True)
        texts = [self._text(index, *pair, has_messages) for index, pair in enumerate(pairs)]
        return self._logits(self._model, self._encoded(texts, plain=not has_messages))

    def _text(self, index: int, prompt: Any, completion: Any, as_chat: bool) -> str:
        if not as_chat:
            return str(prompt) + _whole_text(completion)
        try:
            return str(self.tokenizer.apply_chat_template(_conversation(prompt, completion), tokenize=False))
        except Exception as error:  # a template is a program that comes with the model: it may raise anything
            raise RefusedMessagesError(index, reason(error)) from error

    def _encoded(self, texts: list[str], plain: bool) -> list[list[int]]:
        """plain: with the tokenizer's own special tokens; a chat template brings them itself."""
        rows: list[list[int]] = self.tokenizer(texts, add_special_tokens=plain)["input_ids"]
        entries = largest(language_part(self.config), "vocab_size")
        if foreign := foreign_token((max(ids, default=-1) for ids in rows), entries, self.tokenizer):
            raise DataError(f"reward {self.__name__}: {foreign}")
        limit = self.limit
        if limit is None or all(len(ids) <= limit for ids in rows):
            return rows
        before, self._cut = self._cut, self._cut + sum(len(ids) > limit for ids in rows)
        if self._cut.bit_length() > before.bit_length():  # 1, 2, 4, ...: not a thousand times
            logger.warning(
                "reward %s: %d texts so far lost their first tokens: it reads %d", self.__name__, self._cut, limit
            )
        cut: list[list[int]] = self.tokenizer(texts, add_special_tokens=plain, truncation=True, max_length=limit)[
            "input_ids"
        ]
        return cut

    @torch.no_grad()
    def _logits(self, model: Any, rows: list[list[int]]) -> list[float]:
        """Logits of token ids, in batches of similar length, padded right: absolute positions stay what they are.

        Decoders look for the last token that is not the pad token. Without one, batches are of one length.
        """
        device = next(model.parameters()).device
        text = model.config.get_text_config()
        pads = text.pad_token_id, self.tokenizer.pad_token_id, NO_PAD
        pad = next(each for each in pads if each is not None and each < text.vocab_size)
        text.pad_token_id = model.config.pad_token_id = pad
        found = [math.nan] * len(rows)
        most = BATCH_TOKENS.get(device.type, JUDGED_TOKENS)
        for batch in _batches([len(ids) for ids in rows], most, same_length=pad == NO_PAD):
            ids, mask = _padded([rows[row] for row in batch], pad)
            logits = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits  # (b, labels)
            for row, value in zip(batch, logits[:, self.label].float().tolist(), strict=True):
                found[row] = value
        return found


def reward_models(loaded: Sequence[LoadedReward]) -> list[RewardModel]:
    """The models among the reward functions."""
    return [reward.function for reward in loaded if isinstance(reward.function, RewardModel)]


def check_templates(loaded: Sequence[LoadedReward], has_messages: bool) -> None:
    """Raises ConfigError when the prompts are chats and a reward model has no chat template."""
    for model in reward_models(loaded):
        model.check_template(has_messages)


def _whole_text(completion: Any) -> str:
    """A completion's text: of an episode that of all its messages, the environment's too."""
    return completion if isinstance(completion, str) else "".join(str(each.get("content") or "") for each in completion)


def _conversation(prompt: Any, completion: Any) -> list[Any]:
    """The prompt's messages and the completion's; an answer that the prompt has begun is one message."""
    answer = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else list(completion)
    begun = prompt[-1]
    if begun["role"] != "assistant" or answer[0]["role"] != "assistant":
        return [*prompt, *answer]
    whole = str(begun.get("content") or "") + str(answer[0].get("content") or "")
    return [*prompt[:-1], {**answer[0], "content": whole}, *answer[1:]]


def _batches(lengths: list[int], most: int, same_length: bool) -> Iterator[list[int]]:
    """Rows in order of their lengths, as many at a time as fit into `most` tokens, at least one."""
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        is_full = (len(batch) + 1) * lengths[row] > most
        if batch and (is_full or (same_length and lengths[batch[0]] != lengths[row])):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _padded(rows: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """(b, W) ids and mask, padded right."""
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    mask = torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]
    return ids, mask.long()
