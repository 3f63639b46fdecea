"""Measures held-out bits per byte of train_toy.py's model with each feed-forward, at a tuned learning rate."""

import functools
from pathlib import Path

from byte_decoder import data, evaluation, language_model, nnx_model, training
from flax import nnx

from compare_activations import contestants, tuning
from compare_activations.contestants import CONTESTANTS
from compare_activations.ensembles import Ensemble, Schedule, member, text_batches
from compare_activations.ledger import Ledger

NAME = "heldout"


def count(config) -> int:
    return 2 * len(config.contestants)


def measure(config, ledger: Ledger) -> None:
    corpus = load(config)
    for name in config.contestants:
        evaluate = make_evaluation(config, corpus, name)
        tuning.compare(
            evaluate,
            ledger,
            learning_rates=config.learning_rates,
            tuning_seeds=config.tuning_seeds,
            seeds=config.seeds,
            section=NAME,
            contestant=name,
        )


def load(config) -> data.Corpus:
    return data.load_corpus(config.data, config.heldout_fraction, config.heldout_max_bytes, Path(config.workdir))


def decoder(config, name: str) -> language_model.LanguageModel:
    """train_toy.py's decoder with the contestant's feed-forward blocks."""
    sizes = (contestants.mlp_config(name, config.embed_dim, config.hidden_dim), config.num_layers, config.num_heads)
    block = contestants.block_class(name)
    return language_model.LanguageModel(
        *language_model.pure_functions(lambda key: nnx_model.Decoder(*sizes, rngs=nnx.Rngs(params=key), block=block))
    )


def ensemble(config, model: language_model.LanguageModel) -> Ensemble:
    schedule = Schedule(config.steps, config.warmup_fraction, config.weight_decay)
    return Ensemble(model.init, functools.partial(training.mean_loss, model), schedule)


def make_evaluation(config, corpus: data.Corpus, name: str):
    """Makes a function that trains members from scratch and returns the held-out bits per byte of each."""
    model = decoder(config, name)
    runner = ensemble(config, model)
    bits_per_byte = evaluation.make_evaluation(model, corpus, config.seq_len)
    batch = text_batches(corpus, config.seq_len, config.batch_size)

    def evaluate(members):
        params = runner.final(members, batch).params
        return [bits_per_byte(member(params, i)) for i in range(len(members))]

    return evaluate


def table(runs) -> list[dict]:
    """A row for each contestant, with the columns of `tuning.rows`."""
    return tuning.rows([run for run in runs if run["section"] == NAME])


def draw(axes, runs) -> None:
    rows = sorted(table(runs), key=lambda row: row["mean"])
    labels = [CONTESTANTS[row["contestant"]].label for row in rows]
    for gated, color in ((True, "C0"), (False, "C1")):
        chosen = [i for i, row in enumerate(rows) if CONTESTANTS[row["contestant"]].gated == gated]
        axes.errorbar(
            [rows[i]["mean"] for i in chosen],
            chosen,
            xerr=[rows[i]["half"] for i in chosen],
            fmt="o",
            capsize=3,
            color=color,
            label="gated" if gated else "no gate",
        )
    axes.set_yticks(range(len(rows)), labels)
    axes.invert_yaxis()
    axes.set(title="Held-out text", xlabel="loss in bits per byte, 95 % intervals", ylabel="feed-forward")
    axes.legend()
