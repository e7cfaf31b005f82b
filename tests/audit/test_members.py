"""Members of a model small enough to be written down: one layer of two blocks, without attention."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from vdr_cli.audit import members, streams
from vdr_cli.config import Config

V, D, M = 5, 4, 3


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.Linear(D, D, dtype=torch.float64)
        self.mlp = nn.Linear(D, D, dtype=torch.float64)

    def forward(self, x):
        x = x + self.self_attn(x)
        return x + self.mlp(x)


class Toy(nn.Module):
    """Reads each token alone."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        text = SimpleNamespace(num_hidden_layers=layers)
        self.config = SimpleNamespace(get_text_config=lambda: text)
        self.embed = nn.Embedding(V, D, dtype=torch.float64)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.head = nn.Linear(D, V, dtype=torch.float64)

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, use_cache):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return SimpleNamespace(logits=self.head(x))


def settings(**disagreement) -> Config:
    base = {"mode": "per_token", "members": M, "dropout": 0.3}
    return Config.model_validate({"train": {"seed": 4}, "disagreement": {**base, **disagreement}})


def by_hand(model: Toy, cfg: Config, step: int, token: int, masks) -> np.ndarray:
    """(M, V) log-probabilities after one token; masks(member, layer, site): (D,)."""
    rows = []
    for member in range(M):
        x = model.embed.weight[token]
        for number, layer in enumerate(model.layers):
            x = x + layer.self_attn(x) * masks(member, number, "attention")
            x = x + layer.mlp(x) * masks(member, number, "mlp")
        rows.append(torch.log_softmax(model.head(x), -1).detach().numpy())
    return np.stack(rows)


def expected(log_p: np.ndarray, y: int) -> tuple[float, float]:
    p = np.exp(log_p)
    mean = p.mean(0)
    bald = -(mean * np.log(mean)).sum() + (p * log_p).sum(1).mean()
    return bald, np.log(mean[y]) - log_p[:, y].mean()


@pytest.mark.parametrize(
    ("given", "masked"),
    [
        ({}, {(layer, site) for layer in (0, 1) for site in ("attention", "mlp")}),
        ({"scope": "last_k", "last_k": 1}, {(1, "attention"), (1, "mlp")}),
    ],
)
def test_measures_of_members(given, masked):
    model, cfg = Toy(), settings(**given)
    found = members.measures(model, cfg, 6, [[1, 2], [3]], [[4, 0], [2]])

    def masks(member, layer, site):
        if (layer, site) not in masked:
            return torch.ones(D)
        return torch.from_numpy(streams.mask(4, f"6/{member}/{layer}/{site}", D, 0.3))

    for row, t, before, y in ((0, 0, 2, 4), (0, 1, 4, 0), (1, 0, 3, 2)):
        bald, rmi = expected(by_hand(model, cfg, 6, before, masks), y)
        assert found["bald"][row, t] == pytest.approx(bald, abs=1e-12)
        assert found["rmi"][row, t] == pytest.approx(rmi, abs=1e-12)
    assert found["bald"][1, 1] == 0
    assert not model.layers[0].mlp._forward_hooks


def test_masks_drawn_per_token_follow_the_sequences_own_stream():
    model, cfg = Toy(), settings(mask_sharing="token")
    found = members.measures(model, cfg, 6, [[1, 2]], [[4, 0]])
    name = {2: streams.sequence_name([1, 2]), 4: streams.sequence_name([1, 2], [4, 0])}
    place = {2: 1, 4: 0}

    for before, y, t in ((2, 4, 0), (4, 0, 1)):

        def masks(member, layer, site, token=before):
            drawn = streams.mask(4, f"6/{member}/{layer}/{site}/{name[token]}", 2 * D, 0.3)
            return torch.from_numpy(drawn.reshape(2, D)[place[token]])

        assert found["bald"][0, t] == pytest.approx(expected(by_hand(model, cfg, 6, before, masks), y)[0], abs=1e-12)


def test_last_k_defaults_to_a_quarter_rounded_up():
    assert members.first_layer(6, "last_k", None) == 4
    assert members.first_layer(6, "last_k", 5) == 1
    assert members.first_layer(6, "full", None) == 0


def test_what_cannot_be_read_says_why():
    model = Toy()
    model.layers[1].mlp.forward = lambda hidden, residual: hidden
    with pytest.raises(members.CannotReadError, match="adds the residual"):
        members.measures(model, settings(), 0, [[1]], [[2]])
