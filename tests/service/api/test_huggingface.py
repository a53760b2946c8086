"""`huggingface_hub.InferenceClient`, unmodified: text generation in TGI's shapes, and chat."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import GenerationError, IncompleteGenerationError, OverloadedError, ValidationError

from service.queue.job import Finish
from shared.tokenizer import Tokenizer
from tests.service.api.stack import Api, ScriptedWorker, client_of, make_settings, running_api, wait_until

PROMPT = "First Citizen:"
QUESTION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who speaks?"}]


@pytest.fixture
def hub(api: Api, worker: ScriptedWorker) -> Iterator[InferenceClient]:
    with InferenceClient(api.url, timeout=60) as client:
        yield client


@pytest.fixture
def whole(whole_api: Api) -> Iterator[InferenceClient]:
    """Real weights behind it."""
    with InferenceClient(whole_api.url, timeout=60) as client:
        yield client


@pytest.fixture
def expected(client: httpx2.Client) -> str:
    answer = client.post("/generate", json={"prompt": PROMPT, "max_new_tokens": 12})
    return str(answer.json()["text"])


def test_text_generation(hub: Any, worker: ScriptedWorker, expected: str) -> None:
    assert hub.text_generation(PROMPT, max_new_tokens=12) == expected
    sampling = worker.taken[-1].request.sampling
    assert sampling["temperature"] == 0, "greedy unless something says otherwise"
    assert hub.text_generation(PROMPT, max_new_tokens=12, return_full_text=True) == PROMPT + expected
    hub.text_generation(PROMPT, max_new_tokens=2, do_sample=True, seed=7, repetition_penalty=1.2)
    sampling = worker.taken[-1].request.sampling
    assert (sampling["temperature"], sampling["seed"], sampling["repetition_penalty"]) == (1.0, 7, 1.2)
    hub.text_generation(PROMPT, max_new_tokens=2, top_p=0.9, top_k=4, temperature=0.5, stop=["x"])
    request = worker.taken[-1].request
    assert (request.sampling["top_p"], request.sampling["top_k"], request.sampling["temperature"]) == (0.9, 4, 0.5)
    assert request.stop == ("x",)


def test_details(hub: Any, expected: str) -> None:
    answer = hub.text_generation(PROMPT, max_new_tokens=12, details=True, seed=5, top_n_tokens=2)
    assert answer.generated_text == expected
    details = answer.details
    assert details is not None and (details.finish_reason, details.generated_tokens, details.seed) == ("length", 12, 5)
    assert "".join(token.text for token in details.tokens) == expected
    assert {token.logprob for token in details.tokens} == {-1.0} and not any(t.special for t in details.tokens)
    assert details.top_tokens is not None and {len(tokens) for tokens in details.top_tokens} == {2}


@pytest.mark.parametrize("num_tokens", [1, 5, 12, 30])
def test_streams(hub: Any, client: httpx2.Client, num_tokens: int) -> None:
    body = {"prompt": PROMPT, "max_new_tokens": num_tokens}
    expected = client.post("/generate", json=body).json()["text"]
    assert "".join(hub.text_generation(PROMPT, max_new_tokens=num_tokens, stream=True)) == expected
    said = list(hub.text_generation(PROMPT, max_new_tokens=num_tokens, stream=True, details=True, top_n_tokens=1))
    assert len(said) == num_tokens, "one for each token, the end on the last"
    assert "".join(one.token.text for one in said) == expected == said[-1].generated_text
    assert [one.details is None for one in said] == [True] * (num_tokens - 1) + [False]
    assert said[-1].details is not None and said[-1].details.finish_reason == "length"


def test_a_stream_that_ends_early_says_so(hub: Any, worker: ScriptedWorker) -> None:
    worker.finish = Finish(reason="stop")
    said = list(hub.text_generation(PROMPT, stream=True, details=True))
    assert said[-1].token.special and said[-1].token.text == "" and len(said) == 4
    assert said[-1].details is not None and said[-1].details.finish_reason == "eos_token"
    assert said[-1].details.generated_tokens == 3
    worker.finish = Finish(reason="stop", stop_sequence="hear")
    answer = hub.text_generation(PROMPT, details=True)
    assert answer.details is not None and answer.details.finish_reason == "stop_sequence"


def test_a_long_prompt_can_be_cut_in_front(hub: Any, worker: ScriptedWorker, tokenizer: Tokenizer) -> None:
    with pytest.raises(ValidationError, match="tokens"):
        hub.text_generation("hear " * 300)
    hub.text_generation("hear " * 300, truncate=7, max_new_tokens=1)
    assert worker.taken[-1].request.prompt_ids == tuple(tokenizer.encode("hear " * 300)[-7:])


def test_pieces_with_real_weights(whole: Any, whole_api: Api) -> None:
    """Half characters and held-back beginnings of stop sequences: joined, the pieces are the text."""
    with client_of(whole_api) as client:
        for seed in range(12):
            body: dict[str, Any] = {"seed": seed, "temperature": 1.5, "top_p": 1.0, "max_new_tokens": 40}
            body["stop"] = ["e", " the"][: seed % 3]
            text = client.post("/generate", json={"prompt": PROMPT} | body).json()["text"]
            del body["top_p"]
            assert whole.text_generation(PROMPT, **body) == text
            said = list(whole.text_generation(PROMPT, **body, stream=True, details=True))
            assert "".join(one.token.text for one in said) == text == said[-1].generated_text
            answer = whole.text_generation(PROMPT, **body, details=True)
            assert answer.details is not None and "".join(token.text for token in answer.details.tokens) == text


def test_grammars_with_real_weights(whole: Any) -> None:
    grammar: Any = {"type": "regex", "value": "[0-9]{3}"}
    assert whole.text_generation(PROMPT, grammar=grammar, max_new_tokens=20).isdigit()
    schema = {
        "type": "object",
        "properties": {"a": {"enum": [None, 1]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    for kind, value in (("json", schema), ("json_schema", {"name": "n", "schema": schema})):
        text = whole.text_generation(PROMPT, grammar={"type": kind, "value": value}, max_new_tokens=100)
        assert json.loads(text)["a"] in (None, 1)
    answer = whole.chat_completion(
        QUESTION,
        max_tokens=100,
        response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": schema}},
    )
    assert json.loads(answer.choices[0].message.content or "")["a"] in (None, 1)
    with pytest.raises(ValidationError, match="response_format"):
        whole.text_generation(PROMPT, grammar={"type": "regex", "value": "("})


def test_chat(hub: Any, client: httpx2.Client) -> None:
    """It calls the model "dummy" when all it knows is an address."""
    body = {"messages": QUESTION, "max_tokens": 12}
    expected = client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
    answer = hub.chat_completion(QUESTION, max_tokens=12, logprobs=True, top_logprobs=2, stop=["zzz"], seed=1)
    assert answer.choices[0].message.content == expected and answer.usage.completion_tokens == 12
    stream = hub.chat_completion(QUESTION, max_tokens=12, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices) == expected
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 12


@pytest.mark.anyio
async def test_the_asynchronous_client(api: Api, worker: ScriptedWorker, expected: str) -> None:
    async with AsyncInferenceClient(api.url, timeout=60) as hub:
        assert await hub.text_generation(PROMPT, max_new_tokens=12) == expected
        stream = await hub.text_generation(PROMPT, max_new_tokens=12, stream=True)
        assert "".join([piece async for piece in stream]) == expected
        answer = await hub.chat_completion(QUESTION, max_tokens=3)
        assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("parameters", "param"),
    [
        ({"typical_p": 0.5}, "typical_p"),
        ({"best_of": 3}, "best_of"),
        ({"watermark": True}, "watermark"),
        ({"decoder_input_details": True}, "decoder_input_details"),
        ({"adapter_id": "a"}, "adapter_id"),
        ({"temperature": -1}, "parameters.temperature"),
        ({"top_p": 0}, "parameters.top_p"),
        ({"max_new_tokens": 0}, "parameters.max_new_tokens"),
        ({"truncate": 0}, "parameters.truncate"),
        ({"grammar": {"type": "xml", "value": ""}}, "parameters.grammar.type"),
        ({"grammar": {"type": "regex", "value": 5}}, "response_format.regex.pattern"),
        ({"wat": 1}, "parameters.wat"),
    ],
)
def test_what_cannot_be_served_is_refused_clearly(
    client: httpx2.Client, parameters: dict[str, Any], param: str
) -> None:
    for stream in (False, True):
        body = {"inputs": PROMPT, "parameters": parameters, "stream": stream}
        response = client.post("/", json=body)
        assert response.status_code == 422, response.text
        told = response.json()
        assert told["error_type"] == "validation" and told["error"]["param"] == param


def test_errors_become_the_client_s_exceptions(
    redis_url: str, models_dir: Any, runs_dir: Any, worker: ScriptedWorker
) -> None:
    settings = make_settings(redis_url, models_dir, runs_dir, max_queued_jobs=1)
    with running_api(settings) as api, client_of(api) as client, InferenceClient(api.url, timeout=60) as hub:
        with pytest.raises(ValidationError, match="temperature"):
            hub.text_generation(PROMPT, temperature=-1)
        worker.finish = Finish(reason="error", error="The weights hold no numbers.")
        for stream in (False, True):
            with pytest.raises(GenerationError, match="no numbers"):
                "".join(hub.text_generation(PROMPT, stream=stream))
        worker.finish = Finish(reason="deadline")
        for stream in (False, True):
            with pytest.raises(IncompleteGenerationError, match="timeout_s"):
                "".join(hub.text_generation(PROMPT, stream=stream))
        worker.finish = None
        worker.take_no_more()
        in_line: dict[str, Any] = {"json": {"prompt": "a"}, "headers": {"Prefer": "respond-async"}}
        wait_until(lambda: client.post("/generate", **in_line).status_code == 429, "a full queue")
        for stream in (False, True):
            with pytest.raises(OverloadedError, match="full"):
                hub.text_generation(PROMPT, stream=stream)
        worker.takes.set()
        wait_until(lambda: client.post("/generate", **in_line).status_code == 202, "room", 60.0)
        wait_until(lambda: 'queue_queued_jobs{model="tiny"} 0.0' in client.get("/metrics").text, "an empty queue", 60.0)
        assert hub.text_generation(PROMPT, max_new_tokens=1)


def test_a_browser_at_the_root_finds_the_documentation(client: httpx2.Client) -> None:
    response = client.get("/")
    assert response.status_code == 307 and response.headers["location"] == "/docs"
