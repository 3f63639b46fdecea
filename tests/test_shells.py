"""The NNX and the Linen modules have one tree and compute the same bits, inside every feature of either library."""

import dataclasses
import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax import nnx

import gemma_mlp
from gemma_mlp import MLPBlockParams, MLPConfig, MLPParams, RMSNormParams, mlp, mlp_block, mlp_hidden, rms_norm
from tests.support import samples
from tests.support.vary import vary

pytestmark = pytest.mark.usefixtures("quick_to_compile")

CONFIG = MLPConfig(8, 16)
DROPOUT = dataclasses.replace(CONFIG, dropout_rate=0.5)
LAYERS = 3
KINDS = ("MLP", "MLPBlock")


def inputs(*batch):
    return jnp.asarray(samples.normal(np.random.default_rng(0), (*batch, CONFIG.embed_dim)), "float32")


def nnx_module(kind, config=CONFIG, seed=0):
    """An NNX module in which every parameter is random, also those of the norms."""
    module = getattr(gemma_mlp.nnx, kind)(config, rngs=nnx.Rngs(seed))
    rng = np.random.default_rng(seed)
    state = nnx.state(module, nnx.Param)
    nnx.update(
        module, jax.tree.map(lambda leaf: leaf + jnp.asarray(samples.normal(rng, leaf.shape, 0.1), leaf.dtype), state)
    )
    return module


def tree_of(module):
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))


def functional(kind, tree, x, config=CONFIG):
    """The functional core on the parameters of a shell."""
    if kind == "MLP":
        return mlp(MLPParams(**tree), x, config)
    norms = {name: RMSNormParams(**tree[name]) for name in ("pre_norm", "post_norm") if name in tree}
    return mlp_block(MLPBlockParams(mlp=MLPParams(**tree["mlp"]), **norms), x, config)


def linen_init(kind, config=CONFIG):
    return getattr(gemma_mlp.linen, kind)(config).init(jax.random.key(0), inputs(2))


def assert_same(a, b):
    chex.assert_trees_all_equal(a, b)


@vary(
    "kind options param_dtype dtype jit",
    itertools.product(
        KINDS,
        [{}, {"use_bias": True}, {"post_norm": False}, {"save": "gate_up"}, {"scale_plus_one": False}],
        ["float32", "bfloat16"],
        [None, "bfloat16"],
        [False, True],
    ),
    together="kind param_dtype dtype",
)
def test_same_tree_and_bit_equal_outputs_and_gradients(kind, options, param_dtype, dtype, jit):
    config = dataclasses.replace(CONFIG, dtype=dtype, param_dtype=param_dtype, **options)
    module, x = nnx_module(kind, config), inputs(2, 3)
    tree = tree_of(module)
    graphdef, state = nnx.split(module)

    def through_nnx(tree, x):
        nnx.replace_by_pure_dict(state, tree)
        return nnx.merge(graphdef, state)(x)

    def through_linen(tree, x):
        return getattr(gemma_mlp.linen, kind)(config).apply({"params": tree}, x)

    def through_core(tree, x):
        return functional(kind, tree, x, config)

    shapes = nn.unbox(jax.eval_shape(lambda: linen_init(kind, config)))["params"]
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, tree)
    results = []
    for function in (through_nnx, through_linen, through_core):
        gradients = jax.value_and_grad(lambda tree, x: jnp.sin(function(tree, x)).sum(), argnums=(0, 1))
        results.append(((jax.jit(function) if jit else function)(tree, x), gradients(tree, x)))
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])
    assert {leaf.dtype.name for leaf in jax.tree.leaves(tree)} == {param_dtype}


