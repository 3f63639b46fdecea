"""The training loop: data, model, optimizer, checkpoints, records."""

import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from tqdm import tqdm

from gemma_mlp.checks import check_values, require
from gemma_mlp.sharding import optimizer_shardings
from train_toy import data, language_model, parallel, records, sampling, yardsticks
from train_toy.language_model import LanguageModel
from train_toy.run_config import RunConfig

EVALUATION_BATCH = 64


class TrainState(NamedTuple):
    params: Any  # nested dicts, the same for both APIs
    opt_state: Any


def train(config: RunConfig) -> dict[str, Any]:
    """Trains from the last checkpoint of `config.workdir`, or from scratch, and returns the summary it writes there.

    Of several processes each works with its own devices and reads its own rows of every batch; the first writes.

    Raises:
      ValueError: if the folder holds a run of another configuration or of other data.
    """
    started = time.monotonic()
    workdir = Path(config.workdir).resolve()
    corpus = data.load_corpus(config.data, config.heldout_fraction, config.heldout_max_bytes)
    placement = parallel.Placement(parallel.make_mesh(config.mesh))
    sizes = (dataclasses.replace(config.mlp, axis_rules=placement.rules), config.num_layers, config.num_heads)
    model = language_model.make(config.api, *sizes)
    optimizer = make_optimizer(config.learning_rate, config.steps, config.warmup_fraction, config.weight_decay)
    require(
        config.batch_size == placement.count_rows(config.batch_size),
        "config.batch_size divides over the mesh's data and fsdp axes.",
        f"{config.batch_size} over {placement.row_parts}",
        "pass --config.batch_size=VALUE.",
    )
    windows = data.training_windows(corpus.train, config.seq_len, config.seed)
    shardings = state_shardings(config.api, sizes, model, optimizer, placement)
    train_step = make_train_step(functools.partial(mean_loss, model), optimizer)
    if config.check_values:
        train_step = check_values(train_step)
    else:
        train_step = jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, placement.whole))
    train_step = placement.on(train_step)
    evaluate = make_evaluation(model, corpus, config.seq_len, placement)

    def batch(step):
        def read(rows):
            return np.stack([windows[(step - 1) * config.batch_size + row] for row in rows])

        return placement.batch((config.batch_size, config.seq_len + 1), "int32", read)

    if parallel.is_first():
        records.claim_workdir(workdir, config.identity() | {"corpus_sha256": corpus.sha256})
    parallel.wait_for_all("the folder is claimed")

    with parallel.all_or_none(), checkpoint_manager(workdir) as checkpoints:
        state, first = restore_or_init(checkpoints, model, optimizer, config.seed, shardings)
        log = records.MetricsLog(workdir, first) if parallel.is_first() else records.NoLog()
        with log, progress_bar(config, first) as bar:
            pending, shown, heldout = [], {}, None
            steps = optimise(train_step, state, batch, first + 1, config.steps)
            for step, state, loss in steps:
                pending.append((step, loss))
                last = step == config.steps
                saving = step % config.checkpoint_every == 0 or last
                if step % config.log_every == 0 or saving:
                    for logged_step, value in pending:
                        log.write(logged_step, train_bits_per_byte=bits(logged_step, value))
                    shown["train"] = f"{bits(step, loss):.2f}"
                    pending.clear()
                if step % config.eval_every == 0 or last:
                    heldout = evaluate(state.params)
                    log.write(step, heldout_bits_per_byte=heldout)
                    shown["heldout"] = f"{heldout:.3f}"
                if saving:
                    log.flush()
                    checkpoints.save(step, args=ocp.args.StandardSave(state._asdict()))
                bar.set_postfix(shown, refresh=False)
                bar.update(config.batch_size * config.seq_len)
            if heldout is None:  # the run was complete already
                heldout = evaluate(state.params)
            text = sample(parallel.gathered(state.params), corpus, config)
            log.text(config.steps, "sample", text)

    summary = {
        "heldout_bits_per_byte": heldout,
        "unigram_bits_per_byte": yardsticks.unigram_bits_per_byte(corpus.heldout),
        "xz_bits_per_byte": yardsticks.xz_bits_per_byte(corpus.train, corpus.heldout),
        "train_bytes": len(corpus.train),
        "heldout_bytes": len(corpus.heldout),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "steps": config.steps,
        "continued_from_step": first,
        "sample": text,
        "seconds": time.monotonic() - started,
    }
    if isinstance(log, records.MetricsLog):
        records.write_atomically(workdir / "summary.json", json.dumps(summary, indent=2))
        lines = {"unigram entropy": summary["unigram_bits_per_byte"], "xz -9e": summary["xz_bits_per_byte"]}
        records.plot_loss(workdir / "loss.png", records.read_metrics(log.path), lines)
    return summary


def progress_bar(config: RunConfig, first: int) -> tqdm:
    """Counts tokens, so that it shows tokens per second and the time left."""
    tokens = config.batch_size * config.seq_len
    return tqdm(
        total=config.steps * tokens,
        initial=first * tokens,
        desc=f"training ({config.api})",
        unit="tok",
        unit_scale=True,
        disable=not parallel.is_first(),
    )


def optimise(
    train_step: Callable, state: TrainState, batch: Callable[[int], Any], first: int, last: int
) -> Iterator[tuple[int, TrainState, jax.Array]]:
    """The training loop: takes the steps `first` to `last`, yielding (step, state after it, loss before it).

    Args:
      train_step: (state, batch) -> (state, loss); it may consume the state it is given.
      state: what the first of the steps starts from.
      batch: step -> what that step learns from.
      first: the number of the first step, counted from 1.
      last: the number of the last step.
    """
    for step in range(first, last + 1):
        state, loss = train_step(state, batch(step))
        yield step, state, loss


