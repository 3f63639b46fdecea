"""Settings of scripts/compare_activations.py, the study of gates and activations, for two CPU cores.

--config=configs/compare_activations.py:smoke runs the whole study in a minute, at sizes too small to tell anything.
"""

import ml_collections

from gemma_mlp.checks import require

SIZES = ("default", "smoke")


def get_config(size: str = "default") -> ml_collections.ConfigDict:
    require(
        size in SIZES,
        f"The size must be one of {', '.join(SIZES)}.",
        repr(size),
        "use one of these names.",
    )
    config = ml_collections.ConfigDict()
    config.workdir = f"runs/compare_activations-{size}"  # receives all files; a study continues from it
    config.sections = ("heldout", "gradient_flow", "expressiveness", "curvature", "approximation")
    config.contestants = (
        "geglu_tanh", "geglu_erf", "swiglu", "reglu", "glu", "bilinear", "gelu", "silu", "relu",
    )  # fmt: skip
    config.factorial = ("geglu_tanh", "reglu", "gelu", "relu")  # with or without a gate, smooth or kinked
    config.seeds = tuple(range(6))  # these compare the contestants
    config.tuning_seeds = (100, 101)  # these choose each contestant's learning rate

    # The text is that of configs/train_toy.py, and the model is smaller. Without a gate hidden_dim is 3/2 as large.
    config.data = ""
    config.heldout_fraction = 0.1
    config.heldout_max_bytes = 100_000
    config.embed_dim = 48
    config.hidden_dim = 192
    config.num_layers = 2
    config.num_heads = 2
    config.seq_len = 64
    config.batch_size = 8
    config.steps = 200
    config.learning_rates = (4e-3, 8e-3, 1.6e-2, 3.2e-2)
    config.warmup_fraction = 0.1
    config.weight_decay = 0.1

    flow = config.gradient_flow = ml_collections.ConfigDict()
    flow.embed_dim = 32
    flow.hidden_dim = 128
    flow.depths = (4, 16, 64)
    flow.seeds = tuple(range(5))
    flow.at = (10, 30)  # measure after these steps, and at the start
    flow.learning_rate = 2e-3
    flow.seq_len = 32
    flow.batch_size = 4

    fit = config.expressiveness = ml_collections.ConfigDict()
    fit.embed_dim = 16
    fit.hidden_dim = 64
    fit.steps = 600
    fit.batch_size = 256
    fit.learning_rates = (3e-2, 1e-1, 3e-1)
    fit.warmup_fraction = 0.1

    curvature = config.curvature = ml_collections.ConfigDict()
    curvature.seeds = tuple(range(5))
    curvature.learning_rate = 8e-3
    curvature.at = (10, 50, 100, 180)  # measure after these steps
    curvature.iterations = 10  # iterations of Lanczos' method
    curvature.batch_size = 8

    approximation = config.approximation = ml_collections.ConfigDict()
    approximation.presets = ("gemma2_2b", "gemma2_9b", "gemma2_27b")
    approximation.tokens = 16
    approximation.learning_rate = 8e-3

    if size == "smoke":
        shrink(config)
    return config


def shrink(config):
    config.contestants = ("geglu_tanh", "gelu")
    config.factorial = ("geglu_tanh",)
    config.seeds, config.tuning_seeds = (0, 1), (100,)
    config.embed_dim, config.hidden_dim, config.num_layers = 16, 32, 1
    config.seq_len, config.batch_size, config.steps = 16, 4, 20
    config.heldout_max_bytes = 2000
    config.learning_rates = (1e-2, 3e-2)
    config.gradient_flow.update(embed_dim=8, hidden_dim=16, depths=(2,), seeds=(0, 1), at=(4,), seq_len=8)
    config.expressiveness.update(embed_dim=4, hidden_dim=16, steps=20, batch_size=32, learning_rates=(1e-2, 3e-2))
    config.curvature.update(seeds=(0, 1), at=(5, 15), iterations=4, batch_size=4)
    config.approximation.update(presets=("gemma3_270m",), tokens=2)
