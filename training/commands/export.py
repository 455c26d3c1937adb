"""`split-train export`: one PEFT folder over the whole model, of what a client and the server hold."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from split_llama.errors import FlLlamaError, UsageError
from split_llama.settings import add_flags
from training.settings import SECTION, TrainSettings

if TYPE_CHECKING:
    from training.export import Parts

_SERVER_FLAGS = ("server", "api_key", "job_key", "ca_certs", "model")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.add_argument("run_folder", nargs="?", type=Path, metavar="RUN", help="the folder of a split-train run")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write, new or empty")
    parser.add_argument(
        "--client", metavar="DIR|NAME", help="a client's folder, or within RUN its name: whose A and C to take"
    )
    parser.add_argument("--shared", type=Path, metavar="FILE", help="what all share, as a file or PEFT folder")
    parser.add_argument("--job", metavar="ID", help="fetch what all share from this job of --server")
    parser.add_argument("--segments", metavar="A,B,C", help="segments that were trained; default: the job's, else all")
    parser.add_argument("--partition", metavar="P,Q", help="the job's partition; needed with --segments alone")
    parser.add_argument("--force", action="store_true", help="overwrite the adapter in a folder that is not empty")
    add_flags(parser, TrainSettings, _SERVER_FLAGS)


def run(arguments: argparse.Namespace) -> int:
    """Export; says on stderr what was written."""
    from split_llama.checkpoint import read_config
    from split_llama.hub import DEMO
    from training.export import merge_parts, write_merged

    parts = _gather(arguments)
    model = arguments.model or parts.base_model
    if not model:
        raise UsageError("which model were the adapters trained on? Give --model FOLDER|ORG/NAME|demo")
    folder = _model_folder(model, named=arguments.model is not None)
    config = read_config(folder)[1]
    adapter = merge_parts(parts.parts, config, _blocks(arguments, parts, config.num_hidden_layers))
    # A name that only this project knows would be of no use to others who read the folder.
    write_merged(arguments.out, adapter, str(folder) if model == DEMO else model, force=arguments.force)
    sources = ", ".join(part.source for part in parts.parts)
    sys.stderr.write(
        f"{arguments.out}: {len(adapter.tensors)} tensors of rank {adapter.lora.r}, from {sources}; "
        f"its base model is {folder}\n"
    )
    return 0


def _blocks(arguments: argparse.Namespace, parts: Parts, count: int) -> Sequence[int]:
    """Give the blocks that have adapters, of a model with `count`."""
    from split_llama.config import Partition
    from training.export import adapted_blocks

    segments = arguments.segments.replace(" ", "").split(",") if arguments.segments else parts.segments
    partition = arguments.partition or parts.partition
    if set(segments) == {"A", "B", "C"}:
        return range(count)
    if not partition:
        raise UsageError("which blocks are those of --segments? Give --partition P,Q too")
    return adapted_blocks(count, Partition.parse(partition), segments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Raises `FlLlamaError`."""
    parser = argparse.ArgumentParser(prog="split-train export", description=__doc__, allow_abbrev=False)
    add_arguments(parser)
    return run(parser.parse_args(arguments))


def _model_folder(model: str, *, named: bool) -> Path:
    from split_llama.hub import resolve_model

    try:
        return resolve_model(model)
    except FlLlamaError as error:
        if named:
            raise
        raise UsageError(
            f"the adapters name {model!r} as their base, which cannot be opened here; say where it is with --model "
            f"({error.message})"
        ) from error


def _gather(arguments: argparse.Namespace) -> Parts:
    from training.export import parts_of_files, parts_of_job, parts_of_run

    if arguments.run_folder is not None:
        if arguments.shared is not None or arguments.job is not None:
            raise UsageError("a run's folder has everything: leave out --shared and --job")
        return parts_of_run(arguments.run_folder, arguments.client)
    client = Path(arguments.client) if arguments.client is not None else None
    if arguments.shared is not None:
        if arguments.job is not None:
            raise UsageError("--shared and --job both say where the shared adapter is: give one of them")
        return parts_of_files(client, arguments.shared)
    if arguments.job is None:
        raise UsageError("what is to be exported? Give a run's folder, or --client with --shared or with --job")
    from split_llama.settings import load_settings

    flags = {name: getattr(arguments, name) for name in _SERVER_FLAGS}
    return parts_of_job(load_settings(TrainSettings, SECTION, flags).settings, arguments.job, client)
