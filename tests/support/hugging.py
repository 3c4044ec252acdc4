"""What ranks do in the tests with transformers and PEFT; those are imported in the ranks alone, which takes seconds.

Each function runs on every rank of `forked.run_ranks`, in a folder of the test's.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import runpy
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from dist_train.checkpoint.exchange import export_checkpoint
from dist_train.checkpoint.inference import load_model
from dist_train.checkpoint.policy import CheckpointPolicy
from dist_train.cli import main
from dist_train.run import Run
from dist_train.world import current_world
from tests.support.launch import ROOT
from tests.support.memory_run import Watch, status

ROWS, COLUMNS = 5000, 16000
"""320 MB of int32."""


def gpt2() -> Any:
    """Tied embeddings; a fiftieth of a second to build."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def batch(step: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(step))
    return {"input_ids": ids, "labels": ids}


def logits(model: nn.Module) -> torch.Tensor:
    """In eval mode, which the model is left in."""
    with torch.no_grad():
        return model.eval()(input_ids=batch(99)["input_ids"]).logits.clone()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def train(run: Run, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> Iterator[int]:
    """One epoch; yields after each update."""
    for _ in run.epochs(1):
        for step in range(steps):
            model.train()
            model(**batch(step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            run.step()
            yield step


def load_live_folders(folder: str) -> dict[str, Any]:
    """Trains with DDP and activation checkpointing (alone: with torch.compile around the model), and loads each
    checkpoint while the next is saved; in the end also the older ones, which have become weights-only. Which files of
    weights each of them has.
    """
    from transformers import AutoModelForCausalLM, GPT2LMHeadModel

    world, plain = current_world(), gpt2()
    if world.world_size > 1:
        plain.gradient_checkpointing_enable()
    model: Any = DistributedDataParallel(plain) if world.world_size > 1 else torch.compile(plain)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    policy = CheckpointPolicy(every_steps=1, keep_last=9, keep_optimizer=1)
    expected, seen = {}, {}
    with quiet(), Run(f"{folder}/run", model=model, optimizer=optimizer, policy=policy) as run:
        run.attach(plain)
        forward = model if world.world_size > 1 else plain
        for step in train(run, forward, optimizer, 4):
            expected[step + 1] = logits(plain)
            # The save of this step goes on meanwhile.
            for older in range(1, step + 1) if world.is_main else ():
                path = f"{folder}/run/checkpoints/step-{older:08d}"
                end = time.monotonic() + 30
                while not Path(path).exists() and time.monotonic() < end:  # that of the step before is nearly there
                    time.sleep(0.01)
                loaded, told = GPT2LMHeadModel.from_pretrained(path, output_loading_info=True)
                assert not any(told.values()), told
                assert torch.equal(logits(loaded), expected[older])
                seen[older] = sorted(one.name for one in Path(path).glob("*.safetensors"))
    path = f"{folder}/run/checkpoints/step-{2:08d}"
    names = sorted(one.name for one in Path(path).glob("*.safetensors"))
    if world.is_main:
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(path)), expected[2])
        other = load_model(f"{folder}/run", "step:3", GPT2LMHeadModel(plain.config))
        assert torch.equal(logits(other), expected[3])
        assert other.lm_head.weight is other.transformer.wte.weight
    return {"live": seen, "stripped": names}


def export_what_was_sharded(folder: str) -> list[str]:
    """Trains with FSDP2, exports in files of 20 kB; the logits are those of the sharded model. The folder's files."""
    from transformers import AutoModelForCausalLM

    model = gpt2()
    for block in model.transformer.h:
        fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with quiet(), Run(f"{folder}/run", model=model, optimizer=optimizer) as run:
        run.attach(model)
        for _ in train(run, model, optimizer, 2):
            pass
    expected = logits(model)
    if not current_world().is_main:
        return []
    done = export_checkpoint(f"{folder}/run", "latest", f"{folder}/hf", form="hf", max_shard_bytes=20_000)
    loaded = AutoModelForCausalLM.from_pretrained(done.path)
    assert type(loaded).__name__ == "GPT2LMHeadModel"
    assert torch.equal(logits(loaded), expected)
    return sorted(one.name for one in Path(done.path).iterdir())


def export_an_adapter(folder: str) -> list[str]:
    """Trains LoRA and a head of its own, with DDP; what PEFT loads from the export has the same logits."""
    from peft import LoraConfig, PeftModel, get_peft_model

    config = LoraConfig(r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, modules_to_save=["ln_f"])
    torch.manual_seed(1)
    adapted = get_peft_model(gpt2(), config)
    model = DistributedDataParallel(adapted)
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-1)
    with quiet(), Run(f"{folder}/run", model=model, optimizer=optimizer) as run:
        run.attach(model)
        for _ in train(run, model, optimizer, 2):
            pass
    expected = logits(adapted)
    if not current_world().is_main:
        return []
    done = export_checkpoint(f"{folder}/run", "latest", f"{folder}/adapter", form="peft")
    assert not torch.equal(expected, logits(gpt2()))
    assert torch.equal(logits(PeftModel.from_pretrained(gpt2(), done.path)), expected)
    return sorted(one.name for one in Path(done.path).iterdir())


