"""Print the recorded results as Markdown tables, as `docs/performance.md` and `docs/privacy.md` show them.

python -m benchmarks.tables [NAME ...]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from benchmarks.common import RESULTS


def markdown(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Lay rows out as a table."""
    head = list(head)
    lines = [head, ["---"] * len(head), *([str(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def split_decode(result: Mapping[str, Any]) -> str:
    """Tokens per second with their spread, and the ratio to transformers in the same run."""
    rates = result["tokens_per_second"]
    base = rates["transformers"]["median"]
    rows = [
        [name, f"{rate['median']:.1f} [{rate['min']:.1f}-{rate['max']:.1f}]", f"{rate['median'] / base:.2f}"]
        for name, rate in rates.items()
    ]
    speeds = markdown(["", "tokens/s, median [range]", "x transformers"], rows)
    outside = [
        [
            name,
            f"{part['mean_ms']:.2f}",
            f"{part['p50_below_ms']:g}",
            f"{part['p99_below_ms']:g}",
            f"{part['steps']:.0f}",
        ]
        for name, part in result["server_outside_model_last_round"].items()
    ]
    head = ["server time outside the model per step, ms", "mean", "p50 below", "p99 below", "steps"]
    return f"{speeds}\n\n{markdown(head, outside)}"


def wire_bytes(result: Mapping[str, Any]) -> str:
    """Bytes of a one-token step and its reply."""
    rows = [[row[key] for key in ("width", "codec", "payload", "up", "down")] for row in result["rows"]]
    return markdown(["width", "codec", "payload", "up", "down"], rows)


def products(result: Mapping[str, Any]) -> str:
    """Gigabytes of weights per second by shape and rows."""
    rows = [
        [f"{row['out']} x {row['in']}", row["rows"], f"{row['linear_gb_s']:.1f}", f"{row['project_gb_s']:.1f}"]
        for row in result["rows"]
    ]
    return markdown(["weights", "rows", "`F.linear`, GB/s", "`project`, GB/s"], rows)


def ablation(result: Mapping[str, Any]) -> str:
    """Milliseconds and bytes per token by context, cache and mask."""
    rows = [
        [
            row["context"],
            row["kv_cache"],
            row["mask"],
            f"{row['ms_per_token']:.0f}",
            f"{row['bytes_up'] + row['bytes_down']:,}",
            f"{row['mask_bytes']:,}",
            f"{row['link_ms']:.0f}",
        ]
        for row in result["rows"]
    ]
    link = f"ms at {result['options']['mbit']:g} Mbit/s"
    return markdown(["context", "KV cache", "mask", "ms/token", "state bytes", "mask bytes", link], rows)


def startup(result: Mapping[str, Any]) -> str:
    """Seconds until something is there."""
    rows = [
        [name.replace("_", " "), f"{value['median']:.2f} [{value['min']:.2f}-{value['max']:.2f}]"]
        for name, value in result["seconds"].items()
    ]
    return markdown(["", "seconds, median [range]"], rows)


def agreement(result: Mapping[str, Any]) -> str:
    """Agreement of greedy tokens, and the margins."""
    rows = []
    for row in result["rows"]:
        different, everywhere = row["margin_where_different"], row["margin_everywhere"]
        shown = "-" if different is None else f"{different['p50']:.3f} / {different['p90']:.3f}"
        share, all_margins = f"{row['agreement']:.2%}", f"{everywhere['p10']:.2f} / {everywhere['p50']:.2f}"
        rows.append([row["model"], row["dtype"], row["codec"], share, row["positions"], shown, all_margins])
    head = ["model", "compute", "wire", "same token", "positions", "margin where different, p50 / p90"]
    return markdown([*head, "margin everywhere, p10 / p50"], rows)


def recover_tokens(result: Mapping[str, Any]) -> str:
    """Share of tokens recovered by noise and partition."""
    rows = [
        [
            row["model"],
            row["p"],
            row["noise_mean_abs"],
            f"{row['vocabulary_matching']:.0%}",
            f"{row['nearest_embedding']:.0%}",
        ]
        for row in result["rows"]
    ]
    return markdown(["model", "p", "noise, mean size", "vocabulary matching", "nearest embedding"], rows)


TABLES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    function.__name__: function
    for function in (split_decode, wire_bytes, products, ablation, startup, agreement, recover_tokens)
}


def main() -> None:
    """Print the tables of the results named, or of all that are there."""
    for name in sys.argv[1:] or TABLES:
        path = RESULTS / f"{name}.json"
        if not path.is_file():
            print(f"no results for {name}", file=sys.stderr)
            continue
        result = json.loads(path.read_text())
        where = result["machine"]
        print(f"\n`{result['command']}`, {result['date'][:10]}, {where['cpu']}, {where['cores']} cores\n")
        print(TABLES[name](result))


if __name__ == "__main__":
    main()
