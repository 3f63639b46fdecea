"""Eight devices give the numbers of one device, the rules place every parameter, and errors name the sizes."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType, NamedSharding

import gemma_mlp
from gemma_mlp import MLPBlockParams, MLPConfig, MLPParams, RMSNormParams, feed_forward, hidden_activations, sharding
from gemma_mlp.mesh import run_on_mesh
from gemma_mlp.params import LeafSpec
from gemma_mlp.testing import oracle
from gemma_mlp.testing.oracle import relative_error
from tests.support import samples
from tests.support.cases import FLOAT32_BOUND, SAVES, block_errors, errors, exact_block_result, exact_result
from tests.support.cases import block_case as make_block_case
from tests.support.meshes import MESHES, RULES, make_mesh, spread
from tests.support.vary import vary

pytestmark = pytest.mark.usefixtures("eight_devices")
EMBED_DIM, HIDDEN_DIM = 16, 2048  # each of eight shards of F is two slices of 128
CONFIG = MLPConfig(EMBED_DIM, HIDDEN_DIM, dtype="float32")


@functools.cache
def case(use_bias=False):
    rng = np.random.default_rng(0)
    arrays = samples.mlp_arrays(rng, EMBED_DIM, HIDDEN_DIM, use_bias)
    x, dy = (samples.normal(rng, (8, 8, EMBED_DIM)) for _ in range(2))
    return arrays, x, dy, exact_result(arrays, x, dy, "gelu_tanh")


@vary(
    "mesh rules save chunk_size",
    itertools.product(MESHES, RULES, SAVES, (None, 4)),
    together="mesh rules",
)
def test_a_mesh_changes_no_number(mesh, rules, save, chunk_size):
    arrays, x, dy, exact = case()
    (shape, axis_type), rules = mesh, RULES[rules]
    mesh = make_mesh(*shape, axis_type)
    specs = MLPParams.specs(CONFIG)
    params = spread(samples.mlp_params(arrays, "float32"), mesh, rules, specs)
    stream = sharding.activation_sharding(x.shape, mesh, rules)
    x, dy = (jax.device_put(jnp.asarray(a, "float32"), stream) for a in (x, dy))
    apply = functools.partial(feed_forward, save=save, chunk_size=chunk_size, axis_rules=rules)
    with jax.set_mesh(mesh):
        result = jax.jit(functools.partial(samples.value_and_pullback, apply))(params, x, dy)
    for name, error in errors(result, exact).items():
        assert error <= FLOAT32_BOUND, name
    assert result[0].sharding.is_equivalent_to(stream, 3) and result[2].sharding.is_equivalent_to(stream, 3)


@vary("shell mesh rules", itertools.product(("nnx", "linen"), MESHES, RULES), together="shell rules")
def test_a_mesh_changes_no_number_of_either_shells_block(shell, mesh, rules):
    (shape, axis_type), rules = mesh, RULES[rules]
    mesh = make_mesh(*shape, axis_type)
    config = dataclasses.replace(CONFIG, axis_rules=rules)
    params, apply, specs = {"nnx": in_nnx, "linen": in_linen}[shell](config)
    _, x, dy, exact = block_case()
    stream = sharding.activation_sharding(x.shape, mesh, rules)
    x, dy = (jax.device_put(jnp.asarray(a, "float32"), stream) for a in (x, dy))
    with jax.set_mesh(mesh):
        params = spread(params, mesh, rules, specs)
        y, dparams, dx = jax.jit(functools.partial(samples.value_and_pullback, apply))(params, x, dy)
    grads = nnx.to_pure_dict(dparams) if isinstance(dparams, nnx.State) else nn.unbox(dparams)
    grads = MLPBlockParams(
        RMSNormParams(**grads["pre_norm"]), MLPParams(**grads["mlp"]), RMSNormParams(**grads["post_norm"])
    )
    for name, error in block_errors((y, grads, dx), exact).items():
        assert error <= FLOAT32_BOUND, name


def in_nnx(config):
    """The parameters, a function that applies the module to them, and a tree with their logical axes."""
    graphdef, state = nnx.split(gemma_mlp.nnx.MLPBlock(config, rngs=nnx.Rngs(0)))
    nnx.replace_by_pure_dict(state, tree_of(block_case()[0]))
    return state, lambda state, x: nnx.merge(graphdef, state)(x), state


def in_linen(config):
    module = gemma_mlp.linen.MLPBlock(config)
    boxed = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((8, 8, EMBED_DIM)))["params"]
    params = nn.meta.replace_boxed(boxed, tree_of(block_case()[0]))
    return params, lambda params, x: module.apply({"params": params}, x), boxed


@functools.cache
def block_case():
    arrays, x, dy = make_block_case((8, 8), embed_dim=EMBED_DIM, hidden_dim=HIDDEN_DIM)
    return arrays, x, dy, exact_block_result(arrays, x, dy)


def tree_of(arrays):
    """Block parameters as either shell has them."""
    mlp = {name: jnp.asarray(array, "float32") for name, array in arrays["mlp"].items()}
    return {"mlp": mlp} | {norm: {"scale": jnp.asarray(arrays[norm], "float32")} for norm in ("pre_norm", "post_norm")}


DROPOUT = {"dropout_rate": 0.5, "dropout_key": jax.random.key(0)}


def run(params, x, dy, **options):
    apply = functools.partial(feed_forward, **DROPOUT, **options)
    return jax.jit(functools.partial(samples.value_and_pullback, apply))(params, x, dy)


@functools.cache
def on_one_device():
    arrays, x, dy, _ = case(use_bias=True)
    args = samples.mlp_params(arrays, "float32"), jnp.asarray(x, "float32"), jnp.asarray(dy, "float32")
    return args, run(*args)


@vary(
    "rules chunk_size axis_type",
    itertools.product(RULES, (None, 4), (AxisType.Auto, AxisType.Explicit)),
    together="rules axis_type",
)
def test_dropout_and_biases_are_those_of_one_device(rules, chunk_size, axis_type):
    (params, x, dy), alone = on_one_device()
    mesh, rules = make_mesh(2, 4, axis_type), RULES[rules]
    stream = sharding.activation_sharding(x.shape, mesh, rules)
    with jax.set_mesh(mesh):
        params = spread(params, mesh, rules, MLPParams.specs(dataclasses.replace(CONFIG, use_bias=True)))
        x, dy = jax.device_put((x, dy), stream)
        together = run(params, x, dy, chunk_size=chunk_size, axis_rules=rules)
    for ours, theirs in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
        assert relative_error(ours, theirs) <= FLOAT32_BOUND


@pytest.mark.parametrize("shape", [(16,), (8, 16), (8, 1, 8, 16)], ids=str)
def test_x_may_have_any_leading_axes(shape):
    """The first axis of [N, D] is the batch. Axes between the batch and the length are not sharded."""
    mesh, rules = make_mesh(2, 4), sharding.SEQUENCE_PARALLEL_RULES
    arrays = case()[0]
    x = jnp.asarray(samples.normal(np.random.default_rng(2), shape), "float32")
    params = samples.mlp_params(arrays, "float32")
    with jax.set_mesh(mesh):
        y = jax.jit(functools.partial(feed_forward, axis_rules=rules, chunk_size=3))(params, x)
    assert relative_error(y, oracle.mlp(arrays, np.asarray(x, np.float64), "gelu_tanh")[0]) <= FLOAT32_BOUND


def test_rules_change_nothing_without_a_mesh():
    arrays, x, _, _ = case()
    params, x = samples.mlp_params(arrays, "float32"), jnp.asarray(x, "float32")
    programs = [
        str(jax.make_jaxpr(functools.partial(feed_forward, axis_rules=rules, chunk_size=4))(params, x))
        for rules in (None, sharding.RULES)
    ]
    assert programs[0].replace("axis_rules=None", "") == programs[1].replace(f"axis_rules={sharding.RULES}", "")


def test_hidden_activations_have_explicit_axes():
    arrays, x, _, _ = case()
    mesh, rules = make_mesh(2, 4, AxisType.Explicit), sharding.SEQUENCE_PARALLEL_RULES
    with jax.set_mesh(mesh):
        params = spread(samples.mlp_params(arrays, "float32"), mesh, rules, MLPParams.specs(CONFIG))
        stream = sharding.activation_sharding(x.shape, mesh, rules)
        h = jax.jit(hidden_activations)(params, jax.device_put(jnp.asarray(x, "float32"), stream))
    assert jax.typeof(h).sharding.spec == jax.P(("data", "fsdp"), None, "tensor")
    assert relative_error(h, oracle.mlp(arrays, x, "gelu_tanh")[1][-1]) <= FLOAT32_BOUND


@pytest.mark.parametrize("placed", ["both", "parameters", "x"])
@pytest.mark.parametrize("under", [lambda call: call, jax.jit], ids=["eager", "jit"])
def test_arrays_with_explicit_axes_need_no_mesh_in_force(placed, under):
    """Their types say how they are split."""
    arrays, x, _, expected = case()
    mesh = make_mesh(2, 4, AxisType.Explicit)
    params, x = samples.mlp_params(arrays, "float32"), jnp.asarray(x, "float32")
    if placed != "x":
        params = spread(params, mesh, sharding.RULES, MLPParams.specs(CONFIG))
    if placed != "parameters":
        x = jax.device_put(x, sharding.activation_sharding(x.shape, mesh))
    y = under(feed_forward)(params, x)
    assert relative_error(y, expected[0]) <= FLOAT32_BOUND
    assert jax.typeof(y).sharding.spec[0] == (("data", "fsdp") if placed != "parameters" else None)
    if placed == "both":
        dparams = jax.jit(lambda y, dy: jax.vjp(feed_forward, params, x)[1](dy))(y, y)[0]
        for name in ("gate_proj", "up_proj", "down_proj"):
            assert jax.typeof(getattr(dparams, name)).sharding == jax.typeof(getattr(params, name)).sharding


class TestShardings:
    """The expected specs are literals, written out independently of the package."""

    WEIGHTS = {"gate_proj": ("fsdp", "tensor"), "up_proj": ("fsdp", "tensor"), "down_proj": ("tensor", "fsdp")}

    def test_of_parameters_as_config_and_both_shells_have_them(self):
        mesh = make_mesh(2, 4)
        block = sharding.named_shardings(MLPBlockParams.specs(CONFIG), mesh)
        assert {name: tuple(leaf.spec) for name, leaf in samples.mlp_leaves(block.mlp).items()} == self.WEIGHTS
        assert block.pre_norm.scale.spec == jax.P("fsdp")
        for tree, _, specs in (in_nnx(CONFIG), in_linen(CONFIG)):
            shardings = sharding.named_shardings(specs, mesh)
            assert jax.tree.structure(shardings) == jax.tree.structure(tree)
            leaves = nnx.to_pure_dict(shardings) if isinstance(shardings, nnx.State) else nn.unbox(shardings)
            assert {name: tuple(leaf.spec) for name, leaf in leaves["mlp"].items()} == self.WEIGHTS
            assert leaves["post_norm"]["scale"].spec == jax.P("fsdp")

    @pytest.mark.parametrize("rules", [sharding.RULES, sharding.SEQUENCE_PARALLEL_RULES], ids=["fsdp", "sequence"])
    def test_of_a_stack_of_layers(self, rules):
        specs = MLPBlockParams.specs(CONFIG, layers=3)
        stacked = jax.eval_shape(
            lambda: jax.vmap(lambda key: MLPBlockParams.init(CONFIG, key))(jax.random.split(KEY, 3))
        )
        assert jax.tree.map(lambda a: a.shape, stacked) == jax.tree.map(lambda a: a.shape, specs, is_leaf=is_spec)
        shardings = sharding.named_shardings(specs, make_mesh(2, 4), rules)
        assert tuple(shardings.mlp.down_proj.spec) == (None, "tensor", "fsdp")
        assert tuple(shardings.post_norm.scale.spec) == (None, "fsdp")

    def test_a_module_is_placed_as_they_say(self):
        block = gemma_mlp.nnx.MLPBlock(CONFIG, rngs=nnx.Rngs(0))
        state = nnx.state(block)
        nnx.update(block, jax.device_put(state, sharding.named_shardings(state, make_mesh(2, 4))))
        assert block.mlp.gate_proj.get_value().sharding.spec == jax.P("fsdp", "tensor")

    def test_of_optimizer_state(self):
        mesh = make_mesh(2, 4)
        specs = MLPBlockParams.specs(CONFIG)
        shardings = sharding.named_shardings(specs, mesh)
        params = jax.eval_shape(lambda: MLPBlockParams.init(CONFIG, jax.random.key(0)))
        optimizer = optax.adamw(1e-3)
        adam = sharding.optimizer_shardings(optimizer, params, shardings, mesh)[0]
        assert adam.mu == adam.nu == shardings
        assert adam.count == NamedSharding(mesh, jax.P())
        model = gemma_mlp.nnx.MLPBlock(CONFIG, rngs=nnx.Rngs(0))
        state = nnx.state(nnx.Optimizer(model, optimizer, wrt=nnx.Param))
        moments = nnx.to_pure_dict(sharding.named_shardings(state, mesh))["opt_state"][0]
        assert tuple(moments["mu"]["mlp"]["gate_proj"].spec) == ("fsdp", "tensor")
        assert moments["count"].spec == jax.P()

    def test_of_activations(self):
        mesh = make_mesh(2, 4)
        assert sharding.activation_sharding((8, 8, 16), mesh).spec == jax.P(("data", "fsdp"), None, None)
        rules = sharding.SEQUENCE_PARALLEL_RULES
        assert sharding.activation_sharding((8, 8, 16), mesh, rules).spec == jax.P(("data", "fsdp"), "tensor", None)
        assert sharding.activation_sharding((8, 16), mesh, rules).spec == jax.P(("data", "fsdp"), None)

    def test_any_names_of_mesh_axes(self):
        mesh = jax.make_mesh((2, 4), ("x", "y"), (AxisType.Auto,) * 2, devices=jax.devices("cpu")[:8])
        rules = (("mlp", ("x", "y")), ("embed", None), ("batch", None), ("length", "x"), ("layers", None))
        specs = {"stacked": LeafSpec((3, 16, 2048), ("layers", "embed", "mlp"), jax.nn.initializers.zeros)}
        assert sharding.named_shardings(specs, mesh, rules)["stacked"].spec == jax.P(None, None, ("x", "y"))


@vary(
    "batch length embed hidden",
    itertools.product(
        [None, "data", ("data", "fsdp")], [None, "tensor"], [None, "data", "fsdp", ("data", "fsdp")], [None, "tensor"]
    ),
    together="batch embed",
)
def test_kernels_on_shards_give_the_whole_result_by_any_rules(batch, length, embed, hidden):
    """Also where D is split over an axis that splits no tokens, or only some of its axes do. All numbers are whole."""
    rng = np.random.default_rng(0)
    shapes = {"x": (4, 2, 4), "dy": (4, 2, 4), "up": (4, 6), "down": (6, 4)}
    arrays = {name: rng.integers(-3, 4, shape).astype(np.float32) for name, shape in shapes.items()}

    def kernel(x, dy, up, down):  # y, h and the gradients of both weights, for y = x up down
        return x @ up @ down, x @ up, x.T @ (dy @ down.T), (x @ up).T @ dy

    rules = (("batch", batch), ("length", length), ("embed", embed), ("mlp", hidden))
    words = ("rows", "rows", "DF", "FD")

    @jax.jit
    def run(*arrays):
        return run_on_mesh(kernel, list(zip(words, arrays)), ("sum", "hidden", "DF", "FD"), rules)

    with jax.set_mesh(make_mesh(fsdp=2, tensor=2, data=2)):
        results = run(*arrays.values())
    flat = [a.reshape(-1, a.shape[-1]) for a in arrays.values()]
    for result, expected in zip(results, kernel(*flat), strict=True):
        np.testing.assert_array_equal(np.asarray(result).reshape(expected.shape), expected)


KEY = jax.random.key(0)


def is_spec(leaf):
    return isinstance(leaf, LeafSpec)


def apply_on(mesh, rules, shape):
    with jax.set_mesh(mesh):
        return feed_forward(samples.mlp_params(case()[0], "float32"), jnp.zeros(shape), axis_rules=rules)


RENAMED = (("batch", "rows"), *sharding.RULES[1:])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda mesh: apply_on(mesh, sharding.RULES, (3, 8, 16)), r"multiple of .*: 2, for mesh axes .*: 3 in"),
        (lambda mesh: apply_on(mesh, sharding.SEQUENCE_PARALLEL_RULES, (2, 6, 16)), r": 4, for .*: 6 in an act"),
        (
            lambda mesh: apply_on(mesh, RENAMED, (2, 8, 16)),
            r"axes of the mesh, which are data, fsdp, tensor.*: rows in",
        ),
        (
            lambda mesh: sharding.named_shardings(MLPBlockParams.specs(MLPConfig(15, 2048)), mesh),
            r": 2, for mesh axes fsdp.*: 15 in a parameter",
        ),
        (
            lambda mesh: sharding.named_shardings({"w": LeafSpec((2,), ("heads",), jax.nn.initializers.zeros)}, mesh),
            r"batch, length, embed, mlp.*: heads. Fix: add a rule",
        ),
        (lambda mesh: MLPConfig(16, 64, axis_rules=sharding.RULES[1:]), "one rule for each of batch, length"),
        (lambda mesh: MLPConfig(16, 64, axis_rules=dict(sharding.RULES)), "must be pairs"),
        (lambda mesh: MLPConfig(16, 64, axis_rules=(("batch", 3), *sharding.RULES[1:])), "a name, a tuple of names or"),
        (lambda mesh: sharding.activation_sharding((4, 3, 16), mesh, RENAMED), "rows"),
        (lambda mesh: sharding.named_shardings({"w": jnp.zeros((2, 16))}, mesh), "a tree of arrays alone"),
    ],
)
def test_errors_have_the_numbers(make, message):
    with pytest.raises(ValueError, match=message):
        make(make_mesh(2, 4))


OTHERS = (("batch", "x"), ("length", None), ("embed", "x"), ("mlp", "y"), ("layers", None))
BY_HAND = {"gate_proj": jax.P("x", "y"), "up_proj": jax.P("x", "y"), "down_proj": jax.P("y", "x")}


class TestAmongStrangers:
    """A mesh whose axes are named x and y, and models whose other parts name them."""

    def mesh(self, axis_type=AxisType.Auto):
        return jax.make_mesh((2, 4), ("x", "y"), (axis_type,) * 2, devices=jax.devices("cpu")[:8])

    @pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
    def test_flax_reads_our_names_if_the_config_has_rules(self, axis_type):
        mesh, config = self.mesh(axis_type), dataclasses.replace(CONFIG, axis_rules=OTHERS)

        def specs(state):
            mlp = nnx.to_pure_dict(state)["mlp"]
            return {name: getattr(leaf, "sharding", leaf).spec for name, leaf in mlp.items()}

        block = gemma_mlp.nnx.MLPBlock(config, rngs=nnx.Rngs(0))
        assert nnx.to_pure_dict(nnx.get_partition_spec(nnx.state(block)))["mlp"] == BY_HAND
        assert specs(nnx.get_named_sharding(nnx.state(block), mesh)) == BY_HAND
        _, abstract = nnx.get_abstract_model(lambda: gemma_mlp.nnx.MLPBlock(config, rngs=nnx.Rngs(0)), mesh)
        assert specs(abstract) == BY_HAND
        with jax.set_mesh(mesh):
            nnx.eval_shape(lambda: gemma_mlp.nnx.MLPBlock(config, rngs=nnx.Rngs(0)))
            optimizer = nnx.Optimizer(block, optax.adam(1e-3), wrt=nnx.Param)
            moments = nnx.to_pure_dict(nnx.get_partition_spec(nnx.state(optimizer)))["opt_state"][0]
        assert moments["mu"]["mlp"] == BY_HAND

    def test_no_mesh_axis_splits_a_leaf_twice_and_stacks_have_their_rule(self):
        twice = (("batch", "x"), ("length", None), ("embed", "y"), ("mlp", "y"), ("layers", None))
        config = dataclasses.replace(CONFIG, axis_rules=twice)

        @nnx.split_rngs(splits=2)
        @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: "layers"})
        def stack(rngs):
            return gemma_mlp.nnx.MLPBlock(config, rngs=rngs)

        specs = nnx.to_pure_dict(nnx.get_partition_spec(nnx.state(stack(nnx.Rngs(0)))))
        assert specs["mlp"]["gate_proj"] == jax.P(None, None, "y")
        assert specs["pre_norm"]["scale"] == jax.P(None, "y")
        nnx.get_named_sharding(nnx.state(stack(nnx.Rngs(0))), self.mesh())

    def test_a_whole_model_with_names_of_the_mesh(self):
        class Model(nnx.Module):
            def __init__(self, rngs):
                with_names = {"eager_sharding": False}
                self.embed = nnx.Param(jnp.zeros((8, EMBED_DIM)), out_sharding=("y", None), **with_names)
                self.both = nnx.Param(jnp.zeros((8, 8)), out_sharding=jax.P(None, ("x", "y")), **with_names)
                self.plain = nnx.Param(jnp.zeros(3))
                self.block = gemma_mlp.nnx.MLPBlock(CONFIG, rngs=rngs)

        mesh, state = self.mesh(), nnx.state(Model(nnx.Rngs(0)))
        shardings = nnx.to_pure_dict(sharding.named_shardings(state, mesh, OTHERS))
        assert shardings["embed"].spec == jax.P("y", None)
        assert shardings["both"].spec == jax.P(None, ("x", "y"))
        assert shardings["plain"].spec == jax.P()
        assert {name: leaf.spec for name, leaf in shardings["block"]["mlp"].items()} == BY_HAND
        jax.device_put(state, sharding.named_shardings(state, mesh, OTHERS))
        boxed = {"a": nn.Partitioned(jnp.zeros((2, 8)), ("x", None)), "b": in_linen(CONFIG)[2]}
        assert sharding.named_shardings(boxed, mesh, OTHERS)["a"].value.spec == jax.P("x", None)
        with pytest.raises(ValueError, match=r"They know batch.*Got: heads"):
            sharding.named_shardings({"a": nn.Partitioned(jnp.zeros((2, 8)), ("x", "heads"))}, mesh, OTHERS)


def test_a_tree_without_logical_axes_is_refused():
    params = MLPParams.init(CONFIG, jax.random.key(0))
    with pytest.raises(ValueError, match=r"Shardings follow from logical axes.*a tree of arrays alone"):
        sharding.named_shardings(params, make_mesh(4, 2), sharding.RULES)
