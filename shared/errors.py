"""What can go wrong for a user, as one tree.

    SmolLMError                 anything a user can cause and mend; carries one sentence: what, the value, what to do
    ├── ConfigError             a recipe, setting or model configuration that cannot be right
    ├── DataError               text that is missing, empty, binary, too short or repeated too often
    ├── TokenizerError          a tokenizer that is missing or does not belong to the model
    ├── WeightsError            a checkpoint, export or download that is missing, corrupt or of another shape
    ├── GenerationError         a prompt or sampling parameter the model cannot serve
    └── StorageError            no space, no permission: the disk refused

Command lines print the sentence and exit with `exit_code`; the service maps each class to one HTTP status.
What only a programmer can cause is an `assert`, never one of these.
"""

from __future__ import annotations


def first_line(error: object) -> str:
    """Cut what somebody else's code says to its first line, at most 200 characters, to stand in a sentence of ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


class SmolLMError(Exception):
    """Base of every error that is the user's to mend."""

    exit_code = 2


class ConfigError(SmolLMError):
    """A recipe, setting or model configuration that cannot be right."""


class DataError(SmolLMError):
    """Text that is missing, empty, binary, too short or repeated too often."""


class TokenizerError(SmolLMError):
    """A tokenizer that is missing or does not belong to the model."""


class WeightsError(SmolLMError):
    """A checkpoint, export or download that is missing, corrupt or of another shape."""


class GenerationError(SmolLMError):
    """A prompt or sampling parameter the model cannot serve."""


class StorageError(SmolLMError):
    """No space, no permission: the disk refused."""
