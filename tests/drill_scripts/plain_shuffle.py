"""Broken: the order of samples is that of a plain shuffling DataLoader, of which the run knows nothing."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dist_train as dt

dt.seed_everything(0)
inputs = torch.randn(40, 4, generator=torch.Generator().manual_seed(1))
loader = DataLoader(TensorDataset(inputs, inputs.sum(1)), batch_size=4, shuffle=True)
model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1), nn.Flatten(0))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
with dt.Run("runs/shuffled", model=model, optimizer=optimizer) as run:
    for _ in run.epochs(3):
        for x, y in loader:
            if run.should_stop:
                break
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            run.step(loss=loss)
