"""Adapters in the folders that Hugging Face's PEFT writes: adapter_config.json and adapter_model.safetensors."""

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from gemma_mlp.checkpoint.addresses import local_folder
from gemma_mlp.checkpoint.loading import count_not_finite, require_finite
from gemma_mlp.checkpoint.safetensors_folder import create, opened, read_json
from gemma_mlp.checks import describe, positive_int, require
from gemma_mlp.dtypes import DTYPES, dtype_name
from gemma_mlp.layouts.adapters import Adapter, Adapters, require_adapters
from gemma_mlp.params import WEIGHTS

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
# A tensor of the block: its prefix, layer and name there. PEFT saves whole norms if modules_to_save names them.
TENSOR = re.compile(r"base_model\.model\.((?:.*\.)?)layers\.(\d+)\.(mlp\..+|\w+_layernorm\..+)")
MATRIX = re.compile(rf"mlp\.({'|'.join(WEIGHTS)})\.(lora_A|lora_B)\.weight")
# Settings of LoraConfig (PEFT 0.21) with which an adapter computes something else, and the values that switch them off.
OTHER_KINDS = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "lora_bias": "a bias in lora_B",
    "fan_in_fan_out": "weights stored as (in, out)",
    "layer_replication": "layers that are used several times",
    "alora_invocation_tokens": "an adapter that some tokens switch on",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "routing between adapters",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
}
OFF = (None, False, [], {}, "none")


def read_adapters(folder: str | Path, *, part: str | None = None, dtype: Any = None) -> dict[int, dict[str, Adapter]]:
    """The adapters of the block's three projections, from a folder that PEFT has saved.

    The factor is lora_alpha / r, or lora_alpha / sqrt(r) with `use_rslora`; `rank_pattern` and `alpha_pattern` count.
    Adapters of other modules, such as those of attention, are passed over.

    Args:
      folder: holds adapter_config.json and adapter_model.safetensors. It must be on this disk.
      part: of a T5Gemma: "encoder" or "decoder"; None for all other models.
      dtype: to cast to; None: as in the file, which must not be float16.

    Returns:
      A dict by the number of the layer, then by the name of the projection. `gemma_mlp.layouts.insert_adapters` puts
      it onto parameters.

    Raises:
      ValueError: for DoRA and whatever else is not LoRA; if the config contradicts the tensors; if a tensor is missing,
        superfluous or not finite.
    """
    folder = local_folder(folder)
    config, path = read_json(folder / CONFIG), folder / TENSORS
    _require_lora(config, folder / CONFIG)
    fix = "save it with PEFT's save_pretrained(); .bin files are pickles, which are never opened."
    require(path.is_file(), f"{folder} must hold {TENSORS}.", "no such file", fix)
    with opened(path) as file:
        modules = _modules(file.keys(), path, part)
        _require_targets(config, modules, folder / CONFIG)
        adapters: dict[int, dict[str, Adapter]] = {}
        for module, matrices in modules.items():
            a, b = (_matrix(file, f"base_model.model.{module}.{name}.weight", path, dtype) for name in matrices)
            rank = _setting(config, "rank_pattern", "r", module)
            require(
                a.shape[1] == b.shape[0] == rank,
                f"{CONFIG} says: {module} has rank {rank}. So lora_A must be [{rank}, in], and lora_B [out, {rank}].",
                f"lora_A {describe(a.T)}, lora_B {describe(b.T)} in {path}",
                "use the adapter_config.json that was saved with these tensors.",
            )
            alpha = _setting(config, "alpha_pattern", "lora_alpha", module)
            factor = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
            *_, number, _, name = module.split(".")
            adapters.setdefault(int(number), {})[name] = Adapter(a, b, factor)
    return dict(sorted(adapters.items()))


