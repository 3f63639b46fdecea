"""The training loop: data, model, optimizer, checkpoints, records."""

import json
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from tqdm import tqdm

from gemma_mlp.checks import check_values, require
from toy import data, language_model, records, sampling, yardsticks
from toy.language_model import LanguageModel
from toy.run_config import RunConfig

EVALUATION_BATCH = 64


class TrainState(NamedTuple):
    params: Any  # nested dicts, the same for both APIs
    opt_state: Any


def train(config: RunConfig) -> dict[str, Any]:
    """Trains from the last checkpoint of `config.workdir`, or from scratch, and returns the summary it writes there.

    Raises:
      ValueError: if the folder holds a run of another configuration or of other data.
    """
    started = time.monotonic()
    workdir = Path(config.workdir).resolve()
    corpus = data.load_corpus(config.data, config.heldout_fraction, config.heldout_max_bytes)
    model = language_model.make(config.api, config.mlp, config.num_layers, config.num_heads)
    optimizer = make_optimizer(config)
    batches = data.training_batches(corpus.train, config.seq_len, config.batch_size, config.seed)
    train_step = make_train_step(model, optimizer, config.check_values)
    evaluate = make_evaluation(model, corpus, config.seq_len)
    claim_workdir(workdir, config, corpus)

    with checkpoint_manager(workdir) as checkpoints:
        state, first = restore_or_init(checkpoints, model, optimizer, config.seed)
        with records.MetricsLog(workdir, first) as log, progress_bar(config, first) as bar:
            pending, shown, heldout = [], {}, None
            for step in range(first + 1, config.steps + 1):
                state, loss = train_step(state, jnp.asarray(batches[step - 1], "int32"))
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
            text = sample(model, state.params, corpus, config)
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
    records.write_atomically(workdir / "summary.json", json.dumps(summary, indent=2))
    lines = {"unigram entropy": summary["unigram_bits_per_byte"], "xz -9e": summary["xz_bits_per_byte"]}
    records.plot_loss(workdir / "loss.png", records.read_metrics(log.path), lines)
    return summary


def progress_bar(config: RunConfig, first: int) -> tqdm:
    """Counts tokens, so that it shows tokens per second and the time left."""
    tokens = config.batch_size * config.seq_len
    description = f"training ({config.api})"
    return tqdm(total=config.steps * tokens, initial=first * tokens, desc=description, unit="tok", unit_scale=True)


def claim_workdir(workdir: Path, config: RunConfig, corpus: data.Corpus) -> None:
    """Writes what the run is made of into a new folder; refuses a folder that holds another run."""
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / "config.json"
    ours = config.identity() | {"corpus_sha256": corpus.sha256}
    if not path.exists():
        records.write_atomically(path, json.dumps(ours, indent=2))
        return
    theirs = json.loads(path.read_text())
    differences = [
        f"{name} was {theirs.get(name)!r} and is {ours.get(name)!r}"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]
    require(
        not differences,
        "A run goes on with the configuration and the data it began with.",
        "; ".join(differences),
        f"choose another folder with --config.workdir, or delete {workdir} to start over.",
    )


def make_optimizer(config: RunConfig) -> optax.GradientTransformation:
    """AdamW with clipping; matrices alone decay, norms and the embedding do not."""

    def decays(params):
        return jax.tree_util.tree_map_with_path(lambda path, leaf: leaf.ndim > 1 and path[0].key != "embed", params)

    warmup_steps = int(config.steps * config.warmup_fraction)
    schedule = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, warmup_steps, config.steps)
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, b2=0.99, weight_decay=config.weight_decay, mask=decays),
    )


def make_train_step(model: LanguageModel, optimizer: optax.GradientTransformation, checked: bool):
    """A compiled (state, windows [B, T + 1]) -> (state, mean loss in nats)."""

    def train_step(state, windows):
        loss, grads = jax.value_and_grad(lambda params: losses(model, params, windows).mean())(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        return TrainState(optax.apply_updates(state.params, updates), opt_state), loss

    if checked:
        return check_values(train_step)
    return jax.jit(train_step, donate_argnums=0)


def make_evaluation(model: LanguageModel, corpus: data.Corpus, seq_len: int):
    """params -> bits per byte of the whole held-out text."""
    windows, scored = data.evaluation_windows(corpus, seq_len)

    @jax.jit
    def total(params, windows, scored):
        return jnp.sum(losses(model, params, windows) * scored)

    def evaluate(params) -> float:
        nats = sum(
            float(
                total(params, jnp.asarray(windows[i : i + EVALUATION_BATCH], "int32"), scored[i : i + EVALUATION_BATCH])
            )
            for i in range(0, len(windows), EVALUATION_BATCH)
        )
        return nats / math.log(2) / len(corpus.heldout)

    return evaluate


def losses(model: LanguageModel, params, windows):
    """Cross-entropy in nats of every next byte, [B, T]."""
    logits = model.logits(params, windows[:, :-1]).astype("float32")
    return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:])


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


def restore_or_init(checkpoints, model: LanguageModel, optimizer, seed: int) -> tuple[TrainState, int]:
    """(state, the number of steps it has been trained for)."""

    @jax.jit
    def init(key):
        params = model.init(key)
        return TrainState(params, optimizer.init(params))

    step = checkpoints.latest_step()
    if step is None:
        return init(jax.random.key(seed)), 0
    like = jax.eval_shape(init, jax.random.key(seed))
    restored = checkpoints.restore(step, args=ocp.args.StandardRestore(like._asdict()))
    print(f"Continuing from the checkpoint of step {step}.")
    return TrainState(**restored), step


def sample(model: LanguageModel, params, corpus: data.Corpus, config: RunConfig) -> str:
    """The prompt, marked off with `|` from what the model makes of it."""
    prompt = np.concatenate([corpus.train, np.frombuffer(config.prompt.encode(), np.uint8)])[-config.seq_len :]
    key = jax.random.key(config.seed)
    text = sampling.continue_text(model, params, prompt, config.sample_bytes, key)
    return f"{bytes(prompt).decode(errors='replace')}|{text.decode(errors='replace')}"
