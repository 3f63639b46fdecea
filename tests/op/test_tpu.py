"""The TPU kernels in Pallas's interpreter, which also looks for races. tests/aot compiles them with the real compiler.

By default one case of each kernel and save policy runs, and a few that vary shapes, chips and dtypes.
"""

import dataclasses
import functools
import importlib
import itertools
import math
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from gemma_mlp import ACTIVATIONS, PRESETS, MLPConfig, MLPParams, feed_forward, mlp, mlp_hidden, sharding
from gemma_mlp.op import choose, tpu_backward, tpu_blocks, tpu_forward
from gemma_mlp.op.tpu import TPU
from gemma_mlp.testing import oracle
from gemma_mlp.testing.oracle import relative_error
from tests.support import samples
from tests.support.cases import FLOAT32_BOUND, errors, exact_result, floor_errors, run
from tests.support.meshes import RULES, make_mesh, spread
from tests.support.vary import first_is_quick, slow, vary

V5E, V5P, V6E = pltpu.ChipVersion.TPU_V5E, pltpu.ChipVersion.TPU_V5P, pltpu.ChipVersion.TPU_V6E
EMBED_DIM, HIDDEN_DIM = 128, 512
SERVED_ACTIVATIONS = [name for name in ACTIVATIONS if name not in TPU.lacks]
FLOOR_FACTOR = 1.02
pytestmark = pytest.mark.usefixtures("on_host_cpu")


def small_blocks(monkeypatch, version=V5E, cores=1):
    """The package believes that it compiles for a TPU, and takes small blocks, so that a small case has several."""
    info = pltpu.get_tpu_info_for_chip(version, cores)
    monkeypatch.setattr(pltpu, "get_tpu_info", lambda: info)
    monkeypatch.setattr(choose, "target_device", lambda: SimpleNamespace(platform="tpu"))
    monkeypatch.setattr(tpu_blocks, "MOST_HIDDEN", 128)
    monkeypatch.setattr(tpu_forward, "MOST_TOKENS", 64)
    monkeypatch.setattr(tpu_forward, "UNROLLED", 32)
    monkeypatch.setattr(tpu_backward, "MOST_TOKENS", 32)
    jax.clear_caches()


def without_aliases_of_tails(pallas_call, *args, **options):
    """The interpreter fails if an output that overwrites an input has a last block that is not full."""

    def is_full(i):
        return options["out_shape"][i].shape[0] % options["out_specs"][i].block_shape[0] == 0

    aliases = options.pop("input_output_aliases", {})
    aliases = {given: i for given, i in aliases.items() if is_full(i)}
    return pallas_call(*args, input_output_aliases=aliases, **options)


def chip_id(chip):
    return f"{chip[0].name}-{chip[1]}"


@pytest.fixture(params=[(V5E, 1)], ids=chip_id)
def chip(request, monkeypatch, capsys):
    version, cores = request.param
    small_blocks(monkeypatch, version, cores)
    monkeypatch.setattr(pl, "pallas_call", functools.partial(without_aliases_of_tails, pl.pallas_call))
    interpreter = importlib.import_module("jax._src.pallas.mosaic.interpret.interpret_pallas_call")
    options = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=cores)
    if cores > 1:  # the interpreter does not know core_parallel, and would shuffle a parallel axis
        monkeypatch.setattr(tpu_backward, "CORES", "parallel")
        unshuffled = lambda grid, *_: (jnp.zeros(0, jnp.int32),) * len(grid)  # noqa: E731
        monkeypatch.setattr(interpreter, "_get_randomized_grid_coordinates", unshuffled)
    with pltpu.force_tpu_interpret_mode(options):
        yield
    assert interpreter.races is None or not interpreter.races.races_found
    assert "non-zero count" not in capsys.readouterr().out  # printed if a semaphore is not 0 when a kernel ends
    jax.clear_caches()


@pytest.fixture
def simple_chip(monkeypatch):
    """Pallas's other interpreter makes XLA operations. It finds no races, but runs under every transformation."""
    small_blocks(monkeypatch)
    monkeypatch.setattr(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True))
    yield
    jax.clear_caches()


