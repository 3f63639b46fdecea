"""Plans by the chips' own compilers: products, loops and transfers are what arithmetic says."""

from pathlib import Path

import pytest
from planning import attempts, chips
from planning.stack import SAVES, Case

ROOT = Path(__file__).parents[2]
D, F, LAYERS = 640, 2048, 18  # Gemma 3 270M
pytestmark = pytest.mark.promotes  # optax does


def attempt(target, mesh, save="input", tokens=8192, program="train", preset="gemma3_270m", sequence_parallel=True):
    chip, _, name = chips.parse(target)
    return attempts.attempt(Case(preset, program, mesh, tokens, save, sequence_parallel), chip, name)


def sent(row, axes, *kinds):
    return sum(each["sent_bytes"] for each in row["transfers"] if each["axes"] == axes and each["kind"] in kinds)


@pytest.mark.parametrize("save", SAVES)
def test_a_step_has_the_products_that_are_counted(save, monkeypatch):
    """The compiler counts a loop's body once, so those of one layer; AdamW adds half a percent."""
    compiled = []
    compile_for = attempts.aot.compile_for
    monkeypatch.setattr(
        attempts.aot,
        "compile_for",
        lambda *args, **options: compiled.append(compile_for(*args, **options)) or compiled[0],
    )
    row = attempt("v5e:1x1", (1, 1, 1), save)
    assert row["transfers"] == [] and row["flops"] % LAYERS == 0
    assert compiled[0].flops == pytest.approx(row["flops"] / LAYERS, rel=0.03)
