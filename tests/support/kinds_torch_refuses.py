"""What torch itself cannot do after `fully_shard`: it raises when the model is sharded or at the first update, without
the library. Where a later torch can, the test says so: it is time for a case among those that are sharded.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import optim

from tests.support.kinds_changing import Scalars
from tests.support.kinds_models import Images, averaged
from tests.support.kinds_optimizers import EightBit, Nested, plain_layers, with_closure
from tests.support.kinds_sharded import of, shard
from tests.support.scripts import Script, network

TORCH_REFUSES: dict[str, tuple[Callable[[], Script], str]] = {
    "Adafactor": (of(plain_layers, lambda m: optim.Adafactor(m.parameters(), lr=0.05)), "placement"),
    "LBFGS": (
        with_closure(lambda m: optim.LBFGS(m.parameters(), max_iter=3, history_size=2), shard),
        "sharded dimension",
    ),
    "LBFGS with line search": (
        with_closure(lambda m: optim.LBFGS(m.parameters(), max_iter=3, line_search_fn="strong_wolfe"), shard),
        "sharded dimension",
    ),
    "Muon": (
        of(plain_layers, lambda m: optim.Muon([p for p in m.parameters() if p.dim() == 2], lr=0.05)),
        "placement",
    ),
    "Shampoo-like, nested": (of(plain_layers, lambda m: Nested(m.parameters())), "mixed torch.Tensor and DTensor"),
    "8-bit blocks": (of(plain_layers, lambda m: EightBit(m.parameters())), "mixed torch.Tensor and DTensor"),
    "channels_last": (of(Images), "non-contiguous parameters"),
    "parameters of no dimension, of no element": (of(Scalars), "scalar parameters"),
    "AveragedModel of torch": (
        of(network, registered=lambda m, _: {"average": averaged(m)}),
        "does not support deepcopy",
    ),
}
