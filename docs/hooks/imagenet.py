"""Count the steps of a training on ImageNet, and the images that go through a net, from the shipped recipes."""

from __future__ import annotations

from typing import Any

from docs.hooks.measurements import table

TRAIN, TEST, PROCESSES = 1_281_167, 50_000, 8


def imagenet() -> str:
    """Each shipped recipe for ImageNet with its steps and the images that it trains on, tests on and scores candidates on."""
    rows = []
    for name, counted in counts().items():
        millions = [f"{counted[key] / 1e6:,.1f} M".replace(",", "\u202f") for key in ("train", "test", "score")]
        share = (counted["test"] + counted["score"]) / (3 * counted["train"] + counted["test"] + counted["score"])
        steps = f"{counted['steps']:,}".replace(",", "\u202f")
        rows.append((f"`{name}`", str(counted["epochs"]), steps, *millions, f"{share:.1%}".replace("%", " %")))
    head = (
        "recipe",
        "epochs",
        "steps",
        "images trained on",
        "images tested",
        "images scored",
        "share of tests and scores",
    )
    return table(head, rows)


def counts() -> dict[str, dict[str, int]]:
    """Return, for each shipped recipe for ImageNet, how many steps and images it takes in all processes together."""
    from repfx.data.batches import Batches
    from repfx.records.plain_values import from_plain
    from repfx.training.experiment import Experiment, schedule_of
    from repfx.training.named_recipes import shipped_recipes
    from repfx.training.recipe_file import read_recipe

    found = {}
    for name in shipped_recipes():
        if not name.endswith(("-imagenet", "-imagenet-distilled")):
            continue
        asked = from_plain(Experiment, read_recipe(name))
        schedule: Any = schedule_of(asked)
        epochs, size = asked.training.epochs, asked.training.batch_size
        scores = schedule is not None and schedule.needs_score
        held_out = TRAIN // 10 if scores else 0
        steps = epochs * Batches(TRAIN - held_out, size, processes=PROCESSES).steps
        generations = sum(schedule.evaluates(epoch) for epoch in range(1, epochs + 1)) if scores else 0
        found[name] = {
            "epochs": epochs,
            "steps": steps,
            "train": epochs * (TRAIN - held_out) * (schedule.nets if scores else 1),
            "test": TEST * -(-epochs // asked.training.test_every),
            "score": generations * held_out * (schedule.population if scores else 0),
        }
    return found
