import unicodedata

from hypothesis import given, settings
from hypothesis import strategies as st

from vdr_cli.system.text import did_you_mean, first_line, nearest, reason, shortened, shown_value, storable, visible


@settings(deadline=None)
@given(st.text(alphabet=st.characters(codec=None)))
def test_nothing_that_a_terminal_obeys_is_left(text: str) -> None:
    shown = visible(text)
    assert not any(unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") for char in shown)
    assert not any(
        unicodedata.bidirectional(char) in ("LRO", "RLO", "LRE", "RLE", "PDF", "LRI", "RLI", "FSI", "PDI")
        for char in shown
    )
    shown.encode()


def test_ordinary_text_is_kept() -> None:
    text = "3 + 4 = 7 — αβγ 日本語 עברית 👩‍👩‍👧"
    assert visible(text) == text


def test_stand_ins() -> None:
    assert visible("\x1b[31m\x00\n") == "␛[31m␀␊"
    assert visible("a\tb\n\r", multiline=True) == "a\tb\n␍"
    assert visible("\x9b31m\u202eabc") == "<9B>31m<U+202E>abc"


def test_shortened_counts_the_mark() -> None:
    assert shortened("abcdef", 4) == "abc…"
    assert shortened("abcd", 4) == "abcd"


def test_storable_is_valid_utf8_and_keeps_the_rest() -> None:
    assert storable("a\ud83d\x00b") == "a\ufffd\x00b"
    assert storable("\x1b\u202e") == "\x1b\u202e"


def test_a_value_and_an_exception_fit_on_a_line() -> None:
    assert shown_value(["a", None]) == "['a', None]"
    assert shown_value("x" * 58) == repr("x" * 58)
    assert shown_value("x" * 59) == "'" + "x" * 56 + "..."
    assert shown_value([1] * 30, 24) == "[1, 1, 1, 1, 1, 1, 1,..."
    assert reason(ValueError(" no\n  such\tthing ")) == "no such thing"
    assert reason(ValueError()) == "ValueError"
    assert reason(ValueError("x" * 201)) == "x" * 197 + "..."


def test_the_first_line_of_an_exception() -> None:
    assert first_line(ValueError("\nno room\nsee the manual")) == "no room"
    assert first_line(TimeoutError()) == "TimeoutError"


def test_the_nearest_name() -> None:
    assert nearest("startr", ("routes", "starter")) == "starter"
    assert nearest("starter-x", ("starter",), cutoff=0.9) is None
    assert did_you_mean("gms8k", ("gsm8k", "tldr"), "there are two") == "did you mean gsm8k?"
    assert did_you_mean("zzz", ("gsm8k", "tldr"), "there are two") == "there are two"
