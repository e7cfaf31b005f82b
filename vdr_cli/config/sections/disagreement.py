"""The ensemble of dropout members, and what is measured with it."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from vdr_cli.config.sections.base import Fraction, Positive, Section


class DisagreementConfig(Section):
    """The ensemble (docs/disagreement.md), which bonus.source disagreement uses. `mode: none` turns the bonus off."""

    mode: Literal["none", "per_token", "end_of_sequence"] = "end_of_sequence"
    """Positions at which members are compared: none, every token, or the one that predicts the last token."""
    measure: Literal["bald", "rmi"] = "bald"
    """bald: mutual information between the next token and the weights. rmi: the contribution of the sampled token to
    it."""
    members: Annotated[int, Field(ge=2)] = 8
    """M, the number of dropout members."""
    dropout: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Dropout probability p of the members' masks."""
    scope: Literal["full", "last_k"] | None = None
    """Layers in which members differ: all (full), or only the top last_k; the layers below run once for all members.
    None: last_k with mode end_of_sequence, where it ranks completions no worse at a third of the cost; otherwise
    full."""
    last_k: Positive | None = None
    """Number of top layers in which members differ, with scope last_k. None: a quarter of the model's layers, rounded
    up."""
    mask_sharing: Literal["member", "token"] = "member"
    """member: one mask per member, shared by all positions and completions (one sample of the weights). token: an
    independent mask at each position."""
    blocks: dict[str, str] | None = None
    """Names of the attention and MLP blocks inside a decoder layer, e.g. {attention: attn, mlp: ffn}, for architectures
    where vdr cannot find them. None: found automatically."""
    credit: Literal["sequence", "token"] = "sequence"
    """per_token only. sequence: the mean over valid tokens is the completion's bonus. token: each token is credited
    with the measure of the tokens after it."""
    discount: Fraction = 1.0
    """γ, the discount per token of what follows (credit: token)."""
    last_n: Positive | None = None
    """per_token only: use only the last n valid tokens. None: all."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.effective_scope == "full" and self.last_k is not None:
            raise ValueError("last_k is set but scope is full: set scope to last_k or remove last_k")
        if self.mode != "per_token" and (self.credit == "token" or self.last_n is not None):
            raise ValueError(f"credit token and last_n need mode per_token, not {self.mode}")
        return self

    @property
    def effective_scope(self) -> Literal["full", "last_k"]:
        """`scope`, or what None means with this mode."""
        by_mode: Literal["full", "last_k"] = "last_k" if self.mode == "end_of_sequence" else "full"
        return self.scope or by_mode

    @property
    def member_settings(self) -> dict[str, Any]:
        """The numbers and names that make the members, by the fields of `disagreement.masks.EnsembleSpec`."""
        names = ("members", "dropout", "last_k", "mask_sharing")
        blocks = tuple(sorted(self.blocks.items())) if self.blocks else None
        return {name: getattr(self, name) for name in names} | {"scope": self.effective_scope, "blocks": blocks}
