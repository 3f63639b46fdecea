"""Trains a small byte-level language model, composed from Flax modules and gemma_mlp's MLPBlock.

    python scripts/train_toy.py                                            # Python's documentation, about 2 minutes
    python scripts/train_toy.py --config.data=FILE_OR_FOLDER --config.workdir=runs/mine
    python scripts/train_toy.py --config.api=linen

Interrupt it at any time; the same command continues from the last checkpoint.
"""

from pathlib import Path

from absl import app, logging
from ml_collections import config_flags
from toy.run_config import RunConfig
from toy.training import train

CONFIG = config_flags.DEFINE_config_file(
    "config",
    str(Path(__file__).parents[1] / "configs" / "tiny.py"),
    "The run; override any field with --config.FIELD=VALUE.",
)


def main(argv):
    logging.set_verbosity(logging.WARNING)  # JAX and Orbax tell of much at INFO
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {argv[1:]}")
    config = RunConfig(**CONFIG.value)
    summary = train(config)
    print(f"\nHeld-out text, {summary['heldout_bytes']:,} bytes, in bits per byte:")
    for name, key in (
        ("this model", "heldout"),
        ("xz -9e after the training text", "xz"),
        ("unigram entropy", "unigram"),
    ):
        print(f"  {name:32}{summary[f'{key}_bits_per_byte']:.3f}")
    print(
        f"\n{summary['sample']}\n\n{summary['seconds']:.0f} s. In {config.workdir}: metrics.jsonl, TensorBoard events,"
    )
    print("loss.png, summary.json, checkpoints.")


if __name__ == "__main__":
    app.run(main)