@pytest.mark.parametrize("plus_one", [True, False])
def test_the_norm_by_itself_has_the_options_of_the_config(plus_one):
    config = dataclasses.replace(CONFIG, norm_eps=1.0, scale_plus_one=plus_one)
    module, x = nnx_module("RMSNorm", config), inputs(2)
    tree = tree_of(module)
    expected = rms_norm(tree["scale"], x, eps=1.0, scale_plus_one=plus_one)
    assert_same(module(x), expected)
    assert_same(gemma_mlp.linen.RMSNorm(config).apply({"params": tree}, x), expected)
    new = tree_of(gemma_mlp.nnx.RMSNorm(config, rngs=nnx.Rngs(0)))
    assert_same(new, {"scale": jnp.full(8, 0.0 if plus_one else 1.0)})
    assert_same(nn.unbox(linen_init("RMSNorm", config))["params"], new)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_has_its_logical_axis_names(kind):
    config = dataclasses.replace(CONFIG, use_bias=True)
    expected = {
        "gate_proj": ("embed", "mlp"),
        "up_proj": ("embed", "mlp"),
        "down_proj": ("mlp", "embed"),
        "gate_bias": ("mlp",),
        "up_bias": ("mlp",),
        "down_bias": ("embed",),
        "scale": ("embed",),
    }
    spec = jax.sharding.PartitionSpec
    nnx_specs = nnx.get_partition_spec(nnx.state(nnx_module(kind, config)))
    linen_specs = nn.get_partition_spec(linen_init(kind, config))["params"]
    for specs in (nnx.to_pure_dict(nnx_specs), linen_specs):
        paths = jax.tree_util.tree_leaves_with_path(specs, is_leaf=lambda leaf: isinstance(leaf, spec))
        assert len(paths) == (6 if kind == "MLP" else 8)
        for path, axes in paths:
            assert axes == spec(*expected[path[-1].key])


