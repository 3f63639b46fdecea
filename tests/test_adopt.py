"""Other people's MLP modules, adopted: the same state, the same numbers, and what cannot be adopted is refused.

The modules are written from the interfaces of the libraries that the classes are named for. tests/peers_tunix runs the
same with the real Tunix.
"""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax import P
from jax.sharding import AxisType, NamedSharding

import gemma_mlp
from gemma_mlp import MLPConfig
from gemma_mlp.testing.oracle import relative_error
from tests.support.meshes import make_mesh

pytestmark = [pytest.mark.usefixtures("quick_to_compile"), pytest.mark.promotes]  # Flax's own modules rely on it

D, F = 16, 256
CONFIG = MLPConfig(D, F)
BOUND = 1e-6
README = Path(gemma_mlp.__file__).parent / "README.md"
NAMES = ("gate_proj", "up_proj", "down_proj")


class FlaxExample(nnx.Module):
    """Also Tunix's Gemma 1, 2 and 3, whose kernels have the names of mesh axes."""

    def __init__(self, rngs, axes=("fsdp", "tp"), **options):
        init = nnx.initializers.lecun_normal()
        self.config = {"anything": "static"}
        for name, (size, out), names in zip(NAMES, ((D, F), (D, F), (F, D)), (axes, axes, axes[::-1])):
            kernel_init = nnx.with_partitioning(init, names, eager_sharding=False)
            linear = nnx.Linear(size, out, rngs=rngs, kernel_init=kernel_init, **{"use_bias": False} | options)
            setattr(self, name, linear)

    def __call__(self, x):
        return self.down_proj(nnx.gelu(self.gate_proj(x)) * self.up_proj(x))


class ShardedLinear(nnx.Module):
    """As in bonsai, with sharding in the call."""

    def __init__(self, size, out, rngs):
        self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), (size, out)))
        self.bias = nnx.data(None)

    def __call__(self, x, *, out_sharding=None):
        return jax.lax.dot_general(x, self.kernel[...], (((x.ndim - 1,), (0,)), ((), ())), out_sharding=out_sharding)


class Bonsai(nnx.Module):
    def __init__(self, rngs):
        self.gate_proj, self.up_proj = ShardedLinear(D, F, rngs), ShardedLinear(D, F, rngs)
        self.down_proj = ShardedLinear(F, D, rngs)

    def __call__(self, x):
        hidden = jax.nn.gelu(self.gate_proj(x, out_sharding=None)) * self.up_proj(x, out_sharding=None)
        return self.down_proj(hidden, out_sharding=None)


class DenseGeneral(nnx.Module):
    """As in MaxText: it computes in a dtype of its own."""

    def __init__(self, size, out, rngs, dtype):
        self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), (size, out)), out_sharding=None)
        self.bias, self.quant, self.matmul_precision, self.dtype = None, None, "default", dtype

    def __call__(self, x, out_sharding=None):
        return jnp.asarray(x, self.dtype) @ jnp.asarray(self.kernel[...], self.dtype)


class MaxText(nnx.Module):
    def __init__(self, rngs, dtype=jnp.float32, rate=0.0):
        self.wi_0, self.wi_1 = DenseGeneral(D, F, rngs, dtype), DenseGeneral(D, F, rngs, dtype)
        self.wo = DenseGeneral(F, D, rngs, dtype)
        self.dropout = nnx.Dropout(rate, rngs=rngs)

    def __call__(self, x, decode=False, deterministic=False, intermediate_sharding=None, out_sharding=None):
        hidden = nnx.gelu(self.wi_0(x)) * self.wi_1(x)
        return self.wo(self.dropout(hidden, deterministic=deterministic))


