"""Text to token ids and back: the Cosmo2 / SmolLM2 byte-level BPE, its chat template, its hash. Imports no torch.

A tokenizer that does not belong to its model is an error, never replaced by another.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from shared.chat_template import DEFAULT_CHAT_TEMPLATE, compile_chat_template
from shared.config import ModelConfig
from shared.errors import GenerationError, TokenizerError
from shared.files import write_atomically
from shared.stream_decoder import StreamDecoder, token_to_bytes

if TYPE_CHECKING:
    from shared.grammar import Vocabulary

TOKENIZER_NAME = "tokenizer.json"
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
MAX_PADDING_IDS = 128
"""A model may have this many more ids than its tokenizer: embeddings are often rounded up for speed."""


class Tokenizer:
    """Encodes, decodes, streams, renders chats. Safe to share between threads: it holds no state of a request.

    But for `vocabulary.matcher`, which is for one thread: it copies matchers that completions go on using.
    """

    def __init__(self, backend: tokenizers.Tokenizer, settings: Mapping[str, Any]) -> None:
        """Wrap a backend; `settings` is the content of `tokenizer_config.json`."""
        if not isinstance(backend.decoder, decoders.ByteLevel):
            kind = type(backend.decoder).__name__
            raise TokenizerError(f"the tokenizer decodes with {kind}; only byte-level BPE, as SmolLM2's, is supported")
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.settings = dict(settings)
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.special_tokens: dict[str, int] = {
            token.content: token_id
            for token_id, token in sorted(backend.get_added_tokens_decoder().items())
            if token.special
        }
        self.special_ids = frozenset(self.special_tokens.values())
        self.end_of_text_id = self.find_end_of_text()
        self.chat_template: str | None = chat_template_of(settings)

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Read `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja` of a Hugging Face folder.

        Raises:
            TokenizerError: the first is missing, or any of them cannot be read.
        """
        path = folder / TOKENIZER_NAME
        if not path.is_file():
            raise TokenizerError(f"{folder} has no tokenizer.json; copy there the one that the model was trained with")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise TokenizerError(f"{path} is not a tokenizer ({error}); copy it again") from error
        settings: dict[str, Any] = {}
        settings_path, template_path = folder / "tokenizer_config.json", folder / "chat_template.jinja"
        try:
            if settings_path.is_file():
                settings = json.loads(settings_path.read_text(encoding="utf-8"))
            if not isinstance(settings, dict):
                raise TokenizerError(f"{settings_path} holds no JSON object; copy it again")
            if template_path.is_file():
                settings["chat_template"] = template_path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise TokenizerError(f"{settings_path} cannot be read ({error}); copy it again") from error
        return cls(backend, settings)

    @classmethod
    def from_vocabulary(
        cls,
        vocabulary: Mapping[str, int],
        merges: Sequence[tuple[str, str]],
        *,
        special_tokens: Sequence[str],
        plain_added_tokens: Sequence[str] = (),
        settings: Mapping[str, Any],
    ) -> Tokenizer:
        """Build the SmolLM2 kind of tokenizer from ids and merges, as a GGUF file keeps them."""
        backend = tokenizers.Tokenizer(models.BPE(vocab=dict(vocabulary), merges=list(merges), fuse_unk=False))
        dress(backend)
        backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special_tokens])
        backend.add_tokens([AddedToken(text, special=False, normalized=False) for text in plain_added_tokens])
        return cls(backend, settings)

    @classmethod
    def train(cls, texts: Iterable[str], *, vocab_size: int) -> Tokenizer:
        """Learn a byte-level BPE of `vocab_size` ids, fewer where the texts have no more pairs to merge.

        The same texts in the same order give the same tokenizer.

        Raises:
            TokenizerError: `vocab_size` has no room for 256 bytes and the special tokens.
        """
        special_tokens = [END_OF_TEXT, TURN_START, TURN_END]
        smallest = 256 + len(special_tokens)
        if vocab_size < smallest:
            raise TokenizerError(f"vocab_size is {vocab_size}; 256 bytes and the special tokens need {smallest}")
        backend = tokenizers.Tokenizer(models.BPE(fuse_unk=False))
        dress(backend)
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=special_tokens,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        return cls(backend, default_settings(end_token=END_OF_TEXT))

    def find_end_of_text(self) -> int:
        name = END_OF_TEXT if END_OF_TEXT in self.special_tokens else token_text(self.settings.get("eos_token"))
        token_id = self.backend.token_to_id(name) if name else None
        if token_id is None:
            raise TokenizerError(f"the tokenizer has neither {END_OF_TEXT} nor an eos_token; name one in its config")
        return int(token_id)

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`; special tokens written out in it become their ids.

        SmolLM2's own vocabulary lacks six control characters (U+0004, 06, 13, 14, 16, 1D) and planes 4 to 15: they
        vanish, as they do in transformers. A tokenizer trained here knows all 256 bytes and loses nothing.

        Raises:
            GenerationError: it holds a lone surrogate, which no UTF-8 can carry.
        """
        refuse_lone_surrogates(text)
        ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode many texts on all cores."""
        for text in texts:
            refuse_lone_surrogates(text)
        return [encoding.ids for encoding in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of `token_ids`; bytes that are no UTF-8 become U+FFFD."""
        text: str = self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    @functools.cached_property
    def bytes_of_tokens(self) -> list[bytes]:
        """The bytes each id stands for, by id."""
        tokens = (self.backend.id_to_token(token_id) for token_id in range(self.vocab_size))
        return [token_to_bytes(token or "") for token in tokens]

    @functools.cached_property
    def vocabulary(self) -> Vocabulary:
        """What a grammar needs to know of the tokens; takes a quarter of a second the first time."""
        from shared.grammar import Vocabulary

        return Vocabulary(self)

    def stream_decoder(self, *, skip_special_tokens: bool = True) -> StreamDecoder:
        """Return a fresh decoder for one completion."""
        return StreamDecoder(self.bytes_of_tokens, self.special_ids if skip_special_tokens else frozenset())

    @property
    def has_chat_template(self) -> bool:
        return self.chat_template is not None

    def without_chat_template(self) -> Tokenizer:
        """The same ids for a network that was never trained on chats: nobody is to take its answers for turns."""
        settings = {key: value for key, value in self.settings.items() if key != "chat_template"}
        return Tokenizer(self.backend, settings)

    def render_chat(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> str:
        """Write a conversation out as the model was taught to read it.

        Raises:
            GenerationError: the tokenizer has no chat template, or the template refuses the messages.
        """
        if self.chat_template is None:
            raise GenerationError("this model has no chat template; send a plain prompt to /generate instead")
        names = ("bos_token", "eos_token", "unk_token", "pad_token")
        tokens = {name: text for name in names if (text := token_text(self.settings.get(name)))}
        render = compile_chat_template(self.chat_template)
        return render(messages=list(messages), add_generation_prompt=add_generation_prompt, **tokens)

    @functools.cached_property
    def sha256(self) -> str:
        """Hash of all that decides ids as this version of the library writes it, in whatever file they were read."""
        return hashlib.sha256(self.backend.to_str().encode()).hexdigest()

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json` as transformers 4 and 5 read them."""
        write_atomically(folder / TOKENIZER_NAME, self.backend.to_str(pretty=True))
        # transformers 5 rebuilds a "GPT2Tokenizer" without the digit splitting; this class takes the file as it is.
        settings = {**self.settings, "tokenizer_class": "PreTrainedTokenizerFast"}
        settings.setdefault("clean_up_tokenization_spaces", False)
        write_atomically(folder / "tokenizer_config.json", json.dumps(settings, indent=2, ensure_ascii=False) + "\n")

    def check_fits(self, config: ModelConfig) -> None:
        """Refuse a tokenizer that is not this model's.

        Raises:
            TokenizerError: the model has fewer ids, or far more, than the tokenizer.
        """
        if not self.vocab_size <= config.vocab_size <= self.vocab_size + MAX_PADDING_IDS:
            raise TokenizerError(
                f"the tokenizer has {self.vocab_size:,} ids and the model {config.vocab_size:,}: they do not belong "
                "together; put the tokenizer.json that the model was trained with beside its config.json"
            )


def dress(backend: tokenizers.Tokenizer) -> None:
    """Split text as SmolLM2 does: every digit alone, then GPT-2's regular expression on bytes."""
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    backend.decoder = decoders.ByteLevel()


