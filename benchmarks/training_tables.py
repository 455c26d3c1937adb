"""The tables of what the benchmarks of split fine-tuning recorded; `benchmarks.tables` prints them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def markdown(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Lay rows out as a table."""
    head = list(head)
    lines = [head, ["---"] * len(head), *([str(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def training_speed_compute(result: Mapping[str, Any]) -> str:
    """Seconds for 1,000 samples beside the bound, and the bytes of a sample."""
    return _speed(result)


def training_speed_emulated(result: Mapping[str, Any]) -> str:
    """The same on emulated devices, with the gain over one client after the other."""
    return _speed(result)


def training_speed_overlap(result: Mapping[str, Any]) -> str:
    """The same with 1 and 4 micro-batches under way."""
    return _speed(result)


def _speed(result: Mapping[str, Any]) -> str:
    rows = []
    gains = any("speed_up" in line for line in result["lines"].values())
    for name, line in result["lines"].items():
        seconds = line["seconds"]
        row = [name, f"{seconds['median']:.1f} [{seconds['min']:.1f}-{seconds['max']:.1f}]"]
        if "bound" in line:
            share = line["of_bound"]
            row += [
                f"{line['bound']['median']:.1f}, {line['bound_by']}",
                f"{share['median']:.0%} [{share['min']:.0%}-{share['max']:.0%}]",
                f"{line['bytes_up']['median'] / 1000:.1f} / {line['bytes_down']['median'] / 1000:.1f}",
            ]
        else:
            row += ["", "", ""]
        rows.append([*row, f"{line['speed_up']:.2f}"] if gains else row)
    head = ["", "s for 1,000 samples, median [range]", "bound, s, and by what", "of the bound", "kB a sample up / down"]
    return markdown([*head, "x sequential"] if gains else head, rows)


def training_bytes(result: Mapping[str, Any]) -> str:
    """Kilobytes per sample, ours and the paper's."""
    rows = [
        [
            row["batch"],
            f"{row['states']} / {row['gradients']}",
            f"{row['up'] / 1000:,.0f}",
            f"{row['down'] / 1000:,.0f}",
            f"{row['paper'] / 1000:,.0f}",
            f"{row['ours_over_paper']:.2f}",
            f"{row['beyond_values']:.2%}",
        ]
        for row in result["rows"]
    ]
    head = ["batch", "states / gradients", "kB up", "kB down", "the paper's kB", "ours / the paper's", "beyond values"]
    return markdown(head, rows)


def training_memory_sets(result: Mapping[str, Any]) -> str:
    """MB of one base with M weight sets, and of M bases with theirs."""
    rows = []
    for row in result["rows"]:
        one, copies = row["one_base"], row["copies"]
        rows.append(
            [
                row["clients"],
                f"{(one['base_bytes'] + one['sets_bytes']) / 1e6:.0f}",
                f"{(one['base_rss'] + one['sets_rss']) / 1e6:.0f}",
                f"{one['sets_rss'] / row['clients'] / 1e6:.1f}",
                f"{(copies['base_bytes'] + copies['sets_bytes']) / 1e6:.0f}",
                f"{(copies['base_rss'] + copies['sets_rss']) / 1e6:.0f}",
                f"{one['after_pass_rss'] / 1e6:.0f}",
            ]
        )
    head = ["clients", "one base, MB of tensors", "resident MB", "a set", "as many bases, MB of tensors", "resident MB"]
    return markdown([*head, "MB that a joint pass leaves resident"], rows)


def training_memory_activations(result: Mapping[str, Any]) -> str:
    """The most that a server held, beside the limit, and what that costs."""
    rows = [
        [
            f"{row['limit_bytes'] / 2**20:.0f}" + ", recompute" * row["recompute"],
            f"{row['activation_bytes'] / 2**20:.0f}",
            f"{row['peak_rss'] / 2**20:.0f}",
            f"{row['seconds_per_sample'] * 1000:.1f}",
        ]
        for row in result["rows"]
    ]
    return markdown(["limit, MiB", "held by its own count, MiB", "resident beyond idle, MiB", "ms a sample"], rows)


def training_beside_chat_default(result: Mapping[str, Any]) -> str:
    """Milliseconds between tokens, with and without a job."""
    return _beside(result["default"], "")


def training_beside_chat_small(result: Mapping[str, Any]) -> str:
    """The same with a smaller model."""
    return _beside(result["small"], "")


def training_beside_chat_unpinned(result: Mapping[str, Any]) -> str:
    """The same with all on both cores."""
    return _beside(result["unpinned"], "")


def training_beside_chat_sweep(result: Mapping[str, Any]) -> str:
    """The same by share and quantum."""
    tables = [_beside(found, f"{name}, ") for name, found in result["sweep"].items()]
    return "\n".join([tables[0], *("\n".join(table.splitlines()[2:]) for table in tables[1:])])


def _beside(found: Mapping[str, Any], where: str) -> str:
    rows = []
    for name, one in found.items():
        if not isinstance(one, dict):
            continue
        times = [f"{one[f'{side}_{p}']:.1f}" for side in ("alone", "beside") for p in ("p50", "p99")]
        ratios = [f"{one[f'ratio_{p}']:.2f}" for p in ("p50", "p99")]
        rows.append([where + name, *times, *ratios, f"{one['job_share']:.2f} ({found['job_share_alone']:.2f})"])
    head = ["", "alone, ms p50", "p99", "with a job, p50", "p99", "ratio p50", "ratio p99"]
    return markdown([*head, "the job's share of the server (without chat)"], rows)


TRAINING_TABLES = (
    training_speed_compute,
    training_speed_emulated,
    training_speed_overlap,
    training_bytes,
    training_memory_sets,
    training_memory_activations,
    training_beside_chat_default,
    training_beside_chat_small,
    training_beside_chat_sweep,
    training_beside_chat_unpinned,
)
