"""Stop strings, whole characters, end tokens and length: the text shown is a function of the tokens alone."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.engine.stopping import Ended, Released, Stopping, StopStrings
from tests.tiny import tiny_tokenizer

LETTERS = st.text(alphabet="ab\n", max_size=12)
STOPS = st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), min_size=1, max_size=4)


def cut_by_definition(text: str, stop: list[str]) -> tuple[str, str | None]:
    """Look at every prefix of the text: the first one that ends in a stop string decides, the longest such string."""
    for end in range(1, len(text) + 1):
        complete = [string for string in stop if text[:end].endswith(string)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


def may_still_begin(text: str, stop: list[str]) -> int:
    """Length of the longest end of the text that is a beginning of a stop string."""
    return max((n for string in stop for n in range(len(string)) if text.endswith(string[:n])), default=0)


@settings(max_examples=500, deadline=None)
@given(pieces=st.lists(LETTERS, max_size=8), stop=STOPS)
def test_pieces_do_not_matter_and_nothing_is_held_without_need(pieces: list[str], stop: list[str]) -> None:
    strings, shown, seen = StopStrings(stop), "", ""
    for piece in pieces:
        shown += strings.push(piece)
        seen += piece
        expected, found = cut_by_definition(seen, stop)
        assert strings.found == found
        if found is not None:
            assert shown == expected
            return
        assert len(seen) - len(shown) == may_still_begin(seen, stop)
    assert shown + strings.flush() == seen


def run(ids: list[int], **values: object) -> tuple[str, Released, int]:
    """Feed ids until the completion ends; return text, the last step, and how many ids were kept."""
    settings_of_end = {"stop": (), "end_token_ids": (), "max_new_tokens": len(ids), **values}
    stopping = Stopping(tiny_tokenizer().stream_decoder(), **settings_of_end)  # type: ignore[arg-type]
    text, kept = "", 0
    for token_id in ids:
        released = stopping.push(token_id)
        text += released.text
        kept += released.is_kept
        if released.ended is not None:
            return text, released, kept
    return text, released, kept


def test_a_stop_string_across_tokens_is_cut_out_and_named() -> None:
    ids = tiny_tokenizer().encode("Speak, speak. And more of it")
    assert len(ids) > 5
    text, last, kept = run(ids, stop=("never", "k. An"))
    assert text == "Speak, spea"
    assert last.ended == Ended("stop", "k. An")
    assert 0 < kept < len(ids)


def test_of_two_stop_strings_that_end_together_the_longer_one_is_cut() -> None:
    text, last, _ = run(tiny_tokenizer().encode("one two three"), stop=("two", "one two"))
    assert (text, last.ended) == ("", Ended("stop", "one two"))


def test_an_end_token_is_not_kept_and_releases_what_was_held() -> None:
    ids = [*tiny_tokenizer().encode("Speak, sp"), 77, 5]
    text, last, kept = run(ids, stop=("speak",), end_token_ids=(77,))
    assert text == "Speak, sp"
    assert last.ended == Ended("stop", None)
    assert not last.is_kept and kept == len(ids) - 2


def test_the_length_releases_what_was_held() -> None:
    ids = tiny_tokenizer().encode("Speak, sp")
    text, last, kept = run(ids, stop=("speak",))
    assert (text, last.ended, kept) == ("Speak, sp", Ended("length"), len(ids))


def test_a_stop_string_that_ends_with_the_last_token_wins_over_the_length() -> None:
    ids = tiny_tokenizer().encode("Speak, speak")
    text, last, _ = run(ids, stop=("speak",))
    assert (text, last.ended) == ("Speak, ", Ended("stop", "speak"))


@pytest.mark.parametrize("text", ["Größe 日本語 🙂", "👩‍👩‍👧", "naïve"])
def test_characters_of_several_tokens_come_whole(text: str) -> None:
    ids = tiny_tokenizer().encode(text)
    stopping = Stopping(tiny_tokenizer().stream_decoder(), stop=(), end_token_ids=(), max_new_tokens=len(ids))
    pieces = [stopping.push(token_id).text for token_id in ids]
    assert "".join(pieces) == text
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)


def test_half_a_character_at_the_end_becomes_a_replacement_character() -> None:
    ids = tiny_tokenizer().encode("ok Ω")[:-1]
    text, last, _ = run(ids)
    assert text.startswith("ok") and text.endswith("\N{REPLACEMENT CHARACTER}")
    assert last.ended == Ended("length")


def test_no_room_for_a_token_is_an_end_before_the_first() -> None:
    stopping = Stopping(tiny_tokenizer().stream_decoder(), stop=(), end_token_ids=(), max_new_tokens=0)
    assert stopping.start().ended == Ended("length")


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 511), min_size=1, max_size=30), stop=st.lists(st.text(min_size=1, max_size=3)))
def test_any_tokens_give_the_tokenizers_text_up_to_the_stop(ids: list[int], stop: list[str]) -> None:
    text, last, kept = run(ids, stop=tuple(stop))
    whole = tiny_tokenizer().decode(ids[:kept])
    assert whole.startswith(text)
    if last.ended == Ended("length"):
        assert text == whole
