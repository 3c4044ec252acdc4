"""A script as many have it: its own loop, its own .pth files, nothing of dist_train. It is the one that is migrated.

python examples/migration/old_script.py --epochs 3
python examples/migration/old_script.py --epochs 6 --resume-from models/checkpoint_ultra_latest.pth
"""

import argparse
import os

import torch
from torch import nn

BATCHES_PER_EPOCH = 8


def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10 * BATCHES_PER_EPOCH)
    return model, optimizer, scheduler


def batches(epoch):
    generator = torch.Generator().manual_seed(epoch)
    for _ in range(BATCHES_PER_EPOCH):
        x = torch.rand(16, 6, generator=generator)
        yield x, 10 + x.sum(1, keepdim=True)


@torch.no_grad()
def validate(model):
    model.eval()
    x, y = next(batches(epoch=10**6))
    p = model(x)
    return (200 * (p - y).abs() / (p.abs() + y.abs())).mean().item()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--models", default="models")
    parser.add_argument("--resume-from")
    args = parser.parse_args()
    model, optimizer, scheduler = build()
    scaler = torch.amp.GradScaler(enabled=False)
    start_epoch, best_smape = 0, float("inf")
    if args.resume_from:
        checkpoint = torch.load(args.resume_from, weights_only=True)
        model.load_state_dict(checkpoint["model_state_dict"])
        optimizer.load_state_dict(checkpoint["optimizer_state_dict"])
        scheduler.load_state_dict(checkpoint["scheduler_state_dict"])
        scaler.load_state_dict(checkpoint["scaler_state_dict"])
        start_epoch, best_smape = checkpoint["epoch"] + 1, checkpoint["best_val_smape"]
        print(f"Resumed from epoch {start_epoch}, best SMAPE: {best_smape:.2f}%")
    os.makedirs(args.models, exist_ok=True)
    for epoch in range(start_epoch, args.epochs):
        model.train()
        total = 0.0
        for x, y in batches(epoch):
            loss = nn.functional.mse_loss(model(x), y)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            scheduler.step()
            total += loss.item()
        smape = validate(model)
        best_smape = min(best_smape, smape)
        print(
            f"Epoch {epoch + 1}/{args.epochs} - Train Loss: {total / BATCHES_PER_EPOCH:.4f} - Val SMAPE: {smape:.2f}%"
        )
        checkpoint = {
            "epoch": epoch,
            "model_state_dict": model.state_dict(),
            "optimizer_state_dict": optimizer.state_dict(),
            "scheduler_state_dict": scheduler.state_dict(),
            "scaler_state_dict": scaler.state_dict(),
            "val_smape": smape,
            "train_loss": total / BATCHES_PER_EPOCH,
            "best_val_smape": best_smape,
        }
        torch.save(checkpoint, os.path.join(args.models, "checkpoint_ultra_latest.pth"))
        torch.save(checkpoint, os.path.join(args.models, f"checkpoint_ultra_epoch_{epoch + 1}.pth"))


if __name__ == "__main__":
    main()
