"""Two scores in bits per byte of the same held-out text, which a language model should beat."""

import lzma

import numpy as np

MIB = 2**20
HISTORY = 64 * MIB  # the dictionary of xz's preset 9; xz never looks further back


def unigram_bits_per_byte(heldout: np.ndarray) -> float:
    """The entropy of the frequencies of the held-out bytes. A model that sees no context cannot do better."""
    share = np.bincount(heldout, minlength=256) / len(heldout)
    share = share[share > 0]
    return float(-(share * np.log2(share)).sum())


def xz_bits_per_byte(train: np.ndarray, heldout: np.ndarray) -> float:
    """How much the `xz -9e` file grows when the held-out text follows the training text, in bits per byte."""
    history = train[-HISTORY:].tobytes()
    return 8 * (_xz_size(history + heldout.tobytes()) - _xz_size(history)) / len(heldout)


def _xz_size(data: bytes) -> int:
    # The dictionary must span the history and the held-out bytes.
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 2 * HISTORY}]
    return len(lzma.compress(data, format=lzma.FORMAT_RAW, filters=filters))