def default_settings(*, end_token: str, start_token: str = END_OF_TEXT) -> dict[str, Any]:
    """Return the `tokenizer_config.json` of a tokenizer made here."""
    return {
        "bos_token": start_token,
        "eos_token": end_token,
        "unk_token": END_OF_TEXT,
        "pad_token": end_token,
        "add_bos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2_048,
        "chat_template": DEFAULT_CHAT_TEMPLATE,
    }


def chat_template_of(settings: Mapping[str, Any]) -> str | None:
    template = settings.get("chat_template")
    if isinstance(template, list):  # several named ones
        named = (entry for entry in template if isinstance(entry, dict))
        template = next((entry.get("template") for entry in named if entry.get("name") == "default"), None)
    return template if isinstance(template, str) else None


def token_text(token: Any) -> str | None:
    """A special token stands in tokenizer_config.json as text, or as an object with its content."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def lone_surrogate_in(text: str) -> str | None:
    """Name half a surrogate pair and its place, if there is one: it is no character, and no UTF-8 can carry it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"the lone surrogate U+{ord(text[error.start]):04X} at character {error.start}"
    return None


def refuse_lone_surrogates(text: str) -> None:
    found = lone_surrogate_in(text)
    if found is not None:
        raise GenerationError(f"the text holds {found}; send valid Unicode")
