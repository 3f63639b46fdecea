"""The measures of compare_activations.py (gradient flow, fit, curvature) equal values computed in other ways."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from byte_decoder.language_model import pure_functions
from compare_activations import contestants, curvature, expressiveness, gradient_flow
from compare_activations.ensembles import Member
from flax import nnx

import gemma_mlp
from tests.support.configs import get_config

pytestmark = pytest.mark.promotes


class TestGradientFlow:
    @pytest.mark.slow
    def test_norms_equal_those_of_a_stack_written_out(self):
        depth, dim = 2, 8
        wiring = gradient_flow.WIRINGS["norms and residual"]
        init, forward = gradient_flow.make_stack("geglu_tanh", dim, 16, depth, **wiring)
        params = init(jax.random.key(0))
        windows = jax.random.randint(jax.random.key(1), (2, 6), 0, 256)
        config = contestants.mlp_config("geglu_tanh", dim, 16)

        @functools.partial(jax.jit, static_argnums=1)
        @functools.partial(jax.value_and_grad, has_aux=True)
        def loss_after(x, first):
            streams = [x]
            for i in range(first, depth):
                layer = jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"])
                norms = (gemma_mlp.RMSNormParams(**layer[name]) for name in ("pre_norm", "post_norm"))
                pre, post = norms
                block = gemma_mlp.MLPBlockParams(pre, gemma_mlp.MLPParams(**layer["mlp"]), post)
                x = gemma_mlp.mlp_block(block, x, config)
                streams.append(x)
            scaled = x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)
            log_p = jax.nn.log_softmax(scaled @ params["embed"].T)
            return -jnp.take_along_axis(log_p, windows[:, 1:, None], axis=-1).mean(), streams

        start = params["embed"][windows[:, :-1]] * dim**0.5
        (loss, streams), whole = loss_after(start, 0)
        flow = jax.jit(gradient_flow.make_flow(forward, depth, dim))(params, windows)
        assert flow["loss"] == pytest.approx(float(loss), rel=1e-5)
        assert flow["gradients"].shape == flow["activations"].shape == (depth + 1,)
        assert flow["gradients"][0] == pytest.approx(float(gradient_flow.rms(whole)), rel=1e-4)
        np.testing.assert_allclose(flow["activations"], [gradient_flow.rms(x) for x in streams], rtol=1e-4)
        _, middle = loss_after(streams[depth - 1], depth - 1)
        assert flow["gradients"][depth - 1] == pytest.approx(float(gradient_flow.rms(middle)), rel=1e-4)

    def test_decades_are_of_the_first_layer_over_the_last(self):
        np.testing.assert_allclose(gradient_flow.decades([[100.0, 3.0, 1.0], [0.1, 3.0, 1.0]]), [2, -1])
        assert gradient_flow.summary(gradient_flow.decades([[0.0, 1.0]] * 2)) == ("vanished", None)
        assert gradient_flow.summary(gradient_flow.decades([[None, 1.0], [1.0, 1.0]])) == ("undefined", None)


class TestExpressiveness:
    def test_tasks_are_what_their_names_say(self):
        for function, expected in {
            "a b": lambda a, b, c: a * b,
            "a b c": lambda a, b, c: a * b * c,
            "sin 2a": lambda a, b, c: np.sin(2 * a),
            "|a|": lambda a, b, c: np.maximum(a, -a),
        }.items():
            batch = expressiveness.make_task(function, 4, 32)
            (x, y), (again, _) = batch(0, 1), batch(0, 1)
            np.testing.assert_array_equal(x, again)
            assert (x[:, -1] == 1).all()
            projections = np.random.default_rng(0).standard_normal((3, 3, 4))
            projections /= np.sqrt((projections**2).sum(axis=1, keepdims=True))
            np.testing.assert_allclose(y, expected(*(np.float64(x[:, :-1]) @ projections)), atol=1e-5)
            assert not np.array_equal(x, batch(0, 2)[0]) and not np.array_equal(x, batch(1, 1)[0])
            assert not np.array_equal(x, batch(0, 0)[0][:32])

    @pytest.mark.slow
    def test_a_gate_fits_a_product(self):
        ours = get_config("compare_activations", "smoke").expressiveness
        ours.update(steps=300, batch_size=64)
        members = [Member(0, 3e-2), Member(1, 3e-2)]
        bilinear, relu = (expressiveness.make_fit(ours, name, "a b")(members) for name in ("bilinear", "relu"))
        assert max(bilinear) < min(relu) - 1 and max(relu) < -0.3

    @pytest.mark.slow
    def test_the_score_is_measured_on_test_points(self):
        ours = get_config("compare_activations", "smoke").expressiveness
        ours.update(steps=1, batch_size=64)
        untrained = expressiveness.make_fit(ours, "bilinear", "|a|")([Member(0, 0.0), Member(1, 0.0)])
        # y has mean square 1 and variance 1 - 2 / pi. An untrained output has a mean square of about 1.
        assert np.mean(untrained) == pytest.approx(np.log10(2 / (1 - 2 / np.pi)), abs=0.2)


class TestCurvature:
    def test_lanczos_finds_the_largest_not_the_longest(self):
        rng = np.random.default_rng(0)
        basis = np.linalg.qr(rng.standard_normal((30, 30)))[0]
        values = np.array([-50.0, *np.linspace(-1, 1, 28), 7.0])
        matrix = jnp.float32(basis * values @ basis.T)
        start = jnp.float32(rng.standard_normal(30))
        assert curvature.largest_eigenvalue(lambda v: matrix @ v, start, 12) == pytest.approx(7.0, rel=1e-3)

    @pytest.mark.slow
    def test_both_measures_equal_those_by_the_dense_hessian(self):
        config = contestants.mlp_config("swiglu", 3, 4)
        init, apply = pure_functions(lambda key: gemma_mlp.nnx.MLP(config, rngs=nnx.Rngs(params=key)))
        x = jax.random.normal(jax.random.key(1), (16, 3))

        def loss(params, x):
            return jnp.mean(jnp.square(apply(params, x) - x))

        before, after = init(jax.random.key(2)), init(jax.random.key(3))
        measured = jax.jit(functools.partial(curvature.curvature, loss, iterations=36))(before, after, x)
        flat, unravel = jax.flatten_util.ravel_pytree(after)
        old = jax.flatten_util.ravel_pytree(before)[0]

        def of_flat(flat):
            params = unravel(flat)
            h = jax.nn.silu(x @ params["gate_proj"]) * (x @ params["up_proj"])
            return jnp.mean(jnp.square(h @ params["down_proj"] - x))

        largest = np.linalg.eigvalsh(np.float64(jax.jit(jax.hessian(of_flat))(flat)))[-1]
        assert measured["eigenvalue"] == pytest.approx(largest, rel=1e-3)
        gradients = jax.grad(of_flat)(flat) - jax.grad(of_flat)(old)
        assert measured["change"] == pytest.approx(
            float(jnp.linalg.norm(gradients) / jnp.linalg.norm(flat - old)), rel=1e-3
        )

    def test_a_kink_shows_in_the_change_of_the_gradient_alone(self):
        def loss(params, _):
            return jax.nn.relu(params["w"]).sum() + 0.5 * jnp.sum(jnp.square(params["w"]))

        before, after = ({"w": jnp.float32([sign * 0.1, 1.0, 2.0])} for sign in (-1, 1))
        measured = curvature.curvature(loss, before, after, None, iterations=1)
        assert measured["eigenvalue"] == pytest.approx(1.0) and measured["change"] == pytest.approx(1 + 1 / 0.2)

    def test_ratios_are_paired_with_the_kinked_activation_of_the_same_gate(self):
        def run(name, *values):
            moment = {"step": 5, "eigenvalue": list(values), "change": [1.0, 1.0]}
            return {"section": "curvature", "contestant": name, "at": [moment]}

        runs = [run("swiglu", 2.0, 20.0), run("reglu", 8.0, 80.0), run("silu", 6.0, 3.0), run("relu", 3.0, 1.5)]
        ratios = {row["contestant"]: row.get("eigenvalue log2 ratio") for row in curvature.table(runs)}
        assert ratios == {"swiglu": pytest.approx(-2), "reglu": None, "silu": pytest.approx(1), "relu": None}
