"""Refuse a wrong number in one sentence."""

from augment.core.errors import UserError


def expect(holds: bool, what: str, got: object) -> None:
    """Raise a `UserError` if something does not hold.

    >>> expect(-1 >= 0, "alpha ≥ 0", -1)
    Traceback (most recent call last):
    augment.core.errors.UserError: expected alpha ≥ 0, got -1; choose another

    Args:
        holds: whether a value is right.
        what: name and range of the value.
        got: the value.
    """
    if not holds:
        raise UserError(f"expected {what}, got {got}; choose another")


def at_least(least: float, **values: float | None) -> None:
    """Refuse values that are smaller than a bound, by their names; None passes."""
    for name, value in values.items():
        expect(value is None or value >= least, f"{name} ≥ {least:g}", value)
