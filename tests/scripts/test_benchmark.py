"""The benchmark times the matmuls of the layer, and its tables and figure have all their rows."""

import json
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from benchmark import calls, checking, figure, low_bit, memory, timing

from gemma_mlp import MLPConfig, MLPParams, aot
from gemma_mlp.testing import stacks
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
    passes = [(tokens, which) for tokens in (1, 3) for which in ("forward", "gradient")]
    assert [(row["tokens"], row["pass"]) for row in report["time"]] == passes
    assert [row["layer"] for row in report["accuracy"]] == ["floor", "input", "gate_up", "plain"]
    assert report["ceiling"]["float32"]["GB/s"] > 0
    assert len(report["memory"]) == (18 if list(compilers) == ["CPU"] else 24)  # kernels have rows for accelerators
    assert len(report["low_bit"]["time"]) == 17 and len(report["low_bit"]["memory"]) == 13
    assert ("H200 Triton is left out" in output) == ("H200 Triton" not in compilers)


@pytest.mark.slow
def test_low_bit_rows_say_what_is_read():
    *forward, first, second, third, fourth, last = low_bit.measure("gemma3_270m", (1, 3), 5, 1)
    kinds = [*low_bit.KINDS, "dense, adapters", "dense, plain formula"]
    assert [(row["tokens"], row["weights"]) for row in forward] == [(t, kind) for t in (1, 3) for kind in kinds]
    weights = 3 * 640 * 2048
    bits = [row["MiB"] * 2**20 * 8 / weights for row in forward]
    scales = 16 * (2 * 2048 + 640) / weights  # one for each channel
    adapters = 16 * 3 * 16 * (2048 + 640) / weights  # of rank 16
    assert bits == pytest.approx(2 * [16, 8 + scales, 4 + scales, 4 + 16 / 32, 16 + adapters, 16])
    for row in forward:
        assert row["GB/s"] == pytest.approx(row["MiB"] * 2**20 / row["ms"] / 1e6)
    gradients = [first, second, third, fourth, last]
    assert [row["weights"] for row in gradients] == ["dense", *(f"{kind}, adapters" for kind in low_bit.KINDS)]
    assert all(row["ratio"] == row["ms"] / first["ms"] for row in gradients)


def test_errors_are_the_largest_of_all_arrays():
    rng = np.random.default_rng(0)
    expected = [rng.standard_normal(shape) for shape in [(3, 5), (7,), (2, 3, 4)]]
    result = [a + scale * rng.standard_normal(a.shape) for a, scale in zip(expected, (0.01, 0.3, 0.02))]
    error = checking.relative_error(*(jax.tree.map(jnp.float32, tree) for tree in (result, expected)))
    assert error == pytest.approx(relative_error(result[1], expected[1]), rel=1e-5)


def raising(params, x):
    raise RuntimeError("no such kernel")


@pytest.mark.slow
def test_wrong_and_failing_contestants_are_reported_and_not_timed(monkeypatch):
    layers_of = timing.layers_of
    broken = {
        "wrong": lambda params, x: 1.03 * timing.plain(params, x),
        "nan": lambda params, x: jnp.nan * timing.plain(params, x),
        "raising": raising,
    }
    monkeypatch.setattr(timing, "layers_of", lambda *args: {**layers_of(*args), **broken, "pallas": broken["wrong"]})
    forward, gradient = timing.measure(CONFIG, "float32", 3, 1)
    assert {"matmuls", "ours", "plain"} <= set(forward) and forward["left_out"].keys() == {"pallas"}
    assert {"matmuls", "input", "gate_up", "plain"} <= set(gradient)
    assert set(gradient["errors"]) == {"input", "gate_up", "plain"} and max(gradient["errors"].values()) < 1e-5
    assert gradient["left_out"].keys() == {*broken, "pallas"} and not gradient["left_out"].keys() & gradient.keys()
    assert gradient["left_out"]["wrong"].startswith("WRONG: its relative error is 0.03")
    assert gradient["left_out"]["nan"].startswith("WRONG: its relative error is nan")
    assert gradient["left_out"]["raising"] == "RuntimeError: no such kernel"


def test_tokamax_takes_part_on_a_gpu_if_it_is_installed(monkeypatch):
    calls = []

    def gated_linear_unit(x, weights, *, activation):
        calls.append(x.shape)
        return activation(x @ weights[0]) * (x @ weights[1])

    monkeypatch.setitem(sys.modules, "tokamax", types.SimpleNamespace(gated_linear_unit=gated_linear_unit))
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert "tokamax" not in timing.layers_of(CONFIG, "float32")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    params, x = MLPParams.init(CONFIG, jax.random.key(0)), jax.random.normal(jax.random.key(1), (3, 16))
    result = timing.layers_of(CONFIG, "float32")["tokamax"](params, x)
    assert calls == [(3, 16)] and relative_error(result, np.float64(timing.plain(params, x))) < 1e-6
    monkeypatch.setitem(sys.modules, "tokamax", None)  # not installed
    assert "tokamax" not in timing.layers_of(CONFIG, "float32")


