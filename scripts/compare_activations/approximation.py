"""Measures how far GELU's tanh form, which Gemma uses, is from its erf form: by itself, in a layer, and in a model."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from byte_decoder.evaluation import make_evaluation
from scipy import special

from compare_activations import heldout
from compare_activations.ensembles import Member, member, numbers, text_batches
from compare_activations.ledger import Ledger
from compare_activations.statistics import paired
from gemma_mlp import ACTIVATIONS, PRESETS, MLPParams, mlp

NAME = "approximation"
FORMS = ("gelu_tanh", "gelu")
DTYPES = ("float64", "float32", "bfloat16")
RANGE = 8.0


def count(config) -> int:
    ours = config.approximation
    return len(DTYPES) + len(ours.presets) * 2 + 1


def measure(config, ledger: Ledger) -> None:
    ours = config.approximation
    for dtype in DTYPES:
        ledger.run(functools.partial(by_itself, dtype), section=NAME, part="function", dtype=dtype)
    for preset in ours.presets:
        for dtype in ("float32", "bfloat16"):
            run = functools.partial(in_a_layer, preset, dtype, ours.tokens)
            ledger.run(run, section=NAME, part="layer", preset=preset, dtype=dtype)
    corpus = heldout.load(config)
    ledger.run(functools.partial(in_a_model, config, corpus), section=NAME, part="model")


def points(dtype: str) -> np.ndarray:
    """The points to compare at. They are a fine grid over [-RANGE, RANGE], rounded to the dtype, without repeats."""
    with jax.enable_x64(dtype == "float64"):
        grid = np.linspace(-RANGE, RANGE, 1_600_001)
        return np.unique(np.asarray(jnp.asarray(grid, dtype)).astype(np.float64))


def differences(dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """(points, tanh form - erf form). Each form is computed in a wider dtype, if there is one, and rounded once."""
    x = points(dtype)
    with jax.enable_x64(dtype == "float64"):
        wide = jnp.asarray(x, "float64" if dtype == "float64" else "float32")
        tanh, erf = (np.asarray(ACTIVATIONS[form](wide).astype(dtype)).astype(np.float64) for form in FORMS)  # pyright: ignore[reportArgumentType]
    return x, tanh - erf


def by_itself(dtype: str) -> dict[str, Any]:
    """The largest difference, the x where it is, and the mean over the range and over a standard normal x."""
    x, difference = differences(dtype)
    gap = np.abs(difference)
    edges = np.concatenate([[-np.inf], (x[1:] + x[:-1]) / 2, [np.inf]])
    normal = np.diff(special.ndtr(edges))
    uniform = np.diff(np.clip(edges, -RANGE, RANGE)) / (2 * RANGE)
    return {
        "max": float(gap.max()),
        "at": float(x[gap.argmax()]),
        "mean": float(gap @ uniform),
        "normal_mean": float(gap @ normal),
        "share_of_normal_that_differs": float((gap > 0) @ normal),
    }


def in_a_layer(preset: str, dtype: str, tokens: int) -> dict[str, Any]:
    """The relative L2 difference of a random layer's outputs between the two forms, and what rounding changes in them.

    The weights are the same bfloat16 numbers for every dtype. The inputs are standard normal.
    """
    config = dataclasses.replace(PRESETS[preset], param_dtype="bfloat16")
    params = jax.jit(functools.partial(MLPParams.init, config))(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (tokens, config.embed_dim), "bfloat16")

    def output(form, dtype):
        run = jax.jit(lambda params, x: mlp(params, x, dataclasses.replace(config, activation=form, dtype=dtype)))
        return np.asarray(run(params, x).astype("float32"), np.float64)

    exact = output("gelu_tanh", "float32")
    norm = np.linalg.norm(exact)
    tanh, erf = (output(form, dtype) for form in FORMS)
    return {
        "forms": float(np.linalg.norm(tanh - erf) / norm),
        "rounding": float(np.linalg.norm(tanh - exact) / norm),
    }


def in_a_model(config, corpus) -> dict[str, Any]:
    """Held-out bits per byte of models that are trained with the tanh form and evaluated with each form."""
    models = {form: heldout.decoder(config, name) for form, name in zip(FORMS, ("geglu_tanh", "geglu_erf"))}
    members = [Member(seed, config.approximation.learning_rate) for seed in config.seeds]
    batch = text_batches(corpus, config.seq_len, config.batch_size)
    params = heldout.ensemble(config, models["gelu_tanh"]).final(members, batch).params
    scores = {}
    for form, model in models.items():
        evaluate = make_evaluation(model, corpus, config.seq_len)
        scores[form] = numbers([evaluate(member(params, i)) for i in range(len(members))], digits=9)
    return {"seeds": list(config.seeds), **scores}


def table(runs) -> list[dict]:
    """A row for each run. The row of the model has the paired difference erf - tanh, with its 95 % interval."""
    rows = []
    for run in (dict(run) for run in runs if run["section"] == NAME):
        del run["section"]
        if run["part"] == "model":
            difference, half = paired(run["gelu"], run["gelu_tanh"])
            largest = float(np.abs(np.subtract(run["gelu"], run["gelu_tanh"])).max())
            run = {"part": "model", "difference": difference, "difference_half": half, "largest": largest}
        rows.append(run)
    return rows


def draw(axes, _) -> None:
    """Draws the difference over x, in bfloat16 and in float32."""
    for dtype, style in (("bfloat16", "."), ("float32", "-")):
        x, difference = differences(dtype)
        shown = slice(None) if dtype == "bfloat16" else slice(None, None, 500)
        axes.plot(x[shown], np.abs(difference)[shown], style, label=dtype, markersize=2)
    axes.set(title="|GELU (tanh) - GELU (erf)|", xlabel="x, without a unit", xlim=(-6, 6))
    axes.set(ylabel="difference, in the unit of x", yscale="log", ylim=(1e-7, 3e-2))
    axes.legend()
