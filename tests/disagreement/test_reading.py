"""Padding, order, chunks, memory and shared prompts change no number, and the model is left as found."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from vdr_cli.disagreement import hooks, masks, memory, reader, reading
from vdr_cli.disagreement.information import MEASURES, Statistics
from vdr_cli.disagreement.masks import EnsembleSpec
from vdr_cli.disagreement.reader import EnsembleReader, MeasureRequest
from vdr_cli.errors import ConfigError
from vdr_cli.models import anatomy
from vdr_cli.samples import Completions

SPEC = EnsembleSpec(members=4, dropout=0.2, seed=5)
TOP = EnsembleSpec(members=4, dropout=0.2, seed=5, scope="last_k", last_k=1)
TOKEN = EnsembleSpec(members=4, dropout=0.2, seed=5, mask_sharing="token")
EVERY = pytest.mark.parametrize("spec", [SPEC, TOP, TOKEN], ids=["full", "top", "token"])
ALL = frozenset(MEASURES)


def assert_same(one: Statistics, other: Statistics, tolerance: float = 1e-6) -> None:
    for name in MEASURES:
        torch.testing.assert_close(one.get(name), other.get(name), rtol=1e-4, atol=tolerance)


def padded(c: Completions, left: int, right: int) -> Completions:
    return replace(
        c,
        prompt_ids=nn.functional.pad(c.prompt_ids, (left, 0), value=7),
        prompt_mask=nn.functional.pad(c.prompt_mask, (left, 0)),
        completion_ids=nn.functional.pad(c.completion_ids, (0, right), value=9),
        completion_mask=nn.functional.pad(c.completion_mask, (0, right)),
        sampler_logps=nn.functional.pad(c.sampler_logps, (0, right)),
    )


@EVERY
@pytest.mark.parametrize("positions", ["all", "last"])
def test_padding_changes_nothing(spec: EnsembleSpec, positions: str, tiny_model: Callable, ragged: Callable) -> None:
    model, batch = tiny_model(), ragged()
    plain = EnsembleReader(spec).measure(model, MeasureRequest(batch, 3, 1, positions=positions, measures=ALL))
    wide = EnsembleReader(spec).measure(
        model, MeasureRequest(padded(batch, 3, 2), 3, 1, positions=positions, measures=ALL)
    )
    if positions == "all":
        wide = Statistics(**{name: wide.get(name)[..., :5] for name in MEASURES})
    assert_same(plain, wide)


@EVERY
def test_the_budget_changes_nothing(
    spec: EnsembleSpec, tiny_model: Callable, ragged: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups, members and rows of a group in every division that can be chosen."""
    model, batch = tiny_model(), ragged(groups=3, group_size=4)
    whole = EnsembleReader(spec).measure(model, MeasureRequest(batch, 4, 1, measures=ALL))
    for size, together in [(8, 4), (4, 4), (4, 3), (4, 1), (2, 1), (1, 1)]:
        division = [(slice(at, min(at + size, 12)), together) for at in range(0, 12, size)]
        monkeypatch.setattr(reader, "divided", lambda *_, division=division: division)
        assert_same(whole, EnsembleReader(spec).measure(model, MeasureRequest(batch, 4, 1, measures=ALL)))


