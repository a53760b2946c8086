"""What a recipe may say: every field with its meaning, checked before any work starts.

A recipe is a TOML file in these words; `trainer.recipe` reads it and turns whatever is wrong into one sentence.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from shared.config import PRESETS, ModelConfig
from shared.errors import ConfigError
from trainer.curriculum import Stage, validate_stages
from trainer.schedule import Schedule, ScheduleKind

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
NAME_RULE = "use letters, digits, dots, dashes and underscores, at most 100"
Name = Annotated[str, Field(pattern=NAME_PATTERN)]
Share = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**64)]


class Directories(BaseSettings):
    """Where things are: `SMOLLM_DATA_DIR` and its neighbours. Besides these only `Torchrun` reads the environment."""

    model_config = SettingsConfigDict(env_prefix="SMOLLM_", env_file=".env", extra="ignore", frozen=True)

    data_dir: Path = Field(Path("data"), description="your text (input.txt, code.txt, math.txt) and token files")
    text_dir: Path | None = Field(None, description="your text, where it is not in data_dir; never written to")
    runs_dir: Path = Field(Path("runs"), description="training runs: logs, plots, checkpoints")
    models_dir: Path = Field(Path("models"), description="exports, which the service offers")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Torchrun:
    """What `torchrun` tells each process it starts."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    torchelastic_restart_count: int = 0

    @classmethod
    def read(cls) -> Torchrun | None:
        """Return it, or None in a process that torchrun did not start."""
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            return None
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: int(os.environ[name.upper()]) for name in names if name.upper() in os.environ})


