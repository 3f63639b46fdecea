"""What to plan for a Gemma 2 size. Pass as --config=configs/plan.py:2b, :9b or :27b."""

import ml_collections


def get_config(size: str = "2b") -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.preset = f"gemma2_{size}"
    config.workdir = f"runs/plan-{size}"  # plan.json

    config.target = "v5e:16x16"  # or v5p:8x8x8, v6e:16x16, h200:8 and others
    config.program = "train"  # or forward
    config.tokens = 8192  # of the one sequence of each row of devices along data and fsdp

    config.mesh = "data=1,fsdp=16,tensor=16"
    config.save = "input"  # or block, which keeps less, or gate_up, which keeps more
    config.sequence_parallel = True  # False: outside of the feed-forward tensor does not split the length

    config.meshes = ()  # of --search; empty: all that divide the sizes
    return config