def test_logical_axes_become_mesh_shardings_in_both_shells():
    rules = (("embed", None), ("mlp", "tensor"))
    mesh = jax.make_mesh((1,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        module = nnx_module("MLP")
        shardings = nnx.get_named_sharding(nnx.state(module), mesh)
        assert nnx.to_pure_dict(shardings)["gate_proj"].spec == jax.sharding.PartitionSpec(None, "tensor")
        assert module(inputs(2)).shape == (2, 8)
        specs = nn.logical_to_mesh(nn.get_partition_spec(linen_init("MLP")), rules)
        assert specs["params"]["down_proj"] == jax.sharding.PartitionSpec("tensor", None)
        variables = linen_init("MLP")
        assert gemma_mlp.linen.MLP(CONFIG).apply(variables, inputs(2)).shape == (2, 8)


def test_no_rng_state_without_dropout_and_a_forked_stream_with_it():
    assert not nnx.to_pure_dict(nnx.state(nnx_module("MLPBlock"), nnx.RngState))
    assert nnx.to_pure_dict(nnx.state(nnx_module("MLPBlock", DROPOUT), nnx.RngState))
    assert set(linen_init("MLP")) == {"params"}


class TestDropout:
    def test_nnx_modes(self):
        module, x = nnx_module("MLPBlock", DROPOUT), inputs(4)
        plain = mlp_block_without_dropout(module, x)
        first, second = module(x), module(x)
        assert not jnp.array_equal(first, second)
        assert_same(module(x, deterministic=True), plain)
        module.eval()
        assert_same(module(x), plain)
        module.train()
        assert not jnp.array_equal(module(x), plain)
        assert_same(nnx.view(module, deterministic=True)(x), plain)

    def test_nnx_takes_a_stream_or_rngs_for_the_call(self):
        module, x = nnx_module("MLP", DROPOUT), inputs(4)
        assert_same(module(x, rngs=nnx.Rngs(dropout=7)), module(x, rngs=nnx.Rngs(dropout=7)))
        assert_same(module(x, rngs=nnx.Rngs(dropout=7)), module(x, rngs=nnx.Rngs(dropout=7).dropout))

    def test_linen_modes(self):
        module, variables, x = gemma_mlp.linen.MLPBlock(DROPOUT), linen_variables(DROPOUT), inputs(4)
        plain = gemma_mlp.linen.MLPBlock(CONFIG).apply(variables, x)
        assert_same(module.apply(variables, x, deterministic=True), plain)
        first, second = (module.apply(variables, x, rngs={"dropout": jax.random.key(seed)}) for seed in (0, 1))
        assert not jnp.array_equal(first, plain) and not jnp.array_equal(first, second)
        with pytest.raises(Exception, match="dropout"):
            module.apply(variables, x)

    def test_both_apply_the_core_with_the_key_of_their_stream(self):
        module, x = nnx_module("MLP", DROPOUT), inputs(4)
        key = nnx.Rngs(dropout=7).dropout()
        assert_same(module(x, rngs=nnx.Rngs(dropout=7)), mlp(MLPParams(**tree_of(module)), x, DROPOUT, dropout_key=key))


def mlp_block_without_dropout(module, x):
    return functional("MLPBlock", tree_of(module), x)


def linen_variables(config):
    return gemma_mlp.linen.MLPBlock(config).init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, inputs(2))


class TestCapture:
    """Captures the hidden activations, for people who study them. Nothing is computed if nobody captures them."""

    def test_nnx(self):
        module, x = nnx_module("MLPBlock"), inputs(4)
        y, intermediates = nnx.capture(module, nnx.Intermediate)(x)
        normed = module.pre_norm(x)
        expected = mlp_hidden(MLPParams(**tree_of(module)["mlp"]), normed, CONFIG)
        assert_same(nnx.to_pure_dict(intermediates), {"mlp": {"hidden": (expected,)}})
        assert_same(y, module(x))
        assert not nnx.to_pure_dict(nnx.state(module, nnx.Intermediate))

    def test_linen(self):
        module, variables, x = gemma_mlp.linen.MLP(CONFIG), linen_init("MLP"), inputs(4)
        y, state = module.apply(variables, x, mutable=["intermediates"])
        expected = mlp_hidden(MLPParams(**nn.unbox(variables)["params"]), x, CONFIG)
        assert_same(state["intermediates"], {"hidden": (expected,)})
        assert_same(y, module.apply(variables, x))

    @pytest.mark.parametrize("shell", ["nnx", "linen"])
    def test_captured_activations_carry_the_dropout_of_the_call(self, shell):
        module, x = nnx_module("MLP", DROPOUT), inputs(64)
        tree = tree_of(module)
        if shell == "nnx":
            call = nnx.capture(lambda module, x: module(x, rngs=nnx.Rngs(dropout=7)), nnx.Intermediate)
            y, intermediates = call(module, x)
            (hidden,) = nnx.to_pure_dict(intermediates)["hidden"]
        else:
            options = {"rngs": {"dropout": jax.random.key(7)}, "mutable": ["intermediates"]}
            y, state = gemma_mlp.linen.MLP(DROPOUT).apply({"params": tree}, x, **options)
            (hidden,) = state["intermediates"]["hidden"]
        np.testing.assert_allclose(hidden @ tree["down_proj"], y, rtol=1e-5, atol=1e-6)
        assert (hidden == 0).mean() == pytest.approx(0.5, abs=0.1)

    def test_costs_nothing_when_it_is_not_asked_for(self):
        module, x = gemma_mlp.linen.MLP(CONFIG), inputs(4)
        variables = linen_init("MLP")
        params = MLPParams(**nn.unbox(variables)["params"])
        core = str(jax.make_jaxpr(functools.partial(mlp, config=CONFIG))(params, x))
        assert str(jax.make_jaxpr(module.apply)(variables, x)).count("dot_general") == core.count("dot_general")


class TestScanAndRemat:
    @pytest.mark.parametrize("remat", [False, True])
    def test_nnx(self, remat):
        @nnx.split_rngs(splits=LAYERS)
        @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: "layers"})
        def stack(rngs):
            return gemma_mlp.nnx.MLPBlock(CONFIG, rngs=rngs)

        def apply(layer, x):
            return layer(x)

        layers, x = stack(nnx.Rngs(0)), inputs(4)
        step = nnx.remat(apply) if remat else apply
        metadata = {nnx.PARTITION_NAME: "layers"}
        scan = nnx.scan(step, in_axes=(0, nnx.Carry), out_axes=nnx.Carry, transform_metadata=metadata)
        tree = tree_of(layers)

        def looped(tree, x):
            for i in range(LAYERS):
                x = functional("MLPBlock", jax.tree.map(lambda leaf: leaf[i], tree), x)
            return x

        np.testing.assert_allclose(scan(layers, x), looped(tree, x), rtol=1e-5, atol=1e-6)
        got = nnx.to_pure_dict(nnx.grad(lambda layers: scan(layers, x).sum())(layers))
        expected = jax.grad(lambda tree: looped(tree, x).sum())(tree)
        chex.assert_trees_all_close(got, expected, rtol=1e-4, atol=1e-5)
        specs = nnx.to_pure_dict(nnx.get_partition_spec(nnx.state(layers)))
        assert specs["mlp"]["down_proj"] == jax.sharding.PartitionSpec("layers", "mlp", "embed")

    @pytest.mark.parametrize("remat", [False, True])
    def test_linen(self, remat):
        block = nn.remat(gemma_mlp.linen.MLPBlock) if remat else gemma_mlp.linen.MLPBlock

        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return block(CONFIG, name="block")(x), None

        stack = nn.scan(
            Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=LAYERS,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )()
        x = inputs(4)
        variables = stack.init(jax.random.key(0), x, None)
        tree = nn.unbox(variables)["params"]["block"]

        def looped(tree, x):
            for i in range(LAYERS):
                x = functional("MLPBlock", jax.tree.map(lambda leaf: leaf[i], tree), x)
            return x

        np.testing.assert_allclose(stack.apply(variables, x, None)[0], looped(tree, x), rtol=1e-5, atol=1e-6)
        got = jax.grad(lambda params: stack.apply({"params": params}, x, None)[0].sum())(nn.unbox(variables)["params"])
        expected = jax.grad(lambda tree: looped(tree, x).sum())(tree)
        chex.assert_trees_all_close(got["block"], expected, rtol=1e-4, atol=1e-5)
        specs = nn.get_partition_spec(variables)["params"]["block"]
        assert specs["mlp"]["down_proj"] == jax.sharding.PartitionSpec("layers", "mlp", "embed")

    def test_nnx_dropout_differs_between_scanned_layers(self):
        @nnx.split_rngs(splits=2)
        @nnx.vmap
        def stack(rngs):
            return gemma_mlp.nnx.MLP(DROPOUT, rngs=rngs)

        layers, x = stack(nnx.Rngs(0)), inputs(64)
        tree = jax.tree.map(lambda leaf: jnp.stack([leaf[0]] * 2), nnx.state(layers, nnx.Param))
        nnx.update(layers, tree)
        scan = nnx.scan(lambda layer, x: (x, layer(x)), in_axes=(0, nnx.Carry), out_axes=(nnx.Carry, 0))
        first, second = scan(layers, x)[1]
        assert not jnp.array_equal(first, second)