class Section(BaseModel):
    """Strict: no unknown keys, no silent conversions, no NaN; frozen once made."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class ModelSection(Section):
    """The network: a preset, single sizes, or a preset with some sizes changed."""

    preset: str | None = Field(None, description=f"one of {', '.join(PRESETS)}; the sizes below change it")
    vocab_size: Positive | None = Field(None, description="default: the preset's, else the tokenizer's")
    hidden_size: Positive | None = Field(None, description="width of the residual stream")
    intermediate_size: Positive | None = Field(None, description="width inside the MLP")
    num_hidden_layers: Positive | None = Field(None, description="number of decoder layers")
    num_attention_heads: Positive | None = Field(None, description="query heads per layer")
    num_key_value_heads: Positive | None = Field(None, description="key-value heads per layer")
    max_position_embeddings: Positive | None = Field(None, description="positions RoPE knows")
    rope_theta: float | None = Field(None, gt=0, description="base of RoPE's wavelengths")
    rms_norm_eps: float | None = Field(None, gt=0, description="added to the mean square in every norm")
    tie_word_embeddings: bool | None = Field(None, description="one matrix for embedding and head")

    @model_validator(mode="after")
    def check(self) -> Self:
        if self.preset is not None and self.preset not in PRESETS:
            raise ConfigError(f"model.preset is {self.preset!r}; known presets are {', '.join(PRESETS)}")
        self.build(tokenizer_vocab_size=256)
        return self

    def build(self, *, tokenizer_vocab_size: int, end_of_text_id: int = 0) -> ModelConfig:
        """Return the network's shape, its vocabulary the tokenizer's unless the recipe or its preset fixes one.

        Raises:
            ConfigError: sizes that do not fit together.
        """
        preset = (
            {"vocab_size": tokenizer_vocab_size} if self.preset is None else dataclasses.asdict(PRESETS[self.preset])
        )
        sizes = preset | self.model_dump(exclude={"preset"}, exclude_none=True)
        return ModelConfig(**sizes | {"bos_token_id": end_of_text_id, "eos_token_id": end_of_text_id})


class DatasetSection(Section):
    """A dataset that a source is streamed from: on the Hugging Face Hub, or a folder of parquet or JSON-lines files."""

    repository: str = Field(min_length=1, description="owner/name on the Hub, or a folder's path")
    subset: str | None = Field(None, description="the dataset's configuration, where it has several")
    folder: str | None = Field(None, description="read only the files below this folder of the repository")
    split: str = Field("train", description="train, or another split of the dataset")
    revision: str | None = Field(None, description="branch, tag or commit; default: the newest")
    text_column: str = Field("text", description="the column that holds the text")
    share: Share = Field(1.0, description="share of data.token_budget that is brought from here; they sum to at most 1")


class DataSection(Section):
    """The text and how it becomes tokens."""

    sources: Annotated[tuple[Name, ...], Field(min_length=1)] = Field(
        ("input", "code", "math"), description="names of sources; data/NAME.txt is used where it exists"
    )
    files: dict[Name, Annotated[tuple[str, ...], Field(min_length=1)]] = Field(
        {}, description="source -> its files, folders or globs, looked at before anything else"
    )
    datasets: dict[Name, DatasetSection] = Field(
        {}, description="source -> the dataset it is streamed from where the user gave no text (below)"
    )
    token_budget: Positive | None = Field(None, description="tokens to bring from all datasets together")
    tokenizer: str = Field(
        "smollm2",
        min_length=1,
        description="smollm2 (49,152 ids), train (a new BPE of vocab_size ids), or a folder's path",
    )
    vocab_size: Positive | None = Field(None, description='ids of the BPE that tokenizer = "train" makes')
    held_out_share: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.05, description="share of each source's documents that is never trained on"
    )
    max_epochs: Annotated[float, Field(gt=0)] = Field(
        100.0, description="the plan refuses a source that would be repeated more often than this"
    )

    @model_validator(mode="after")
    def check(self) -> Self:
        if (self.tokenizer == "train") != (self.vocab_size is not None):
            raise ConfigError('data.vocab_size belongs to data.tokenizer = "train": set both or neither')
        if len(set(self.sources)) != len(self.sources):
            raise ConfigError(f"data.sources names one source twice: {', '.join(self.sources)}")
        for key in ("files", "datasets"):
            if unknown := set(getattr(self, key)) - set(self.sources):
                raise ConfigError(f"data.{key} has {min(unknown)!r}, which is not among data.sources; add it there")
        if bool(self.datasets) != (self.token_budget is not None):
            raise ConfigError("data.token_budget belongs to data.datasets: set both or neither")
        if (total := sum(dataset.share for dataset in self.datasets.values())) > 1 + 1e-9:
            raise ConfigError(f"the shares in data.datasets sum to {total:g}; they may sum to 1 at most")
        return self


class StageSection(Section):
    """Updates start_step..end_step-1 draw their windows from the sources in these shares."""

    name: str = Field(description="what logs and plots call it")
    start_step: Count = Field(description="first update of the stage, counted from 0")
    end_step: Positive = Field(description="the update after its last one; the next stage starts here")
    shares: dict[str, Share] = Field(description="source -> share of the tokens; they sum to 1")


class PromptSection(Section):
    """A text the model continues at every sampling, always with the same seed."""

    text: str = Field(min_length=1, description="the beginning to continue")
    source: str | None = Field(None, description="the source it resembles, for the reader")


class TrainConfig(Section):
    """One recipe, resolved. A step is one optimizer update over micro_batch_size x gradient_accumulation_steps rows."""

    name: Name = Field(description="the recipe's name; the run's default name")
    description: str = Field("", description="one line for people")
    model: ModelSection = Field(description="the network")
    data: DataSection = Field(DataSection(), description="the text")
    stages: Annotated[tuple[StageSection, ...], Field(min_length=1)] = Field(description="the curriculum")

    num_steps: Positive = Field(description="optimizer updates in all")
    sequence_length: Positive = Field(description="tokens per row")
    micro_batch_size: Positive = Field(description="rows per forward pass; bounded by memory")
    gradient_accumulation_steps: Positive = Field(1, description="forward passes per step")

    merge_micro_batches: bool = Field(
        False, description="run several micro-batches as one where memory allows; the rows of a step stay the same"
    )
    activation_checkpointing: bool = Field(
        False, description="keep only each layer's input and compute the rest again: a third slower, far less memory"
    )
    mask_documents: bool = Field(
        False, description="tokens look only at their own document, and its positions count from 0"
    )
    init_from: str | None = Field(
        None,
        min_length=1,
        description="weights to start from: a model's name, looked for in models/ or brought, or a folder's path",
    )

    optimizer: Literal["adamw", "muon"] = Field(
        "adamw", description="adamw (arXiv 1711.05101), or muon (arXiv 2502.16982) for the layers' matrices beside it"
    )
    learning_rate: Annotated[float, Field(gt=0)] = Field(description="peak")
    min_learning_rate: Annotated[float, Field(ge=0)] = Field(0.0, description="reached after the last step")
    warmup_steps: Count = Field(0, description="steps of linear warmup")
    schedule: ScheduleKind = Field("cosine", description="cosine, wsd (warmup, stable, decay) or constant")
    decay_share: Share = Field(0.2, description="share of all steps over which wsd decays")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.95), description="AdamW's two averages"
    )
    eps: Annotated[float, Field(gt=0)] = Field(1e-8, description="AdamW's floor under the root")
    muon_momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.95, description="Muon's average of gradients")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.1, description="on matrices; never on norms")
    decay_embeddings: bool = Field(True, description="whether weight decay touches embedding and head")
    clip_norm: Annotated[float, Field(ge=0)] = Field(1.0, description="largest global gradient norm; 0: off")
    scale_residual_init: bool = Field(
        False, description="start the projections into the residual stream at 1/sqrt(2 x layers) of the usual spread"
    )

    seed: Seed = Field(1337, description="of weights, order of windows and samples")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:N, mps")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="arithmetic of the forward pass; weights and optimizer stay fp32"
    )
    compile: Literal["auto", "on", "off"] = Field(
        "auto", description="torch.compile; auto: on CUDA, and on a CPU where it saves more than it costs"
    )
    parallel: Literal["ddp", "fsdp"] = Field(
        "ddp", description="under torchrun: ddp (each process holds everything) or fsdp (FSDP2: each holds a shard)"
    )
    deterministic: bool = Field(False, description="on CUDA: only kernels that give the same bits every time")
    num_threads: Count = Field(0, description="CPU threads; 0: the CPU quota or affinity, whichever is smaller")

    log_every: Positive = Field(10, description="steps between rows of metrics.jsonl")
    evaluate_every: Positive = Field(
        250, description="steps between held-out evaluations; also at the end of every stage"
    )
    evaluate_windows: Positive = Field(64, description="held-out rows per source; always the same ones")
    sample_every: Positive = Field(500, description="steps between sample texts; also at the end")
    sample_tokens: Positive = Field(100, description="tokens per sample text")
    sample_temperature: Annotated[float, Field(ge=0)] = Field(0.8, description="0: always the likeliest token")
    prompts: tuple[PromptSection, ...] = Field((), description="texts to continue at every sampling")
    save_every: Positive = Field(250, description="steps between checkpoints; also at the end and on SIGTERM")
    keep_checkpoints: Positive = Field(2, description="newest checkpoints kept, beside the best one")
    overfit_gap: Annotated[float, Field(gt=0)] = Field(
        0.5, description="alarm when held-out loss exceeds train loss by this many nats while it rises"
    )
    track: Literal["off", "trackio", "wandb"] = Field(
        "off", description="send the curves to trackio or Weights & Biases as well; the package is yours to install"
    )
    export_name: Name | None = Field(None, description="folder under models/; default: the run's name")

    @model_validator(mode="after")
    def check(self) -> Self:
        validate_stages(self.curriculum_stages(), self.num_steps, self.data.sources)
        if self.min_learning_rate > self.learning_rate:
            raise ConfigError(
                f"min_learning_rate {self.min_learning_rate:g} is above learning_rate {self.learning_rate:g}; lower it"
            )
        if self.parallel == "fsdp" and self.optimizer != "adamw":
            raise ConfigError(
                f'parallel = "fsdp" goes with optimizer = "adamw", not with {self.optimizer!r}; use "ddp"'
            )
        if self.warmup_steps >= self.num_steps:
            raise ConfigError(f"warmup_steps is {self.warmup_steps}; it must be less than num_steps {self.num_steps}")
        positions = self.model.build(tokenizer_vocab_size=256).max_position_embeddings
        if self.sequence_length > positions:
            raise ConfigError(
                f"sequence_length {self.sequence_length} is above model.max_position_embeddings {positions}; "
                "lower the one or raise the other"
            )
        return self

    @property
    def batch_size(self) -> int:
        """Rows per step."""
        return self.micro_batch_size * self.gradient_accumulation_steps

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.sequence_length

    def curriculum_stages(self) -> list[Stage]:
        return [Stage(stage.name, stage.start_step, stage.end_step, stage.shares) for stage in self.stages]

    def build_schedule(self) -> Schedule:
        return Schedule(
            kind=self.schedule,
            peak=self.learning_rate,
            minimum=self.min_learning_rate,
            warmup_steps=self.warmup_steps,
            num_steps=self.num_steps,
            decay_share=self.decay_share,
        )


def ask_cublas_for_the_same_bits() -> None:
    """Set what NVIDIA's cuBLAS reads from the environment when it starts: a fixed workspace, so fixed sums."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
