"""`vdr score`: the uncertainty of existing completions.

Reads rows window by window, tokenises, scores batches of similar length, writes every window as a part that survives a
kill, joins the parts in order. A row's numbers depend on the row, the model and the ensemble alone: not on the batch,
the order of the rows or the number of processes, because members' masks come from (seed, member, layer, site).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import vdr_cli
from vdr_cli.disagreement.check import check_members
from vdr_cli.disagreement.masks import EnsembleSpec
from vdr_cli.disagreement.reader import EnsembleReader, MeasureRequest
from vdr_cli.engine import collectives
from vdr_cli.errors import ConfigError, DataError, VdrError
from vdr_cli.launch.joining import join_processes
from vdr_cli.models.anatomy import check_head
from vdr_cli.models.independence import check_independence
from vdr_cli.models.loading import eos_token_ids, load_causal_lm, load_tokenizer, resolve_dtype
from vdr_cli.models.policy import Policy
from vdr_cli.models.sizes import usable_length
from vdr_cli.rewards.base import LoadedReward, check_columns
from vdr_cli.rewards.loading import load_rewards
from vdr_cli.samples import to_device
from vdr_cli.scoring.batches import batches, collate
from vdr_cli.scoring.columns import MEASURES, base_columns, ensemble_columns, token_columns
from vdr_cli.scoring.layout import make_layout, score_columns
from vdr_cli.scoring.parts import Layout, Parts
from vdr_cli.scoring.ranking import Ranking, check_labels, save_ranking
from vdr_cli.scoring.request import BATCH_TOKENS, OTHER_BATCH_TOKENS, ScoreRequest, ScoreResult
from vdr_cli.scoring.rewards import add_rewards, reward_columns
from vdr_cli.scoring.saved_ids import ids_fit
from vdr_cli.scoring.sources import SPOOL, STDIN, Row, Source, Window, Windows, find_sources, first_rows
from vdr_cli.scoring.stamps import reward_stamps, weights_stamp
from vdr_cli.scoring.tokens import Item, Tokeniser

PLACES_SHOWN = 20
STEP = 0  # of the masks: there is one ensemble


@dataclass(frozen=True)
class Progress:
    rows: int
    """Rows scored by this process since it started."""
    fraction: float
    """Share of the input that is done."""
    seconds: float


def run_score(request: ScoreRequest, progress: Callable[[Progress], None] | None = None) -> ScoreResult:
    """Score every row of the inputs into request.output; a collective when there are several processes."""
    started = time.monotonic()
    device = join_processes(request.device)
    spool = Path(request.output + SPOOL)
    if STDIN in request.inputs and collectives.world_size() > 1:
        raise ConfigError("- (stdin) is read by one process: give a file to score with several")
    try:
        sources = find_sources(request.inputs, spool)
        _check_output(sources, request.output)
        parts = Parts(request.output, describe(request, sources))
        finished = parts.finished() if request.resume else None
        summary = _scored(request, sources, parts, device, progress, started) if finished is None else finished
    finally:
        spool.unlink(missing_ok=True)
    seconds = time.monotonic() - started
    with collectives.agreed():
        ranking = save_ranking(request.output, request.fields) if collectives.is_main() else Ranking()
    found = _as_result(summary)
    found["notes"] += ranking.notes
    is_reused = finished is not None
    return ScoreResult(output=request.output, seconds=seconds, ranking=ranking.rows, is_reused=is_reused, **found)


def _scored(
    request: ScoreRequest,
    sources: Sequence[Source],
    parts: Parts,
    device: torch.device,
    progress: Callable[[Progress], None] | None,
    started: float,
) -> dict[str, Any]:
    """Write the output; its summary."""
    parts.check(request.resume)
    sample = first_rows(sources)
    loaded = _rewards(request, sample)
    judged = reward_columns(loaded)
    if request.fields.label not in judged:
        check_labels(sample, request.fields)
    layout = make_layout(request, sources, sample, judged)
    scorer = replace(Scorer.load(request, device, sample), rewards=loaded)
    replaced = [name for name in (*scorer.names, *judged) if any(name in (row.values or ()) for row in sample)]
    with collectives.agreed():
        if collectives.is_main():
            parts.begin()
    try:
        with collectives.agreed():
            count = _score_share(request, sources, parts, layout, scorer, progress, started)
    except VdrError:
        if collectives.is_main():
            parts.leave()
        raise
    with collectives.agreed():
        summary = _finish(parts, count, layout, replaced) if collectives.is_main() else None
    found: dict[str, Any] = collectives.broadcast_object(summary)
    return found


@dataclass(frozen=True)
class Scorer:
    """The model with all that turns rows into columns."""

    model: Any
    tokeniser: Tokeniser
    ensemble: EnsembleReader | None
    names: tuple[str, ...]  # the columns
    batch_tokens: int
    device: torch.device
    pad_id: int
    rewards: Sequence[LoadedReward] = ()

    @classmethod
    def load(cls, request: ScoreRequest, device: torch.device, sample: Sequence[Row]) -> Scorer:
        """sample: some rows, to see whether their token ids are this tokenizer's."""
        tokenizer = load_tokenizer(request.model, request.revision, request.trust_remote_code)
        if request.append_eos and tokenizer.eos_token_id is None:
            raise ConfigError(f"--append-eos: the tokenizer of {request.model} has no EOS token")
        dtype = resolve_dtype(request.dtype)
        model = load_causal_lm(request.model, dtype, request.revision, request.trust_remote_code, device)
        check_head(model)
        check_independence(model)
        tokeniser = Tokeniser(
            tokenizer=tokenizer,
            fields=request.fields,
            vocabulary=model.get_input_embeddings().weight.shape[0],
            max_tokens=request.max_tokens,
            append_eos=request.append_eos,
            longest=usable_length(model.config),
            use_ids=ids_fit(sample, request.fields, tokenizer),
            eos_ids=tuple(eos_token_ids(model, tokenizer)),
        )
        asked = request.disagreement
        spec = None if asked is None else EnsembleSpec(**asked.member_settings, seed=request.seed)
        if spec is not None:
            check_members(model, spec)
        names = score_columns(request)
        batch_tokens = request.batch_tokens or BATCH_TOKENS.get(device.type, OTHER_BATCH_TOKENS)
        ensemble = None if spec is None else EnsembleReader(spec)
        return cls(model, tokeniser, ensemble, names, batch_tokens, device, tokenizer.pad_token_id)

    @torch.no_grad()
    def score(self, items: Sequence[Item]) -> dict[int, dict[str, Any]]:
        """Position in the window to columns; null for a completion without tokens."""
        found = {item.at: {**dict.fromkeys(self.names), "n_tokens": 0} for item in items if not item.measured}
        for group_size, batch in batches(items, self.batch_tokens):
            columns = self._columns(group_size, batch)
            for index, item in enumerate(batch):
                found[item.at] = {name: columns[name][index] for name in self.names}
        return found

    def _columns(self, group_size: int, batch: Sequence[Item]) -> dict[str, list[Any]]:
        c = to_device(collate(batch, self.pad_id), self.device)
        mask = c.policy_mask
        policy = Policy(self.model, share_prompts=None if group_size > 1 else False)  # alone: one pass is quicker
        logps, entropy = policy(
            c.prompt_ids, c.prompt_mask, c.completion_ids, c.completion_mask, temperature=1.0
        )  # (B, T)
        columns = base_columns(logps, entropy, mask)
        statistics = None
        if self.ensemble is not None:
            statistics = self.ensemble.measure(self.model, MeasureRequest(c, group_size, STEP, measures=MEASURES))
            columns |= ensemble_columns(statistics, mask)
        as_lists: dict[str, list[Any]] = {name: values.tolist() for name, values in columns.items()}
        if "token_ids" in self.names:
            as_lists |= token_columns(c, logps, entropy, statistics)
        return as_lists


