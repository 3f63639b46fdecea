"""The training script: it learns, it continues exactly, it refuses what would lose or mix runs."""

import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2
from train_toy import data, language_model, records, yardsticks
from train_toy.run_config import RunConfig
from train_toy.training import train

from tests.support.configs import get_config

pytestmark = pytest.mark.promotes

ROOT = Path(__file__).parents[2]
SMALL = {
    "embed_dim": 16,
    "hidden_dim": 32,
    "num_layers": 2,
    "num_heads": 2,
    "seq_len": 16,
    "batch_size": 4,
    "steps": 12,
    "log_every": 2,
    "eval_every": 6,
    "checkpoint_every": 4,
    "sample_bytes": 8,
}


def config(workdir, text, **overrides):
    values = get_config("train_toy")
    values.update(SMALL | {"workdir": str(workdir), "data": str(text)} | overrides)
    return RunConfig(**values)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(data.python_documentation()[:20_000])
    return path


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
    """The folder and the summary of a finished run."""
    workdir = tmp_path_factory.mktemp("finished")
    return workdir, train(config(workdir, text))


def metrics(workdir):
    return records.read_metrics(Path(workdir) / "metrics.jsonl")


def final_params(workdir, step):
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager(Path(workdir) / "checkpoints") as checkpoints:
        restored = checkpoints.restore(step, args=ocp.args.StandardRestore())
    return jax.tree.leaves(restored)


@pytest.mark.parametrize("api", ["nnx", "linen"])
def test_a_run_learns_and_leaves_its_records(api, text, tmp_path):
    summary = train(
        config(tmp_path, text, api=api, steps=300, learning_rate=1e-2, eval_every=100, checkpoint_every=300)
    )
    # Two layers of width 16 learn more than byte frequencies from the 19,200 bytes they see.
    assert summary["heldout_bits_per_byte"] < summary["unigram_bits_per_byte"] - 0.3
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert summary["sample"].count("|") >= 1
    history = metrics(tmp_path)
    assert [record["step"] for record in history if "train_bits_per_byte" in record] == list(range(1, 301))
    assert [record["step"] for record in history if "heldout_bits_per_byte" in record] == [100, 200, 300]
    assert history[-1]["heldout_bits_per_byte"] == summary["heldout_bits_per_byte"]
    assert tensorboard_scalars(tmp_path) == {
        (record["step"], name): np.float32(value)
        for record in history
        for name, value in record.items()
        if name != "step"
    }


def tensorboard_scalars(workdir):
    """{(step, tag): value} from the event files, whose records are length, checksum, protocol buffer, checksum."""
    scalars = {}
    for path in Path(workdir).glob("events.out.tfevents.*"):
        content, offset = path.read_bytes(), 0
        while offset < len(content):
            (length,) = struct.unpack_from("<Q", content, offset)
            event = event_pb2.Event.FromString(content[offset + 12 : offset + 12 + length])
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    scalars[event.step, value.tag] = np.float32(value.simple_value)
            offset += length + 16
    return scalars


def test_both_shells_have_one_tree_and_give_the_same_logits():
    sizes = (config("unused", "").mlp, 2, 2)
    models = {api: language_model.make(api, *sizes) for api in ("nnx", "linen")}
    tokens = jnp.arange(32).reshape(2, 16)
    params = models["nnx"].init(jax.random.key(0))
    shapes = jax.eval_shape(models["linen"].init, jax.random.key(0))
    assert jax.tree.map(lambda leaf: leaf.shape, params) == jax.tree.map(lambda leaf: leaf.shape, shapes)
    np.testing.assert_array_equal(models["nnx"].logits(params, tokens), models["linen"].logits(params, tokens))
    with pytest.raises(ValueError, match=r"config.api is nnx or linen\. Received: 'haiku'"):
        language_model.make("haiku", *sizes)


