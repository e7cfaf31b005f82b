"""Calling reward functions: what they get, what they may return, and errors that name function and row."""

import asyncio
import functools
import itertools
import math
import os
import threading
import time

import numpy as np
import pytest
import torch

from vdr_cli.errors import DataError
from vdr_cli.rewards.base import LoadedReward, TrainerState
from vdr_cli.rewards.calling import compute_rewards
from vdr_cli.samples import Prompt, Undecoded

ROWS = [7, 7, 12, 12]
TEXTS = ["a", "bb", "ccc", "dddd"]
IDS = [[1], [1, 2], [1, 2, 3], [1, 2, 3, 4]]


def prompts():
    return [Prompt(row, f"prompt {row}", [0], {"answer": row * 10, "kind": "x"}) for row in ROWS]


def compute(*functions, timeout=5.0, completions=TEXTS):
    loaded = [LoadedReward(getattr(f, "__name__", "f"), 1.0, f) for f in functions]
    return compute_rewards(loaded, prompts(), completions, IDS, timeout)


def failure(*functions, timeout=5.0):
    with pytest.raises(DataError) as caught:
        compute(*functions, timeout=timeout)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_arguments_are_those_of_trl():
    seen = {}

    def spy(prompts, completions, completion_ids, **columns):
        seen.update(prompts=prompts, completions=completions, completion_ids=completion_ids, columns=columns)
        return [0.0] * 4

    compute(spy)
    assert seen["prompts"] == ["prompt 7", "prompt 7", "prompt 12", "prompt 12"]
    assert seen["completions"] == TEXTS
    assert seen["completion_ids"] == IDS
    assert seen["columns"] == {"answer": [70, 70, 120, 120], "kind": ["x"] * 4}


def test_messages_pass_as_they_are():
    messages = [[{"role": "assistant", "content": text}] for text in TEXTS]
    result = compute(lambda completions, **_: [len(c[0]["content"]) for c in completions], completions=messages)
    assert result.squeeze(1).tolist() == [1, 2, 3, 4]


def test_a_function_gets_only_what_it_takes():
    def narrow(completions, answer):
        return [float(len(c) + a) for c, a in zip(completions, answer, strict=True)]

    assert compute(narrow).squeeze(1).tolist() == [71, 72, 123, 124]


def test_media_are_decoded_for_a_parameter_of_their_name_alone():
    def broken():
        raise ImportError("torchcodec\nis missing")

    cells = {"image": Undecoded(lambda: "a picture"), "audio": Undecoded(broken), "answer": 1}
    given = [Prompt(3, "p", [0], cells)]
    seen = []

    def looks(image, **columns):
        seen.append((image, columns["answer"], "audio" in columns))
        return [1.0]

    def listens(audio, **_):
        return [1.0]

    assert compute_rewards([LoadedReward("looks", 1.0, looks)], given, ["a"], [[1]], 5.0).tolist() == [[1.0]]
    assert seen == [(["a picture"], [1], False)]
    with pytest.raises(
        DataError,
        match="reward listens raised on dataset row 3: RuntimeError: its column audio cannot "
        r"be decoded \(ImportError: torchcodec is missing",
    ):
        compute_rewards([LoadedReward("listens", 1.0, listens)], given, ["a"], [[1]], 5.0)


def test_columns_are_functions_and_none_is_nan():
    def first(completions, **_):
        return [1, None, True, 0.5]

    async def second(completions, **_):
        return (float(len(c)) for c in completions)

    result = compute(first, second)
    assert result.shape == (4, 2)
    assert result.dtype == torch.float32
    expected = torch.tensor([[1, 1], [math.nan, 2], [1, 3], [0.5, 4]])
    assert torch.equal(result.nan_to_num(-9), expected.nan_to_num(-9))


@pytest.mark.parametrize("convert", [np.array, torch.tensor, tuple, lambda values: np.array(values, dtype=np.float16)])
def test_arrays_and_tensors_count_as_lists(convert):
    assert compute(lambda **_: convert([1.0, 0.0, 0.5, -2.0])).squeeze(1).tolist() == [1.0, 0.0, 0.5, -2.0]


def test_async_functions_wait_together():
    waiting = []

    async def for_the_others(completions, **_):
        waiting.append(1)
        while len(waiting) < 3:
            await asyncio.sleep(0.01)
        return [0.0] * 4

    assert compute(for_the_others, for_the_others, for_the_others).shape == (4, 3)


