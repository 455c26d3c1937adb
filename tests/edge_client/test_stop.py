from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from edge_client.stop import StopStrings

LETTERS = st.text("ab.", max_size=4)


@given(pieces=st.lists(LETTERS, max_size=12), stops=st.lists(LETTERS.filter(bool), max_size=3))
def test_streamed_text_ends_where_the_whole_text_would(pieces: list[str], stops: list[str]) -> None:
    whole, stopper, shown = "", StopStrings(stops), ""
    for piece in pieces:
        if stopper.found is None:
            whole += piece
        shown += stopper.push(piece)
        assert whole.startswith(shown)
    shown += stopper.flush()
    cuts = [whole.index(stop) for stop in stops if stop in whole]
    assert (stopper.found is not None) == bool(cuts)
    assert shown == whole[: min(cuts, default=len(whole))]


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    stopper = StopStrings(["\n\nQ:"])
    assert stopper.push("yes.\n") == "yes."
    assert stopper.push("no\n\n") == "\nno"
    assert stopper.push("Q") == ""
    assert stopper.push(": again") == ""
    assert stopper.found == "\n\nQ:"
    assert stopper.push("more") == ""
    assert stopper.flush() == ""


def test_nothing_is_held_without_stop_strings() -> None:
    stopper = StopStrings(["", ""])
    assert stopper.push("text") == "text"
