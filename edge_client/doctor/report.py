"""The findings as text, line by line, or as one JSON object."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from edge_client.doctor.finding import Finding, usable

LEVEL_WIDTH = 9
NAME_WIDTH = 13
LINE_WIDTH = 110


def as_text(finding: Finding) -> str:
    """Give one finding as lines; what to do stands below, indented."""
    indent = " " * (LEVEL_WIDTH + NAME_WIDTH)
    head = f"{finding.level:<{LEVEL_WIDTH}}{finding.name:<{NAME_WIDTH}}"
    lines = [textwrap.fill(finding.text, LINE_WIDTH, initial_indent=head, subsequent_indent=indent)]
    if finding.advice:
        lines.append(
            textwrap.fill(finding.advice, LINE_WIDTH, initial_indent=f"{indent}-> ", subsequent_indent=f"{indent}   ")
        )
    return "\n".join(lines)


def verdict(findings: Sequence[Finding], missed: Sequence[str]) -> str:
    """Give the last lines: what was not looked at, and whether it will do."""
    lines = [f"not checked because of that: {', '.join(missed)}"] if missed else []
    lines.append("usable" if usable(findings) else "not usable: see the problems above")
    return "\n".join(lines)


def as_json(findings: Sequence[Finding], missed: Sequence[str]) -> dict[str, Any]:
    """Give the whole report."""
    listed = [
        {
            "name": finding.name,
            "level": str(finding.level),
            "text": finding.text,
            "advice": finding.advice,
            "facts": dict(finding.facts),
        }
        for finding in findings
    ]
    return {"usable": usable(findings), "findings": listed, "not_checked": list(missed)}