def test_async_objects_and_partials():
    class Judge:
        async def __call__(self, completions, **_):
            return [1.0] * 4

    async def scaled(completions, scale, **_):
        return [scale] * 4

    assert compute(Judge(), functools.partial(scaled, scale=3.0)).tolist() == [[1.0, 3.0]] * 4


def raises_on_row_12(completions, answer, **_):
    return [{70: 1.0}[a] for a in answer]


async def raises_on_row_12_async(completions, answer, **_):
    return [{70: 1.0}[a] for a in answer]


@pytest.mark.parametrize("function", [raises_on_row_12, raises_on_row_12_async])
def test_exception_names_function_row_and_line(function):
    message = failure(function)
    assert message.startswith(
        f"reward {function.__name__} raised on dataset row 12: KeyError: 120 (test_reward_calling.py:"
    )


def test_exception_of_the_batch_alone_names_its_rows():
    def needs_one(completions, **_):
        if len(completions) > 1:
            raise RuntimeError("too many\x1b[2J")
        return [0.0]

    assert failure(needs_one).startswith("reward needs_one raised on dataset rows 7, 12: RuntimeError: too many?[2J (")


def test_system_exit_is_an_error_too():
    def leaves(**_):
        raise SystemExit(0)

    assert "reward leaves raised on dataset row" in failure(leaves)


def leaves_on_row_12(answer, **_):
    return [os._exit(0) if a == 120 else 1.0 for a in answer]


async def leaves_on_row_12_async(answer, **_):
    return leaves_on_row_12(answer)


@pytest.mark.parametrize("function", [leaves_on_row_12, leaves_on_row_12_async])
def test_os_exit_is_an_error_too(function):
    message = failure(function)
    assert message.startswith(
        f"reward {function.__name__} raised on dataset row 12: SystemExit: os._exit(0) (test_reward_calling.py:"
    )


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_os_exit_on_a_thread_of_the_function_never_ends_the_run():
    def starts(completions, **_):
        thread = threading.Thread(target=lambda: os._exit(0))
        thread.start()
        thread.join()
        return [1.0] * len(completions)

    assert compute(starts).unique().tolist() == [1.0]


def test_a_process_that_a_function_forks_ends_as_it_likes():
    def forks(completions, **_):
        child = os.fork() or os._exit(7)
        return [float(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))] * len(completions)

    assert compute(forks).unique().tolist() == [7.0]


def test_wrong_length():
    message = failure(lambda completions, **_: [1.0])
    assert "returned 1 rewards for 4 completions of dataset rows 7, 12; it must return one per completion" in message


@pytest.mark.parametrize(
    "value", [math.nan, np.float32("nan"), math.inf, -math.inf, 1e39, 10**400, 1j, "1.0", [1.0], "\x1b[31m"]
)
def test_what_is_no_number_names_the_row(value):
    message = failure(lambda **_: [1.0, 1.0, value, 1.0])
    assert "for a completion of dataset row 12" in message
    assert "\x1b" not in message


@pytest.mark.parametrize(
    "value", [None, 1.0, "1111", {0: 1, 1: 1, 2: 1, 3: 1}, {1.0}, np.float64(2), torch.tensor(1.0)]
)
def test_no_list_at_all(value):
    assert f"returned {value!r} on dataset rows 7, 12, not a list of 4 numbers" in failure(lambda **_: value)


def test_answers_of_every_kind():
    async def later(completions, **_):
        return [float(len(text)) for text in completions]

    def around(**arguments):  # inspect does not see that it is async
        return later(**arguments)

    needs_grad = torch.tensor([1.0, 2.0, 3.0, 4.0], requires_grad=True)
    columns = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    for given in (needs_grad, columns, (n for n in range(1, 5)), np.array([1, 2, 3, 4], dtype=object)):
        assert compute(lambda given=given, **_: given).squeeze(1).tolist() == [1, 2, 3, 4]
    assert compute(around).squeeze(1).tolist() == [1, 2, 3, 4]
    assert compute(lambda **_: [True, np.bool_(False), 0, None]).squeeze(1).tolist()[:3] == [1, 0, 0]


def test_generators_that_fail_or_never_end():
    def fails(completions, answer, **_):
        yield from (1.0 / (value - 120) for value in answer)

    assert failure(fails).startswith("reward fails raised on dataset row 12: ZeroDivisionError")
    assert "returned more than 4 rewards for 4 completions" in failure(lambda **_: itertools.count())


