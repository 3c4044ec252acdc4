"""The dictionaries that scripts without the library save, of models that are awkward to carry over."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Tied(nn.Module):
    """A language model's head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.head(self.embedding(inputs))
        return hidden


def build(kind: str) -> nn.Module:
    torch.manual_seed(3)
    if kind == "tied":
        return Tied()
    if kind == "bf16":
        return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)).to(torch.bfloat16)
    if kind == "channels_last":
        convolutions = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3))
        return convolutions.to(memory_format=torch.channels_last)
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))


def inputs_of(kind: str, update: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(update)
    if kind == "tied":
        return torch.randint(0, 7, (4,), generator=generator)
    if kind == "channels_last":
        return torch.randn(2, 3, 4, 4, generator=generator).to(memory_format=torch.channels_last)
    return torch.randn(4, 6, generator=generator, dtype=torch.bfloat16 if kind == "bf16" else torch.float32)


def build_optimizer(model: nn.Module, name: str) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    half = list(model.parameters())
    groups = [{"params": half[:1], "weight_decay": 0.0}, {"params": half[1:]}] if len(half) > 1 else half
    return torch.optim.AdamW(groups, lr=0.01, amsgrad=True)


def update(kind: str, model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    optimizer.zero_grad()
    model(inputs_of(kind, number)).float().square().mean().backward()
    optimizer.step()


def old_checkpoint(
    kind: str = "plain", optimizer: str = "adamw", *, scheduler: bool = True, scaler: bool = True
) -> dict[str, Any]:
    """As `torch.save` gets it at the end of epoch 13 (index 12), after three updates."""
    model = build(kind)
    trained = build_optimizer(model, optimizer)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(trained, 20)
    for number in range(3):
        update(kind, model, trained, number)
        schedule.step()
    saved = {
        "epoch": 12,
        "model_state_dict": model.state_dict(),
        "optimizer_state_dict": trained.state_dict(),
        "val_smape": 42.15,
        "train_loss": 0.3421,
        "best_val_smape": 41.82,
    }
    if scheduler:
        saved["scheduler_state_dict"] = schedule.state_dict()
    if scaler:
        saved["scaler_state_dict"] = torch.amp.GradScaler("cpu").state_dict()
    return saved
