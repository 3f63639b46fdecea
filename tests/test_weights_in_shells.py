"""Quantised and adapted weights in both shells: the same bits, conversions in place, training, checkpoints, meshes."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import qwix
from flax import linen as nn
from flax import nnx
from jax.sharding import PartitionSpec

import gemma_mlp
from gemma_mlp import (
    LoRA,
    LoRAWeight,
    MLPBlockParams,
    MLPConfig,
    MLPParams,
    layouts,
    mlp,
    mlp_block,
    sharding,
)
from gemma_mlp.params import WEIGHTS
from gemma_mlp.testing import oracle
from gemma_mlp.testing.oracle import relative_error
from tests.support import samples
from tests.support.cases import FLOAT32_BOUND
from tests.support.meshes import MESHES, RULES, make_mesh
from tests.support.vary import vary

pytestmark = pytest.mark.usefixtures("quick_to_compile")

CONFIG = MLPConfig(64, 128)
ADAPTER = LoRA(rank=4, alpha=6)
KINDS = {
    "adapter": {"lora": ADAPTER},
    "int8": {"weight_dtype": "int8"},
    "int4 groups": {"weight_dtype": "int4", "group_size": 32},
    "float8 adapter": {"weight_dtype": "float8_e4m3fn", "lora": ADAPTER},
    "int4 groups, two adapters": {
        "weight_dtype": "int4",
        "group_size": 32,
        "lora": LoRA(2, 3, use_rslora=True, projections=("gate_proj", "down_proj")),
    },
}


# With `autodiff` the bits of bfloat16 gradients depend on what XLA compiles together, and so on who jits what.
SAVES = [("input", None), ("gate_up", "bfloat16"), ("input", "bfloat16"), ("autodiff", None)]


def inputs(*batch):
    return jnp.asarray(samples.normal(np.random.default_rng(0), (*batch, CONFIG.embed_dim)), "float32")


def make_params(config, layers=None):
    """Block parameters whose adapters are not zero."""
    key = jax.random.key(0)
    make = lambda key: MLPBlockParams.init(config, key)  # noqa: E731
    params = make(key) if layers is None else jax.vmap(make)(jax.random.split(key, layers))

    def trained(path, leaf):
        return leaf + 0.05 if getattr(path[-1], "name", "") == "lora_b" else leaf

    return jax.tree_util.tree_map_with_path(trained, params)


def nnx_block(config, params):
    block = gemma_mlp.nnx.MLPBlock(config, rngs=nnx.Rngs(7))
    gemma_mlp.nnx.set_params(block, params)
    chex.assert_trees_all_equal(gemma_mlp.nnx.get_params(block), params)
    return block


def linen_variables(params):
    weights, lora = {}, {}
    for name in WEIGHTS:
        weight = getattr(params.mlp, name)
        if isinstance(weight, LoRAWeight):
            lora |= {f"{name}_lora_a": weight.lora_a, f"{name}_lora_b": weight.lora_b}
            weight = weight.base
        weights[name] = weight
    norms = {name: {"scale": getattr(params, name).scale} for name in ("pre_norm", "post_norm")}
    return {"params": {"mlp": weights, **norms}} | ({"lora": {"mlp": lora}} if lora else {})


@vary(
    "kind save dtype jit",
    [(kind, save, dtype, bool((i + j) % 2)) for i, kind in enumerate(KINDS) for j, (save, dtype) in enumerate(SAVES)],
    together="kind",
)
def test_both_shells_and_the_core_give_the_same_bits(kind, save, dtype, jit):
    config = dataclasses.replace(CONFIG, save=save, dtype=dtype, **KINDS[kind])
    params, x = make_params(config), inputs(2, 3)
    block, variables = nnx_block(config, params), linen_variables(params)
    linen = gemma_mlp.linen.MLPBlock(config)
    chex.assert_trees_all_equal_shapes_and_dtypes(nn.unbox(jax.eval_shape(linen.init, jax.random.key(0), x)), variables)
    calls = [lambda x: mlp_block(params, x, config), block, lambda x: linen.apply(variables, x)]
    if jit:
        calls = [jax.jit(lambda x, call=call: call(x)) for call in calls]
    results = [(call(x), jax.grad(lambda x, call=call: jnp.sin(call(x)).sum())(x)) for call in calls]
    chex.assert_trees_all_equal(results[0], results[1])
    chex.assert_trees_all_equal(results[0], results[2])
    if "adapter" in kind:
        loss = nnx.grad(lambda block: jnp.sin(block(x)).sum(), argnums=nnx.DiffState(0, nnx.LoRAParam))
        theirs = jax.grad(lambda lora: jnp.sin(linen.apply({**variables, "lora": lora}, x)).sum())(variables["lora"])
        chex.assert_trees_all_equal(nnx.to_pure_dict(loss(block)), theirs)


@pytest.mark.parametrize("options", [{}, *KINDS.values()], ids=["dense", *KINDS])
def test_inside_of_a_model_that_replaces_flaxs_param(options, monkeypatch):
    """DeepMind's models do, by a function that needs the shape."""
    block, x = gemma_mlp.linen.MLPBlock(dataclasses.replace(CONFIG, **options)), inputs(2)
    expected, param = block.init(jax.random.key(0), x), nn.Module.param

    def param_of_a_shape(self, name, init_fn, shape, dtype=None, **options):
        return param(self, name, init_fn, shape, dtype, **options)

    monkeypatch.setattr(nn.Module, "param", param_of_a_shape)
    variables = block.init(jax.random.key(0), x)
    chex.assert_trees_all_equal(variables, expected)
    block.apply(variables, x)


