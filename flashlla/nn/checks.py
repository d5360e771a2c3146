"""Checks of the numbers that modules are made with."""

from __future__ import annotations

from numbers import Real

from flashlla import checks


def check_whole(**numbers: int) -> None:
    """Each a whole number of at least 1."""
    wanted = "a whole number of at least 1"
    for name, number in numbers.items():
        if checks.check_whole(number, name, wanted) < 1:
            raise ValueError(f"{name}: got {number}, wanted {wanted}")


def check_numbers(**numbers: float) -> None:
    """Each a number, of whatever size."""
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, Real):
            raise TypeError(f"{name}: got {type(number).__name__}, wanted a number; try float({name})")