def case(batch, embed_dim=EMBED_DIM, hidden_dim=HIDDEN_DIM):
    rng = np.random.default_rng(0)
    arrays = samples.mlp_arrays(rng, embed_dim, hidden_dim, use_bias=False)
    return arrays, *(samples.normal(rng, (*batch, embed_dim)) for _ in range(2))


@vary(
    "batch save chip",
    itertools.product([(), (16,), (40,), (2, 65)], ["input", "gate_up"], [(V5E, 1), (V5P, 2)]),
    indirect=["chip"],
)
def test_bfloat16_is_at_the_floor(batch, save, chip):
    arrays, x, dy = case(batch)
    exact = exact_result(arrays, x, dy, "gelu_tanh")
    floor = floor_errors(arrays, x, dy, "gelu_tanh", exact, save)
    result = run(arrays, x, dy, "bfloat16", jit=True, save=save, implementation="pallas")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(result)} == {"bfloat16"}
    for name, error in errors(result, exact).items():
        assert error <= FLOOR_FACTOR * floor[name], name


@pytest.mark.parametrize(
    ("activation", "save"),
    [
        row if row in [("gelu_tanh", "input"), ("silu", "gate_up")] else slow(*row)
        for row in itertools.product(SERVED_ACTIVATIONS, ["input", "gate_up"])
    ],
)
def test_float32_equals_the_oracle(activation, save, chip):
    arrays, x, dy = case((70,))
    result = run(arrays, x, dy, "float32", jit=True, activation=activation, save=save, implementation="pallas")
    for name, error in errors(result, exact_result(arrays, x, dy, activation)).items():
        assert error <= FLOAT32_BOUND, name


@pytest.mark.parametrize("chip", [(V5P, 2)], ids=chip_id, indirect=True)
@pytest.mark.parametrize(
    ("tokens", "hidden_dim"),
    [
        (16, 512),  # one turn: the cores alternate
        (40, 512),  # two
        (128, 256),  # four turns; each core has one block of F
        (90, 512),  # an odd number of turns, and a block of tokens that is not full
        slow(192, 768),
        slow(70, 384),  # three blocks of F: one core computes them
    ],
)
def test_two_cores_add_to_one_dx(tokens, hidden_dim, chip):
    """The interpreter runs each core in a thread. Cores that use the same rows at once are a race to it."""
    arrays, x, dy = case((tokens,), hidden_dim=hidden_dim)
    result = run(arrays, x, dy, "float32", jit=True, implementation="pallas")
    for name, error in errors(result, exact_result(arrays, x, dy, "gelu_tanh")).items():
        assert error <= FLOAT32_BOUND, name


@pytest.mark.parametrize("save", first_is_quick(["input", "gate_up"]))
def test_float32_weights_in_bfloat16(save, chip):
    """The kernel rounds the weights as it reads them, and stores their gradients in float32."""
    arrays, x, dy = case((70,))
    options = {"param_dtype": "float32", "dtype": "bfloat16", "save": save, "implementation": "pallas"}
    result = run(arrays, x, dy, "bfloat16", jit=True, **options)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(result[1])} == {"float32"}
    exact = exact_result(arrays, x, dy, "gelu_tanh")
    floor = floor_errors(arrays, x, dy, "gelu_tanh", exact, save, weights=lambda a: a)
    for name, error in errors(result, exact).items():
        assert error <= FLOOR_FACTOR * floor[name], name