def _rewards(request: ScoreRequest, sample: Sequence[Row]) -> list[LoadedReward]:
    """The reward functions that were asked for. ConfigError or DataError when one cannot judge these rows."""
    if request.rewards is None:
        return []
    loaded = load_rewards(request.rewards, "")
    columns = {name for row in sample for name in row.values or () if name != request.fields.prompt}
    check_columns(loaded, columns)
    return loaded


def describe(request: ScoreRequest, sources: Sequence[Source]) -> dict[str, Any]:
    """Everything that the output depends on: its metadata, and what a resumed scoring must have in common."""
    ensemble = None
    if request.disagreement is not None:
        keys = ("members", "dropout", "last_k", "mask_sharing", "blocks")
        ensemble = {key: getattr(request.disagreement, key) for key in keys}
        ensemble["scope"] = request.disagreement.effective_scope
    return {
        "version": vdr_cli.__version__,
        "model": request.model,
        "revision": request.revision,
        "weights": weights_stamp(request.model),
        "dtype": str(resolve_dtype(request.dtype)).removeprefix("torch."),
        "seed": request.seed,
        "ensemble": ensemble,
        "fields": asdict(request.fields),
        "tokens": request.tokens,
        "max_tokens": request.max_tokens,
        "append_eos": request.append_eos,
        "on_error": request.on_error,
        **({} if request.rewards is None else {"rewards": request.rewards.model_dump(mode="json")}),
        **({"reward_files": stamps} if (stamps := reward_stamps(request.rewards)) else {}),
        "inputs": [source.stamp for source in sources],
    }


