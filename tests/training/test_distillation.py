"""The distillation loss, compared with its formula written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import repfx
from repfx.errors import InvalidInput
from tests.random_numbers import numbers_from


def logits() -> tuple[Tensor, Tensor, Tensor]:
    generator = numbers_from(0)
    student, teacher = (3 * torch.randn(5, 7, dtype=torch.float64, generator=generator) for _ in range(2))
    return student, teacher, torch.tensor([0, 3, 6, 2, 2])


@pytest.mark.parametrize(("alpha", "temperature"), [(0.9, 10.0), (0.5, 1.0), (0.0, 4.0), (1.0, 4.0)])
def test_it_is_the_formula(alpha: float, temperature: float) -> None:
    student, teacher, labels = logits()
    expected = torch.zeros((), dtype=torch.float64)
    for s, t, label in zip(student, teacher, labels):
        p, q = ((each / temperature).exp() / (each / temperature).exp().sum() for each in (t, s))
        entropy = -(s.exp() / s.exp().sum()).log()[label]
        expected += alpha * temperature**2 * (p * (p / q).log()).sum() + (1 - alpha) * entropy
    found = repfx.distillation_loss(student, teacher, labels, alpha=alpha, temperature=temperature)
    assert float(found) == pytest.approx(float(expected) / 5, rel=1e-12)


def test_the_teacher_gets_no_gradient() -> None:
    student, teacher, labels = logits()
    student.requires_grad_()
    teacher.requires_grad_()
    repfx.distillation_loss(student, teacher, labels).backward()
    assert student.grad is not None
    assert teacher.grad is None


def test_what_can_t_be_is_refused() -> None:
    student, teacher, labels = logits()
    with pytest.raises(InvalidInput, match=r"student's logits are \(5, 7\) and the teacher's \(5, 6\)"):
        repfx.distillation_loss(student, teacher[:, :6], labels)
    for options in ({"alpha": 1.5}, {"alpha": -0.1}, {"temperature": 0.0}):
        with pytest.raises(InvalidInput, match="from 0 to 1, and temperature positive"):
            repfx.distillation_loss(student, teacher, labels, **options)
    assert F.cross_entropy(student, labels) == repfx.distillation_loss(student, teacher, labels, alpha=0)
