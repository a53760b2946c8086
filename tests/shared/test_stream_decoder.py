"""The pieces of a stream, joined, are the whole; and no byte is held longer than it must be."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.engine.stopping import Stopping
from shared.stream_decoder import BYTE_ALPHABET, token_to_bytes
from shared.tokenizer import Tokenizer
from tests.tiny import TINY, tiny_tokenizer

BYTE_IDS = {tiny_tokenizer().bytes_of_tokens[token_id]: token_id for token_id in range(TINY.vocab_size)}


def stream(tokenizer: Tokenizer, ids: list[int], *, skip: bool = True) -> list[str]:
    decoder = tokenizer.stream_decoder(skip_special_tokens=skip)
    return [*(decoder.push(token_id) for token_id in ids), decoder.flush()]


def ids_of_bytes(data: bytes) -> list[int]:
    return [BYTE_IDS[bytes([byte])] for byte in data]


@given(st.lists(st.integers(0, TINY.vocab_size - 1), max_size=40), st.booleans())
@settings(max_examples=400, deadline=None)
def test_any_ids_stream_to_their_decoding(ids: list[int], skip: bool) -> None:
    tokenizer = tiny_tokenizer()
    assert "".join(stream(tokenizer, ids, skip=skip)) == tokenizer.decode(ids, skip_special_tokens=skip)


@given(st.binary(max_size=40))
@settings(max_examples=400, deadline=None)
def test_any_bytes_stream_to_their_decoding(data: bytes) -> None:
    ids = ids_of_bytes(data)
    joined = "".join(stream(tiny_tokenizer(), ids))
    assert joined == tiny_tokenizer().decode(ids) == data.decode("utf-8", errors="replace")


@given(st.text(st.characters(codec="utf-8"), max_size=20))
@settings(max_examples=200, deadline=None)
def test_whole_characters_come_as_soon_as_they_are_complete(text: str) -> None:
    decoder = tiny_tokenizer().stream_decoder()
    sent = b""
    received = ""
    for token_id in ids_of_bytes(text.encode()):
        sent += tiny_tokenizer().bytes_of_tokens[token_id]
        received += decoder.push(token_id)
        complete = sent.decode("utf-8", errors="ignore")
        assert received == complete
    assert decoder.flush() == ""


def test_a_stray_byte_holds_nothing_back() -> None:
    pieces = stream(tiny_tokenizer(), ids_of_bytes(b"a\xffb\xe6\x97c"))
    assert pieces == ["a", "\ufffd", "b", "", "", "\ufffdc", ""]


def test_an_unfinished_character_comes_at_the_end() -> None:
    assert stream(tiny_tokenizer(), ids_of_bytes("🙂".encode()[:3])) == ["", "", "", "\ufffd"]


def test_special_tokens_between_the_bytes_of_a_character() -> None:
    first, second = ids_of_bytes("é".encode())
    assert stream(tiny_tokenizer(), [first, 2, second]) == ["", "", "é", ""]


def test_ids_beyond_the_vocabulary_are_silent() -> None:
    assert stream(tiny_tokenizer(), [TINY.vocab_size, 10**6]) == ["", "", ""]


def test_a_stream_rebuilt_from_its_ids_goes_on_equally() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer.encode("日本語 👩‍👩‍👧 naïve")
    whole = stream(tokenizer, ids)
    for cut in range(len(ids)):
        rebuilt = tokenizer.stream_decoder()
        for token_id in ids[:cut]:
            rebuilt.push(token_id)
        assert [*(rebuilt.push(token_id) for token_id in ids[cut:]), rebuilt.flush()] == whole[cut:]


def test_the_byte_alphabet_is_complete() -> None:
    assert sorted(BYTE_ALPHABET.values()) == list(range(256))
    assert token_to_bytes("Ġa") == b" a"
    assert token_to_bytes("<|added token|>") == b"<|added token|>"


EMOJI = ("🙂", "👩‍👩‍👧", "🏳️‍🌈", "\U0001f9d1‍🚀")
PIECES = (*EMOJI, "日本語", "é", "ﷺ", "\u200d", "नमस्ते", "a", " ", "\n", "\ufffd", "Ω", "0")


def awkward_ids(draw: random.Random, tokenizer: Tokenizer, byte_ids: list[int]) -> list[int]:
    """Any ids, whole and cut characters, stray bytes, in any order."""
    ids: list[int] = []
    for _ in range(draw.randint(1, 5)):
        kind = draw.randrange(3)
        if kind == 0:
            ids += [draw.randrange(tokenizer.vocab_size) for _ in range(draw.randint(1, 8))]
        elif kind == 1:
            text_ids = tokenizer.encode("".join(draw.choices(PIECES, k=draw.randint(1, 5))))
            start = draw.randint(0, 2)
            ids += text_ids[start : len(text_ids) - draw.randint(0, 2)]
        else:
            ids += [draw.choice(byte_ids) for _ in range(draw.randint(1, 6))]
    return ids


def check_streams(tokenizer: Tokenizer, count: int, seed: int) -> None:
    """The pieces joined are the tokenizer's own decoding, and those of the engine's stop matcher are too."""
    draw = random.Random(seed)
    byte_ids = [token_id for token_id, raw in enumerate(tokenizer.bytes_of_tokens) if len(raw) == 1]
    for _ in range(count):
        ids, skip = awkward_ids(draw, tokenizer, byte_ids), draw.random() < 0.5
        whole = tokenizer.decode(ids, skip_special_tokens=skip)
        assert "".join(stream(tokenizer, ids, skip=skip)) == whole, ids
        stops = ("🙂🙂🙂🙂🙂🙂", "\ufffd\ufffd\ufffd\ufffd\ufffd\ufffd\ufffd\ufffd x", "日本語日本語日本語日本語日本語")
        if skip and ids and not any(string in whole for string in stops):
            stopping = Stopping(tokenizer.stream_decoder(), stop=stops, end_token_ids=(), max_new_tokens=len(ids))
            assert "".join(stopping.push(token_id).text for token_id in ids) == whole, ids


def test_awkward_sequences_stream_to_their_decoding() -> None:
    check_streams(tiny_tokenizer(), 1_000, seed=1)


@pytest.mark.slow
def test_a_hundred_thousand_awkward_sequences_stream_to_their_decoding() -> None:
    check_streams(tiny_tokenizer(), 100_000, seed=2)


@pytest.mark.slow
@pytest.mark.weights
def test_a_hundred_thousand_awkward_sequences_of_smollm2_stream_to_their_decoding(instruct_folder: Path) -> None:
    check_streams(Tokenizer.from_folder(instruct_folder), 100_000, seed=3)


@pytest.mark.weights
def test_smollm2_ids_stream_to_their_decoding(instruct_folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(instruct_folder)
    draw = random.Random(0)
    for _ in range(2_000):
        ids = [draw.randrange(tokenizer.vocab_size) for _ in range(30)]
        assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)
