"""Masks are regenerated anywhere from their names, and are Bernoulli(1-p)/(1-p)."""

import subprocess
import sys
from dataclasses import fields

import pytest
import torch

from vdr_cli.audit import streams
from vdr_cli.config.schema import DisagreementConfig
from vdr_cli.disagreement import masks
from vdr_cli.disagreement.hooks import first_layer
from vdr_cli.disagreement.masks import EnsembleSpec
from vdr_cli.errors import ConfigError

SPEC = EnsembleSpec(members=4, dropout=0.1, seed=3)


def test_values_and_rate() -> None:
    mask = masks.member_mask(SPEC, 0, 0, 0, "mlp", 200_000)
    assert mask.dtype == torch.float32
    torch.testing.assert_close(mask.unique(), torch.tensor([0.0, 1 / 0.9]))
    assert abs(float((mask == 0).float().mean()) - 0.1) < 0.003
    assert abs(float(mask.mean()) - 1.0) < 0.003


def test_every_part_of_the_key_matters() -> None:
    one = masks.member_mask(SPEC, 5, 1, 2, "mlp", 64)
    others = [
        masks.member_mask(EnsembleSpec(members=4, seed=4), 5, 1, 2, "mlp", 64),
        masks.member_mask(SPEC, 6, 1, 2, "mlp", 64),
        masks.member_mask(SPEC, 5, 2, 2, "mlp", 64),
        masks.member_mask(SPEC, 5, 1, 3, "mlp", 64),
        masks.member_mask(SPEC, 5, 1, 2, "attention", 64),
    ]
    assert all(not torch.equal(one, other) for other in others)
    assert torch.equal(one, masks.member_mask(SPEC, 5, 1, 2, "mlp", 64))


def test_masks_are_those_that_the_docs_define() -> None:
    """docs/audit.md, "Random numbers", written a second time."""
    found = masks.member_mask(SPEC, 5, 1, 2, "mlp", 65)
    assert found.tolist() == pytest.approx(streams.mask(3, "5/1/2/mlp", 65, 0.1).tolist())
    by_token = masks.token_mask(SPEC, 5, 1, 2, "attention", "ab", 4, 9)
    assert by_token.flatten().tolist() == pytest.approx(streams.mask(3, "5/1/2/attention/ab", 36, 0.1).tolist())


def test_another_process_draws_the_same() -> None:
    """Frozen bits: a change of generator would change every resumed run."""
    mask = masks.member_mask(EnsembleSpec(members=2, dropout=0.5, seed=1), 2, 3, 4, "attention", 16)
    code = (
        "from vdr_cli.disagreement.masks import EnsembleSpec, member_mask;"
        "print(member_mask(EnsembleSpec(members=2, dropout=0.5, seed=1), 2, 3, 4, 'attention', 16).int().tolist())"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert other.strip() == str(mask.int().tolist())
    assert mask.int().tolist() == FROZEN


FROZEN = [2, 0, 2, 0, 2, 2, 0, 2, 0, 2, 0, 0, 0, 2, 2, 2]


def test_token_masks_depend_on_content_not_on_padding() -> None:
    ids, mask = torch.tensor([[0, 0, 5, 6], [4, 5, 6, 7]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]).bool()
    answer, kept = torch.tensor([[8, 9, 0], [8, 9, 0]]), torch.tensor([[1, 1, 0], [1, 1, 0]]).bool()
    keys = masks.row_keys(ids, mask, answer, kept)
    assert keys[0] == masks.row_keys(ids[:1, 2:], mask[:1, 2:], answer[:1, :2], kept[:1, :2])[0]
    assert keys[0] != keys[1]
    short = masks.token_mask(SPEC, 0, 0, 0, "mlp", keys[0], 3, 8)
    long = masks.token_mask(SPEC, 0, 0, 0, "mlp", keys[0], 5, 8)
    assert torch.equal(short, long[:3])


def test_positions_of_a_token_mask_are_independent() -> None:
    mask = masks.token_mask(EnsembleSpec(members=2, dropout=0.5), 0, 0, 0, "mlp", "row", 400, 64) > 0
    agreement = (mask[1:] == mask[:-1]).float().mean()
    assert abs(float(agreement) - 0.5) < 0.02


def test_impossible_ensembles_name_their_key() -> None:
    with pytest.raises(ConfigError, match=r"disagreement\.members"):
        EnsembleSpec(members=1)


def test_scope_follows_the_mode() -> None:
    """A table of fidelity decides: at the end of the sequence the top quarter ranks as well as all layers."""
    assert spec_of().scope == "last_k"
    assert spec_of(mode="per_token").scope == "full"
    assert spec_of(scope="full").scope == "full"
    assert spec_of(mode="per_token", scope="last_k").scope == "last_k"
    quarter = EnsembleSpec(members=2, scope="last_k")
    assert [count - first_layer(count, quarter) for count in (1, 3, 4, 5, 12, 80)] == [1, 1, 1, 2, 3, 20]


def spec_of(seed: int = 0, **settings: object) -> EnsembleSpec:
    return EnsembleSpec(**DisagreementConfig(**settings).member_settings, seed=seed)


def test_settings_give_every_field() -> None:
    settings = {"members": 3, "dropout": 0.2, "scope": "last_k", "last_k": 2, "mask_sharing": "token"}
    spec = spec_of(9, **settings, blocks={"mlp": "ffn"})
    assert {field.name for field in fields(EnsembleSpec)} == {*DisagreementConfig().member_settings, "seed"}
    assert spec == EnsembleSpec(3, 0.2, "last_k", 2, "token", (("mlp", "ffn"),), 9)
    assert spec.block_names == {"mlp": "ffn"}
    assert hash(spec) == hash(spec_of(9, **settings, blocks={"mlp": "ffn"}))
