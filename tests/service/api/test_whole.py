"""HTTP to weights and back, nothing scripted: stream, blocking answer and the plain generation loop say the same."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from typing import Any

import httpx2
import openai
import pytest
import torch

from shared.catalog import read_model_folder
from shared.checkpoint import load_model
from shared.generate import generate
from shared.model import SmolLM2
from shared.sampling import SamplingParams
from tests.service.api.events import ids_of, read_stream, text_of
from tests.service.api.stack import Api, client_of
from tests.tiny import tiny_tokenizer

PROMPTS = ["First Citizen:", "def add(", "日本語", "Question: 12 + 30 = ?\nAnswer:", "\u0000 and 🙂", "a"]


@pytest.fixture(scope="module")
def client(whole_api: Api) -> Iterator[httpx2.Client]:
    with client_of(whole_api) as client:
        yield client


@pytest.fixture(scope="module")
def model(whole_api: Api) -> Iterator[SmolLM2]:
    """The very weights the worker serves: half precision is not what was written."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny matrices gain nothing from more
    folder = read_model_folder(whole_api.settings.models_dir / "tiny")
    yield load_model(folder, device=torch.device("cpu"), dtype=torch.float32)
    torch.set_num_threads(threads)


def bodies(count: int) -> list[dict[str, Any]]:
    draw = random.Random(5)
    return [
        {
            "prompt": draw.choice(PROMPTS),
            "max_new_tokens": draw.randint(1, 25),
            "temperature": draw.choice([0, 0.7, 1.5]),
            "top_k": draw.choice([0, 5]),
            "top_p": draw.choice([0.5, 0.95, 1]),
            "repetition_penalty": draw.choice([1.0, 1.3]),
            "seed": draw.randrange(2**53),
        }
        for _ in range(count)
    ]


def expected_ids(body: dict[str, Any], model: SmolLM2) -> list[int]:
    names = ("temperature", "top_k", "top_p", "repetition_penalty", "seed")
    params = SamplingParams(**{name: body[name] for name in names})
    prompt_ids = tiny_tokenizer().encode(body["prompt"])
    end = (tiny_tokenizer().end_of_text_id,)
    return list(generate(model, prompt_ids, params, max_new_tokens=body["max_new_tokens"], end_token_ids=end))


def test_stream_and_blocking_answer_are_the_plain_loop_s(client: httpx2.Client, model: SmolLM2) -> None:
    for body in bodies(8):
        answer = client.post("/generate", json=body).json()
        events = read_stream(client, "POST", "/generate", json=body | {"stream": True})
        assert answer["token_ids"] == expected_ids(body, model) == ids_of(events)
        assert answer["text"] == tiny_tokenizer().decode(answer["token_ids"]) == text_of(events)
        assert answer["finish_reason"] == events[-1].data["finish_reason"]
        assert answer["timings"]["prefill_ms"] > 0


def test_an_answer_does_not_depend_on_who_else_asks(whole_api: Api, model: SmolLM2) -> None:
    asked = bodies(12)
    answers: dict[int, list[int]] = {}

    def ask(place: int) -> None:
        with client_of(whole_api) as client:
            answers[place] = client.post("/generate", json=asked[place]).json()["token_ids"]

    threads = [threading.Thread(target=ask, args=(place,)) for place in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answers[place] for place in range(len(asked))] == [expected_ids(body, model) for body in asked]


def test_stop_sequences_are_not_part_of_the_text(client: httpx2.Client) -> None:
    body = bodies(1)[0] | {"max_new_tokens": 40, "temperature": 1.0}
    text = client.post("/generate", json=body).json()["text"]
    stop = text[len(text) // 2 : len(text) // 2 + 2]
    answer = client.post("/generate", json=body | {"stop": [stop]}).json()
    assert answer["text"] == text[: text.index(stop)]
    assert answer["finish_reason"] == "stop" and answer["stop_sequence"] == stop
    events = read_stream(client, "POST", "/generate", json=body | {"stop": stop, "stream": True})
    assert text_of(events) == answer["text"]


def test_logprobs_are_numbers_of_the_tokens_drawn(client: httpx2.Client) -> None:
    answer = client.post(
        "/generate", json={"prompt": "All:", "max_new_tokens": 5, "temperature": 0, "logprobs": 3}
    ).json()
    for token_id, entry in zip(answer["token_ids"], answer["logprobs"], strict=True):
        assert entry["token_id"] == token_id == entry["top"][0]["token_id"], "greedy takes the likeliest"
        assert entry["logprob"] <= 0 and len(entry["top"]) == 3
        assert entry["logprob"] == pytest.approx(entry["top"][0]["logprob"])


def test_the_openai_package_gets_the_same(whole_api: Api, client: httpx2.Client) -> None:
    with openai.OpenAI(base_url=f"{whole_api.url}/v1", api_key="none") as sdk:
        options: Any = {"model": "tiny", "max_tokens": 20, "temperature": 0.9, "top_p": 1.0, "seed": 11}
        text = client.post("/generate", json=options | {"prompt": "All:"}).json()["text"]
        assert sdk.completions.create(prompt="All:", **options).choices[0].text == text
        stream = sdk.completions.create(prompt="All:", stream=True, **options)
        assert "".join(choice.text for chunk in stream for choice in chunk.choices) == text
        messages: Any = [{"role": "user", "content": "All:"}]
        prompt = tiny_tokenizer().render_chat(messages)
        text = client.post("/generate", json=options | {"prompt": prompt}).json()["text"]
        assert sdk.chat.completions.create(messages=messages, **options).choices[0].message.content == text
        chunks = sdk.chat.completions.create(messages=messages, stream=True, **options)
        assert "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices) == text
