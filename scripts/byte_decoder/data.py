"""The text: a corpus whose end is held out, training batches in a seeded order, and evaluation windows."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics

import grain
import numpy as np

from gemma_mlp.checks import require

VERSION_CONTROL = ("CVS", "_darcs")  # such folders that are not hidden, as .git and .hg are


@dataclass(frozen=True)
class Corpus:
    """A text as uint8 arrays: `train` is learned from, and `heldout`, which follows it, is only scored.

    `about` says for people what was read, and what was left out.
    """

    train: np.ndarray
    heldout: np.ndarray
    about: str = ""

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.train.tobytes() + self.heldout.tobytes()).hexdigest()


def load_corpus(source: str, heldout_fraction: float, heldout_max_bytes: int, workdir: Path | None = None) -> Corpus:
    """Reads `source` and holds out its end.

    Args:
      source: a file, or a folder whose text files are read in the order of their names. If it is empty, the text is
        Python's own documentation of the language.
      heldout_fraction: the share of the bytes to hold out.
      heldout_max_bytes: the largest number of bytes to hold out.
      workdir: the folder of the run. What it holds is not part of the text that is read from a folder.

    Raises:
      FileNotFoundError: if there is no such file or folder.
      ValueError: if the training text or the held-out text would be empty, or the text is to be read from `workdir`.
    """
    content, about = _read(Path(source), workdir) if source else (python_documentation(), "Python's documentation")
    about = f"{about}, {len(content):,} bytes"
    text = np.frombuffer(content, np.uint8)
    heldout = min(int(len(text) * heldout_fraction), heldout_max_bytes)
    require(
        0 < heldout < len(text),
        "Training and held-out text must both have at least one byte.",
        f"{about}, of which {heldout} are to be held out",
        "give a longer text or another heldout_fraction.",
    )
    return Corpus(train=text[:-heldout], heldout=text[-heldout:], about=about)


def python_documentation() -> bytes:
    """The English prose in CPython's own pydoc_data/topics.py, each paragraph once.

    The topics repeat whole sections, about a fifth of the text. Repeats would put training text into the held-out end.
    """
    paragraphs = (part for name in sorted(topics.topics) for part in topics.topics[name].split("\n\n"))
    return "\n\n".join(dict.fromkeys(part.strip("\n") for part in paragraphs)).encode()


def _read(path: Path, workdir: Path | None) -> tuple[bytes, str]:
    """The text in a file or a folder, and what was read in words."""
    if path.is_file():
        return path.read_bytes(), str(path)
    if not path.is_dir():
        raise FileNotFoundError(f"config.data must be a file or a folder. Got: {str(path)!r}. Fix: check the path.")
    own = workdir and workdir.resolve()
    require(
        path.resolve() != own,
        "config.workdir must not be config.data, since the run writes into it.",
        repr(str(path)),
        "choose another folder with --config.workdir, which may lie in config.data.",
    )
    texts = [file.read_bytes() for file in _visible_files(path, own)]
    chosen = [text for text in texts if b"\0" not in text]
    about = f"{len(chosen):,} files of {path} (left out: {len(texts) - len(chosen):,} binary files, hidden files, "
    return b"\n\n".join(chosen), about + "folders of version control and the workdir)"


def _visible_files(folder: Path, leave_out: Path | None) -> list[Path]:
    """The files in `folder` and its folders, without what is in `leave_out`, hidden, or of version control."""

    def visible(name):
        return not name.startswith(".") and name not in VERSION_CONTROL

    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if visible(name) and Path(parent, name).resolve() != leave_out]
        found += [Path(parent, name) for name in files if visible(name)]
    return sorted(file for file in found if file.is_file())


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