def test_an_accelerators_bare_matmuls_are_one_program(monkeypatch):
    params, x = MLPParams.init(CONFIG, jax.random.key(0)), jax.random.normal(jax.random.key(1), (5, 16))
    on_cpu = timing.bare_matmuls(params, x)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for one_by_one, together in zip(on_cpu, timing.bare_matmuls(params, x)):
        program = together.func.lower(*together.args).as_text()
        assert program.count("stablehlo.dot_general") == len(one_by_one())
        for expected, result in zip(one_by_one(), together(), strict=True):
            np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)


def wrong(layer):
    return lambda params, x: 1.05 * layer(params, x)


@pytest.mark.slow
def test_low_bit_rows_of_layers_in_a_row(monkeypatch, quick_to_compile):
    """As on an accelerator, which has eight. Each layer is compared, and wrong ones are not timed."""
    raced, layer = {}, low_bit.make_layer

    def race(contestants, rounds):
        raced.update(contestants)
        return dict.fromkeys(contestants, 6.0)

    monkeypatch.setattr(timing, "race", race)
    monkeypatch.setattr(stacks, "PRESETS", {"tiny": MLPConfig(64, 128, dtype="bfloat16")})
    monkeypatch.setattr(low_bit, "KINDS", ("dense", "int8"))
    monkeypatch.setattr(low_bit, "in_a_row", lambda: 2)
    monkeypatch.setattr(low_bit, "make_layer", lambda c: layer(c) if c.weight_dtype is None else wrong(layer(c)))
    rows = list(low_bit.measure("tiny", (3,), 3, 1))
    assert [row["weights"] for row in rows if "left_out" in row] == ["int8", "int8, adapters"]
    for row in rows:
        if "left_out" in row:
            assert row["left_out"].startswith("WRONG: its relative error is 0.0")
            assert not {"ms", "ratio", "GB/s"} & set(row)
        else:
            assert row["ms"] == (3 if row["pass"] == "forward" else 6) and row["ratio"] == 1 and row["error"] < 0.01
    assert rows[0]["GB/s"] == pytest.approx(3 * 64 * 128 * 2 / 3e-3 / 1e9)
    stack, _ = raced["dense, plain formula"].args
    assert len(stack) == len(raced["dense, plain formula"]()) == 2
    first, second = (np.float32(params.gate_proj) for params in stack)
    assert (first != second).mean() > 0.9  # one layer twice would be in the cache


def test_low_bit_rows_without_dense_weights_have_no_ratio():
    one = jnp.ones((2, 2))
    contestants = {"dense": lambda: 2 * one, "int8": lambda: one}
    dense, int8 = low_bit.race("forward", 1, contestants, dict.fromkeys(contestants, lambda _: one), 1)
    assert "left_out" in dense and int8["ms"] > 0 and "ratio" not in int8


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


def test_a_benchmark_that_is_cut_off_leaves_the_rows_so_far(tmp_path):
    settings = ["preset=gemma3_270m", f"accuracy_tokens={(1,) * 1000}", "sections=('accuracy',)"]
    flags = [f"--config.{setting}" for setting in (*settings, f"workdir={tmp_path}")]
    command = [sys.executable, str(ROOT / "scripts" / "benchmark.py"), f"--config={ROOT}/configs/benchmark.py:2b"]
    process = subprocess.Popen([*command, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    report = {}
    try:
        deadline = time.monotonic() + 120
        while not report.get("accuracy") and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.05)
            if (tmp_path / "benchmark.json").exists():
                report = json.loads((tmp_path / "benchmark.json").read_text())  # whole whenever it is read
    finally:
        process.kill()
        process.wait()
    report = json.loads((tmp_path / "benchmark.json").read_text())
    assert report["device"] == jax.devices()[0].device_kind
    assert 0 < len(report["accuracy"]) < 4000 and report["accuracy"][0]["layer"] == "floor"


def test_calls_alone_have_no_figure(tmp_path):
    assert not figure.draw(tmp_path / "benchmark.png", {"calls": [{"ratio": 1.0}]})
    assert not list(tmp_path.iterdir())


def test_an_unknown_section_is_explained():
    command = [sys.executable, str(ROOT / "scripts" / "benchmark.py"), "--config.sections=('speed',)"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (
        done.returncode != 0 and "config.sections must be among time, calls, accuracy, memory, low_bit." in done.stderr
    )
