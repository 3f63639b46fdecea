"""Measures time, accuracy and memory of the feed-forward at the size of a Gemma 2 model.

    python scripts/benchmark.py --config=configs/benchmark.py:2b        # or :9b, :27b
    JAX_PLATFORMS=cpu python scripts/benchmark.py --config=configs/benchmark.py:2b --config.sections="('memory',)"

It has five sections: time, calls, accuracy, memory and low_bit, which is for decoding, quantised weights and adapters.
It prints tables of each, and writes benchmark.json and benchmark.png to config.workdir, which is runs/benchmark-2b for
2b. The JSON file is whole after each row, so you may stop the benchmark at any moment. It then starts over.

Times are those of JAX's default device. Let nothing else run meanwhile. Before a contestant is timed, its result is
compared with the plain formula in float32. If it is wrong or fails, it is reported and left out. With the `peers`
extra, Hugging Face's module on PyTorch is timed too. Memory is what the compiler for this CPU reports. With the `aot`
extra and JAX_PLATFORMS=cpu the compilers for TPUs and the H200 report theirs too.

scripts/benchmark/README.md explains the tables and has results.
"""

import importlib.util
import json
import platform
from pathlib import Path

import cli
import jax
from benchmark import accuracy, calls, figure, low_bit, memory, timing
from interruption import interruptible
from tqdm import tqdm
from workdir import make_workdir, write_atomically

from gemma_mlp import PRESETS

CONFIG = cli.config("benchmark", "It says what to measure.", size="2b")


def main():
    config = CONFIG.value
    cli.require_names("sections", config.sections, SECTIONS)
    cli.require_names("preset", [config.preset], PRESETS)
    cli.require_names("dtypes", config.dtypes, ("bfloat16", "float32"))
    cli.require_positive(config.to_dict())
    workdir = Path(config.workdir)
    make_workdir(workdir)
    report = {
        "preset": config.preset,
        "device": jax.devices()[0].device_kind,
        "versions": f"JAX {jax.__version__}, Python {platform.python_version()}",
    }
    print(f"{config.preset}: {report['device']}, {report['versions']}")
    with interruptible(lambda: saved(workdir, [name for name in SECTIONS if name in report])):
        for name in config.sections:
            for _ in SECTIONS[name](config, report):  # each step has added something
                write_atomically(workdir / "benchmark.json", json.dumps(report, indent=2))
    drawn = figure.draw(workdir / "benchmark.png", report)
    print(f"\nWritten to {workdir}: benchmark.json{', benchmark.png' if drawn else ''}")


def saved(workdir, begun):
    """What an interrupted benchmark has saved, for people. The last section may lack rows."""
    done = f"{workdir}/benchmark.json holds rows of {', '.join(begun)}." if begun else "No row is finished."
    return f"{done} The same command starts over; --config.sections measures some sections alone."


def time(config, report):
    preset = PRESETS[config.preset]
    has_peer = all(map(importlib.util.find_spec, ("torch", "transformers")))
    refusals = {dtype: timing.kernels_refuse(preset, dtype) for dtype in config.dtypes}
    present = {
        "pallas": None in refusals.values(),
        "pallas_gate_up": None in refusals.values(),
        "tokamax": timing.tokamax_layer() is not None,
        "torch": has_peer,
    }
    contestants = [name for name in timing.CONTESTANTS if present.get(name, True)]
    for dtype, reason in refusals.items():
        if reason is not None:
            print(f"\nThe kernels are left out in {dtype}: {reason}")
    if not has_peer:
        print("\nHugging Face's module is left out: torch and transformers are not installed.")
    print("\nThe bare matmuls in milliseconds, and the others relative to the bare matmuls")
    print(row("dtype", "pass", "tokens", "matmuls", *contestants, "TFLOP/s", "GB/s"))
    report["ceiling"] = {dtype: timing.ceiling(dtype, config.rounds) for dtype in config.dtypes}
    report["time"] = rows = []
    yield
    with tqdm(total=2 * len(config.dtypes) * len(config.tokens), leave=False) as bar:
        for dtype, tokens in ((dtype, tokens) for dtype in config.dtypes for tokens in config.tokens):
            for measured in timing.measure(preset, dtype, tokens, config.rounds):
                flops, moved = timing.work(preset, dtype, tokens, measured["pass"])
                ours = [measured[name] for name in ("ours", "input", "gate_up") if name in measured]
                reached = {"TFLOP/s": flops / min(ours) / 1e9, "GB/s": moved / min(ours) / 1e6} if ours else {}
                rows.append({"dtype": dtype, "tokens": tokens, **measured, **reached})
                ratios = (ratio(measured, name) for name in contestants)
                numbers = (f"{number:.2f}" for number in reached.values())
                tqdm.write(row(dtype, measured["pass"], tokens, f"{measured['matmuls']:.2f}", *ratios, *numbers))
                for name, reason in measured["left_out"].items():
                    tqdm.write(f"{name} is left out: {reason}")
                bar.update()
                yield
    for dtype, best in report["ceiling"].items():
        print(f"This device's best in {dtype}: {best['TFLOP/s']:.2f} TFLOP/s, {best['GB/s']:.0f} GB/s")


