"""The price model: hashed words and character n-grams -> EmbeddingBag -> MLP -> log(1 + price), its loss and schedule.

Plain PyTorch, no dist_train in here. Invariant: the model speaks log(1 + price) inside and the file's currency outside
(`prices`), so that a SMAPE of 20 % means the same for a sachet and for a pallet.
"""

import math
from collections.abc import Callable

import torch
from data import NUM_BUCKETS, NUM_NUMBERS
from torch import Tensor, nn

MIN_PRICE = 0.01
MAX_LOG_PRICE = 16.0
"""Upper bound of log(1 + price), about nine million: a wild prediction must not become infinite."""
EMBEDDING_SCALE = 16.0
"""The table holds values of 1/16 of what the network sees: an Adam step of 1e-4 then moves a word by 1.6e-3, without
which a learning rate as low as ULTRA's would leave the embeddings where they were initialised."""


class PriceModel(nn.Module):
    """About one million parameters, most of them in the embedding table."""

    def __init__(self, *, width: int = 48, hidden: int = 384, dropout: float = 0.1, start: float = 0.0) -> None:
        """Build the model; `start` is the log(1 + price) it predicts before it has learnt anything."""
        super().__init__()
        self.embedding = nn.EmbeddingBag(NUM_BUCKETS, width, mode="mean", padding_idx=0)
        nn.init.normal_(self.embedding.weight, std=1.0 / EMBEDDING_SCALE)
        with torch.no_grad():
            self.embedding.weight[0].zero_()
        self.layers = nn.Sequential(
            nn.LayerNorm(width + NUM_NUMBERS),
            nn.Linear(width + NUM_NUMBERS, hidden),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Dropout(dropout),
        )
        self.head = nn.Linear(hidden, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.constant_(self.head.bias, start)

    def forward(self, tokens: Tensor, numbers: Tensor) -> Tensor:
        """Return log(1 + price) [batch], float32, from tokens [batch, MAX_TOKENS] and numbers [batch, NUM_NUMBERS]."""
        words = self.embedding(tokens) * EMBEDDING_SCALE
        return self.head(self.layers(torch.cat([words, numbers], dim=1))).squeeze(1).float()


def to_price(log_price: Tensor) -> Tensor:
    """Turn log(1 + price) into a price of at least MIN_PRICE."""
    return torch.expm1(log_price.clamp(max=MAX_LOG_PRICE)).clamp(min=MIN_PRICE)


def price_loss(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return (mean smooth L1 of log(1 + price), predicted prices [batch], true prices [batch]).

    An error in the logarithm is a relative error of the price, which is what SMAPE measures.
    """
    log_price = model(batch["tokens"], batch["numbers"])
    loss = nn.functional.smooth_l1_loss(log_price, torch.log1p(batch["price"]), beta=0.1)
    return loss, to_price(log_price.detach()), batch["price"]


def warm_up_then_cosine(total_updates: int, warm_up: float = 0.05, floor: float = 0.05) -> Callable[[int], float]:
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
