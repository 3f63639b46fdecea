"""Bytes to learn from: a corpus with a held-out end, seekable training batches, evaluation windows."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics

import grain
import numpy as np

from gemma_mlp.checks import require


@dataclass(frozen=True)
class Corpus:
    """uint8 text: what is trained on, and what comes after it and is not."""

    train: np.ndarray
    heldout: np.ndarray

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.train.tobytes() + self.heldout.tobytes()).hexdigest()


def load_corpus(source: str, heldout_fraction: float, heldout_max_bytes: int) -> Corpus:
    """Reads `source` and holds out its end.

    Args:
      source: a file, or a folder whose files are read in the order of their names; empty: Python's own
        documentation topics.
      heldout_fraction: the share of the bytes to hold out.
      heldout_max_bytes: the most bytes to hold out.

    Raises:
      FileNotFoundError: if there is no such file or folder.
      ValueError: if either part would be empty.
    """
    text = np.frombuffer(_read(Path(source)) if source else python_documentation(), np.uint8)
    heldout = min(int(len(text) * heldout_fraction), heldout_max_bytes)
    require(
        0 < heldout < len(text),
        "Training and held-out text both need bytes.",
        f"{len(text)} bytes in {source!r}, of which {heldout} are to be held out",
        "give a longer text or another heldout_fraction.",
    )
    return Corpus(train=text[:-heldout], heldout=text[-heldout:])


def python_documentation() -> bytes:
    """The English prose that every CPython carries, each paragraph once.

    The topics repeat whole sections (about a fifth of the text), which would put training text into the held-out end.
    """
    paragraphs = (part for name in sorted(topics.topics) for part in topics.topics[name].split("\n\n"))
    return "\n\n".join(dict.fromkeys(part.strip("\n") for part in paragraphs)).encode()


def _read(path: Path) -> bytes:
    if path.is_file():
        return path.read_bytes()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
        return b"\n\n".join(file.read_bytes() for file in files)
    raise FileNotFoundError(f"config.data is a file or a folder. Received: {str(path)!r}. Fix: check the path.")


def training_windows(train: np.ndarray, seq_len: int, seed: int) -> grain.MapDataset:
    """An endless dataset of windows [seq_len + 1]: inputs and targets. Batch i is elements i * batch_size and after.

    Windows start anywhere; within an epoch no two start at the same byte.
    """
    require(
        len(train) > seq_len,
        "The training text is longer than one window.",
        f"{len(train)} bytes, seq_len {seq_len}",
        "give a longer text or a smaller seq_len.",
    )
    windows = grain.MapDataset.range(len(train) - seq_len)
    windows = windows.shuffle(seed=seed).map(lambda start: train[start : start + seq_len + 1])
    return windows.repeat()


def training_batches(train: np.ndarray, seq_len: int, batch_size: int, seed: int) -> grain.MapDataset:
    """:func:`training_windows` as an endless dataset of batches [batch_size, seq_len + 1]."""
    return training_windows(train, seq_len, seed).batch(batch_size)


def evaluation_windows(corpus: Corpus, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Windows [N, seq_len + 1] and a mask [N, seq_len] that scores every held-out byte exactly once.

    Each window moves on by half a window, so that every byte is predicted from at least half a window of what stands
    before it, the end of the training text included.
    """
    stride = max(seq_len // 2, 1)
    context = seq_len + 1 - stride
    count = -(-len(corpus.heldout) // stride)
    padding = np.zeros(count * stride - len(corpus.heldout), np.uint8)
    history = np.concatenate([np.zeros(context, np.uint8), corpus.train])[-context:]
    text = np.concatenate([history, corpus.heldout, padding])
    windows = np.lib.stride_tricks.sliding_window_view(text, seq_len + 1)[::stride]
    scored = np.zeros((count, seq_len), bool)
    scored[:, -stride:] = True
    scored[-1, seq_len - len(padding) :] = False
    return windows, scored
