"""Trains a small byte-level language model, composed from Flax modules and gemma_mlp's MLPBlock.

    python scripts/train_toy.py                                            # Python's documentation, about 2 minutes
    python scripts/train_toy.py --config.data=FILE_OR_FOLDER --config.workdir=runs/mine
    python scripts/train_toy.py --config.api=linen
    python scripts/train_toy.py --config.mesh="fsdp=2,tensor=2"            # of the four devices there are

Interrupt it at any time; the same command continues from the last checkpoint. On several machines, which see one
workdir, start it once on each with `--distributed`; where JAX does not know the cluster, say who is who:

    python scripts/train_toy.py --config.mesh="fsdp=8" --coordinator_address=HOST:PORT --num_processes=2 --process_id=0
"""

import cli
from absl import flags
from train_toy import parallel
from train_toy.run_config import RunConfig
from train_toy.training import train

CONFIG = cli.config("train_toy", "The run.")
DISTRIBUTED = flags.DEFINE_bool("distributed", False, "One of several processes, as JAX finds them in the cluster.")
ADDRESS = flags.DEFINE_string("coordinator_address", None, "HOST:PORT at which process 0 is reached by the others.")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes there are.", lower_bound=1)
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.", lower_bound=0)


def main():
    who = (ADDRESS.value, NUM_PROCESSES.value, PROCESS_ID.value)
    if DISTRIBUTED.value or any(part is not None for part in who):
        parallel.join(*who)
    config = RunConfig(**CONFIG.value)
    summary = train(config)
    if not parallel.is_first():
        return
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
    cli.run(main)
