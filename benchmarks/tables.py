"""Print the recorded results as Markdown tables, as the pages in `docs/` show them.

python -m benchmarks.tables [NAME ...]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.common import RESULTS
from benchmarks.training_quality_tables import QUALITY_TABLES
from benchmarks.training_tables import TRAINING_TABLES, markdown


def split_decode(result: Mapping[str, Any]) -> str:
    """Tokens per second with their spread, and the ratio to transformers in the same run."""
    rates = result["tokens_per_second"]
    rows = [
        [
            name.replace("_", " "),
            f"{rate['median']:.1f} [{rate['min']:.1f}-{rate['max']:.1f}]",
            f"{rate['median'] / rates['transformers_float32']['median']:.2f}",
            f"{rate['median'] / rates['transformers_bfloat16']['median']:.2f}",
        ]
        for name, rate in rates.items()
    ]
    head = ["weights and sessions", "tokens/s, median [range]", "x transformers float32", "x transformers bfloat16"]
    speeds = markdown(head, rows)
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
    """Gigabytes of weights per second by shape, way and rows."""
    counts = sorted({row["rows"] for row in result["rows"]} - {0})
    table: dict[tuple[str, str], dict[int, str]] = {}
    for row in result["rows"]:
        shape = f"{row['out']} x {row['in']}"
        table.setdefault((shape, row["way"]), {})[row["rows"]] = f"{row['gb_s']:.1f}"
    rows = []
    for (shape, way), rates in table.items():
        if way == "read":
            rows.append([shape, "straight reading", rates[0], *[""] * (len(counts) - 1)])
        else:
            rows.append([shape, way, *(rates.get(count, "") for count in counts)])
    return markdown(["weights", "GB/s of", *(f"{count} rows" for count in counts)], rows)


def edge_share(result: Mapping[str, Any]) -> str:
    """Time and memory of an 8B model's edge share, beside the time of reading its bytes."""
    rows = [
        [
            row["weights"],
            f"{row['read_bytes_per_token'] / 1e9:.2f}",
            f"{row['token_ms']['median']:.0f} [{row['token_ms']['min']:.0f}-{row['token_ms']['max']:.0f}]",
            f"{row['memory_limit_ms']['median']:.0f}",
            f"{row['token_ms']['median'] / row['memory_limit_ms']['median']:.2f}",
            f"{row['held_bytes'] / 1e9:.2f}",
            f"{row['load_seconds']:.0f}",
        ]
        for row in result["rows"]
    ]
    head = [
        "weights",
        "GB read a token",
        "ms/token, median [range]",
        "ms to read them",
        "ratio",
        "GB held",
        "s to load",
    ]
    return markdown(head, rows)


def control_plane(result: Mapping[str, Any]) -> str:
    """Steps per second of a server without a device, and of an echo, by load."""
    rows = []
    for setting in result["settings"]:
        server, echo = setting["server"], setting["echo"]
        load = f"{setting['sessions']} / {setting['connections']} / {setting['in_flight']}"
        each = server["steps_per_second"]
        rows.append(
            [
                load,
                f"{each['median']:,.0f} [{each['min']:,.0f}-{each['max']:,.0f}]",
                f"{server['per_cpu_second']['median']:,.0f}",
                f"{echo['steps_per_second']['median']:,.0f}",
            ]
        )
    head = ["sessions / connections / in flight", "steps/s, median [range]", "steps per CPU second", "echo, steps/s"]
    return markdown(head, rows)


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


def quality(result: Mapping[str, Any]) -> str:
    """Agreement of greedy tokens, the margins where they differ, and perplexity over that of float32."""
    exact = {row["model"]: row["perplexity"] for row in result["rows"] if row["agreement"] == 1 and _is_exact(row)}
    rows = []
    for row in result["rows"]:
        variant, different = row["variant"], row["margin_where_different"]
        shown = "-" if different is None else f"{different['p50']:.3f} / {different['p90']:.3f}"
        weights = variant["dtype"] if variant["quantization"] == "none" else variant["quantization"]
        base = exact[row["model"]]
        texts = [f"{100 * (value / base[name] - 1):+.2f}%" for name, value in row["perplexity"].items()]
        changed = "" if _is_exact(row) else " ".join(texts[: 1 if row["model"] == "demo" else None])
        rows.append([row["model"], weights, variant["kv"], variant["codec"], f"{row['agreement']:.2%}", shown, changed])
    texts = ", ".join(next(iter(exact.values())))
    head = ["model", "weights", "KV", "wire", "same token", "margin where different, p50 / p90"]
    return markdown([*head, f"perplexity: {texts}"], rows)


