"""Models whose ends Accelerate would make units of, though they lie in others or are tied to them; for every rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import dist_train as dt
from dist_train.sharding import find_units
from tests.support.fsdp_parts import Block, whole


class Ends(nn.Module):
    """What transformers' models have, and Accelerate asks."""

    base_model_prefix = ""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Embedding(11, 7)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm = nn.LayerNorm(7)
        self.head = nn.Linear(7, 11, bias=False)

    def get_input_embeddings(self) -> nn.Module:
        return self.shared

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        inner = self.shared(ids)
        for block in self.blocks:
            inner = block(inner)
        logits: torch.Tensor = self.head(self.norm(inner))
        return logits


class ThreeEnds(Ends):
    """As T5 and BART: the embedding has a third place."""

    _no_split_modules = ("Block",)

    def __init__(self) -> None:
        super().__init__()
        self.decoder_tokens = nn.Embedding(11, 7)
        self.head.weight = self.decoder_tokens.weight = self.shared.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) + self.decoder_tokens(ids).sum()


class Embeddings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.norm = nn.Embedding(11, 7), nn.LayerNorm(7)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.norm(self.words(ids))  # type: ignore[no-any-return]


class EndInUnit(Ends):
    """As BERT and ViT: the embedding lies in what the model names as a unit."""

    _no_split_modules = ("Embeddings", "Block")

    def __init__(self) -> None:
        super().__init__()
        self.shared = Embeddings()  # type: ignore[assignment]

    def get_input_embeddings(self) -> nn.Module:
        return self.shared.words  # type: ignore[return-value]


class TiedToUnit(EndInUnit):
    """As BERT for masked words: the head is tied to it besides, so that its unit cannot be one."""

    def __init__(self) -> None:
        super().__init__()
        self.head.weight = self.shared.words.weight  # type: ignore[assignment]


class Repeated(Ends):
    """As ALBERT: one block in all places."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([self.blocks[0], self.blocks[0]])


KINDS = {one.__name__: one for one in (ThreeEnds, EndInUnit, TiedToUnit, Repeated)}


class Words(torch.utils.data.Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.randint(0, 11, (5,), generator=torch.Generator().manual_seed(index))


def loss_fn(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())


def train(folder: str, sharding: str) -> dict[str, Any]:
    """By kind: the units, the whole weights after two updates, and whether the model's methods are its own again."""
    found = {}
    for name, kind in KINDS.items():
        torch.manual_seed(0)
        model = kind()
        units = find_units(model)
        trainer = dt.Trainer(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            train_data=Words(),
            loss=loss_fn,
            config=dt.TrainConfig(
                run_dir=f"{folder}/{sharding}-{name}", epochs=1, global_batch_size=4, cpu=True, sharding=sharding
            ),
        )
        trainer.fit()
        inner: Any = getattr(trainer.model, "module", trainer.model)
        weights = {key: whole(value).tolist() for key, value in inner.state_dict().items()}
        found[name] = {"units": units, "weights": weights, "own": inner.get_output_embeddings() is inner.head}
    return found
