"""/v1 with the unmodified openai package, and its shapes to the letter."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import openai
import pytest

from service.queue import keys
from service.queue.connection import blocking_redis
from service.queue.job import Finish
from shared.tokenizer import Tokenizer
from tests.service.api.events import events_of
from tests.service.api.stack import TEXT, Api, ScriptedWorker, wait_until
from tests.service.api.test_bad_input import assert_error

TEXT_PART = {"type": "text", "text": "All:"}
QUESTION: list[Any] = [{"role": "user", "content": "All:"}]


@pytest.fixture
def sdk(api: Api, worker: ScriptedWorker) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{api.url}/v1", api_key="none", max_retries=0) as sdk:
        yield sdk


@pytest.fixture
def expected(tokenizer: Tokenizer) -> str:
    """The text of the scripted worker's first eight tokens."""
    return tokenizer.decode(tokenizer.encode(TEXT)[:8])


def test_models(sdk: openai.OpenAI) -> None:
    models = {model.id: model for model in sdk.models.list()}
    assert set(models) == {"tiny", "plain"}
    assert models["tiny"].object == "model" and models["tiny"].created > 0 and models["tiny"].owned_by
    assert sdk.models.retrieve("plain").id == "plain"
    with pytest.raises(openai.NotFoundError):
        sdk.models.retrieve("none")


def test_completion(sdk: openai.OpenAI, expected: str, tokenizer: Tokenizer) -> None:
    answer = sdk.completions.create(model="tiny", prompt="All:", max_tokens=8, temperature=0, stop=["zzz"], seed=3)
    assert answer.object == "text_completion" and answer.model == "tiny" and answer.id.startswith("cmpl-")
    assert answer.created > 1_700_000_000
    assert [choice.text for choice in answer.choices] == [expected]
    assert answer.choices[0].finish_reason == "length" and answer.choices[0].index == 0
    assert answer.choices[0].logprobs is None
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(tokenizer.encode("All:")) and answer.usage.completion_tokens == 8
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 8


def test_completion_s_default_length_is_openai_s(sdk: openai.OpenAI) -> None:
    answer = sdk.completions.create(model="tiny", prompt="All:")
    assert answer.usage is not None and answer.usage.completion_tokens == 16


@pytest.mark.parametrize("usage", [True, False])
def test_completion_streamed(sdk: openai.OpenAI, expected: str, usage: bool) -> None:
    options: dict[str, Any] = {"stream_options": {"include_usage": True}} if usage else {}
    chunks = list(sdk.completions.create(model="tiny", prompt="All:", max_tokens=8, stream=True, **options))
    assert len({chunk.id for chunk in chunks}) == 1 and len({chunk.created for chunk in chunks}) == 1
    assert {chunk.object for chunk in chunks} == {"text_completion"}
    told = [chunk for chunk in chunks if chunk.choices]
    assert "".join(chunk.choices[0].text for chunk in told) == expected
    assert [chunk.choices[0].finish_reason for chunk in told][-1] == "length"
    assert all(chunk.choices[0].finish_reason is None for chunk in told[:-1])
    if usage:
        assert chunks[-1].choices == [] and chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == 8
        assert all(chunk.usage is None for chunk in chunks[:-1])
    else:
        assert len(told) == len(chunks)


def test_chat(sdk: openai.OpenAI, worker: ScriptedWorker, expected: str, tokenizer: Tokenizer) -> None:
    messages: list[Any] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello?"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": [{"type": "text", "text": "All"}, {"type": "text", "text": ":"}]},
    ]
    answer = sdk.chat.completions.create(model="tiny", messages=messages, max_tokens=8)
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")
    choice = answer.choices[0]
    assert choice.message.role == "assistant" and choice.message.content == expected
    assert choice.finish_reason == "length"
    plain = [*messages[:3], {"role": "user", "content": "All:"}]
    assert worker.taken[-1].request.prompt_ids == tuple(tokenizer.encode(tokenizer.render_chat(plain)))
    more: list[Any] = [*messages, choice.message, {"role": "user", "content": "And?"}]
    again = sdk.chat.completions.create(model="tiny", messages=more, max_tokens=2)
    assert again.choices[0].message.content, "an answer can be sent back as it came"


