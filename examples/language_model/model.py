"""A byte-level GPT: causal attention, the output layer tied to the embedding, sizes from 1 million to 1 billion.

Plain PyTorch, no dist_train in here. A byte is a token: no tokenizer, a vocabulary of 256.

Source: A. Radford et al., "Language Models are Unsupervised Multitask Learners" (2019): pre-norm blocks, initialisation
and weight tying.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY = 256


@dataclass(frozen=True, slots=True)
class Size:
    """The shape of a model."""

    layers: int
    heads: int
    width: int
    block: int
    """Context length in bytes, the number of learned positions."""
    parameters: int
    """What `Transformer(size)` has, tied weights counted once; asserted by a test."""


SIZES = {
    "1m": Size(layers=5, heads=4, width=128, block=128, parameters=1_035_008),
    "10m": Size(layers=8, heads=5, width=320, block=256, parameters=10_005_120),
    "100m": Size(layers=14, heads=12, width=768, block=1024, parameters=100_118_016),
    "350m": Size(layers=28, heads=16, width=1024, block=1024, parameters=353_748_992),
    "1b": Size(layers=20, heads=16, width=2048, block=1024, parameters=1_009_422_336),
}


class Attention(nn.Module):
    """Causal self-attention over [batch, time, width]."""

    def __init__(self, size: Size, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = size.heads, dropout
        self.qkv = nn.Linear(size.width, 3 * size.width, bias=False)
        self.out = nn.Linear(size.width, size.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        qkv = self.qkv(x).view(batch, time, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [batch, heads, time, width of a head]
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(batch, time, width))


class Block(nn.Module):
    """Attention, then a feed-forward layer four times as wide, each added to what came in."""

    def __init__(self, size: Size, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(size.width), nn.LayerNorm(size.width)
        self.attention = Attention(size, dropout)
        self.up = nn.Linear(size.width, 4 * size.width, bias=False)
        self.down = nn.Linear(4 * size.width, size.width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.down(F.gelu(self.up(self.norm2(x)))))


class Transformer(nn.Module):
    """Predicts the next byte: int64 [batch, time] -> logits [batch, time, 256]."""

    def __init__(self, size: Size, dropout: float = 0.1) -> None:
        super().__init__()
        self.bytes = nn.Embedding(VOCABULARY, size.width)
        self.positions = nn.Embedding(size.block, size.width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(size, dropout) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, VOCABULARY, bias=False)
        self.head.weight = self.bytes.weight  # tied: one tensor under two names
        self.initialise(size.layers)

    def initialise(self, layers: int) -> None:
        """Draw all weights with a deviation of 0.02, those that end a residual branch smaller."""
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                ends_branch = name.endswith(("attention.out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * layers) if ends_branch else 0.02)

    def forward(self, inputs: Tensor) -> Tensor:
        positions = torch.arange(inputs.shape[1], device=inputs.device)
        x = self.dropout(self.bytes(inputs) + self.positions(positions))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def language_loss(model: nn.Module, batch: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return (mean cross-entropy in nats a byte, bits a byte of each window [batch], bytes in each window [batch]).

    The last two are what a weighted mean takes: a number and its weight.
    """
    inputs, targets = batch
    logits = model(inputs).float()
    nats = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    bits = nats.detach().mean(dim=1) / math.log(2)
    return nats.mean(), bits, torch.full_like(bits, targets.shape[1])


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Return AdamW's two groups: matrices and embeddings decay, norms do not."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def warm_up_then_cosine(total_updates: int, warm_up: float = 0.1, floor: float = 0.1) -> Callable[[int], float]:
    """Return the learning-rate factor as a function of the number of optimizer updates done, for LambdaLR.

    Args:
        total_updates: optimizer updates of the whole training.
        warm_up: share of them spent on rising linearly.
        floor: factor at the end, and beyond it.
    """
    warm_up_updates = max(1, round(warm_up * total_updates))

    def factor(update: int) -> float:
        if update < warm_up_updates:
            return (update + 1) / warm_up_updates
        progress = min(1.0, (update - warm_up_updates) / max(1, total_updates - warm_up_updates))
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))

    return factor
