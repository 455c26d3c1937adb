"""`split-train evaluate`: the scores of a model on a task, whole and split, as a table."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edge_client.settings import SECTION, AdapterChoice, EdgeSettings
from split_llama.config import Partition
from split_llama.errors import UsageError
from split_llama.settings import add_flags, load_settings

if TYPE_CHECKING:
    from training.evaluate.questions import Questions
    from training.evaluate.run import Plan
    from training.evaluate.table import Row

# The edge's settings that an evaluation takes. Partition and noise are not among them: it may be given several.
_EDGE_FLAGS = tuple(
    "server api_key ca_certs clip codec allow_embedding_states device dtype threads cache_dir state_dir".split()
)
USUAL_LENGTH = 2048
KINDS = ("central", "split")
KNOWS = ("adapter", "base")
_ANYWHERE = "http://127.0.0.1"


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    add = parser.add_argument
    add("--model", required=True, metavar="MODEL", help="the whole model: a folder, a hub id or demo")
    add("--task", default="auto", metavar="NAME", help="multirc, coqa, xsum, text ...; auto looks at the file")
    add("--data", type=Path, metavar="FILE", help="the task's examples; --task demo makes its own")
    add("--adapter", metavar="[NAME=]DIR", help="PEFT folder over the whole model; with --server its name there too")
    add("--partition", action="append", metavar="P,Q", help="may be given several times (default: 1,1)")
    add("--noise", action="append", metavar="SIGMA", help="a row with this noise too; may be given several times")
    add("--rows", default="central,split", metavar="central,split", help="which kinds of rows (default: both)")
    attacks = "nearest-embedding, vocabulary-matching or MODULE:CLASS"
    add("--attack", metavar="NAME", help=f"attack the rows that the server is sent: {attacks}")
    add("--attack-texts", type=_count, default=8, metavar="N", help="attack the first N examples (default: 8)")
    add("--attack-tokens", type=_count, default=32, metavar="N", help="the first N tokens of each (default: 32)")
    add("--attack-knows", choices=KNOWS, default=KNOWS[0], help="does the server have A's adapter? (default: adapter)")
    add("--limit", type=_count, metavar="N", help="only the first N examples")
    add("--max-length", type=_count, metavar="N", help="tokens of an example (default: the context, at most 2048)")
    add("--max-new-tokens", type=_count, default=64, metavar="N", help="tokens of a free answer (default: 64)")
    add("--batch", type=_count, default=16, metavar="N", help="sequences at once (default: 16)")
    add("--json", action="store_true", help="print one JSON object instead of the table")
    add("--quiet", action="store_true", help="nothing on stderr but errors")
    add_flags(parser, EdgeSettings, _EDGE_FLAGS)


def run(arguments: argparse.Namespace) -> int:
    """Evaluate; the table goes to stdout, everything else to stderr."""
    # Whatever is wrong with the flags is told before anything is loaded.
    edge = _edge(arguments)
    kinds = _kinds(arguments)
    folder = _folder(arguments, edge, kinds)
    plan = _plan(arguments, edge, kinds, folder)
    questions = _questions(arguments, folder)
    rows = asyncio.run(_rows(plan, questions, _Screen(arguments.quiet, len(questions.examples))))
    sys.stdout.write(_told(arguments, questions, rows) + "\n")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Raises `FlLlamaError`."""
    parser = argparse.ArgumentParser(prog="split-train evaluate", description=__doc__, allow_abbrev=False)
    add_arguments(parser)
    return run(parser.parse_args(arguments))


def _kinds(arguments: argparse.Namespace) -> tuple[str, ...]:
    kinds = tuple(part.strip() for part in arguments.rows.split(",") if part.strip())
    if not kinds or any(kind not in KINDS for kind in kinds):
        raise UsageError(f"--rows takes {', '.join(KINDS)} or both; got {arguments.rows!r}")
    for flag in ("attack", "noise", "partition"):
        if "split" not in kinds and getattr(arguments, flag) is not None:
            raise UsageError(f"--{flag} is for the split rows, which --rows {arguments.rows} leaves out")
    return kinds


def _edge(arguments: argparse.Namespace) -> EdgeSettings:
    """Give the settings of the split rows, with partition, noise and adapter still open. Raises `UsageError`."""
    flags = {name: getattr(arguments, name) for name in _EDGE_FLAGS} | {"speculate": "off"}
    for noise in _noises(arguments):
        load_settings(EdgeSettings, SECTION, flags | {"noise": noise})
    edge = load_settings(EdgeSettings, SECTION, flags).settings
    for partition in _partitions(arguments):
        Partition.parse(partition)
        dataclasses.replace(edge, partition=partition, server=edge.server or _ANYWHERE).check()
    return dataclasses.replace(edge, adapter=None)


def _partitions(arguments: argparse.Namespace) -> tuple[str, ...]:
    return tuple(dict.fromkeys(arguments.partition or ("1,1",)))


