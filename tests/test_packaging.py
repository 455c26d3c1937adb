"""The wheel and the images: what is in them works without the repository. No container engine is needed."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import threading
import tomllib
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
COMMANDS = sorted(PYPROJECT["project"]["scripts"])


def run(*command: str | Path, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    hidden = ("PYTHON", "FL_LLAMA_", "VIRTUAL_ENV")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Docker build context: what .dockerignore lets through."""
    folder = tmp_path_factory.mktemp("context")
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if not line.startswith("!"):
            continue
        source, target = ROOT / line[1:], folder / line[1:]
        assert source.exists(), f".dockerignore lets {line[1:]} through, which does not exist"
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.py[cod]"))
        else:
            shutil.copy(source, target)
    return folder


@pytest.fixture(scope="module")
def wheel(context: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheels")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ".", cwd=context)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel; its dependencies are borrowed from the one that runs the tests."""
    venv = tmp_path_factory.mktemp("fresh") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=venv.parent)
    python = venv / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", wheel, cwd=venv.parent)
    (packages,) = venv.glob("lib/python*/site-packages")
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return venv


def test_the_wheel_holds_the_packages_and_the_demo_model(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    top = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert top == {include.rstrip("*") for include in PYPROJECT["tool"]["setuptools"]["packages"]["find"]["include"]}
    for file in (
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "model.safetensors",
    ):
        assert f"split_llama/demo/model/{file}" in names
    for package in top:
        assert f"{package}/py.typed" in names
    sources = {str(path.relative_to(ROOT)) for package in top for path in (ROOT / package).rglob("*.py")}
    assert sources <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "edge_client/gateway/page/index.html" in names
    assert any(name.startswith("edge_client/speculation/heads/") for name in names)


@pytest.mark.parametrize("command", COMMANDS)
def test_installed_commands_show_their_help(installed: Path, tmp_path: Path, command: str) -> None:
    done = run(installed / "bin" / command, "--help", cwd=tmp_path)
    assert command in done.stdout
    assert done.stderr == ""


def test_the_installed_package_is_used_and_knows_its_version(installed: Path, tmp_path: Path) -> None:
    code = (
        "import importlib.metadata, split_llama\n"
        "from split_llama.checkpoint import Checkpoint\n"
        "from split_llama.hub import resolve_model\n"
        "checkpoint = Checkpoint.open(resolve_model('demo'))\n"
        "assert checkpoint.tensor('model.norm.weight').isfinite().all()\n"
        "print(split_llama.__file__, importlib.metadata.version('fl-llama'))"
    )
    file, version = run(installed / "bin" / "python", "-c", code, cwd=tmp_path).stdout.split()
    assert Path(file).is_relative_to(installed)
    assert version == PYPROJECT["project"]["version"]


def test_constraints_are_exact_and_cover_what_is_declared() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pinned = {normalised(re.fullmatch(r"([\w.-]+)==[\w.]+", line)[1]) for line in lines}  # type: ignore[index]
    project = PYPROJECT["project"]
    declared = [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]
    names = {normalised(re.match(r"[\w.-]+", item)[0]) for item in declared}  # type: ignore[index]
    # Without an index of their own, pip freeze leaves the build tools out.
    assert names - {"fl-llama", "setuptools"} <= pinned


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


# The Dockerfile, read rather than run.


@pytest.fixture(scope="module")
def stages() -> dict[str, list[tuple[str, str]]]:
    """Stage to its instructions, those of the stages it is built from first."""
    text = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text())
    found: dict[str, list[tuple[str, str]]] = {}
    for line in text.splitlines():
        word, _, rest = line.partition(" ")
        if word == "FROM":
            parent, name = re.fullmatch(r"(\S+) AS (\S+)", rest).groups()  # type: ignore[union-attr]
            stage = found[name] = list(found.get(parent, []))
        elif word.isupper() and found:
            stage.append((word, rest))
    return found


def last(stage: list[tuple[str, str]], word: str) -> str:
    return next(rest for each, rest in reversed(stage) if each == word)


@pytest.mark.parametrize("target", ["cpu", "cuda", "edge"])
def test_images_run_a_known_command_as_an_ordinary_user(stages: dict[str, list[tuple[str, str]]], target: str) -> None:
    stage = stages[target]
    assert last(stage, "USER") == "fl-llama"
    (command,) = eval_list(last(stage, "ENTRYPOINT"))
    assert command == ("edge-client" if target == "edge" else "split-server")
    assert command in COMMANDS
    eval_list(last(stage, "CMD"))
    extras = set(re.findall(r"\.whl\)\[([\w,]+)\]", last(stage, "RUN"))[0].split(","))
    assert extras <= set(PYPROJECT["project"]["optional-dependencies"])


def eval_list(text: str) -> list[str]:
    """Read the exec form of an instruction."""
    value: list[str] = tomllib.loads(f"value = {text}")["value"]
    return value


def test_images_copy_only_what_the_context_holds(stages: dict[str, list[tuple[str, str]]], context: Path) -> None:
    for stage in stages.values():
        for word, rest in stage:
            if word == "COPY" and "--from" not in rest:
                for source in shlex.split(rest)[:-1]:
                    assert (context / source).exists()


class Readiness(BaseHTTPRequestHandler):
    status = 200

    def do_GET(self) -> None:
        self.send_response(type(self).status if self.path == "/readyz" else 404)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def readiness() -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Readiness) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False)])
def test_the_health_check_tells_ready_from_not_ready(
    stages: dict[str, list[tuple[str, str]]],
    readiness: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    healthy: bool,
) -> None:
    monkeypatch.setattr(Readiness, "status", status)
    for target in ("cpu", "cuda"):
        check = last(stages[target], "HEALTHCHECK")
        code = eval_list(check.partition(" CMD ")[2])
        assert code[:2] == ["python", "-c"]
        done = run(sys.executable, "-c", code[2].replace(":8700/", f":{readiness}/"), cwd=tmp_path, check=False)
        assert (done.returncode == 0) is healthy
