"""`echo` with `logprobs`: a prompt's own log-probabilities, from HTTP to weights and back, as evaluations ask."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx2
import openai
import pytest
import torch
from torch import Tensor

from shared.catalog import read_model_folder
from shared.checkpoint import load_model
from shared.model import SmolLM2
from tests.service.api.events import read_stream
from tests.service.api.stack import Api, client_of
from tests.service.api.test_bad_input import assert_error
from tests.tiny import TINY, tiny_tokenizer

PROMPT = "First Citizen:\nGrößer 日本 🙂 hear me"
SCORING: dict[str, Any] = {"model": "tiny", "temperature": 0, "logprobs": 1, "echo": True, "seed": 1234}
"""The fields that EleutherAI's lm-evaluation-harness sends beside prompt and max_tokens."""


@pytest.fixture(scope="module")
def client(whole_api: Api) -> Iterator[httpx2.Client]:
    with client_of(whole_api) as client:
        yield client


@pytest.fixture(scope="module")
def model(whole_api: Api) -> SmolLM2:
    folder = read_model_folder(whole_api.settings.models_dir / "tiny")
    return load_model(folder, device=torch.device("cpu"), dtype=torch.float32)


def exact_scores(model: SmolLM2, token_ids: list[int]) -> Tensor:
    with torch.inference_mode():
        return model(torch.tensor([token_ids]))[0].float().log_softmax(-1)  # type: ignore[no-any-return]


def check(logprobs: Any, model: SmolLM2, token_ids: list[int], num_top: int) -> None:
    """Log-probabilities of `token_ids`, prompt and completion, are the model's."""
    exact_TV = exact_scores(model, token_ids)
    exact = [float(exact_TV[place - 1, token_ids[place]]) for place in range(1, len(token_ids))]
    assert logprobs["token_logprobs"] == [None, *(pytest.approx(one, abs=1e-4) for one in exact)]
    assert logprobs["top_logprobs"][0] is None
    for place, (told, top) in enumerate(zip(logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True)):
        if place:
            assert num_top <= len(top) <= num_top + 1 and told in top.values()
            likeliest = exact_TV[place - 1].max() if num_top else exact_TV[place - 1, token_ids[place]]
            assert max(top.values()) == pytest.approx(float(likeliest), abs=1e-4)


def same_logprobs(told: Any, expected: Any) -> None:
    """Equal but for the last bits, which PyTorch's sums in fp32 owe to what is computed beside."""
    assert (told["tokens"], told["text_offset"]) == (expected["tokens"], expected["text_offset"])
    assert told["token_logprobs"] == [one and pytest.approx(one, abs=1e-4) for one in expected["token_logprobs"]]
    for mine, theirs in zip(told["top_logprobs"], expected["top_logprobs"], strict=True):
        assert mine == (theirs and pytest.approx(theirs, abs=1e-4))


def pieces_of(logprobs: Any, text: str) -> list[str]:
    """The text cut at the offsets."""
    offsets = logprobs["text_offset"]
    return [text[start:end] for start, end in zip(offsets, [*offsets[1:], len(text)], strict=True)]


@pytest.mark.parametrize(("num_top", "max_tokens"), [(0, 6), (1, 1), (5, 0), (20, 3)])
def test_prompt_and_completion_are_scored(client: httpx2.Client, model: SmolLM2, num_top: int, max_tokens: int) -> None:
    prompt_ids = tiny_tokenizer().encode(PROMPT)
    plain = client.post("/generate", json={"prompt": PROMPT, "max_new_tokens": max(1, max_tokens), "temperature": 0})
    drawn = plain.json()["token_ids"][:max_tokens]
    body = SCORING | {"prompt": PROMPT, "logprobs": num_top, "max_tokens": max_tokens}
    answer = client.post("/v1/completions", json=body).json()
    [choice] = answer["choices"]
    assert choice["text"] == PROMPT + tiny_tokenizer().decode(drawn)
    assert choice["finish_reason"] == "length" and answer["usage"]["completion_tokens"] == max_tokens
    assert answer["usage"]["prompt_tokens"] == len(prompt_ids)
    check(choice["logprobs"], model, prompt_ids + drawn, num_top)
    pieces = pieces_of(choice["logprobs"], choice["text"])
    assert "".join(pieces) == choice["text"]
    for name, piece in zip(choice["logprobs"]["tokens"], pieces, strict=True):
        assert piece == name or name.startswith("bytes:")
    assert "Größer" in "".join(pieces)


