"""Conversations as text: the Jinja templates that Hugging Face models carry, rendered in a sandbox."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from datetime import datetime
from typing import Any

from shared.errors import GenerationError

DEFAULT_CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML, exactly as SmolLM2-135M-Instruct carries it (Apache-2.0), its system prompt included."""


@functools.lru_cache(maxsize=32)
def compile_chat_template(template: str) -> Callable[..., str]:
    """Return a function of `messages`, `add_generation_prompt` and the special tokens' names.

    The environment is the one transformers renders in, so the text is the same to the byte. The sandbox keeps a
    template that came with a download from touching anything but its arguments.

    Raises:
        GenerationError: the template is no Jinja, or, when called, refuses the messages.
    """
    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    try:
        compiled = environment.from_string(template)
    except TemplateError as error:
        raise GenerationError(f"the model's chat template is broken ({error}); send a plain prompt instead") from error

    def render(**arguments: Any) -> str:
        try:
            return compiled.render(**arguments)
        except (TemplateError, TypeError) as error:
            raise GenerationError(f"the model's chat template refuses the messages: {error}") from error

    return render