def test_trainer_state_as_in_trl():
    def curriculum(completions, trainer_state, **_):
        return [trainer_state.global_step / trainer_state.max_steps] * len(completions)

    loaded = [LoadedReward("curriculum", 1.0, curriculum)]
    assert loaded[0].required_columns() == []
    result = compute_rewards(loaded, prompts(), TEXTS, IDS, 5.0, TrainerState(3, 12))
    assert result.squeeze(1).tolist() == [0.25] * 4
    assert failure(curriculum).startswith("reward curriculum raised on dataset row 7: ZeroDivisionError")


def test_arguments_of_trl_in_every_place():
    """TRL passes trainer_state, log_extra and log_metric to all; a function that loops over its columns works too."""

    def required(completions, log_extra, log_metric, **_):
        log_extra("length", [len(text) for text in completions])
        log_metric("mean", 1.0)
        return [1.0] * len(completions)

    def looked_up(completions, **kwargs):
        kwargs["log_metric"]("at", kwargs["trainer_state"].global_step)
        return [kwargs.get("trainer_state").global_step for _ in completions]

    class Judge:
        def __call__(self, completions, **kwargs):
            return [kwargs["trainer_state"].global_step] * len(completions)

    def plain(completions, **columns):
        return [float(all(len(values) == len(completions) for values in columns.values()))] * len(completions)

    for function, wanted in (
        (required, 1),
        (looked_up, 3),
        (Judge(), 3),
        (functools.partial(looked_up), 3),
        (plain, 1),
    ):
        loaded = [LoadedReward("f", 1.0, function)]
        assert loaded[0].required_columns() == []
        result = compute_rewards(loaded, prompts(), TEXTS, IDS, 5.0, TrainerState(3, 12))
        assert result.squeeze(1).tolist() == [wanted] * 4


def test_a_function_may_change_what_it_gets():
    """Completions of a group come from one row, and each has its own copy of it, as in TRL; so has every later step."""
    row = Prompt(3, [{"role": "user", "content": "q"}], [0], {"tests": [1, 2], "info": {"kind": "x"}})
    texts = [[{"role": "assistant", "content": "a"}] for _ in range(2)]

    def changes(prompts, completions, tests, info, **_):
        for prompt, completion, about in zip(prompts, completions, info, strict=True):
            prompt.extend(completion)
            completion[0]["content"] = about.pop("kind")
        return [each.pop() + len(prompt) for each, prompt in zip(tests, prompts, strict=True)]

    for _ in range(2):
        found = compute_rewards([LoadedReward("changes", 1.0, changes)], [row, row], texts, [[1], [1]], 5.0)
        assert found.squeeze(1).tolist() == [4.0, 4.0]
    assert row.columns == {"tests": [1, 2], "info": {"kind": "x"}} and len(row.value) == 1
    assert texts[0][0]["content"] == "a"


def test_hanging_function_is_named():
    returned = []

    def hangs(completions, **_):
        time.sleep(30)
        returned.append(1)

    assert "reward hangs had not returned after 0.2 s on dataset rows 7, 12" in failure(hangs, timeout=0.2)
    assert not returned


def test_hanging_async_function_is_named():
    async def quick(completions, **_):
        return [0.0] * 4

    async def waits(completions, **_):
        await asyncio.sleep(30)

    async def blocks(completions, **_):
        time.sleep(30)

    assert "reward waits had not returned after 0.2 s" in failure(quick, waits, timeout=0.2)
    assert "reward blocks had not returned after 0.2 s" in failure(quick, blocks, timeout=0.2)


def test_timeout_error_of_the_function_itself_is_not_ours():
    async def own(completions, **_):
        raise TimeoutError("judge unreachable")

    assert "reward own raised on dataset row 7: TimeoutError: judge unreachable" in failure(own)


def test_async_functions_share_one_loop_between_calls():
    loops = []

    async def remember(completions, **_):
        loops.append(asyncio.get_running_loop())
        return [0.0] * 4

    compute(remember, remember)
    compute(remember)
    assert len(set(loops)) == 1
    assert not loops[0].is_closed()


def test_no_functions_and_no_completions():
    assert compute_rewards([], prompts(), TEXTS, IDS, 1.0).shape == (4, 0)
    empty = compute_rewards([LoadedReward("f", 1.0, lambda **_: [])], [], [], [], 1.0)
    assert empty.shape == (0, 1)
