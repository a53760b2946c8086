"""Guesses of a sequence's next tokens: what followed the last time its end stood somewhere, or what a grammar forces.

Prompt lookup (Saxena 2023; the same as vLLM's ngram method): text repeats itself, most where it quotes its prompt. A
guess is computed beside the token before it and taken only if that token's own draw gives it, so guesses change no
completion; they only save steps. How many are made follows from how many were right and what one costs (`pace`).
"""

from __future__ import annotations

from collections.abc import Sequence

from service.engine.pace import Pace

LENGTHS = (4, 3, 2)
"""Tokens of the end that are looked for, longest first."""
MOST = 12
FADE = 0.95
PRIOR_RIGHT, PRIOR_MADE = 0.5, 1.0
"""Before anything is known, half of the guesses are thought right; after long disuse as well, so that one is tried."""
FORCED = 0.95
"""Trust in tokens that a grammar forces: only another cut of the same text proves them wrong."""


class Drafter:
    """One sequence's text, indexed by its short runs of tokens, and how often its guesses were right."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.following: dict[tuple[int, ...], int] = {}
        self.right = self.made = 0.0

    def read(self, token_ids: Sequence[int]) -> None:
        """Take more tokens of the sequence. Where each short run before them was followed, is remembered."""
        for token_id in token_ids:
            end = len(self.tokens)
            for length in LENGTHS:
                if end >= length:
                    self.following[tuple(self.tokens[end - length : end])] = end
            self.tokens.append(token_id)

    @property
    def acceptance(self) -> float:
        """Probability that a guess is right if those before it were."""
        return (self.right + PRIOR_RIGHT) / (self.made + PRIOR_MADE)

    def guess(self, pace: Pace, num_decoding: int, most: int) -> tuple[int, ...]:
        """Return the guesses worth making, at most so many."""
        start = next((at for n in LENGTHS if (at := self.following.get(tuple(self.tokens[-n:]))) is not None), None)
        if start is None:
            return ()
        count = pace.num_drafts_worth(num_decoding, self.acceptance, min(most, MOST), position=len(self.tokens))
        if count == 0:
            self.fade()
            return ()
        period = len(self.tokens) - start
        return tuple(self.tokens[start + i % period] for i in range(count))  # goes round where it reaches its own end

    def learn(self, num_made: int, num_right: int) -> None:
        """Note how many guesses were right; what follows a wrong one was not tried."""
        self.fade()
        self.right += num_right
        self.made += min(num_made, num_right + 1)

    def fade(self) -> None:
        self.right *= FADE
        self.made *= FADE