class Flat(nnx.Module):
    """Its projections are Params, as in this package."""

    def __init__(self, rngs):
        init = nnx.initializers.lecun_normal()
        self.gate_proj, self.up_proj = (nnx.Param(init(rngs.params(), (D, F))) for _ in range(2))
        self.down_proj = nnx.Param(init(rngs.params(), (F, D)))

    def __call__(self, x):
        return (nnx.gelu(x @ self.gate_proj[...]) * (x @ self.up_proj[...])) @ self.down_proj[...]


KINDS = (FlaxExample, Bonsai, MaxText, Flat)
X = jax.random.normal(jax.random.key(9), (2, 5, D))
WEIGHTS = jax.random.normal(jax.random.key(8), (2, 5, D))


def names_of(module):
    """The paths and types of a module's variables."""
    return [(path, type(variable)) for path, variable in nnx.to_flat_state(nnx.state(module))]


def gradients(module, x=X):
    return nnx.grad(lambda module, x: (module(x).astype(jnp.float32) * WEIGHTS).sum(), argnums=(0, 1))(module, x)


def assert_close(got, expected, bound=BOUND):
    got, expected = (jax.tree.leaves_with_path(tree) for tree in (got, expected))
    assert [path for path, _ in got] == [path for path, _ in expected]
    for (path, a), (_, b) in zip(got, expected):
        assert a.dtype == b.dtype
        assert relative_error(a, np.asarray(b, np.float64)) <= bound, path


def is_ours(module, x=X):
    """Whether a call runs the package's program, which has a barrier on h."""
    graphdef, state = nnx.split(module)
    return "optimization_barrier" in str(jax.make_jaxpr(lambda state, x: nnx.merge(graphdef, state)(x))(state, x))


@pytest.mark.parametrize("save", ["input", "gate_up", "autodiff"])
@pytest.mark.parametrize("kind", KINDS)
def test_same_state_same_outputs_same_gradients(kind, save):
    theirs, ours = kind(nnx.Rngs(0)), kind(nnx.Rngs(0))
    assert gemma_mlp.nnx.adopt(ours, dataclasses.replace(CONFIG, save=save)) is ours
    assert is_ours(ours) and not is_ours(theirs)
    assert isinstance(ours, kind) and type(ours).__name__ == kind.__name__
    assert names_of(ours) == names_of(theirs)
    assert_close(ours(X), theirs(X))
    assert_close(gradients(ours), gradients(theirs))


class Parts:
    """Holds what a recipe of the README asks for."""

    def __init__(self, **parts):
        vars(self).update(parts)


