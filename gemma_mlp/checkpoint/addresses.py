"""Where a checkpoint is: on this disk, in a bucket, or at a place that cannot be read, which is then refused."""

import os
import re
from pathlib import Path

from etils import epath

from gemma_mlp.checks import require

URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+(.*)")  # also of a pathlib.Path, which makes one slash out of two
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
HUB = "download it first: hf download {} --local-dir FOLDER"
WAYS_OUT = {  # by the scheme of a URL
    "gs": "download it first: gcloud storage cp --recursive gs://{} FOLDER",
    "s3": "download it first: aws s3 cp --recursive s3://{} FOLDER",
    "hf": HUB,
    "file": "give the path itself: /{}",
}


def local_folder(address: str | Path, *, new: bool = False) -> Path:
    """The folder at an address, with `~` expanded. Raises ValueError for a URL.

    Unless it is `new`, what looks like a model's name on the Hugging Face hub, and is no folder here, is refused too.
    """
    text = os.fspath(address)
    rule = "A Hugging Face folder must be a folder on this disk."
    if url := URL.fullmatch(text):
        scheme, rest = url.groups()
        if hub := re.match(r"(?:huggingface\.co|hf\.co)/([^/]+/[^/]+)", rest):
            scheme, rest = "hf", hub[1]
        fix = WAYS_OUT.get(scheme, "download it to a folder first").format(rest)
        if new and scheme != "file":
            fix = "write to a folder on this disk, and copy that"
        raise ValueError(f"{rule} Got: {text!r}, a URL. Fix: {fix}.")
    folder = Path(text).expanduser()
    may_be_a_name = not new and not folder.exists() and HUB_NAME.fullmatch(text)
    fix = f"if it is a model's name on the hub, {HUB.format(text)}."
    require(not may_be_a_name, rule, f"{text!r}, which is not there", fix)
    return folder


def orbax_path(address: str | Path) -> epath.Path:
    """The absolute path at an address, with `~` expanded, or a gs:// URL. Raises ValueError for any other URL."""
    text = os.fspath(address)
    if text.startswith("gs://"):
        return epath.Path(text)
    require(
        not URL.fullmatch(text),
        "An Orbax checkpoint must be a path on this disk, or a gs:// URL as a string. Orbax reads no other URL.",
        repr(address),
        "copy it to this disk first; pathlib.Path breaks URLs.",
    )
    return epath.Path(Path(text).expanduser().absolute())