def _noises(arguments: argparse.Namespace) -> tuple[str, ...]:
    return tuple(dict.fromkeys(arguments.noise or ()))


def _folder(arguments: argparse.Namespace, edge: EdgeSettings, kinds: Sequence[str]) -> Path:
    """Find the model's folder, with all its weights unless only the edge's part of them is needed."""
    from split_llama.hub import fetch_model, resolve_model

    if kinds == ("split",) and edge.server is not None and arguments.attack is None:
        return resolve_model(arguments.model)
    return fetch_model(arguments.model, lambda name: True)


def _plan(arguments: argparse.Namespace, edge: EdgeSettings, kinds: Sequence[str], folder: Path) -> Plan:
    from split_llama.checkpoint import read_config
    from split_llama.lora import read_adapter
    from training.attacks.measure import check_attack
    from training.evaluate.run import AttackPlan, Plan

    config = read_config(folder)[1]
    for partition in _partitions(arguments):
        Partition.parse(partition).check(config.num_hidden_layers)
    attack = None
    if arguments.attack is not None:
        check_attack(arguments.attack)
        knows_adapter = arguments.attack_knows == "adapter"
        attack = AttackPlan(arguments.attack, arguments.attack_texts, arguments.attack_tokens, knows_adapter)
    adapter = None
    if arguments.adapter is not None:
        name, adapter = _adapter(arguments.adapter)
        read_adapter(adapter).check(config)
        if edge.server is not None and "split" in kinds:
            if name is None:
                raise UsageError(f"what does {edge.server} call the adapter? Give --adapter NAME={arguments.adapter}")
            edge = dataclasses.replace(edge, adapter=str(AdapterChoice(name, adapter)))
    # A folder that has everything need not be looked for again.
    whole = "central" in kinds or edge.server is None or attack is not None
    return Plan(
        folder,
        adapter,
        dataclasses.replace(edge, model=str(folder) if whole else arguments.model),
        _partitions(arguments),
        _noises(arguments),
        arguments.batch,
        central="central" in kinds,
        split="split" in kinds,
        attack=attack,
    )


def _adapter(text: str) -> tuple[str | None, Path]:
    """Read `DIR` or `NAME=DIR`; a folder whose name has a `=` in it is a folder."""
    name, equals, folder = text.partition("=")
    if not equals or Path(text).expanduser().is_dir():
        return None, Path(text).expanduser()
    return name, Path(folder).expanduser()


def _questions(arguments: argparse.Namespace, folder: Path) -> Questions:
    from split_llama.checkpoint import read_config
    from training.evaluate.questions import Questions
    from training.tasks.encoding import Encoder
    from training.tasks.readers import read_task, recognise

    if arguments.data is None and arguments.task == "auto":
        raise UsageError("what is to be evaluated? Give --data FILE, or --task demo")
    task = recognise(arguments.data) if arguments.task == "auto" else arguments.task
    context = read_config(folder)[1].max_position_embeddings
    length = arguments.max_length or min(context, USUAL_LENGTH)
    if length > context:
        raise UsageError(f"--max-length {length}: the model's context has {context} positions")
    return Questions.of(
        task,
        read_task(task, arguments.data, "test"),
        Encoder.open(folder, length),
        limit=arguments.limit,
        max_new_tokens=arguments.max_new_tokens,
    )


class _Screen:
    """What is told on stderr while it runs: a bar for each row."""

    def __init__(self, quiet: bool, examples: int) -> None:
        self.quiet = quiet
        self._examples = examples

    def begin(self, label: str) -> Callable[[int], None]:
        """Show a bar for a row; give where its progress goes."""
        from tqdm import tqdm

        bar = tqdm(total=self._examples, desc=label, unit="ex", disable=self.quiet, file=sys.stderr)

        def show(done: int) -> None:
            bar.update(done - bar.n)
            if done == self._examples:
                bar.close()

        return show

    def notify(self, line: str) -> None:
        """Say something."""
        if not self.quiet:
            sys.stderr.write(f"{line}\n")


async def _rows(plan: Plan, questions: Questions, screen: _Screen) -> list[Row]:
    from split_llama.load import set_up_cpu
    from training.evaluate.run import Evaluation

    set_up_cpu(plan.edge.threads)
    if screen.quiet:
        from transformers.utils import logging

        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if questions.left_out:
        screen.notify(f"{questions.left_out} examples are too long, and left out of every row (see --max-length)")
    return [row async for row in Evaluation(plan, questions, screen.begin, screen.notify).rows()]


def _told(arguments: argparse.Namespace, questions: Questions, rows: Sequence[Row]) -> str:
    from training.evaluate.table import text_table

    if not arguments.json:
        return text_table(rows)
    told = {
        "model": arguments.model,
        "adapter": arguments.adapter,
        "task": questions.task,
        "examples": len(questions.examples),
        "left_out": questions.left_out,
        "rows": [row.to_json() for row in rows],
    }
    return json.dumps(told, indent=2)
