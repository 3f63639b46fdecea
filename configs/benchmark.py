"""What to measure of a Gemma 2 size. Pass as --config=configs/benchmark.py:2b, :9b or :27b."""

import ml_collections


def get_config(size: str = "2b") -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.preset = f"gemma2_{size}"
    config.workdir = f"runs/benchmark-{size}"  # benchmark.json, benchmark.png
    config.sections = ("time", "accuracy", "memory")

    config.dtypes = ("bfloat16", "float32")
    config.tokens = (1, 2, 16, 128, 256, 512, 2048)
    config.rounds = 7  # of which each figure is the median; the contestants take turns in each

    config.accuracy_tokens = (64, 2048)

    config.memory_tokens = 8192
    config.layers = 4  # of a scanned and of an unrolled stack
    config.chunk_size = 1024  # of the rows that are chunked
    return config
