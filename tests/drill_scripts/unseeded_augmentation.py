"""Broken: the noise in a sample comes from a generator that nothing seeds."""

import numpy as np
import torch
from torch import nn

import dist_train as dt


class Noisy(torch.utils.data.Dataset):
    def __init__(self) -> None:
        self.inputs = torch.randn(40, 4, generator=torch.Generator().manual_seed(1))
        self.generator = np.random.default_rng()

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        noise = torch.from_numpy(self.generator.normal(size=4)).float()
        return self.inputs[index] + 0.1 * noise, self.inputs[index].sum()


dt.seed_everything(0)
model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1), nn.Flatten(0))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
loader = dt.data_loader(Noisy(), global_batch_size=4, seed=0)
with dt.Run("runs/noisy", model=model, optimizer=optimizer, loader=loader) as run:
    for _ in run.epochs(3):
        for x, y in run.batches(loader):
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            run.step(loss=loss)
