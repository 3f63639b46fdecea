"""What to plan for a Gemma 2 size. Use it as --config=configs/plan.py:2b, :9b or :27b."""

import ml_collections


def get_config(size: str = "2b") -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.preset = f"gemma2_{size}"
    config.workdir = f"runs/plan-{size}"  # receives plan.json

    config.target = "v5e:16x16"  # the chips; others are v5p:8x8x8, v6e:16x16 and h200:8
    config.program = "train"  # or forward
    config.tokens = 8192  # the length of a sequence; there is one for each of data x fsdp

    config.mesh = "data=1,fsdp=16,tensor=16"
    config.save = "input"  # block saves less for the backward pass, gate_up saves more
    config.sequence_parallel = True  # whether tensor splits the residual stream's length outside of the feed-forward

    config.meshes = ()  # what --search tries; () means all meshes that divide the sizes
    return config