def _is_exact(row: Mapping[str, Any]) -> bool:
    return list(row["variant"].values()) == ["float32", "none", "float32", "fp32"]


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


def links_speculation(result: Mapping[str, Any]) -> str:
    """Speed and tokens per round trip, by model, round trip and source of guesses."""
    rows = [
        [
            where.replace("_", ", "),
            mode,
            f"{found['tokens_per_second']:.1f}",
            f"{found['tokens_per_second'] / modes['off']['tokens_per_second']:.2f}",
            f"{found['tokens_per_round_trip']:.2f}",
            f"{found['guesses_per_round_trip']:.1f}",
        ]
        for where, modes in result["speculation"].items()
        for mode, found in modes.items()
    ]
    head = ["model, round trip", "guesses from", "tokens/s", "x off", "tokens per round trip", "guesses per round trip"]
    return markdown(head, rows)


def links_step(result: Mapping[str, Any]) -> str:
    """What a step is made of, in ms, by weights and link."""
    names = ("step_ms", "edge_ms", "server_ms", "overhead_ms")
    rows = [
        [
            where.replace("_", ", "),
            f"{found['tokens_per_second']['median']:.1f}",
            *(f"{found[name]['median']:.2f} [{found[name]['min']:.2f}-{found[name]['max']:.2f}]" for name in names),
        ]
        for where, found in result["step"].items()
    ]
    return markdown(["weights, link", "tokens/s", "step ms", "edge ms", "server ms", "overhead ms"], rows)


def links_prefill(result: Mapping[str, Any]) -> str:
    """The first token of a long prompt, and what bounds it."""
    rows = [
        [name, *(f"{found[key]:.2f}" for key in ("median", "min", "max"))] for name, found in result["prefill"].items()
    ]
    return markdown(["", "median", "min", "max"], rows)


def links_parallel(result: Mapping[str, Any]) -> str:
    """One chat and sixteen through one gateway."""
    rows = [
        [name, *(f"{found[key]:.2f}" for key in ("median", "min", "max"))]
        for name, found in result["parallel"].items()
        if isinstance(found, dict)
    ]
    return markdown(["", "median", "min", "max"], rows)


def speculation_offline(result: Mapping[str, Any]) -> str:
    """Tokens per round trip by text, drafter and shape of the draft, greedy."""
    found = [(model["model"], row) for model in result["models"] for row in model["rows"] if row["temperature"] == 0]
    rows = [{**row, "text": f"{model.rpartition('/')[2]}, {row['text']}"} for model, row in found]
    shapes = list(dict.fromkeys(f"{row['shape']} {row['guesses']}" for row in rows))
    table: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        cells = table.setdefault((row["text"], row["drafter"]), {})
        cells[f"{row['shape']} {row['guesses']}"] = f"{row['tokens_per_round_trip']:.2f}"
    body = [[text, drafter, *(cells.get(shape, "") for shape in shapes)] for (text, drafter), cells in table.items()]
    return markdown(["text", "drafter", *shapes], body)


PARTS_OF = ("links", "speculation", "training_speed", "training_memory", "training_beside_chat", "training_quality")


def _record_name(function: str) -> str:
    """A record of a part is named BENCHMARK-PART."""
    benchmark = next((name for name in PARTS_OF if function.startswith(f"{name}_")), None)
    return function if benchmark is None else f"{benchmark}-{function.removeprefix(f'{benchmark}_')}"


TABLES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    _record_name(function.__name__): function
    for function in (
        split_decode,
        edge_share,
        control_plane,
        wire_bytes,
        products,
        ablation,
        startup,
        quality,
        recover_tokens,
        links_speculation,
        links_step,
        links_prefill,
        links_parallel,
        speculation_offline,
        *TRAINING_TABLES,
        *QUALITY_TABLES,
    )
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