def _score_share(
    request: ScoreRequest,
    sources: Sequence[Source],
    parts: Parts,
    layout: Layout,
    scorer: Scorer,
    progress: Callable[[Progress], None] | None,
    started: float,
) -> int:
    """Score this rank's windows that are not there yet; returns how many windows there are in all."""
    rank, world = collectives.rank(), collectives.world_size()
    windows = Windows(sources, lambda index: index % world == rank and not parts.has(index))
    done = 0
    for window in windows:
        rows, note = _score_window(window, scorer, request)
        parts.write(window.index, rows, note, layout)
        done += len(window.rows)
        if progress is not None:
            progress(Progress(done, window.fraction, time.monotonic() - started))
    return windows.count


def _score_window(window: Window, scorer: Scorer, request: ScoreRequest) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The output rows of a window, and counts of what happened in it."""
    items = scorer.tokeniser.items(window.rows)
    bad = [f"{row.place}: {row.error}" for row in window.rows if row.error is not None]
    if bad and request.on_error == "stop":
        raise DataError(f"{bad[0]}; --on-error skip leaves such rows out")
    columns = scorer.score(items)
    if request.rewards is not None:
        tokenizer, timeout = scorer.tokeniser.tokenizer, request.rewards.timeout
        add_rewards(columns, scorer.rewards, window.rows, items, request.fields, tokenizer, timeout)
    rows = [{**(window.rows[at].values or {}), **columns[at]} for at in sorted(columns)]
    note = {
        "rows": len(rows),
        "skipped": len(bad),
        "skipped_rows": bad[:PLACES_SHOWN],
        "cut": sum(item.is_cut for item in items),
        "empty": sum(not item.measured for item in items),
        "ids_differ": sum(item.ids_differ for item in items),
    }
    return rows, note


def _finish(parts: Parts, count: int, layout: Layout, replaced: Sequence[str]) -> dict[str, Any]:
    """Join the parts; returns the summary of all windows."""
    notes = parts.notes(count)
    counted = ("rows", "skipped", "cut", "empty", "ids_differ")
    summary: dict[str, Any] = {key: sum(note.get(key, 0) for note in notes) for key in counted}
    summary["skipped_rows"] = [place for note in notes for place in note["skipped_rows"]][:PLACES_SHOWN]
    summary["replaced"] = list(replaced)
    parts.join(count, layout, summary)
    return summary


def _as_result(summary: dict[str, Any]) -> dict[str, Any]:
    notes = []
    if summary["skipped"]:
        notes.append(f"{summary['skipped']} rows could not be used and were left out")
    if summary["cut"]:
        notes.append(f"{summary['cut']} completions were longer than --max-tokens: scored on their first tokens")
    if summary["empty"]:
        notes.append(f"{summary['empty']} completions have no tokens: their measures are null")
    if differ := summary.get("ids_differ", 0):
        notes.append(f"{differ} rows have token ids that do not decode to their text: the text was tokenised instead")
    if summary["replaced"]:
        notes.append(f"columns of the input gave way to ours of the same name: {', '.join(summary['replaced'])}")
    return {
        "rows": summary["rows"],
        "skipped": summary["skipped"],
        "truncated": summary["cut"],
        "empty": summary["empty"],
        "skipped_rows": tuple(summary["skipped_rows"]),
        "notes": tuple(notes),
    }


def _check_output(sources: Sequence[Source], output: str) -> None:
    target = Path(output)
    if any(target.resolve() == Path(source.path).resolve() for source in sources):
        raise ConfigError(f"-o {output}: this is an input file: give another name")
    if not target.absolute().parent.is_dir():
        raise ConfigError(f"-o {output}: the directory {target.parent} is not there")