def test_the_model_is_causal():
    model = language_model.make("nnx", config("unused", "").mlp, 2, 2)
    params, tokens = model.init(jax.random.key(0)), jnp.arange(16)[None]
    changed = model.logits(params, tokens.at[0, 9].set(200))
    same = np.isclose(changed, model.logits(params, tokens), rtol=1e-5, atol=1e-5).all(axis=-1)[0]
    assert same[:9].all() and not same[9:].any()


@pytest.mark.slow
def test_killed_and_continued_gives_exactly_the_numbers_of_an_uninterrupted_run(text, tmp_path):
    steps = 400
    flags = {**SMALL, "steps": steps, "checkpoint_every": 20, "data": text}
    command = [sys.executable, str(ROOT / "scripts" / "train_toy.py")]
    command += [f"--config.{name}={value}" for name, value in flags.items()]

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    subprocess.run([*command, f"--config.workdir={whole}"], check=True, capture_output=True)
    process = subprocess.Popen(
        [*command, f"--config.workdir={cut}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not (cut / "checkpoints" / "20").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (cut / "summary.json").exists()

    continued = subprocess.run([*command, f"--config.workdir={cut}"], check=True, capture_output=True, text=True)
    assert "Continuing from the checkpoint of step" in continued.stdout
    summaries = [json.loads((run / "summary.json").read_text()) for run in (whole, cut)]
    assert summaries[0]["continued_from_step"] == 0 and 20 <= summaries[1]["continued_from_step"] < steps
    assert summaries[0]["sample"] == summaries[1]["sample"]
    assert metrics(whole) == metrics(cut)
    for a, b in zip(final_params(whole, steps), final_params(cut, steps)):
        np.testing.assert_array_equal(a, b)


def test_a_finished_run_is_not_trained_further(text, finished):
    workdir, first = finished
    before = metrics(workdir)
    second = train(config(workdir, text))
    assert second["continued_from_step"] == SMALL["steps"]
    assert second["heldout_bits_per_byte"] == first["heldout_bits_per_byte"]
    assert metrics(workdir) == before


def test_a_folder_of_another_run_is_refused_and_left_alone(text, finished, tmp_path):
    workdir, _ = finished
    before = metrics(workdir)
    with pytest.raises(ValueError, match=r"seed was 0 and is 1.*--config.workdir"):
        train(config(workdir, text, seed=1))
    other = tmp_path / "other.txt"
    other.write_bytes(text.read_bytes()[::-1])
    with pytest.raises(ValueError, match="corpus_sha256"):
        train(config(workdir, other))
    assert metrics(workdir) == before


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_the_run_without_a_checkpoint(text, tmp_path):
    with pytest.raises(FloatingPointError, match=r"Received: nan at step .* Fix: lower config.learning_rate"):
        train(config(tmp_path / "plain", text, learning_rate=1e30))
    assert not list((tmp_path / "plain" / "checkpoints").glob("[0-9]*"))
    with pytest.raises(AssertionError, match="non-finite"):
        train(config(tmp_path / "checked", text, learning_rate=1e30, check_values=True))


@pytest.mark.slow
def test_the_way_out_of_a_bad_loss_works_in_the_same_folder(text, tmp_path):
    """The error says to pass --config.check_values=True; that must not count as another run."""
    with pytest.raises(FloatingPointError, match=r"check_values=True"):
        train(config(tmp_path, text, learning_rate=1e30))
    with pytest.raises(AssertionError, match="non-finite"):
        train(config(tmp_path, text, learning_rate=1e30, check_values=True))


def test_value_checks_change_nothing_but_cost(text, finished, tmp_path):
    checked = train(config(tmp_path, text, check_values=True))
    assert checked["heldout_bits_per_byte"] == pytest.approx(finished[1]["heldout_bits_per_byte"], rel=1e-5)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("steps", 0, r"config.steps is at least 1. Received: 0. Fix: pass --config.steps=VALUE"),
        ("batch_size", -1, "config.batch_size is at least 1"),
        ("heldout_fraction", 1.0, r"in \[0, 1\)"),
        ("embed_dim", 18, r"config.embed_dim is a multiple of 2 \* num_heads"),
    ],
)
def test_wrong_run_values_raise(field, value, message):
    with pytest.raises(ValueError, match=message):
        config("unused", "", **{field: value})


