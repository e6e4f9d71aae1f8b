"""Stop strings, wherever pieces of text begin and end."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama4_quant.runtime.stopping import StopFinder


def _pass(pieces: list[str], *stop: str) -> tuple[list[str], str | None]:
    finder = StopFinder(stop)
    given_out = [finder.push(piece) for piece in pieces]
    return [*given_out, finder.finish()], finder.found


@pytest.mark.parametrize(
    ("pieces", "stop", "expected", "found"),
    [
        (["abc", "def"], (), ["abc", "def", ""], None),
        (["ab", "c##", "#d"], ("###",), ["ab", "c", "", ""], "###"),
        (["ab#", "#c"], ("###",), ["ab", "##c", ""], None),
        (["ab#", "#"], ("###",), ["ab", "", "##"], None),
        (["aab"], ("ab",), ["a", ""], "ab"),
        (["a", "a", "b"], ("aab",), ["", "", "", ""], "aab"),
        (["a", "a", "a", "b"], ("aab",), ["", "", "a", "", ""], "aab"),
        (["x STOP y"], ("STOP", " "), ["x", ""], " "),
        (["xaby"], ("xaby", "ab"), ["x", ""], "ab"),
        (["xab"], ("ab", "xab"), ["", ""], "xab"),
        (["a", "stop", "more"], ("stop",), ["a", "", "", ""], "stop"),
    ],
)
def test_what_is_given_when(pieces: list[str], stop: tuple[str, ...], expected: list[str], found: str | None) -> None:
    assert _pass(pieces, *stop) == (expected, found)


def _reference(text: str, stop: list[str]) -> str:
    """Character by character: the first stop string that is complete ends the text; of several the longest."""
    for end in range(1, len(text) + 1):
        if complete := [s for s in stop if text[:end].endswith(s)]:
            return text[: end - max(map(len, complete))]
    return text


@given(
    pieces=st.lists(st.text("ab", max_size=4), max_size=12),
    stop=st.lists(st.text("ab", min_size=1, max_size=5), max_size=3),
)
def test_pieces_do_not_matter_and_no_more_is_held_than_needed(pieces: list[str], stop: list[str]) -> None:
    finder = StopFinder(stop)
    whole, seen, given_out = _reference("".join(pieces), stop), "", ""
    for piece in pieces:
        seen += piece
        given_out += finder.push(piece)
        assert whole.startswith(given_out)  # nothing has to be taken back
        if finder.found is None:
            held = seen[len(given_out) :]
            assert held == "" or any(s.startswith(held) for s in stop)
    assert given_out + finder.finish() == whole
    assert (finder.found is None) == (whole == "".join(pieces) and not any(s in whole for s in stop))
