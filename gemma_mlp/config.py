"""The configuration of one Gemma feed-forward block, and the published sizes by name."""

import dataclasses
import math
import types
from typing import Any, Literal, get_args

from gemma_mlp.activations import ACTIVATIONS, Activation
from gemma_mlp.checks import positive_int, require, require_choice
from gemma_mlp.dtypes import dtype_name
from gemma_mlp.mesh import Rules, checked_rules
from gemma_mlp.weights import WEIGHT_DTYPES, WEIGHTS, WeightDtype

Save = Literal["input", "gate_up", "autodiff"]
Implementation = Literal["xla", "pallas"]


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Low-rank adapters (arXiv:2106.09685): W + factor * lora_a [in, rank] @ lora_b [rank, out].

    Attributes:
      rank: the width of the two matrices.
      alpha: factor = alpha / rank. None: the rank, so that the factor is 1.
      use_rslora: factor = alpha / sqrt(rank) instead (rsLoRA, arXiv:2312.03732).
      projections: which weights get an adapter.

    Raises:
      ValueError: at construction, for any other value.
    """

    rank: int
    alpha: float | None = None
    use_rslora: bool = False
    projections: tuple[str, ...] = WEIGHTS

    def __post_init__(self):
        object.__setattr__(self, "rank", positive_int("rank", self.rank))
        valid = self.alpha is None or _is_real(self.alpha)
        require(valid, "alpha must be a finite number or None.", repr(self.alpha), "the factor is alpha / rank.")
        require(
            isinstance(self.use_rslora, bool),
            "use_rslora must be True or False.",
            repr(self.use_rslora),
            "pass a bool.",
        )
        names = (self.projections,) if isinstance(self.projections, str) else tuple(self.projections)
        require(
            bool(names) and len(set(names)) == len(names) and set(names) <= set(WEIGHTS),
            f"projections must be some of {', '.join(WEIGHTS)}, each once.",
            repr(self.projections),
            "name at least one.",
        )
        object.__setattr__(self, "projections", names)

    @property
    def factor(self) -> float:
        """What lora_a @ lora_b is multiplied by."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


@dataclasses.dataclass(frozen=True)
class MLPConfig:
    """Sizes and numerics of one feed-forward block.

    `activation`, `dropout_rate`, `dtype`, `save`, `chunk_size`, `axis_rules` and `implementation` are as in
    :func:`gemma_mlp.feed_forward`. Inside your own remat set `save="gate_up"`, or use the policy named there: with
    `input` plain remat recomputes gate and up twice. The others:

    Attributes:
      embed_dim: D, the width of the residual stream.
      hidden_dim: F, the width of one branch. The Gemma 2 report (arXiv:2408.00118, table 1) prints gate and up
        together, that is 2F.
      use_bias: adds a bias to each of the three projections. Gemma has none.
      param_dtype: the dtype in which parameters are initialised and stored.
      norm_eps: added to the mean square in the block's two norms.
      post_norm: whether the block normalises the MLP's output before it is added to the residual stream, as Gemma 2
        and 3 do and Gemma 1 does not.
      scale_plus_one: True: the norms multiply by 1 + scale, as in Gemma 1, 2 and 3. False: by scale itself, as in
        Gemma 3n and 4 (`Gemma3nRMSNorm` and `Gemma4RMSNorm` of transformers). DeepMind's Gemma 3n has the same option.
      weight_dtype: None: the three weights are stored in `param_dtype`. `int8`, `int4` or `float8_e4m3fn`: they are
        quantised, as by :func:`gemma_mlp.quantize`, and frozen; their scales are stored in `param_dtype`.
      group_size: how many numbers along a quantised weight's first axis share a scale. None: all of them.
      lora: adapters that the modules make next to the weights, in `param_dtype`. None: none.

    Raises:
      ValueError: at construction, for any other value.
    """

    embed_dim: int
    hidden_dim: int
    activation: Activation = "gelu_tanh"
    use_bias: bool = False
    dropout_rate: float = 0.0
    dtype: Any = None
    param_dtype: Any = "float32"
    norm_eps: float = 1e-6
    post_norm: bool = True
    scale_plus_one: bool = True
    save: Save = "input"
    chunk_size: int | None = None
    axis_rules: Rules | None = None
    implementation: Implementation | None = None
    weight_dtype: WeightDtype | None = None
    group_size: int | None = None
    lora: LoRA | None = None

    def __post_init__(self):
        for name in ("embed_dim", "hidden_dim"):
            object.__setattr__(self, name, positive_int(name, getattr(self, name)))
        for name in ("use_bias", "post_norm", "scale_plus_one"):
            value = getattr(self, name)
            require(isinstance(value, bool), f"{name} must be True or False.", repr(value), "pass a bool.")
        require_choice("activation", self.activation, ACTIVATIONS)
        require_choice("save", self.save, get_args(Save))
        if self.implementation is not None:
            require_choice("implementation", self.implementation, get_args(Implementation))
        require(
            _is_real(self.dropout_rate) and 0 <= self.dropout_rate < 1,
            "dropout_rate must be a number in [0, 1).",
            repr(self.dropout_rate),
            "it is the share of hidden activations that is dropped; 0 switches dropout off.",
        )
        if self.chunk_size is not None:
            object.__setattr__(self, "chunk_size", positive_int("chunk_size", self.chunk_size))
        if self.axis_rules is not None:
            object.__setattr__(self, "axis_rules", checked_rules(self.axis_rules))
        require(
            _is_real(self.norm_eps) and self.norm_eps > 0,
            "norm_eps must be a positive finite number.",
            repr(self.norm_eps),
            "Gemma uses 1e-6.",
        )
        if self.dtype is not None:
            object.__setattr__(self, "dtype", dtype_name("dtype", self.dtype))
        object.__setattr__(self, "param_dtype", dtype_name("param_dtype", self.param_dtype))
        if self.weight_dtype is not None:
            require_choice("weight_dtype", self.weight_dtype, WEIGHT_DTYPES)
        if self.group_size is not None:
            object.__setattr__(self, "group_size", positive_int("group_size", self.group_size))
            require(
                self.weight_dtype is not None
                and self.embed_dim % self.group_size == 0
                and self.hidden_dim % self.group_size == 0,
                "group_size must divide embed_dim and hidden_dim, and needs a weight_dtype.",
                f"group_size {self.group_size}, sizes {self.embed_dim}, {self.hidden_dim}, {self.weight_dtype}",
                "choose a divisor of both, such as 32, and the dtype of the quantised weights.",
            )
        valid = self.lora is None or isinstance(self.lora, LoRA)
        require(valid, "lora must be a gemma_mlp.LoRA or None.", repr(self.lora), "such as LoRA(rank=16).")


