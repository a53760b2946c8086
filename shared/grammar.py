"""What a completion may be: a JSON schema or a regular expression, as a mask over the next token.

llguidance (MIT) keeps the parser and computes the mask, in tens of microseconds. Its state is a function of the tokens
in order: a resumed completion pushes what was delivered and stands where it stood. A grammar travels as llguidance's
own JSON text.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from shared.drawing import Bits, including, without
from shared.errors import GenerationError

if TYPE_CHECKING:
    from llguidance import LLMatcher

    from shared.tokenizer import Tokenizer

WHITESPACE = r"( |\n {0,16})?"
"""Between the parts of JSON: nothing, a space, or a line break and its indent. A small model allowed more would
sometimes never stop writing blanks."""
ANY_OBJECT: Mapping[str, Any] = {"type": "object"}
MOST_KNOWN = 32
"""Grammars whose matchers are kept."""


def json_grammar(schema: Mapping[str, Any]) -> str:
    """Return the grammar of the JSON texts that a schema allows; not yet checked."""
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_json_schema(
        json.dumps(schema), overrides={"whitespace_pattern": WHITESPACE, "whitespace_flexible": True, "lenient": False}
    )


def regex_grammar(pattern: str) -> str:
    """Return the grammar of the texts that a regular expression matches as a whole; not yet checked."""
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_regex(pattern)


def check_grammar(source: str, tokenizer: Tokenizer) -> None:
    """Refuse what cannot be enforced.

    Raises:
        GenerationError: what is wrong with it, or which keyword is not known.
    """
    from llguidance import LLMatcher

    is_wrong, messages = LLMatcher.validate_grammar_with_warnings(source, tokenizer.vocabulary.table)
    if is_wrong:
        raise GenerationError(f"it cannot be enforced: {summary(messages[0])}")
    matcher = LLMatcher(tokenizer.vocabulary.table, source, log_level=0)
    if matcher.is_error() or not np.frombuffer(matcher.compute_bitmask(), np.uint8).any():
        raise GenerationError(f"it cannot be enforced: {summary(matcher.get_error()) or 'no text satisfies it'}")


def summary(message: str) -> str:
    """Return an error's own words: the library appends its state to some, and points with several lines to others."""
    lines = [line.strip() for line in message.split("<state>", maxsplit=1)[0].splitlines()]
    return "; ".join(dict.fromkeys(line for line in lines if line.strip("^ ") and not line.startswith("1 |")))[:300]


class Vocabulary:
    """A tokenizer's ids as llguidance knows them, and a matcher of each grammar met lately.

    What a matcher has learnt of its grammar's lexer on the way, its copies know: the first completion by a JSON schema
    waits 85 us for each mask, those after it 21; a copy takes 12 us, a quarter of a new one at most where the first
    completion has come far.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Takes a quarter of a second, once for each tokenizer."""
        from llguidance import LLTokenizer

        text, size = tokenizer.backend.to_str(), tokenizer.vocab_size
        self.table = LLTokenizer(text, n_vocab=size, eos_token=tokenizer.end_of_text_id)
        self.known: OrderedDict[str, LLMatcher] = OrderedDict()
        """The first matcher of each grammar, wherever its completion has come to; the last asked for at the end."""

    def matcher(self, source: str) -> LLMatcher:
        """Return a matcher that stands before the first token; it may have failed at once.

        For one thread: the matcher to be copied may be some completion's, and two threads on one raise.
        """
        from llguidance import LLMatcher, LLParserLimits

        known = self.known.get(source)
        if known is not None and not known.is_error():
            self.known.move_to_end(source)
            copy = known.deep_copy()
            if copy.reset():
                return copy
        matcher = LLMatcher(self.table, source, log_level=0, limits=LLParserLimits(verbose_errors=False))
        self.known[source] = matcher
        self.known.move_to_end(source)
        if len(self.known) > MOST_KNOWN:
            self.known.popitem(last=False)
        return matcher


class Grammar:
    """One completion's place in its grammar. Implements `shared.sampling.Constraint`."""

    def __init__(self, source: str, tokenizer: Tokenizer, *, end_token_ids: Iterable[int]) -> None:
        """Stand before the first token; `end_token_ids` may come wherever the text is complete, and only there.

        Raises:
            GenerationError: the grammar is wrong; `check_grammar` would have said so.
        """
        self.end_of_text_id = tokenizer.end_of_text_id
        self.end_token_ids = [token for token in end_token_ids if token < tokenizer.vocab_size]
        self.matcher = tokenizer.vocabulary.matcher(source)
        self.mask: Bits | None = None
        self.check()

    def allowed(self) -> Bits:
        """Return which ids may come next.

        Raises:
            GenerationError: none may: the tokenizer has no token for what must follow, or the parser hit its limits.
        """
        if self.mask is None:
            mask = np.frombuffer(self.matcher.compute_bitmask(), dtype=np.uint8)
            self.check()
            mask = without(mask, [self.end_of_text_id, *self.end_token_ids])
            if self.matcher.is_accepting() or not mask.any():
                mask = including(mask, self.end_token_ids)  # also where a request's own is all that could follow
            if not mask.any():
                raise GenerationError("the grammar asks for text that the model has no token for")
            self.mask = mask
        return self.mask

    def push(self, token_id: int) -> bool:
        """Take the token drawn; False when nothing can follow it."""
        self.mask = None
        self.matcher.consume_token(token_id)
        self.check()
        return not self.matcher.is_stopped()

    def forced(self) -> Sequence[int]:
        """Return the tokens that will most likely come next because the text leaves no choice."""
        return self.matcher.compute_ff_tokens()

    def check(self) -> None:
        if self.matcher.is_error():
            raise GenerationError(f"the grammar cannot be followed: {summary(self.matcher.get_error())}")
