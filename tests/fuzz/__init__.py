"""Random calls of the operators against the oracle: ``python -m tests.fuzz --help``."""

from tests.fuzz.calls import Call
from tests.fuzz.check import Fault, check

__all__ = ["Call", "Fault", "check"]
