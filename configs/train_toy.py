"""The toy run: a byte-level decoder small enough for a laptop's CPU. Pass as --config=configs/train_toy.py."""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.api = "nnx"  # or "linen": which of the two shells the model is composed from
    config.workdir = "runs/tiny-" + config.get_ref("api")  # checkpoints, metrics, plot; a run continues from here
    config.seed = 0

    config.data = ""  # a text file or a folder of them; empty: the prose of this Python's pydoc_data/topics.py
    config.heldout_fraction = 0.1  # the end of the text
    config.heldout_max_bytes = 100_000

    config.embed_dim = 128
    config.hidden_dim = 512
    config.num_layers = 4
    config.num_heads = 4
    config.activation = "gelu_tanh"
    config.dtype = "float32"  # of the products; what CPUs are best at
    config.save = "gate_up"  # memory is no concern at this size, so keep gate and up for the backward pass

    config.mesh = ""  # "data=1,fsdp=2,tensor=2" spreads the run over four devices; a run may go on on another mesh

    config.seq_len = 128
    config.batch_size = 8
    config.steps = 1000
    config.learning_rate = 4e-3  # the peak, after a warm-up and before a cosine decay to nothing
    config.warmup_fraction = 0.1
    config.weight_decay = 0.1

    config.log_every = 10
    config.eval_every = 250
    config.checkpoint_every = 250
    config.sample_bytes = 400
    config.prompt = ""  # what the sample continues; empty: the end of the training text
    config.check_values = False  # True: assert in every step that all values are finite, at some cost
    return config