@pytest.mark.promotes
class TestBridge:
    def test_linen_module_inside_nnx(self):
        x = inputs(4)
        module = nnx.bridge.ToNNX(gemma_mlp.linen.MLPBlock(CONFIG), rngs=nnx.Rngs(0)).lazy_init(x)
        tree = tree_of(module)
        assert_same(module(x), functional("MLPBlock", tree, x))
        assert module.mlp["gate_proj"].get_metadata()["out_sharding"] == ("embed", "mlp")

    def test_nnx_module_inside_linen(self):
        x = inputs(4)
        module = nnx.bridge.to_linen(gemma_mlp.nnx.MLPBlock, CONFIG)
        variables = module.init(jax.random.key(0), x)
        tree = nn.unbox(variables)["params"]
        assert_same(module.apply(variables, x), functional("MLPBlock", tree, x))
        with nnx.use_eager_sharding(False):  # Flax 0.12.12 makes NNX variables again to read their axes
            spec = nn.get_partition_spec(variables)["params"]["mlp"]["down_proj"]
        assert spec == jax.sharding.PartitionSpec("mlp", "embed")


def test_nnx_splits_merges_and_makes_abstract_modules():
    module, x = nnx_module("MLPBlock", DROPOUT), inputs(4)
    graphdef, params, rest = nnx.split(module, nnx.Param, ...)
    merged = nnx.merge(graphdef, params, rest)
    assert_same(merged(x, deterministic=True), module(x, deterministic=True))
    abstract = nnx.eval_shape(lambda: gemma_mlp.nnx.MLPBlock(DROPOUT, rngs=nnx.Rngs(0)))
    chex.assert_trees_all_equal_shapes_and_dtypes(tree_of(abstract), tree_of(module))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree_of(abstract)))


