"""Settings of scripts/plan.py. --config=configs/plan.py:2b, :9b or :27b chooses the size of Gemma 2."""

import ml_collections


def get_config(size: str = "2b") -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.preset = f"gemma2_{size}"  # the model: gemma1_*, gemma2_* or gemma3_*
    config.workdir = f"runs/plan-{size}"  # receives plan.json

    config.target = "v5e:16x16"  # the chips; other targets are v5p:8x8x8, v6e:16x16, tpu7x:2x2x1 and h200:8
    config.program = "train"  # or forward
    config.tokens = 8192  # the length of a sequence; a batch has data x fsdp sequences

    config.mesh = "data=1,fsdp=16,tensor=16"  # how many ways each axis splits the work
    config.save = "input"  # block saves less for the backward pass, gate_up saves more
    config.sequence_parallel = True  # whether tensor shards the residual stream's length outside of the feed-forward

    config.meshes = ()  # the meshes that --search tries; () means all that divide the sizes
    return config
