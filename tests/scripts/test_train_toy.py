"""train_toy.py: it learns, it continues exactly, and it refuses to mix runs."""

import dataclasses
import json
import lzma
import re
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from byte_decoder import data, language_model
from byte_decoder.placement import ONE_DEVICE
from compare_activations import heldout
from matplotlib.figure import Figure
from train_toy import processes, records, run, yardsticks
from train_toy.run import train

from tests.scripts.toy import (
    COMMAND,
    SMALL,
    check_records,
    check_same_runs,
    config,
    final_state,
    flags,
    interrupt_at,
    kill_after_step,
    metrics,
    tensorboard_scalars,
)
from tests.support.configs import get_config

pytestmark = [pytest.mark.promotes, pytest.mark.usefixtures("compiled_once")]


def test_a_run_learns_and_leaves_its_records(finished):
    workdir, summary = finished
    check_records(workdir, summary, SMALL["steps"], SMALL["eval_every"])
    first, *_, last = (record["train_bits_per_byte"] for record in metrics(workdir) if "train_bits_per_byte" in record)
    assert first > 8 and last < 7  # a guess among 256 bytes costs 8 bits
    assert summary["heldout_bits_per_byte"] < 7


def test_the_summary_describes_the_text_and_the_model(text, finished):
    workdir, summary = finished
    heldout = text.read_bytes()[-summary["heldout_bytes"] :]
    assert summary["train_bytes"] + summary["heldout_bytes"] == len(text.read_bytes())
    assert summary["unigram_bits_per_byte"] == yardsticks.unigram_bits_per_byte(np.frombuffer(heldout, np.uint8))
    size = sum(leaf.size for leaf in jax.tree.leaves(final_state(workdir)["params"]))
    assert summary["parameters"] == summary["trained_parameters"] == size
    assert summary["steps"] == SMALL["steps"] and summary["seconds"] > 0


def test_the_last_two_checkpoints_are_there(finished):
    assert sorted(int(path.name) for path in (finished[0] / "checkpoints").iterdir()) == [30, 40]


def test_the_first_step_trains_on_the_first_windows():
    corpus, settings = data.Corpus(np.arange(200, dtype=np.uint8), np.zeros(1, np.uint8)), config("unused", "")
    batch, expected = (
        run.make_batches(corpus, settings, ONE_DEVICE),
        data.training_batches(corpus.train, settings.seq_len, settings.batch_size, settings.seed),
    )
    for step in (1, 2, 7):
        np.testing.assert_array_equal(batch(step), expected[step - 1])


def test_the_configuration_of_a_run_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        config("unused", "").steps = 1


def test_the_figure_shows_the_records_and_the_yardsticks(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    metrics = [{"step": step, "train_bits_per_byte": 8 - step} for step in (1, 2, 3)]
    metrics.append({"step": 3, "heldout_bits_per_byte": 5.5})
    records.plot_loss(tmp_path / "loss.png", metrics, {"unigram entropy": 4.5, "xz -9e": 1.75})
    (axes,) = figures[0].axes
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_ylim()[0]) == ("step", "bits per byte", 0)
    lines = {line.get_label(): np.transpose(line.get_data()).tolist() for line in axes.lines}
    assert lines == {
        "training batch": [[1, 7], [2, 6], [3, 5]],
        "held out": [[3, 5.5]],
        "unigram entropy: 4.50": [[0, 4.5], [1, 4.5]],  # from one edge to the other
        "xz -9e: 1.75": [[0, 1.75], [1, 1.75]],
    }
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(lines)
    assert len({line.get_linestyle() for line in axes.lines[1:]}) == 3


def test_an_error_of_the_only_process_is_raised(monkeypatch):
    """With several, the process ends at once."""
    monkeypatch.setattr(processes.os, "_exit", lambda status: pytest.fail(f"ended with status {status}"))
    with pytest.raises(jax.errors.JaxRuntimeError, match="boom"), processes.all_or_none():
        raise jax.errors.JaxRuntimeError("boom")


@pytest.mark.slow
@pytest.mark.parametrize("api", ["nnx", "linen"])
def test_a_longer_run_learns_more_than_byte_frequencies(api, text, tmp_path):
    options = {"batch_size": 4, "steps": 300, "learning_rate": 1e-2, "eval_every": 100, "checkpoint_every": 300}
    summary = train(config(tmp_path, text, api=api, **options))
    # Two layers of width 16 learn this from the 19,200 bytes they see.
    assert summary["heldout_bits_per_byte"] < summary["unigram_bits_per_byte"] - 0.3
    check_records(tmp_path, summary, 300, 100)


def test_both_shells_have_one_tree_and_give_the_same_logits():
    sizes = (config("unused", "").mlp, 2, 2)
    models = {api: language_model.make(api, *sizes) for api in ("nnx", "linen")}
    tokens = jnp.arange(32).reshape(2, 16)
    params = models["nnx"].init(jax.random.key(0))
    shapes = jax.eval_shape(models["linen"].init, jax.random.key(0))
    assert jax.tree.map(lambda leaf: leaf.shape, params) == jax.tree.map(lambda leaf: leaf.shape, shapes)
    np.testing.assert_array_equal(models["nnx"].logits(params, tokens), models["linen"].logits(params, tokens))
    with pytest.raises(ValueError, match=r"config.api must be one of nnx, linen\. .*'haiku'"):
        language_model.make("haiku", *sizes)