def test_chat_streamed(sdk: openai.OpenAI, expected: str) -> None:
    chunks = list(
        sdk.chat.completions.create(
            model="tiny",
            messages=QUESTION,
            max_completion_tokens=8,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[0].choices[0].delta.role == "assistant"
    told = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(choice.delta.content or "" for choice in told) == expected
    assert [choice.finish_reason for choice in told if choice.finish_reason] == ["length"]
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 8


def test_a_finish_by_stop_is_called_stop(sdk: openai.OpenAI, worker: ScriptedWorker) -> None:
    worker.finish = Finish(reason="stop")
    assert sdk.completions.create(model="tiny", prompt="a").choices[0].finish_reason == "stop"
    assert sdk.chat.completions.create(model="tiny", messages=QUESTION).choices[0].finish_reason == "stop"


def test_a_chat_s_default_length_is_moderate(sdk: openai.OpenAI, worker: ScriptedWorker) -> None:
    """The rest of the context, as others default to, would let two chats fill a worker's cache."""
    worker.finish = Finish(reason="stop")
    sdk.chat.completions.create(model="tiny", messages=QUESTION)
    assert worker.taken[-1].request.max_new_tokens <= 512


def test_several_choices(sdk: openai.OpenAI, worker: ScriptedWorker, expected: str) -> None:
    answer = sdk.completions.create(model="tiny", prompt="All:", max_tokens=8, n=3, seed=5)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert [choice.text for choice in answer.choices] == [expected] * 3
    assert len({job.request.sampling["seed"] for job in worker.taken}) == 3, (
        "the same seed thrice gives one text thrice"
    )
    assert answer.usage is not None and answer.usage.completion_tokens == 24
    chunks = list(sdk.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=8, n=2, stream=True))
    for index in range(2):
        text = "".join(c.delta.content or "" for chunk in chunks for c in chunk.choices if c.index == index)
        assert text == expected


@pytest.mark.parametrize("prompt", [["All:", "First Citizen:"], [[20, 21, 22], [23]], [20, 21, 22]])
def test_prompts_as_lists_and_as_token_ids(
    sdk: openai.OpenAI, worker: ScriptedWorker, prompt: Any, expected: str
) -> None:
    answer = sdk.completions.create(model="tiny", prompt=prompt, max_tokens=8)
    assert [choice.text for choice in answer.choices] == [expected] * (1 if isinstance(prompt[0], int) else 2)
    if not isinstance(prompt[0], str):
        asked = prompt if isinstance(prompt[0], list) else [prompt]
        assert sorted(job.request.prompt_ids for job in worker.taken) == sorted(tuple(ids) for ids in asked)


def test_echo(sdk: openai.OpenAI, expected: str) -> None:
    assert (
        sdk.completions.create(model="tiny", prompt="All:", max_tokens=8, echo=True).choices[0].text
        == "All:" + expected
    )
    stream = sdk.completions.create(model="tiny", prompt="All:", max_tokens=8, echo=True, stream=True)
    assert "".join(choice.text for chunk in stream for choice in chunk.choices) == "All:" + expected


def test_completion_logprobs(sdk: openai.OpenAI, expected: str) -> None:
    choice = sdk.completions.create(model="tiny", prompt="All:", max_tokens=8, logprobs=2).choices[0]
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs == [-1.0] * 8
    assert choice.logprobs.tokens is not None and len(choice.logprobs.tokens) == 8
    assert choice.logprobs.top_logprobs is not None and len(choice.logprobs.top_logprobs) == 8
    assert choice.logprobs.text_offset is not None and choice.logprobs.text_offset[0] == 0
    stream = sdk.completions.create(model="tiny", prompt="All:", max_tokens=8, logprobs=2, stream=True)
    tokens = [t for chunk in stream for c in chunk.choices if c.logprobs for t in c.logprobs.tokens or ()]
    assert tokens == choice.logprobs.tokens


def test_chat_logprobs(sdk: openai.OpenAI, expected: str) -> None:
    choice = sdk.chat.completions.create(
        model="tiny", messages=QUESTION, max_tokens=8, logprobs=True, top_logprobs=3
    ).choices[0]
    assert choice.logprobs is not None and choice.logprobs.content is not None
    assert [entry.logprob for entry in choice.logprobs.content] == [-1.0] * 8
    assert all(len(entry.top_logprobs) == 3 for entry in choice.logprobs.content)
    raw = b"".join(bytes(entry.bytes or ()) for entry in choice.logprobs.content)
    assert raw.decode(errors="replace") == expected
    assert sdk.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=2).choices[0].logprobs is None


