"""`response_format` and the fields beside it, through HTTP, Redis and a real worker: every answer parses."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx2
import openai
import pytest

from shared.tokenizer import Tokenizer
from tests.service.api.stack import Api, client_of
from tests.service.api.test_bad_input import assert_error

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}, "pet": {"const": None}},
    "required": ["name", "age", "pet"],
    "additionalProperties": False,
}
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
QUESTION = [{"role": "user", "content": "Who are you?"}]


@pytest.fixture
def whole(whole_api: Api) -> Any:
    with client_of(whole_api) as client:
        yield client


def ask(client: httpx2.Client, **values: Any) -> dict[str, Any]:
    response = client.post("/generate", json={"prompt": "All:", "max_new_tokens": 200, "temperature": 1.0, **values})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def test_a_schema_is_kept_on_every_route(whole: httpx2.Client, whole_api: Api) -> None:
    answer = ask(whole, response_format=JSON_SCHEMA, seed=3)
    assert answer["finish_reason"] == "stop"
    person = json.loads(answer["text"])
    assert list(person) == ["name", "age", "pet"] and isinstance(person["age"], int)
    assert answer == {**ask(whole, response_format=JSON_SCHEMA, seed=3), **{n: answer[n] for n in ("id", "timings")}}
    assert answer["parameters"]["response_format"]["json_schema"]["schema"] == SCHEMA

    sdk = openai.OpenAI(base_url=f"{whole_api.url}/v1", api_key="none")
    chunks = sdk.chat.completions.create(
        model="tiny", messages=QUESTION, max_tokens=200, response_format=JSON_SCHEMA, seed=4, stream=True
    )  # type: ignore[call-overload]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert list(json.loads(text)) == ["name", "age", "pet"]


def test_a_pattern_and_any_object(whole: httpx2.Client) -> None:
    pattern = r"[A-Z][a-z]{3,8}, [0-9]{1,3}"
    assert re.fullmatch(pattern, ask(whole, response_format={"type": "regex", "pattern": pattern})["text"])
    bias = {"response_format": {"type": "json_object"}, "max_new_tokens": 250}
    answers = [ask(whole, **bias, seed=seed) for seed in range(4)]
    for answer in answers:
        assert answer["text"].lstrip().startswith("{")
        if answer["finish_reason"] == "stop":
            assert isinstance(json.loads(answer["text"]), dict)


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"type": "xml"}, "response_format"),
        ({"type": "json_schema"}, "response_format.json_schema.json_schema"),
        ({"type": "json_schema", "json_schema": {"schema": {"type": "strng"}}}, "response_format.json_schema.schema"),
        ({"type": "json_schema", "json_schema": {"schema": {"not": {}}}}, "response_format.json_schema.schema"),
        ({"type": "json_schema", "json_schema": {"schema": {"enum": []}}}, "response_format.json_schema.schema"),
        ({"type": "regex", "pattern": "[0-9"}, "response_format.pattern"),
        ({"type": "regex", "pattern": "(?=a)b"}, "response_format.pattern"),
        ({"type": "regex", "pattern": ""}, "response_format.regex.pattern"),
        ("json", "response_format"),
    ],
)
def test_what_cannot_be_enforced_is_refused_before_anything_is_queued(
    whole: httpx2.Client, asked: Any, param: str
) -> None:
    for path, body in (("/generate", {"prompt": "a"}), ("/v1/chat/completions", {"messages": QUESTION})):
        error = assert_error(whole.post(path, json={**body, "response_format": asked, "stream": True}), 422)
        assert error["param"] == param, error


def test_bias_ends_and_least_length_reach_the_engine(whole: httpx2.Client, tokenizer: Tokenizer) -> None:
    [comma] = tokenizer.encode(",")
    only_commas: dict[str, Any] = {"logit_bias": {str(comma): 100}, "temperature": 0, "max_new_tokens": 6}
    assert ask(whole, **only_commas)["text"] == "," * 6
    ended = ask(whole, **only_commas, stop_token_ids=[comma])
    assert (ended["text"], ended["finish_reason"]) == ("", "stop")
    later = ask(whole, **only_commas, stop_token_ids=[comma], min_tokens=3)
    assert len(later["token_ids"]) == 3 and comma not in later["token_ids"]
    end = tokenizer.end_of_text_id
    ends: dict[str, Any] = {"logit_bias": {str(end): 100}, "temperature": 0, "max_new_tokens": 4}
    assert ask(whole, **ends)["token_ids"] == []
    assert ask(whole, **ends, ignore_eos=True)["token_ids"] == [end] * 4
    assert len(ask(whole, **ends, min_tokens=2)["token_ids"]) == 2


def test_a_prompt_that_was_computed_before_is_counted(whole: httpx2.Client, tokenizer: Tokenizer) -> None:
    prompt = "Before we proceed any further, hear me speak: 17 sea shells."
    count = len(tokenizer.encode(prompt))
    first, second = (ask(whole, prompt=prompt, seed=seed) for seed in (1, 1))
    assert first["usage"]["cached_tokens"] < second["usage"]["cached_tokens"] == count - 1
    assert first["token_ids"] == second["token_ids"]
    body = {"prompt": prompt + " And", "max_tokens": 3, "n": 3}
    usage = whole.post("/v1/completions", json=body).json()["usage"]
    assert usage["prompt_tokens"] > count and usage["completion_tokens"] == 9
    assert count - 1 <= usage["prompt_tokens_details"]["cached_tokens"] <= usage["prompt_tokens"]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"logit_bias": {"512": 1}}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x.[key]"),
        ({"logit_bias": {"-1": 1}}, "logit_bias.-1.[key]"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1"),
        ({"logit_bias": {"1": True}}, "logit_bias.1"),
        ({"logit_bias": {str(token): 0 for token in range(2_000)}}, "logit_bias"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 5, "max_new_tokens": 4}, "min_tokens"),
        ({"stop_token_ids": [512]}, "stop_token_ids"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids.0"),
        ({"ignore_eos": 1}, "ignore_eos"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_wrong_values_are_named(client: httpx2.Client, change: dict[str, Any], param: str) -> None:
    error = assert_error(client.post("/generate", json={"prompt": "a", **change}), 422)
    assert error["param"] == param, error
