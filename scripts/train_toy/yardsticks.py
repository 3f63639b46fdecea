"""What a language model's bits per byte have to beat, computed on the same held-out bytes."""

import lzma

import numpy as np

MIB = 2**20
HISTORY = 64 * MIB  # the dictionary of xz's preset 9: nothing further back is ever looked at


def unigram_bits_per_byte(heldout: np.ndarray) -> float:
    """The entropy of the held-out bytes' own frequencies: the best that any model without context can do."""
    share = np.bincount(heldout, minlength=256) / len(heldout)
    share = share[share > 0]
    return float(-(share * np.log2(share)).sum())


def xz_bits_per_byte(train: np.ndarray, heldout: np.ndarray) -> float:
    """What `xz -9e` adds to the compressed training text for the held-out bytes that follow it."""
    history = train[-HISTORY:].tobytes()
    return 8 * (_xz_size(history + heldout.tobytes()) - _xz_size(history)) / len(heldout)


def _xz_size(data: bytes) -> int:
    # The dictionary has to span the held-out bytes as well as the history.
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 2 * HISTORY}]
    return len(lzma.compress(data, format=lzma.FORMAT_RAW, filters=filters))
