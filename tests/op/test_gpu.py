"""The GPU kernels in Pallas's interpreter against the float64 oracle. tests/aot compiles them with the real compiler.

By default one case of each kernel and save policy runs.
"""

import contextlib
import functools
import importlib
from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gemma_mlp import ACTIVATIONS, MLPConfig, MLPParams, feed_forward, mlp, mlp_hidden
from gemma_mlp.op import choose, gpu_kernels
from gemma_mlp.testing import oracle
from gemma_mlp.testing.oracle import relative_error
from tests.support import cases, samples
from tests.support.vary import first_is_quick

INTERNAL = "jax._src.pallas.mosaic_gpu.interpret"
FLOOR_FACTOR = 1.02
pytestmark = pytest.mark.usefixtures("on_host_cpu")
STEPS = 5 * gpu_kernels.BLOCK_D  # the sum over D has more blocks than are in flight at a time
# The interpreter of JAX 0.10.2 raises if a copy passes the end of an array, and if a block is transposed. The hardware
# allows both.
OLD_INTERPRETER = jax.__version_info__ < (0, 12)
clips = pytest.mark.skipif(OLD_INTERPRETER, reason="this JAX's interpreter has no copies beyond the end")
transposes = pytest.mark.skipif(OLD_INTERPRETER, reason="this JAX's interpreter has no matmuls of transposed blocks")


@contextlib.contextmanager
def interpreted(**options):
    """Has the interpreter run the kernels, on two multiprocessors."""
    params = getattr(plgpu, "InterpretGPUParams", None)  # public from JAX 0.11 or 0.12 on
    interpret = (params or importlib.import_module(f"{INTERNAL}.params").InterpretGPUParams)(**options)
    kernel = functools.partial(pl.kernel, interpret=interpret)
    two = mock.Mock(return_value=2)
    with mock.patch.object(pl, "kernel", kernel), mock.patch.object(gpu_kernels, "count_multiprocessors", two):
        yield


def case(T, D=gpu_kernels.BLOCK_D, F=gpu_kernels.BLOCK_F):
    rng = np.random.default_rng(0)
    return samples.mlp_arrays(rng, D, F, use_bias=False), samples.normal(rng, (T, D))


def run(arrays, x, activation, keep, **options):
    weights = (jnp.asarray(arrays[name], jnp.bfloat16) for name in ("gate_proj", "up_proj"))
    x = jnp.asarray(x, jnp.bfloat16)
    with interpreted(**options):
        results = gpu_kernels.hidden(x, *weights, activation=activation, save_gate_up=keep)
    assert len(results) == (3 if keep else 1)
    return results


def check(results, arrays, x, activation, columns=slice(None)):
    """Every result has the error of rounding the exact one once."""
    gate, up, h = oracle.mlp(arrays, x, activation)[1]
    for result, exact in zip(results, (h, gate, up)):
        assert result.dtype == jnp.bfloat16 and result.shape == exact.shape
        result, exact = result[:, columns], exact[:, columns]
        floor = relative_error(oracle.bfloat16(exact), exact)
        assert relative_error(result, exact) <= FLOOR_FACTOR * floor


def check_gradients(arrays, x, activation, columns=slice(None), **options):
    """h and the gradients of gate and up have the error of rounding once what follows exactly from the inputs."""
    dy = samples.normal(np.random.default_rng(1), x.shape)
    gate, up, _ = oracle.mlp(arrays, x, activation)[1]
    dy, down_proj, gate, up = (oracle.bfloat16(a) for a in (dy, arrays["down_proj"], gate, up))
    act, d_act = oracle.ACTIVATIONS[activation]
    dh = dy @ down_proj.T
    exact = act(gate) * up, dh * up * d_act(gate), dh * act(gate)
    given = (jnp.asarray(a, jnp.bfloat16) for a in (dy, down_proj, gate, up))
    with interpreted(**options):
        results = gpu_kernels.hidden_gradients(*given, activation=activation)
    for result, expected in zip(results, exact, strict=True):
        assert result.dtype == jnp.bfloat16 and result.shape == expected.shape
        result, expected = result[:, columns], expected[:, columns]
        floor = relative_error(oracle.bfloat16(expected), expected)
        assert relative_error(result, expected) <= FLOOR_FACTOR * floor


def near_the_dip():
    """In the first columns the gates are near -2.7, where the two forms of GELU differ by a twentieth."""
    arrays, x = case(64)
    near = slice(None, 64)
    x[:, 0] = 1
    arrays["gate_proj"][:, near] /= 16
    arrays["gate_proj"][0, near] = -2.6875
    return arrays, x, (near, slice(64, None))


@pytest.mark.parametrize("activation", first_is_quick(ACTIVATIONS))
def test_every_activation(activation):
    arrays, x, parts = near_the_dip()
    results = run(arrays, x, activation, keep=True)
    for columns in parts:
        check(results, arrays, x, activation, columns)


@transposes
@pytest.mark.parametrize("activation", first_is_quick(ACTIVATIONS))
def test_every_activations_gradients(activation):
    arrays, x, parts = near_the_dip()
    for columns in parts:
        check_gradients(arrays, x, activation, columns)


