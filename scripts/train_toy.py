"""Trains a small byte-level language model that is composed from Flax modules and gemma_mlp's MLPBlock.

    python scripts/train_toy.py                                           # on Python's documentation, about 2 minutes
    python scripts/train_toy.py --config.data=FILE_OR_FOLDER --config.workdir=runs/mine      # on your own text
    python scripts/train_toy.py --config.api=linen                        # in Linen instead of NNX
    python scripts/train_toy.py --config.mesh="fsdp=2,tensor=2"           # on a machine with four devices

It writes metrics.jsonl, TensorBoard events, loss.png, summary.json and checkpoints to config.workdir, which is
runs/train_toy-nnx by default. You can interrupt it at any time. The same command then continues from the last
checkpoint, and its numbers are exactly those of an uninterrupted run.

To train on several machines, start the same command once on each. All of them must see the same --config.workdir. In a
cluster that JAX knows, add --distributed. Otherwise tell each process the address of process 0, the number of processes
and its own number:

    python scripts/train_toy.py --config.mesh="fsdp=8" --coordinator_address=HOST:PORT --num_processes=2 --process_id=0

To fine-tune a finished run on another text, train LoRA adapters on top of it. Its weights are frozen, and with
--config.base_dtype=int4 rounded to few bits. Its folder is only read:

    python scripts/train_toy.py --config.lora_rank=8 --config.base=runs/mine --config.data=FILE --config.workdir=runs/2

--help lists all settings, which are in configs/train_toy.py. scripts/train_toy/README.md says more and has results.
"""

import cli
from absl import flags
from interruption import interruptible
from train_toy import checkpoints, processes
from train_toy.run import train
from train_toy.run_config import RunConfig

CONFIG = cli.config("train_toy", "It describes the text, the model and the training run.")
DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Join the other processes, which JAX finds in the cluster.")
ADDRESS = flags.DEFINE_string("coordinator_address", None, "The address HOST:PORT of process 0.")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "The number of processes of this run.", lower_bound=1)
PROCESS_ID = flags.DEFINE_integer("process_id", None, "The number of this process, counted from 0.", lower_bound=0)


def main():
    who = (ADDRESS.value, NUM_PROCESSES.value, PROCESS_ID.value)
    if DISTRIBUTED.value or any(value is not None for value in who):
        processes.join(*who)
    config = RunConfig(**CONFIG.value)
    with interruptible(lambda: saved(config)):
        summary = train(config)
    if processes.is_first():
        report(summary, config.workdir)


def saved(config):
    """What an interrupted run has saved, for people."""
    step = checkpoints.latest_step(config.workdir)
    if step is None:
        return f"{config.workdir} has no checkpoint yet, so the same command starts over."
    return (
        f"{config.workdir} holds the checkpoint of step {step} of {config.steps}. The same command continues from it."
    )


def report(summary, workdir):
    print(f"\nBits per byte of the held-out text ({summary['heldout_bytes']:,} bytes):")
    for name, key in (
        ("this model", "heldout_bits_per_byte"),
        ("its base, before fine-tuning", "heldout_bits_per_byte_before"),
        ("xz -9e after the training text", "xz_bits_per_byte"),
        ("unigram entropy", "unigram_bits_per_byte"),
    ):
        if key in summary:
            print(f"  {name:32}{summary[key]:.3f}")
    if "sample_before" in summary:
        print(f"\nBefore fine-tuning:\n\n{summary['sample_before']}\n\nAfter:")
    print(f"\n{summary['sample']}\n\n{summary['seconds']:.0f} s. Written to {workdir}: metrics.jsonl,")
    print("TensorBoard events, loss.png, summary.json, checkpoints.")


if __name__ == "__main__":
    cli.run(main)