def make_optimizer(
    learning_rate: float, steps: int, warmup_fraction: float, weight_decay: float
) -> optax.GradientTransformation:
    """AdamW with clipping; matrices alone decay, norms and the embedding do not."""

    def decays(params):
        return jax.tree_util.tree_map_with_path(lambda path, leaf: leaf.ndim > 1 and path[0].key != "embed", params)

    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, int(steps * warmup_fraction), steps)
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, b2=0.99, weight_decay=weight_decay, mask=decays),
    )


def make_train_step(loss: Callable[[Any, Any], jax.Array], optimizer: optax.GradientTransformation):
    """(state, batch) -> (state, loss before the step), for a `loss` of (params, batch)."""

    def train_step(state, batch):
        value, grads = jax.value_and_grad(loss)(state.params, batch)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        return TrainState(optax.apply_updates(state.params, updates), opt_state), value

    return train_step


def make_init(init: Callable[[jax.Array], Any], optimizer: optax.GradientTransformation):
    """key -> the state that training starts from."""

    def init_state(key):
        params = init(key)
        return TrainState(params, optimizer.init(params))

    return init_state


def make_evaluation(
    model: LanguageModel, corpus: data.Corpus, seq_len: int, placement: parallel.Placement = parallel.ONE_DEVICE
):
    """params -> bits per byte of the whole held-out text."""
    windows, scored = data.evaluation_windows(corpus, seq_len)
    size = placement.count_rows(EVALUATION_BATCH)

    @placement.on
    @jax.jit
    def total(params, windows, scored):
        return jnp.sum(losses(model, params, windows) * scored)

    def batch(array, dtype, start):
        """What there is from row `start` on, and after the end of it zeros, which score nothing."""

        def read(rows):
            part = array[start + rows.start : start + rows.stop]
            return np.pad(part, [(0, len(rows) - len(part)), (0, 0)])

        return placement.batch((size, array.shape[1]), dtype, read)

    def evaluate(params) -> float:
        nats = sum(
            float(total(params, batch(windows, "int32", start), batch(scored, "bool", start)))
            for start in range(0, len(windows), size)
        )
        return nats / math.log(2) / len(corpus.heldout)

    return evaluate


def losses(model: LanguageModel, params, windows):
    """Cross-entropy in nats of every next byte, [B, T]."""
    return cross_entropy(model.logits(params, windows[:, :-1]), windows)


def cross_entropy(logits, windows):
    """The same from the logits [B, T, V] that windows [B, T + 1] have led to."""
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype("float32"), windows[:, 1:])


def mean_loss(model: LanguageModel, params, windows):
    """What training lowers: the mean cross-entropy of windows [B, T + 1], in nats."""
    return losses(model, params, windows).mean()


def bits(step: int, loss: jax.Array) -> float:
    """`loss` in bits; a loss that is not finite ends the run, so that no checkpoint holds its parameters."""
    if not np.isfinite(loss):
        raise FloatingPointError(
            f"The loss is a finite number. Received: {loss} at step {step}. Fix: lower config.learning_rate; "
            "--config.check_values=True tells which array went wrong first."
        )
    return float(loss) / math.log(2)


def checkpoint_manager(workdir: Path) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    return ocp.CheckpointManager(workdir / "checkpoints", options=options)


def state_shardings(
    api: str, sizes: tuple, model: LanguageModel, optimizer, placement: parallel.Placement
) -> TrainState:
    """A sharding for every array of the state: on a mesh by its logical axes, else the first device."""
    shapes = jax.eval_shape(make_init(model.init, optimizer), jax.random.key(0))
    if placement.mesh is None:
        return jax.tree.map(lambda _: placement.rows, shapes)
    params = language_model.shardings(api, sizes, placement.mesh, parallel.RULES)
    return TrainState(params, optimizer_shardings(optimizer, shapes.params, params, placement.mesh))


def restore_or_init(
    checkpoints, model: LanguageModel, optimizer, seed: int, shardings: TrainState
) -> tuple[TrainState, int]:
    """(state, the number of steps it has been trained for), whatever mesh the checkpoint was written on."""

    def init():
        return make_init(model.init, optimizer)(jax.random.key(seed))

    step = checkpoints.latest_step()
    if step is None:
        return jax.jit(init, out_shardings=shardings)(), 0

    def like(shape, sharding):
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

    wanted = jax.tree.map(like, jax.eval_shape(init), shardings)
    restored = checkpoints.restore(step, args=ocp.args.StandardRestore(wanted._asdict()))
    if parallel.is_first():
        print(f"Continuing from the checkpoint of step {step}.")
    return TrainState(**restored), step


def sample(params, corpus: data.Corpus, config: RunConfig) -> str:
    """The prompt, marked off with `|` from what the model makes of it, on one device."""
    model = language_model.make(config.api, config.mlp, config.num_layers, config.num_heads)
    prompt = np.concatenate([corpus.train, np.frombuffer(config.prompt.encode(), np.uint8)])[-config.seq_len :]
    key = jax.random.key(config.seed)
    text = sampling.continue_text(model, params, prompt, config.sample_bytes, key)
    return f"{bytes(prompt).decode(errors='replace')}|{text.decode(errors='replace')}"
