"""Measures curvature during training: the Hessian's largest eigenvalue, and how fast the gradient really changes.

Both are measured on the training loss of one fixed batch. All contestants train at one learning rate. Lanczos' method
finds the eigenvalue from Hessian-vector products. These do not see a kink, because they take second derivatives on its
sides and never across it. The other measure sees it: the change of the gradient over a step, divided by the step's
length.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from byte_decoder import training
from jax.flatten_util import ravel_pytree

from compare_activations import heldout
from compare_activations.contestants import CONTESTANTS
from compare_activations.ensembles import Member, numbers, text_batches
from compare_activations.ledger import Ledger
from compare_activations.statistics import interval, paired

NAME = "curvature"
MEASURES = ("eigenvalue", "change")


def count(config) -> int:
    return len(config.factorial)


def measure(config, ledger: Ledger) -> None:
    """Trains each contestant again, at one learning rate, and measures on the way."""
    corpus = heldout.load(config)
    for name in config.factorial:
        ledger.run(functools.partial(along_the_path, config, corpus, name), section=NAME, contestant=name)


def along_the_path(config, corpus, name: str) -> dict[str, Any]:
    """Both measures at the steps `config.curvature.at`: a number for each seed."""
    ours = config.curvature
    model = heldout.decoder(config, name)
    ensemble = heldout.ensemble(config, model)
    batch = text_batches(corpus, config.seq_len, config.batch_size)
    windows = text_batches(corpus, config.seq_len, ours.batch_size)(config.tuning_seeds[0], 1)
    loss = functools.partial(training.mean_loss, model)
    probe = jax.jit(jax.vmap(functools.partial(curvature, loss, iterations=ours.iterations), in_axes=(0, 0, None)))

    members = [Member(seed, ours.learning_rate) for seed in ours.seeds]
    measured, before = [], None
    for step, state, _ in ensemble.train(members, batch, ensemble.init(members)):
        if step in ours.at:
            values = probe(before, state.params, windows)
            measured.append({"step": step, **{name: numbers(values[name]) for name in MEASURES}})
        if step + 1 in ours.at:
            before = jax.tree.map(jnp.copy, state.params)  # a copy, because the next step donates the state
    return {"seeds": list(ours.seeds), "at": measured}


def curvature(loss, before, after, batch, *, iterations: int) -> dict[str, jax.Array]:
    """The Hessian's largest eigenvalue at `after`, and |gradient(after) - gradient(before)| / |after - before|."""
    flat, unravel = ravel_pytree(after)
    old = ravel_pytree(before)[0]
    gradient = jax.grad(lambda flat: loss(unravel(flat), batch))

    def hessian_times(vector):
        return jax.jvp(gradient, (flat,), (vector,))[1]

    start = jax.random.normal(jax.random.key(0), flat.shape)
    change = jnp.linalg.norm(gradient(flat) - gradient(old)) / jnp.linalg.norm(flat - old)
    return {"eigenvalue": largest_eigenvalue(hessian_times, start, iterations), "change": change}


def largest_eigenvalue(matvec, start: jax.Array, iterations: int) -> jax.Array:
    """The largest eigenvalue of a symmetric matrix M that is given by matvec(v) = M v, by Lanczos' method.

    The estimate is never too large: it is the largest eigenvalue of M restricted to the span of start, M start,
    M M start, and so on.
    """

    def extend(basis, i):
        vector = matvec(basis[i])
        diagonal = vector @ basis[i]
        for _ in range(2):  # twice, because rounding brings earlier directions back
            vector -= (basis @ vector) @ basis
        length = jnp.linalg.norm(vector)
        return basis.at[i + 1].set(vector / length), (diagonal, length)

    basis = jnp.zeros((iterations + 1, start.size)).at[0].set(start / jnp.linalg.norm(start))
    _, (diagonal, off_diagonal) = jax.lax.scan(extend, basis, jnp.arange(iterations))
    tridiagonal = jnp.diag(diagonal) + jnp.diag(off_diagonal[:-1], 1) + jnp.diag(off_diagonal[:-1], -1)
    return jnp.linalg.eigvalsh(tridiagonal)[-1]


def table(runs) -> list[dict]:
    """A row for each contestant and step: both measures, and the log2 of their ratios to those of a kinked contestant.

    That is ReGLU for a contestant with a gate, and ReLU for one without. Ratios are paired by seed. All have intervals.
    """
    ours = {run["contestant"]: run for run in runs if run["section"] == NAME}
    rows = []
    for name, run in ours.items():
        kinked = "reglu" if CONTESTANTS[name].gated else "relu"
        for i, moment in enumerate(run["at"]):
            row = {"contestant": name, "step": moment["step"]}
            for measured in MEASURES:
                row[measured], row[f"{measured} half"] = interval(moment[measured])
                if name != kinked and kinked in ours:
                    smooth, sharp = (np.log2(np.array(at["at"][i][measured], float)) for at in (run, ours[kinked]))
                    row[f"{measured} log2 ratio"], row[f"{measured} log2 half"] = paired(smooth, sharp)
            rows.append(row)
    return rows


def draw(axes, runs) -> None:
    rows = table(runs)
    names = list(dict.fromkeys(row["contestant"] for row in rows))
    for i, name in enumerate(names):
        ours = [row for row in rows if row["contestant"] == name]
        for measured, style in zip(MEASURES, ("-", ":")):
            axes.plot(
                [row["step"] for row in ours],
                [row[measured] for row in ours],
                color=f"C{i}",
                linestyle=style,
                label=CONTESTANTS[name].label if style == "-" else None,
            )
    axes.set(title="Largest Hessian eigenvalue", xlabel="training step (dotted: change of the gradient / its length)")
    axes.set(ylabel="nats / (unit of the parameters)²", yscale="log")
    axes.legend()