def write_adapters(
    folder: str | Path, adapters: Adapters, *, base_model: str | None = None, prefix: str = "model."
) -> None:
    """Writes a new folder that PEFT's `PeftModel.from_pretrained` loads. It appears whole or not at all.

    Args:
      folder: must not exist yet.
      adapters: as :func:`read_adapters` or `gemma_mlp.layouts.extract_adapters` returns them. Matrices keep their bits.
        Where no lora_alpha gives a factor exactly, the nearest does: it is at most the last bit of a float64 off.
      base_model: the name of the model, or its folder, for adapter_config.json.
      prefix: of the layers in that model: "model." as in Gemma 1 to 3, "model.language_model." in multimodal models.

    Raises:
      ValueError: if the folder exists, an adapter's matrices do not fit together, or a number is not finite.
    """
    folder = local_folder(folder, new=True)
    require_adapters(adapters)
    by_module = {
        f"{prefix}layers.{number}.mlp.{name}": adapter
        for number, of_layer in sorted(adapters.items())
        for name, adapter in of_layer.items()
    }
    tensors = {}
    for module, (a, b, _) in by_module.items():
        for name, matrix in (("lora_A", a), ("lora_B", b)):
            require_finite(f"{name} of {module}", count_not_finite(matrix), matrix.size)
            tensors[f"base_model.model.{module}.{name}.weight"] = lambda matrix=matrix: np.asarray(matrix).T
    rank = max(a.shape[1] for a, _, _ in by_module.values())
    rslora = not _alphas(by_module, use_rslora=False)[1] and _alphas(by_module, use_rslora=True)[1]
    alphas = _alphas(by_module, rslora)[0]
    first = next(iter(alphas.values()))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": first,
        "use_rslora": rslora,
        "rank_pattern": {module: a.shape[1] for module, (a, _, _) in by_module.items() if a.shape[1] != rank},
        "alpha_pattern": {module: alpha for module, alpha in alphas.items() if alpha != first},
        "target_modules": list(by_module),
    }
    create(folder, tensors, config, single=TENSORS, config_name=CONFIG)


def _require_lora(config: Mapping[str, Any], path: Path) -> None:
    kind = config.get("peft_type")
    fix = "merge them into the model and save that: PeftModel.merge_and_unload() and save_pretrained()."
    require(kind == "LORA", f"{path} must be of LoRA adapters.", f"peft_type {kind!r}", fix)
    for key, what in OTHER_KINDS.items():
        require(config.get(key) in OFF, f"{path} must be of plain LoRA.", f"{what} ({key} {config.get(key)!r})", fix)
    bias = config.get("bias", "none")
    require(bias == "none", f"{path} must be of adapters without trained biases.", f"bias {bias!r}", fix)


def _modules(names: Iterable[str], path: Path, part: str | None) -> dict[str, tuple[str, str]]:
    """The modules that have adapters, such as model.layers.0.mlp.gate_proj, in the text model's layers."""
    names = list(names)
    found: dict[str, set[str]] = {}
    prefixes = set()
    for name in names:
        tensor = TENSOR.fullmatch(name)
        if tensor and MATRIX.fullmatch(tensor[3]) and (part is None or part in tensor[1].split(".")):
            module, matrix, _ = name.removeprefix("base_model.model.").rsplit(".", 2)
            found.setdefault(module, set()).add(matrix)
            prefixes.add(tensor[1])
    require(
        len(prefixes) == 1,
        f"{path} must hold adapters of one model's {', '.join(WEIGHTS)}.",
        f"those of {', '.join(sorted(prefixes))}" if prefixes else f"{len(names)} tensors, such as {names[:2]}",
        'for a T5Gemma give part="encoder" or part="decoder"; others need adapters on their MLP.',
    )
    (prefix,) = prefixes
    for name in names:
        tensor = TENSOR.fullmatch(name)
        require(
            not tensor or tensor[1] != prefix or MATRIX.fullmatch(tensor[3]) is not None,
            f"{path} must hold only lora_A.weight and lora_B.weight of {', '.join(WEIGHTS)} for the block.",
            f"{name}{', a tensor of DoRA' if 'magnitude' in name else ''}",
            "merge it into the model and save that: PeftModel.merge_and_unload() and save_pretrained().",
        )
    for module, matrices in found.items():
        missing = {"lora_A", "lora_B"} - matrices
        require(
            not missing, f"{module} in {path} must have both matrices.", f"no {', '.join(missing)}", "save it again."
        )
    return dict.fromkeys(sorted(found), ("lora_A", "lora_B"))


