"""Log-probabilities of a prompt's own tokens: small arrays, however large the vocabulary, and a compact text."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class PromptScores:
    """Of T prompt tokens, each given those before it: its log-probability, and the K likeliest in its place.

    The first token of a prompt follows nothing and has no score, so T is one less than the prompt is long.
    """

    logprobs_T: NDArray[np.float32]
    top_ids_TK: NDArray[np.uint32]
    top_logprobs_TK: NDArray[np.float32]

    @classmethod
    def join(cls, parts: Sequence[PromptScores], num_top: int) -> PromptScores:
        """Put the scores of a prompt's pieces, in order, behind one another."""
        parts = (empty(num_top), *parts)
        return cls(
            np.concatenate([part.logprobs_T for part in parts]),
            np.concatenate([part.top_ids_TK for part in parts]),
            np.concatenate([part.top_logprobs_TK for part in parts]),
        )

    def to_text(self) -> str:
        """K, then all numbers in base64, little-endian and exact: 6 characters a token and 11 for each alternative."""
        arrays = (self.logprobs_T, self.top_ids_TK, self.top_logprobs_TK)
        raw = b"".join(array.astype(array.dtype.newbyteorder("<")).tobytes() for array in arrays)
        return f"{self.top_ids_TK.shape[1]}:{base64.b64encode(raw).decode('ascii')}"

    @classmethod
    def from_text(cls, text: str) -> PromptScores:
        """Read what `to_text` wrote."""
        num_top, _, numbers = text.partition(":")
        raw, count = base64.b64decode(numbers), int(num_top)
        length = len(raw) // (4 + 8 * count)
        logprobs, ids, top = np.split(np.frombuffer(raw, dtype="<u4"), (length, length * (1 + count)))
        shape = (length, count)
        return cls(logprobs.view("<f4"), ids.reshape(shape), top.view("<f4").reshape(shape))

    def entries(self, prompt_ids: Sequence[int]) -> list[dict[str, Any]]:
        """Describe each token of the prompt as drawn ones are described; the first has the log-probability None."""
        assert len(prompt_ids) == len(self.logprobs_T) + 1, (len(prompt_ids), len(self.logprobs_T))
        tops = [
            [list(pair) for pair in zip(ids, logprobs, strict=True)]
            for ids, logprobs in zip(self.top_ids_TK.tolist(), self.top_logprobs_TK.tolist(), strict=True)
        ]
        return [
            {"token_id": token_id, "logprob": logprob, "top": top}
            for token_id, logprob, top in zip(prompt_ids, [None, *self.logprobs_T.tolist()], [[], *tops], strict=True)
        ]


def empty(num_top: int) -> PromptScores:
    """Return the scores of a prompt of one token."""
    no_floats = np.zeros((0, num_top), dtype=np.float32)
    return PromptScores(np.zeros(0, dtype=np.float32), np.zeros((0, num_top), dtype=np.uint32), no_floats)
