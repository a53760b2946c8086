"""Inputs nobody would think of; `make fuzz-api` tries more of the same."""

from __future__ import annotations

import pytest
import torch

from benchmarks.fuzz_api import Outcome, Reference, fuzz_equal, run_schemathesis
from tests.service.api.stack import Api, client_of


def test_nothing_the_description_allows_or_forbids_is_a_5xx(whole_api: Api) -> None:
    """Every route gets its examples, the borders of every field, and a few requests drawn at random, good and bad.

    How many fit into the time depends on the machine; `make fuzz-api` also compares every answer with its description.
    """
    checks = "not_a_server_error"
    code, text = run_schemathesis(whole_api.url, seconds=20, max_examples=3, seed=1, checks=checks)
    assert code == 0, text[text.find("= FAILURES") :]
    with client_of(whole_api) as client:
        assert client.get("/ready").status_code == 200


@pytest.mark.anyio
@pytest.mark.usefixtures("one_thread")
async def test_stream_blocking_answer_and_plain_loop_agree(whole_api: Api) -> None:
    outcome = Outcome()
    reference = Reference(whole_api.settings.models_dir / "tiny", torch.float32)  # whole_api's worker computes so
    await fuzz_equal(whole_api.url, reference, outcome, count=64, seed=2, limit_s=60)
    assert outcome.faults == [] and outcome.inputs > 0
