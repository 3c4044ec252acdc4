"""The table of what training scripts hold: name -> how it is built, and what a checkpoint keeps of it."""

from __future__ import annotations

from tests.support.kinds_changing import CHANGING
from tests.support.kinds_models import MODELS
from tests.support.kinds_objects import OBJECTS
from tests.support.kinds_optimizers import OPTIMIZERS
from tests.support.kinds_own import OWN_OPTIMIZERS, OWN_SCHEDULERS
from tests.support.kinds_schedulers import SCHEDULERS
from tests.support.scripts import Kind

SECTIONS: dict[str, dict[str, Kind]] = {
    "Models": MODELS | CHANGING,
    "Optimizers": OPTIMIZERS | OWN_OPTIMIZERS,
    "Schedulers": SCHEDULERS | OWN_SCHEDULERS,
    "Registered objects": OBJECTS,
}
KINDS: dict[str, Kind] = {name: kind for section in SECTIONS.values() for name, kind in section.items()}
