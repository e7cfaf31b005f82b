"""One rank in the folder argv[1]: the policy's gradient, its prompts read as argv[2] says, or rows divided by ranks."""

import sys
from contextlib import nullcontext
from typing import Any

import torch
from deepspeed.utils import safe_get_full_grad

from vdr_cli.cli.app import leave
from vdr_cli.config import Config
from vdr_cli.disagreement.masks import EnsembleSpec
from vdr_cli.disagreement.reader import EnsembleReader, MeasureRequest
from vdr_cli.engine import collectives
from vdr_cli.engine.build import build_engine
from vdr_cli.engine.processes import start_distributed
from vdr_cli.models.limits import PACKED_TOKENS
from vdr_cli.samples import Completions


def save_read_logps() -> None:
    """This rank's rows, another number on each, as the reference is read: without gradient, in micro-batches of two."""
    tokens, _ = torch.load(folder + "/batches.pt")[0]
    rows = slice(0, 1 + collectives.rank() % 3)
    own = Completions(**tokens, sampler_logps=tokens["completion_ids"] * 0.0, truncated=torch.zeros(3)).rows(rows)
    with engine.gathered_model() as model:
        torch.save(engine.read_logps(model, own, 2, 0.7), f"{folder}/read{collectives.rank()}.pt")
        torch.save([measured(model, own, **how) for how in MEMBERS], f"{folder}/measured{collectives.rank()}.pt")


MEMBERS: list[dict[str, Any]] = [
    {},
    {"positions": "last", "shown_rows": 1},
    {"scope": "last_k", "last_k": 1},
    {"budget": 1},
    {"layers": True},
]
"""Ways for members to read: at the end of rows, in the upper layer alone, one by one, layer after layer."""


def measured(
    model: Any, own: Completions, budget: int | None = None, positions: Any = "all", shown_rows: int = 0,
    layers: bool = False, **spec: Any,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:  # fmt: skip
    """The measures of this rank's rows by ranks that divide all rows, and by this one alone."""
    members = EnsembleSpec(members=3, dropout=0.2, seed=1, **spec)
    request = MeasureRequest(own, 1, 2, positions, ("bald", "rmi", "member_logps"), None, shown_rows, budget)
    one_by_one = (lambda: nullcontext(lambda number: nullcontext())) if layers else None
    found = []
    for division in (engine.sequence, None):
        reader = EnsembleReader(members, one_by_one, division)
        each = reader.measure(model, request)
        found.append([each.bald, each.rmi, each.member_logps, reader.shown.bald])
    return tuple(found)


torch.set_num_threads(1)
folder, how = sys.argv[1:]
device = start_distributed()
rollout = {"group_size": 4, "max_new_tokens": {"trees": 4, "packed": PACKED_TOKENS}.get(how, 4000)}
own = {"ds_config": folder + "/ds.json", "sequence_parallel": 2 if how == "sequence" else 1}
config = Config(model={"name": folder, "dtype": "float32"}, rollout=rollout, engine=own)
engine = build_engine(config, device)
assert engine.as_trees == (how == "trees") and engine.packed == (how == "packed")
if how != "sequence":
    engine.ds_engine.module.share_prompts = how == "share"
parameters = list(engine.causal_lm.parameters())
held = sum(p.ds_tensor.numel() for p in parameters), sum(p.ds_numel for p in parameters), sum(map(len, parameters))
torch.save(held, f"{folder}/held{collectives.rank()}.pt")
size = own["sequence_parallel"]
if how == "sequence":
    save_read_logps()
batches = torch.load(folder + "/batches.pt")[collectives.rank() // size :: collectives.world_size() // size]
for index, (tokens, coefficients) in enumerate(batches):
    logps, entropy = engine.forward(**tokens, temperature=0.7)
    loss = (coefficients[0] * logps + coefficients[1] * entropy).sum()
    engine.backward(loss, last=index == len(batches) - 1)
gradients = {name: safe_get_full_grad(p) for name, p in engine.causal_lm.named_parameters()}
if collectives.rank() == 0:
    torch.save(gradients, folder + "/gradients.pt")
leave(0)  # as `vdr` ends a rank
