"""The score of a model: bits per byte of the held-out text."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from byte_decoder import data, training
from byte_decoder.language_model import LanguageModel
from byte_decoder.placement import ONE_DEVICE, Placement

BATCH_SIZE = 64


def make_evaluation(model: LanguageModel, corpus: data.Corpus, seq_len: int, placement: Placement = ONE_DEVICE):
    """Makes a function that takes params and returns the bits per byte of the whole held-out text."""
    windows, scored = data.evaluation_windows(corpus, seq_len)
    size = placement.count_rows(BATCH_SIZE)

    @placement.on
    @jax.jit
    def total(params, windows, scored):
        return jnp.sum(training.losses(model, params, windows) * scored)

    def batch(array, dtype, start):
        """`size` rows from row `start` on. Rows past the end are zeros, which are not scored."""

        def read(rows):
            present = array[start + rows.start : start + rows.stop]
            return np.pad(present, [(0, len(rows) - len(present)), (0, 0)])

        return placement.batch((size, array.shape[1]), dtype, read)

    def evaluate(params) -> float:
        nats = sum(
            float(total(params, batch(windows, "int32", start), batch(scored, "bool", start)))
            for start in range(0, len(windows), size)
        )
        return nats / math.log(2) / len(corpus.heldout)

    return evaluate
