"""Continuous batching: sequences join and leave between steps, and each step is one pass through the network."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from service.engine.drafting import Drafter
from service.engine.kv_cache import KVCache
from service.engine.network import Network, TorchNetwork
from service.engine.pace import Load, Pace
from service.engine.scheduler import Scheduler, Work
from service.engine.scoring import score_prompt
from service.engine.sequence import Output, Sequence
from service.engine.stopping import Ended, Released
from shared.errors import GenerationError
from shared.generate import check_prompt
from shared.model import SmolLM2
from shared.sampling import SampledToken, sample
from shared.tokenizer import Tokenizer

USUAL_PACE = {"cpu": (0.010, 0.0004, 2e-7), "cuda": (0.003, 0.000_01, 1e-9)}
"""Seconds of a step, of each token in it and of each position it looks back at, by device: where `Pace` begins."""
PREFILL_CHUNK = {"cpu": 256, "cuda": 2_048}
"""Prompt tokens of a step in which nothing decodes, by device: enough to compute at full speed."""


@dataclass(slots=True)
class Statistics:
    """Totals since the start, and what stands in the engine now."""

    num_steps: int = 0
    num_prefill_tokens: int = 0
    num_shared_tokens: int = 0
    """Prompt tokens copied from another sequence's instead."""
    num_drawn_tokens: int = 0
    num_drafts: int = 0
    """Guesses computed, and how many of them were right."""
    num_right_drafts: int = 0
    busy_s: float = 0.0
    num_waiting: int = 0
    num_running: int = 0
    cached_tokens: int = 0
    cached_bytes: int = 0
    kept_bytes: int = 0
    """Memory of all keys and values, those kept for later prompts too, of at most `cache_limit_bytes`."""
    cache_limit_bytes: int = 0


