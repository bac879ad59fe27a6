"""The part of a run's page about classes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from repfx.data.predictions import Predictions, predict
from repfx.errors import InvalidInput
from repfx.pages.classes import classes_of
from repfx.pages.run_page import write_run_page
from repfx.training.evaluation import Evaluation
from repfx.training.run_folder import EVALUATION, METRICS, RunFolder
from tests.commands.test_pages import Page, stands_alone


def evaluation(classes: int = 4) -> Evaluation:
    """Class 1 is always taken for 2, class 3 has no image, and the others are right."""
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    scores = torch.nn.functional.one_hot(torch.tensor([0, 0, 0, 2, 2, 2]), classes).double()
    return Evaluation.of([f"<{place}>" for place in range(classes)], Predictions.of(scores, labels))


def test_predictions_of_batches_are_those_of_all_images() -> None:
    generator = torch.Generator().manual_seed(0)
    scores, labels = torch.randn(50, 12, generator=generator), torch.arange(50) % 12
    images = [(scores[place], int(labels[place])) for place in range(50)]
    found = predict(lambda x: x, images, 7)  # type: ignore[arg-type]
    ranks = (scores > scores.gather(1, labels[:, None])).sum(1)
    assert found.accuracy == pytest.approx((ranks == 0).double().mean().item())
    assert found.top5 == pytest.approx((ranks < 5).double().mean().item())
    confusion = torch.zeros(12, 12, dtype=torch.long)
    for row, label in zip(scores, labels):
        confusion[label, row.argmax()] += 1
    assert torch.equal(found.confusion, confusion)


def test_an_evaluation_comes_back_from_its_file() -> None:
    found = evaluation()
    again = Evaluation.from_dict(json.loads(json.dumps(found.as_dict())))
    assert torch.equal(again.confusion, found.confusion)
    assert (again.labels, again.top5, again.flips) == (found.labels, 1.0, None)
    for wrong in ({}, {**found.as_dict(), "confusion": [[1]]}, {**found.as_dict(), "top5": "high"}):
        with pytest.raises(InvalidInput, match="no results of an evaluation"):
            Evaluation.from_dict(wrong)


def test_the_worst_class_comes_first_and_a_mistake_is_seen() -> None:
    found = classes_of(evaluation())
    assert [(row.name, row.images, row.right, row.mistaken) for row in found.rows] == [
        ("<1>", 2, 0.0, "<2> (2)"),
        ("<0>", 3, 1.0, ""),
        ("<2>", 1, 1.0, ""),
    ]
    assert found.names == ["<0>", "<1>", "<2>"]
    assert [[cell.count for cell in row] for row in found.matrix] == [[3, 0, 0], [0, 0, 2], [0, 0, 1]]
    assert [[cell.shade for cell in row] for row in found.matrix] == [[6, 0, 0], [0, 0, 6], [0, 0, 6]]
    rare = torch.diag(torch.tensor([999, 5]))
    rare[0, 1] = 1
    assert classes_of(Evaluation(("a", "b"), rare, 1.0)).matrix[0][1].shade == 1


def test_many_classes_have_no_matrix() -> None:
    count = 40
    labels = torch.arange(count)
    scores = torch.nn.functional.one_hot((labels + labels % 2) % count, count).double()
    found = classes_of(Evaluation.of([f"c{place}" for place in range(count)], Predictions.of(scores, labels)))
    assert not found.matrix
    assert len(found.pairs) == 15
    assert found.pairs[0] == ("c1", "c2", 1)


@pytest.mark.parametrize("classes", [4, 40])
def test_the_page_of_a_run_shows_its_classes(classes: int, tmp_path: Path) -> None:
    (tmp_path / METRICS).write_text(
        json.dumps({"accuracy": {"fused": 0.5}, "top5": {"fused": 0.75}, "cost": {"plain": {"macs": 1}}})
    )
    found = evaluation(classes).as_dict()
    if classes == 40:  # each class is there, and taken for another
        found["confusion"] = torch.eye(40, dtype=torch.long).roll(1, 0).tolist()
    (tmp_path / EVALUATION).write_text(json.dumps(found))
    page = Page(write_run_page(RunFolder(tmp_path)))
    stands_alone(page)
    assert page.row("fused")[1:3] == ["50.00 %", "75.00 %"]
    if classes == 4:
        rows = [[cell.strip() for cell in row] for row in page.rows if row[0] == "<1>"]
        assert rows == [["<1>", "2", "0 %", "<2> (2)"], ["<1>", "·", "·", "2"]]
        assert "<1>, predicted <2>: 2" in page.titles()
    else:
        assert "Mistaken most often" in page.text
        assert "40 classes, the one with the fewest right answers first" in page.text
    (tmp_path / EVALUATION).write_text("[]")
    with pytest.raises(InvalidInput, match="holds no evaluation that `repfx train` wrote"):
        write_run_page(RunFolder(tmp_path))
