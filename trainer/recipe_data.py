"""The token files and the tokenizer a recipe asks for, brought or made where they are missing."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

from shared.pretrained import bring
from shared.tokenizer import Tokenizer
from trainer.config import DataSection, Directories
from trainer.corpus.hub import HubText
from trainer.prepare import PreparedData, load_prepared, prepare

logger = logging.getLogger("trainer")

PUBLIC_TOKENIZER = "smollm2-135m-instruct"


def prepare_data(data: DataSection, directories: Directories) -> PreparedData:
    """Bring each source's text and turn it into tokens; what is done already is kept.

    Raises:
        DataError: a source's text is missing, empty or binary, or its dataset cannot be reached.
        TokenizerError: the tokenizer cannot be read.
        WeightsError: the public model, whose tokenizer is wanted, cannot be brought.
    """
    return prepare(
        data.sources,
        data_dir=directories.data_dir,
        text_dir=directories.text_dir,
        files=data.files,
        datasets=hub_texts(data),
        tokenizer=find_tokenizer(data.tokenizer, directories.models_dir),
        vocab_size=data.vocab_size,
        output_dir=tokens_folder(data, directories),
        held_out_share=data.held_out_share,
    )


def load_data(data: DataSection, directories: Directories) -> PreparedData:
    """Open what `prepare_data` wrote, without making anything; only a training hashes all of it.

    Raises:
        DataError: it is missing, unfinished or of another size.
    """
    return load_prepared(tokens_folder(data, directories))


def hub_texts(data: DataSection) -> dict[str, HubText]:
    """The datasets of a recipe, each with its part of the token budget."""
    return {
        source: HubText(
            source=source,
            max_tokens=max(1, round((data.token_budget or 0) * dataset.share)),
            **dataset.model_dump(exclude={"share"}),
        )
        for source, dataset in data.datasets.items()
    }


def tokens_folder(data: DataSection, directories: Directories) -> Path:
    """Where a recipe's token files lie: recipes that want the same tokens share them."""
    kind = f"bpe-{data.vocab_size}" if data.tokenizer == "train" else Path(data.tokenizer).name
    name = f"{kind}-{'-'.join(data.sources)}-{data.held_out_share:g}"
    if data.files or data.datasets:
        chosen = data.model_dump_json(include={"files", "datasets", "token_budget"})
        name += f"-{hashlib.sha256(chosen.encode()).hexdigest()[:8]}"
    return directories.data_dir / "tokens" / name


def find_tokenizer(which: str, models_dir: Path) -> Tokenizer | None:
    """Return the tokenizer that exists already, or None for one to be trained.

    SmolLM2's comes with the public weights. Its chat template stays behind: a network trained from scratch on plain
    text has never seen a chat.
    """
    if which == "train":
        return None
    if which != "smollm2":
        return Tokenizer.from_folder(Path(which))
    folder = models_dir / PUBLIC_TOKENIZER
    if not (folder / "tokenizer.json").is_file():
        logger.info("SmolLM2's tokenizer comes with its public weights; bringing %s", PUBLIC_TOKENIZER)
        bring(PUBLIC_TOKENIZER, models_dir)
    return Tokenizer.from_folder(folder).without_chat_template()
