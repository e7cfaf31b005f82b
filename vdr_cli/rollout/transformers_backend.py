"""Sampling with a plain Hugging Face model: prefill once a prompt, decode its completions together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedTokenizerBase

from vdr_cli.errors import ConfigError, DataError
from vdr_cli.models.anatomy import cache_arguments, forward_arguments, last_logits_argument, position_ids
from vdr_cli.models.cpu_linear import packed_linears
from vdr_cli.rollout.base import Rollout, RolloutRequest
from vdr_cli.rollout.cache import DecodeCache, has_plain_attention, without_holes
from vdr_cli.rollout.cuda_graphs import GraphedForward
from vdr_cli.rollout.dialogue import Dialogue
from vdr_cli.rollout.sampling import greedy, inverse_cdf, processors
from vdr_cli.rollout.static_cache import StaticCache
from vdr_cli.samples import Actors, Completions, Finished, Sampling, pad_prompts, uniform_rows

COMPACT_SHARE = 8
"""Finished rows leave the batch when they are at least 1/8 of it: below, moving costs more than it saves."""

GRAPHS_COMPACT_SHARE = 2
"""The same with CUDA graphs, which are captured again for every number of rows."""

CudaGraphs = Literal["auto", "on", "off"]


@dataclass(frozen=True)
class _Row:
    """Completion `completion` of prompt `prompt` of the call."""

    prompt: int
    completion: int


class TransformersRollout(Rollout):
    """The Rollout protocol on a model in this process.

    sampler_logps are those of the distribution that was sampled: temperature-scaled, and renormalised
    after top-k, top-p, min-p and the repetition penalty when these are on (what importance correction
    needs). Without them they equal the policy's log-probabilities at the sampling temperature. At
    temperature 0 they are log-probabilities at temperature 1.

    Completion g of a prompt is drawn by inverse CDF from the stream of (key, g) alone, so batch size,
    order and rank change it only if rounding of the logits moves a boundary across its uniform.
    """

    def __init__(
        self,
        pad_id: int,
        eos_ids: Sequence[int],
        tokenizer: PreTrainedTokenizerBase | None = None,
        batch_tokens: int = 262_144,
        cuda_graphs: CudaGraphs = "auto",
    ) -> None:
        """tokenizer: needed for stop strings. batch_tokens: most tokens, at full length, decoded at once.

        cuda_graphs: whether token steps are replayed from CUDA graphs; auto: on a GPU, where the model allows it. With
        "on" a CPU uses the same cache without graphs.
        """
        self.pad_id = pad_id
        self.eos_ids = tuple(eos_ids)
        self.tokenizer = tokenizer
        self.batch_tokens = batch_tokens
        self.cuda_graphs = cuda_graphs
        # A model that cannot be captured stays on the cache at fixed addresses. Another one rounds otherwise, and a
        # resumed run, which has yet to find out, would not be the same run.
        self.can_capture = True

    def start(self, model: nn.Module, request: RolloutRequest) -> Callable[[], Completions]:
        completions = self._sample(model, request)
        return lambda: completions

    def refresh(self, model: nn.Module, prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
        """Nothing to do: this process samples with the model that it is given."""

    @torch.no_grad()
    def _sample(self, model: nn.Module, request: RolloutRequest) -> Completions:
        prompts, n, sampling = request.prompts, request.n, request.sampling
        for index, prompt in enumerate(prompts):
            if not prompt:
                raise DataError(f"prompt {index} of the batch has no tokens: a completion needs something to follow")
        if sampling.stop and self.tokenizer is None:
            raise ConfigError("rollout.stop needs a tokenizer to find the strings; none was given")
        collected = _Collected(request, self.pad_id)
        acting = nullcontext() if request.acting is None else request.acting(model)
        with packed_linears(model), acting as actors:
            for rows in _batches([len(prompt) for prompt in prompts], n, sampling.max_new_tokens, self.batch_tokens):
                at = torch.tensor([row.prompt * n + row.completion for row in rows])
                decoder = _Decoder(model, self, request, rows, at, actors)
                decoder.run(collected.taker(at))
                if decoder.graphed is not None and decoder.graphed.has_failed:
                    self.can_capture = False
        return collected.out.trimmed()


Take = Callable[[Tensor, "_Sampled", Tensor], None]
"""Rows (r,) of a decode batch that are done, their tokens (r, t) and truncation (r,)."""


class _Collected:
    """The call's completions, as their rows leave the decode batches."""

    def __init__(self, request: RolloutRequest, pad_id: int) -> None:
        prompts, n, T = request.prompts, request.n, request.sampling.max_new_tokens
        ids, mask = pad_prompts(prompts, pad_id)
        B = len(prompts) * n
        self.out = Completions(
            prompt_ids=ids.repeat_interleave(n, 0),
            prompt_mask=mask.repeat_interleave(n, 0),
            completion_ids=torch.full((B, T), pad_id, dtype=torch.int64),
            completion_mask=torch.zeros((B, T), dtype=torch.bool),
            sampler_logps=torch.zeros((B, T)),
            truncated=torch.zeros(B, dtype=torch.bool),
        )
        if request.conversation is not None:
            self.out.policy_mask = torch.zeros((B, T), dtype=torch.bool)
        self.n, self.finished = n, request.finished
        self.missing = [n] * len(prompts)

    def taker(self, at: Tensor) -> Take:
        """at: (R,) row of the call that each row of a decode batch is."""

        def take(rows: Tensor, sampled: _Sampled, truncated: Tensor) -> None:
            to, width = at[rows.cpu()], sampled.tokens.shape[1]
            self.out.completion_ids[to, :width] = sampled.tokens.cpu()
            self.out.completion_mask[to, :width] = sampled.valid.cpu()
            self.out.policy_mask[to, :width] = sampled.policy.cpu()
            self.out.sampler_logps[to, :width] = sampled.logps.cpu()
            self.out.truncated[to] = truncated.cpu()
            if self.finished is not None:
                self._tell(to.tolist(), self.finished)

        return take

    def _tell(self, taken: list[int], finished: Finished) -> None:
        for row in taken:
            self.missing[row // self.n] -= 1
        ready = [prompt for prompt in sorted({row // self.n for row in taken}) if self.missing[prompt] == 0]
        if ready:
            rows = torch.tensor([prompt * self.n + g for prompt in ready for g in range(self.n)])
            finished(ready, self.out.rows(rows).trimmed())


def _batches(lengths: Sequence[int], n: int, T: int, batch_tokens: int) -> Iterator[list[_Row]]:
    """Rows of each decode batch: similar prompt lengths together, rows times full width within batch_tokens.

    A group that is too large for one batch is split; a single row always goes.
    """
    batch: list[_Row] = []
    for prompt in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        for completion in range(n):
            width = (lengths[batch[0].prompt] if batch else lengths[prompt]) + T
            if batch and (len(batch) + 1) * width > batch_tokens:
                yield batch
                batch = []
            batch.append(_Row(prompt, completion))
    if batch:
        yield batch


@dataclass(frozen=True)
class _Sampled:
    """Tokens of a decode batch, (R, T) each."""

    tokens: Tensor
    valid: Tensor
    policy: Tensor
    """Bool, tokens that the policy sampled; the same tensor as `valid` without a conversation."""
    logps: Tensor

    @classmethod
    def nothing(cls, R: int, T: int, pad_id: int, device: torch.device, apart: bool) -> _Sampled:
        """apart: `policy` is a tensor of its own."""
        tokens = torch.full((R, T), pad_id, dtype=torch.int64, device=device)
        valid = torch.zeros((R, T), dtype=torch.bool, device=device)
        policy = torch.zeros_like(valid) if apart else valid
        return cls(tokens, valid, policy, torch.zeros((R, T), device=device))

    def of(self, rows: Tensor, width: int) -> _Sampled:
        return _Sampled(*(getattr(self, entry.name)[rows, :width] for entry in fields(self)))


class _Decoder:
    """One batch from prefill to its last token. Cache row r holds the completion of batch row `rows[r]`."""

    def __init__(
        self,
        model: nn.Module,
        rollout: TransformersRollout,
        request: RolloutRequest,
        batch: list[_Row],
        at: Tensor,
        actors: Actors | None,
    ) -> None:
        """at: (R,) row of the call that each row of the batch is."""
        self.actors = actors
        self.model: Any = model
        self.sampling = sampling = request.sampling
        self.at, self.watcher = at, request.watcher
        self.device = next(model.parameters()).device
        groups = [(prompt, len(list(rows))) for prompt, rows in groupby(batch, key=lambda row: row.prompt)]
        self.prompts = torch.tensor([prompt for prompt, _ in groups])  # (N,) of the call
        ids, mask = pad_prompts([request.prompts[prompt] for prompt, _ in groups], rollout.pad_id)
        self.prompt_ids, self.prompt_mask = ids.to(self.device), mask.to(self.device)  # (N, P)
        owner = torch.arange(len(groups)).repeat_interleave(torch.tensor([count for _, count in groups]))
        self.owner = owner.to(self.device)  # (R,)
        self.takes_positions = "position_ids" in forward_arguments(model, mask, mask)
        # ALiBi models make their position bias of the mask
        self.needs_mask = not bool(mask.all()) or not self.takes_positions
        self.processors = processors(sampling)
        self.stop = StopStrings(sampling.stop, rollout.tokenizer) if sampling.stop else None
        self.eos = torch.tensor(rollout.eos_ids, dtype=torch.int64, device=self.device)
        self.uniforms: Tensor | None = None
        if sampling.temperature > 0:
            streams = [(request.keys[row.prompt], row.completion) for row in batch]
            self.uniforms = uniform_rows(streams, sampling.max_new_tokens).to(self.device)
        self.pad_id = rollout.pad_id
        self.dialogue: Dialogue | None = None
        if request.conversation is not None:
            T = sampling.max_new_tokens
            self.dialogue = Dialogue(request.conversation, at, T, sampling.turn_tokens or T, self.device)
        self.cuda_graphs, self.can_capture = rollout.cuda_graphs, rollout.can_capture
        self.graphed: GraphedForward | None = None

    def run(self, take: Take) -> None:
        """Sample to the end; rows are taken as they leave the batch."""
        shape = len(self.owner), self.sampling.max_new_tokens
        sampled = _Sampled.nothing(*shape, self.pad_id, self.device, apart=self.dialogue is not None)
        logits = self._prefill()  # (R, V)
        with self.cache.attention():
            self._decode(logits, sampled, take)

    def _decode(self, logits: Tensor, sampled: _Sampled, take: Take) -> None:
        tokens, dialogue = sampled.tokens, self.dialogue
        R, T = tokens.shape
        rows = torch.arange(R, device=self.device)
        done = torch.zeros(R, dtype=torch.bool, device=self.device)

        def leave(gone: Tensor, width: int, truncated: Tensor) -> None:
            cut = truncated if dialogue is None else truncated | dialogue.truncated[gone]
            take(gone, sampled.of(gone, width), cut)

        for t in range(T):
            token, logp = self._sample(logits, rows, tokens, t)
            if dialogue is not None:
                token, logp, own = dialogue.instead(rows, t, token, logp)
                sampled.policy[rows, t] = own & ~done
            tokens[rows, t] = token.masked_fill(done, self.pad_id)
            sampled.logps[rows, t] = logp.masked_fill(done, 0.0)
            sampled.valid[rows, t] = ~done
            ended = self._ends(token, tokens, rows, t)
            done |= ended if dialogue is None else dialogue.after(rows, t, tokens, own & ~done, ended)
            finished = int(done.sum())
            if finished == len(rows) or t + 1 == T:
                break
            if finished * self.compact_share >= len(rows):
                leave(rows[done], t + 1, torch.zeros_like(done[done]))
                keep = without_holes(done)
                self.cache.select(keep)
                rows, token, done = rows[keep], token[keep], done[keep]
                self._rows_continue(self.owner[rows])
            logits = self._forward(token, rows, t)
        leave(rows, t + 1, ~done)

    def _prefill(self) -> Tensor:
        """Read each prompt once, then give every completion its row of the cache; (R, V) logits of the first token."""
        cache = DynamicCache(config=self.model.config)
        positions = position_ids(self.prompt_mask)
        mask = self.prompt_mask if self.needs_mask else None
        self._rows_continue(torch.arange(len(self.prompts)))
        logits = self._logits(cache, self.prompt_ids, mask, positions)  # (N, V)
        self._rows_continue(self.owner)
        if self.watcher is not None:
            self.watcher.prompts_were_read(self.prompts)
        T = self.sampling.max_new_tokens
        self.compact_share = COMPACT_SHARE
        self.cache: DecodeCache | StaticCache
        if self._is_static(cache):
            self.cache = StaticCache(self.model, cache, self.owner, self.prompt_mask, T)
            self.compact_share, self.needs_mask = GRAPHS_COMPACT_SHARE, False
            if self.device.type == "cuda" and self.can_capture:
                self.graphed = GraphedForward(self._read, self.cache.columns, self.watcher)
        else:
            self.cache = DecodeCache(self.model, cache, self.owner, self.prompt_mask, T)
            self.needs_mask = self.needs_mask and not self.cache.shared
        self.next_position = positions[self.owner, -1:] + 1  # (R, 1)
        self.mask = nn.functional.pad(self.prompt_mask[self.owner], (0, T), value=True)  # (R, P + T)
        return logits[self.owner]

    def _rows_continue(self, owner: Tensor) -> None:
        """The rows of the next passes continue these prompts of the batch."""
        if self.actors is not None:
            self.actors.rows_continue(self.prompts[owner.cpu()])

    def _forward(self, token: Tensor, rows: Tensor, t: int) -> Tensor:
        """Read token t of each row; (R, V) logits of token t + 1."""
        positions = self.next_position[rows] + t
        if isinstance(self.cache, StaticCache):
            self.cache.columns.advance(t)
            logits = (self.graphed or self._read)(token[:, None], positions)
        else:
            mask = self.mask[rows, : self.prompt_ids.shape[1] + t + 1] if self.needs_mask else None
            logits = self._logits(self.cache.cache, token[:, None], mask, positions)
        if self.watcher is not None:
            self.watcher.token_was_read(self.at[rows.cpu()], t)
        return logits

    def _is_static(self, cache: Cache) -> bool:
        """True when token steps run on a cache at fixed addresses, as CUDA graphs need it."""
        wanted = self.cuda_graphs == "on" or (self.cuda_graphs == "auto" and self.device.type == "cuda")
        return wanted and has_plain_attention(self.model, cache)

    def _read(self, ids: Tensor, positions: Tensor) -> Tensor:
        """(R, 1) ids and positions, on a static cache, to (R, V) logits."""
        return self._logits(self.cache.cache, ids, None, positions)

    def _logits(self, cache: Cache, ids: Tensor, mask: Tensor | None, positions: Tensor) -> Tensor:
        """(R, W) ids to the float32 logits after the last of them, (R, V). mask: None where nothing is padding."""
        arguments = cache_arguments(self.model, cache) | last_logits_argument(self.model)
        if self.takes_positions:
            arguments["position_ids"] = positions
        if mask is not None:
            arguments["attention_mask"] = mask.long()
        out = self.model(input_ids=ids, **arguments)
        return out[0][:, -1].float()

    def _sample(self, logits: Tensor, rows: Tensor, tokens: Tensor, t: int) -> tuple[Tensor, Tensor]:
        scores = self.processors(self._context(rows, tokens, t), logits) if len(self.processors) else logits
        if self.uniforms is None:
            return greedy(scores)
        return inverse_cdf(scores, self.uniforms[rows, t])

    def _context(self, rows: Tensor, tokens: Tensor, t: int) -> Tensor:
        """(R, P + t) ids that the repetition penalty looks at.

        Padding repeats the prompt's last token, so that the pad token (often EOS) is not penalised.
        """
        prompts = torch.where(self.prompt_mask, self.prompt_ids, self.prompt_ids[:, -1:])
        return torch.cat([prompts[self.owner[rows]], tokens[rows, :t]], dim=1)

    def _ends(self, token: Tensor, tokens: Tensor, rows: Tensor, t: int) -> Tensor:
        ends = torch.isin(token, self.eos)
        if self.stop is not None:
            begun = None if self.dialogue is None else self.dialogue.begun[rows].tolist()
            ends |= self.stop.found(tokens[rows, : t + 1], begun).to(self.device)
        return ends


class StopStrings:
    """Finds rows whose newest token completes a stop string in the completion's own text, never in the prompt's."""

    def __init__(self, strings: Sequence[str], tokenizer: PreTrainedTokenizerBase | None) -> None:
        assert tokenizer is not None
        self.strings = tuple(strings)
        self.tokenizer = tokenizer
        # A token adds at least one byte, so older ones cannot be part of a match; a few more for special
        # tokens, which add none.
        self.window = max(len(string.encode()) for string in strings) + 8

    def found(self, tokens: Tensor, begun: Sequence[int] | None = None) -> Tensor:
        """(R, t) tokens so far -> (R,) bool. begun: (R,) column where each row's turn began; None: 0."""
        first = max(tokens.shape[1] - self.window, 0)
        newest = tokens[:, first:].tolist()
        if begun is not None:
            newest = [ids[max(start - first, 0) :] for ids, start in zip(newest, begun, strict=True)]
        texts = self.tokenizer.batch_decode(newest, skip_special_tokens=False)
        return torch.tensor([any(string in text for string in self.strings) for text in texts])
