"""Settings of scripts/benchmark.py. --config=configs/benchmark.py:2b, :9b or :27b chooses the size of Gemma 2."""

import ml_collections


def get_config(size: str = "2b") -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.preset = f"gemma2_{size}"  # whose layer is measured
    config.workdir = f"runs/benchmark-{size}"  # receives benchmark.json and benchmark.png
    config.sections = ("time", "calls", "accuracy", "memory", "low_bit")  # what is measured

    # time
    config.dtypes = ("bfloat16", "float32")  # time: of the weights and the arithmetic
    config.tokens = (1, 2, 16, 128, 256, 512, 2048)  # time: how many tokens a call has
    config.rounds = 7  # each time is the median of these rounds, in which the contestants take turns

    # calls
    config.call_layers = 26  # calls: the number of unrolled layers that are lowered and compiled

    # accuracy
    config.accuracy_tokens = (64, 2048)  # accuracy: how many tokens a call has

    # memory
    config.memory_tokens = 8192  # memory, low_bit: how many tokens the gradient of a stack has
    config.layers = 4  # memory, low_bit: the number of layers in a stack
    config.chunk_size = 1024  # memory: the chunk_size of the rows that are computed in chunks

    # low_bit
    config.low_bit_tokens = (1, 16)  # low_bit: how many tokens the forward pass has
    config.adapter_tokens = 256  # low_bit: how many tokens the gradients that are timed have
    return config
