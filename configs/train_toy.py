"""The default of scripts/train_toy.py: a byte-level decoder that is small enough for the CPU of a laptop.

Set any field on the command line, for example --config.steps=3000.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.api = "nnx"  # or "linen": the Flax API that the model is composed in
    config.workdir = "runs/tiny-" + config.get_ref("api")  # the run's files; an interrupted run continues from them
    config.seed = 0  # it draws the initial weights, the order of the data and the sample

    config.data = ""  # a text file or a folder of them; empty: the prose of Python's pydoc_data/topics.py
    config.heldout_fraction = 0.1  # this share of the text, at its end, is only evaluated on
    config.heldout_max_bytes = 100_000  # but at most so many bytes

    config.embed_dim = 128
    config.hidden_dim = 512
    config.num_layers = 4
    config.num_heads = 4
    config.activation = "gelu_tanh"
    config.dtype = "float32"  # the compute dtype; CPUs are fastest in float32
    config.save = "gate_up"  # saved for the backward pass: at this size there is memory enough

    config.mesh = ""  # "data=1,fsdp=2,tensor=2" uses four devices; a run may continue on another mesh

    config.seq_len = 128
    config.batch_size = 8
    config.steps = 1000
    config.learning_rate = 4e-3  # the peak, between a linear warm-up and a cosine decay to zero
    config.warmup_fraction = 0.1  # this share of the steps is the warm-up
    config.weight_decay = 0.1

    config.log_every = 10  # steps, as in the two lines below
    config.eval_every = 250
    config.checkpoint_every = 250
    config.sample_bytes = 400  # the length of the text that the trained model writes
    config.prompt = ""  # the text that the sample continues; empty: the end of the training text
    config.check_values = False  # True: assert in every step that all values are finite; slower
    return config
