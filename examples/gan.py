"""Two models that train against each other, and an average of one of them.

New here: several models, optimizers and schedulers, each under its name; one accumulation window for both; an
exponential moving average that is registered, survives a kill, and is what gets evaluated; a callback.

The data are points on a ring of eight Gaussians in the plane: what a generator forgets first is a part of the ring.

    python examples/gan.py --run-dir runs/gan
    torchrun --nproc-per-node 2 --max-restarts 3 examples/gan.py --cpu
"""

import argparse
import math
import sys

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import dist_train as dt

NOISE = 8
ANGLES = torch.arange(8) * (math.pi / 4)
CENTRES = torch.stack([ANGLES.cos(), ANGLES.sin()], dim=1)


def ring(samples: int) -> torch.utils.data.TensorDataset:
    """Points [samples, 2] near the eight centres."""
    generator = torch.Generator().manual_seed(0)
    which = torch.randint(8, (samples,), generator=generator)
    return torch.utils.data.TensorDataset(CENTRES[which] + 0.05 * torch.randn(samples, 2, generator=generator))


def network(inputs: int, outputs: int) -> nn.Module:
    """Return a small network."""
    return nn.Sequential(
        nn.Linear(inputs, 64), nn.LeakyReLU(0.2), nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, outputs)
    )


def distance(generator: nn.Module, device: torch.device) -> float:
    """Mean distance of each centre to the generated point that is nearest to it: large where a part is forgotten."""
    noise = torch.randn(512, NOISE, generator=torch.Generator().manual_seed(1)).to(device)
    return float(torch.cdist(CENTRES, generator(noise).float().cpu()).min(dim=1).values.mean())


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", default="runs/gan")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--samples", type=int, default=4096)
    parser.add_argument("--cpu", action="store_true", help="use the CPU although there is a GPU")
    return parser.parse_args()


def main() -> int:
    """Train; returns the exit code for the shell."""
    args = parse_args()
    dt.init_distributed()
    accelerator = Accelerator(cpu=args.cpu)
    dt.seed_everything(0)
    models = {"generator": network(NOISE, 2), "critic": network(2, 1)}
    optimizers = {
        name: torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.5, 0.99)) for name, model in models.items()
    }
    schedulers = {name: torch.optim.lr_scheduler.ExponentialLR(one, 0.9999) for name, one in optimizers.items()}
    models = {name: accelerator.prepare(model) for name, model in models.items()}
    optimizers = {name: accelerator.prepare(one) for name, one in optimizers.items()}
    generator, critic = models["generator"], models["critic"]
    bare_generator, bare_critic = accelerator.unwrap_model(generator), accelerator.unwrap_model(critic)
    average = AveragedModel(bare_generator, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    torch.manual_seed(1 + accelerator.process_index)  # the models are equal on all ranks, the noise must not be

    loader = dt.data_loader(ring(args.samples), global_batch_size=256, micro_batch_size=64, seed=0)

    def train_on(real: Tensor, weight: float) -> Tensor:
        """One micro-batch for both; returns the critic's loss."""
        fake = generator(torch.randn(len(real), NOISE, device=real.device))
        truth = torch.cat([torch.ones(len(real), 1), torch.zeros(len(real), 1)]).to(real.device)
        loss = bce(critic(torch.cat([real, fake.detach()])), truth)
        accelerator.backward(loss * weight)
        bare_critic.requires_grad_(False)  # or the generator's loss would leave its gradient in the critic's window
        accelerator.backward(bce(bare_critic(fake), torch.ones(len(real), 1, device=real.device)) * weight)
        bare_critic.requires_grad_(True)
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad()
        return loss

    policy = dt.CheckpointPolicy(every_steps=10, monitor="val_distance", mode="min")
    parts = {"model": models, "optimizer": optimizers, "scheduler": schedulers, "loader": loader}
    with dt.Run(args.run_dir, accelerator=accelerator, policy=policy, **parts) as run:
        run.register("average", average)
        run.on("committed", lambda now: print(f"step {now.global_step} is safe in {now.path}"))
        for _ in run.epochs(args.epochs):
            for (real,) in run.batches(loader):
                with accelerator.accumulate(generator, critic):
                    loss = train_on(real, run.loss_weight)
                if accelerator.sync_gradients and not accelerator.optimizer_step_was_skipped:
                    for scheduler in schedulers.values():
                        scheduler.step()
                    average.update_parameters(bare_generator)
                run.step(loss=loss)
            with run.evaluation("average") as smooth, run.evaluation("generator") as rough:
                metrics = {
                    "val_distance": distance(smooth, run.device),
                    "val_distance_now": distance(rough, run.device),
                }
            run.end_epoch(**metrics)
    return run.exit_code


if __name__ == "__main__":
    sys.exit(main())
