"""A training run: it reads the text, trains the decoder, and writes checkpoints and records."""

import contextlib
import dataclasses
import functools
import json
import math
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from byte_decoder import data, language_model
from byte_decoder.evaluation import make_evaluation
from byte_decoder.placement import Placement, make_mesh
from byte_decoder.training import make_optimizer, make_train_step, mean_loss, optimise
from tqdm import tqdm
from workdir import claim_workdir, write_atomically

from gemma_mlp.checks import check_values, require
from train_toy import base, checkpoints, processes, records, sampling, yardsticks
from train_toy.run_config import RunConfig


def train(config: RunConfig) -> dict[str, Any]:
    """Trains from the last checkpoint in `config.workdir`, or from the start, and returns the summary it writes there.

    With several processes, each computes on its own devices and reads its own rows of every batch. The first process
    writes the records.

    Raises:
      ValueError: if the folder holds a run of another configuration or of other data, or `config.base` holds none that
        fits.
      FloatingPointError: if the loss is not finite.
    """
    started = time.monotonic()
    workdir = Path(config.workdir).resolve()
    corpus = data.load_corpus(config.data, config.heldout_fraction, config.heldout_max_bytes, workdir)
    if processes.is_first():
        print(f"Text: {corpus.about}.")
    placement = Placement(make_mesh(config.mesh))
    sizes = (dataclasses.replace(config.mlp, axis_rules=placement.rules), config.num_layers, config.num_heads)
    model = language_model.make(config.api, *sizes)
    optimizer = make_optimizer(config.learning_rate, config.steps, config.warmup_fraction, config.weight_decay)
    require(
        config.batch_size == placement.count_rows(config.batch_size),
        "config.batch_size must be a multiple of the mesh's data times fsdp.",
        f"{config.batch_size}, not a multiple of {placement.row_shards}",
        "pass --config.batch_size=VALUE.",
    )
    identity, frozen = config.identity() | {"corpus_sha256": corpus.sha256}, {}
    if config.base:
        base_identity = base.identity(config)
        identity |= {f"base.{name}": value for name, value in base_identity.items()}
        frozen = base.load(config, base_identity["steps"], placement)
    whole = functools.partial(language_model.join, frozen)
    batch = make_batches(corpus, config, placement)
    shardings = checkpoints.state_shardings(config.api, sizes, model, optimizer, placement)

    def loss_of(trained, batch):  # `frozen` is an argument of the step, since a constant would be compiled into it
        frozen, windows = batch
        return mean_loss(model, language_model.join(frozen, trained), windows)

    train_step = make_train_step(loss_of, optimizer)
    if config.check_values:
        train_step = check_values(train_step)
    else:
        train_step = jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, placement.replicated))
    train_step = placement.on(train_step)
    evaluate = make_evaluation(model, corpus, config.seq_len, placement)

    if processes.is_first():
        claim_workdir(workdir, identity)
    processes.wait_for_all("the folder is claimed")

    with processes.all_or_none(), checkpoints.open_manager(workdir) as manager:
        state, first = checkpoints.restore_or_init(manager, model, optimizer, config.seed, shardings)
        log = records.MetricsLog(workdir, first) if processes.is_first() else None
        with log or contextlib.nullcontext(), progress_bar(config, first) as bar:
            before = {}
            if config.base:
                params = whole(jax.tree.map(jnp.zeros_like, state.params))  # adapters of zeros change nothing
                before["heldout_bits_per_byte_before"] = evaluate(params)
                before["sample_before"] = sample(processes.gathered(params), corpus, config)
                if log and first == 0:
                    log.text(0, "sample", before["sample_before"])
            pending, shown, heldout = [], {}, None
            steps = optimise(train_step, state, lambda step: (frozen, batch(step)), first + 1, config.steps)
            for step, state, loss in steps:
                pending.append((step, loss))
                last = step == config.steps
                saving = step % config.checkpoint_every == 0 or last
                if step % config.log_every == 0 or saving:
                    for logged_step, value in pending:
                        shown["train"] = bits(logged_step, value)
                        if log:
                            log.write(logged_step, train_bits_per_byte=shown["train"])
                    pending.clear()
                if step % config.eval_every == 0 or last:
                    shown["heldout"] = heldout = evaluate(whole(state.params))
                    if log:
                        log.write(step, heldout_bits_per_byte=heldout)
                if saving:
                    checkpoints.save(manager, step, state)
                bar.set_postfix(shown, refresh=False)
                bar.update(config.batch_size * config.seq_len)
            if heldout is None:  # an earlier run had already done all steps
                heldout = evaluate(whole(state.params))
            text = sample(processes.gathered(whole(state.params)), corpus, config)
            if log:
                log.text(config.steps, "sample", text)

    summary = {
        "heldout_bits_per_byte": heldout,
        "unigram_bits_per_byte": yardsticks.unigram_bits_per_byte(corpus.heldout),
        "xz_bits_per_byte": yardsticks.xz_bits_per_byte(corpus.train, corpus.heldout),
        "train_bytes": len(corpus.train),
        "heldout_bytes": len(corpus.heldout),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(whole(state.params))),
        "trained_parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "steps": config.steps,
        "continued_from_step": first,
        "sample": text,
        "seconds": time.monotonic() - started,
    } | before
    if log:
        write_atomically(workdir / "summary.json", json.dumps(summary, indent=2))
        lines = {"unigram entropy": summary["unigram_bits_per_byte"], "xz -9e": summary["xz_bits_per_byte"]}
        if before:
            lines["before fine-tuning"] = before["heldout_bits_per_byte_before"]
        records.plot_loss(workdir / "loss.png", records.read_metrics(workdir), lines)
    return summary


def make_batches(corpus: data.Corpus, config: RunConfig, placement: Placement):
    """Makes a function that takes a step and returns its batch [B, T + 1], placed on the devices."""
    windows = data.training_windows(corpus.train, config.seq_len, config.seed)

    def batch(step):
        def read(rows):
            return np.stack([windows[(step - 1) * config.batch_size + row] for row in rows])

        return placement.batch((config.batch_size, config.seq_len + 1), "int32", read)

    return batch


def progress_bar(config: RunConfig, first: int) -> tqdm:
    """A bar that counts tokens, so that it shows tokens per second and the time left."""
    tokens = config.batch_size * config.seq_len
    return tqdm(
        total=config.steps * tokens,
        initial=first * tokens,
        desc=f"training ({config.api})",
        unit="tok",
        unit_scale=True,
        disable=not processes.is_first(),
    )


def bits(step: int, loss: jax.Array) -> float:
    """`loss` in bits. A loss that is not finite ends the run before a checkpoint can hold its parameters."""
    if not np.isfinite(loss):
        raise FloatingPointError(
            f"The loss must be a finite number. Got: {loss} at step {step}. Fix: lower config.learning_rate; "
            "--config.check_values=True tells which array went wrong first."
        )
    return float(loss) / math.log(2)


def sample(params, corpus: data.Corpus, config: RunConfig) -> str:
    """The prompt, a `|`, and the text with which the model continues it. This runs on one device."""
    model = language_model.make(config.api, config.mlp, config.num_layers, config.num_heads)
    prompt = np.concatenate([corpus.train, np.frombuffer(config.prompt.encode(), np.uint8)])[-config.seq_len :]
    text = sampling.continue_text(model, params, prompt, config.sample_bytes, jax.random.key(config.seed))
    return f"{bytes(prompt).decode(errors='replace')}|{text.decode(errors='replace')}"
