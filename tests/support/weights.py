"""Quantised and adapted weights with float64 copies for the oracle, and their exact results."""

import dataclasses

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from gemma_mlp import LoRAWeight, MLPParams, QuantizedWeight
from gemma_mlp.params import WEIGHTS
from gemma_mlp.testing import oracle
from tests.support import cases, samples

RANK, FACTOR = 16, 0.75
# name: (dtype of the base or None, group size or None, whether there is an adapter)
KINDS = {
    "adapter": (None, None, True),
    "int8": ("int8", None, False),
    "int4": ("int4", None, False),
    "float8": ("float8_e4m3fn", None, False),
    "int8 groups": ("int8", 32, False),
    "int4 groups": ("int4", 32, False),
    "float8 groups": ("float8_e4m3fn", 32, False),
    "int8 adapter": ("int8", None, True),
    "int4 groups adapter": ("int4", 32, True),
    "float8 groups adapter": ("float8_e4m3fn", 32, True),
}
NUMPY = {"int4": ml_dtypes.int4, "int8": np.int8, "float8_e4m3fn": ml_dtypes.float8_e4m3fn}


def quantized(rng, weight, dtype, group_size, scales_of_two=False):
    """(qvalue, scale) near `weight`, as float64. With powers of two as scales bfloat16 represents the weight."""
    groups = 1 if group_size is None else len(weight) // group_size
    largest = np.abs(weight.reshape(groups, -1, weight.shape[1])).max(axis=1)
    scale = largest / {"int4": 7, "int8": 127, "float8_e4m3fn": 448}[dtype]
    scale = 2.0 ** np.ceil(np.log2(scale)) if scales_of_two else scale.astype(np.float32).astype(np.float64)
    qvalue = weight / np.repeat(scale, len(weight) // groups, axis=0)
    qvalue = qvalue.astype(NUMPY[dtype]) if dtype.startswith("float") else np.rint(qvalue).astype(NUMPY[dtype])
    return qvalue.astype(np.float64), scale


def make(arrays, kind, scales_of_two=False, seed=5):
    """Weights of a kind instead of those in `arrays`: {name: float64 parts}, and `arrays` with their values."""
    dtype, group_size, has_adapter = KINDS[kind]
    rng = np.random.default_rng(seed)
    parts, effective = {}, dict(arrays)
    for name in WEIGHTS:
        part, base = {}, arrays[name]
        if dtype is not None:
            part["qvalue"], part["scale"] = quantized(rng, base, dtype, group_size, scales_of_two)
            base = oracle.dequantized(part["qvalue"], part["scale"])
        else:
            part["base"] = base
        if has_adapter:
            rows, columns = base.shape
            part["lora_a"] = samples.normal(rng, (rows, RANK), rows**-0.5)
            part["lora_b"] = samples.normal(rng, (RANK, columns), 0.02)
            base = oracle.adapted(base, part["lora_a"], part["lora_b"], FACTOR)
        parts[name], effective[name] = part, base
    return parts, effective


def weight(part, kind, dtype):
    """One weight of `make` for the package; floats are of `dtype`."""
    qdtype = KINDS[kind][0]
    if qdtype is None:
        base = jnp.asarray(part["base"], dtype)
    else:
        base = QuantizedWeight(jnp.asarray(part["qvalue"], qdtype), jnp.asarray(part["scale"], dtype))
    if "lora_a" not in part:
        return base
    return LoRAWeight(base, jnp.asarray(part["lora_a"], dtype), jnp.asarray(part["lora_b"], dtype), FACTOR)


def params(arrays, parts, kind, dtype):
    biases = {name: array for name, array in arrays.items() if name not in WEIGHTS}
    weights = {name: weight(part, kind, dtype) for name, part in parts.items()}
    return MLPParams(**weights, **{name: jnp.asarray(array, dtype) for name, array in biases.items()})


def trainable(params):
    """{name: array} of what has a gradient besides quantised weights: biases, dense bases and adapters."""
    leaves = {}
    for name, leaf in samples.mlp_leaves(params).items():
        base = leaf.base if isinstance(leaf, LoRAWeight) else leaf
        if not isinstance(base, QuantizedWeight):
            leaves[name] = base
        if isinstance(leaf, LoRAWeight):
            leaves |= {f"{name} lora_a": leaf.lora_a, f"{name} lora_b": leaf.lora_b}
    return leaves


def put(params, leaves):
    """`params` with other values of what `trainable` names."""
    changed = {}
    for name, leaf in samples.mlp_leaves(params).items():
        base = leaves.get(name, leaf.base if isinstance(leaf, LoRAWeight) else leaf)
        if isinstance(leaf, LoRAWeight):
            a, b = (leaves.get(f"{name} {part}", getattr(leaf, part)) for part in ("lora_a", "lora_b"))
            base = dataclasses.replace(leaf, base=base, lora_a=a, lora_b=b)
        changed[name] = base
    return MLPParams(**changed)


def exact_result(parts, effective, x, dy, activation, stored=oracle.exact, saved=oracle.exact):
    """{name: value} of y, dx and all gradients that exist, from the float64 oracle."""
    between = cases.between(stored)
    y, _ = oracle.mlp(effective, x, activation, stored, between)
    dparams, dx = oracle.mlp_gradients(effective, x, dy, activation, stored, saved=saved, between=between)
    h, dgate, dup = oracle.hidden_gradients(effective, x, dy, activation, stored, saved, between)
    results = {"y": y, "dx": dx} | {name: d for name, d in dparams.items() if name not in WEIGHTS}
    for name, (into, out_of) in {"gate_proj": (x, dgate), "up_proj": (x, dup), "down_proj": (h, dy)}.items():
        part = parts[name]
        if "base" in part:
            results[name] = dparams[name]
        if "lora_a" in part:
            da, db = oracle.lora_gradients(into, out_of, part["lora_a"], part["lora_b"], FACTOR, stored)
            results |= {f"{name} lora_a": da, f"{name} lora_b": db}
    return results
