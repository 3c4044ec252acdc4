"""Which tensors of a checkpoint are a PEFT adapter's, and what PEFT calls them in its own files.

Invariant: the names are those that `PeftModel.save_pretrained` writes; nothing of PEFT is needed to know them. Source:
peft's `get_peft_model_state_dict` and `BaseTuner._get_adapter_state_dict` (0.21).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from dist_train.errors import ConfigError

Json = Any
WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
_PREFIX = "base_model.model."
_METHODS = {
    "LORA": "lora_(?:embedding_)?[AB]|lora_magnitude_vector",
    "LOHA": r"hada_[wt]\d(?:_[ab])?",
    "LOKR": r"lokr_[wt]\d(?:_[ab])?",
    "IA3": "ia3_l",
    "OFT": "oft_R",
    "HRA": "hra_u",
}
"""What the parameters of a method are called; the adapter's name follows."""
_BESIDE = "modules_to_save|trainable_tokens_delta"
"""The same of modules and rows that are trained beside an adapter, of any method."""
_OWN = re.compile(rf"(?:^|\.)({'|'.join([*_METHODS.values(), _BESIDE])})\.([\w-]+)(?=\.|$)")


def has_adapter(keys: Collection[str]) -> bool:
    """Whether a model with these keys in its state_dict has been given an adapter by PEFT."""
    return any(_OWN.search(key) for key in keys)


def name_adapters(keys: Collection[str], config: Mapping[str, Json]) -> dict[str, str]:
    """Names in PEFT's file -> keys of the model's state_dict.

    Args:
        keys: of the model.
        config: adapter_config.json; empty where it is not known: the method is LoRA then.

    Raises:
        ConfigError: there is no adapter among them, there are several, or one of a method that is not known here.
    """
    method = config.get("peft_type", "LORA")
    if method not in _METHODS:
        raise ConfigError(
            f"An adapter of the method {method} cannot be exported, only those of {', '.join(_METHODS)}. Build the "
            f"model as for training, load it (dist_train.load_model), and call its save_pretrained."
        )
    own = {key: match for key in keys if (match := _OWN.search(key))}
    adapters = sorted({match[2] for match in own.values()})
    if len(adapters) != 1:
        told = f"the adapters {', '.join(adapters)}" if adapters else f"no adapter of {', '.join(_METHODS)}"
        raise ConfigError(
            f"The checkpoint's model holds {told}; PEFT's folder has exactly one. Build the model as for training, "
            f"load it (dist_train.load_model), and call its save_pretrained."
        )
    biases = _trained_biases(keys, own, config.get("bias", "none"))
    return {_rename(key, own.get(key)): key for key in keys if key in own or key in biases}


def _rename(key: str, match: re.Match[str] | None) -> str:
    """Without the adapter's name; also as PEFT prefixes what transformers' own integration lets out."""
    if match is not None:
        start, stop = match.span()
        kept = "" if match[1] == "modules_to_save" else f".{match[1]}"
        if match[1] == "lora_magnitude_vector":  # DoRA's form of old, which its files keep
            key = key.removesuffix(".weight")
        key = f"{key[:start]}{kept}{key[stop:]}".removeprefix(".")
    return key if key.startswith(_PREFIX) else _PREFIX + key


def _trained_biases(keys: Collection[str], own: Collection[str], kind: str) -> set[str]:
    """Biases of the base model that are trained along: all, or those of the layers with an adapter."""
    if kind == "none":
        return set()
    biases = {key for key in keys if key.rpartition(".")[2] == "bias" and key not in own}
    return biases if kind == "all" else {key for key in biases if key.endswith(".base_layer.bias")}