def test_the_division_covers_every_row_once_at_any_budget(tiny_model: Callable, ragged: Callable) -> None:
    model, batch = tiny_model(), ragged(groups=3, group_size=4)
    row, prompt = memory.bytes_per_row(model, batch)
    seen = set()
    for budget in [
        1,
        prompt + row,
        prompt + 2 * row,
        prompt + 4 * row,
        3 * (prompt + 4 * row),
        8 * (prompt + 4 * row),
        2**40,
    ]:
        division = list(memory.divided(model, batch, 4, 4, budget))
        seen.add((len(division), division[0][1]))
        rows = [row for part, _ in division for row in range(12)[part]]
        assert rows == list(range(12))
        assert all(part.start // 4 == (part.stop - 1) // 4 or part.start % 4 == 0 for part, _ in division)
    assert len(seen) >= 5


@EVERY
def test_every_group_stands_alone(spec: EnsembleSpec, tiny_model: Callable, ragged: Callable) -> None:
    """A rank with other groups, or the same ones in another order, gets the same numbers."""
    model, batch = tiny_model(), ragged(groups=3, group_size=4)
    whole = EnsembleReader(spec).measure(model, MeasureRequest(batch, 4, 1, measures={"bald", "rmi"}))
    order = torch.tensor([9, 8, 11, 10, 0, 1, 2, 3])
    part = EnsembleReader(spec).measure(model, MeasureRequest(batch.rows(order), 4, 1, measures={"bald", "rmi"}))
    torch.testing.assert_close(part.bald, whole.bald[order], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(part.rmi, whole.rmi[order], rtol=1e-4, atol=1e-6)


@EVERY
def test_equal_completions_disagree_equally(spec: EnsembleSpec, tiny_model: Callable, ragged: Callable) -> None:
    batch = ragged(groups=1, group_size=3)
    batch = batch.rows(torch.tensor([1, 1, 2]))
    found = EnsembleReader(spec).measure(tiny_model(), MeasureRequest(batch, 3, 1)).bald
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["qwen2", "gpt2", "gemma2", "mixtral", "bloom", "gpt_neox", "opt"])
@pytest.mark.parametrize("spec", [SPEC, TOP], ids=["full", "top"])
def test_shared_prompts_change_nothing(
    kind: str, spec: EnsembleSpec, tiny_model: Callable, ragged: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = tiny_model(kind), ragged()
    shared = EnsembleReader(spec).measure(model, MeasureRequest(batch, 3, 1, measures=ALL))
    monkeypatch.setattr(reading, "shares_prompts", lambda model: False)
    assert_same(shared, EnsembleReader(spec).measure(model, MeasureRequest(batch, 3, 1, measures=ALL)), 1e-5)


@pytest.mark.parametrize(
    ("kind", "shared"), [("qwen2", True), ("gemma2", True), ("lfm2", False), ("recurrent_gemma", False)]
)
def test_recurrent_layers_are_not_given_a_shared_prompt(kind: str, shared: bool, tiny_model: Callable) -> None:
    assert reading.shares_prompts(tiny_model(kind)) is shared


@pytest.mark.parametrize("kind", ["qwen2", "gpt_neox", "falcon", "opt", "mixtral", "phi"])
def test_only_the_wanted_position_goes_through_the_last_mlp(kind: str, tiny_model: Callable, ragged: Callable) -> None:
    model, batch = tiny_model(kind), ragged()
    mlp = anatomy.residual_blocks(anatomy.decoder_layers(model)[-1])[1]
    widths = []
    with hooks.hooked(mlp.register_forward_hook, lambda module, arguments, output: widths.append(arguments[0].shape)):
        last = EnsembleReader(SPEC).measure(model, MeasureRequest(batch, 3, 1, positions="last")).bald
    assert kind == "opt" or [shape[1] for shape in widths] == [1, 1]
    everywhere = EnsembleReader(SPEC).measure(model, MeasureRequest(batch, 3, 1)).bald
    lengths = batch.completion_mask.sum(1)
    torch.testing.assert_close(last, everywhere[torch.arange(6), lengths - 1], rtol=1e-4, atol=1e-6)


def test_the_prompt_is_read_once_a_member_and_group(tiny_model: Callable, ragged: Callable) -> None:
    model, batch = tiny_model(), ragged(groups=2, group_size=3)
    tokens = []
    first = anatomy.decoder_layers(model)[0]
    with hooks.hooked(
        first.register_forward_hook, lambda module, arguments, output: tokens.append(arguments[0].shape[:2])
    ):
        EnsembleReader(SPEC).measure(model, MeasureRequest(batch, 3, 1))
        EnsembleReader(TOP).measure(model, MeasureRequest(batch, 3, 1))
    width = int(batch.completion_mask.sum(1).max()) - 1
    member_passes = [torch.Size([4 * 2, 6]), torch.Size([4 * 6, width])]
    assert tokens[:2] == member_passes
    assert tokens[2:4] == [torch.Size([2, 6]), torch.Size([6, width])], "with last_k the lowest layer runs once"


@pytest.mark.parametrize("kind", ["qwen2", "gpt2", "gpt_neox", "mixtral", "gemma2"])
@EVERY
def test_what_all_members_share_runs_for_one_of_them(
    kind: str, spec: EnsembleSpec, tiny_model: Callable, ragged: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The attention of the first layer that members differ in: its input is the same, masks come after it."""
    model, batch = tiny_model(kind), ragged()
    layer = anatomy.decoder_layers(model)[hooks.first_layer(3, spec)]
    inside = next(module for module in anatomy.residual_blocks(layer)[0].modules() if not list(module.children()))
    rows = []
    with hooks.hooked(inside.register_forward_hook, lambda module, arguments, output: rows.append(len(output))):
        found = EnsembleReader(spec).measure(model, MeasureRequest(batch, 3, 1, measures=ALL))
    assert rows == [2, 6], "two prompts and six completions, not those of four members"
    monkeypatch.setattr(reading.Reading, "shared_attention", lambda self, count: None)
    assert_same(found, EnsembleReader(spec).measure(model, MeasureRequest(batch, 3, 1, measures=ALL)))


def test_last_n_is_all_positions_cut(tiny_model: Callable, ragged: Callable) -> None:
    model, batch = tiny_model(), ragged()
    whole = EnsembleReader(SPEC).measure(model, MeasureRequest(batch, 3, 1)).bald
    cut = EnsembleReader(SPEC).measure(model, MeasureRequest(batch, 3, 1, last_n=2)).bald
    lengths = batch.completion_mask.sum(1, keepdim=True)
    kept = batch.completion_mask & (torch.arange(5) >= lengths - 2)
    torch.testing.assert_close(cut, whole * kept, rtol=1e-5, atol=1e-7)


def test_token_masks_are_applied_where_they_belong(tiny_model: Callable, ragged: Callable) -> None:
    """By hand: prompt positions from the prompt's stream, completion positions from the completion's."""
    model, batch = tiny_model(), ragged()
    found = EnsembleReader(TOKEN).measure(model, MeasureRequest(batch, 3, 1, measures={"member_logps"})).member_logps
    row, member = 4, 2
    prompt, answer = (
        batch.prompt_ids[row][batch.prompt_mask[row]],
        batch.completion_ids[row][batch.completion_mask[row]],
    )
    prompt_key = masks.prompt_keys(batch.prompt_ids[row][None], batch.prompt_mask[row][None])[0]
    key = masks.row_keys(
        *(x[row][None] for x in (batch.prompt_ids, batch.prompt_mask, batch.completion_ids, batch.completion_mask))
    )[0]
    handles = []
    for number, layer in enumerate(anatomy.decoder_layers(model)):
        for site, block in zip(("attention", "mlp", "mlp"), anatomy.residual_blocks(layer), strict=False):
            before = masks.token_mask(TOKEN, 1, member, number, site, prompt_key, len(prompt), 16)
            after = masks.token_mask(TOKEN, 1, member, number, site, key, len(answer) - 1, 16)
            mask = torch.cat([before, after])

            def multiply(module: nn.Module, arguments: object, output: object, mask: Tensor = mask) -> object:
                return (output[0] * mask, *output[1:]) if isinstance(output, tuple) else output * mask

            handles.append(block.register_forward_hook(multiply))
    with torch.no_grad():
        logits = model(input_ids=torch.cat([prompt, answer[:-1]])[None]).logits[0, len(prompt) - 1 :]
    for handle in handles:
        handle.remove()
    expected = torch.log_softmax(logits, -1).gather(-1, answer[:, None]).squeeze(-1)
    torch.testing.assert_close(found[member, row, : len(answer)], expected, rtol=1e-4, atol=1e-5)


def state_of(model: nn.Module) -> list[object]:
    found: list[object] = []
    for module in model.modules():
        found.append(
            (module.training, len(module._forward_hooks), len(module._forward_pre_hooks), "forward" in vars(module))
        )
    return [*found, anatomy.text_config(model)._attn_implementation]


@EVERY
def test_the_model_is_left_as_found_even_by_exceptions(
    spec: EnsembleSpec, tiny_model: Callable, ragged: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = tiny_model("qwen2", hidden_act="silu"), ragged()
    anatomy.decoder_layers(model)[1].train()
    before, ids = state_of(model), torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    EnsembleReader(spec).measure(model, MeasureRequest(batch, 3, 1))
    assert state_of(model) == before
    with hooks.hooked(anatomy.decoder_layers(model)[2].register_forward_hook, _fail), pytest.raises(ZeroDivisionError):
        inside = state_of(model)
        try:
            EnsembleReader(spec).measure(model, MeasureRequest(batch, 3, 1))
        finally:
            assert state_of(model) == inside
    assert state_of(model) == before
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, logits)
    model.eval()


def _fail(*_: object) -> None:
    raise ZeroDivisionError


def test_blocks_do_not_nest(tiny_model: Callable) -> None:
    model = tiny_model()
    before = state_of(model)
    with (
        hooks.ensemble(model, SPEC, 0, range(2)),
        pytest.raises(RuntimeError, match="already open"),
        hooks.ensemble(model, SPEC, 0, range(2)),
    ):
        pass
    assert state_of(model) == before


def test_dropout_of_the_model_itself_stays_off(tiny_model: Callable, ragged: Callable) -> None:
    model, batch = tiny_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5), ragged()
    calm = EnsembleReader(SPEC).measure(model, MeasureRequest(batch, 3, 1)).bald
    model.train()
    assert torch.equal(EnsembleReader(SPEC).measure(model, MeasureRequest(batch, 3, 1)).bald, calm)
    assert model.training
    model.eval()


def test_members_that_drop_nothing_agree(tiny_model: Callable, ragged: Callable) -> None:
    found = EnsembleReader(replace(SPEC, dropout=1e-9)).measure(
        tiny_model(), MeasureRequest(ragged(), 3, 1, measures={"bald", "rmi"})
    )
    assert found.bald.max() < 1e-6 and found.rmi.max() < 1e-6


def test_steps_and_seeds_draw_new_members(tiny_model: Callable, ragged: Callable) -> None:
    model, batch = tiny_model(), ragged()
    one = EnsembleReader(SPEC).measure(model, MeasureRequest(batch, 3, 1)).bald
    assert torch.equal(one, EnsembleReader(SPEC).measure(model, MeasureRequest(batch, 3, 1)).bald)
    assert not torch.allclose(one, EnsembleReader(SPEC).measure(model, MeasureRequest(batch, 3, 2)).bald)
    assert not torch.allclose(
        one, EnsembleReader(replace(SPEC, seed=6)).measure(model, MeasureRequest(batch, 3, 1)).bald
    )


def test_more_members_keep_the_first_ones(tiny_model: Callable, ragged: Callable) -> None:
    model, batch = tiny_model(), ragged()
    request = MeasureRequest(batch, 3, 1, measures={"member_logps"})
    few = EnsembleReader(SPEC).measure(model, request).member_logps
    many = EnsembleReader(replace(SPEC, members=6)).measure(model, request).member_logps
    torch.testing.assert_close(few, many[:4], rtol=1e-5, atol=1e-6)


def test_groups_must_share_their_prompt(tiny_model: Callable, ragged: Callable) -> None:
    with pytest.raises(ValueError, match="share their prompt"):
        EnsembleReader(SPEC).measure(tiny_model(), MeasureRequest(ragged(groups=2, group_size=3), 6, 1))
    with pytest.raises(ValueError, match="whole groups"):
        EnsembleReader(SPEC).measure(tiny_model(), MeasureRequest(ragged(groups=2, group_size=3), 4, 1))


def test_empty_completions_measure_zero(tiny_model: Callable, ragged: Callable) -> None:
    batch = ragged()
    batch.completion_mask[2] = False
    found = EnsembleReader(SPEC).measure(tiny_model(), MeasureRequest(batch, 3, 1)).bald
    assert not found[2].any() and found[1].any()
    assert EnsembleReader(SPEC).measure(tiny_model(), MeasureRequest(batch, 3, 1, positions="last")).bald[2] == 0
    batch.completion_mask[:] = False
    assert not EnsembleReader(SPEC).measure(tiny_model(), MeasureRequest(batch, 3, 1)).bald.any()


@pytest.mark.parametrize("spec", [SPEC, TOP], ids=["full", "top"])
@pytest.mark.parametrize("positions", ["all", "last"])
def test_completions_of_one_token(spec: EnsembleSpec, positions: str, tiny_model: Callable, ragged: Callable) -> None:
    """The prompt's last position predicts all there is: no completion is read."""
    model, batch = tiny_model(), ragged(length=1)
    found = EnsembleReader(spec).measure(
        model, MeasureRequest(batch, 3, 1, positions=positions, measures={"bald", "member_logps"})
    )
    wide = EnsembleReader(spec).measure(
        model, MeasureRequest(padded(batch, 0, 2), 3, 1, positions="last", measures={"bald", "member_logps"})
    )
    torch.testing.assert_close(found.bald.view(-1), wide.bald, rtol=1e-4, atol=1e-6)
    assert found.bald.view(2, 3).std(1).max() < 1e-6, "bald depends on the prompt alone"
    longer = EnsembleReader(spec).measure(model, MeasureRequest(ragged(length=2).rows(slice(0, 6)), 3, 1)).bald[:, 0]
    torch.testing.assert_close(found.bald.view(-1), longer, rtol=1e-4, atol=1e-6)


def test_too_many_top_layers_name_the_setting(tiny_model: Callable, ragged: Callable) -> None:
    with pytest.raises(ConfigError, match=r"disagreement\.last_k is 4, but the model has 3 layers"):
        EnsembleReader(replace(TOP, last_k=4)).measure(tiny_model(), MeasureRequest(ragged(), 3, 1))


def test_peft_wrapped_models_are_measured(tiny_model: Callable, adapted: Callable, ragged: Callable) -> None:
    """With adapters that do something, as the plain model that has them in its weights."""
    wrapped = adapted(tiny_model())
    plain = copy.deepcopy(wrapped).merge_and_unload()
    for spec in (SPEC, TOP):
        found = EnsembleReader(spec).measure(wrapped, MeasureRequest(ragged(), 3, 1)).bald
        torch.testing.assert_close(
            found, EnsembleReader(spec).measure(plain, MeasureRequest(ragged(), 3, 1)).bald, rtol=1e-4, atol=1e-6
        )
        without = EnsembleReader(spec).measure(tiny_model(), MeasureRequest(ragged(), 3, 1)).bald
        assert not torch.allclose(found, without, rtol=1e-2, atol=1e-4)


def test_an_adapter_of_the_lm_head_is_refused(tiny_model: Callable) -> None:
    """Its part of the logits would be missing without a word."""
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(target_modules=["q_proj", "lm_head"], r=2)
    with pytest.raises(ConfigError, match=r"model\.lora\.targets: the LM head"):
        anatomy.output_head(peft.get_peft_model(copy.deepcopy(tiny_model()), settings))


@pytest.mark.parametrize("dropout", [1e-12, 0.999, 1 - 1e-12])
def test_any_dropout_between_0_and_1_gives_finite_measures_in_their_bounds(
    dropout: float, tiny_model: Callable, ragged: Callable
) -> None:
    """Nothing dropped: exactly 0, though a product with masks is made. All but nothing: no NaN, log M at most."""
    batch, spec = ragged(), replace(SPEC, members=2, dropout=dropout)
    found = EnsembleReader(spec).measure(tiny_model(), MeasureRequest(batch, 3, 1, measures=ALL))
    for name in ALL:
        assert bool(found.get(name).isfinite().all()), name
    assert found.bald.max() <= math.log(2) and found.rmi.min() >= 0
    if dropout < 1e-9:
        assert found.bald.max() < 1e-6 and found.rmi.max() < 1e-6


def test_bfloat16_models_keep_float32_statistics(tiny_model: Callable, ragged: Callable) -> None:
    batch = ragged(groups=4, group_size=6)
    exact = EnsembleReader(SPEC).measure(tiny_model(), MeasureRequest(batch, 6, 1)).bald
    rough = EnsembleReader(SPEC).measure(copy.deepcopy(tiny_model()).bfloat16(), MeasureRequest(batch, 6, 1)).bald
    assert rough.dtype == torch.float32
    kept = batch.completion_mask
    assert torch.corrcoef(torch.stack([exact[kept], rough[kept]]))[0, 1] > 0.99
