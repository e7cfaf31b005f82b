from hypothesis import given, settings
from hypothesis import strategies as st

from vdr_cli.scoring.batches import batches, collate
from vdr_cli.scoring.tokens import Item

ITEMS = st.lists(st.tuples(st.integers(1, 4), st.integers(0, 9)), max_size=30)


@settings(deadline=None)
@given(ITEMS, st.integers(1, 60))
def test_every_item_once_whole_groups_within_the_budget(shapes: list[tuple[int, int]], budget: int) -> None:
    items = [Item(at, [prompt] * prompt, [7] * length, False) for at, (prompt, length) in enumerate(shapes)]
    made = list(batches(items, budget))
    assert sorted(item.at for _, batch in made for item in batch) == [item.at for item in items if item.completion_ids]
    for size, batch in made:
        assert len(batch) % size == 0
        for start in range(0, len(batch), size):
            assert len({tuple(item.prompt_ids) for item in batch[start : start + size]}) == 1
        width = max(len(item.prompt_ids) for item in batch) + max(len(item.completion_ids) for item in batch)
        assert len(batch) * width <= budget or len(batch) == size == 1 or len(batch) == size


def test_collate_pads_prompts_left_and_completions_right() -> None:
    c = collate([Item(0, [1, 2], [3], False), Item(1, [4], [5, 6], True)], pad_id=0)
    assert c.prompt_ids.tolist() == [[1, 2], [0, 4]]
    assert c.prompt_mask.tolist() == [[True, True], [False, True]]
    assert c.completion_ids.tolist() == [[3, 0], [5, 6]]
    assert c.completion_mask.tolist() == [[True, False], [True, True]]
    assert c.truncated.tolist() == [False, True]