def ratio(measured, name):
    return f"{measured[name] / measured['matmuls']:.2f}" if name in measured else ""


def overhead(config, report):
    print("\nWhat a call costs before any arithmetic: milliseconds, and ours relative to theirs")
    print(row("ours", "theirs", "ratio"), " what")
    report["calls"] = rows = []
    for measured in tqdm(calls.measure(config.call_layers, config.rounds), total=8, leave=False):
        rows.append(measured)
        numbers = (f"{measured[name]:.2f}" for name in ("ours", "theirs", "ratio"))
        tqdm.write(f"{row(*numbers)}  {measured['what']}")
        yield


def errors(config, report):
    print("\nRelative L2 error of bfloat16 against float64, times 1000")
    print(row("tokens", "layer", *accuracy.RESULTS))
    report["accuracy"] = rows = []
    for tokens in config.accuracy_tokens:
        for measured in tqdm(accuracy.measure(PRESETS[config.preset], tokens), total=4, leave=False):
            rows.append(measured)
            if "left_out" in measured:
                tqdm.write(f"{measured['layer']} is left out: {measured['left_out']}")
            else:
                numbers = (f"{1000 * measured[name]:.2f}" for name in accuracy.RESULTS)
                tqdm.write(row(tokens, measured["layer"], *numbers))
            yield


def stacks(config, report):
    compilers, missing = memory.compilers()
    print(f"\nMiB of temporary memory of a gradient: bfloat16, {config.memory_tokens} tokens, {config.layers} layers")
    for name, reason in missing.items():
        print(f"{name} is left out: {reason}")
    print(row("stack", "layer", "chunk_size", *compilers))
    sizes = {"tokens": config.memory_tokens, "layers": config.layers, "chunk_size": config.chunk_size}
    report["memory"] = rows = []
    for measured in tqdm(memory.measure(config.preset, compilers, **sizes), leave=False):
        rows.append(measured)
        numbers = (mebibytes(measured, name) for name in compilers)
        tqdm.write(row(measured["stack"], measured["layer"], measured["chunk_size"] or "", *numbers))
        yield


def low_bits(config, report):
    print("\nMilliseconds with weights in few bits and adapters, and relative to dense weights: bfloat16")
    print(row("pass", "tokens", "ms", "ratio", "weights, MiB", "GB/s"), " weights")
    measurement = low_bit.measure(config.preset, config.low_bit_tokens, config.adapter_tokens, config.rounds)
    report["low_bit"] = {"time": (times := []), "memory": (memories := [])}
    for measured in tqdm(measurement, leave=False):
        times.append(measured)
        digits = {"ms": 3, "ratio": 2, "MiB": 1, "GB/s": 1}
        numbers = [f"{measured[name]:.{digits[name]}f}" if name in measured else "" for name in digits]
        about = measured["weights"]
        if "left_out" in measured:
            about = f"{about} is left out: {measured['left_out']}"
        tqdm.write(f"{row(measured['pass'], measured['tokens'], *numbers)}  {about}")
        yield

    compilers, missing = memory.compilers(low_bit.COMPILERS)
    print(f"\nTheir MiB of temporary memory + arguments; gradients of {config.layers} scanned layers")
    for name, reason in missing.items():
        print(f"{name} is left out: {reason}")
    print(row("pass", "tokens", *compilers), " weights")
    sizes = {"tokens": config.low_bit_tokens, "gradient_tokens": config.memory_tokens, "layers": config.layers}
    for measured in tqdm(low_bit.measure_memory(config.preset, compilers, **sizes), leave=False):
        memories.append(measured)
        sums = (" + ".join(f"{mib:.0f}" for mib in measured[name] or ()) or "too large" for name in compilers)
        tqdm.write(f"{row(measured['pass'], measured['tokens'], *sums)}  {measured['weights']}")
        yield


def mebibytes(measured, name):
    if name not in measured:
        return ""
    return "too large" if measured[name] is None else f"{measured[name]:.0f}"


def row(*cells):
    return "".join(f"{cell!s:>15}" for cell in cells)


SECTIONS = {"time": time, "calls": overhead, "accuracy": errors, "memory": stacks, "low_bit": low_bits}

if __name__ == "__main__":
    cli.run(main)