def test_the_model_is_causal():
    model = language_model.make("nnx", config("unused", "").mlp, 2, 2)
    params, tokens = model.init(jax.random.key(0)), jnp.arange(16)[None]
    changed = model.logits(params, tokens.at[0, 9].set(200))
    same = np.isclose(changed, model.logits(params, tokens), rtol=1e-5, atol=1e-5).all(axis=-1)[0]
    assert same[:9].all() and not same[9:].any()


def test_interrupted_and_continued_gives_exactly_the_numbers_of_an_uninterrupted_run(
    text, finished, tmp_path, monkeypatch
):
    whole, summary = finished
    interrupt_at(15, config(tmp_path, text), monkeypatch)
    assert not (tmp_path / "summary.json").exists()
    continued = train(config(tmp_path, text))
    assert continued["continued_from_step"] == 10
    check_same_runs(whole, summary, tmp_path, continued)


@pytest.mark.slow
def test_killed_and_continued_gives_exactly_the_numbers_of_an_uninterrupted_run(text, tmp_path):
    steps = 400
    settings = SMALL | {"batch_size": 4, "steps": steps, "eval_every": 6, "checkpoint_every": 20, "data": text}
    command = COMMAND + flags(**settings)

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    subprocess.run([*command, f"--config.workdir={whole}"], check=True, capture_output=True)
    kill_after_step(20, command, cut)
    assert not (cut / "summary.json").exists()
    found = {(step, name) for step, name, _ in records.points(metrics(cut))}
    assert found and found <= tensorboard_scalars(cut).keys()

    continued = subprocess.run([*command, f"--config.workdir={cut}"], check=True, capture_output=True, text=True)
    assert "Continuing from the checkpoint of step" in continued.stdout
    summaries = [json.loads((run / "summary.json").read_text()) for run in (whole, cut)]
    assert summaries[0]["continued_from_step"] == 0 and 20 <= summaries[1]["continued_from_step"] < steps
    check_same_runs(whole, summaries[0], cut, summaries[1])


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


def test_a_loss_that_is_not_finite_is_explained():
    message = r"must be a finite number. Got: nan at step 3. Fix: lower config.learning_rate.*check_values=True"
    with pytest.raises(FloatingPointError, match=message):
        run.bits(3, jnp.float32(jnp.nan))


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_the_run_without_a_checkpoint_and_the_way_out_works_in_its_folder(
    text, tmp_path
):
    """The error says to pass --config.check_values=True. This flag must not make it another run."""
    with pytest.raises(FloatingPointError, match=r"Got: nan at step .* Fix: lower .*check_values=True"):
        train(config(tmp_path, text, learning_rate=1e30))
    assert not list((tmp_path / "checkpoints").glob("[0-9]*"))
    with pytest.raises(AssertionError, match="non-finite"):
        train(config(tmp_path, text, learning_rate=1e30, check_values=True))


@pytest.mark.slow
def test_a_run_inside_of_its_data_folder_continues(text, tmp_path, monkeypatch, capsys):
    (tmp_path / "a.txt").write_bytes(text.read_bytes())
    monkeypatch.chdir(tmp_path)
    settings = config("runs/mine", ".", steps=12)
    interrupt_at(11, settings, monkeypatch)
    assert train(settings)["continued_from_step"] == 10
    assert capsys.readouterr().out.count("Text: 1 files of . (left out: 0 binary files, hidden files, ") == 2


