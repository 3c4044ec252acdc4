"""Faults on purpose: a plan of them, the process that suffers them, and the drill that compares what became of a run.

Invariant: nothing here runs in a training that was not asked to suffer: no module of the training imports it.
"""

from dist_train.drill.fault_plan import FaultPlan, FaultsMissedError
from dist_train.drill.faults import Fault, Fired

__all__ = ["Fault", "FaultPlan", "FaultsMissedError", "Fired"]
