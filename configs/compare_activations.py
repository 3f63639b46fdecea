"""Settings of scripts/compare_activations.py, the study of gates and activations, for two CPU cores.

--config=configs/compare_activations.py:smoke runs the whole study in a minute, at sizes too small to tell anything.
"""

import ml_collections

from gemma_mlp.checks import require_choice

SIZES = ("default", "smoke")


def get_config(size: str = "default") -> ml_collections.ConfigDict:
    require_choice("The size", size, SIZES)
    config = ml_collections.ConfigDict()
    config.workdir = f"runs/compare_activations-{size}"  # receives all files; a study continues from it
    config.sections = ("heldout", "gradient_flow", "expressiveness", "curvature", "approximation")  # what is measured
    config.contestants = (  # the feed-forwards that are compared
        "geglu_tanh", "geglu_erf", "swiglu", "reglu", "glu", "bilinear", "gelu", "silu", "relu",
    )  # fmt: skip
    config.factorial = ("geglu_tanh", "reglu", "gelu", "relu")  # with or without a gate, smooth or kinked
    config.seeds = tuple(range(6))  # these compare the contestants
    config.tuning_seeds = (100, 101)  # these choose each contestant's learning rate

    # The text is that of configs/train_toy.py, and the model is smaller.
    config.data = ""  # a text file or a folder of them; empty means the documentation in Python's pydoc_data/topics.py
    config.heldout_fraction = 0.1  # the share of the text, at its end, that is not trained on
    config.heldout_max_bytes = 100_000  # at most so many bytes are held out
    config.embed_dim = 48  # the width of the residual stream
    config.hidden_dim = 192  # the width of one branch with a gate; without a gate it is 3/2 as large
    config.num_layers = 2  # the number of layers
    config.num_heads = 2  # the number of attention heads in a layer
    config.seq_len = 64  # the length in bytes of what the model sees at once
    config.batch_size = 8  # the number of sequences in a step
    config.steps = 200  # the number of training steps
    config.learning_rates = (4e-3, 8e-3, 1.6e-2, 3.2e-2)  # the peaks to choose from
    config.warmup_fraction = 0.1  # the share of the steps that are the warm-up
    config.weight_decay = 0.1  # AdamW's, of the matrices

    config.gradient_flow = ml_collections.ConfigDict()
    config.gradient_flow.embed_dim = 32  # the width of a stack of feed-forwards
    config.gradient_flow.hidden_dim = 128  # the width of one branch
    config.gradient_flow.depths = (4, 16, 64)  # the numbers of layers
    config.gradient_flow.seeds = tuple(range(5))  # draw the initial weights and the order of the data
    config.gradient_flow.at = (10, 30)  # measure after these steps, and at the start
    config.gradient_flow.learning_rate = 2e-3  # the peak
    config.gradient_flow.seq_len = 32  # the length in bytes of a sequence
    config.gradient_flow.batch_size = 4  # the number of sequences in a step

    config.expressiveness = ml_collections.ConfigDict()
    config.expressiveness.embed_dim = 16  # the number of inputs, one of which is a constant
    config.expressiveness.hidden_dim = 64  # the width of one branch
    config.expressiveness.steps = 600  # the number of training steps of a fit
    config.expressiveness.batch_size = 256  # the number of points in a step
    config.expressiveness.learning_rates = (3e-2, 1e-1, 3e-1)  # the peaks to choose from
    config.expressiveness.warmup_fraction = 0.1  # the share of the steps that are the warm-up

    config.curvature = ml_collections.ConfigDict()
    config.curvature.seeds = tuple(range(5))  # draw the initial weights and the order of the data
    config.curvature.learning_rate = 8e-3  # the peak
    config.curvature.at = (10, 50, 100, 180)  # measure after these steps
    config.curvature.iterations = 10  # iterations of Lanczos' method
    config.curvature.batch_size = 8  # the number of windows on which curvature is measured

    config.approximation = ml_collections.ConfigDict()
    config.approximation.presets = ("gemma2_2b", "gemma2_9b", "gemma2_27b")  # the sizes of the layers
    config.approximation.tokens = 16  # how many tokens a layer gets
    config.approximation.learning_rate = 8e-3  # the peak, of the model that is evaluated with the other form

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
