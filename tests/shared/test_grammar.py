"""Grammars: what may come next, when a text is whole, the same after any resume, and a sentence for a wrong one."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from shared.drawing import unpack
from shared.errors import GenerationError
from shared.generate import generate
from shared.grammar import ANY_OBJECT, MOST_KNOWN, Grammar, Vocabulary, check_grammar, json_grammar, regex_grammar
from shared.sampling import SamplingParams
from tests.tiny import tiny_model, tiny_tokenizer

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
END = 0


def grammar_of(source: str) -> Grammar:
    return Grammar(source, tiny_tokenizer(), end_token_ids=(END,))


def allowed(grammar: Grammar) -> NDArray[np.bool_]:
    return unpack(grammar.allowed(), tiny_tokenizer().vocab_size)


def write(source: str, seed: int, *, max_new_tokens: int = 400, temperature: float = 1.0) -> list[int]:
    params = SamplingParams(temperature=temperature, seed=seed)
    prompt = tiny_tokenizer().encode("All:")
    ends, grammar = (END,), grammar_of(source)
    model = tiny_model()
    return list(generate(model, prompt, params, max_new_tokens=max_new_tokens, end_token_ids=ends, grammar=grammar))


@pytest.mark.parametrize("seed", range(5))
def test_an_untrained_model_writes_what_the_schema_says(seed: int) -> None:
    value = json.loads(tiny_tokenizer().decode(write(json_grammar(PERSON), seed)))
    assert set(value) <= {"name", "age", "tags"} and isinstance(value["name"], str)
    assert isinstance(value["age"], int) and 0 <= value["age"] <= 150
    assert set(value.get("tags", [])) <= {"a", "b"}


@pytest.mark.parametrize(
    "pattern", [r"[0-9]{3}-[a-f]{2}", r"(yes|no)", r"a/b\"c[/]d{2}", r"(日本|🙂){1,3}", r"\w{4}\n"]
)
def test_a_regular_expression_matches_the_whole_text(pattern: str) -> None:
    for seed in range(3):
        assert re.fullmatch(pattern, tiny_tokenizer().decode(write(regex_grammar(pattern), seed)))


def test_the_end_may_come_only_where_the_text_is_whole() -> None:
    grammar = grammar_of(regex_grammar("[0-9]+x?"))
    digit, letter = tiny_tokenizer().encode("7"), tiny_tokenizer().encode("x")
    assert not allowed(grammar)[END]
    assert grammar.push(digit[0]) and allowed(grammar)[END]
    assert allowed(grammar)[letter[0]] and not allowed(grammar)[tiny_tokenizer().encode("y")[0]]
    assert not grammar.push(letter[0]), "nothing can follow"


def test_an_end_token_that_the_text_needs_ends_it_where_nothing_else_can_follow() -> None:
    [letter] = tiny_tokenizer().encode("x")
    grammar = Grammar(regex_grammar("7x?xx"), tiny_tokenizer(), end_token_ids=(letter,))
    assert np.flatnonzero(allowed(grammar)).tolist() == tiny_tokenizer().encode("7")
    grammar.push(tiny_tokenizer().encode("7")[0])
    assert np.flatnonzero(allowed(grammar)).tolist() == [letter]


def test_the_state_is_a_function_of_the_tokens() -> None:
    ids = write(json_grammar(PERSON), seed=11)
    masks = []
    grammar = grammar_of(json_grammar(PERSON))
    for token_id in ids:
        masks.append(allowed(grammar))
        assert masks[-1][token_id]
        grammar.push(token_id)
    for cut in range(0, len(ids), 3):
        resumed = grammar_of(json_grammar(PERSON))
        for token_id in ids[:cut]:
            resumed.push(token_id)
        for place in range(cut, len(ids)):
            assert np.array_equal(allowed(resumed), masks[place])
            resumed.push(ids[place])


@pytest.mark.parametrize("source", [json_grammar(PERSON), json_grammar(ANY_OBJECT), regex_grammar("[0-9]{2,30}x?")])
def test_a_matcher_copied_in_mid_completion_allows_what_a_new_one_does(source: str) -> None:
    ids, vocabulary = write(source, seed=3), Vocabulary(tiny_tokenizer())
    first = vocabulary.matcher(source)
    for place, token_id in enumerate(ids):
        copy, new = vocabulary.matcher(source), Vocabulary(tiny_tokenizer()).matcher(source)
        for earlier in ids[:place]:
            assert copy.compute_bitmask() == new.compute_bitmask()
            assert copy.consume_token(earlier) and new.consume_token(earlier)
        assert copy.compute_bitmask() == new.compute_bitmask() == first.compute_bitmask()
        assert first.consume_token(token_id)
    assert (
        vocabulary.matcher(source).compute_bitmask() == Vocabulary(tiny_tokenizer()).matcher(source).compute_bitmask()
    )


def test_a_matcher_that_failed_is_not_copied_and_few_are_kept() -> None:
    vocabulary, source = Vocabulary(tiny_tokenizer()), regex_grammar("[0-9]+")
    assert not vocabulary.matcher(source).consume_token(tiny_tokenizer().encode("x")[0])
    assert not vocabulary.matcher(source).is_error()
    for number in range(MOST_KNOWN + 5):
        vocabulary.matcher(regex_grammar(f"a{{{number}}}b"))
    assert len(vocabulary.known) == MOST_KNOWN and source not in vocabulary.known


def test_what_leaves_no_choice_is_known_in_advance() -> None:
    grammar = grammar_of(regex_grammar("Question: [0-9]"))
    assert tiny_tokenizer().decode(grammar.forced()).startswith("Question")
    for token_id in grammar.forced():
        assert allowed(grammar)[token_id]
        grammar.push(token_id)


def test_blanks_are_bounded() -> None:
    grammar = grammar_of(json_grammar(ANY_OBJECT))
    for text in ("{", "\n", " " * 8, " " * 8):
        for token_id in tiny_tokenizer().encode(text):
            grammar.push(token_id)
    assert not allowed(grammar)[tiny_tokenizer().encode(" ")[0]]


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (lambda: regex_grammar("[0-9"), "unclosed character class"),
        (lambda: regex_grammar("(?=a)b"), "look-around"),
        (lambda: json_grammar({"type": "strng"}), "Invalid type: strng"),
        (lambda: json_grammar({"not": {"type": "string"}}), "Unimplemented keys"),
        (lambda: json_grammar({"$ref": "#/nowhere"}), "does not exist"),
        (lambda: json_grammar({"enum": []}), "cannot be enforced"),
    ],
)
def test_what_cannot_be_enforced_is_refused_by_name(source: Any, sentence: str) -> None:
    with pytest.raises(GenerationError, match=sentence) as caught:
        check_grammar(source(), tiny_tokenizer())
    assert "\n" not in str(caught.value) and "<state>" not in str(caught.value)


def test_good_ones_pass() -> None:
    check_grammar(json_grammar(PERSON), tiny_tokenizer())
    check_grammar(regex_grammar("a+"), tiny_tokenizer())
