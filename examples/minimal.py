"""The smallest crash-proof training. New here: one `Trainer` call. Kill it, run it again: it continues.

python examples/minimal.py
torchrun --nproc-per-node 2 examples/minimal.py
accelerate launch examples/minimal.py
"""

import argparse
import sys

import torch

import dist_train as dt


def main() -> int:
    """Fit y = x·w with a linear layer; returns the exit code for the shell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", default="runs/minimal")
    parser.add_argument("--epochs", type=int, default=5)
    args = parser.parse_args()

    inputs = torch.randn(2048, 8, generator=torch.Generator().manual_seed(0))
    targets = inputs @ torch.arange(8.0)
    data = torch.utils.data.TensorDataset(inputs, targets)

    dt.seed_everything(0)
    model = torch.nn.Linear(8, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    def loss_fn(model: torch.nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
        return torch.nn.functional.mse_loss(model(batch[0]).squeeze(1), batch[1])

    config = dt.TrainConfig(run_dir=args.run_dir, epochs=args.epochs, global_batch_size=64, micro_batch_size=16)
    return dt.Trainer(model, optimizer, train_data=data, loss=loss_fn, config=config).fit().exit_code


if __name__ == "__main__":
    sys.exit(main())
