"""Times low-bit weights and adapters next to bfloat16 weights, and has the memory that the compilers report.

The forward pass at few tokens is what decoding does. Each result is first compared with the plain formula in float32 on
the same weights, dequantised and with the adapters merged. The contestants then take turns in one run, as in timing.py.
"""

import functools

import jax

from benchmark import checking, memory, timing
from gemma_mlp import LoRA, MLPParams, aot
from gemma_mlp.testing.stacks import (
    LOW_BIT,
    MIB,
    adapters_of,
    compile_adapted,
    compile_forward,
    compile_gradient,
    make_config,
    make_layer,
    plain,
    with_adapters,
)

KINDS = ("dense", "int8", "int4", "int4 groups")
LORA = LoRA(rank=16)
ADAPTERS = ", adapters"  # ends the name of weights with adapters
COMPILERS = {**{chip: memory.COMPILERS[chip] for chip in ("CPU", "v5e", "v6e")}, "H200": ("h200", None)}


def measure(preset: str, tokens: tuple[int, ...], gradient_tokens: int, rounds: int):
    """Yields a row for each pass, number of tokens and kind of weights: milliseconds, and the ratio to dense weights.

    Rows of the forward pass also have the MiB of the weights, and the GB/s at which they are read. In the backward pass
    `dense` computes the gradients of all weights. The other rows have adapters and compute only their gradients. A
    contestant that is not timed has a row with `left_out`, the reason.
    """
    layers = in_a_row()
    for count in tokens:
        x = inputs(preset, count)
        contestants, expected, bits, stacks = {}, {}, {}, {}
        for name, config, layer in forward_contestants(preset):
            if config not in stacks:
                stacks[config] = [init(config, seed) for seed in range(layers)]
            contestants[name] = timing.jitted(one_after_another(layer), stacks[config], x)
            expected[name] = functools.partial(expected_results, stacks[config], x)
            bits[name] = stored_bits(stacks[config][0])
        for row in race("forward", count, contestants, expected, rounds, layers):
            size = bits[row["weights"]] / 8
            yield row | ({"MiB": size / MIB, "GB/s": size / row["ms"] / 1e6} if "ms" in row else {})

    x, dy = inputs(preset, gradient_tokens), inputs(preset, gradient_tokens, seed=2)
    contestants, expected = {}, {}
    for name, gradient, options in [
        ("dense", timing.value_and_gradient, {}),
        *((kind + ADAPTERS, adapter_gradient, {"lora": LORA, **LOW_BIT[kind]}) for kind in KINDS),
    ]:
        config = make_config(preset, **options)
        args = init(config, 0), x, dy
        contestants[name] = timing.jitted(gradient(make_layer(config)), *args)
        exact = timing.jitted(timing.float32(gradient(checking.plain_float32)), *args)
        expected[name] = lambda _, exact=exact: exact()
    yield from race("gradient", gradient_tokens, contestants, expected, rounds)


def in_a_row() -> int:
    """How many layers a forward pass has. On an accelerator one layer takes less time than the call of a program."""
    return 1 if jax.default_backend() == "cpu" else 8


def forward_contestants(preset):
    """Yields (name, config of the weights, layer)."""
    dense = make_config(preset)
    for kind in KINDS:
        config = make_config(preset, **LOW_BIT[kind])
        yield kind, config, make_layer(config)
    adapted = make_config(preset, lora=LORA)
    yield "dense" + ADAPTERS, adapted, make_layer(adapted)
    yield "dense, plain formula", dense, plain
    if timing.kernels_refuse(dense, "bfloat16") is None:
        yield "dense, kernels", dense, make_layer(make_config(preset, implementation="pallas"))


def one_after_another(layer):
    def run(stack, x):
        results = []
        for params in stack:
            x = layer(params, x)
            results.append(x)
        return results

    return run


def expected_results(stack, x, results):
    """What the layers must give. Each is given what the one before it gave, so that errors do not add up."""
    return [checking.plain_float32(params, x) for params, x in zip(stack, [x, *results])]


def inputs(preset, tokens, seed=1):
    return jax.random.normal(jax.random.key(seed), (tokens, make_config(preset).embed_dim), "bfloat16")


@functools.partial(jax.jit, static_argnums=0)
def init(config, seed):
    """Parameters with random numbers in lora_b too, which is zero before training."""
    params = MLPParams.init(config, jax.random.key(seed))
    leaves, tree = jax.tree.flatten(adapters_of(params))
    keys = jax.random.split(jax.random.key(3), len(leaves))
    leaves = [0.02 * jax.random.normal(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves)]
    return with_adapters(params, jax.tree.unflatten(tree, leaves))


def adapter_gradient(layer):
    """Value and gradient with respect to the adapters and x."""

    def compute(params, x, dy):
        y, pull_back = jax.vjp(lambda adapters, x: layer(with_adapters(params, adapters), x), adapters_of(params), x)
        return y, pull_back(dy.astype(y.dtype))

    return compute


def race(which, tokens, contestants, expected, rounds, layers=1):
    """Yields a row for each contestant. All of them have so many layers, and the row has the time of one."""
    errors, left_out = {}, {}
    for name, call in contestants.items():
        _, error, reason = checking.check({name: call}, expected[name])
        errors |= error
        left_out |= reason
    times = timing.race({name: contestants[name] for name in errors}, rounds)
    for name in contestants:
        row = {"pass": which, "tokens": tokens, "weights": name}
        if name in left_out:
            yield row | {"left_out": left_out[name]}
            continue
        ratio = {"ratio": times[name] / times["dense"]} if "dense" in times else {}
        yield row | {"ms": times[name] / layers, **ratio, "error": errors[name]}


def stored_bits(params) -> int:
    """The size of arrays as the compilers store them: two int4 to a byte."""
    return sum(leaf.size * jax.dtypes.itemsize_bits(leaf.dtype) for leaf in jax.tree.leaves(params))


def measure_memory(preset, compilers, *, tokens, gradient_tokens, layers):
    """Yields rows: MiB of temporary memory and of arguments in each column, or None where a program does not fit.

    The gradients are those of a scanned stack, with what `measure` computes.
    """
    gradient = {"tokens": gradient_tokens, "layers": layers}
    all_weights = functools.partial(compile_gradient, stack="scanned", **gradient)
    adapters = functools.partial(compile_adapted, **gradient)
    programs = [
        *(
            ("forward", count, kind, functools.partial(compile_forward, tokens=count))
            for count in tokens
            for kind in KINDS
        ),
        ("gradient", gradient_tokens, "dense", all_weights),
        *(("gradient", gradient_tokens, kind + ADAPTERS, adapters) for kind in KINDS),
    ]
    for which, count, name, compile_program in programs:
        lora = LORA if name.endswith(ADAPTERS) else None
        config = make_config(preset, lora=lora, **LOW_BIT[name.removesuffix(ADAPTERS)])
        row = {"pass": which, "tokens": count, "weights": name}
        for column, (target, _) in compilers.items():
            try:
                compiled = compile_program(target=target, config=config)
                row[column] = [compiled.temp_bytes / MIB, compiled.argument_bytes / MIB]
            except aot.DoesNotFit:
                row[column] = None
        yield row
