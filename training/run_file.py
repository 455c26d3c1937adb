"""The file of `split-train run` and `server`: a job, its data, the server's flags and the clients' settings, as TOML.

    out = "runs/mine"                     # results
    [job]                                 # training.job_config; lora and optimizer are tables in it
    [data]
    task = "multirc"                      # a task's name, or auto
    train = "train.jsonl"                 # dealt out to the clients, or a list with a file for each; none for demo
    validation = "val.jsonl"              # for the evaluation that is proposed at the end
    partition = "iid"                     # how it is dealt out: iid, dirichlet:ALPHA, shards:N
    [server]                              # flags of split-server, such as model = "demo"
    [client]                              # settings of the section train, such as noise = "0"

Paths are taken from the current folder. `--set SECTION.KEY=VALUE` changes one entry.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from split_llama.errors import UsageError
from split_llama.settings import load_settings, nearest
from training.job_config import JobConfig
from training.settings import SECTION, TrainSettings

EXAMPLES = Path(__file__).parent / "examples"
PRESETS = Path(__file__).parent / "paper"
SECTIONS = ("job", "data", "server", "client")
REQUIRED = ("data",)
DATA_KEYS = ("task", "train", "validation", "partition")
# What a client is told by the run itself.
NOT_FOR_CLIENTS = ("server", "job_key")


@dataclass(frozen=True, slots=True)
class RunData:
    """Whose examples: `train` is nothing (the task makes its own), one file for all, or a file per client."""

    task: str = "auto"
    train: tuple[Path, ...] = ()
    validation: Path | None = None
    partition: str = "iid"


@dataclass(frozen=True, slots=True)
class RunFile:
    """What a run is. `server` are split-server's flags, `client` settings of `TrainSettings`, both by name."""

    out: Path
    job: JobConfig
    data: RunData
    server: Mapping[str, Any]
    client: Mapping[str, Any]

    @classmethod
    def read(cls, name: str, changes: Sequence[str] = (), required: Sequence[str] = REQUIRED) -> RunFile:
        """Read a file, or an example that comes along by its name ("demo"). Raises `UsageError`.

        The data of clients elsewhere is not in it: then nothing is `required`.
        """
        path = find(name)
        try:
            document = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot read {path}: {error}") from error
        except tomllib.TOMLDecodeError as error:
            raise UsageError(f"{path} is not valid TOML: {error}") from error
        for change in changes:
            _apply(document, change)
        return cls.parse(document, str(path), required)

    @classmethod
    def parse(cls, document: Mapping[str, Any], where: str, required: Sequence[str] = REQUIRED) -> RunFile:
        """Read a parsed file. Raises `UsageError` that names a wrong key and the nearest known one."""
        tables = {}
        for key, value in document.items():
            if key not in (*SECTIONS, "out"):
                raise UsageError(f"{where}: unknown section or key {key!r}{nearest(key, (*SECTIONS, 'out'))}")
            if key != "out" and not isinstance(value, dict):
                raise UsageError(f"{where}: expected a section [{key}], got {value!r}")
            tables[key] = value
        job = JobConfig.parse(tables.get("job", {}), f"{where} [job]")
        out = tables.get("out", f"runs/{job.name}")
        if not isinstance(out, str) or not out:
            raise UsageError(f"{where}: out must be the path of a folder, got {out!r}")
        given = "data" in tables or "data" in required
        data = _data(tables.get("data", {}), job.clients, f"{where} [data]") if given else RunData()
        client = _client(tables.get("client", {}), job, f"{where} [client]")
        return cls(Path(out), job, data, _server(tables.get("server", {}), job, f"{where} [server]"), client)

    def server_flags(self) -> list[str]:
        """Give `split-server`'s flags."""
        return as_flags(self.server)


def find(name: str) -> Path:
    """Give the file of this path, or the example of this name. Raises `UsageError`."""
    path = Path(name)
    if path.is_file():
        return path
    bundled = {file.stem: file for file in EXAMPLES.glob("*.toml")}
    bundled |= {f"paper/{file.stem}": file for file in PRESETS.glob("*.toml")}
    if name in bundled:
        return bundled[name]
    raise UsageError(f"there is no file {name}; those that come along: {', '.join(sorted(bundled))}")


def as_flags(values: Mapping[str, Any]) -> list[str]:
    """Spell keys and values as flags of a command line."""
    flags: list[str] = []
    for key, value in values.items():
        flag = key.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            # One word, so that a value may begin with a dash.
            flags += [f"--{flag}={each}" for each in (value if isinstance(value, list | tuple) else (value,))]
    return flags


def _apply(document: dict[str, Any], change: str) -> None:
    name, equals, text = change.partition("=")
    *sections, key = name.strip().split(".")
    if not equals or not key:
        raise UsageError(f"--set {change}: expected SECTION.KEY=VALUE, such as job.steps=100")
    table = document
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise UsageError(f"--set {change}: {section} is no section")
    try:
        table[key] = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        table[key] = text  # Not quoted, as is usual on a command line.


def _data(raw: Mapping[str, Any], clients: int, where: str) -> RunData:
    for key in raw:
        if key not in DATA_KEYS:
            raise UsageError(f"{where}: unknown key {key!r}{nearest(key, DATA_KEYS)}")
    task, train = raw.get("task", "auto"), raw.get("train")
    if not all(isinstance(raw.get(key, ""), str) for key in ("task", "validation", "partition")):
        raise UsageError(f"{where}: task, validation and partition are texts")
    if train == "demo":
        task, train = "demo", None
    files = [] if train is None else [train] if isinstance(train, str) else train
    if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
        raise UsageError(f"{where}: train is a file, or a list of files, one for each client; got {train!r}")
    if len(files) > 1 and len(files) != clients:
        raise UsageError(f"{where}: train lists {len(files)} files for {clients} clients: give one for each, or one")
    if not files and task != "demo":
        raise UsageError(f'{where}: which data? Give train = FILE, or task = "demo", which makes its own')
    validation = Path(raw["validation"]) if "validation" in raw else None
    return RunData(task, tuple(map(Path, files)), validation, raw.get("partition", "iid"))


def _client(raw: Mapping[str, Any], job: JobConfig, where: str) -> dict[str, Any]:
    fields = [field.name for field in dataclasses.fields(TrainSettings) if field.name not in NOT_FOR_CLIENTS]
    given = {key.replace("-", "_"): value for key, value in raw.items()}
    for key in given:
        if key not in fields:
            raise UsageError(f"{where}: unknown key {key!r}{nearest(key, fields)}")
    load_settings(TrainSettings, SECTION, given)
    return ({"strategy_plugin": [job.strategy]} if _is_own(job) else {}) | given


def _is_own(job: JobConfig) -> bool:
    """Say whether the strategy is code: who writes the file starts server and clients, and allows it by naming it."""
    return ":" in job.strategy


def _server(raw: Mapping[str, Any], job: JobConfig, where: str) -> dict[str, Any]:
    for key, value in raw.items():
        if isinstance(value, dict):
            raise UsageError(f"{where}: expected a flag's value for {key}, got a table")
    given = {key.replace("-", "_"): value for key, value in raw.items()}
    extensions = given.pop("extension", [])
    extensions = [extensions] if isinstance(extensions, str) else list(extensions)
    if "training" not in extensions:
        extensions.append("training")
    own = {"extension_plugin": [job.strategy]} if _is_own(job) else {}
    return {"model": "demo", "allowed_partitions": job.partition} | own | given | {"extension": extensions}
