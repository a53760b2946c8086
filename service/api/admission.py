"""From a checked request to admitted jobs. Everything that can be refused is refused here.

Routes take what these functions return from a dependency, which runs before their response exists: so every 4xx and
503 comes before the first byte of a stream. A route's admitting dependency is its only parameter, because FastAPI
checks other parameters after dependencies ran, and a refusal must not follow an admitted job.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Request

from service.api.body import read_body
from service.api.caller import Caller, CallerDep
from service.api.models import Model
from service.api.response_format import grammar_for
from service.api.schemas import GenerateRequest, Sampling
from service.api.state import ApiState, state_of
from service.api_keys import PRIORITIES
from service.errors import InvalidValue, NotReady
from service.metrics import StopWatch
from service.queue.job import Admission, JobRequest

LONG_TEXT = 20_000
"""Characters from which tokenising would hold up everybody else for more than a few milliseconds."""
SEED_BITS = 53
"""A seed drawn here survives JavaScript, whose numbers are doubles."""


@dataclass(frozen=True, kw_only=True)
class Accepted:
    """A job that was admitted, and what its answer needs."""

    id: str
    admission: Admission
    model: Model
    prompt: str | Sequence[int]
    prompt_ids: Sequence[int]
    caller: Caller
    watch: StopWatch
    num_new_tokens: int
    """At most, as granted."""

    @property
    def outlives_its_client(self) -> bool:
        """An async job runs on. One with an Idempotency-Key waits 15 s for the client that comes back with it."""
        return self.caller.wants_async or self.caller.idempotency_key is not None


async def admit_generate(
    request: Request, caller: CallerDep, body: Annotated[GenerateRequest, Depends(read_body(GenerateRequest))]
) -> tuple[GenerateRequest, Accepted]:
    """Admit what `POST /generate` asks for."""
    state = state_of(request)
    model = await find_model(state, body.model)
    (accepted,) = await admit(
        state,
        caller,
        model,
        [body.prompt],
        body,
        route="/generate",
        num_new_tokens=body.num_new_tokens,
        logprobs=body.logprobs,
    )
    return body, accepted


async def find_model(state: ApiState, name: str | None) -> Model:
    """Return the model a request means, if there is any point in asking: Redis must answer."""
    state.redis.require()
    return await state.models.get(name)


async def admit(
    state: ApiState,
    caller: Caller,
    model: Model,
    prompts: Sequence[str | Sequence[int]],
    asked: Sampling,
    *,
    route: str,
    num_new_tokens: int,
    logprobs: int | None,
    scores_prompt: bool = False,
    num_choices: int = 1,
    prompt_field: str = "prompt",
) -> list[Accepted]:
    """Admit `num_choices` jobs per prompt, or none at all.

    Raises:
        InvalidValue: a prompt is empty or too long, a token id is not the model's, `response_format` cannot be
            enforced, or `timeout_s` is beyond what the service allows.
        QueueFull, NotReady, IdempotencyConflict: as `JobQueue.admit`.
    """
    started = time.perf_counter()
    if asked.timeout_s > state.settings.max_timeout_s:
        raise InvalidValue(
            f"timeout_s is {asked.timeout_s:g}; at most {state.settings.max_timeout_s:g} is allowed.", param="timeout_s"
        )
    best = caller.api_key.max_priority
    if PRIORITIES[asked.priority] < PRIORITIES[best]:
        raise InvalidValue(f"priority is {asked.priority}; this API key may ask for {best} at best.", param="priority")
    check_tokens(model, asked, num_new_tokens)
    grammar = await grammar_for(model, asked.response_format)
    requests: list[JobRequest] = []
    for prompt in prompts:
        prompt_ids = await encode(model, prompt, prompt_field)
        new_tokens, warnings = fit(state, model, len(prompt_ids), num_new_tokens, prompt_field)
        for _ in range(num_choices):
            requests.append(
                describe_job(
                    model,
                    prompt_ids,
                    asked,
                    # Choices must differ: with a given seed each has its own, the first the one given.
                    seed=draw_seed() if asked.seed is None else (asked.seed + len(requests)) % 2**63,
                    num_new_tokens=new_tokens,
                    logprobs=logprobs,
                    scores_prompt=scores_prompt,
                    grammar=grammar,
                    warnings=warnings,
                )
            )
    body = canonical(asked, route)
    admissions: list[Admission] = []
    try:
        for place, job in enumerate(requests):
            key = caller.idempotency_key
            admissions.append(
                await state.queue.admit(
                    job,
                    key=caller.key,
                    entitled_to=caller.api_key,
                    priority=PRIORITIES[asked.priority],
                    timeout_s=asked.timeout_s,
                    idempotency=None if key is None else (f"{key}#{place}", body),
                    cancel_on_disconnect=not caller.wants_async,
                    trace=caller.trace,
                )
            )
    except BaseException:
        for admission in admissions:
            if admission.is_new:
                with contextlib.suppress(NotReady):
                    await state.queue.cancel(admission.id)
        raise
    state.metrics.admission_seconds.observe(time.perf_counter() - started)
    for job in requests:
        state.metrics.count_admission(job, caller.key)
    caller.note_job(admissions[0].id)
    return [
        Accepted(
            id=admission.id,
            admission=admission,
            model=model,
            prompt=prompts[place // num_choices],
            prompt_ids=requests[place].prompt_ids,
            caller=caller,
            watch=StopWatch(started),
            num_new_tokens=requests[place].max_new_tokens,
        )
        for place, admission in enumerate(admissions)
    ]


def check_tokens(model: Model, asked: Sampling, num_new_tokens: int) -> None:
    """Refuse token ids that the model does not have, and a least length above the greatest."""
    vocab_size = model.folder.config.vocab_size
    for field, token_ids in (("logit_bias", asked.logit_bias), ("stop_token_ids", asked.stop_token_ids)):
        highest = max(token_ids, default=0)
        if highest >= vocab_size:
            raise InvalidValue(
                f"{field} names the token id {highest}; {model.name} has {vocab_size:,} ids.", param=field
            )
    if asked.min_tokens > num_new_tokens:
        raise InvalidValue(
            f"min_tokens is {asked.min_tokens:,}; at most {num_new_tokens:,} tokens may be generated.",
            param="min_tokens",
        )


async def encode(model: Model, prompt: str | Sequence[int], field: str) -> list[int]:
    """Return a prompt's token ids, checked."""
    if not isinstance(prompt, str):
        highest = max(prompt)
        if highest >= model.folder.config.vocab_size:
            raise InvalidValue(
                f"The prompt holds the token id {highest}; {model.name} has {model.folder.config.vocab_size:,} ids.",
                param=field,
            )
        return list(prompt)
    if len(prompt) > LONG_TEXT:
        token_ids = await asyncio.to_thread(model.tokenizer.encode, prompt)
    else:
        token_ids = model.tokenizer.encode(prompt)
    if not token_ids:
        raise InvalidValue(f"The prompt holds no character that {model.name} knows; send some text.", param=field)
    return token_ids