class Engine:
    """One model and the sequences it works on. For one thread."""

    def __init__(
        self,
        model: SmolLM2,
        tokenizer: Tokenizer,
        *,
        num_slots: int,
        max_cached_tokens: int,
        prefill_chunk: int | None = None,
        busy_prefill_chunk: int | None = None,
        speculate: bool = True,
        share_prefixes: bool = True,
        network: Network | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Serve at most `num_slots` sequences at a time whose prompts and completions fit `max_cached_tokens`.

        The chunks bound the prompt tokens of a step (see `Scheduler`); None is the device's own measure, and what the
        steps' own pace allows. `speculate` computes guesses beside the tokens where that saves time; `share_prefixes`
        copies what prompts have in common. The `network` computes the model's scores; by default the model itself does.
        `clock` gives seconds.
        """
        self.clock = clock
        self.model = model
        self.tokenizer = tokenizer
        self.network: Network = network or TorchNetwork(model)
        self.cache = KVCache(
            model.config,
            num_slots=num_slots,
            max_cached_tokens=max_cached_tokens,
            dtype=model.model.embed_tokens.weight.dtype,
            device=model.device,
            in_blocks=self.network.wants_blocks,
            spare_slots=self.network.spare_slots,
        )
        kind = model.device.type
        self.speculate = speculate
        fixed_s, each_s, look_s = USUAL_PACE.get(kind, USUAL_PACE["cpu"])
        self.pace = Pace(fixed_s=fixed_s, each_s=each_s, look_s=look_s)
        self.scheduler = Scheduler(
            self.cache,
            prefill_chunk=prefill_chunk or PREFILL_CHUNK.get(kind, PREFILL_CHUNK["cpu"]),
            pace=self.pace,
            busy_prefill_chunk=busy_prefill_chunk,
            share_prefixes=share_prefixes,
        )
        self.sequences: dict[str, Sequence] = {}
        self.ended_early: list[Output] = []
        self.totals = Statistics()
        """Those of its fields that are counted; `statistics` fills in the rest."""

    @property
    def has_work(self) -> bool:
        return bool(self.sequences or self.ended_early)

    @property
    def free_slots(self) -> int:
        """Slots that neither running nor waiting sequences will take."""
        return max(0, self.cache.free_slots - len(self.scheduler.waiting))

    @property
    def free_tokens(self) -> int:
        """Tokens of prompt and completion for which there is room at once."""
        return max(0, self.cache.free_tokens - sum(sequence.cost for sequence in self.scheduler.waiting))

    @property
    def statistics(self) -> Statistics:
        """As they are now; what was returned before does not change."""
        running, cache = self.scheduler.running, self.cache
        cached_tokens = sum(sequence.num_cached for sequence in running)
        return replace(
            self.totals,
            num_shared_tokens=self.scheduler.num_shared_tokens,
            num_waiting=len(self.scheduler.waiting),
            num_running=len(running),
            cached_tokens=cached_tokens,
            cached_bytes=cached_tokens * cache.bytes_per_token,
            kept_bytes=cache.num_needed * cache.bytes_per_token,
            cache_limit_bytes=cache.most_needed * cache.bytes_per_token,
        )

    def forget_statistics(self) -> None:
        """Count from here on; what the cache holds for later prompts is forgotten too."""
        self.totals = Statistics()
        self.scheduler.forget_prefixes()

    def add(self, sequence: Sequence) -> None:
        """Take a sequence; it starts as soon as it fits.

        Raises:
            GenerationError: the prompt is empty or too long; it, `logit_bias` or what ends the completion holds an id
                the model does not know; or the grammar is wrong.
        """
        assert sequence.id not in self.sequences, sequence.id
        limit = self.cache.slot_length
        check_prompt(sequence.prompt_ids, self.model.config.vocab_size, limit)
        sequence.check_ids(self.model.config.vocab_size)
        sequence.max_new_tokens = min(sequence.max_new_tokens, limit - len(sequence.prompt_ids))
        released = sequence.prepare(self.tokenizer)
        if released.ended is None or sequence.prompt_scores is not None:
            if self.speculate:
                sequence.drafter = Drafter()
                sequence.drafter.read(sequence.tokens(0, sequence.num_tokens))
            self.sequences[sequence.id] = sequence
            self.scheduler.add(sequence)
        else:
            self.ended_early.append(describe(sequence, Released("", ended=released.ended)))

    def cancel(self, sequence_id: str) -> None:
        """Drop a sequence, known or not; nothing more is heard of it."""
        if sequence_id in self.sequences:
            self.scheduler.remove(self.sequences.pop(sequence_id))
        self.ended_early = [output for output in self.ended_early if output.sequence_id != sequence_id]

    def step(self) -> list[Output]:
        """Schedule, forward, sample, stop. Returns what is new of each sequence, an output for each token."""
        started_s = self.clock()
        outputs, self.ended_early = self.ended_early, []
        work = self.scheduler.plan()
        if not work:
            return outputs
        for item in work:
            item.sequence.started_s = item.sequence.started_s or started_s
        num_complete = sum(item.is_complete for item in work)
        self.totals.num_prefill_tokens += sum(item.num_known - item.span.start for item in work) - num_complete
        with torch.inference_mode():
            logits_BV = self.forward(work)
            complete = self.score_prompts(logits_BV, work)
            for item in work:
                item.sequence.num_cached = item.num_known
            outputs += [self.end_scored(item.sequence) for item, _ in complete if not item.sequence.max_new_tokens]
            drawn = self.draw(logits_BV, [(item, row) for item, row in complete if item.sequence.max_new_tokens])
        self.totals.num_steps += 1
        self.totals.num_drawn_tokens += len(drawn)
        seconds = self.clock() - started_s
        self.totals.busy_s += seconds
        somebody_decodes = any(item.span.count - len(item.drafts) == 1 for item in work)
        if somebody_decodes:  # pace is about them
            self.pace.observe(Load.of(item.span for item in work), seconds)
        return outputs + drawn

    def forward(self, work: list[Work]) -> Tensor:
        """Compute all tokens of the step at once; return the scores (B, V) that `Work.num_scores` asks for."""
        ids: list[int] = []
        places: list[int] = []
        for item in work:
            ids += item.token_ids
            places += range(len(ids) - item.num_scores, len(ids))
        return self.network.scores(self.cache, ids, [item.span for item in work], places)

    def score_prompts(self, logits_BV: Tensor, work: list[Work]) -> list[tuple[Work, int]]:
        """Reduce at once what stands there for prompts that are to be scored.

        Returns the sequences whose next token can be drawn, each with the row of its scores.
        """
        complete = []
        for item, row in zip(work, accumulate((item.num_scores for item in work), initial=0), strict=False):
            sequence, num_scored = item.sequence, item.num_scored
            if num_scored and sequence.prompt_scores is not None:
                following = sequence.tokens(item.span.start + 1, num_scored)
                part = score_prompt(logits_BV[row : row + num_scored], following, sequence.num_top)
                sequence.prompt_scores.append(part)
            if item.is_complete:
                complete.append((item, row + num_scored))
        return complete

    def end_scored(self, sequence: Sequence) -> Output:
        """End a sequence of which nothing but its prompt's scores were wanted."""
        sequence.first_token_s = sequence.last_token_s = self.clock()
        self.cancel(sequence.id)
        return describe(sequence, Released("", ended=Ended("length")))

    def draw(self, logits_BV: Tensor, live: list[tuple[Work, int]]) -> list[Output]:
        """Draw a token for each sequence, and a further one as long as the one before was guessed right.

        A guess changes nothing but the time: every token is drawn from the scores behind those drawn before it.
        `live` names the row of each sequence's next token.
        """
        outputs: list[Output] = []
        depth = 0
        num_right = {item: 0 for item, _ in live}
        while live:
            live = [(item, row) for item, row in live if self.can_follow_grammar(item.sequence, outputs)]
            drawn = sample(
                logits_BV,
                [item.sequence.row for item, _ in live],
                places=[row + depth for _, row in live],
                logprobs=[item.sequence.logprobs for item, _ in live],
                draw=self.network.draw,
            )
            now_s = self.clock()
            still: list[tuple[Work, int]] = []
            for (item, row), token in zip(live, drawn, strict=True):
                outputs.append(self.accept(item.sequence, token, now_s))
                is_over = item.sequence.id not in self.sequences
                if not is_over and depth < len(item.drafts) and item.drafts[depth] == token.token_id:
                    item.sequence.num_cached += 1
                    num_right[item] += 1
                    still.append((item, row))
            live = still
            depth += 1
        for item, right in num_right.items():
            if item.drafts:
                self.note_drafts(item, right)
        return outputs

    def note_drafts(self, item: Work, num_right: int) -> None:
        self.totals.num_drafts += len(item.drafts)
        self.totals.num_right_drafts += num_right
        if item.sequence.drafter is not None and item.sequence.rules is None:
            item.sequence.drafter.learn(len(item.drafts), num_right)

    def can_follow_grammar(self, sequence: Sequence, outputs: list[Output]) -> bool:
        """Whether what may come next is known; if its grammar got too complex, that sequence alone ends."""
        if sequence.row.constraint is None:
            return True
        try:
            sequence.row.constraint.allowed()
        except GenerationError as error:
            outputs.append(self.fail(sequence, error))
            return False
        return True

    def accept(self, sequence: Sequence, token: SampledToken, now_s: float) -> Output:
        """Give a sequence the token drawn for it."""
        sequence.first_token_s = sequence.first_token_s or now_s
        sequence.last_token_s = now_s
        try:
            released = sequence.stopping.push(token.token_id)
        except GenerationError as error:
            return self.fail(sequence, error)
        output = describe(sequence, released, token)
        if released.is_kept:
            sequence.completion_ids.append(token.token_id)
            if sequence.drafter is not None:
                sequence.drafter.read((token.token_id,))
        if released.ended is not None:
            self.cancel(sequence.id)
        return output

    def fail(self, sequence: Sequence, error: GenerationError) -> Output:
        """End a sequence that cannot go on."""
        self.cancel(sequence.id)
        return Output(
            sequence_id=sequence.id,
            first_index=len(sequence.completion_ids),
            token_ids=(),
            text="",
            finish_reason="error",
            error=str(error),
            timings=sequence.timings,
        )


def describe(sequence: Sequence, released: Released, token: SampledToken | None = None) -> Output:
    """Say what is new of a sequence, before the token joins its completion."""
    kept = token if released.is_kept else None
    told = token if sequence.scores_prompt else kept
    return Output(
        sequence_id=sequence.id,
        first_index=len(sequence.completion_ids),
        token_ids=() if kept is None else (kept.token_id,),
        text=released.text,
        logprobs=None if told is None or sequence.logprobs is None else (describe_logprobs(told),),
        prompt_scores=sequence.take_prompt_scores(),
        finish_reason=released.ended.reason if released.ended else None,
        stop_sequence=released.ended.stop_sequence if released.ended else None,
        timings=sequence.timings if released.ended else {},
    )


def describe_logprobs(token: SampledToken) -> dict[str, Any]:
    """Return a token's log-probability and its alternatives as they travel to the client."""
    return {"token_id": token.token_id, "logprob": token.logprob, "top": [list(pair) for pair in token.top_logprobs]}
