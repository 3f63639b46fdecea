"""compare_activations.py is fair (equal sizes, paired seeds, one training loop) and continues to the same tables."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from byte_decoder import data, training
from byte_decoder.language_model import pure_functions
from compare_activations import (
    approximation,
    contestants,
    curvature,
    ensembles,
    expressiveness,
    figure,
    gradient_flow,
    heldout,
    tuning,
)
from compare_activations.contestants import CONTESTANTS
from compare_activations.ensembles import Member
from compare_activations.ledger import Ledger
from compare_activations.statistics import interval, paired
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import gemma_mlp
from gemma_mlp.testing import oracle
from tests.support.configs import get_config

pytestmark = pytest.mark.promotes

ROOT = Path(__file__).parents[2]
ACTIVATION = {  # Shazeer's names, arXiv:2002.05202
    "geglu_tanh": ("gelu_tanh", True),
    "geglu_erf": ("gelu", True),
    "swiglu": ("silu", True),
    "reglu": ("relu", True),
    "glu": ("sigmoid", True),
    "bilinear": ("identity", True),
    "gelu": ("gelu_tanh", False),
    "silu": ("silu", False),
    "relu": ("relu", False),
}


def command(workdir, *settings):
    flags = [f"--config.{setting}" for setting in (f"workdir={workdir}", *settings)]
    script = str(ROOT / "scripts" / "compare_activations.py")
    return [sys.executable, script, f"--config={ROOT}/configs/compare_activations.py:smoke", *flags]


def environment():
    """The smoke version spends most of its time compiling. This flag makes LLVM do less of it."""
    return os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("smoke")
    started = children_seconds()
    done = subprocess.run(command(workdir), check=True, capture_output=True, text=True, env=environment())
    return workdir, done, children_seconds() - started


def children_seconds():
    """CPU time of finished child processes; unlike the wall-clock time it does not depend on what else runs."""
    times = os.times()
    return times.children_user + times.children_system


def tables(workdir):
    return json.loads((workdir / "tables.json").read_text())


@pytest.mark.slow
def test_the_smoke_version_does_all_of_it_in_two_minutes_of_cpu_time(smoke):
    workdir, done, seconds = smoke
    assert seconds < 120
    rows = {name: len(table) for name, table in tables(workdir).items()}
    assert rows == {"heldout": 2, "gradient_flow": 4, "expressiveness": 8, "curvature": 2, "approximation": 6}
    assert "100%" in done.stderr  # the progress bar
    for name in ("comparison", *rows):
        assert (workdir / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def check_axes(drawn, count):
    """Every panel has its labels, and no panel is missing or empty."""
    axes = [each for subfigure in drawn.subfigs for each in subfigure.axes]
    assert len(axes) == len(drawn.axes) == count
    for each in axes:
        assert each.axison and each.get_title() and each.get_xlabel() and each.get_ylabel()


def test_the_figure_of_the_study_has_labels_and_no_empty_panel():
    """Drawn from made-up runs of two contestants, with two seeds."""
    scores = {"part": "comparison", "seeds": [0, 1], "learning_rates": [0.1, 0.1], "scores": [2.0, 3.0]}
    gradients = {"step": 0, "gradients": [[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]]}
    sharpness = {"step": 5, "eigenvalue": [5.0, 6.0], "change": [0.5, 0.6]}
    runs = []
    for name in ("geglu_tanh", "gelu"):
        runs.append({"section": "heldout", "contestant": name, **scores})
        for function in expressiveness.FUNCTIONS:
            runs.append({"section": "expressiveness", "contestant": name, "function": function, **scores})
        for wiring in ("norms and residual", "neither"):
            run = {"section": "gradient_flow", "contestant": name, "wiring": wiring, "depth": 2}
            runs.append(run | {"at": [gradients]})
        runs.append({"section": "curvature", "contestant": name, "at": [sharpness, sharpness | {"step": 9}]})
    sections = (heldout, gradient_flow, expressiveness, curvature, approximation)
    check_axes(figure.compose([section.draw for section in sections], runs), 5)


@pytest.mark.parametrize(("count", "rows"), [(1, [1]), (3, [3]), (5, [3, 2])])
def test_the_panels_of_a_row_share_its_width(count, rows):
    def panel(axes, runs):
        axes.set(title="title", xlabel="x", ylabel=runs)

    drawn = figure.compose([panel] * count, "y")
    check_axes(drawn, count)
    assert [len(subfigure.axes) for subfigure in drawn.subfigs] == rows
    for subfigure in drawn.subfigs:
        assert subfigure.axes[-1].get_position().x1 > 0.85


@pytest.mark.slow
def test_killed_and_continued_gives_the_same_table(smoke, tmp_path):
    whole, _, _ = smoke
    section = "sections=('expressiveness',)"
    process = subprocess.Popen(command(tmp_path, section), env=environment(), stderr=subprocess.DEVNULL)
    runs, deadline = tmp_path / "runs.jsonl", time.monotonic() + 60
    while not (runs.exists() and runs.read_text().count("\n") >= 3) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "tables.json").exists()
    before = runs.read_text()
    assert 3 <= before.count("\n") < 16

    subprocess.run(command(tmp_path, section), check=True, capture_output=True, env=environment())
    assert runs.read_text().startswith(before)
    assert tables(tmp_path)["expressiveness"] == tables(whole)["expressiveness"]


@pytest.mark.slow
def test_an_unknown_name_is_explained(tmp_path):
    done = subprocess.run(command(tmp_path, "contestants=('relu','mish')"), capture_output=True, text=True)
    assert done.returncode != 0 and "config.contestants must be among geglu_tanh, " in done.stderr
    assert ": mish. Fix:" in done.stderr and done.stderr.count("\n") == 1


class TestLedger:
    class Bar:
        def __init__(self):
            self.updates = 0

        def set_description(self, _):
            pass

        def update(self):
            self.updates += 1

    def test_a_run_is_measured_once_and_saved_at_once(self, tmp_path):
        path = tmp_path / "runs.jsonl"
        first = Ledger(path, self.Bar())
        assert first.run(lambda: {"score": (1.0, 2.0)}, name="a", depth=4)["score"] == [1.0, 2.0]
        first.run(lambda: {"score": 3.0}, name="a", depth=16)
        path.write_text(path.read_text() + '{"name": "b", "sc')  # an interruption in the middle of a line
        bar = self.Bar()
        again = Ledger(path, bar)
        for depth, score in ((4, [1.0, 2.0]), (16, 3.0)):
            assert again.run(pytest.fail, name="a", depth=depth) == {"name": "a", "depth": depth, "score": score}
        again.run(lambda: {"score": 5.0}, name="b", depth=4)
        assert bar.updates == 3
        assert [json.loads(line)["score"] for line in path.read_text().splitlines()] == [[1.0, 2.0], 3.0, 5.0]

    def test_a_run_that_fails_leaves_nothing(self, tmp_path):
        ledger = Ledger(tmp_path / "runs.jsonl", self.Bar())
        with pytest.raises(FloatingPointError):
            ledger.run(fail, name="a")
        assert ledger.runs == [] and not (tmp_path / "runs.jsonl").exists()


def fail():
    raise FloatingPointError


class TestStatistics:
    def test_an_interval_equals_one_by_hand(self):
        mean, half = interval([1.0, 2.0, 3.0, 4.0])
        # The 97.5 % quantile of t with 3 degrees of freedom is 3.182446. The standard error is sqrt(5/3) / 2.
        assert mean == 2.5 and half == pytest.approx(3.182446 * (5 / 3) ** 0.5 / 2, rel=1e-6)
        # With eight comparisons each interval holds with probability 1 - 0.05 / 8. The density is integrated here.
        quantile = interval([1.0, 2.0, 3.0, 4.0], 8)[1] / ((5 / 3) ** 0.5 / 2)
        t = np.linspace(-quantile, quantile, 200_001)
        inside = np.trapezoid(6 * 3**0.5 / (np.pi * (3 + t**2) ** 2), t)
        assert inside == pytest.approx(1 - 0.05 / 8, abs=1e-6)

    def test_pairing_takes_out_what_seeds_share(self):
        shared = np.array([0.0, 5.0, -3.0, 8.0])
        mean, half = paired(shared + np.array([1.1, 0.9, 1.0, 1.0]), shared)
        assert mean == pytest.approx(1.0) and half == pytest.approx(3.182446 * (0.02 / 3) ** 0.5 / 2, rel=1e-6)
        # Scores that rank the seeds the other way round: the differences are -4, 0 and 4, not three zeros.
        assert paired([0.0, 2.0, 4.0], [4.0, 2.0, 0.0]) == (0, pytest.approx(4.302653 * 4 / 3**0.5, rel=1e-6))

    @given(st.integers(2, 40), st.floats(1e-3, 1e3), st.floats(-10, 10), st.integers(1, 40), st.integers(0, 2**32 - 1))
    def test_any_interval_equals_the_inverse_of_scipys_t_tests(self, count, spread, shift, comparisons, seed):
        values, reference = shift + spread * np.random.default_rng(seed).standard_normal((2, count))
        for found, tested in (
            (interval(values, comparisons), stats.ttest_1samp(values, 0.0)),
            (paired(values, reference, comparisons), stats.ttest_rel(values, reference)),
        ):
            low, high = tested.confidence_interval(1 - 0.05 / comparisons)
            np.testing.assert_allclose(found, ((low + high) / 2, (high - low) / 2), rtol=1e-9, atol=1e-12)


class TestContestants:
    def test_names_mean_shazeers_layers(self):
        assert {name: tuple(contestant[1:]) for name, contestant in CONTESTANTS.items()} == ACTIVATION

    @pytest.mark.parametrize("name", CONTESTANTS)
    def test_all_have_equally_many_parameters(self, name):
        config = contestants.mlp_config(name, 8, 24)
        assert config.hidden_dim == (24 if CONTESTANTS[name].gated else 36)
        init, _ = pure_functions(lambda key: contestants.block_class(name)(config, rngs=nnx.Rngs(params=key)))
        shapes = jax.eval_shape(init, jax.random.key(0))
        assert sum(leaf.size for leaf in jax.tree.leaves(shapes["mlp"])) == 3 * 8 * 24
        assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 3 * 8 * 24 + 2 * 8

    def test_whole_models_have_equal_parameters(self):
        shapes = [jax.eval_shape(model.init, jax.random.key(0)) for model in self.models()]
        assert len({sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in shapes}) == 1

    @pytest.mark.slow
    def test_whole_models_compute_different_functions(self):
        models = self.models()
        logits = [model.logits(model.init(jax.random.key(0)), jnp.arange(8)[None]) for model in models]
        assert len({float(value.std()) for value in logits}) == len(CONTESTANTS)

    def models(self):
        config = get_config("compare_activations", "smoke")
        return [heldout.decoder(config, name) for name in CONTESTANTS]

    @pytest.mark.parametrize("name", CONTESTANTS)
    def test_values_equal_the_oracle(self, name):
        activation, gated = ACTIVATION[name]
        config = contestants.mlp_config(name, 8, 24)
        mlp = contestants.mlp_class(name)(config, rngs=nnx.Rngs(0))
        x = np.float32(3 * np.random.default_rng(0).standard_normal((64, 8)))
        function = oracle.ACTIVATIONS[activation][0]
        leaves = {"/".join(map(str, path)): np.float64(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(mlp))}
        if gated:
            expected = function(x @ leaves["gate_proj"]) * (x @ leaves["up_proj"]) @ leaves["down_proj"]
        else:
            expected = function(x @ leaves["up_proj/kernel"]) @ leaves["down_proj/kernel"]
        np.testing.assert_allclose(mlp(x), expected, rtol=0, atol=3e-6 * np.abs(expected).max())

    def test_the_block_is_the_packages_own_around_any_feed_forward(self):
        config = contestants.mlp_config("geglu_tanh", 8, 24)
        block = contestants.Block(config, rngs=nnx.Rngs(0), mlp=gemma_mlp.nnx.MLP)
        own = gemma_mlp.nnx.MLPBlock(config, rngs=nnx.Rngs(1))
        nnx.update(own, nnx.state(block))
        x = jax.random.normal(jax.random.key(0), (4, 8))
        np.testing.assert_allclose(block(x), own(x), rtol=1e-6, atol=1e-6)
        bare = contestants.Block(config, rngs=nnx.Rngs(0), mlp=gemma_mlp.nnx.MLP, norms=False, residual=False)
        np.testing.assert_array_equal(bare(x), bare.mlp(x))
        residual = contestants.Block(config, rngs=nnx.Rngs(0), mlp=gemma_mlp.nnx.MLP, norms=False)
        np.testing.assert_array_equal(residual(x), x + residual.mlp(x))

    @pytest.mark.parametrize("name", CONTESTANTS)
    def test_unit_gain_keeps_the_variance(self, name):
        config = contestants.mlp_config(name, 256, 1024)
        mlp = contestants.mlp_class(name)(config, rngs=nnx.Rngs(0))
        y = contestants.unit_gain(name) * mlp(jax.random.normal(jax.random.key(1), (512, 256)))
        assert np.var(y) == pytest.approx(1, abs=0.08)

    def test_an_odd_hidden_size_is_explained(self):
        with pytest.raises(ValueError, match=r"config.hidden_dim must be even.*: 5.*--config.hidden_dim"):
            contestants.mlp_config("relu", 4, 5)


def quadratic(params, batch):
    return jnp.mean(jnp.square(batch["x"] @ params["layer"]["w"] - batch["y"]))


def normal_batch(seed, step):
    rng = np.random.default_rng([seed, step])
    return {"x": np.float32(rng.standard_normal((16, 4))), "y": np.float32(rng.standard_normal((16, 2)))}


def test_an_ensembles_member_is_a_run_of_the_training_scripts_loop():
    def init(key):
        return {"layer": {"w": jax.random.normal(key, (4, 2))}}

    schedule = ensembles.Schedule(steps=30, warmup_fraction=0.1, weight_decay=0.1)
    members = [Member(3, 1e-2), Member(5, 1e-2), Member(3, 1e-1)]
    final = ensembles.Ensemble(init, quadratic, schedule).final(members, normal_batch).params
    for i, (seed, rate) in enumerate(members):
        optimizer = training.make_optimizer(rate, *schedule)
        state = training.make_init(init, optimizer)(jax.random.key(seed))
        step = jax.jit(training.make_train_step(quadratic, optimizer))
        *_, (_, state, _) = training.optimise(step, state, lambda step, seed=seed: normal_batch(seed, step), 1, 30)
        np.testing.assert_allclose(ensembles.member(final, i)["layer"]["w"], state.params["layer"]["w"], rtol=2e-5)


def test_seeds_read_the_windows_that_the_training_script_would():
    corpus = data.Corpus(train=np.arange(200, dtype=np.uint8), heldout=np.zeros(1, np.uint8))
    batch = ensembles.text_batches(corpus, 8, 4)
    for seed, step in ((0, 1), (5, 3), (0, 3)):
        np.testing.assert_array_equal(batch(seed, step), data.training_batches(corpus.train, 8, 4, seed)[step - 1])
    assert not np.array_equal(batch(0, 3), batch(5, 3))


@pytest.mark.usefixtures("eight_devices")
def test_members_are_divided_over_devices():
    def init(key):
        return {"w": jax.random.normal(key, (3,))}

    def loss(params, x):
        return ((params["w"] - x) ** 2).sum()

    def weights(count):
        """The trained weights of `count` members, and the number of devices that held them."""
        members = [Member(seed, 0.1) for seed in range(count)]
        ensemble = ensembles.Ensemble(init, loss, ensembles.Schedule(5, 0.2, 0.0))
        w = ensemble.final(members, lambda seed, step: np.float32([seed, 0, step])).params["w"]
        return np.asarray(w), len({shard.device for shard in w.addressable_shards})

    (seven, one_device), (eight, all_devices) = weights(7), weights(8)
    assert (one_device, all_devices) == (1, 8)
    np.testing.assert_allclose(seven, eight[:7], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("eight_devices")
def test_a_models_score_is_in_bits_per_byte_wherever_it_was_trained(text):
    config = get_config("compare_activations", "smoke")
    config.update(data=str(text), steps=1)
    evaluate = heldout.make_evaluation(config, heldout.load(config), "gelu")
    untrained, trained = evaluate([Member(0, 0.0), Member(0, 1e-2)])  # on two devices
    assert 8 < untrained < 10  # a guess among 256 bytes costs 8 bits
    assert trained < untrained


class TestTuning:
    def records(self, tmp_path, best):
        """Scores are 10 times the seed, plus the contestant's place, plus the distance from its best rate."""
        ledger = Ledger(tmp_path / "runs.jsonl", TestLedger.Bar())
        asked = []
        for offset, (name, rate) in enumerate(best.items()):

            def evaluate(members, offset=offset, rate=rate):
                asked.append([m.seed for m in members])
                return [10 * m.seed + offset + abs(np.log2(m.learning_rate / rate)) for m in members]

            rates = {"learning_rates": (1.0, 2.0, 4.0), "tuning_seeds": (7, 8), "seeds": (0, 1, 2)}
            tuning.compare(evaluate, ledger, **rates, section="s", contestant=name)
        return ledger.runs, asked

    def test_rates_come_from_seeds_of_their_own_and_seeds_are_paired(self, tmp_path):
        runs, asked = self.records(tmp_path, {"geglu_tanh": 2.0, "relu": 4.0})
        assert asked == [[7, 8, 7, 8, 7, 8], [0, 1, 2]] * 2
        first, second = tuning.rows(runs)
        assert (first["learning_rate"], second["learning_rate"]) == (2.0, 4.0)
        assert (first["mean"], second["mean"]) == (10.0, 11.0) and "difference" not in first
        assert (second["difference"], second["difference_half"]) == (1.0, pytest.approx(0, abs=1e-12))

    @pytest.mark.parametrize(
        ("others", "quantile"), [(1, 4.302653), (2, 6.205347), (3, 7.648804)]
    )  # t(1 - 0.05 / 2 / others) with 2 degrees of freedom, from tables
    def test_the_intervals_of_all_differences_hold_together(self, others, quantile):
        """Each contestant differs from the reference by -1, 0 and 1 around its own place."""
        names = ["geglu_tanh", "relu", "silu", "gelu"][: 1 + others]
        scores = {name: [place - 1.0, place, place + 1.0] for place, name in enumerate(names)}
        scores["geglu_tanh"] = [0.0, 0.0, 0.0]
        common = {"part": "comparison", "seeds": [0, 1, 2], "learning_rates": [1.0] * 3}
        rows = tuning.rows([common | {"contestant": name, "scores": scores[name]} for name in names])
        assert [row["difference"] for row in rows[1:]] == list(range(1, 1 + others))
        for row in rows[1:]:
            assert row["difference_half"] == pytest.approx(quantile / 3**0.5, rel=1e-6)
            assert row["half"] == pytest.approx(4.302653 / 3**0.5, rel=1e-6)

    def test_a_rate_that_diverged_for_any_seed_is_out(self):
        assert tuning.best_rate({"learning_rates": [1.0, 1.0, 2.0, 2.0], "scores": [5.0, 6.0, 1.0, None]}) == 1.0


