"""The default of scripts/train_toy.py: a byte-level decoder that is small enough for the CPU of a laptop.

Set any field on the command line, for example --config.steps=3000. `--help` shows the comment next to each field.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.api = "nnx"  # or "linen": the Flax API of the model
    config.workdir = "runs/train_toy-" + config.get_ref("api")  # receives all files; a run continues from it
    config.seed = 0  # draws the initial weights, the order of the data and the sample

    config.data = ""  # a text file or a folder of them; empty means the documentation in Python's pydoc_data/topics.py
    config.heldout_fraction = 0.1  # the share of the text, at its end, that is not trained on
    config.heldout_max_bytes = 100_000  # at most so many bytes are held out

    config.embed_dim = 128  # the width of the residual stream, a multiple of 2 * num_heads
    config.hidden_dim = 512  # the width of one branch of the feed-forward
    config.num_layers = 4  # the number of layers, each with attention and a feed-forward block
    config.num_heads = 4  # the number of attention heads in a layer
    config.activation = "gelu_tanh"  # of the gate; or gelu, silu, relu, sigmoid, identity
    config.dtype = "float32"  # the compute dtype; CPUs are fastest in float32
    config.save = "gate_up"  # what is saved for the backward pass; gate_up takes more memory and less time than input

    config.mesh = ""  # empty means one device; "data=1,fsdp=2,tensor=2" means four; a run may continue on another mesh

    config.seq_len = 128  # the length in bytes of what the model sees at once
    config.batch_size = 8  # the number of sequences in a step
    config.steps = 1000  # the number of training steps
    config.learning_rate = 4e-3  # the peak; it follows a linear warm-up and precedes a cosine decay to zero
    config.warmup_fraction = 0.1  # the share of the steps that are the warm-up
    config.weight_decay = 0.1  # how strongly AdamW draws the matrices towards zero

    config.log_every = 10  # the number of steps whose losses are logged together
    config.eval_every = 250  # the held-out text is scored after so many steps
    config.checkpoint_every = 250  # a checkpoint is written after so many steps
    config.sample_bytes = 400  # the length of the text that the trained model writes
    config.prompt = ""  # the text that the sample continues; empty means the end of the training text
    config.check_values = False  # whether to check in every step that all values are finite, which is slower

    # Fine-tuning: only LoRA adapters of the feed-forwards are trained, on top of a finished run, which stays as it is.
    config.lora_rank = 0  # the rank of the adapters; 0 trains all parameters of a new model, without a base
    config.lora_alpha = 0.0  # the adapters' product is multiplied by lora_alpha / lora_rank; 0 means by 1
    config.base = ""  # the workdir of the finished run
    config.base_dtype = ""  # "int8" or "int4" round the base's feed-forward weights to few bits; empty rounds nothing
    config.base_group_size = 0  # how many weights share a scale, such as 32; 0 means those of an output channel
    return config
