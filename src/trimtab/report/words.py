"""How numbers are written on the page: a true minus, an en dash between bounds, a dash where there is no number."""

import math

from trimtab.metrics import Interval

ABSENT = "\N{EN DASH}"


def score(value: float) -> str:
    """Two decimals, so that a column of scores lines up."""
    return ABSENT if not math.isfinite(value) else _minus(f"{value:.2f}")


def number(value: float) -> str:
    """Three significant digits, for numbers of any size."""
    return ABSENT if not math.isfinite(value) else _minus(f"{value:.3g}")


def signed(value: float) -> str:
    return ABSENT if not math.isfinite(value) else _minus(f"{value:+.2f}")


def percent(value: float) -> str:
    """0.12 is '+12%'."""
    return ABSENT if not math.isfinite(value) else _minus(f"{value:+.0%}")


def bounds(interval: Interval) -> str:
    """'low-high' with an en dash; 'low to high' where a minus would blur it; '' where a bound is unknown."""
    if not (math.isfinite(interval.low) and math.isfinite(interval.high)):
        return ""
    return f"{score(interval.low)}{ABSENT if interval.low >= 0 else ' to '}{score(interval.high)}"


def counted(count: float, noun: str) -> str:
    """'1 step', '1,200 steps'."""
    return f"{count:,.0f} {noun}{'' if count == 1 else 's'}"


def duration(seconds: float) -> str:
    """Seconds up to two minutes, minutes up to two hours, then hours."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def listed(names: list[str]) -> str:
    """'a', 'a and b', 'a, b and c'."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _minus(text: str) -> str:
    return text.replace("-", "\N{MINUS SIGN}")
