"""Measures how well one feed-forward fits functions that multiply features, and functions that do not.

The input x [batch, D] holds standard normal numbers and a constant 1, which serves as a bias. The targets y [batch, D]
are functions of random unit projections of the normal numbers; every seed draws its own projections. The measure is the
fraction of variance unexplained, on points that were not trained on.

Without the constant 1, several contestants could only give an even function plus a linear one, whatever their weights:
GLU because sigmoid(z) + sigmoid(-z) = 1, and ReLU, GELU and SiLU without a gate because f(z) - f(-z) = z.
"""

import jax.numpy as jnp
import numpy as np
from byte_decoder import language_model
from flax import nnx

from compare_activations import contestants, tuning
from compare_activations.contestants import CONTESTANTS
from compare_activations.ensembles import Ensemble, Schedule, member
from compare_activations.ledger import Ledger

NAME = "expressiveness"
TEST_POINTS = 4096
FUNCTIONS = {  # their arguments are three projections of x
    "a b": lambda a, b, c: a * b,
    "a b c": lambda a, b, c: a * b * c,
    "sin 2a": lambda a, b, c: np.sin(2 * a),
    "|a|": lambda a, b, c: np.abs(a),
}


def count(config) -> int:
    return 2 * len(FUNCTIONS) * len(config.contestants)


def measure(config, ledger: Ledger) -> None:
    """Fits each contestant to each function, with a learning rate tuned as for the held-out text."""
    ours = config.expressiveness
    seeds = {"tuning_seeds": config.tuning_seeds, "seeds": config.seeds}
    for function in FUNCTIONS:
        for name in config.contestants:
            key = {"section": NAME, "function": function, "contestant": name}
            fit = make_fit(ours, name, function)
            tuning.compare(fit, ledger, learning_rates=ours.learning_rates, **seeds, **key)


def make_task(function: str, embed_dim: int, batch_size: int):
    """Makes a function (seed, step) -> (x, y). Step 0 gives the test points."""

    def batch(seed, step):
        projections = np.random.default_rng(seed).standard_normal((3, embed_dim - 1, embed_dim))
        projections /= np.linalg.norm(projections, axis=1, keepdims=True)
        points = batch_size if step else TEST_POINTS
        x = np.random.default_rng([seed, step]).standard_normal((points, embed_dim - 1))
        inputs = np.concatenate([x, np.ones((points, 1))], axis=1)
        return np.float32(inputs), np.float32(FUNCTIONS[function](*(x @ projections)))

    return batch


def make_fit(ours, name: str, function: str):
    """Makes a function that trains members and returns log10 of the variance fraction that each leaves unexplained."""
    config = contestants.mlp_config(name, ours.embed_dim, ours.hidden_dim)
    mlp = contestants.mlp_class(name)
    init, apply = language_model.pure_functions(lambda key: mlp(config, rngs=nnx.Rngs(params=key)))
    batch = make_task(function, ours.embed_dim, ours.batch_size)

    def loss(params, batch):
        x, y = batch
        return jnp.mean(jnp.square(apply(params, x) - y))

    ensemble = Ensemble(init, loss, Schedule(ours.steps, ours.warmup_fraction, 0.0))

    def fit(members):
        params = ensemble.final(members, batch).params
        unexplained = []
        for i, (seed, _) in enumerate(members):
            points = batch(seed, 0)
            unexplained.append(loss(member(params, i), points) / points[1].var())
        return np.log10(unexplained).tolist()

    return fit


def table(runs) -> list[dict]:
    """A row for each function and contestant, with the columns of `tuning.rows`."""
    ours = [run for run in runs if run["section"] == NAME]
    return [
        {"function": function, **row}
        for function in FUNCTIONS
        for row in tuning.rows([run for run in ours if run["function"] == function])
    ]


def draw(axes, runs) -> None:
    """Draws, for each function, the fraction of variance unexplained as bars."""
    rows = table(runs)
    names = list(dict.fromkeys(row["contestant"] for row in rows))
    for i, name in enumerate(names):
        ours = [row for row in rows if row["contestant"] == name]
        places = [place + (i - len(names) / 2) / (len(names) + 1) for place in range(len(ours))]
        hatch = None if CONTESTANTS[name].gated else "///"
        means, halves = [row["mean"] for row in ours], [row["half"] for row in ours]
        axes.bar(places, means, 1 / (len(names) + 1), yerr=halves, label=CONTESTANTS[name].label, hatch=hatch)
    axes.set_xticks(range(len(FUNCTIONS)), FUNCTIONS)
    axes.set(title="One feed-forward's fit", xlabel="function that is fitted")
    axes.set(ylabel="log10 of the fraction of variance unexplained")
    axes.legend(fontsize="x-small", ncols=2)
