"""Broken: the loss is scaled by a running mean that no checkpoint holds."""

import torch
from torch import nn

import dist_train as dt


def train() -> None:
    inputs = torch.randn(40, 4, generator=torch.Generator().manual_seed(1))
    data = torch.utils.data.TensorDataset(inputs, inputs.sum(1))
    dt.seed_everything(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1), nn.Flatten(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    loader = dt.data_loader(data, global_batch_size=4, seed=0)
    running_mean = 1.0
    with dt.Run("runs/outside", model=model, optimizer=optimizer, loader=loader) as run:
        for _ in run.epochs(3):
            for x, y in run.batches(loader):
                error = nn.functional.mse_loss(model(x), y)
                running_mean = 0.9 * running_mean + 0.1 * error.item()
                loss = error / running_mean
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                run.step(loss=loss)


train()