def save_one_large_tensor(folder: str) -> None:
    """Sharded by columns: each row of the whole comes from every rank's file."""
    world = current_world()
    mesh = init_device_mesh("cpu", (world.world_size,))
    width = COLUMNS // world.world_size
    columns = torch.arange(width, dtype=torch.int32) + world.rank * width
    local = torch.arange(ROWS, dtype=torch.int32)[:, None] * COLUMNS + columns
    model = nn.Module()
    model.register_buffer("large", DTensor.from_local(local, mesh, [Shard(1)], run_check=False))
    model.register_buffer("small", torch.ones(3))
    with quiet(), Run(f"{folder}/run", model=model) as run:
        for _ in run.epochs(1):
            run.step()


def export_under_watch(folder: str) -> dict[str, int]:
    """kB of anonymous memory: before, and the peak meanwhile."""
    before = status()["RssAnon"]
    watch = Watch()
    with quiet():
        export_checkpoint(f"{folder}/run", "latest", f"{folder}/hf", form="hf")
    return {"before": before, "peak": watch.end()["anon"]}


def load_example(run_dir: str, folder: str) -> str:
    """What the example has trained, by transformers (and PEFT) alone: a text that it goes on with.

    Args:
        folder: the checkpoint itself or an export, of the model or of an adapter.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if (Path(folder) / "adapter_config.json").exists():
        from peft import LoraConfig, PeftModel, get_peft_model

        sizes = {"n_embd": 128, "n_layer": 4, "n_head": 4, "n_positions": 128}
        config = GPT2Config(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0, **sizes)
        bases = []
        for _ in range(2):
            torch.manual_seed(0)  # as the example, whose base comes from nowhere else
            bases.append(AutoModelForCausalLM.from_config(config))
        model = PeftModel.from_pretrained(bases[0], folder)
        other = get_peft_model(bases[1], LoraConfig.from_pretrained(folder))
    else:
        model = AutoModelForCausalLM.from_pretrained(folder)
        other = AutoModelForCausalLM.from_config(model.config)
    with quiet():
        load_model(run_dir, "latest", other)
    assert torch.equal(logits(model), logits(other))
    tokens = model.generate(**tokenizer("import ", return_tensors="pt"), max_new_tokens=4, do_sample=False)
    return str(tokenizer.decode(tokens[0]))


def run_page(page: str, folder: str) -> None:
    """Does what the blocks of a page of the docs say, in order, in a folder."""
    from transformers import GPT2Config

    example = runpy.run_path(str(ROOT / "examples/transformers_finetune.py"), run_name="example")
    tokenizer = example["byte_tokenizer"]()
    tokenizer.pad_token = tokenizer.eos_token
    sizes = {"n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    train_set = [{"input_ids": list(range(start, start + 16))} for start in range(12)]
    names = {"config": GPT2Config(vocab_size=len(tokenizer), **sizes), "tokenizer": tokenizer, "train_set": train_set}
    os.chdir(folder)
    with quiet():
        for language, text in re.findall(r"^```(python|bash)\n(.*?)^```$", Path(page).read_text(), re.M | re.S):
            if language == "python":
                exec(compile(text, page, "exec"), names)
            else:
                for line in text.splitlines():
                    assert main(shlex.split(line)[1:]) == 0, line