def test_extensions_of_ours_pass_through_extra_body(sdk: openai.OpenAI, worker: ScriptedWorker) -> None:
    extra = {"top_k": 7, "min_p": 0.2, "repetition_penalty": 1.3, "timeout_s": 20}
    sdk.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=2, extra_body=extra)
    sampling = worker.taken[-1].request.sampling
    assert (sampling["top_k"], sampling["min_p"], sampling["repetition_penalty"]) == (7, 0.2, 1.3)
    assert sampling["temperature"] == 1.0 and sampling["top_p"] == 1.0, "OpenAI's defaults"


def test_harmless_fields_and_nulls_are_taken(client: httpx2.Client) -> None:
    body = {"messages": QUESTION, "max_tokens": 2, "user": "u", "n": 1, "stop": None, "seed": None, "temperature": None}
    body |= {"logprobs": None, "stream_options": None, "response_format": {"type": "text"}, "metadata": {"a": "b"}}
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("path", "change", "param"),
    [
        ("completions", {"suffix": "end"}, "suffix"),
        ("completions", {"best_of": 5}, "best_of"),
        ("chat/completions", {"parallel_tool_calls": 0}, "parallel_tool_calls"),
        ("completions", {"prompt": ""}, "prompt"),
        ("completions", {"prompt": []}, "prompt"),
        ("completions", {"prompt": [[]]}, "prompt"),
        ("completions", {"prompt": [512]}, "prompt"),
        ("completions", {"prompt": [-1]}, "prompt"),
        ("completions", {"prompt": ["a"] * 1_000}, "prompt"),
        ("completions", {"n": 0}, "n"),
        ("completions", {"logit_bias": {"5": None}}, "logit_bias"),
        ("chat/completions", {"messages": [{"role": "user", "content": [TEXT_PART | {"x": 1}]}]}, "messages.0.content"),
        ("completions", {"n": 1_000}, "n"),
        ("completions", {"max_tokens": 0}, "max_tokens"),
        ("completions", {"temprature": 1}, "temprature"),
        ("chat/completions", {"messages": []}, "messages"),
        ("chat/completions", {"messages": "hi"}, "messages"),
        ("chat/completions", {"messages": [{"role": "user"}]}, "messages.0.content"),
        ("chat/completions", {"messages": [{"role": "robot", "content": "a"}]}, "messages.0.role"),
        ("chat/completions", {"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ("chat/completions", {"top_logprobs": 2}, "top_logprobs"),
        ("chat/completions", {"model": "plain"}, "model"),
        ("chat/completions", {"prompt": "a"}, "prompt"),
    ],
    ids=lambda value: json.dumps(value)[:50],
)
def test_what_cannot_be_served_is_refused_clearly(
    client: httpx2.Client, path: str, change: dict[str, Any], param: str
) -> None:
    good = {"prompt": "a"} if path == "completions" else {"messages": QUESTION}
    error = assert_error(client.post(f"/v1/{path}", json=good | {"max_tokens": 2} | change), 422)
    assert error["param"] is not None and error["param"].startswith(param), error


def test_a_model_without_chat_template_says_what_to_use(client: httpx2.Client) -> None:
    body = {"model": "plain", "messages": QUESTION}
    error = assert_error(client.post("/v1/chat/completions", json=body), 422)
    assert "chat template" in error["message"] and "/v1/completions" in error["message"]
    assert client.post("/v1/completions", json={"model": "plain", "prompt": "a"}).status_code == 200


def test_errors_become_the_package_s_exceptions(sdk: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown_model:
        sdk.completions.create(model="gpt-9", prompt="a")
    assert unknown_model.value.code == "model_not_found" and unknown_model.value.param == "model"
    with pytest.raises(openai.UnprocessableEntityError) as invalid:
        sdk.chat.completions.create(model="tiny", messages=QUESTION, temperature=-1)
    assert invalid.value.param == "temperature"
    with pytest.raises(openai.UnprocessableEntityError):
        sdk.completions.create(model="tiny", prompt="a " * 500, stream=True)


@pytest.mark.parametrize("stream", [True, False])
def test_a_failed_job_is_an_exception(sdk: openai.OpenAI, worker: ScriptedWorker, stream: bool) -> None:
    worker.finish = Finish(reason="error", error="The weights hold no numbers; export them again.")
    with pytest.raises(openai.APIError, match="weights hold no numbers"):
        answer: Any = sdk.completions.create(model="tiny", prompt="a", stream=stream)
        list(answer)


@pytest.mark.parametrize("how", ["deadline", "cancelled"])
def test_an_answer_cut_short_is_no_success(
    sdk: openai.OpenAI, client: httpx2.Client, worker: ScriptedWorker, how: str
) -> None:
    """OpenAI knows no such finish; calling it "length" would be a lie."""
    worker.finish = Finish(reason=how)  # type: ignore[arg-type]
    with pytest.raises(openai.APIStatusError) as ended:
        sdk.completions.create(model="tiny", prompt="a")
    assert ended.value.status_code == {"deadline": 408, "cancelled": 409}[how]
    assert ended.value.response.headers["x-should-retry"] == "false"
    with pytest.raises(openai.APIError):
        list(sdk.completions.create(model="tiny", prompt="a", stream=True))


def test_a_stream_that_is_closed_cancels_its_jobs(sdk: openai.OpenAI, worker: ScriptedWorker) -> None:
    worker.ends.clear()
    stream = sdk.chat.completions.create(model="tiny", messages=QUESTION, n=2, stream=True, max_tokens=100)
    next(stream)
    wait_until(lambda: len(worker.taken) == 2, "both jobs")
    stream.close()
    wait_until(lambda: len(worker.dropped) == 2, "both jobs to be dropped", 3.0)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("how", ["cancelled", "lost"])
def test_a_choice_that_fails_ends_the_others(
    api: Api, sdk: openai.OpenAI, client: httpx2.Client, worker: ScriptedWorker, redis_url: str, stream: bool, how: str
) -> None:
    """Their client has its error: what they would say is for nobody."""
    worker.ends.clear()

    def ask() -> None:
        answer: Any = sdk.completions.create(model="tiny", prompt="a", n=3, max_tokens=4, stream=stream)
        list(answer)

    with ThreadPoolExecutor() as threads:
        asking = threads.submit(ask)
        wait_until(lambda: len(worker.taken) == 3, "all choices to run")
        ids = [job.id for job in worker.taken]
        if how == "cancelled":
            client.delete(f"/jobs/{ids[1]}").raise_for_status()
        else:
            api.app.state.api.queue.forget(ids[1])  # so that it is not admitted again
            with blocking_redis(redis_url) as redis:
                redis.delete(keys.JOB + ids[1])
        with pytest.raises(openai.APIError, match="job"):
            asking.result(60)
    assert [client.get(f"/jobs/{id}").json()["status"] for id in (ids[0], ids[2])] == ["cancelled"] * 2


def test_the_stream_ends_with_done_and_is_openai_s_framing(client: httpx2.Client) -> None:
    body = {"prompt": "a", "max_tokens": 3, "stream": True}
    with client.stream("POST", "/v1/completions", json=body) as response:
        events = list(events_of(response))
    assert events[-1].data == "[DONE]"
    assert {event.name for event in events} == {"message"}


@pytest.mark.anyio
async def test_the_asynchronous_client(api: Api, worker: ScriptedWorker, expected: str) -> None:
    async with openai.AsyncOpenAI(base_url=f"{api.url}/v1", api_key="none") as sdk:
        answer = await sdk.completions.create(model="tiny", prompt="All:", max_tokens=8)
        assert answer.choices[0].text == expected
        stream = await sdk.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=8, stream=True)
        assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == expected
