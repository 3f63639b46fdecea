"""The text: a corpus whose end is held out, training batches in a seeded order, and evaluation windows."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics

import grain
import numpy as np

from gemma_mlp.checks import require


@dataclass(frozen=True)
class Corpus:
    """A text as uint8 arrays: `train` is learned from, and `heldout`, which follows it, is only scored."""

    train: np.ndarray
    heldout: np.ndarray

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.train.tobytes() + self.heldout.tobytes()).hexdigest()


def load_corpus(source: str, heldout_fraction: float, heldout_max_bytes: int) -> Corpus:
    """Reads `source` and holds out its end.

    Args:
      source: a file, or a folder whose files are read in the order of their names. If it is empty, the text is
        Python's own documentation of the language.
      heldout_fraction: the share of the bytes to hold out.
      heldout_max_bytes: the largest number of bytes to hold out.

    Raises:
      FileNotFoundError: if there is no such file or folder.
      ValueError: if the training text or the held-out text would be empty.
    """
    text = np.frombuffer(_read(Path(source)) if source else python_documentation(), np.uint8)
    heldout = min(int(len(text) * heldout_fraction), heldout_max_bytes)
    require(
        0 < heldout < len(text),
        "Training and held-out text must both have at least one byte.",
        f"{len(text)} bytes in {source!r}, of which {heldout} are to be held out",
        "give a longer text or another heldout_fraction.",
    )
    return Corpus(train=text[:-heldout], heldout=text[-heldout:])


def python_documentation() -> bytes:
    """The English prose in CPython's own pydoc_data/topics.py, each paragraph once.

    The topics repeat whole sections, about a fifth of the text. Repeats would put training text into the held-out end.
    """
    paragraphs = (part for name in sorted(topics.topics) for part in topics.topics[name].split("\n\n"))
    return "\n\n".join(dict.fromkeys(part.strip("\n") for part in paragraphs)).encode()


def _read(path: Path) -> bytes:
    if path.is_file():
        return path.read_bytes()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
        return b"\n\n".join(file.read_bytes() for file in files)
    raise FileNotFoundError(f"config.data must be a file or a folder. Got: {str(path)!r}. Fix: check the path.")


def training_windows(train: np.ndarray, seq_len: int, seed: int) -> grain.MapDataset:
    """An endless dataset of windows [seq_len + 1]: the first seq_len bytes are the input, the last seq_len the targets.

    Windows start at any byte, in an order that `seed` draws. Within an epoch no two start at the same byte.
    """
    require(
        len(train) > seq_len,
        "The training text must be longer than one window.",
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

    Each window starts half a window after the one before. So the model predicts every byte from at least half a window
    of the text before it. For the first held-out bytes that text is the end of the training text.
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