def fit(
    state: ApiState, model: Model, num_prompt: int, num_new_tokens: int, prompt_field: str
) -> tuple[int, tuple[str, ...]]:
    """Return how many tokens may be generated behind a prompt, and what the client should know about it."""
    # A job that costs more than the queue ever takes would be told for ever to come back later.
    most = min(model.context_length, state.settings.max_queued_tokens)
    longest = most - min(1, num_new_tokens)
    if num_prompt > longest:
        raise InvalidValue(
            f"The prompt has {num_prompt:,} tokens; {model.name} takes at most {longest:,}: its context is "
            f"{most:,} tokens, prompt and completion together. Send a shorter prompt.",
            param=prompt_field,
            code="prompt_too_long",
        )
    warnings = []
    granted = min(num_new_tokens, most - num_prompt)
    if granted < num_new_tokens:
        warnings.append(
            f"max_new_tokens was lowered from {num_new_tokens:,} to {granted:,}: the context is {most:,} tokens and "
            f"the prompt has {num_prompt:,}."
        )
    trained = model.folder.trained_length
    if trained is not None and num_prompt + granted > trained:
        warnings.append(
            f"Prompt and completion may reach {num_prompt + granted:,} tokens; {model.name} was trained on {trained:,} "
            "at a time and writes worse beyond."
        )
    return granted, tuple(warnings)


def describe_job(
    model: Model,
    prompt_ids: Sequence[int],
    asked: Sampling,
    *,
    seed: int,
    num_new_tokens: int,
    logprobs: int | None,
    scores_prompt: bool,
    grammar: str | None,
    warnings: Sequence[str],
) -> JobRequest:
    sampling = asked.drawn_with(seed)
    parameters: Mapping[str, Any] = {
        "max_new_tokens": num_new_tokens,
        **sampling,
        "stop": asked.stop,
        "ignore_eos": asked.ignore_eos,
        "stop_token_ids": asked.stop_token_ids,
        "logprobs": logprobs,
        "response_format": asked.model_dump(include={"response_format"}, by_alias=True)["response_format"],
        "timeout_s": asked.timeout_s,
        "priority": asked.priority,
    }
    return JobRequest(
        model=model.name,
        prompt_ids=tuple(prompt_ids),
        max_new_tokens=num_new_tokens,
        sampling=sampling,
        stop=tuple(asked.stop),
        logprobs=logprobs,
        options={
            "tokenizer_sha256": model.folder.tokenizer_sha256,
            "parameters": parameters,
            "warnings": list(warnings),
            "ignore_eos": asked.ignore_eos,
            "stop_token_ids": asked.stop_token_ids,
            "grammar": grammar,
            "scores_prompt": scores_prompt,
        },
    )


def canonical(asked: Sampling, route: str) -> str:
    """The body as an Idempotency-Key remembers it: whether the answer is streamed does not make it another."""
    values = asked.model_dump(mode="json", exclude={"stream", "stream_options"})
    return json.dumps([route, values], sort_keys=True)


def draw_seed() -> int:
    return secrets.randbits(SEED_BITS)
