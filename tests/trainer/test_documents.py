"""Document masking: two documents in one row know nothing of each other."""

from __future__ import annotations

import torch
from torch import Tensor

from shared.model import attend_causally
from tests.tiny import tiny_model
from trainer.loss import RowLosses, attend_within_documents, documents_of, mask_of

END = 0


def test_documents_and_positions_by_hand() -> None:
    row = torch.tensor([[5, 6, END, 7, END, END, 8, 9]])
    documents, positions = documents_of(row, END)
    assert documents.tolist() == [[0, 0, 0, 1, 1, 2, 3, 3]]
    assert positions.tolist() == [[0, 1, 2, 0, 1, 0, 0, 1]]


def hidden(ids_BT: Tensor) -> Tensor:
    model = tiny_model()
    documents, positions = documents_of(ids_BT, END)
    mask = mask_of(documents)

    def attend(layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return attend_within_documents(mask, layer, queries, keys, values)

    with torch.no_grad():
        return model.hidden_states(ids_BT, positions, attend)


def test_a_document_in_a_row_is_the_document_alone() -> None:
    first, second = [5, 6, 7, END], [8, 9, 10, 11]
    together = hidden(torch.tensor([first + second]))[0]
    torch.testing.assert_close(together[:4], hidden(torch.tensor([first]))[0])
    torch.testing.assert_close(together[4:], hidden(torch.tensor([second]))[0])
    model = tiny_model()
    with torch.no_grad():
        unmasked = model.hidden_states(torch.tensor([first + second]), None, attend_causally)[0]
    assert not torch.allclose(together[4:], unmasked[4:], atol=1e-3), "without the mask the first document shows"


def test_changing_one_document_moves_only_its_own_losses() -> None:
    model = tiny_model()
    losses = RowLosses(mask_documents=True)
    targets = torch.full((1, 8), -100)
    targets[0, 5:] = torch.tensor([12, 13, 14])  # all in the second document
    one = torch.tensor([[5, 6, 7, END, 8, 9, 10, 11]])
    other = torch.tensor([[20, 21, 22, END, 8, 9, 10, 11]])
    with torch.no_grad():
        assert losses(model, one, targets, torch.float32) == losses(model, other, targets, torch.float32)
        open_to_all = RowLosses()
        assert open_to_all(model, one, targets, torch.float32) != open_to_all(model, other, targets, torch.float32)