def _matrix(file: Any, name: str, path: Path, dtype: Any) -> jnp.ndarray:
    """A matrix as ours: transposed, as PEFT stores (out, in)."""
    part = file.get_slice(name)
    rule = f"{name} in {path} must be a matrix in one of {', '.join(DTYPES)}, or be cast as it is read."
    received = f"{part.get_dtype()}{part.get_shape()}"
    require(len(part.get_shape()) == 2 and 0 not in part.get_shape(), rule, received, "save it again.")
    require(part.get_dtype() in ("F16", "BF16", "F32", "F64"), rule, received, "save it as floating-point numbers.")
    require(dtype is not None or part.get_dtype() != "F16", rule, received, 'dtype="float32" keeps every number of it.')
    matrix = jnp.asarray(np.ascontiguousarray(part[:].T), None if dtype is None else dtype_name("dtype", dtype))
    require_finite(f"{name} in {path}", count_not_finite(matrix), matrix.size)
    return matrix


def _setting(config: Mapping[str, Any], patterns: str, key: str, module: str) -> Any:
    """r or lora_alpha of a module: that of the first pattern that fits the end of its name, or else the common one."""
    value = config.get(key)
    for pattern, own in (config.get(patterns) or {}).items():
        if _matches(rf"(.*\.)?({pattern})$", module, patterns):
            value = own
            break
    if key == "r":
        return positive_int(f"r of {module} in {CONFIG}", value)
    real = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    require(real, f"{key} of {module} in {CONFIG} must be a finite number.", repr(value), "save the adapter again.")
    return value


def _matches(pattern: str, module: str, key: str) -> bool:
    try:
        return re.match(pattern, module) is not None
    except re.error as error:
        rule = f"{key} in {CONFIG} must hold names or regular expressions."
        raise ValueError(f"{rule} Got: {pattern!r}, {error}. Fix: save the adapter again.") from error


def _require_targets(config: Mapping[str, Any], modules: Iterable[str], path: Path) -> None:
    """Raises ValueError unless the adapted modules are those of target_modules: PEFT would ignore all others."""
    targets: Any = config.get("target_modules")
    if targets is None or targets == "all-linear":
        return
    only = config.get("layers_to_transform")
    only = [only] if isinstance(only, int) else only
    modules = set(modules)
    of_layers = {module.rsplit(".", 1)[0] for module in modules}
    for module in sorted(f"{layer}.{name}" for layer in of_layers for name in WEIGHTS):
        if isinstance(targets, str):
            targeted = _matches(rf"(?:{targets})$", module, "target_modules")
        else:
            targeted = any(module == target or module.endswith(f".{target}") for target in targets)
        targeted = targeted and (not only or int(module.split(".")[-3]) in only)
        excluded: Any = config.get("exclude_modules") or ()
        if isinstance(excluded, str):
            targeted = targeted and not _matches(rf"(?:{excluded})$", module, "exclude_modules")
        else:
            targeted = targeted and not any(module == name or module.endswith(f".{name}") for name in excluded)
        require(
            targeted == (module in modules),
            f"{path} must name the modules that have adapters, by target_modules.",
            f"{module} is {'' if targeted else 'not '}named, and there are {'' if module in modules else 'no '}tensors",
            "use the adapter_config.json that was saved with these tensors.",
        )


def _alphas(adapters: Mapping[str, Adapter], use_rslora: bool) -> tuple[dict[str, float], bool]:
    """lora_alpha of each module, and whether all of them give the factors exactly."""
    alphas, exact = {}, True
    for module, (a, _, factor) in adapters.items():
        divisor = math.sqrt(a.shape[1]) if use_rslora else a.shape[1]
        near = factor * divisor
        tried = (round(near), near, math.nextafter(near, math.inf), math.nextafter(near, -math.inf))
        found = [alpha for alpha in tried if alpha / divisor == factor]
        alphas[module] = found[0] if found else near
        exact = exact and bool(found)
    return alphas, exact
