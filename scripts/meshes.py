"""Reads meshes that are given as text, such as "data=1,fsdp=2,tensor=4"."""

from gemma_mlp.checks import require

AXES = ("data", "fsdp", "tensor")


def parse(text: str) -> tuple[int, int, int]:
    """The sizes of data, fsdp and tensor. A size that the text leaves out is 1.

    Raises:
      ValueError: if the text does not have this form.
    """
    parts = [part.partition("=") for part in text.split(",")]
    sizes = {name.strip(): int(size) for name, _, size in parts if size.strip().isdecimal()}
    require(
        len(sizes) == len(parts) and set(sizes) <= set(AXES) and all(sizes.values()),
        "A mesh must have the form data=1,fsdp=2,tensor=4.",
        repr(text),
        f"give one or more of {', '.join(AXES)} a size of at least 1.",
    )
    data, fsdp, tensor = (sizes.get(axis, 1) for axis in AXES)
    return data, fsdp, tensor
