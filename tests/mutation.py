"""Counts how many small faults the tests catch: mutants, which are copies of the source with one random change.

    python tests/mutation.py --seed 27 --number 160 --jobs 2       # the quick tests of each mutant's file
    python tests/mutation.py --seed 27 --number 160 --step wide    # what survived: the quick tests around that file
    python tests/mutation.py --seed 27 --number 160 --step slow    # what survived: the slow tests of that file

The draw is uniform over all changes that `changes` finds, after one change to each file of TESTS. It leaves out
docstrings, annotations, imports, `__all__` and the texts of errors. Every result is written at once to
FOLDER/SEED.jsonl. The same command again goes on where it was stopped. `--again` runs all that survived every step so
far, with the tests as they are now. The last lines name the survivors, and count by folder.

Each mutant's tests run in a process that is forked after the libraries have been imported, up to the first failure. A
test that fails with a mutant must pass without it, or the tool stops. A mutant whose tests run out of time counts as
caught. Mutants share a folder of compiled programs.
"""

import argparse
import ast
import collections
import contextlib
import importlib
import itertools
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[1]
OP = "op/test_feed_forward op/test_chunks op/test_cpu test_calls"
CHECKPOINT = "checkpoint/test_huggingface checkpoint/test_malformed checkpoint/test_durability checkpoint/test_modes"
TOY = "scripts/test_train_toy scripts/test_byte_decoder scripts/test_workdir"
TESTS = {  # a source file, or all that no earlier row has: its tests in tests/, the most related first
    "gemma_mlp/op/api.py": "op/test_feed_forward test_calls op/test_weights test_sharding",
    "gemma_mlp/op/tpu*.py": "op/test_tpu test_sharding",
    "gemma_mlp/op/gpu*.py": "op/test_gpu",
    "gemma_mlp/op/choose.py": "op/test_tpu op/test_gpu test_calls",
    "gemma_mlp/op/backend.py": f"op/test_remat op/test_cpu op/test_tpu {OP}",
    "gemma_mlp/op/matmuls.py": f"op/test_cpu op/test_rounding {OP} op/test_weights",
    "gemma_mlp/op/cpu.py": f"op/test_cpu {OP}",
    "gemma_mlp/op/slices.py": "op/test_chunks op/test_weights test_sharding",
    "gemma_mlp/op/vjp.py": f"op/test_remat {OP} op/test_weights test_programs",
    "gemma_mlp/op/xla.py": f"op/test_remat {OP} op/test_weights test_sharding",
    "gemma_mlp/activations.py": "test_activations op/test_feed_forward",
    "gemma_mlp/block.py": "test_block test_checks test_shells",
    "gemma_mlp/nnx.py": "test_shells test_surgery test_weights_in_shells test_checks",
    "gemma_mlp/linen.py": "test_shells test_surgery test_weights_in_shells",
    "gemma_mlp/nnx_*.py": "test_weights_in_shells test_shells",
    "gemma_mlp/adopt.py": "test_adopt test_nnx_decoder",
    "gemma_mlp/params.py": "test_shells test_sharding test_calls test_weights_in_shells",
    "gemma_mlp/weights.py": "op/test_weights test_weights_in_shells",
    "gemma_mlp/mesh.py": "test_sharding test_calls test_programs op/test_tpu",
    "gemma_mlp/sharding.py": "test_sharding checkpoint/test_loading_onto_a_mesh",
    "gemma_mlp/checks.py": "test_checks test_calls",
    "gemma_mlp/config.py": "test_config test_calls test_weights_in_shells",
    "gemma_mlp/quantization.py": "op/test_weights test_weights_in_shells",
    "gemma_mlp/adapters.py": "op/test_weights test_weights_in_shells",
    "gemma_mlp/layouts/adapters.py": "layouts/test_adapters checkpoint/test_peft_adapters"
    " checkpoint/test_orbax_low_bit",
    "gemma_mlp/layouts/quantized.py": "layouts/test_quantized checkpoint/test_orbax_low_bit",
    "gemma_mlp/layouts/*.py": "layouts/test_layouts layouts/test_quantized checkpoint/test_orbax",
    "gemma_mlp/checkpoint/addresses.py": "checkpoint/test_addresses checkpoint/test_huggingface",
    "gemma_mlp/checkpoint/compressed.py": "checkpoint/test_compressed",
    "gemma_mlp/checkpoint/low_bit.py": "checkpoint/test_compressed checkpoint/test_gguf",
    "gemma_mlp/checkpoint/gguf_file.py": "checkpoint/test_gguf",
    "gemma_mlp/checkpoint/config_json.py": "checkpoint/test_read_config checkpoint/test_gemma_3n_and_4",
    "gemma_mlp/checkpoint/orbax.py": "checkpoint/test_orbax checkpoint/test_orbax_low_bit checkpoint/test_durability",
    "gemma_mlp/checkpoint/peft_adapters.py": "checkpoint/test_peft_adapters checkpoint/test_durability",
    "gemma_mlp/checkpoint/loading.py": f"checkpoint/test_dtypes checkpoint/test_loading_onto_a_mesh {CHECKPOINT}",
    "gemma_mlp/checkpoint/*.py": f"{CHECKPOINT} checkpoint/test_gemma_3n_and_4",
    "gemma_mlp/aot/hlo.py": "aot/test_hlo",
    "scripts/train_toy/*.py": f"{TOY} scripts/test_fine_tuning scripts/test_train_mesh",
    "scripts/byte_decoder/data.py": TOY,
    "scripts/byte_decoder/evaluation.py": f"scripts/test_byte_decoder {TOY}",
    "scripts/byte_decoder/training.py": f"scripts/test_byte_decoder {TOY}",
    "scripts/byte_decoder/language_model.py": f"scripts/test_byte_decoder {TOY}",
}
AROUND = {  # a folder: more quick tests for what survives those above
    "gemma_mlp/op": "op test_calls test_programs test_sharding test_block test_checks test_weights_in_shells",
    "gemma_mlp/layouts": "layouts checkpoint scripts/test_convert scripts/test_convert_low_bit",
    "gemma_mlp/checkpoint": "checkpoint scripts/test_convert scripts/test_convert_low_bit",
    "gemma_mlp/aot": "aot scripts/test_plan",
    "scripts/train_toy": "scripts/test_train_toy scripts/test_train_mesh scripts/test_fine_tuning scripts/test_cli",
    "scripts/byte_decoder": "scripts/test_byte_decoder scripts/test_compare_activations scripts/test_fine_tuning",
    "gemma_mlp": "test_shells test_calls test_programs test_sharding test_block test_checks test_weights_in_shells"
    " test_surgery test_adopt test_house op checkpoint/test_orbax checkpoint/test_huggingface layouts",
}
QUICK = "not slow and not needs_compilers"
MARKS = {"quick": QUICK, "wide": QUICK, "slow": "slow or needs_compilers"}
LIBRARIES = """jax flax optax chex jaxtyping numpy scipy pytest hypothesis safetensors.numpy orbax.checkpoint qwix gguf
    ml_collections tensorboardX matplotlib.pyplot grain jax.experimental.pallas.tpu jax.experimental.pallas.mosaic_gpu
"""
COMPARISONS = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "=="}
COMPARISONS |= {"is": "is not", "is not": "is", "in": "not in", "not in": "in"}
ARITHMETIC = {"+": "-", "-": "+", "*": "/", "/": "*", "//": "*", "%": "//", "**": "*", "|": "&", "&": "|", "<<": ">>"}
SYMBOLS = {
    **{ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!=", ast.Is: "is"},
    **{ast.IsNot: "is not", ast.In: "in", ast.NotIn: "not in", ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"},
    **{ast.FloorDiv: "//", ast.Mod: "%", ast.Pow: "**", ast.BitOr: "|", ast.BitAnd: "&", ast.LShift: "<<"},
}
# Functions whose result may stand for their argument, and methods whose result may stand for their object.
SAME_KIND = """abs barrier checkpoint_name constrain device_get ensure_finite exp float int known_weight
    optimization_barrier over_hidden psum residual_stream round_up sorted stop_gradient sum tuple vary_alike"""
SAME_KIND_METHODS = """absolute astype copy expanduser lower mean removeprefix removesuffix reshape resolve strip sum
    transpose"""
SECONDS = 300  # of processor time for the tests of one mutant
ERRORS = {"require", "explained", "describe"}  # functions with an error's texts; only require's condition is changed


def changed_nodes(tree):
    """Every node that a change may be made to."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom | ast.Raise | ast.JoinedStr):
            continue
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        if isinstance(node, ast.Assign | ast.AugAssign) and ast.unparse(node).startswith("__all__"):
            continue
        if isinstance(node, ast.Constant) and " " in str(node.value):
            continue  # a text, most often that of an error
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("TypeVar", "ParamSpec"):
            continue
        if isinstance(node, ast.arg) or (node is getattr(tree, "annotation", None)):
            continue
        if node is getattr(tree, "returns", None) and isinstance(tree, ast.FunctionDef):
            continue
        if isinstance(tree, ast.Call) and ast.unparse(tree.func) in ERRORS and node is not tree.args[0]:
            continue
        yield node
        yield from changed_nodes(node)


def replacements(node):
    """Yields (the node that is replaced, its new source)."""
    source = ast.unparse
    match node:
        case ast.Compare(left, [op], [right]):
            yield node, f"{source(left)} {COMPARISONS[SYMBOLS[type(op)]]} {source(right)}"
        case ast.BinOp(left, op, right) if type(op) in SYMBOLS:
            yield node, f"({source(left)} {ARITHMETIC[SYMBOLS[type(op)]]} {source(right)})"
        case ast.AugAssign(target, op, value) if type(op) in SYMBOLS:
            yield node, f"{source(target)} {ARITHMETIC[SYMBOLS[type(op)]]}= {source(value)}"
        case ast.BoolOp(op, values):
            other = " or " if isinstance(op, ast.And) else " and "
            yield node, "(" + other.join(f"({source(value)})" for value in values) + ")"
            for left_out in values:
                kept = [value for value in values if value is not left_out]
                yield node, f"({source(ast.BoolOp(op, kept) if len(kept) > 1 else kept[0])})"
        case ast.UnaryOp(ast.Not() | ast.USub(), operand):
            yield node, f"({source(operand)})"
        case ast.Constant(bool(value)):
            yield node, str(not value)
        case ast.Constant(int(value) | float(value)):
            yield from ((node, f"({value + step})") for step in (1, -1))
        case ast.Constant(str(value)):
            yield node, repr(value + "_")
        case ast.Expr(ast.Call()):
            yield node, "pass"
        case ast.If(test) | ast.IfExp(test):
            yield test, f"(not ({source(test)}))"
        case ast.comprehension(ifs=ifs):
            yield from ((test, "True") for test in ifs)
        case ast.Slice(lower, upper):
            yield from ((node, f":{source(upper) if upper else ''}") for _ in [lower] if lower)
            yield from ((node, f"{source(lower) if lower else ''}:") for _ in [upper] if upper)
        case ast.Break():
            yield node, "continue"
        case ast.Continue():
            yield node, "pass"
        case ast.Call(function, arguments, keywords):
            for first, second in itertools.pairwise(arguments):
                if isinstance(first, ast.Name) and isinstance(second, ast.Name):
                    other = {first: second, second: first}
                    yield node, source(ast.Call(function, [other.get(a, a) for a in arguments], keywords))
            for keyword in keywords:
                kept = [other for other in keywords if other is not keyword]
                yield node, source(ast.Call(function, arguments, kept))
            name = source(function).split(".")[-1]
            if name in SAME_KIND.split() and arguments:
                yield node, f"({source(arguments[-1 if name == 'ensure_finite' else 0])})"
            if name in SAME_KIND_METHODS.split() and isinstance(function, ast.Attribute):
                yield node, f"({source(function.value)})"


def changes(path):
    """All mutants of a file: {(line, what was there, what is there now): where that is in the file's bytes}."""
    whole = path.read_bytes()
    tree, starts = ast.parse(whole), [0]
    for line in whole.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found = {}
    for node in changed_nodes(tree):
        for old, new in replacements(node):
            start, end = starts[old.lineno - 1] + old.col_offset, starts[old.end_lineno - 1] + old.end_col_offset
            found[old.lineno, whole[start:end].decode(), new] = (start, end)
    return found


def changed_source(path, new, start, end):
    """The file's new source, or None if it is no Python or means the same."""
    whole = path.read_bytes()
    source = whole[:start] + new.encode() + whole[end:]
    with contextlib.suppress(SyntaxError):
        if ast.dump(ast.parse(source)) != ast.dump(ast.parse(whole)):
            return source


def draw(seed, number):
    """[(file, tests, (line, old, new), new source)]: one of each file, and the rest from all other changes alike."""
    rows, taken = [], set()
    for pattern, tests in TESTS.items():
        for path in sorted(set(ROOT.glob(pattern)) - taken):
            taken.add(path)
            rows += [[(path, tests, change, place) for change, place in changes(path).items()]]
    print(f"{sum(map(len, rows))} possible mutants of {sum(map(bool, rows))} files.", flush=True)
    rng, chosen, others = random.Random(seed), [], []
    for row in rows:
        rng.shuffle(row)
        others += row[1:]
    rng.shuffle(others)
    for path, tests, change, (start, end) in [*(row[0] for row in rows if row), *others]:
        if len(chosen) < number and (source := changed_source(path, change[2], start, end)):
            chosen.append((str(path.relative_to(ROOT)), tests, change, source))
    return chosen


def run_tests(copy, tests, *options):
    """pytest's exit status (None: it took too long), the test that failed first, and the error's last line."""
    log = copy.with_suffix(".log")
    if (child := os.fork()) == 0:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(copy)
        sys.path[:0] = [str(copy), str(copy / "scripts")]
        os.environ["PYTHONPATH"] = f"{copy}:{copy / 'scripts'}"
        import pytest

        general = ["-x", "-q", "-p", "no:cacheprovider", f"--basetemp={copy}.tmp"]
        general += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of plugins that LIBRARIES imported
        status = 99
        try:
            status = int(pytest.main([*general, *options, *tests]))
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(status)
    status, started = None, time.monotonic()
    while status is None and time.monotonic() - started < 10 * SECONDS:  # other programs use the processors, too
        done, code = os.waitpid(child, os.WNOHANG)
        status = os.waitstatus_to_exitcode(code) if done else None
        time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # and the processes that it left
    if status is None:
        os.waitpid(child, 0)
    lines = log.read_text(errors="replace").splitlines()
    failed = next((line.split(" ", 1)[1] for line in lines if line.startswith(("FAILED tests", "ERROR tests"))), "")
    return status, *(failed.split(" - ", 1) if " - " in failed else (failed, ""))


def tests_of(path, tests, step):
    """The names of the test files of a mutant, without their ends."""
    folder, files = ROOT / "tests", []
    for name in (AROUND[str(Path(path).parent)] if step == "wide" else tests).split():
        files += sorted((folder / name).glob("test_*.py")) or [folder / f"{name}.py"]
    return list(dict.fromkeys(str(file.relative_to(folder).with_suffix("")) for file in files))


def in_processes(function, items, copies):
    """Calls function(item, copy) for every item, in a process for each copy of the repository."""
    workers = []
    for job, copy in enumerate(copies):
        if worker := os.fork():
            workers.append(worker)
            continue
        try:
            for item in items[job :: len(copies)]:
                function(item, copy)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    statuses = [os.waitpid(worker, 0)[1] for worker in workers]
    if any(statuses):
        sys.exit("A process has ended early.")


def read(file):
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def append(file, result):
    with file.open("a") as lines:
        lines.write(json.dumps(result) + "\n")


def report(mutants, results):
    """Prints what survived so far, and a table of the numbers by folder."""
    counts = collections.defaultdict(collections.Counter)
    for path, _, change, _ in mutants:
        found = results.get((path, *change), {})
        if found and not any(result["caught"] for result in found.values()):
            print(f"survived {', '.join(found)}: {path}:{change[0]}: {change[1]!r} -> {change[2]!r}")
        for name in (str(Path(path).parent), "all"):
            counts[name]["run"] += bool(found)
            counts[name]["mutants"] += 1
            counts[name]["quick"] += any(found.get(step, {}).get("caught") for step in ("quick", "wide"))
            counts[name]["caught"] += any(result["caught"] for result in found.values())
    print(f"{'folder':24} {'mutants':>8} {'run':>8} {'by quick':>9} {'by all':>8}")
    for name, row in counts.items():
        print(f"{name:24} {row['mutants']:8} {row['run']:8} {row['quick']:9} {row['caught']:8}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=27)
    parser.add_argument("--number", type=int, default=160)
    parser.add_argument("--step", choices=MARKS, default="quick")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--again", action="store_true", help="only what survived all steps, with the tests as they are")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "mutants")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "PLATFORMS": "cpu",
        "COMPILATION_CACHE_DIR": str(args.folder / "compiled"),
        "DISABLE_MOST_OPTIMIZATIONS": 1,
    }
    settings |= {"PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": 0, "PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": -1}
    os.environ.update({f"JAX_{name}": str(value) for name, value in settings.items()})
    mutants, file = draw(args.seed, args.number), args.folder / f"{args.seed}.jsonl"

    def results():
        """{mutant: {step: its last result}}"""
        found = collections.defaultdict(dict)
        for result in read(file):
            found[result["file"], result["line"], result["old"], result["new"]][result["step"]] = result
        return found

    before, pending = results(), []
    for path, tests, change, source in mutants:
        found = before[path, *change]
        if not any(result["caught"] for result in found.values()) and (args.again or args.step not in found):
            pending.append((path, tests_of(path, tests, args.step), change, source))
    print(f"{len(pending)} mutants to run with the step {args.step}.", flush=True)
    for name in LIBRARIES.split():
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(name)
    copies = [args.folder / f"copy{job}" for job in range(args.jobs)]
    for copy in copies:
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(ROOT if copy == copies[0] else copies[0], copy, ignore=shutil.ignore_patterns(".*"))
        if copy == copies[0]:
            run_tests(copy, {f"tests/{name}.py" for _, tests, *_ in pending for name in tests}, "--collect-only")
    sys.dont_write_bytecode = True
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    known = set()  # tests that pass on the source as it is

    def run(mutant, copy):
        path, tests, (line, old, new), source = mutant
        unchanged, started = (copy / path).read_bytes(), time.monotonic()
        (copy / path).write_bytes(source)
        status, test, error = run_tests(copy, [f"tests/{name}.py" for name in tests], "-m", MARKS[args.step])
        (copy / path).write_bytes(unchanged)
        if status == 99:
            raise RuntimeError(f"pytest did not run: see {copy.with_suffix('.log')}.")
        if test and test not in known:
            if run_tests(copy, [test], "-m", "", *([] if "::" in test else ["--collect-only"]))[0] != 0:
                raise RuntimeError(f"{test} must pass on the source as it is.")
            known.add(test)
        result = {"file": path, "line": line, "old": old, "new": new, "step": args.step, "status": status}
        result |= {"caught": status not in (0, 5), "test": test, "error": error[:200]}
        append(file, result | {"seconds": round(time.monotonic() - started)})

    random.Random(0).shuffle(pending)
    in_processes(run, pending, copies)
    report(mutants, results())


if __name__ == "__main__":
    main()
