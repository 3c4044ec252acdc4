"""Names of an adapter's tensors are those that PEFT itself writes."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_train.checkpoint.adapters import has_adapter, name_adapters
from dist_train.errors import ConfigError


@cache
def peft() -> Any:
    return pytest.importorskip("peft")


def base() -> torch.nn.Module:
    torch.manual_seed(0)
    layers = {"embed": torch.nn.Embedding(8, 4), "first": torch.nn.Linear(4, 4), "second": torch.nn.Linear(4, 4)}
    return torch.nn.Sequential(torch.nn.ModuleDict(layers))


CASES: dict[str, Callable[[], Any]] = {
    "lora": lambda: peft().LoraConfig(target_modules=["first", "embed"]),
    "dora": lambda: peft().LoraConfig(target_modules=["first"], use_dora=True, modules_to_save=["second"]),
    "bias of the layers": lambda: peft().LoraConfig(target_modules=["first"], bias="lora_only"),
    "every bias": lambda: peft().LoraConfig(target_modules=["first"], bias="all"),
    "lora with a bias": lambda: peft().LoraConfig(target_modules=["first"], lora_bias=True),
    "tokens": lambda: peft().LoraConfig(target_modules=["first"], trainable_token_indices={"embed": [1, 2]}),
    "ia3": lambda: peft().IA3Config(target_modules=["first", "second"], feedforward_modules=["second"]),
    "loha": lambda: peft().LoHaConfig(target_modules=["first"]),
    "lokr": lambda: peft().LoKrConfig(target_modules=["first"]),
    "oft": lambda: peft().OFTConfig(target_modules=["first"], r=2, oft_block_size=0),
    "hra": lambda: peft().HRAConfig(target_modules=["first"]),
}


@pytest.mark.parametrize("case", CASES)
def test_names_and_tensors_are_those_of_peft(case: str, tmp_path: Path) -> None:
    config = CASES[case]()
    model = peft().get_peft_model(base(), config)
    config.save_pretrained(str(tmp_path))
    state = model.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = peft().get_peft_model_state_dict(model, save_embedding_layers=False)
    names = name_adapters(state.keys(), json.loads((tmp_path / "adapter_config.json").read_text()))
    assert names.keys() == expected.keys()
    assert all(state[names[name]].data_ptr() == expected[name].data_ptr() for name in expected)


def test_an_adapter_of_another_name_and_without_a_config() -> None:
    keys = ["base_model.model.a.lora_A.mine.weight", "base_model.model.a.base_layer.weight", "base_model.model.b.bias"]
    assert name_adapters(keys, {}) == {"base_model.model.a.lora_A.weight": keys[0]}


def test_what_transformers_itself_has_injected_gets_the_names_that_peft_prefixes() -> None:
    assert name_adapters(["h.0.lora_B.default.weight", "h.0.base_layer.weight"], {"peft_type": "LORA"}) == {
        "base_model.model.h.0.lora_B.weight": "h.0.lora_B.default.weight"
    }


def test_none_several_and_unknown_ones_are_refused() -> None:
    two = ["a.lora_A.one.weight", "a.lora_A.two.weight"]
    for keys, config, text in (
        (["a.weight"], {}, "no adapter of LORA"),
        (two, {}, "the adapters one, two"),
        (["prompt_encoder.default.embedding.weight"], {"peft_type": "PROMPT_TUNING"}, "method PROMPT_TUNING"),
    ):
        with pytest.raises(ConfigError, match=text):
            name_adapters(keys, config)
    assert has_adapter(two)
    assert not has_adapter(["lora.weight", "model.lora_proj.weight"])