class TestConversionInPlace:
    def block(self, **options):
        return gemma_mlp.nnx.MLPBlock(dataclasses.replace(CONFIG, **options), rngs=nnx.Rngs(0))

    @pytest.mark.parametrize("kind", KINDS)
    def test_gives_the_tree_of_a_module_made_so(self, kind):
        options = KINDS[kind]
        made, block = self.block(**options), self.block()
        if "weight_dtype" in options:
            gemma_mlp.nnx.quantize(block, options["weight_dtype"], options.get("group_size"))
        if "lora" in options:
            adapter = options["lora"]
            gemma_mlp.nnx.add_lora(
                block,
                adapter.rank,
                adapter.alpha,
                rngs=nnx.Rngs(1),
                use_rslora=adapter.use_rslora,
                projections=adapter.projections,
            )
        ours, theirs = nnx.state(block), nnx.state(made)
        assert jax.tree.structure(ours) == jax.tree.structure(theirs)  # names, types, logical axes and factors
        chex.assert_trees_all_equal_shapes_and_dtypes(ours, theirs)
        assert block.config == made.config and block.mlp.config == made.mlp.config

    def test_computes_what_the_functions_on_parameters_do(self):
        block, x = self.block(), inputs(5)
        params = MLPParams(**{name: getattr(block.mlp, name)[...] for name in WEIGHTS})
        gemma_mlp.nnx.quantize(block, "int8")
        chex.assert_trees_all_equal(block.mlp(x), mlp(gemma_mlp.quantize(params, "int8"), x, CONFIG))
        before = block.mlp(x)
        gemma_mlp.nnx.add_lora(block, 4, rngs=nnx.Rngs(1))
        chex.assert_trees_all_equal(block.mlp(x), before)
        gemma_mlp.nnx.remove_lora(block)
        gemma_mlp.nnx.dequantize(block)
        dense = gemma_mlp.dequantize(gemma_mlp.quantize(params, "int8"))
        chex.assert_trees_all_equal(block.mlp(x), mlp(dense, x, CONFIG))
        assert nnx.to_pure_dict(nnx.state(block)).keys() == {"pre_norm", "mlp", "post_norm"}
        assert set(nnx.to_pure_dict(nnx.state(block))["mlp"]) == set(WEIGHTS)

    @pytest.mark.parametrize("options", [{}, {"weight_dtype": "int8"}])
    def test_merging_changes_the_output_by_rounding_alone(self, options):
        block, x = self.block(**options, lora=ADAPTER), inputs(5)
        block.mlp.up_proj_lora_b.set_value(block.mlp.up_proj_lora_b[...] + 0.02)
        before = np.asarray(block(x), np.float64)
        gemma_mlp.nnx.merge_lora(block)
        bound = 0.005 if options else FLOAT32_BOUND  # of int8: 2.4e-3 were measured
        assert 0 < relative_error(block(x), before) <= bound
        assert not hasattr(block.mlp, "up_proj_lora_a") and block.config.lora is None

    def test_takes_a_whole_model_and_stacks_of_layers(self):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: "layers"})
        def stack(rngs):
            return gemma_mlp.nnx.MLPBlock(CONFIG, rngs=rngs)

        class Model(nnx.Module):
            def __init__(self):
                self.first = gemma_mlp.nnx.MLP(CONFIG, rngs=nnx.Rngs(1))
                self.rest = stack(nnx.Rngs(2))

            def __call__(self, x):
                x = self.first(x)
                return nnx.scan(lambda layer, x: layer(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(self.rest, x)

        model, x = Model(), inputs(4)
        gemma_mlp.nnx.quantize(model, "int8", 32)
        before = model(x)
        gemma_mlp.nnx.add_lora(model, 2, rngs=nnx.Rngs(3))
        np.testing.assert_allclose(model(x), before, rtol=1e-6)
        state = nnx.to_pure_dict(nnx.state(model))
        assert state["rest"]["mlp"]["gate_proj"]["scale"].shape == (3, 2, 128)
        assert state["rest"]["mlp"]["down_proj_lora_b"].shape == (3, 2, 64)
        a = state["rest"]["mlp"]["down_proj_lora_a"]
        assert not np.array_equal(a[0], a[1]) and not np.array_equal(a[0], state["first"]["down_proj_lora_a"])
        specs = nnx.to_pure_dict(nnx.get_partition_spec(nnx.state(model)))["rest"]["mlp"]
        assert specs["down_proj_lora_a"] == PartitionSpec("layers", "mlp", None)
        assert specs["down_proj"]["scale"] == PartitionSpec("layers", "mlp", "embed")
        gradient = nnx.grad(lambda model: model(x).sum(), argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
        assert {path[-1] for path, _ in nnx.to_flat_state(gradient)} == {
            f"{name}_lora_{part}" for name in WEIGHTS for part in "ab"
        }

    def test_refuses_modules_without_an_mlp_of_ours(self):
        linear = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
        for convert in (lambda m: gemma_mlp.nnx.quantize(m, "int8"), gemma_mlp.nnx.merge_lora):
            with pytest.raises(ValueError, match=r"must be a gemma_mlp.nnx.MLP, or hold one.*Linear.*Fix: "):
                convert(linear)

    def test_changes_nothing_if_one_layer_cannot_be_converted(self):
        blocks = nnx.List([self.block(), self.block(lora=ADAPTER)])
        with pytest.raises(ValueError, match=r"A weight can have one adapter.*Fix: call merge_lora"):
            gemma_mlp.nnx.add_lora(blocks, 2, rngs=nnx.Rngs(0))
        assert not hasattr(blocks[0].mlp, "gate_proj_lora_a")
        blocks[0].mlp.gate_proj = nnx.Linear(64, 128, rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match=r"gate_proj must be a variable of the MLP.*Linear.*Fix: "):
            gemma_mlp.nnx.quantize(blocks, "int8")


def test_half_an_adapter_and_one_without_a_factor_are_refused():
    mlp = gemma_mlp.nnx.MLP(dataclasses.replace(CONFIG, lora=ADAPTER), rngs=nnx.Rngs(0))
    lora_a = mlp.up_proj_lora_a
    del mlp.up_proj_lora_a
    with pytest.raises(ValueError, match=r"must be up_proj_lora_a and up_proj_lora_b.*NoneType.*Fix: "):
        mlp(inputs(2))
    mlp.up_proj_lora_a, mlp.up_proj_lora_b = lora_a, nnx.LoRAParam(mlp.up_proj_lora_b[...])
    with pytest.raises(ValueError, match=r"with its factor as metadata.*Fix: "):
        mlp(inputs(2))


def test_parameters_of_another_block_are_refused():
    block = gemma_mlp.nnx.MLPBlock(CONFIG, rngs=nnx.Rngs(0))
    for other in ({"hidden_dim": 256}, {"post_norm": False}, {"use_bias": True}):
        with pytest.raises(ValueError, match=r"The parameters must be .*Fix: make the block with the checkpoint's"):
            gemma_mlp.nnx.set_params(block, make_params(dataclasses.replace(CONFIG, **other)))


class TestAdaptersOfFiles:
    """By the number of the layer, as checkpoint.read_adapters and write_adapters have them."""

    def adapters(self, layers, ranks=(2, 3)):
        rng = np.random.default_rng(3)

        def adapter(name, rank):
            sizes = (128, 64) if name == "down_proj" else (64, 128)
            a, b = samples.normal(rng, (sizes[0], rank)), samples.normal(rng, (rank, sizes[1]))
            return layouts.Adapter(jnp.asarray(a, "float32"), jnp.asarray(b, "float32"), 1 / rank)

        return {
            i: {"up_proj": adapter("up_proj", ranks[0]), "down_proj": adapter("down_proj", ranks[1])} for i in layers
        }

    def test_layers_are_counted_by_their_paths(self):
        blocks = nnx.List([gemma_mlp.nnx.MLPBlock(CONFIG, rngs=nnx.Rngs(i)) for i in range(12)])
        adapters = self.adapters((2, 10))
        gemma_mlp.nnx.insert_adapters(blocks, adapters)
        assert [i for i in range(12) if hasattr(blocks[i].mlp, "up_proj_lora_a")] == [2, 10]
        chex.assert_trees_all_equal(blocks[10].mlp.down_proj_lora_b[...], adapters[10]["down_proj"].lora_b)
        chex.assert_trees_all_equal(gemma_mlp.nnx.extract_adapters(blocks), adapters)
        x = inputs(3)
        params = MLPParams(**{name: getattr(blocks[2].mlp, name)[...] for name in WEIGHTS})
        weights = {name: LoRAWeight(getattr(params, name), *adapter) for name, adapter in adapters[2].items()}
        chex.assert_trees_all_equal(blocks[2].mlp(x), mlp(dataclasses.replace(params, **weights), x, CONFIG))

    def test_a_stack_is_several_layers(self):
        @nnx.split_rngs(splits=3)
        @nnx.vmap
        def make(rngs):
            return gemma_mlp.nnx.MLPBlock(CONFIG, rngs=rngs)

        stack = make(nnx.Rngs(0))
        adapters = self.adapters((0, 1, 2))
        gemma_mlp.nnx.insert_adapters(stack, adapters)
        assert stack.mlp.up_proj_lora_a.shape == (3, 64, 2)
        chex.assert_trees_all_equal(gemma_mlp.nnx.extract_adapters(stack), adapters)
        gemma_mlp.nnx.remove_lora(stack)
        with pytest.raises(ValueError, match=r"layers of a stack must have adapters of the same.*Fix: "):
            gemma_mlp.nnx.insert_adapters(stack, {i: adapters[i] for i in (0, 2)})

    def test_what_does_not_fit_is_refused(self):
        block = gemma_mlp.nnx.MLPBlock(CONFIG, rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match=r"some of the layers 0 to 0.*layer 1.*Fix: "):
            gemma_mlp.nnx.insert_adapters(block, self.adapters((1,)))
        with pytest.raises(ValueError, match=r"must have adapters.*Fix: "):
            gemma_mlp.nnx.extract_adapters(block)


@pytest.mark.promotes  # Optax does
@pytest.mark.parametrize("options", [{}, {"weight_dtype": "int4", "group_size": 32}])
def test_adapters_train_and_the_base_stays(options):
    block, x = gemma_mlp.nnx.MLPBlock(dataclasses.replace(CONFIG, **options), rngs=nnx.Rngs(0)), inputs(16)
    base = jax.tree.map(jnp.copy, nnx.state(block))
    gemma_mlp.nnx.add_lora(block, 4, rngs=nnx.Rngs(1))
    optimizer = nnx.Optimizer(block, optax.adam(1e-2), wrt=nnx.LoRAParam)

    @nnx.jit
    def step(block, optimizer):
        loss = lambda block: (block(x) ** 2).mean()  # noqa: E731
        value, gradient = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(block)
        optimizer.update(block, gradient)
        return value

    losses = [float(step(block, optimizer)) for _ in range(10)]
    assert losses[-1] < 0.9 * losses[0]
    moments = nnx.to_flat_state(nnx.state(optimizer, nnx.OptState))
    assert all("lora" in str(path) or leaf.get_value().ndim == 0 for path, leaf in moments)
    gemma_mlp.nnx.remove_lora(block)
    chex.assert_trees_all_equal(nnx.state(block), base)


def test_default_gradients_pass_quantised_weights_by():
    """`nnx.grad` differentiates what is an nnx.Param: norms and adapters."""
    config = dataclasses.replace(CONFIG, weight_dtype="int8", lora=LoRA(2, projections=("up_proj",)))
    block = gemma_mlp.nnx.MLPBlock(config, rngs=nnx.Rngs(0))
    gradient = nnx.to_pure_dict(nnx.grad(lambda block: block(inputs(3)).sum())(block))
    assert set(gradient) == {"pre_norm", "mlp", "post_norm"}
    assert set(gradient["mlp"]) == {"up_proj_lora_a", "up_proj_lora_b"}


@pytest.mark.parametrize("shell", ["nnx", "linen"])
def test_orbax_saves_and_restores(shell, tmp_path):
    config = dataclasses.replace(CONFIG, **KINDS["int4 groups, two adapters"])
    params, x = make_params(config), inputs(4)
    if shell == "nnx":
        state = nnx.state(nnx_block(config, params))
        like = nnx.state(nnx.eval_shape(lambda: gemma_mlp.nnx.MLPBlock(config, rngs=nnx.Rngs(0))))
    else:
        state = linen_variables(params)
        like = jax.eval_shape(lambda: state)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", like)
    chex.assert_trees_all_equal(jax.tree.leaves(restored), jax.tree.leaves(state))
    if shell == "nnx":
        fresh = gemma_mlp.nnx.MLPBlock(config, rngs=nnx.Rngs(5))
        nnx.update(fresh, restored)
        y = fresh(x)
    else:
        y = gemma_mlp.linen.MLPBlock(config).apply(restored, x)
    chex.assert_trees_all_equal(y, mlp_block(params, x, config))


class TestMeshes:
    SPECS = {
        "gate_proj": (("fsdp", "tensor"), (None, "tensor"), ("fsdp", None), (None, "tensor")),
        "up_proj": (("fsdp", "tensor"), (None, "tensor"), ("fsdp", None), (None, "tensor")),
        "down_proj": (("tensor", "fsdp"), ("tensor", "fsdp"), ("tensor", None), (None, "fsdp")),
    }  # of qvalue, scale, lora_a and lora_b; groups along F are split like F

    def test_shardings_are_these(self):
        config = dataclasses.replace(CONFIG, weight_dtype="int4", group_size=32, lora=ADAPTER)
        mesh = make_mesh(2, 4)
        shardings = sharding.named_shardings(MLPBlockParams.specs(config), mesh).mlp
        block = gemma_mlp.nnx.MLPBlock(config, rngs=nnx.Rngs(0))
        of_nnx = nnx.to_pure_dict(sharding.named_shardings(nnx.state(block), mesh))["mlp"]
        for name, expected in self.SPECS.items():
            weight = getattr(shardings, name)
            leaves = [weight.base.qvalue, weight.base.scale, weight.lora_a, weight.lora_b]
            assert [leaf.spec for leaf in leaves] == [PartitionSpec(*spec) for spec in expected]
            parts = [of_nnx[name]["qvalue"], of_nnx[name]["scale"], of_nnx[f"{name}_lora_a"], of_nnx[f"{name}_lora_b"]]
            assert parts == leaves

    @vary(
        "kind mesh rules save chunk_size",
        [
            (kind, mesh, rules, save, (None, 4)[(i + j + k) % 2])
            for i, kind in enumerate(KINDS)
            for j, rules in enumerate(RULES)
            for k, save in enumerate(("input", "gate_up"))
            for mesh in (MESHES[(i + j + 2 * k) % 4], MESHES[4])
        ],
        together="mesh rules",
    )
    def test_values_and_gradients_are_those_of_one_device(self, kind, mesh, rules, save, chunk_size, eight_devices):
        rules = RULES[rules]
        config = dataclasses.replace(CONFIG, hidden_dim=1024, save=save, **KINDS[kind])
        params, x = make_params(config).mlp, inputs(8, 8)

        def adapters(params):
            return [(w.lora_a, w.lora_b) for w in vars(params).values() if isinstance(w, LoRAWeight)]

        def call(params, x, config):
            def loss(lora, x):
                left = iter(lora)
                weights = {
                    name: dataclasses.replace(w, **dict(zip(("lora_a", "lora_b"), next(left))))
                    for name, w in vars(params).items()
                    if isinstance(w, LoRAWeight)
                }
                return jnp.square(mlp(dataclasses.replace(params, **weights), x, config)).sum()

            return jax.value_and_grad(loss, argnums=(0, 1))(adapters(params), x)

        alone = jax.jit(call, static_argnums=2)(params, x, config)
        shape, axis_type = mesh
        mesh = make_mesh(*shape, axis_type)
        on_mesh = dataclasses.replace(config, axis_rules=rules, chunk_size=chunk_size)
        with jax.set_mesh(mesh):
            placed = jax.device_put(params, sharding.named_shardings(MLPParams.specs(config), mesh, rules))
            x = jax.device_put(x, sharding.activation_sharding(x.shape, mesh, rules))
            together = jax.jit(call, static_argnums=2)(placed, x, on_mesh)
        for ours, theirs in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            assert relative_error(ours, np.asarray(theirs, np.float64)) <= 2 * FLOAT32_BOUND


class OfLinears(nnx.Module):
    def __init__(self, rngs):
        self.gate_proj = nnx.Linear(64, 128, use_bias=False, rngs=rngs)
        self.up_proj = nnx.Linear(64, 128, use_bias=False, rngs=rngs)
        self.down_proj = nnx.Linear(128, 64, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.down_proj(nnx.gelu(self.gate_proj(x)) * self.up_proj(x))


class TestQwix:
    """qwix as the independent reference, and its arrays as our leaves."""

    @pytest.mark.parametrize("group_size", [None, 32])
    @pytest.mark.parametrize(("dtype", "largest"), [("int8", 127.5), ("int4", 7.5), ("float8_e4m3fn", 448)])
    def test_rounding(self, dtype, largest, group_size):
        """scale = max |W| / largest; qvalue = W / scale, rounded to the nearest."""
        weight = samples.normal(np.random.default_rng(1), (64, 128))
        params = MLPParams(*(jnp.asarray(w, "float32") for w in (weight, weight, weight.T)))
        quantized = gemma_mlp.quantize(params, dtype, group_size).gate_proj
        groups = weight.astype(np.float32).reshape(64 // (group_size or 64), -1, 128)
        scale = np.abs(groups).max(axis=1) / np.float32(largest)
        np.testing.assert_allclose(quantized.scale, scale, rtol=1e-6)
        ratio = jnp.asarray(groups / np.asarray(quantized.scale)[:, None]).reshape(64, 128)
        assert quantized.qvalue.dtype == dtype
        qvalue = quantized.qvalue.astype("float32")
        if dtype == "float8_e4m3fn":
            np.testing.assert_array_equal(qvalue, ratio.astype(dtype).astype("float32"))
        else:
            assert np.abs(qvalue - ratio).max() <= 0.5 + 1e-5
        dense = gemma_mlp.dequantize(gemma_mlp.quantize(params, dtype, group_size)).gate_proj
        theirs = qwix.dequantize(qwix.QArray(quantized.qvalue, quantized.scale))
        np.testing.assert_allclose(dense, theirs, rtol=1e-6)
        exact = oracle.dequantized(np.asarray(quantized.qvalue, np.float64), np.asarray(quantized.scale, np.float64))
        assert relative_error(dense, exact) <= FLOAT32_BOUND

    def test_qarrays_are_leaves(self):
        block, x = gemma_mlp.nnx.MLPBlock(CONFIG, rngs=nnx.Rngs(0)), inputs(3)
        params = MLPParams(**{name: getattr(block.mlp, name)[...] for name in WEIGHTS})
        ours = gemma_mlp.quantize(params, "int8", 32)
        qarrays = {n: qwix.QArray(getattr(ours, n).qvalue, getattr(ours, n).scale) for n in WEIGHTS}
        expected = mlp(ours, x, CONFIG)
        chex.assert_trees_all_equal(mlp(MLPParams(**qarrays), x, CONFIG), expected)
        for name, qarray in qarrays.items():
            setattr(block.mlp, name, nnx.Param(qarray))
        chex.assert_trees_all_equal(block.mlp(x), expected)
        linen = gemma_mlp.linen.MLP(CONFIG)
        chex.assert_trees_all_equal(linen.apply({"params": qarrays}, x), expected)
        asymmetric = qwix.quantize(params.gate_proj, "int8", channelwise_axes=(1,), calibration_method="minmax")
        with pytest.raises(ValueError, match=r"must be symmetric.*zero_point.*Fix: "):
            mlp(dataclasses.replace(params, gate_proj=asymmetric), x, CONFIG)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    @pytest.mark.promotes
    @pytest.mark.parametrize("trained", [False, True])
    @pytest.mark.parametrize(("dtype", "group_size"), [("int8", None), ("int4", 32)])
    def test_quantised_weights_are_qwixs(self, dtype, group_size, trained):
        """On nnx.Linear, quantised after training, or in every step of a training that knows of it."""
        theirs, x = OfLinears(nnx.Rngs(0)), inputs(3)
        rule = {"module_path": ".*_proj", "weight_qtype": dtype, "tile_size": group_size}
        provider = (
            qwix.QtProvider([qwix.QtRule(**rule)]) if trained else qwix.PtqProvider([qwix.QuantizationRule(**rule)])
        )
        params = MLPParams(**{name: getattr(theirs, name).kernel[...] for name in WEIGHTS})
        ours = gemma_mlp.quantize(params, dtype, group_size)
        expected = np.asarray(qwix.quantize_model(theirs, provider, x)(x), np.float64)
        assert relative_error(mlp(ours, x, CONFIG), expected) <= 2 * FLOAT32_BOUND

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    @pytest.mark.promotes
    def test_lora_is_qwixs(self):
        """On nnx.Linear, with qwix's own adapters copied to ours: alpha / rank, A and B in these places."""

        x = inputs(3)
        provider = qwix.LoraProvider(module_path=".*_proj", rank=4, alpha=6.0)
        theirs = qwix.apply_lora_to_model(OfLinears(nnx.Rngs(0)), provider, x, rngs=nnx.Rngs(1))
        ours = gemma_mlp.nnx.MLP(CONFIG, rngs=nnx.Rngs(2))
        gemma_mlp.nnx.add_lora(ours, rank=4, alpha=6.0, rngs=nnx.Rngs(3))
        for name in WEIGHTS:
            linear = getattr(theirs, name)
            linear.kernel_lora_b.set_value(linear.kernel_lora_b[...] + 0.03)
            getattr(ours, name).set_value(linear.kernel[...])
            getattr(ours, f"{name}_lora_a").set_value(linear.kernel_lora_a[...])
            getattr(ours, f"{name}_lora_b").set_value(linear.kernel_lora_b[...])
        assert relative_error(ours(x), np.asarray(theirs(x), np.float64)) <= 2 * FLOAT32_BOUND


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.promotes
class TestQwixProviders:
    """They would find one of three weights, so each is refused in each shell, with the ways that work."""

    RULE = qwix.QuantizationRule(module_path=".*", weight_qtype="int8")
    PROVIDERS = {
        "lora": lambda: qwix.LoraProvider(module_path=".*", rank=4, alpha=8.0),
        "weights after training": lambda: qwix.PtqProvider([TestQwixProviders.RULE]),
        "training": lambda: qwix.QtProvider([qwix.QtRule(module_path=".*", weight_qtype="int8")]),
    }
    MESSAGE = r"(?s)must not rewrite the matmuls of this package.*Fix: .*gemma_mlp.nnx.quantize or add_lora"

    @pytest.mark.parametrize("provider", PROVIDERS)
    def test_nnx(self, provider):
        block = gemma_mlp.nnx.MLPBlock(CONFIG, rngs=nnx.Rngs(0))
        change = qwix.apply_lora_to_model if provider == "lora" else qwix.quantize_model
        with pytest.raises(ValueError, match=self.MESSAGE):
            change(block, self.PROVIDERS[provider](), inputs(3), rngs=nnx.Rngs(1))(inputs(3))

    @pytest.mark.parametrize("provider", PROVIDERS)
    def test_linen(self, provider):
        change = qwix.apply_lora_to_model if provider == "lora" else qwix.quantize_model
        block = change(gemma_mlp.linen.MLPBlock(CONFIG), self.PROVIDERS[provider]())
        with pytest.raises(ValueError, match=self.MESSAGE):
            block.init(jax.random.key(0), inputs(3))


class TestBadInput:
    PARAMS = MLPParams(jnp.ones((64, 128)), jnp.ones((64, 128)), jnp.ones((128, 64)))

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda p: gemma_mlp.quantize(p, "int2"), "dtype must be one of int8, int4, float8_e4m3fn. Got: 'int2'"),
            (lambda p: gemma_mlp.quantize(p, None), "dtype must be one of int8"),
            (lambda p: gemma_mlp.quantize(p, "int8", 48), r"group_size must divide the contracted axis.*48"),
            (lambda p: gemma_mlp.quantize(p, "int8", 0), "group_size must be a whole number of at least 1"),
            (lambda p: gemma_mlp.quantize(gemma_mlp.quantize(p, "int8"), "int4"), "A weight to quantise must be"),
            (lambda p: gemma_mlp.quantize({"w": p.gate_proj}, "int8"), "must have leaves called gate_proj"),
            (lambda p: gemma_mlp.dequantize(p, "float16"), "must not be float16"),
            (lambda p: gemma_mlp.add_lora(p, LoRA(0), jax.random.key(0)), "rank must be a whole number"),
            (lambda p: LoRA(2, alpha="8"), "alpha must be a finite number"),
            (lambda p: LoRA(2, alpha=float("nan")), "alpha must be a finite number"),
            (lambda p: LoRA(2, use_rslora=1), "use_rslora must be True or False"),
            (lambda p: LoRA(2, projections=("q_proj",)), "projections must be some of gate_proj"),
            (lambda p: LoRA(2, projections=()), "projections must be some of gate_proj"),
            (lambda p: MLPConfig(64, 128, weight_dtype="int2"), "weight_dtype must be one of"),
            (lambda p: MLPConfig(64, 128, group_size=32), "needs a weight_dtype"),
            (lambda p: MLPConfig(64, 128, weight_dtype="int8", group_size=48), "group_size must divide embed_dim"),
            (lambda p: MLPConfig(64, 128, lora=8), "lora must be a gemma_mlp.LoRA"),
        ],
    )
    def test_is_explained(self, call, message):
        with pytest.raises(ValueError, match=message + ".*Fix: "):
            call(self.PARAMS)

    def test_factors(self):
        """alpha / rank, or alpha / sqrt(rank); alpha is the rank unless it is given."""
        assert LoRA(16, 32).factor == 2.0
        assert LoRA(16, 32, use_rslora=True).factor == 8.0
        assert LoRA(8).factor == 1.0