@pytest.mark.parametrize("max_tokens", [0, 1, 8])
def test_the_stream_tells_the_same(client: httpx2.Client, max_tokens: int) -> None:
    body = SCORING | {"prompt": [PROMPT, "All:"], "max_tokens": max_tokens}
    whole = client.post("/v1/completions", json=body).json()["choices"]
    events = read_stream(client, "POST", "/v1/completions", json=body | {"stream": True})
    assert events[-1].data == "[DONE]"
    told = [choice for event in events[:-1] for choice in event.data["choices"]]
    for expected in whole:
        mine = [choice for choice in told if choice["index"] == expected["index"]]
        assert "".join(choice["text"] for choice in mine) == expected["text"]
        assert [choice["finish_reason"] for choice in mine if choice["finish_reason"]] == ["length"]
        parts = [choice["logprobs"] for choice in mine if choice["logprobs"]]
        same_logprobs({name: [one for part in parts for one in part[name]] for name in parts[0]}, expected["logprobs"])


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_prompts_as_token_ids_as_the_harness_sends_them(client: httpx2.Client, model: SmolLM2, max_tokens: int) -> None:
    prompts = [tiny_tokenizer().encode(text) for text in ("All:\nSpeak", "def add(first", "12 + 30 = ")] + [[7], [7, 8]]
    for prompt in (prompts, prompts[0]):
        answer = client.post("/v1/completions", json=SCORING | {"prompt": prompt, "max_tokens": max_tokens}).json()
        asked = prompts if prompt is prompts else [prompts[0]]
        assert [choice["index"] for choice in answer["choices"]] == list(range(len(asked)))
        for choice, prompt_ids in zip(answer["choices"], asked, strict=True):
            scores = choice["logprobs"]["token_logprobs"]
            assert len(scores) == len(prompt_ids) + max_tokens
            exact_TV = exact_scores(model, prompt_ids)
            sum_of_them = sum(float(exact_TV[place - 1, prompt_ids[place]]) for place in range(1, len(prompt_ids)))
            assert sum(scores[1 : len(prompt_ids)]) == pytest.approx(sum_of_them, abs=1e-3)


def test_an_end_token_behind_the_prompt_has_its_entry(client: httpx2.Client) -> None:
    """The harness cuts off the last entry, whatever it is: without one of the end token it would lose a real score."""
    body = SCORING | {"prompt": PROMPT, "max_tokens": 1}
    first = client.post("/v1/completions", json=body).json()["choices"][0]
    first_id = client.post("/generate", json={"prompt": PROMPT, "max_new_tokens": 1, "temperature": 0}).json()
    ending = body | {"stop_token_ids": first_id["token_ids"]}
    ended = client.post("/v1/completions", json=ending).json()["choices"][0]
    assert (ended["text"], ended["finish_reason"]) == (PROMPT, "stop")
    same_logprobs(ended["logprobs"], first["logprobs"])
    events = read_stream(client, "POST", "/v1/completions", json=ending | {"stream": True})
    told = [choice["logprobs"] for event in events[:-1] for choice in event.data["choices"] if choice["logprobs"]]
    scores = [one for logprobs in told for one in logprobs["token_logprobs"]]
    same_logprobs({**first["logprobs"], "token_logprobs": scores}, first["logprobs"])


def test_the_whole_context_may_be_scored_with_nothing_behind_it(client: httpx2.Client, model: SmolLM2) -> None:
    prompt = [number * 5 % 512 for number in range(TINY.max_position_embeddings)]
    [choice] = client.post("/v1/completions", json=SCORING | {"prompt": prompt, "max_tokens": 0}).json()["choices"]
    check(choice["logprobs"], model, prompt, 1)
    error = assert_error(client.post("/v1/completions", json=SCORING | {"prompt": prompt, "max_tokens": 1}), 422)
    assert error["code"] == "prompt_too_long" and "255" in error["message"]
    error = assert_error(client.post("/v1/completions", json=SCORING | {"prompt": [*prompt, 1], "max_tokens": 0}), 422)
    assert error["code"] == "prompt_too_long" and "256" in error["message"]


def test_echo_alone_may_ask_for_nothing_more(client: httpx2.Client) -> None:
    body = {"prompt": PROMPT, "echo": True, "max_tokens": 0}
    [choice] = client.post("/v1/completions", json=body).json()["choices"]
    assert (choice["text"], choice["logprobs"], choice["finish_reason"]) == (PROMPT, None, "length")
    error = assert_error(client.post("/v1/completions", json=body | {"echo": False}), 422)
    assert error["param"] == "max_tokens" and "echo" in error["message"]


def test_the_job_tells_them_too(client: httpx2.Client) -> None:
    response = client.post("/v1/completions", json=SCORING | {"prompt": PROMPT, "max_tokens": 2})
    scores = response.json()["choices"][0]["logprobs"]["token_logprobs"]
    job = client.get(f"/jobs/{response.headers['x-job-id']}").json()
    told = [entry["logprob"] for entry in [*job["prompt_logprobs"], *job["logprobs"]]]
    assert told == scores and [entry["token_id"] for entry in job["prompt_logprobs"]] == tiny_tokenizer().encode(PROMPT)


def test_the_openai_package_reads_it(whole_api: Api) -> None:
    with openai.OpenAI(base_url=f"{whole_api.url}/v1", api_key="none") as sdk:
        options: Any = {"model": "tiny", "prompt": PROMPT, "max_tokens": 0, "echo": True, "logprobs": 2}
        choice = sdk.completions.create(**options).choices[0]
        assert choice.logprobs is not None and choice.logprobs.token_logprobs is not None
        assert choice.text == PROMPT and len(choice.logprobs.token_logprobs) == len(tiny_tokenizer().encode(PROMPT))
        streamed = [chunk.choices[0] for chunk in sdk.completions.create(stream=True, **options) if chunk.choices]
        [told] = [one.logprobs for one in streamed if one.logprobs]
        same_logprobs(told.model_dump(), choice.logprobs.model_dump())
