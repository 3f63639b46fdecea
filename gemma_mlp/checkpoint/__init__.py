"""Reads and writes the block's parameters: Hugging Face folders, Orbax checkpoints in any layout, GGUF, PEFT adapters.

It never opens a pickle. It needs the `checkpoint` extra.
"""

from gemma_mlp.checkpoint.config_json import Model as Model
from gemma_mlp.checkpoint.config_json import read_config as read_config
from gemma_mlp.checkpoint.config_json import read_configs as read_configs
from gemma_mlp.checkpoint.gguf_file import read_gguf as read_gguf
from gemma_mlp.checkpoint.gguf_file import read_gguf_config as read_gguf_config
from gemma_mlp.checkpoint.huggingface import huggingface_shapes as huggingface_shapes
from gemma_mlp.checkpoint.huggingface import read_huggingface as read_huggingface
from gemma_mlp.checkpoint.huggingface import update_huggingface as update_huggingface
from gemma_mlp.checkpoint.huggingface import write_huggingface as write_huggingface
from gemma_mlp.checkpoint.orbax import orbax_shapes as orbax_shapes
from gemma_mlp.checkpoint.orbax import read_orbax as read_orbax
from gemma_mlp.checkpoint.orbax import read_orbax_adapters as read_orbax_adapters
from gemma_mlp.checkpoint.orbax import write_orbax as write_orbax
from gemma_mlp.checkpoint.orbax import write_orbax_adapters as write_orbax_adapters
from gemma_mlp.checkpoint.peft_adapters import read_adapters as read_adapters
from gemma_mlp.checkpoint.peft_adapters import write_adapters as write_adapters
