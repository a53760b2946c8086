"""The head and the loss in chunks against the plain way, in fp32: same loss, same gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.tiny import tiny_model
from trainer.cross_entropy import linear_cross_entropy
from trainer.loss import IGNORED, RowLosses


def random_problem(num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    hidden = torch.randn(num_tokens, 16, generator=generator)
    weight = torch.randn(50, 16, generator=generator)
    targets = torch.randint(0, 50, (num_tokens,), generator=generator)
    targets[::3] = IGNORED
    return hidden, weight, targets


def chunked_losses(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
    return linear_cross_entropy(hidden, weight, targets, ignored=IGNORED, dtype=torch.float32, chunk=chunk)


@pytest.mark.parametrize("chunk", [1, 4, 7, 100])
def test_chunks_change_neither_loss_nor_gradient(chunk: int) -> None:
    hidden, weight, targets = random_problem(23)
    plain = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
    chunked = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
    losses = torch.nn.functional.cross_entropy(plain[0] @ plain[1].t(), targets, ignore_index=IGNORED, reduction="none")
    ours = chunked_losses(chunked[0], chunked[1], targets, chunk)
    torch.testing.assert_close(ours, losses)
    (losses.sum() / 17).backward()  # type: ignore[no-untyped-call]
    (ours.sum() / 17).backward()  # type: ignore[no-untyped-call]
    for mine, reference in zip(chunked, plain, strict=True):
        torch.testing.assert_close(mine.grad, reference.grad)
    with torch.no_grad():
        again = chunked_losses(chunked[0], chunked[1], targets, chunk)
    torch.testing.assert_close(again, losses)


def test_nothing_that_counts_gives_zero_and_no_gradient() -> None:
    hidden, weight, targets = random_problem(6)
    hidden.requires_grad_()
    losses = chunked_losses(hidden, weight, torch.full_like(targets, IGNORED), 4)
    losses.sum().backward()  # type: ignore[no-untyped-call]
    assert losses.tolist() == [0.0] * 6
    assert hidden.grad is not None
    assert not hidden.grad.any()


def gradients(losses: RowLosses, dtype: torch.dtype, *, sparse: bool = False) -> dict[str, Tensor]:
    model = tiny_model()
    model.model.embed_tokens.sparse = sparse
    generator = torch.Generator().manual_seed(3)
    inputs, targets = torch.randint(0, model.config.vocab_size, (2, 4, 24), generator=generator)
    targets[0, :5] = IGNORED
    (losses(model, inputs, targets, dtype).sum() / 91).backward()  # type: ignore[no-untyped-call]
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("mask_documents", [False, True])
def test_the_fast_way_has_the_plain_ways_gradients(sparse: bool, mask_documents: bool) -> None:
    plain = gradients(RowLosses(mask_documents=mask_documents), torch.float32)
    fast = gradients(RowLosses(mask_documents=mask_documents, logit_chunk=10), torch.float32, sparse=sparse)
    assert plain.keys() == fast.keys()
    for name, gradient in fast.items():
        torch.testing.assert_close(gradient, plain[name], rtol=1e-4, atol=1e-7, msg=name)


def test_bfloat16_gradients_point_where_fp32s_do() -> None:
    """Rounding to 8 bits of mantissa turns no gradient by more than a few degrees."""
    plain, fast = gradients(RowLosses(), torch.float32), gradients(RowLosses(logit_chunk=10), torch.bfloat16)
    for name, gradient in fast.items():
        assert torch.cosine_similarity(gradient.flatten(), plain[name].flatten(), dim=0) > 0.99, name
