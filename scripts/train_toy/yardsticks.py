"""Bits per byte that a language model should beat, from the same held-out text."""

import lzma

import numpy as np

MIB = 2**20
HISTORY = 64 * MIB  # the dictionary of xz's preset 9; xz never looks further back


def unigram_bits_per_byte(heldout: np.ndarray) -> float:
    """The entropy of the frequencies of the held-out bytes: the lower bound for a model that sees no context."""
    share = np.bincount(heldout, minlength=256) / len(heldout)
    share = share[share > 0]
    return float(-(share * np.log2(share)).sum())


def xz_bits_per_byte(train: np.ndarray, heldout: np.ndarray) -> float:
    """The growth of the `xz -9e` file when the held-out text is appended to the training text, in bits per byte."""
    history = train[-HISTORY:].tobytes()
    return 8 * (_xz_size(history + heldout.tobytes()) - _xz_size(history)) / len(heldout)


def _xz_size(data: bytes) -> int:
    # The dictionary must span the history and the held-out bytes.
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 2 * HISTORY}]
    return len(lzma.compress(data, format=lzma.FORMAT_RAW, filters=filters))