@pytest.mark.slow
@pytest.mark.parametrize("T", [64, 256])
def test_no_warp_group_reads_what_another_writes(T):
    """There are more steps than blocks in flight, and more blocks of results than multiprocessors."""
    arrays, x = case(T, STEPS, 3 * gpu_kernels.BLOCK_F)
    check(run(arrays, x, "gelu_tanh", keep=True, detect_races=True), arrays, x, "gelu_tanh")
    assert not importlib.import_module(f"{INTERNAL}.gpu_callbacks").get_races().races_found


@transposes
@pytest.mark.parametrize("T", first_is_quick([64, 256]))
def test_no_warp_group_of_the_gradients_reads_what_another_writes(T):
    check_gradients(*case(T, STEPS, 3 * gpu_kernels.BLOCK_F), "gelu_tanh", detect_races=True)
    assert not importlib.import_module(f"{INTERNAL}.gpu_callbacks").get_races().races_found


@pytest.mark.slow
def test_more_tokens_than_share_a_column_of_the_weights():
    arrays, x = case((gpu_kernels.GROUP + 1) * 128, F=2 * gpu_kernels.BLOCK_F)
    check(run(arrays, x, "gelu_tanh", keep=False), arrays, x, "gelu_tanh")


@pytest.fixture
def interpreted_gpu(monkeypatch):
    """The package believes that it compiles for a GPU, and the interpreter runs the kernels."""
    monkeypatch.setattr(choose, "target_device", lambda: SimpleNamespace(platform="gpu"))
    with interpreted():
        yield


@pytest.mark.parametrize("param_dtype", first_is_quick(["bfloat16", "float32"]))
def test_hidden_activations(param_dtype, interpreted_gpu):
    arrays, x = case(64)
    config = MLPConfig(gpu_kernels.BLOCK_D, gpu_kernels.BLOCK_F, dtype="bfloat16", implementation="pallas")
    params = samples.mlp_params(arrays, param_dtype)
    check([mlp_hidden(params, jnp.asarray(x, "bfloat16"), config)], arrays, x, "gelu_tanh")


@pytest.mark.parametrize("save", ["input", pytest.param("gate_up", marks=transposes)])
def test_the_feed_forward_around_them(save, interpreted_gpu):
    rng = np.random.default_rng(0)
    arrays = samples.mlp_arrays(rng, gpu_kernels.BLOCK_D, 2 * gpu_kernels.BLOCK_F, use_bias=False)
    x, dy = (samples.normal(rng, (2, 32, gpu_kernels.BLOCK_D)) for _ in range(2))
    exact = cases.exact_result(arrays, x, dy, "gelu_tanh")
    result = cases.run(arrays, x, dy, "bfloat16", jit=True, save=save, implementation="pallas")
    floor = cases.floor_errors(arrays, x, dy, "gelu_tanh", exact, save)
    for name, error in cases.errors(result, exact).items():
        assert error <= FLOOR_FACTOR * floor[name], name


@pytest.mark.parametrize("save", ["input", "gate_up"])
def test_second_derivatives_are_refused(save, interpreted_gpu):
    arrays, x = case(64)
    params, x = samples.mlp_params(arrays, "bfloat16"), jnp.asarray(x, "bfloat16")
    gradient = jax.grad(lambda x: jnp.sum(feed_forward(params, x, save=save, implementation="pallas") ** 2))
    with pytest.raises(ValueError, match=r"must not be differentiated again.*Fix: use implementation='xla'"):
        jax.make_jaxpr(jax.grad(lambda x: gradient(x).sum()))(x)


@pytest.mark.parametrize("save", ["input", "gate_up"])
def test_each_tag_is_there_once(save, interpreted_gpu):
    arrays, x = case(64)
    params, x = samples.mlp_params(arrays, "bfloat16"), jnp.asarray(x, "bfloat16")
    loss = lambda params: feed_forward(params, x, save=save, implementation="pallas").sum()  # noqa: E731
    program = str(jax.make_jaxpr(jax.grad(loss))(params))
    projections = int(save == "gate_up")
    tags = {"mlp_gate": projections, "mlp_up": projections, "mlp_hidden": 1, "mlp_out": 1}
    assert {tag: program.count(f"name={tag}") for tag in tags} == tags


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_forms_that_are_lowered_are_the_activations_and_their_derivatives(activation):
    """On every JAX: the interpreter of JAX 0.10.2 does not run the kernel that takes the derivatives."""
    form, x = gpu_kernels.LOWERED[activation], np.linspace(-12, 12, 4801)
    with jax.enable_x64(True):
        for function, exact in zip((form, form.derivative), oracle.ACTIVATIONS[activation], strict=True):
            # 1 - tanh^2 of GELU loses digits where tanh is near 1; the largest error measured is 3.8e-14.
            np.testing.assert_allclose(function(jnp.asarray(x)), exact(x), atol=5e-14)


