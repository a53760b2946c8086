"""Token by token to text, never cutting a character in two.

A byte-level BPE token is a run of bytes, so the exact decoder is an incremental UTF-8 decoder: it holds back at most
the first three bytes of a character and replaces what is no UTF-8 by U+FFFD as soon as that is certain. The pieces
joined equal the tokenizer's own decoding of all ids, and feeding the same ids again rebuilds the same state.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence, Set


class StreamDecoder:
    """Text of one completion as it grows."""

    def __init__(self, bytes_of_tokens: Sequence[bytes], skipped_ids: Set[int]) -> None:
        self.bytes_of_tokens = bytes_of_tokens
        self.skipped_ids = skipped_ids
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Take one more token; return the text that is now certain, often that of the token, "" in mid-character."""
        if token_id in self.skipped_ids or token_id >= len(self.bytes_of_tokens):
            return ""
        return self.decoder.decode(self.bytes_of_tokens[token_id])

    def flush(self) -> str:
        """End the completion: a character left unfinished becomes U+FFFD."""
        return self.decoder.decode(b"", final=True)


def byte_alphabet() -> dict[str, int]:
    """Return GPT-2's table of printable characters that stand for the 256 bytes.

    Radford et al. 2019: printable Latin-1 stands for itself, the rest for the characters from U+0100 on.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


BYTE_ALPHABET = byte_alphabet()


def token_to_bytes(token: str) -> bytes:
    """Return the bytes of a vocabulary entry; one outside the byte alphabet (an added token) is plain text."""
    try:
        return bytes(BYTE_ALPHABET[character] for character in token)
    except KeyError:
        return token.encode("utf-8")
