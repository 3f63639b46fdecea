"""train_toy.py has the losses of one device on meshes and in several processes, even if one of them is killed."""

import os
import signal
import socket
import subprocess
import time

import jax
import numpy as np
import optax
import pytest
from byte_decoder import language_model, placement, training
from train_toy import checkpoints
from train_toy.run import train

from tests.scripts.toy import COMMAND, ROUNDING, SMALL, check_curve, config, curve, flags

pytestmark = [pytest.mark.promotes, pytest.mark.usefixtures("compiled_once", "eight_devices")]


def start(count, devices, mesh, workdir, text):
    """Starts `count` processes of `devices` CPU devices each. They print into 0.log, 1.log, ... in `workdir`."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    command = COMMAND + flags(**SMALL, mesh=mesh, workdir=workdir, data=text)
    command += [f"--coordinator_address=localhost:{port}", f"--num_processes={count}"]
    processes = []
    for i in range(count):
        with (workdir / f"{i}.log").open("w") as log:
            processes.append(subprocess.Popen([*command, f"--process_id={i}"], env=environment, stdout=log, stderr=log))
    return processes


def finish(processes, workdir):
    for i, process in enumerate(processes):
        assert process.wait(timeout=300) == 0, (workdir / f"{i}.log").read_text()


@pytest.mark.slow
def test_two_processes_have_the_curve_of_one(finished, text, tmp_path):
    finish(start(2, 2, "fsdp=2,tensor=2", tmp_path, text), tmp_path)
    check_curve(tmp_path, curve(finished[0]))


@pytest.mark.slow
@pytest.mark.parametrize("victim", [1, 0])
def test_a_killed_run_is_continued_by_another_number_of_processes(victim, finished, text, tmp_path):
    processes = start(2, 2, "data=2,tensor=2", tmp_path, text)
    deadline = time.monotonic() + 120
    while not (tmp_path / "checkpoints" / "20").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    processes[victim].send_signal(signal.SIGKILL)
    killed_at = time.monotonic()
    assert processes[victim].wait() == -signal.SIGKILL
    assert processes[1 - victim].wait(timeout=60) != 0 and time.monotonic() - killed_at < 30
    message = (tmp_path / f"{1 - victim}.log").read_text()
    assert "another task died" in message or "All 2 processes of a run must stay alive. Got, in process" in message
    assert not (tmp_path / "summary.json").exists()
    if victim:
        finish(start(4, 2, "data=2,fsdp=2,tensor=2", tmp_path, text), tmp_path)
    else:
        assert train(config(tmp_path, text))["continued_from_step"] >= 20  # one process, no mesh
    check_curve(tmp_path, curve(finished[0]))


@pytest.mark.slow
@pytest.mark.parametrize(("api", "options"), [("nnx", {}), ("nnx", {"check_values": True}), ("linen", {})])
def test_one_process_on_a_mesh_has_the_curve_of_one_device(api, options, finished, text, tmp_path):
    spread = train(config(tmp_path / "mesh", text, api=api, mesh="data=2,fsdp=2,tensor=2", **options))
    alone = curve(finished[0])
    if api == "linen":
        train(config(tmp_path / "one", text, api=api))
        alone = curve(tmp_path / "one")
    check_curve(tmp_path / "mesh", alone)
    heldout = alone[SMALL["steps"], "heldout_bits_per_byte"]
    assert spread["heldout_bits_per_byte"] == pytest.approx(heldout, rel=ROUNDING)


@pytest.mark.slow
def test_one_of_several_processes_does_not_run_alone_if_it_has_no_address():
    done = subprocess.run([*COMMAND, "--num_processes=2", "--process_id=0"], capture_output=True, text=True)
    assert done.returncode != 0 and "coordinator_address should be defined" in done.stderr


def test_a_process_reads_the_rows_of_its_own_devices():
    read = []

    def rows(wanted):
        read.append(list(wanted))
        return np.array([[row] * 3 for row in wanted])

    spread = placement.Placement(placement.make_mesh("data=2,fsdp=2,tensor=2"))
    batch = spread.batch((8, 3), "int32", rows)
    assert sorted({tuple(part) for part in read}) == [(0, 1), (2, 3), (4, 5), (6, 7)]
    np.testing.assert_array_equal(batch, np.arange(8)[:, None] * np.ones((1, 3), int))
    assert spread.count_rows(64) == 64 and spread.count_rows(6) == 8


def test_a_mesh_must_have_all_devices():
    with pytest.raises(ValueError, match=r"as many places as there are devices, 8. .*: 'fsdp=2'. Fix"):
        placement.make_mesh("fsdp=2")


@pytest.mark.parametrize("api", ["nnx", "linen"])
def test_parameters_and_moments_are_spread(api, text, tmp_path):
    spread = placement.Placement(placement.make_mesh("fsdp=4,tensor=2"))
    sizes = (config(tmp_path, text).mlp, 2, 2)
    optimizer = training.make_optimizer(1e-3, 10, 0.1, 0.1)
    model = language_model.make(api, *sizes)
    params, opt_state = checkpoints.state_shardings(api, sizes, model, optimizer, spread)
    assert tuple(params["embed"]["embedding"].spec) == (None, "fsdp")
    assert tuple(params["final_norm"]["scale"].spec) == ("fsdp",)
    layer = params["layer_1"]
    for name in ("query", "key", "value"):
        assert tuple(layer["attention"][name]["kernel"].spec) == ("fsdp", "tensor", None)
    assert tuple(layer["attention"]["out"]["kernel"].spec) == ("tensor", None, "fsdp")
    assert tuple(layer["mlp_block"]["mlp"]["down_proj"].spec) == ("tensor", "fsdp")
    (moments,) = (part for part in jax.tree.leaves(opt_state, is_leaf=has_moments) if has_moments(part))
    assert moments.mu == moments.nu == params


def has_moments(part):
    return isinstance(part, optax.ScaleByAdamState)


def test_a_batch_that_the_mesh_does_not_divide_is_explained(text, tmp_path):
    with pytest.raises(ValueError, match=r"config.batch_size must be a multiple .*: 12, not a multiple of 8\. Fix:"):
        train(config(tmp_path, text, batch_size=12, mesh="fsdp=8"))