DTYPES = [("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "float32")]


@vary("batch dtypes chip", itertools.product([(), (40,), (2, 65)], DTYPES, [(V5E, 1), (V5P, 2)]), indirect=["chip"])
def test_hidden_activations(batch, dtypes, chip):
    """Gate and up stay in float32, so that in bfloat16 the error is that of rounding h alone."""
    dtype, param_dtype = dtypes
    arrays, x, _ = case(batch)
    config = MLPConfig(EMBED_DIM, HIDDEN_DIM, dtype=dtype, implementation="pallas")
    apply = functools.partial(mlp_hidden, config=config)
    args = samples.mlp_params(arrays, param_dtype), jnp.asarray(x, dtype)
    assert "name=geglu_hidden" in str(jax.make_jaxpr(apply)(*args))
    h, (_, _, exact) = jax.jit(apply)(*args), oracle.mlp(arrays, x, "gelu_tanh")[1]
    assert h.dtype == dtype
    floor = relative_error(oracle.bfloat16(exact), exact)
    assert relative_error(h, exact) <= (FLOAT32_BOUND if dtype == "float32" else FLOOR_FACTOR * floor)


def test_gradients_of_hidden_activations(chip):
    arrays, x, _ = case((70,))

    def loss(implementation, params, x):
        config = MLPConfig(EMBED_DIM, HIDDEN_DIM, dtype="float32", implementation=implementation)
        return jnp.sum(jnp.sin(mlp_hidden(params, x, config)))

    args = samples.mlp_params(arrays, "float32"), jnp.asarray(x, "float32")
    gradients = (jax.jit(jax.grad(functools.partial(loss, i), argnums=(0, 1)))(*args) for i in ("pallas", "xla"))
    for leaf, expected in zip(*map(jax.tree.leaves, gradients), strict=True):
        assert relative_error(leaf, np.asarray(expected, np.float64)) <= FLOAT32_BOUND


@pytest.mark.parametrize("save", ["input", "gate_up"])
def test_chunks_change_nothing(save, chip):
    arrays, x, dy = case((70,))
    params, x, dy = samples.mlp_params(arrays, "float32"), jnp.asarray(x), jnp.asarray(dy)

    def program(chunk_size):
        apply = functools.partial(feed_forward, save=save, chunk_size=chunk_size, implementation="pallas")
        return str(jax.make_jaxpr(functools.partial(samples.value_and_pullback, apply))(params, x, dy))

    assert program(24) == program(None)


@pytest.mark.parametrize("save", first_is_quick(["input", "gate_up"]))
def test_each_tag_is_there_once(save, chip):
    """A user's remat policy finds what the kernels return. h never leaves them."""
    arrays, x, _ = case((70,))
    params, x = samples.mlp_params(arrays, "float32"), jnp.asarray(x, "float32")
    loss = lambda params: feed_forward(params, x, save=save, implementation="pallas").sum()  # noqa: E731
    program = str(jax.make_jaxpr(jax.grad(loss))(params))
    assert "pallas_call" in program
    projections = int(save == "gate_up")
    tags = {"mlp_gate": projections, "mlp_up": projections, "mlp_hidden": 0, "mlp_out": 1}
    assert {tag: program.count(f"name={tag}") for tag in tags} == tags


@pytest.mark.parametrize(
    ("save", "kernel"), [("input", "geglu_gradients"), slow("gate_up", "geglu_gradients_from_saved")]
)
def test_the_backward_kernel_runs_where_all_gradients_are_wanted(save, kernel, simple_chip):
    """It computes those of all weights, so XLA takes over where one is not wanted."""
    arrays, x, _ = case((70,))
    params, x = samples.mlp_params(arrays, "float32"), jnp.asarray(x, "float32")

    def program(*argnums):
        loss = lambda *args: feed_forward(*args, save=save, implementation="pallas").sum()  # noqa: E731
        return str(jax.make_jaxpr(jax.grad(loss, argnums))(params, x))

    assert f"name={kernel}\n" in program(0, 1) and "name=geglu_gradients" not in program(1)


@pytest.mark.parametrize("save", first_is_quick(["input", "gate_up"]))
def test_under_vmap_each_element_has_its_own_gradients(save, simple_chip):
    """In a batch of experts, each with its own tokens. (The interpreter that looks for races cannot run batches.)"""
    (arrays, x, dy), rng = case((2, 40)), np.random.default_rng(1)
    both = [arrays, samples.mlp_arrays(rng, EMBED_DIM, HIDDEN_DIM, use_bias=False)]
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(samples.mlp_params(a, "float32") for a in both))
    experts = jax.vmap(functools.partial(feed_forward, save=save, implementation="pallas"))
    gradients = functools.partial(samples.value_and_pullback, experts)
    args = params, jnp.asarray(x), jnp.asarray(dy)
    if save == "input":  # Mosaic cannot batch this kernel, but this interpreter can
        assert re.search(r"scan\[.*name=geglu_gradients\n", str(jax.make_jaxpr(gradients)(*args)), re.DOTALL)
    result = jax.jit(gradients)(*args)
    for i in range(2):
        exact = exact_result(both[i], x[i], dy[i], "gelu_tanh")
        for name, error in errors(jax.tree.map(lambda a: a[i], result), exact).items():
            assert error <= FLOAT32_BOUND, name


@pytest.mark.parametrize("save", ["input", "gate_up"])
def test_second_derivatives_are_refused(save, simple_chip):
    arrays, x, _ = case((16,))
    params, x = samples.mlp_params(arrays, "float32"), jnp.asarray(x, "float32")
    loss = lambda *args: jnp.sum(jnp.sin(feed_forward(*args, save=save, implementation="pallas")))  # noqa: E731
    gradient = lambda x: jax.grad(loss, argnums=(0, 1))(params, x)[1]  # noqa: E731
    pullback = jax.vjp(loss, params, x)[1]
    one = jnp.ones(())
    derivatives = [
        lambda: jax.grad(lambda x: gradient(x).sum())(x),
        lambda: jax.jvp(gradient, (x,), (x,)),
        lambda: jax.jvp(pullback, (one,), (one,)),  # of the backward kernel alone
    ]
    for derivative in derivatives:
        with pytest.raises(ValueError, match=r"must not be differentiated again.*Fix: use implementation='xla'"):
            derivative()


@pytest.mark.slow
@pytest.mark.parametrize("save", ["input", "gate_up"])
def test_a_rematerialised_scan_is_that_of_xla(save, simple_chip):
    config = MLPConfig(EMBED_DIM, HIDDEN_DIM, save=save)
    params = jax.vmap(lambda key: MLPParams.init(config, key))(jax.random.split(jax.random.key(0), 2))
    x = jax.random.normal(jax.random.key(1), (2, 20, EMBED_DIM))

    def loss(implementation, params, x):
        layer = functools.partial(mlp, config=dataclasses.replace(config, implementation=implementation))
        step = jax.checkpoint(lambda x, p: (x + layer(p, x), None))
        return jnp.sum(jnp.sin(jax.lax.scan(step, x, params)[0]))

    gradients = (jax.jit(jax.grad(functools.partial(loss, i), argnums=(0, 1)))(params, x) for i in ("pallas", "xla"))
    for leaf, expected in zip(*map(jax.tree.leaves, gradients)):
        assert relative_error(leaf, np.asarray(expected, np.float64)) <= 3 * FLOAT32_BOUND  # through two layers


UNSHARDED_F = (
    ("batch", ("data", "fsdp", "tensor")),
    ("length", None),
    ("embed", ("fsdp", "tensor")),
    ("mlp", None),
)


ON_MESHES = {  # data, fsdp, tensor, rules, save
    "replicas": (2, 2, 2, RULES["sequence"], "input"),
    "replicas and saved arrays": (2, 2, 2, RULES["sequence"], "gate_up"),
    "sequence": (1, 4, 2, RULES["sequence"], "input"),
    "tensor": (1, 4, 2, RULES["tensor"], "input"),
    "data alone": (1, 4, 2, UNSHARDED_F, "input"),
}


@pytest.mark.parametrize("name", first_is_quick(ON_MESHES))
def test_a_mesh_changes_no_number(name, simple_chip, eight_devices):
    data, fsdp, tensor, rules, save = ON_MESHES[name]
    arrays, x, dy = case((8, 16), hidden_dim=1024)
    mesh = make_mesh(fsdp, tensor, data=data)
    specs = MLPParams.specs(MLPConfig(EMBED_DIM, 1024))
    params = spread(samples.mlp_params(arrays, "float32"), mesh, rules, specs)
    stream = sharding.activation_sharding(x.shape, mesh, rules)
    x_there, dy_there = (jax.device_put(jnp.asarray(a, "float32"), stream) for a in (x, dy))
    apply = functools.partial(feed_forward, axis_rules=rules, save=save, implementation="pallas")
    with jax.set_mesh(mesh):
        result = jax.jit(functools.partial(samples.value_and_pullback, apply))(params, x_there, dy_there)
    for name, error in errors(result, exact_result(arrays, x, dy, "gelu_tanh")).items():
        assert error <= FLOAT32_BOUND, name


@pytest.mark.parametrize("manual", first_is_quick([("data",), ("data", "fsdp", "tensor")]), ids=len)
def test_inside_a_users_shard_map(manual, simple_chip, eight_devices):
    arrays, x, dy = case((4, 16))
    params, x = samples.mlp_params(arrays, "float32"), jnp.asarray(x, "float32")
    apply = functools.partial(feed_forward, axis_rules=RULES["tensor"], implementation="pallas")
    split = {"in_specs": (jax.P(), jax.P("data")), "out_specs": jax.P("data"), "axis_names": set(manual)}
    with jax.set_mesh(make_mesh(fsdp=1, tensor=2, data=2)):
        inside = jax.jit(jax.shard_map(apply, check_vma=False, **split))
        result = samples.value_and_pullback(inside, params, x, dy)
        with pytest.raises(ValueError, match=r"needs check_vma=False.*vary over data.*Fix: pass check_vma=False"):
            jax.jit(jax.shard_map(apply, **split))(params, x)
    for name, error in errors(result, exact_result(arrays, np.asarray(x), dy, "gelu_tanh")).items():
        assert error <= FLOAT32_BOUND, name


def test_unknown_sizes_are_refused(simple_chip):
    params = samples.mlp_params(case(())[0], "float32")
    x = jax.ShapeDtypeStruct(jax.export.symbolic_shape(f"b, {EMBED_DIM}"), "float32")
    with pytest.raises(ValueError, match=r"needs sizes that are known when the program is traced.*float32\[b, 128\]"):
        jax.export.export(jax.jit(functools.partial(feed_forward, implementation="pallas")))(params, x)


def test_hidden_activations_on_a_mesh(simple_chip, eight_devices):
    arrays, x, _ = case((8, 16), hidden_dim=1024)
    rules, mesh = RULES["sequence"], make_mesh(4, 2)
    specs = MLPParams.specs(MLPConfig(EMBED_DIM, 1024))
    params = spread(samples.mlp_params(arrays, "float32"), mesh, rules, specs)
    config = MLPConfig(EMBED_DIM, 1024, dtype="float32", axis_rules=rules, implementation="pallas")
    x_there = jax.device_put(jnp.asarray(x, "float32"), sharding.activation_sharding(x.shape, mesh, rules))
    with jax.set_mesh(mesh):
        h = jax.jit(functools.partial(mlp_hidden, config=config))(params, x_there)
    assert h.sharding.shard_shape(h.shape) == (2, 16, 512)
    assert relative_error(h, oracle.mlp(arrays, x, "gelu_tanh")[1][2]) <= FLOAT32_BOUND


def test_no_tokens(chip):
    arrays, x, dy = case((0,))
    y, dparams, dx = run(arrays, x, dy, "float32", implementation="pallas")
    assert y.shape == dx.shape == (0, EMBED_DIM)
    assert all(not np.any(grad) for grad in jax.tree.leaves(dparams))


def blocks_of(monkeypatch, module, version, cores, size, tokens):
    """The blocks that the kernel of `module` chooses for bfloat16 and the dimensions of a config, `size`."""
    chosen, choose = [], tpu_blocks.choose_blocks
    info = pltpu.get_tpu_info_for_chip(version, cores)
    monkeypatch.setattr(pltpu, "get_tpu_info", lambda: info)
    monkeypatch.setattr(tpu_blocks, "choose_blocks", lambda *args: chosen.append(choose(*args)) or chosen[-1])
    shapes = (tokens, size.embed_dim), (size.embed_dim, size.hidden_dim), (size.hidden_dim, size.embed_dim)
    x, gate, down = (jax.ShapeDtypeStruct(shape, "bfloat16") for shape in shapes)
    backward = module is tpu_backward
    options = {"activation": "gelu_tanh"} | ({} if backward else {"save_gate_up": False})
    kernel = functools.partial(module.fused_backward if backward else module.fused_forward, **options)
    jax.eval_shape(kernel, *([x, x] if backward else [x]), gate, gate, down)
    return tuple(chosen[0])


@pytest.mark.parametrize(
    ("version", "cores", "preset", "tokens", "forward", "backward"),
    [
        (V6E, 1, "gemma2_27b", 8192, (1024, 512, 512), (256, 512, 256)),
        (V5E, 1, "gemma2_27b", 8192, (1024, 512, 512), (256, 512, 256)),
        (V5P, 2, "gemma2_27b", 8192, (512, 512, 512), (128, 256, 128)),
        (V5P, 2, "gemma2_2b", 512, (256, 512, 256), (256, 512, 256)),  # two blocks of tokens
        (V5P, 2, "gemma2_2b", 200, (208, 512, 208), (112, 512, 112)),  # two here too, for the backward pass
        (V6E, 1, "gemma2_2b", 1100, (576, 512, 288), (256, 512, 256)),  # as even as can be
        (V6E, 1, "gemma3_1b", 1, (16, 384, 16), (16, 384, 16)),  # 6,912 = 18 * 384
    ],
)
def test_blocks_fill_the_chips_memory(version, cores, preset, tokens, forward, backward, monkeypatch):
    """Blocks are (tokens, F, rows that are computed at a time)."""
    for module, expected in ((tpu_forward, forward), (tpu_backward, backward)):
        assert blocks_of(monkeypatch, module, version, cores, PRESETS[preset], tokens) == expected


def test_both_cores_have_the_same_share_of_blocks(monkeypatch):
    """4,608 is 9 blocks of 512, which would leave a core idle, or 2 * 6 of 384."""
    assert blocks_of(monkeypatch, tpu_backward, V5P, 2, MLPConfig(2304, 4608), 8192) == (256, 384, 256)


KERNELS = {  # name: (the kernel, the shapes of its arguments, its blocks for a very wide model on a v5p)
    "forward": (
        functools.partial(tpu_forward.fused_forward, save_gate_up=False),
        ("TD", "DF", "DF", "FD"),
        (256, 256, 256),
    ),
    "forward, gate_up": (
        functools.partial(tpu_forward.fused_forward, save_gate_up=True),
        ("TD", "DF", "DF", "FD"),
        (256, 256, 256),
    ),
    "hidden": (tpu_forward.hidden_only, ("TD", "DF", "DF"), (1024, 256, 512)),
    "backward": (tpu_backward.fused_backward, ("TD", "TD", "DF", "DF", "FD"), (128, 128, 128)),
    "backward, gate_up": (tpu_backward.backward_from_saved, ("TD", "TF", "TF", "FD"), (128, 512, 128)),
}


def trace_kernel(monkeypatch, name, version, embed_dim, hidden_dim):
    info = pltpu.get_tpu_info_for_chip(version, 1)
    monkeypatch.setattr(pltpu, "get_tpu_info", lambda: info)
    kernel, words, _ = KERNELS[name]
    sizes = {"T": 8192, "D": embed_dim, "F": hidden_dim}
    arrays = (jax.ShapeDtypeStruct(tuple(sizes[axis] for axis in word), "bfloat16") for word in words)
    jax.eval_shape(functools.partial(kernel, activation="gelu_tanh"), *arrays)
    return info.vmem_capacity_bytes


@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_takes_smaller_blocks_of_a_wide_model(name, monkeypatch):
    chosen, choose = [], tpu_blocks.choose_blocks
    monkeypatch.setattr(tpu_blocks, "choose_blocks", lambda *args: chosen.append(choose(*args)) or chosen[-1])
    trace_kernel(monkeypatch, name, V5P, 8192, 4096)
    assert chosen == [KERNELS[name][2]]


@pytest.mark.parametrize("chip_version", [V5E, V5P], ids=lambda version: version.name)
@pytest.mark.parametrize("name", KERNELS)
def test_buffers_fit_into_the_chips_memory(name, chip_version, monkeypatch):
    """At 27B. There are two buffers for each block that is read or written, and the scratch."""
    pallas_call, taken, size = pl.pallas_call, [], PRESETS["gemma2_27b"]

    def measured(*args, in_specs, out_specs, out_shape, scratch_shapes, **options):
        def call(*arrays):
            blocks = [*zip(arrays, in_specs), *zip(out_shape, out_specs)]
            taken.extend(2 * a.dtype.itemsize * math.prod(s.block_shape) for a, s in blocks if s.block_shape)
            scratch = (s for s in scratch_shapes if getattr(s, "memory_space", None) == pltpu.VMEM)
            taken.extend(math.prod(s.shape) * jnp.dtype(s.dtype).itemsize for s in scratch)
            return kernel(*arrays)

        specs = {"in_specs": in_specs, "out_specs": out_specs, "out_shape": out_shape}
        kernel = pallas_call(*args, **specs, scratch_shapes=scratch_shapes, **options)
        return call

    monkeypatch.setattr(pl, "pallas_call", measured)
    capacity = trace_kernel(monkeypatch, name, chip_version, size.embed_dim, size.hidden_dim)
    assert 0 < sum(taken) <= capacity * 15 / 16


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_precision_of_a_matmul(dtype):
    """Mosaic refuses all but the default for bfloat16. In float32 it is what the user has chosen."""
    a = jnp.ones((16, 128), dtype)
    (equation,) = jax.make_jaxpr(lambda a: tpu_blocks.dot(a, a, (1,), (1,)))(a).eqns
    expected = jax.lax.Precision.DEFAULT if dtype == "bfloat16" else jax.lax.Precision.HIGHEST  # conftest.py's
    assert equation.params["precision"] == (expected, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"save": "autodiff"}, "has a backward pass of its own"),
        ({"activation": "gelu"}, "needs an activation that its kernels have"),
        ({"dropout_rate": 0.5, "dropout_key": jax.random.key(0)}, "has no dropout"),
        ({"use_bias": True}, "has no biases"),
        ({"embed_dim": 64}, "multiples of 128.*: 64 and 512"),
        ({"hidden_dim": 64}, "multiples of 128.*: 128 and 64"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_what_it_does_not_serve(options, message, chip):
    config = {"embed_dim": EMBED_DIM, "hidden_dim": HIDDEN_DIM, "use_bias": False}
    config |= {name: options[name] for name in config if name in options}
    params = samples.mlp_params(samples.mlp_arrays(np.random.default_rng(0), **config), "float32")
    others = {name: value for name, value in options.items() if name not in config}
    with pytest.raises(ValueError, match=message):
        feed_forward(params, jnp.zeros((3, config["embed_dim"])), implementation="pallas", **others)


def test_a_mesh_needs_rules(chip, eight_devices):
    params = samples.mlp_params(case(())[0], "float32")
    with jax.set_mesh(make_mesh(4, 2)), pytest.raises(ValueError, match="needs axis_rules on a mesh"):
        feed_forward(params, jnp.zeros((8, EMBED_DIM)), implementation="pallas")


def test_an_embed_dim_that_vmem_cannot_hold(chip):
    params = jax.eval_shape(lambda: MLPParams.init(MLPConfig(2**16, 128), jax.random.key(0)))
    x = jax.ShapeDtypeStruct((1, 2**16), "float32")
    with pytest.raises(ValueError, match=r"must fit into VMEM, which has 125829120 bytes.*: an embed_dim"):
        jax.eval_shape(functools.partial(feed_forward, implementation="pallas"), params, x)


def test_a_cpu_has_no_kernels():
    params = samples.mlp_params(case(())[0], "float32")
    with pytest.raises(ValueError, match=r"needs a TPU or an NVIDIA GPU.*: a program for cpu"):
        feed_forward(params, jnp.zeros((3, EMBED_DIM)), implementation="pallas")
    with pytest.raises(ValueError, match="implementation must be one of xla, pallas"):
        MLPConfig(8, 16, implementation="triton")  # pyright: ignore[reportArgumentType]
