"""The request and the result of `vdr score`. No torch import."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from vdr_cli.config.schema import DisagreementConfig, RewardsConfig

BATCH_TOKENS = {"cpu": 2048}
"""A CPU is a quarter faster where activations stay in its caches."""
OTHER_BATCH_TOKENS = 16_384  # fills an accelerator

BASE_COLUMNS = ("n_tokens", "nll_sum", "nll_mean", "ppl", "entropy_mean", "entropy_max")
ENSEMBLE_COLUMNS = (
    "total_mean",
    "aleatoric_mean",
    "bald_mean",
    "bald_sum",
    "bald_max",
    "bald_eos",
    "bald_mean_jk",
    "bald_se",
    "epkl_mean",
    "rmi_mean",
    "logp_var_mean",
    "rmi_seq",
    "ig_seq",
    "vote_disagree",
)
BASE_TOKEN_COLUMNS = ("token_ids", "token_logp", "token_entropy")
ENSEMBLE_TOKEN_COLUMNS = ("token_bald", "token_rmi")


LABEL = "label"


@dataclass(frozen=True)
class Fields:
    """Places of the parts of a row: column names, or paths into nested columns such as resps.0.0."""

    prompt: str = "prompt"
    completion: str = "completion"
    prompt_ids: str = "prompt_ids"
    completion_ids: str = "completion_ids"
    label: str | None = None
    """1 right, 0 wrong; or any number where higher is better. None: implied_label, if there are numbers in it."""
    implied_label: str = LABEL
    group: str | None = None
    """Rows of one group are resampled together in the intervals; None: rows with the same prompt."""
    filter: str | None = None
    """The filter whose rows are ranked, in logs of lm-eval with several; None: the first one."""


@dataclass(frozen=True)
class ScoreRequest:
    inputs: tuple[str, ...]
    """Files (JSONL, CSV, Parquet), globs, `-` (JSONL on stdin), run directories or their completions/."""
    model: str
    output: str
    """OUT.parquet, OUT.jsonl or OUT.csv."""
    disagreement: DisagreementConfig | None = field(default_factory=lambda: DisagreementConfig(scope="full"))
    """members, dropout, scope, last_k, mask_sharing, blocks are read; None: nll and entropy only."""
    rewards: RewardsConfig | None = None
    """Reward functions and models that also judge every row; None: none does."""
    seed: int = 0
    fields: Fields = Fields()
    tokens: bool = False
    """Also write arrays with one value per token."""
    max_tokens: int | None = None
    """Longer completions are scored on their first tokens; None: no limit."""
    append_eos: bool = False
    """Completions given as text end with the EOS token."""
    batch_tokens: int | None = None
    """Prompt and completion tokens of one forward; memory, never the result. None: BATCH_TOKENS of the device."""
    on_error: Literal["stop", "skip"] = "stop"
    resume: bool = False
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    revision: str | None = None
    trust_remote_code: bool = False
    device: str = "auto"
    """auto: this process's accelerator when there is one, else cpu."""


@dataclass(frozen=True)
class ScoreResult:
    output: str
    rows: int
    skipped: int
    truncated: int
    empty: int
    seconds: float
    notes: tuple[str, ...] = ()
    """One line each: what was left out, cut or overwritten."""
    skipped_rows: tuple[str, ...] = ()
    """The first of them: `file:line: why`."""
    ranking: tuple[dict[str, Any], ...] = ()
    """With labels: a row per measure, {"measure", "auroc", "auroc_low", "auroc_high", ...}."""
    is_reused: bool = False
    """The output was complete, with --resume: nothing was scored."""
