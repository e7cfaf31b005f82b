"""Faults of one place each, every one of which changes a number that a user sees; plant.py plants them.

A fault lives with its part of the code, in faults_training.py, faults_engine.py, faults_mathematics.py or
faults_elsewhere.py.
"""

from __future__ import annotations

from fault_rows import Fault
from faults_elsewhere import ELSEWHERE
from faults_engine import ENGINE, MODELS
from faults_mathematics import BONUS, GRPO, MEMBERS
from faults_training import AROUND, LOOP, UPDATES

__all__ = ["FAULTS", "Fault"]

FAULTS = [*LOOP, *UPDATES, *ENGINE, *AROUND, *GRPO, *BONUS, *MEMBERS, *MODELS, *ELSEWHERE]
