"""Packed weights give the products of the plain ones."""

from __future__ import annotations

import pytest
import torch

from service.engine.engine import Engine
from service.engine.packing import PackedLinear, can_pack, pack_linears
from service.engine.sequence import Sequence
from shared.sampling import SamplingParams
from tests.tiny import TINY, tiny_model, tiny_tokenizer

BF16, CPU = torch.bfloat16, torch.device("cpu")

pytestmark = pytest.mark.skipif(not can_pack(CPU, BF16), reason="this CPU has no packed bf16 product")


def test_only_bf16_on_a_cpu_is_packed() -> None:
    assert not can_pack(CPU, torch.float32)
    assert not can_pack(torch.device("cuda"), BF16)


@pytest.mark.parametrize("num_rows", [1, 3, 64])
def test_a_packed_product_is_the_plain_one(num_rows: int) -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(576, 960, bias=False, dtype=BF16)
    x = torch.randn(1, num_rows, 576, dtype=BF16)
    with torch.inference_mode():
        packed = PackedLinear(linear)(x)
        exact = x.double() @ linear.weight.double().T
    assert packed.dtype == BF16
    torch.testing.assert_close(packed.double(), exact, rtol=2**-8, atol=2**-10)


def test_a_packed_model_scores_as_the_plain_one_and_keeps_its_embedding() -> None:
    ids = torch.arange(40).unsqueeze(0)
    plain, packed = tiny_model().to(BF16), tiny_model().to(BF16)
    pack_linears(packed)
    with torch.inference_mode():
        torch.testing.assert_close(packed(ids), plain(ids), rtol=0.05, atol=0.02)
    assert [name for name, _ in packed.named_parameters() if "norm" not in name] == ["model.embed_tokens.weight"]
    engine = Engine(packed, tiny_tokenizer(), num_slots=2, max_cached_tokens=TINY.max_position_embeddings)
    engine.add(Sequence(id="one", prompt_ids=[1, 2, 3], params=SamplingParams(temperature=0.0), max_new_tokens=5))
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    assert len(outputs) == 5