class TestMetricsLog:
    """TensorBoard's events hold at every moment what metrics.jsonl holds."""

    def check(self, workdir, steps):
        expected = {
            (record["step"], name): np.float32(value)
            for record in metrics(workdir)
            for name, value in record.items()
            if name != "step"
        }
        assert [record["step"] for record in metrics(workdir)] == steps
        assert tensorboard_scalars(workdir) == expected

    def test_each_record_is_in_both_files_at_once(self, tmp_path):
        with records.MetricsLog(tmp_path, 0) as log:
            for step in range(1, 40):
                log.write(step, train=1 / step)
                self.check(tmp_path, list(range(1, step + 1)))  # so it would be after kill -9 too
            log.write(39, heldout=0.5)
            self.check(tmp_path, [*range(1, 40), 39])

    @pytest.mark.parametrize("damage", ["none", "cut", "lost"])
    def test_a_run_that_continues_repairs_its_events(self, damage, tmp_path):
        with records.MetricsLog(tmp_path, 0) as log:
            for step in range(1, 9):
                log.write(step, train=1 / step, heldout=float(step))
        (file,) = tmp_path.glob("events.*")
        whole = file.read_bytes()
        if damage == "cut":
            file.write_bytes(whole[: len(whole) // 2 + 5])  # in the middle of an event
        elif damage == "lost":
            file.unlink()
        with records.MetricsLog(tmp_path, 6) as log:  # within the same second as the first
            self.check(tmp_path, list(range(1, 7)))
            log.write(7, train=7.0)
        self.check(tmp_path, list(range(1, 8)))
        first, *others = sorted(tmp_path.glob("events.*"))
        assert (len(others) == 1) == (damage != "lost")
        if damage == "none":
            assert first.read_bytes() == whole and others[0].stat().st_size < len(whole) / 2  # nothing twice


@pytest.mark.slow
def test_value_checks_change_nothing_but_cost(text, finished, tmp_path):
    checked = train(config(tmp_path, text, check_values=True))
    assert checked["heldout_bits_per_byte"] == pytest.approx(finished[1]["heldout_bits_per_byte"], rel=1e-5)


def test_unknown_arguments_are_refused():
    done = subprocess.run([*COMMAND, "runs/mine"], capture_output=True, text=True)
    assert done.returncode != 0 and "Unknown arguments: ['runs/mine']" in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("steps", 0, r"config.steps must be at least 1. .*: 0. Fix: pass --config.steps=VALUE"),
        ("batch_size", -1, "config.batch_size must be at least 1"),
        ("heldout_fraction", 1.0, r"must be in \[0, 1\)"),
        ("embed_dim", 18, r"config.embed_dim must be a multiple of 2 \* num_heads"),
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

    @pytest.mark.parametrize("script", ["train_toy", "compare_activations"])
    def test_of_a_folder_text_is_taken_and_the_run_itself_is_left_out(self, script, tmp_path):
        for name, content in {
            "a.txt": b"caf\xe9 in Latin-1",  # a text need not be UTF-8
            "b.png": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
            ".git/config": b"version control",
            "sub/CVS/Entries": b"version control",
            ".cache/notes.txt": b"hidden",
            "sub/.env": b"hidden",
            "runs/other/b.txt": b"another folder's",
        }.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(content)
        workdir = tmp_path / "runs" / "mine"

        def load():
            if script == "train_toy":
                return data.load_corpus(str(tmp_path), 0.25, 1000, workdir)
            config = get_config(script)
            config.update(data=str(tmp_path), workdir=str(workdir))
            return heldout.load(config)

        corpus = load()
        assert corpus.train.tobytes() + corpus.heldout.tobytes() == b"caf\xe9 in Latin-1\n\nanother folder's"
        assert re.fullmatch(rf"2 files of {tmp_path} \(left out: 1 binary files, .*\), 33 bytes", corpus.about)
        workdir.mkdir()
        (workdir / "metrics.jsonl").write_text("{}")
        assert load().sha256 == corpus.sha256
        (tmp_path / "runs" / "metrics.jsonl").write_text("{}")
        assert load().sha256 != corpus.sha256

    def test_a_folder_that_the_run_writes_into_is_refused(self, tmp_path):
        (tmp_path / "text").mkdir()
        (tmp_path / "text" / "a.txt").write_bytes(b"some text")
        with pytest.raises(ValueError, match=r"config.workdir must not be config.data"):
            data.load_corpus(str(tmp_path), 0.25, 1000, tmp_path)
        (tmp_path / "link").symlink_to(tmp_path)
        with pytest.raises(ValueError, match=r"config.workdir must not be config.data"):
            data.load_corpus(str(tmp_path / "link"), 0.25, 1000, tmp_path)
        inside = data.load_corpus(str(tmp_path / "text"), 0.25, 1000, tmp_path)  # which the run does not write into
        assert inside.about.startswith("1 files")

    def test_the_heldout_end_has_at_most_so_many_bytes(self, text):
        assert len(data.load_corpus(str(text), 0.5, 100).heldout) == 100

    def test_errors(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"config.data must be a file or a folder"):
            data.load_corpus(str(tmp_path / "absent"), 0.1, 10)
        (tmp_path / "empty").write_bytes(b"")
        with pytest.raises(ValueError, match="0 bytes"):
            data.load_corpus(str(tmp_path / "empty"), 0.1, 10)
        with pytest.raises(ValueError, match="must be longer than one window"):
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
    def test_unigram_entropy_is_that_by_hand(self):
        assert yardsticks.unigram_bits_per_byte(np.frombuffer(b"abcd" * 9, np.uint8)) == 2.0
        assert yardsticks.unigram_bits_per_byte(np.frombuffer(b"aaab", np.uint8)) == pytest.approx(0.8112781)

    def test_xz_uses_the_training_text_as_history(self):
        noise = np.random.default_rng(0).integers(0, 256, 20_000).astype(np.uint8)
        fresh = np.random.default_rng(1).integers(0, 256, 20_000).astype(np.uint8)
        assert yardsticks.xz_bits_per_byte(noise, noise) < 0.2
        assert yardsticks.xz_bits_per_byte(noise, fresh) == pytest.approx(8, abs=0.05)

    def test_the_history_is_what_xz_looks_back_on(self):
        """Byte 16 of a file is its dictionary's size (section 5.3.1 of tukaani.org/xz/xz-file-format.txt)."""
        bits = lzma.compress(b"x", preset=9 | lzma.PRESET_EXTREME)[16]
        assert (2 | bits & 1) << bits // 2 + 11 == yardsticks.HISTORY == 2**26
