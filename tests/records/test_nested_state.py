"""A state that was taken apart stays as it was, whatever becomes of the tensors in it."""

from __future__ import annotations

import torch
from torch import Tensor

from repfx.records.nested_state import put_together, take_apart


def test_a_state_is_a_copy() -> None:
    weight, expected = torch.arange(6.0).reshape(2, 3), torch.arange(6.0).reshape(2, 3)
    tensors: dict[str, Tensor] = {}
    plain = take_apart({"a": weight, "b": [weight.T, weight[0]]}, "state", tensors)
    weight.zero_()
    found = put_together(plain, tensors)
    assert torch.equal(found["a"], expected)
    assert torch.equal(found["b"][0], expected.T)
    assert torch.equal(found["b"][1], expected[0])