@pytest.mark.parametrize("name", ["flax", "bonsai", "maxtext"])
def test_the_readmes_recipes(name):
    """On the interfaces above; tests/peers_tunix runs that for Tunix."""
    (recipe,) = re.findall(rf"^```python {name}\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)
    assert len(recipe.splitlines()) <= 10
    kind = {"flax": FlaxExample, "bonsai": Bonsai, "maxtext": MaxText}[name]
    mlps = [kind(nnx.Rngs(i)) for i in range(2)]
    expected = [mlp(X) for mlp in mlps]
    config = Parts(hidden_size=D, intermediate_size=F)
    model = Parts(config=config, layers=[Parts(mlp=mlp) for mlp in mlps])
    names = {"model": model, "layer": Parts(mlp_local=mlps[0], mlp_global=mlps[1]), "cfg": Parts(emb_dim=D, mlp_dim=F)}
    exec(recipe, names | {"gemma_mlp": gemma_mlp})
    for mlp, y in zip(mlps, expected):
        assert is_ours(mlp)
        assert_close(mlp(X), y)


def test_layers_of_a_model_have_one_class_and_one_trace():
    layers = [gemma_mlp.nnx.adopt(FlaxExample(nnx.Rngs(i)), CONFIG) for i in range(2)]
    assert type(layers[0]) is type(layers[1])
    assert nnx.split(layers[0])[0] == nnx.split(layers[1])[0]
    adopted_again = gemma_mlp.nnx.adopt(layers[0], dataclasses.replace(CONFIG, save="gate_up"))
    assert type(adopted_again) is type(layers[1]) and adopted_again.gemma_mlp_config.save == "gate_up"


def test_an_optimizer_and_a_checkpoint_of_before_still_fit():
    theirs, ours = FlaxExample(nnx.Rngs(0)), FlaxExample(nnx.Rngs(0))
    saved = nnx.to_pure_dict(nnx.state(FlaxExample(nnx.Rngs(7))))
    for module, adopt in ((theirs, False), (ours, True)):
        optimizer = nnx.Optimizer(module, optax.adam(1e-2), wrt=nnx.Param)  # made before the module is adopted
        if adopt:
            gemma_mlp.nnx.adopt(module, CONFIG)
        nnx.update(module, saved)
        optimizer.update(module, gradients(module)[0])
    assert_close(nnx.state(ours), nnx.state(theirs), bound=1e-5)
    assert nnx.get_partition_spec(nnx.state(ours)) == nnx.get_partition_spec(nnx.state(theirs))


@pytest.mark.parametrize("transform", ["nnx.jit", "nnx.remat", "nnx.clone", "scan"])
def test_inside_flax_transformations(transform):
    theirs, ours = FlaxExample(nnx.Rngs(0)), gemma_mlp.nnx.adopt(FlaxExample(nnx.Rngs(0)), CONFIG)
    for module in (theirs, ours):
        module.config = None  # Flax hashes a module's static attributes, and a dict has no hash
    if transform == "scan":

        @nnx.split_rngs(splits=2)
        @nnx.vmap
        def stack(rngs):
            return gemma_mlp.nnx.adopt(Flat(rngs), CONFIG)

        layers = stack(nnx.Rngs(0))
        y = nnx.scan(lambda layer, x: layer(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(layers, X)
        expected = X
        for i in range(2):
            layer = Flat(nnx.Rngs(1))
            nnx.update(layer, jax.tree.map(lambda leaf: leaf[i], nnx.state(layers)))
            expected = layer(expected)
        assert_close(y, expected)
        return
    wrap = {"nnx.jit": nnx.jit, "nnx.remat": nnx.remat, "nnx.clone": lambda call: lambda m, x: call(nnx.clone(m), x)}
    assert_close(wrap[transform](lambda module, x: module(x))(ours, X), theirs(X))


class TestAdapters:
    """A projection with an adapter computes by its own call, with gradients for the adapter."""

    def adapted(self, how, adopt_first=None):
        module = FlaxExample(nnx.Rngs(0))
        if adopt_first is True:
            gemma_mlp.nnx.adopt(module, CONFIG)
        for i, (name, (size, out)) in enumerate(zip(NAMES, ((D, F), (D, F), (F, D)))):
            base, rngs = getattr(module, name), nnx.Rngs(i)
            b = {"b_initializer": nnx.initializers.normal()}
            if how == "nnx.LoRA":
                setattr(module, name, nnx.LoRA(size, 2, out, base_module=base, rngs=rngs, **b))
            elif how == "nnx.LoRALinear":
                lora = nnx.LoRALinear(size, out, lora_rank=2, use_bias=False, rngs=rngs, **b)
                lora.kernel = base.kernel
                setattr(module, name, lora)
        if adopt_first is False:
            gemma_mlp.nnx.adopt(module, CONFIG)
        return module

    @pytest.mark.parametrize("adopt_first", [True, False])
    @pytest.mark.parametrize("how", ["nnx.LoRA", "nnx.LoRALinear"])
    def test_of_flax(self, how, adopt_first):
        theirs, ours = self.adapted(how), self.adapted(how, adopt_first)
        assert_close(ours(X), theirs(X))
        assert relative_error(ours(X), np.asarray(FlaxExample(nnx.Rngs(0))(X), np.float64)) > 1e-3
        got, expected = gradients(ours), gradients(theirs)
        assert_close(got, expected)
        assert len(jax.tree.leaves(nnx.state(got[0], nnx.LoRAParam))) == 6

    def test_once_it_is_gone_our_program_runs(self):
        module = self.adapted("nnx.LoRA", adopt_first=True)
        assert not is_ours(module)
        for name in NAMES:
            setattr(module, name, getattr(module, name).base_module)
        assert is_ours(module)


def test_capture_sees_every_projection():
    module = gemma_mlp.nnx.adopt(FlaxExample(nnx.Rngs(0)), CONFIG)
    y, captured = nnx.capture(module, nnx.Intermediate, method_outputs=nnx.Intermediate)(X)
    captured = nnx.to_pure_dict(captured)
    assert_close(captured["gate_proj"]["__call__"][0], module.gate_proj(X))
    assert_close(captured["__call__"][0], y)
    assert_close(y, module(X))


@pytest.mark.parametrize("top_k", [0, 2])
def test_a_part_of_h_that_the_flax_example_sows_is_sown(top_k):
    module = gemma_mlp.nnx.adopt(FlaxExample(nnx.Rngs(0)), CONFIG)
    module.sow_config = Parts(mlp_hidden_topk=top_k)
    assert is_ours(module) == (top_k == 0)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_the_compute_dtype_is_the_configs_or_the_projections(dtype):
    module = MaxText(nnx.Rngs(0), dtype=jnp.bfloat16)
    expected = module(X)
    y = gemma_mlp.nnx.adopt(module, dataclasses.replace(CONFIG, dtype=dtype))(X)
    assert y.dtype == expected.dtype == jnp.bfloat16
    assert relative_error(y, np.asarray(expected, np.float64)) < 0.01
    wide = gemma_mlp.nnx.adopt(module, dataclasses.replace(CONFIG, dtype="float32"))
    assert wide(X).dtype == jnp.float32


def test_biases():
    config = dataclasses.replace(CONFIG, use_bias=True)
    theirs = FlaxExample(nnx.Rngs(0), use_bias=True, bias_init=nnx.initializers.normal())
    ours = gemma_mlp.nnx.adopt(FlaxExample(nnx.Rngs(0), use_bias=True, bias_init=nnx.initializers.normal()), config)
    assert is_ours(ours)
    assert_close(ours(X), theirs(X))
    assert_close(gradients(ours), gradients(theirs))


class TestArgumentsOfTheCall:
    def test_what_changes_nothing_is_accepted(self):
        module = gemma_mlp.nnx.adopt(MaxText(nnx.Rngs(0)), CONFIG)
        y = module(X)
        for given in ((True,), (False, True)):
            assert_close(module(X, *given, intermediate_sharding=None, out_sharding=None), y)
        assert_close(module(X, deterministic=True, decode=True, rngs=nnx.Rngs(0)), y)
        assert_close(module(X, another=None, one=False), y)

    @pytest.mark.parametrize(
        ("args", "kwargs", "said"),
        [
            ((), {"scale": 2.0}, r"Got: scale 2.0. Fix: leave it out"),
            ((jnp.ones(2),), {}, r"Array.* after x"),
            ((), {"intermediate_sharding": P("data", None, "tensor")}, r"needs the mesh in force"),
        ],
    )
    def test_what_would_be_ignored_is_refused(self, args, kwargs, said):
        module = gemma_mlp.nnx.adopt(MaxText(nnx.Rngs(0)), CONFIG)
        with pytest.raises(ValueError, match=said):
            module(X, *args, **kwargs)

    @pytest.mark.usefixtures("eight_devices")
    @pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
    def test_shardings_are_honoured(self, axis_type):
        mesh = make_mesh(2, 4, axis_type)
        module = gemma_mlp.nnx.adopt(MaxText(nnx.Rngs(0)), CONFIG)
        expected = module(X)
        spec, out = P(("data", "fsdp"), None, "tensor"), NamedSharding(mesh, P("fsdp", None, "tensor"))
        with jax.set_mesh(mesh):
            graphdef, state = nnx.split(module)
            x, state = jax.device_put((X, state), NamedSharding(mesh, P()))

            def call(state, x):
                return nnx.merge(graphdef, state)(x, intermediate_sharding=spec, out_sharding=out)

            program = str(jax.make_jaxpr(call)(state, x))
            y = jax.jit(call)(state, x)
        assert f"{spec}" in program or "PartitionSpec(('data', 'fsdp'), None, 'tensor')" in program
        assert y.sharding.is_equivalent_to(out, 3)
        assert_close(y, expected)
        with jax.set_mesh(mesh):  # of an x without a batch
            merged = nnx.merge(graphdef, state)
            assert_close(jax.jit(lambda x: merged(x, intermediate_sharding=P("data", "tensor")))(X[0]), expected[0])
        with jax.set_mesh(mesh), pytest.raises(ValueError, match="its length and its last axis"):
            module(X[0, 0], intermediate_sharding=P("tensor"))


def changed(change, kind=FlaxExample, **options):
    module = kind(nnx.Rngs(0), **options)
    change(module)
    return module


def setter(path, value):
    def change(module):
        *parents, name = path.split(".")
        for parent in parents:
            module = getattr(module, parent)
        setattr(module, name, value)

    return change


@pytest.mark.parametrize(
    ("module", "config", "said"),
    [
        (nnx.Linear(D, F, rngs=nnx.Rngs(0)), CONFIG, r"wi_0, wi_1, wo. Got: Linear with bias, kernel"),
        (object(), CONFIG, r"Got: object with none"),
        (FlaxExample(nnx.Rngs(0)), dataclasses.replace(CONFIG, dropout_rate=0.1), r"dropout_rate 0.1"),
        (FlaxExample(nnx.Rngs(0)), MLPConfig(D, 2 * F), r"sizes \(16, 512\). Got: \(16, 256\), "),
        (FlaxExample(nnx.Rngs(0), use_bias=True), CONFIG, r"biases \[True, True, True\], use_bias False"),
        (
            changed(setter("down_proj.bias", nnx.Param(jnp.zeros(D)))),
            dataclasses.replace(CONFIG, use_bias=True),
            r"biases \[False, False, True\].*give a missing bias as zeros",
        ),
        (changed(setter("norm", nnx.LayerNorm(D, rngs=nnx.Rngs(0)))), CONFIG, r"Got: norm, a LayerNorm. Fix"),
        (MaxText(nnx.Rngs(0), rate=0.1), CONFIG, r"Got: dropout, a Dropout. Fix"),
        (changed(setter("up_proj.scale", nnx.Param(jnp.ones(F)))), CONFIG, r"up_proj must hold .* Got: scale"),
        (changed(setter("up_proj.kernel", nnx.Param(jnp.ones((D, 2, F))))), CONFIG, r"Got: float32\[16, 2, 256\]"),
        (changed(setter("up_proj.kernel", nnx.Dict(qvalue=nnx.Param(jnp.ones(2))))), CONFIG, r"before it is quantised"),
        (FlaxExample(nnx.Rngs(0), precision="highest"), CONFIG, r"precision 'highest'"),
        (
            changed(setter("wo.matmul_precision", "highest"), MaxText),
            CONFIG,
            r"matmul_precision 'highest'",
        ),
        (FlaxExample(nnx.Rngs(0), dot_general=lambda *a, **k: None), CONFIG, r"gate_proj must be a plain matmul"),
    ],
)
def test_what_cannot_be_adopted_is_refused(module, config, said):
    before = type(module)
    with pytest.raises(ValueError, match=said):
        gemma_mlp.nnx.adopt(module, config)
    assert type(module) is before


def test_projections_of_two_dtypes_need_the_configs():
    module = changed(setter("up_proj.dtype", jnp.float32), dtype=jnp.bfloat16)
    gemma_mlp.nnx.adopt(module, CONFIG)
    with pytest.raises(ValueError, match=r"Got: bfloat16, float32. Fix: say which"):
        module(X)
    assert gemma_mlp.nnx.adopt(module, dataclasses.replace(CONFIG, dtype="float32"))(X).dtype == jnp.float32


class LinenExample(nn.Module):
    features: tuple[str, ...] = NAMES
    use_bias: bool = False

    @nn.compact
    def __call__(self, x, deterministic=True):
        def dense(name, size):
            init = nn.with_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
            return nn.Dense(size, use_bias=self.use_bias, kernel_init=init, name=name)

        gate, up, down = self.features
        return dense(down, D)(nn.gelu(dense(gate, F)(x)) * dense(up, F)(x))


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + LinenExample(name="mlp")(nn.RMSNorm()(x), deterministic=True)


class TestLinen:
    def test_same_tree_same_outputs_same_gradients(self):
        model = LinenModel()
        variables = model.init(jax.random.key(0), X)

        def loss(variables, x):
            return (model.apply(variables, x) * WEIGHTS).sum()

        expected, grads = model.apply(variables, X), jax.grad(loss, (0, 1))(variables, X)
        with nn.intercept_methods(gemma_mlp.linen.adopt(LinenExample, CONFIG)):
            assert jax.tree.structure(model.init(jax.random.key(0), X)) == jax.tree.structure(variables)
            assert "optimization_barrier" in str(jax.make_jaxpr(model.apply)(variables, X))
            assert_close(model.apply(variables, X), expected)
            assert_close(jax.grad(loss, (0, 1))(variables, X), grads)
            _, captured = model.apply(variables, X, capture_intermediates=True)
        assert captured["intermediates"]["mlp"]["gate_proj"]["__call__"][0].shape == (2, 5, F)

    def test_an_adapter_is_not_skipped(self):
        class Adapted(LinenExample):
            @nn.compact
            def __call__(self, x):
                return super().__call__(x) + 1

        module = Adapted()
        variables = nn.unbox(module.init(jax.random.key(0), X))
        variables["params"]["up_proj"] |= {"kernel_lora_a": jnp.ones((D, 2)), "kernel_lora_b": jnp.ones((2, F))}
        expected = module.apply(variables, X)
        with nn.intercept_methods(gemma_mlp.linen.adopt(Adapted, CONFIG)):
            assert_close(module.apply(variables, X), expected)

    @pytest.mark.parametrize(
        ("module", "config", "said"),
        [
            (LinenExample(("a", "b", "c")), CONFIG, r"must be gate_proj.*Got: a, b, c"),
            (LinenExample(), MLPConfig(D, 2 * F), r"the config's sizes"),
            (LinenExample(use_bias=True), CONFIG, r"use_bias False"),
        ],
    )
    def test_what_the_config_does_not_describe_is_refused(self, module, config, said):
        variables = module.init(jax.random.key(0), X)
        with (
            nn.intercept_methods(gemma_mlp.linen.adopt(LinenExample, config)),
            pytest.raises(ValueError, match=said),
        ):
            module.apply(variables, X)

    def test_other_parameters_and_instances_are_refused(self):
        module = LinenExample()
        variables = nn.unbox(module.init(jax.random.key(0), X))
        variables["params"]["up_proj"]["scale"] = jnp.ones(F)
        with (
            nn.intercept_methods(gemma_mlp.linen.adopt(LinenExample, CONFIG)),
            pytest.raises(ValueError, match=r"nothing else. Got: scale"),
        ):
            module.apply(variables, X)
        with pytest.raises(ValueError, match="pass the class"):
            gemma_mlp.linen.adopt(module, CONFIG)
        with pytest.raises(ValueError, match="no dropout"):
            gemma_mlp.linen.adopt(LinenExample, dataclasses.replace(CONFIG, dropout_rate=0.1))
