"""Measures activations and gradients through deep stacks of feed-forwards, at the start and during training.

A stack is an embedding, feed-forwards, a final norm and tied logits. It has no attention, so nothing else carries the
signal. It learns to predict the next byte from one byte. The initial weights of each last projection are scaled to unit
gain. Otherwise the stacks without norms would only compare the output variance of the contestants.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from byte_decoder import language_model, training
from byte_decoder.common import VOCABULARY
from flax import nnx

import gemma_mlp
from compare_activations import contestants, heldout
from compare_activations.contestants import CONTESTANTS
from compare_activations.ensembles import Ensemble, Member, Schedule, numbers, text_batches
from compare_activations.ledger import Ledger
from compare_activations.statistics import interval

NAME = "gradient_flow"
WIRINGS = {  # how each feed-forward is joined to the residual stream
    "norms and residual": {"norms": True, "residual": True},  # gemma_mlp's block
    "residual": {"norms": False, "residual": True},
    "norms": {"norms": True, "residual": False},
    "neither": {"norms": False, "residual": False},
}


def cells(config):
    return [(w, d, c) for w in WIRINGS for d in config.gradient_flow.depths for c in config.factorial]


def count(config) -> int:
    return len(cells(config))


def measure(config, ledger: Ledger) -> None:
    """Trains each stack for a few steps and measures every layer on the way."""
    corpus = heldout.load(config)
    for wiring, depth, name in cells(config):
        run = functools.partial(flow_while_training, config, corpus, name, depth, **WIRINGS[wiring])
        ledger.run(run, section=NAME, wiring=wiring, depth=depth, contestant=name)


def make_stack(name: str, embed_dim: int, hidden_dim: int, depth: int, *, norms: bool, residual: bool):
    """Returns (init, forward) of a stack.

    forward(params, tokens [B, T], nudges [depth + 1, B, T, D]) returns the logits, and the root mean square of the
    residual stream before each layer and after the last. It adds the nudges at these places. They are zeros, and
    their gradients are those of the residual stream.
    """
    config = contestants.mlp_config(name, embed_dim, hidden_dim)
    wired = functools.partial(contestants.Block, mlp=contestants.mlp_class(name), norms=norms, residual=residual)
    init_layer, apply_layer = language_model.pure_functions(lambda key: wired(config, rngs=nnx.Rngs(params=key)))
    gain = contestants.unit_gain(name)

    def init(key):
        embed_key, layers_key = jax.random.split(key)
        layers = jax.vmap(init_layer)(jax.random.split(layers_key, depth))
        layers["mlp"]["down_proj"] = jax.tree.map(lambda leaf: leaf * gain, layers["mlp"]["down_proj"])
        return {"embed": jax.random.normal(embed_key, (VOCABULARY, embed_dim)) / embed_dim**0.5, "layers": layers}

    def forward(params, tokens, nudges):
        def layer(x, inputs):
            params, nudge = inputs
            x = x + nudge
            return apply_layer(params, x), rms(x)

        x = params["embed"][tokens] * embed_dim**0.5
        x, activations = jax.lax.scan(layer, x, (params["layers"], nudges[:-1]))
        x = x + nudges[-1]
        logits = gemma_mlp.rms_norm(jnp.zeros(embed_dim), x) @ params["embed"].T
        return logits, jnp.append(activations, rms(x))

    return init, forward


def rms(x, axis=None):
    return jnp.sqrt(jnp.mean(jnp.square(x), axis=axis))


def make_flow(forward, depth: int, embed_dim: int):
    """Makes (params, windows) -> the loss in nats, and by layer the RMS of the residual stream and of its gradient."""

    def loss(nudges, params, windows):
        logits, activations = forward(params, windows[:, :-1], nudges)
        return training.cross_entropy(logits, windows).mean(), activations

    def flow(params, windows):
        nudges = jnp.zeros((depth + 1, windows.shape[0], windows.shape[1] - 1, embed_dim))
        (value, activations), gradients = jax.value_and_grad(loss, has_aux=True)(nudges, params, windows)
        return {"loss": value, "activations": activations, "gradients": rms(gradients, axis=(1, 2, 3))}

    return flow


def flow_while_training(config, corpus, name: str, depth: int, *, norms: bool, residual: bool) -> dict[str, Any]:
    """The measurements at the steps `config.gradient_flow.at`: a number for each seed and layer."""
    ours = config.gradient_flow
    init, forward = make_stack(name, ours.embed_dim, ours.hidden_dim, depth, norms=norms, residual=residual)
    nudges = jnp.zeros((depth + 1, 1, 1, 1))
    model = language_model.LanguageModel(init, lambda params, tokens: forward(params, tokens, nudges)[0])
    schedule = Schedule(max(ours.at), config.warmup_fraction, 0.0)
    ensemble = Ensemble(init, functools.partial(training.mean_loss, model), schedule)
    members = [Member(seed, ours.learning_rate) for seed in ours.seeds]
    batch = text_batches(corpus, ours.seq_len, ours.batch_size)
    windows = batch(config.tuning_seeds[0], 1)  # drawn by a seed that does not train
    flow = jax.jit(jax.vmap(make_flow(forward, depth, ours.embed_dim), in_axes=(0, None)))

    start = ensemble.init(members)
    measured = {0: flow(start.params, windows)}
    for step, state, _ in ensemble.train(members, batch, start):
        if step in ours.at:
            measured[step] = flow(state.params, windows)
    return {
        "seeds": list(ours.seeds),
        "at": [
            {
                "step": step,
                "loss_bits": numbers(values["loss"] / np.log(2)),
                "activations": [numbers(row) for row in values["activations"]],
                "gradients": [numbers(row) for row in values["gradients"]],
            }
            for step, values in measured.items()
        ],
    }


def decades(profiles) -> np.ndarray:
    """log10 of the gradient before the first layer over the gradient after the last, for each seed.

    It is -inf if the gradient vanishes on the way, and NaN if it is zero after the last layer or not finite.
    """
    ends = np.array([(profile[0], profile[-1]) for profile in profiles], float)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.log10(ends[:, 0] / ends[:, 1])


def table(runs) -> list[dict]:
    """A row for each stack.

    Its columns are the powers of ten that the gradient gains (+) or loses (-) from the last layer to the first, at the
    first and at the last measured step, and the final loss in bits.
    """
    rows = []
    for run in (run for run in runs if run["section"] == NAME):
        row = {name: run[name] for name in ("wiring", "depth", "contestant")}
        for moment in (run["at"][0], run["at"][-1]):
            mean, half = summary(decades(moment["gradients"]))
            row |= {f"decades at {moment['step']}": mean, f"half at {moment['step']}": half}
        row["bits"], row["bits half"] = summary(np.array(run["at"][-1]["loss_bits"], float))
        rows.append(row)
    return rows


def summary(values) -> tuple[float | str, float | None]:
    """`interval` if all values are finite; otherwise a word for what happened, and None."""
    values = np.asarray(values, float)
    if np.isfinite(values).all():
        return interval(values)
    return ("undefined" if np.isnan(values).any() else "vanished"), None


def draw(axes, runs) -> None:
    """Draws the initial gradient over the layers of the deepest stack, with norms and residual and with neither."""
    ours = [run for run in runs if run["section"] == NAME]
    deepest = max(run["depth"] for run in ours)
    names = list(dict.fromkeys(run["contestant"] for run in ours))
    for run in (run for run in ours if run["depth"] == deepest and run["wiring"] in ("norms and residual", "neither")):
        profiles = np.array(run["at"][0]["gradients"], float)
        relative = profiles.mean(axis=0) / profiles.mean(axis=0)[-1]
        relative[relative == 0] = np.nan
        block = run["wiring"] != "neither"
        axes.plot(
            relative,
            color=f"C{names.index(run['contestant'])}",
            linestyle="-" if block else ":",
            label=CONTESTANTS[run["contestant"]].label if block else None,
        )
    axes.set(title=f"Gradient at the start, {deepest} layers", xlabel="layer (dotted: no norms, no residual)")
    axes.set(ylabel="size of the gradient / that after the last layer", yscale="log")
    axes.legend()
