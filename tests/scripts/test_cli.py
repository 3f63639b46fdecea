"""What the five commands have in common: the help of their settings, and one line for an error or an interruption."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import cli
import pytest
import workdir
from absl import flags
from interruption import interruptible

from tests.scripts import toy
from tests.support.configs import FOLDER, get_config

ROOT = Path(__file__).parents[2]
NAMES = ["train_toy", "benchmark", "plan", "compare_activations"]
OTHER_SIZE = {"benchmark": "27b", "plan": "27b", "compare_activations": "smoke"}


def command(name, *arguments):
    return [sys.executable, str(ROOT / "scripts" / f"{name}.py"), *map(str, arguments)]


def run(name, *arguments):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "COLUMNS": "120"}
    return subprocess.run(command(name, *arguments), capture_output=True, text=True, env=environment)


class TestFields:
    @pytest.mark.parametrize("name", NAMES)
    def test_every_field_has_its_default_and_one_line_beside_it(self, name):
        fields = cli.read_fields(str(FOLDER / f"{name}.py"))
        values = get_config(name)
        assert {field.split(".")[0] for field in fields} == set(values)
        for field, (default, about) in fields.items():
            value = values
            for part in field.split("."):
                value = value[part]
            assert value == default
            assert about and "\n" not in about and len(about) < 100, field

    @pytest.mark.parametrize(("name", "size"), OTHER_SIZE.items())
    def test_another_size_has_its_own_defaults(self, name, size):
        file = str(FOLDER / f"{name}.py")
        usual, other = cli.read_fields(file), cli.read_fields(f"{file}:{size}")
        assert usual.keys() == other.keys()
        assert usual["workdir"].default != other["workdir"].default == f"runs/{name}-{size}"

    def test_a_file_that_is_not_there_is_explained(self):
        with pytest.raises(ValueError, match=r"--config must name a file of settings. Got: 'absent.py'\."):
            cli.read_fields("absent.py:2b")

    def test_the_file_is_found_on_the_command_line(self):
        for given in (["--config=a.py:2b"], ["-config", "a.py:2b"], ["--config.steps=3", "--config", "a.py:2b"]):
            assert cli._chosen_file(["script.py", *given]) == "a.py:2b"
        assert cli._chosen_file(["script.py", "--config.steps=3"]) is None


class TestEndings:
    @pytest.mark.parametrize(
        ("error", "message"),
        [
            (ValueError("A must be 1. Got: 2.\nFix: pass 1."), "A must be 1. Got: 2. Fix: pass 1."),
            (FloatingPointError("X. Got: nan. Fix: y."), "X. Got: nan. Fix: y."),
            (OSError(28, "No space left on device"), "OSError: [Errno 28] No space left on device"),
            (flags.Error("no such flag"), "Error: no such flag"),
        ],
    )
    def test_an_error_that_can_be_mended_is_one_line(self, error, message):
        with pytest.raises(SystemExit) as caught, cli.errors_in_one_line():
            raise error
        assert caught.value.code == message  # Python prints it to stderr and exits with status 1

    def test_a_bug_keeps_its_traceback(self):
        with pytest.raises(ValueError, match="shapes"), cli.errors_in_one_line():
            raise ValueError("shapes differ")

    def test_an_interruption_is_one_line_and_status_130(self, capsys):
        saved = iter(["Nothing yet.", "Step 5 is saved."])
        with pytest.raises(SystemExit) as caught, interruptible(lambda: next(saved)):
            assert next(saved) == "Nothing yet."  # what is saved is asked for after the interruption
            raise KeyboardInterrupt
        assert caught.value.code == 130
        assert capsys.readouterr().err == "\nInterrupted. Step 5 is saved.\n"

    def test_an_error_on_the_way_out_of_an_interruption_is_no_error(self, capsys):
        with pytest.raises(SystemExit) as caught, cli.errors_in_one_line(), interruptible(lambda: "Saved."):
            try:
                raise KeyboardInterrupt
            finally:
                raise RuntimeError("a library could not close its file")
        assert caught.value.code == 130
        assert capsys.readouterr().err == "\nInterrupted. Saved.\n"

    def test_an_error_without_an_interruption_stays_one(self):
        with pytest.raises(RuntimeError, match="a bug"), interruptible(lambda: "Saved."):
            raise RuntimeError("a bug")


class TestValues:
    def test_the_nearest_name_is_suggested(self):
        known = {"time": 0, "memory": 1}
        cli.require_names("sections", ("memory",), known)
        with pytest.raises(ValueError, match=r"among time, memory\. Got: memry\. Fix: use 'memory', or another"):
            cli.require_names("sections", ("time", "memry"), known)
        with pytest.raises(ValueError, match=r"Got: 7\. Fix: use one of these names"):
            cli.require_names("sections", (7,), known)
        with pytest.raises(ValueError, match=r"Got: no name"):
            cli.require_names("sections", (), known)

    def test_whole_numbers_are_positive_unless_excepted(self):
        values = {"rounds": 7, "rate": 0.0, "on": False, "seeds": (0, 1), "fit": {"steps": (3, 1)}}
        cli.require_positive(values, but=("seeds",))
        with pytest.raises(ValueError, match=r"config.seeds must be a whole number of at least 1"):
            cli.require_positive(values)
        with pytest.raises(ValueError, match=r"config.fit.steps must be .* Got: -1"):
            cli.require_positive(values | {"fit": {"steps": (3, -1)}}, but=("seeds",))


class TestWorkdir:
    @pytest.mark.parametrize("path", ["file", "file/below", "/proc", "/proc/below"])  # not even root can write in /proc
    def test_one_that_cannot_be_written_to_is_explained(self, path, tmp_path):
        (tmp_path / "file").write_text("a file")
        with pytest.raises(ValueError, match=r"config.workdir must be a folder into .*Fix: .*--config.workdir=FOLDER"):
            workdir.make_workdir(tmp_path / path)
        assert (tmp_path / "file").read_text() == "a file"

    def test_a_new_one_is_made_and_left_empty(self, tmp_path):
        workdir.make_workdir(tmp_path / "a" / "b")
        assert not list((tmp_path / "a" / "b").iterdir())

    @pytest.mark.parametrize("content", ["", "{", "[1]"])
    def test_a_config_of_something_else_is_explained(self, content, tmp_path):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=r"must be that of a run\. .*choose another folder with --config.workdir"):
            workdir.claim_workdir(tmp_path, {"seed": 0})
        assert (tmp_path / "config.json").read_text() == content


@pytest.mark.slow
@pytest.mark.parametrize("name", [*NAMES, "convert"])
def test_help_lists_every_setting(name):
    size = [f"--config=configs/{name}.py:{OTHER_SIZE[name]}"] if name in OTHER_SIZE else []
    done = run(name, *size, "--help")
    assert done.returncode == 0 and not done.stderr
    if name == "convert":
        assert "\n  --source: " in done.stdout and "fields of" not in done.stdout
        return
    file = FOLDER / f"{name}.py"
    fields = cli.read_fields(f"{file}:{OTHER_SIZE[name]}" if size else str(file))
    shown = dict(re.findall(r"^  (\S+?)=.*?(?:\s{2,}|\n\s+)(\S.*)$", done.stdout.split("\nfields of ")[1], re.M))
    assert shown == {field: about for field, (_, about) in fields.items()}
    assert f"\n  workdir='{fields['workdir'].default}'" in done.stdout


WRONG = [
    ("train_toy", "--config.step=3", r"Got: --config.step\. Fix: did you mean --config.steps\?"),
    ("train_toy", "--steps=3", r"Got: --steps\. Fix: did you mean --config.steps\?"),
    ("compare_activations", "--config.gradient_flow.depth=(2,)", r"did you mean --config.gradient_flow.depths\?"),
    ("plan", "--config=configs/plan.py:3b", r"Got: gemma2_3b\. Fix: use 'gemma2_"),
    ("plan", "--config.tokens=abc", r"config.tokens must be a whole number. Got: 'abc'\."),
    ("benchmark", "--config.tokens=abc", r"config.tokens must be a tuple, each member a whole number. Got: \('abc',\)"),
    ("benchmark", "--config.workdir=README.md", r"config.workdir must be a folder .* 'README.md' \(a file\)"),
    ("convert", "--sourc=a", r"Got: --sourc\. Fix: did you mean --source\?"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "argument", "message"), WRONG)
def test_what_is_wrong_is_one_line(name, argument, message):
    done = subprocess.run(command(name, argument), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert re.search(message, done.stderr), done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", [*NAMES, "convert"])
def test_ctrl_c_is_one_line_while_jax_is_imported(name):
    process = subprocess.Popen(command(name, "--help"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while "jaxlib" not in Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == "\nInterrupted. The same command starts again.\n"


PASSES_THROUGH_A_LIBRARY = """
import logging, os, signal, cli
def main():
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except KeyboardInterrupt:
        logging.exception("saving was interrupted")
        if {impatient}:
            os.kill(os.getpid(), signal.SIGINT)
            print("still here")
        raise
cli.run(main)
"""


@pytest.mark.slow
@pytest.mark.parametrize("impatient", [False, True])
def test_an_interruption_that_a_library_logs_is_one_line(impatient):
    source = PASSES_THROUGH_A_LIBRARY.format(impatient=impatient)
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'scripts'}:{ROOT}"}
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, env=environment)
    assert done.returncode == 130 and not done.stdout
    assert done.stderr == "\nInterrupted. The same command starts again.\n"


@pytest.mark.slow
def test_ctrl_c_says_what_is_saved_and_the_same_command_continues(text, tmp_path):
    settings = toy.SMALL | {"steps": 100_000, "eval_every": 100_000, "checkpoint_every": 10, "data": text}
    arguments = command("train_toy", *toy.flags(**settings, workdir=tmp_path / "run"))
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "run").glob("checkpoints/20")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in errors
    assert re.search(r": .*text.txt, 20,000 bytes\.\n", output)
    checkpoints = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    last = max(int(name) for name in checkpoints if name.isdigit())  # there may be one that was being written
    saved = f"{tmp_path}/run holds the checkpoint of step {last} of 100000."
    assert errors.splitlines()[-1] == f"Interrupted. {saved} The same command continues from it."