def test_nnx_jit_and_nnx_optimizer_train():
    module, x = nnx_module("MLPBlock"), inputs(4)
    optimizer = nnx.Optimizer(module, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(module, optimizer):
        loss, grads = nnx.value_and_grad(lambda module: jnp.square(module(x)).mean())(module)
        optimizer.update(module, grads)
        return loss

    with jax.numpy_dtype_promotion("standard"):
        losses = [float(step(module, optimizer)) for _ in range(10)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("shell", ["nnx", "linen"])
def test_orbax_saves_and_restores(shell, tmp_path):
    x = inputs(4)
    if shell == "nnx":
        module = nnx_module("MLPBlock")
        state = nnx.state(module, nnx.Param)
        like = nnx.state(nnx.eval_shape(lambda: gemma_mlp.nnx.MLPBlock(CONFIG, rngs=nnx.Rngs(0))), nnx.Param)
    else:
        state = nn.unbox(linen_init("MLPBlock"))["params"]
        like = nn.unbox(jax.eval_shape(lambda: linen_init("MLPBlock")))["params"]
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", like)
    assert_same(jax.tree.leaves(restored), jax.tree.leaves(state))
    if shell == "nnx":
        fresh = nnx_module("MLPBlock", seed=1)
        nnx.update(fresh, restored)
        assert_same(fresh(x), module(x))
    else:
        block = gemma_mlp.linen.MLPBlock(CONFIG)
        assert_same(block.apply({"params": restored}, x), block.apply({"params": state}, x))


@pytest.mark.parametrize("shell", ["nnx", "linen"])
def test_optax_masks_by_path(shell):
    if shell == "nnx":
        params = nnx.state(nnx_module("MLPBlock"), nnx.Param)
    else:
        params = nn.unbox(linen_init("MLPBlock"))["params"]

    def is_projection(path, _):
        return any(getattr(key, "key", "").endswith("_proj") for key in path)

    mask = jax.tree_util.tree_map_with_path(is_projection, params)
    decay = optax.add_decayed_weights(1.0, mask=mask)
    grads = jax.tree.map(jnp.zeros_like, params)
    updates, _ = decay.update(grads, decay.init(params), params)
    for (path, update), param in zip(jax.tree_util.tree_leaves_with_path(updates), jax.tree.leaves(params)):
        assert_same(update, param if is_projection(path, update) else jnp.zeros_like(param))


@pytest.mark.parametrize("shell", ["nnx", "linen"])
def test_wrong_width_is_explained(shell):
    with pytest.raises(ValueError, match=r": x float32\[4, 9\], gate_proj float32\[8, 16\]"):
        if shell == "nnx":
            nnx_module("MLP")(jnp.zeros((4, 9)))
        else:
            gemma_mlp.linen.MLP(CONFIG).init(jax.random.key(0), jnp.zeros((4, 9)))