class TestApproximation:
    def test_the_forms_in_float64_differ_by_4_73e_4(self):
        measured = approximation.by_itself("float64")
        assert measured["max"] == pytest.approx(4.73e-4, abs=5e-7) and abs(measured["at"]) == pytest.approx(
            2.70, abs=0.01
        )
        x = np.linspace(-8, 8, 100_001)
        gap = np.abs(oracle.ACTIVATIONS["gelu_tanh"][0](x) - oracle.ACTIVATIONS["gelu"][0](x))
        density = np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)
        assert measured["mean"] == pytest.approx(np.trapezoid(gap, x) / 16, rel=1e-3)
        assert measured["normal_mean"] == pytest.approx(np.trapezoid(gap * density, x), rel=1e-3)

    def test_the_forms_in_bfloat16_differ_by_a_rounding_step_more_at_most(self):
        x, difference = approximation.differences("bfloat16")
        assert len(np.unique(x)) == len(x) > 3000 and np.array_equal(x, np.asarray(x, jnp.bfloat16).astype(float))
        gelu = np.asarray(oracle.ACTIVATIONS["gelu"][0](x), jnp.bfloat16).astype(float)
        step = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(gelu), 1e-30))) - 7)
        assert (np.abs(difference) <= 4.74e-4 + step).all()
        measured = approximation.by_itself("bfloat16")
        assert measured["max"] == 2**-6 and 0.05 < measured["share_of_normal_that_differs"] < 0.15

    @pytest.mark.slow
    def test_in_a_layer_rounding_changes_more_than_the_form(self):
        exact, rounded = (approximation.in_a_layer("gemma3_270m", dtype, 2) for dtype in ("float32", "bfloat16"))
        assert exact["rounding"] == 0 and 1e-4 < exact["forms"] < 4e-4  # about 8.5e-5 / E[gelu^2]^0.5 is expected
        assert 2e-3 < rounded["rounding"] < 3e-3 and rounded["forms"] < 3e-3

    @pytest.mark.slow
    def test_in_a_model_the_forms_hardly_differ(self, smoke):
        (model,) = (run for run in tables(smoke[0])["approximation"] if run["part"] == "model")
        assert 0 < abs(model["difference"]) <= model["largest"] < 1e-3