@pytest.mark.slow
@transposes
def test_a_batch_of_them():
    rng = np.random.default_rng(0)
    shapes = (64, gpu_kernels.BLOCK_D), (gpu_kernels.BLOCK_F, gpu_kernels.BLOCK_D), *[(64, gpu_kernels.BLOCK_F)] * 2
    given = [jnp.asarray(samples.normal(rng, (2, *shape)), "bfloat16") for shape in shapes]
    gradients = functools.partial(gpu_kernels.hidden_gradients, activation="silu")
    with interpreted():
        batch = jax.vmap(gradients)(*given)
        for i in range(2):
            for whole, single in zip(batch, gradients(*(a[i] for a in given)), strict=True):
                np.testing.assert_array_equal(whole[i], single)


@clips
@pytest.mark.parametrize("T", first_is_quick([65, 1, 7, 16, 63, 100, 130, 264]))
def test_any_number_of_tokens(T):
    arrays, x = case(T)
    check(run(arrays, x, "gelu_tanh", keep=True), arrays, x, "gelu_tanh")
    check_gradients(arrays, x, "gelu_tanh")


def refusal(x, gate_proj, up_proj, dtype="bfloat16"):
    arrays = (jax.ShapeDtypeStruct(shape, dtype) for shape in (x, gate_proj, up_proj))
    with pytest.raises(ValueError, match=r"Got: .*\. Fix: ") as refused:
        jax.eval_shape(lambda *args: gpu_kernels.hidden(*args, activation="gelu_tanh", save_gate_up=False), *arrays)
    return str(refused.value)


def test_other_dtypes_are_refused():
    assert "must be bfloat16" in refusal((64, 64), (64, 128), (64, 128), "float32")


@pytest.mark.parametrize(
    ("x", "gate_proj", "up_proj"),
    [
        ((2, 64, 64), (64, 128), (64, 128)),
        ((0, 64), (64, 128), (64, 128)),
        ((64, 64), (128, 128), (128, 128)),
        ((64, 64), (64, 128), (64, 256)),
        ((64, 64), (64,), (64,)),
    ],
)
def test_other_shapes_are_refused(x, gate_proj, up_proj):
    assert "x or dy must be [T, D]" in refusal(x, gate_proj, up_proj)


@pytest.mark.parametrize(
    ("dy", "down_proj", "gate", "up"),
    [
        ((64, 64), (64, 128), (64, 128), (64, 128)),
        ((64, 64), (128, 64), (32, 128), (32, 128)),
        ((64, 64), (128, 64), (64, 128), (64, 256)),
    ],
)
def test_other_shapes_of_gradients_are_refused(dy, down_proj, gate, up):
    arrays = (jax.ShapeDtypeStruct(shape, "bfloat16") for shape in (dy, down_proj, gate, up))
    with pytest.raises(ValueError, match=r"down_proj \[F, D\], and gate and up \[T, F\]"):
        jax.eval_shape(lambda *args: gpu_kernels.hidden_gradients(*args, activation="gelu_tanh"), *arrays)


@pytest.mark.parametrize(("D", "F"), [(96, 128), (64, 192), (64, 0), (0, 128)])
def test_sizes_that_are_no_multiples_are_refused(D, F):
    assert "D must be a multiple of 64 and F a multiple of 128" in refusal((64, D), (D, F), (D, F))


@pytest.mark.parametrize("kind", ["NVIDIA A100-SXM4-80GB", "NVIDIA B200", "NVIDIA GeForce RTX 4090", "cpu"])
def test_other_devices_are_refused(kind):
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=100, platform="gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("chip",), abstract_device=device)):
        assert repr(kind) in refusal((64, 64), (64, 128), (64, 128))


def test_a_cpu_is_refused_without_the_interpreter():
    assert "compute capability 9.0" in refusal((64, 64), (64, 128), (64, 128))


@pytest.mark.parametrize("kind", ["NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA GH200 480GB", "NVIDIA H20"])
def test_hopper_devices_are_served(kind):
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=78, platform="gpu")
    args = (jax.ShapeDtypeStruct(shape, "bfloat16") for shape in ((64, 64), (64, 128), (64, 128)))
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("chip",), abstract_device=device)):
        (h,) = jax.eval_shape(lambda *args: gpu_kernels.hidden(*args, activation="silu", save_gate_up=False), *args)
    assert h.shape == (64, 128)


@pytest.mark.parametrize("save", ["input", "gate_up"])
def test_gradients_are_traced_also_where_the_interpreter_cannot_run_them(save):
    config = MLPConfig(64, 128, dtype="bfloat16", param_dtype="bfloat16", save=save, implementation="pallas")
    params = jax.eval_shape(lambda: MLPParams.init(config, jax.random.key(0)))
    x = jax.ShapeDtypeStruct((2, 32, 64), "bfloat16")
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("chip",), abstract_device=device)):
        gradients = jax.eval_shape(jax.grad(lambda *args: mlp(*args, config).sum(), argnums=(0, 1)), params, x)
    expected = jax.tree.map(lambda a: (a.shape, a.dtype), (params, x))
    assert jax.tree.map(lambda a: (a.shape, a.dtype), gradients) == expected
