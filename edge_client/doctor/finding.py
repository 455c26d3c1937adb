"""One line of the report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Level(StrEnum):
    """How bad it is."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class Finding:
    """What was looked at, how it stands, what that means, and what to do if it is not well."""

    name: str
    level: Level
    text: str
    advice: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)


def ok(name: str, text: str, **facts: Any) -> Finding:
    """All is well."""
    return Finding(name, Level.OK, text, "", facts)


def warning(name: str, text: str, advice: str, **facts: Any) -> Finding:
    """It works, but."""
    return Finding(name, Level.WARNING, text, advice, facts)


def problem(name: str, text: str, advice: str, **facts: Any) -> Finding:
    """It cannot work like this."""
    return Finding(name, Level.PROBLEM, text, advice, facts)


def usable(findings: Iterable[Finding]) -> bool:
    """Say whether nothing stands in the way."""
    return all(finding.level is not Level.PROBLEM for finding in findings)
