"""Stop strings: found wherever tokens fall, and never half shown."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from semipd.serve.stops import StopFinder

letters = st.text("ab", min_size=1, max_size=5)


def slow(text: str, stops: list[str]) -> tuple[str, bool]:
    """Character by character: the first moment at which any stop string has ended."""
    for end in range(1, len(text) + 1):
        hits = [stop for stop in stops if text[:end].endswith(stop)]
        if hits:
            return text[: end - max(map(len, hits))], True
    return text, False


@settings(deadline=None)
@given(st.lists(letters, min_size=1, max_size=3), st.lists(letters, max_size=12))
def test_the_result_does_not_depend_on_the_pieces(stops: list[str], pieces: list[str]) -> None:
    finder = StopFinder(stops)
    shown = ""
    for piece in pieces:
        shown += finder.feed(piece)
        if finder.found:
            break
    shown += finder.flush()
    assert (shown, finder.found) == slow("".join(pieces), stops)


def test_only_what_could_begin_a_stop_string_is_held_back() -> None:
    finder = StopFinder(["</s>", "\n\n"])
    assert finder.feed("a < b") == "a < b"
    assert finder.feed(" <") == " "
    assert finder.feed("/") == ""
    assert finder.feed("b\n") == "</b"
    assert finder.feed("c") == "\nc"
    assert finder.flush() == ""


def test_without_stop_strings_everything_passes() -> None:
    finder = StopFinder(())
    assert finder.feed("abc") == "abc" and finder.flush() == "" and not finder.found
