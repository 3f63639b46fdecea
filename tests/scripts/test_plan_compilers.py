"""In plans by the chips' own compilers, the transfers and the numbers of loop runs agree with arithmetic."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from plan import attempts, chips
from plan.stack import Case

ROOT = Path(__file__).parents[2]
D, F, LAYERS = 640, 2048, 18  # Gemma 3 270M
pytestmark = [pytest.mark.needs_compilers, pytest.mark.promotes]  # optax promotes


def attempt(target, mesh, tokens=8192, program="train"):
    chip, _, name = chips.parse(target)
    return attempts.attempt(Case("gemma3_270m", program, mesh, tokens, "input", True), chip, name)


def sent(row, axes, *kinds):
    """Bytes that a chip sends over `axes` in transfers of these kinds, or of all kinds if none is named."""
    assert not any(each["at_least"] for each in row["transfers"])
    chosen = (each for each in row["transfers"] if each["axes"] == axes and (not kinds or each["kind"] in kinds))
    return sum(each["sent_bytes"] for each in chosen)


def test_a_training_step_on_h200s_sends_what_arithmetic_says():
    """The mesh has four rows and two columns of chips."""
    row = attempt("h200:8", (1, 4, 2))
    weights, residual = LAYERS * 3 * D * F // 2, LAYERS * 8192 * D  # numbers in a column of chips, and in a row
    # Gradients, in float32. Newer compilers send those of the norms with them.
    assert sent(row, "fsdp", "reduce-scatter") == pytest.approx(4 * weights * 3 / 4, rel=0.002)
    # Weights, in bfloat16: three in the forward pass; in the backward pass two to recompute gate and up, three for dx.
    assert sent(row, "fsdp", "all-gather") == pytest.approx(2 * weights / 3 * 8 * 3 / 4, rel=0.01)  # and the norms'
    assert sent(row, "tensor", "all-gather") == 3 * 2 * residual / 2  # x, x again, dy
    assert sent(row, "tensor", "reduce-scatter") == (2 + 4) * residual / 2  # y, and dx in float32


@pytest.mark.parametrize(
    ("target", "mesh", "exact"),
    [
        ("v5e:2x4", (1, 4, 2), True),
        pytest.param("v6e:2x4", (1, 4, 2), True, marks=pytest.mark.slow),
        # Its inner loops run 17 times, and 15 times would be enough.
        pytest.param("v5e:4x8", (1, 16, 2), False, marks=pytest.mark.slow),
    ],
)
def test_a_forward_pass_on_tpus_sends_what_arithmetic_says(target, mesh, exact):
    row = attempt(target, mesh, tokens=1024 if exact else 8192, program="forward")
    _, fsdp, tensor = mesh
    weights, residual = LAYERS * 3 * D * F // tensor, LAYERS * row["tokens"] // fsdp * D
    gathered = 2 * weights * (fsdp - 1) / fsdp
    assert sent(row, "fsdp", "all-gather", "collective-permute") == pytest.approx(gathered, rel=0 if exact else 0.1)
    assert sent(row, "tensor", "all-gather") == 2 * residual * (tensor - 1) / tensor
    assert sent(row, "tensor", "reduce-scatter") == pytest.approx(2 * residual * (tensor - 1) / tensor, rel=0.02)
    assert row["bytes"]["arguments"] == pytest.approx(4 * weights / fsdp + 2 * residual / LAYERS / tensor, rel=0.03)


def plan(*flags):
    command = [sys.executable, str(ROOT / "scripts" / "plan.py"), *flags]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})


def test_the_command_searches(tmp_path):
    meshes = "('data=1,fsdp=2,tensor=1','data=1,fsdp=1,tensor=2')"
    settings = ["preset=gemma3_270m", "program=forward", "tokens=512", f"meshes={meshes}", f"workdir={tmp_path}"]
    done = plan("--search", "--config.target=v5e:1x2", *(f"--config.{setting}" for setting in settings))
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "plan.json").read_text())
    assert report["preset"] == "gemma3_270m" and len(report["rows"]) == 3
    assert all(row["fits"] and row["roofline_seconds"]["FLOPs"] > 0 for row in report["rows"])
    for words in (
        "  1. mesh=",
        "  3. mesh=",
        "of 15.75 (arguments",
        "an estimate and a lower bound, not a measurement",
    ):
        assert words in done.stdout


def test_the_command_says_when_nothing_fits(tmp_path):
    flags = ["--config.target=v5e:2x2", "--config.preset=gemma2_27b", f"--config.workdir={tmp_path}"]
    done = plan(*flags, "--search", "--config.meshes=('data=1,fsdp=4,tensor=1',)")
    assert (
        done.returncode == 1
        and "Nothing fits v5e:2x2: a chip has 15.75 GiB, and the leanest case needs " in done.stdout
    )
    block, *richer = json.loads((tmp_path / "plan.json").read_text())["rows"]
    assert block["needed_bytes"] > 15.75 * 2**30 and len(richer) == 2
    assert all(row["skipped"] == "save=block does not fit already" for row in richer)
