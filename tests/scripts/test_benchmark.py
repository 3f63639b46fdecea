"""The benchmark times the matmuls of the layer, and its tables and figure have all their rows."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from benchmark import calls, figure, low_bit, memory, timing

from gemma_mlp import MLPConfig, MLPParams, aot
from gemma_mlp.testing.oracle import relative_error

ROOT = Path(__file__).parents[2]
CONFIG = MLPConfig(16, 64)
AXES = [timing.NO_TRANSPOSE, timing.TRANSPOSE_WEIGHT, timing.OVER_TOKENS]


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("axes", AXES, ids=str)
def test_every_form_of_a_matmul_is_that_matmul(axes, tokens):
    rng = np.random.default_rng(0)
    a = rng.standard_normal((tokens, 8))
    b = rng.standard_normal({timing.NO_TRANSPOSE: (8, 4), timing.TRANSPOSE_WEIGHT: (4, 8)}.get(axes, (tokens, 4)))
    expected = np.tensordot(a, b, ([axes[0]], [axes[1]]))
    forms = list(timing.forms_of(jnp.float32(a), jnp.float32(b), axes))
    assert len(forms) >= 2
    for form in forms:
        np.testing.assert_allclose(form(jnp.float32(a), jnp.float32(b)), expected, rtol=1e-5, atol=1e-6)


def test_a_forward_pass_has_three_matmuls_and_a_gradient_nine():
    params = MLPParams.init(CONFIG, jax.random.key(0))
    forward, gradient = timing.bare_matmuls(params, jnp.ones((5, 16)))
    hidden, residual, weight = (5, 64), (5, 16), (16, 64)
    assert [a.shape for a in forward()] == [hidden, hidden, residual]
    expected = [hidden, hidden, residual, hidden, residual, residual, weight, weight, weight[::-1]]
    assert [a.shape for a in gradient()] == expected
    # A matmul takes 2 FLOPs times its three sizes. A gradient has nine matmuls.
    assert timing.work(CONFIG, "float32", 5, "gradient")[0] == 9 * 2 * 5 * 16 * 64
    assert timing.work(CONFIG, "bfloat16", 5, "forward") == (3 * 2 * 5 * 16 * 64, 2 * (3 * 16 * 64 + 2 * 5 * 16))


def test_a_race_takes_turns_and_gives_medians(monkeypatch):
    seconds = {"first": iter([0.001, 0.009, 0.002]), "second": iter([0.004, 0.004, 0.020])}
    turns = []

    def clock(call, repeats):
        turns.append(call())
        return next(seconds[turns[-1]])

    monkeypatch.setattr(timing, "clock", clock)
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    times = timing.race({name: lambda name=name: name for name in seconds}, 3)
    assert times == pytest.approx({"first": 2, "second": 4})  # milliseconds
    assert turns == ["first", "second"] * 3


@pytest.mark.slow
def test_this_machines_compiler_reports_memory_for_every_row():
    sizes = {"tokens": 2048, "layers": 4, "chunk_size": 256}
    rows = list(memory.measure("gemma3_270m", {"CPU": ("cpu", None)}, **sizes))
    assert len(rows) == 3 * 6 and all(row["CPU"] > 0 for row in rows)
    scanned = {(row["layer"], row["chunk_size"]): row["CPU"] for row in rows if row["stack"] == "scanned"}
    assert scanned["input", None] < scanned["gate_up", None] < scanned["plain", None]


def test_a_program_that_does_not_fit_has_an_empty_cell(monkeypatch):
    def gradient_bytes(*args, **options):
        raise aot.DoesNotFit(2**40)

    monkeypatch.setattr(memory, "gradient_bytes", gradient_bytes)
    rows = list(memory.measure("gemma3_270m", {"CPU": ("cpu", None)}, tokens=1, layers=1, chunk_size=1))
    assert len(rows) == 3 * 6 and all(row["CPU"] is None for row in rows)


def run_benchmark(workdir, *settings):
    """(standard output, report) of the command at a small size."""
    small = ["preset=gemma3_270m", "tokens=(1,3)", "rounds=1", "accuracy_tokens=(3,)", "memory_tokens=128"]
    flags = [f"--config.{setting}" for setting in (*small, f"workdir={workdir}", *settings)]
    command = [sys.executable, str(ROOT / "scripts" / "benchmark.py"), f"--config={ROOT}/configs/benchmark.py:2b"]
    done = subprocess.run([*command, *flags], check=True, capture_output=True, text=True)
    assert "benchmark.png" in done.stdout and (workdir / "benchmark.png").read_bytes().startswith(b"\x89PNG")
    return done.stdout, json.loads((workdir / "benchmark.json").read_text())


def test_the_command_measures_time_and_accuracy(tmp_path):
    _, report = run_benchmark(tmp_path, "sections=('time','accuracy')", "dtypes=('float32',)")
    passes = [(tokens, which) for tokens in (1, 3) for which in ("forward", "gradient")]
    assert [(row["tokens"], row["pass"]) for row in report["time"]] == passes
    assert [row["layer"] for row in report["accuracy"]] == ["floor", "input", "gate_up", "plain"]
    assert report["ceiling"]["float32"]["GB/s"] > 0


@pytest.mark.promotes  # plain formulas rely on it
def test_what_calls_are_compared_with_computes_the_same():
    x = jax.random.normal(jax.random.key(1), (2, 16, 64), "bfloat16")
    params = calls.MLPBlockParams.init(calls.CONFIG, jax.random.key(0))
    ours, plain = (np.float64(layer(params, x)) for layer in (calls.ours, calls.plain))
    assert relative_error(ours, plain) < 0.01


@pytest.mark.slow
def test_the_command_with_all_sections(tmp_path):
    output, report = run_benchmark(tmp_path, "dtypes=('float32',)", "call_layers=2", "layers=2", "adapter_tokens=5")
    names = [row["what"] for row in report["calls"]]
    assert len(names) == len(set(names)) == 8
    assert names[-2:] == ["lowering 2 unrolled layers", "compiling 2 unrolled layers"]
    for row in report["calls"]:
        assert row["ratio"] == pytest.approx(row["ours"] / row["theirs"])  # there is one round
    compilers = memory.compilers()[0]
    assert len(report["time"]) == 4 and len(report["accuracy"]) == 4
    assert len(report["memory"]) == (18 if list(compilers) == ["CPU"] else 24)  # kernels have rows for accelerators
    assert len(report["low_bit"]["time"]) == len(report["low_bit"]["memory"]) == 13
    assert ("H200 Triton is left out" in output) == ("H200 Triton" not in compilers)


@pytest.mark.slow
def test_low_bit_rows_say_what_is_read():
    *forward, first, second, third, fourth, last = low_bit.measure("gemma3_270m", (1, 3), 5, 1)
    assert [(row["tokens"], row["weights"]) for row in forward] == [(t, kind) for t in (1, 3) for kind in low_bit.KINDS]
    weights = 3 * 640 * 2048
    bits = [row["MiB"] * 2**20 * 8 / weights for row in forward]
    scales = 16 * (2 * 2048 + 640) / weights  # one for each channel
    assert bits == pytest.approx(2 * [16, 8 + scales, 4 + scales, 4 + 16 / 32])
    for row in forward:
        assert row["GB/s"] == pytest.approx(row["MiB"] * 2**20 / row["ms"] / 1e6)
    gradients = [first, second, third, fourth, last]
    assert [row["weights"] for row in gradients] == ["dense", *(f"{kind}, adapters" for kind in low_bit.KINDS)]
    assert all(row["ratio"] == row["ms"] / first["ms"] for row in gradients)


def test_wrong_low_bit_results_are_not_timed(monkeypatch):
    exact = low_bit.exact
    monkeypatch.setattr(low_bit, "exact", lambda params, x: 1.03 * exact(params, x))
    with pytest.raises(ValueError, match="with weights 'dense' must be within"):
        next(low_bit.measure("gemma3_270m", (1,), 1, 1))


@pytest.mark.slow
def test_low_bit_memory_has_arguments():
    sizes = {"tokens": (1,), "gradient_tokens": 64, "layers": 2}
    rows = list(low_bit.measure_memory("gemma3_270m", {"CPU": ("cpu", None)}, **sizes))
    assert [row["weights"] for row in rows[4:]] == ["dense", *(f"{kind}, adapters" for kind in low_bit.KINDS)]
    weights, x = 3 * 640 * 2048 * 2, 2 * 640
    adapters, stack_x = 2 * 3 * 16 * (640 + 2048) * 2, 2 * 64 * 640
    arguments = [row["CPU"][1] * 2**20 for row in rows]
    assert arguments[:2] == [weights + x, weights / 2 + x + 2 * (2 * 2048 + 640)]
    assert arguments[4:6] == [2 * weights + stack_x, 2 * weights + stack_x + adapters]


def test_calls_alone_have_no_figure(tmp_path):
    assert not figure.draw(tmp_path / "benchmark.png", {"calls": [{"ratio": 1.0}]})
    assert not list(tmp_path.iterdir())


def test_an_unknown_section_is_explained():
    command = [sys.executable, str(ROOT / "scripts" / "benchmark.py"), "--config.sections=('speed',)"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (
        done.returncode != 0 and "config.sections must be among time, calls, accuracy, memory, low_bit." in done.stderr
    )