def _is_real(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


class _Presets(dict[str, MLPConfig]):
    def __missing__(self, name: str):
        raise KeyError(f"No preset is called {name!r}. Known presets: {', '.join(self)}.")


def _preset(embed_dim: int, hidden_dim: int, **overrides: Any) -> MLPConfig:
    return MLPConfig(embed_dim, hidden_dim, dtype="bfloat16", **overrides)


# (embed_dim, hidden_dim of one branch) of each published model; bfloat16 matmuls over float32 parameters. Read-only.
PRESETS: types.MappingProxyType[str, MLPConfig] = types.MappingProxyType(
    _Presets(
        # Gemma 1 report (arXiv:2403.08295), table 1, which prints 2F; no norm after the MLP.
        gemma1_2b=_preset(2048, 16384, post_norm=False),
        gemma1_7b=_preset(3072, 24576, post_norm=False),
        # Gemma 2 report (arXiv:2408.00118), table 1, which prints 2F: 18432, 28672, 73728.
        gemma2_2b=_preset(2304, 9216),
        gemma2_9b=_preset(3584, 14336),
        gemma2_27b=_preset(4608, 36864),
        # Gemma 3: `hidden_size` and `intermediate_size` of the released text configs.
        gemma3_270m=_preset(640, 2048),
        gemma3_1b=_preset(1152, 6912),
        gemma3_4b=_preset(2560, 10240),
        gemma3_12b=_preset(3840, 15360),
        gemma3_27b=_preset(5376, 21504),
        # EmbeddingGemma report (arXiv:2509.20354), section 2: d_model 768, d_ff 1152.
        embeddinggemma_300m=_preset(768, 1152),
        # T5Gemma's own sizes, of encoder and decoder alike: DeepMind's gemma 4.0.1, research/t5gemma/config.py.
        t5gemma_s=_preset(512, 1024),
        t5gemma_b=_preset(768, 2048),
        t5gemma_l=_preset(1024, 2816),
        t5gemma_ml=_preset(1152, 6912),
        t5gemma_xl=_preset(2048, 5120),
        # VaultGemma report (arXiv:2510.15001), which prints 2F = 13824. D follows from its 1.04 B parameters.
        vaultgemma_1b=_preset(1152, 6912, post_norm=False),
        # Gemma 3n from layer 10 on (before, its gate has a threshold): gemma 4.0.1, gm/nn/gemma3n/_gemma3n.py.
        gemma3n_e2b=_preset(2048, 8192, scale_plus_one=False),
        gemma3n_e4b=_preset(2048, 16384, scale_plus_one=False),
        # Dense Gemma 4: gm/nn/gemma4/_gemma4.py of the same, where F is 4 D. E2B's layers 15 to 34 are twice as wide.
        gemma4_e2b=_preset(1536, 6144, scale_plus_one=False),
        gemma4_e2b_wide=_preset(1536, 12288, scale_plus_one=False),
        gemma4_e4b=_preset(2560, 10240, scale_plus_one=False),
        gemma4_12b=_preset(3840, 15360, scale_plus_one=False),  # the released text config
        gemma4_31b=_preset(5376, 21504, scale_plus_one=False),
    )
)
