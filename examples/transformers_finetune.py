"""A transformers model, made crash-proof: trained with DDP or FSDP2, whole or with LoRA, and loaded where it lies.

New here: `attach`. The model's config and the tokenizer go along with every checkpoint, so that a checkpoint's folder
is what `from_pretrained` wants; while the run goes on, and whatever is killed. With FSDP2 the folder holds parts of
tensors, and with LoRA names of PEFT's: `dist-train export` makes of them what goes to others. `exclude` keeps what LoRA
leaves as it is out of the checkpoints: the script has it at each start.

The text is Python's own standard library, a byte is a token, and the model is built from a config: nothing is
downloaded. `--base` begins with the weights of another folder; one of a run that trains will do.

    pip install transformers peft

    python examples/transformers_finetune.py --run-dir runs/gpt
    torchrun --nproc-per-node 2 --max-restarts 3 examples/transformers_finetune.py --cpu --sharding fsdp
    python examples/transformers_finetune.py --run-dir runs/lora --lora --base runs/gpt/best

    python -c "import transformers; print(transformers.pipeline(
        'text-generation', 'runs/gpt/best', max_new_tokens=60)('import ')[0])"
    dist-train export runs/gpt best --format hf --to gpt-hf        # what FSDP2 has saved, in one piece
    dist-train export runs/lora best --format peft --to adapter    # for PeftModel.from_pretrained(base, "adapter")
"""

import argparse
import sys
import sysconfig
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)

import dist_train as dt

BLOCK = 128
"""Tokens of a sample."""
END = "<|end|>"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with a token for each byte and one for the end of a file."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate([END, *alphabet])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=END, eos_token=END)


class Blocks(Dataset):
    """Pieces of the standard library's source; each a sample of transformers' kind, a dictionary."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, kilobytes: int, part: int) -> None:
        """Take `kilobytes`, or so, of every tenth file from the `part`th on: 0 to train, 5 to evaluate."""
        files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[part::10]
        text = END.join(file.read_text(encoding="utf-8", errors="ignore") for file in files)[: kilobytes * 1000]
        ids = torch.tensor(tokenizer(text)["input_ids"])
        self.blocks = ids[: len(ids) // BLOCK * BLOCK].view(-1, BLOCK)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.blocks[index], "labels": self.blocks[index]}


def build_model(base: str | None, vocabulary: int) -> PreTrainedModel:
    """Return a small GPT-2, or the model of a folder. A resume overwrites its weights with the checkpoint's."""
    if base is not None:
        model = AutoModelForCausalLM.from_pretrained(base)
    else:
        sizes = {"n_embd": 128, "n_layer": 4, "n_head": 4, "n_positions": BLOCK}
        config = GPT2Config(vocab_size=vocabulary, bos_token_id=0, eos_token_id=0, **sizes)
        model = AutoModelForCausalLM.from_config(config)
    model.loss_type = "ForCausalLM"  # which it would be anyway: said, so that transformers does not warn of a guess
    return model


def add_adapter(model: PreTrainedModel) -> torch.nn.Module:
    """Freeze the model and add what LoRA trains in its place, a hundredth of it."""
    from peft import LoraConfig, get_peft_model

    targets = ["c_attn", "c_proj", "c_fc"]
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=targets, fan_in_fan_out=True))


def loss_fn(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the mean loss of a token; every sample has as many."""
    return model(**batch).loss


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", default="runs/gpt", help="what survives lives here")
    parser.add_argument("--base", help="begin with the weights of this folder, or of a model of the Hub")
    parser.add_argument("--lora", action="store_true", help="train an adapter of PEFT's, not the model")
    parser.add_argument("--sharding", choices=("none", "fsdp", "hsdp"), default="none")
    parser.add_argument(
        "--gradient-checkpointing", action="store_true", help="compute activations again to save memory"
    )
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--kilobytes", type=int, default=400, help="text to train on")
    parser.add_argument("--mixed-precision", choices=("no", "bf16", "fp16", "auto"), default="auto")
    parser.add_argument("--cpu", action="store_true", help="use the CPU although there is a GPU")
    return parser.parse_args()


def main() -> int:
    """Train; returns the exit code for the shell."""
    args = parse_args()
    dt.seed_everything(0)
    tokenizer = byte_tokenizer()
    train_data = Blocks(tokenizer, args.kilobytes, part=0)
    model = build_model(args.base, len(tokenizer))
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if args.lora:
        model = add_adapter(model)
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-3)
    updates = args.epochs * -(-len(train_data) // 32)

    result = dt.Trainer(
        model,
        optimizer,
        train_data=train_data,
        eval_data=Blocks(tokenizer, args.kilobytes // 8, part=5),
        loss=loss_fn,
        scheduler=get_cosine_schedule_with_warmup(optimizer, updates // 10, updates),
        attach=[model, tokenizer],  # the model's config, that is; its weights are saved anyway
        config=dt.TrainConfig(
            run_dir=args.run_dir,
            epochs=args.epochs,
            global_batch_size=32,
            micro_batch_size=8,
            sharding=args.sharding,
            mixed_precision=args.mixed_precision,
            max_grad_norm=1.0,
            cpu=args.cpu,
            exclude=("*", "!*lora_*") if args.lora else (),  # the base is there at each start: from --base, or the seed
            checkpoint=dt.CheckpointPolicy(every_steps=20, every_epochs=1, keep_best=1, monitor="val_loss", mode="min"),
        ),
    ).fit()
    return result.exit_code


if __name__ == "__main__":
    sys.exit(main())