class TestData:
    def test_a_folder_is_read_in_the_order_of_names(self, tmp_path):
        (tmp_path / "sub").mkdir()
        (tmp_path / "b.txt").write_bytes(b"second")
        (tmp_path / "a.txt").write_bytes(b"first")
        (tmp_path / "sub" / "c.txt").write_bytes(b"third")
        (tmp_path / ".hidden").write_bytes(b"hidden")
        corpus = data.load_corpus(str(tmp_path), 0.25, 1000)
        assert corpus.train.tobytes() + corpus.heldout.tobytes() == b"first\n\nsecond\n\nthird"
        assert len(corpus.heldout) == 5

    def test_the_heldout_end_has_a_most(self, text):
        assert len(data.load_corpus(str(text), 0.5, 100).heldout) == 100

    def test_errors(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"config.data is a file or a folder"):
            data.load_corpus(str(tmp_path / "absent"), 0.1, 10)
        (tmp_path / "empty").write_bytes(b"")
        with pytest.raises(ValueError, match="0 bytes"):
            data.load_corpus(str(tmp_path / "empty"), 0.1, 10)
        with pytest.raises(ValueError, match="longer than one window"):
            data.training_batches(np.zeros(16, np.uint8), 16, 1, 0)

    def test_python_documentation_is_prose_without_repeated_paragraphs(self):
        prose = data.python_documentation().decode()
        assert len(prose) > 200_000 and "statement" in prose
        paragraphs = [part for part in prose.split("\n\n") if len(part) > 200]
        assert len(set(paragraphs)) == len(paragraphs)

    def test_batches_are_windows_of_the_text_in_a_seeded_order(self):
        train_text = np.arange(100, dtype=np.uint8)
        batches = data.training_batches(train_text, 8, 4, seed=0)
        starts = []
        for step in range(23):  # one epoch: 92 windows
            assert batches[step].shape == (4, 9)
            np.testing.assert_array_equal(batches[step] - batches[step][:, :1], np.tile(np.arange(9), (4, 1)))
            starts += batches[step][:, 0].tolist()
        assert sorted(starts) == list(range(92)) and starts != sorted(starts)
        np.testing.assert_array_equal(batches[7], data.training_batches(train_text, 8, 4, seed=0)[7])
        assert not np.array_equal(batches[7], data.training_batches(train_text, 8, 4, seed=1)[7])

    @pytest.mark.parametrize("heldout", [1, 7, 8, 30])
    @pytest.mark.parametrize("seq_len", [1, 5, 8])
    def test_evaluation_scores_every_heldout_byte_once_after_its_true_past(self, heldout, seq_len):
        text = np.arange(1, 101, dtype=np.uint8)
        corpus = data.Corpus(train=text[:-heldout], heldout=text[-heldout:])
        windows, scored = data.evaluation_windows(corpus, seq_len)
        assert windows[:, 1:][scored].tolist() == corpus.heldout.tolist()
        for window, mask in zip(windows, scored):
            seen = window[: np.flatnonzero(mask)[-1] + 2]
            np.testing.assert_array_equal(np.diff(seen.astype(int)), 1)
            assert np.flatnonzero(mask)[0] >= seq_len // 2


class TestYardsticks:
    def test_unigram_entropy(self):
        assert yardsticks.unigram_bits_per_byte(np.frombuffer(b"abcd" * 9, np.uint8)) == 2.0
        assert yardsticks.unigram_bits_per_byte(np.frombuffer(b"aaab", np.uint8)) == pytest.approx(0.8112781)

    def test_xz_uses_the_training_text_as_history(self):
        noise = np.random.default_rng(0).integers(0, 256, 20_000).astype(np.uint8)
        fresh = np.random.default_rng(1).integers(0, 256, 20_000).astype(np.uint8)
        assert yardsticks.xz_bits_per_byte(noise, noise) < 0.2
        assert yardsticks.xz_bits_per_byte(noise, fresh) == pytest.approx(8, abs=0.05)
