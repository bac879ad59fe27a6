"""Numbers as people read them."""

from __future__ import annotations


def engineering(number: float) -> str:
    """Format a number with three digits and a unit.

    >>> engineering(11181642), engineering(950)
    ('11.2 M', '950')
    """
    for factor, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= factor:
            return f"{number / factor:.3g} {unit}"
    return f"{number:.4g}"


def percent(share: float) -> str:
    """Format a share as a percentage with two decimals; all and nothing get none.

    >>> percent(0.98765), percent(1), percent(0)
    ('98.77 %', '100 %', '0 %')
    """
    return f"{share:.0%}".replace("%", " %") if share in (0, 1) else f"{share:.2%}".replace("%", " %")


def duration(seconds: float) -> str:
    """Format a duration in the unit that fits.

    >>> duration(0.00231), duration(4.2), duration(250), duration(9000)
    ('2.31 ms', '4.2 s', '4.2 min', '2.5 h')
    """
    for unit, name in ((3600, "h"), (60, "min"), (1, "s")):
        if seconds >= unit:
            return f"{seconds / unit:.3g} {name}" if name == "s" else f"{seconds / unit:.1f} {name}"
    return f"{seconds * 1e3:.3g} ms"


def short(value: float) -> str:
    """Format a number with two digits in little room, without the leading zero.

    >>> short(0.0123), short(0.5), short(1.04), short(12.3), short(0.0002), short(0)
    ('.012', '.50', '1.0', '12', '<.001', '0')
    """
    if not value:
        return "0"
    if value < 0.001:
        return "<.001"
    if value >= 10:
        return f"{value:.0f}"
    if value >= 0.995:
        return f"{value:.1f}"
    digits = 2 if value >= 0.0995 else 3
    return f"{value:.{digits}f}".removeprefix("0")


def grouped(number: int) -> str:
    """Format all digits of a number in groups of three, with narrow spaces between the groups.

    >>> grouped(11181642).split("\u202f")
    ['11', '181', '642']
    """
    return f"{number:,}".replace(",", "\u202f")


def plural(number: int, one: str, many: str | None = None) -> str:
    """Format a number and the word for what it counts.

    >>> plural(1, "site"), plural(3, "site"), plural(2, "branch", "branches")
    ('1 site', '3 sites', '2 branches')
    """
    return f"{grouped(number)} {one if number == 1 else many or f'{one}s'}"
