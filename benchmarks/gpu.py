"""One command for one CUDA device: build, check and time everything within eight minutes, and write JSON.

    python -m benchmarks.gpu [--quick] [--out DIR]

Each part runs in a process of its own, with a share of the time: one that fails, hangs or breaks the device loses only
its own figures. The file is written anew after each part. `--device cpu` runs the whole script at tiny sizes in
Triton's interpreter, to test the script; its figures mean nothing, and it writes another file.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
SECONDS = 460.0
# Nothing is started for less.
LEAST_SECONDS = 10.0
# The most wanted benchmarks of benchmarks/kernels and the seconds they get; the others are found by themselves.
FIRST = {"paged_attention": 90.0, "runner": 180.0}
PASSED = "passed"
# Without the project's own pytest settings, whose plugins may be missing where nothing can be installed.
PYTEST_SETTINGS = """[pytest]
addopts = --import-mode=importlib --strict-markers
pythonpath = {root} {root}/tests
markers = slow: the long matrix
"""


@dataclass(frozen=True)
class Part:
    """One part of the run: its work, in this process or in another, and the most seconds it gets."""

    name: str
    seconds: float
    run: Callable[[float], dict[str, Any]]


def main() -> int:
    """Run all parts; give 1 if one of them failed."""
    arguments = parse_arguments()
    if arguments.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    if arguments.part:
        for found in measured(arguments.part, arguments.device, arguments.quick):
            print(json.dumps(found), flush=True)
        return 0
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    return run_all(arguments, out / ("gpu.json" if arguments.device == "cuda" else "gpu-interpreted.json"))


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer repetitions and shapes")
    parser.add_argument("--out", default=str(RESULTS), help="folder of the JSON file")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: tiny sizes, interpreted")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time for everything")
    parser.add_argument("--only", action="append", metavar="PART", help="run this part only; may be repeated")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    return parser.parse_args()


def run_all(arguments: argparse.Namespace, path: Path) -> int:
    """Run the parts one after the other as long as there is time."""
    started = time.monotonic()
    report: dict[str, Any] = {
        "command": " ".join(["python", "-m", "benchmarks.gpu", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "quick": arguments.quick,
        "complete": False,
        "parts": {},
    }
    for part in parts(arguments):
        left = arguments.seconds - (time.monotonic() - started)
        begun = time.monotonic()
        if left < LEAST_SECONDS:
            result: dict[str, Any] = {"error": "no time was left"}
        else:
            try:
                result = part.run(min(part.seconds, left))
            except Exception:
                result = {"error": traceback.format_exc()}
        seconds = round(time.monotonic() - begun, 1)
        report["parts"][part.name] = result | {"seconds": seconds}
        report["seconds"] = round(time.monotonic() - started, 1)
        print(f"{part.name}: {outcome(result)} in {seconds} s", file=sys.stderr, flush=True)
        if part.name == "machine" and "error" in result:
            # Without a device there is nothing to write, least of all over earlier figures.
            return 1
        path.write_text(json.dumps(report, indent=1) + "\n")
    failed = [name for name, result in report["parts"].items() if outcome(result) != "done"]
    report["complete"] = not failed
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {path}" + (f"; not done: {', '.join(failed)}" if failed else ""), file=sys.stderr)
    return 1 if failed else 0


def outcome(result: dict[str, Any]) -> str:
    """Say in a word or two how a part went."""
    if "error" in result:
        return "failed: " + str(result["error"]).strip().splitlines()[-1]
    errors = [row for row in result.get("rows", []) if "error" in row]
    if errors:
        return f"{len(errors)} of {len(result['rows'])} rows failed"
    return "done" if result.get("outcome", PASSED) == PASSED else str(result["outcome"])


def parts(arguments: argparse.Namespace) -> list[Part]:
    """List the parts, the most wanted figures first."""
    flags = ["--device", arguments.device, *(["--quick"] if arguments.quick else [])]
    listed = [
        Part("machine", 60.0, lambda seconds: run_part("machine", flags, seconds)),
        *(
            Part(name, FIRST.get(name, 40.0), lambda seconds, name=name: run_part(name, flags, seconds))
            for name in benchmark_names()
        ),
        Part("tests", 180.0, run_tests),
        Part("sanitizer", 90.0, lambda seconds: run_sanitizer(flags, seconds)),
    ]
    return [part for part in listed if not arguments.only or part.name in arguments.only]


def benchmark_names() -> list[str]:
    """Name the modules of benchmarks/kernels that measure something."""
    folder = Path(__file__).parent / "kernels"
    found = {path.stem for path in folder.glob("*.py") if "def measure(" in path.read_text(encoding="utf-8")}
    return [*(name for name in FIRST if name in found), *sorted(found - set(FIRST))]


def run_part(name: str, flags: list[str], seconds: float) -> dict[str, Any]:
    """Run a part in a process of its own, which prints each of its figures once it has it."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--part", name, *flags]
    try:
        done = run(command, seconds)
    except subprocess.TimeoutExpired as late:
        printed = late.stdout or b""
        text = printed.decode() if isinstance(printed, bytes) else printed
        return collected(text) | {"error": f"took longer than {seconds:.0f} s"}
    failed = {"error": f"ended with status {done.returncode}\n{tail(done.stderr)}"} if done.returncode else {}
    return collected(done.stdout) | failed


def collected(printed: str) -> dict[str, Any]:
    """Put the figures of a part together: rows into a list, all else by name."""
    result: dict[str, Any] = {}
    for line in printed.splitlines():
        # Libraries may print lines of their own.
        if line.startswith("{") and line.endswith("}"):
            found = json.loads(line)
            if "row" in found:
                result.setdefault("rows", []).append(found["row"])
            else:
                result |= found
    return result


def run(command: list[str], seconds: float, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in the repository for so long at most. Raises `TimeoutExpired`."""
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=seconds, check=False
    )


def tail(text: str, lines: int = 30) -> str:
    """Give the last lines."""
    return "\n".join(text.strip().splitlines()[-lines:])


def measured(name: str, device_name: str, quick: bool) -> Iterator[dict[str, Any]]:
    """Do one part, in this process, and yield its figures."""
    import torch

    if device_name == "cuda" and not torch.cuda.is_available():
        raise SystemExit("this PyTorch sees no CUDA device; --device cpu tests the script itself")
    device = torch.device(device_name, 0) if device_name == "cuda" else torch.device("cpu")
    if name == "machine":
        yield {"machine": machine(device)}
    elif name == "sanitizer":
        yield {"row": smoke(device)}
    else:
        module = importlib.import_module(f"benchmarks.kernels.{name}")
        rows = getattr(module, "rows", module.measure)
        yield from ({"row": row} for row in rows(device, quick))


def machine(device: Any) -> dict[str, Any]:
    """Describe the device and the versions that matter."""
    import torch
    import triton

    described: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "device": "cpu",
    }
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        free, total = torch.cuda.mem_get_info(device)
        described |= {
            "device": about.name,
            "capability": f"{about.major}.{about.minor}",
            "multiprocessors": about.multi_processor_count,
            "memory_bytes": total,
            "free_bytes": free,
            "driver": driver_version(),
        }
    return described


def driver_version() -> str | None:
    """Ask the driver's tool, where there is one."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return run(query, 20.0).stdout.strip() or None


def run_tests(seconds: float) -> dict[str, Any]:
    """Run tests/gpu; on a CPU all of them are skipped."""
    with tempfile.TemporaryDirectory() as folder:
        settings, record = Path(folder, "pytest.ini"), Path(folder, "tests.xml")
        settings.write_text(PYTEST_SETTINGS.format(root=ROOT))
        command = [sys.executable, "-m", "pytest", "-c", str(settings), f"--rootdir={ROOT}", "-q", "-p"]
        command += ["no:cacheprovider", f"--junitxml={record}", str(ROOT / "tests" / "gpu")]
        # Tests on a device compile their kernels.
        done = run(command, seconds, TRITON_INTERPRET="0")
        if not record.exists():
            return {"error": f"{tail(done.stdout)}\n{tail(done.stderr)}\npytest gave no record"}
        return test_figures(ElementTree.parse(record).getroot())


def test_figures(record: ElementTree.Element) -> dict[str, Any]:
    """Count a record of pytest (JUnit's XML) and keep what failed."""
    cases = list(record.iter("testcase"))
    failures = {
        f"{case.get('classname')}::{case.get('name')}": tail((found.get("message") or "") + "\n" + (found.text or ""))
        for case in cases
        for found in [*case.iter("failure"), *case.iter("error")]
    }
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {
        "outcome": PASSED if not failures else f"{len(failures)} failed",
        "passed": len(cases) - skipped - len(failures),
        "skipped": skipped,
        "failed": failures,
    }


def run_sanitizer(flags: list[str], seconds: float) -> dict[str, Any]:
    """Run a few passes under compute-sanitizer's memory checker, where it is installed and runs."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return {"outcome": PASSED, "skipped": "compute-sanitizer is not installed"}
    command = [tool, "--tool", "memcheck", "--error-exitcode", "86", sys.executable, "-m", "benchmarks.gpu"]
    # Each tensor is an allocation of its own then, so that a step beyond it is seen.
    done = run([*command, "--part", "sanitizer", *flags], seconds, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    found = done.returncode == 86
    if done.returncode not in (0, 86):
        return {"outcome": PASSED, "skipped": f"compute-sanitizer does not run here: {tail(done.stdout + done.stderr)}"}
    return {"outcome": "memory errors were found" if found else PASSED, "output": tail(done.stdout + done.stderr)}


def smoke(device: Any) -> dict[str, Any]:
    """A prompt, decodes and a draft of a tiny model, without graphs: every kernel of a pass runs once at least."""
    import torch

    from benchmarks.kernels.runner import TINY, random_segment
    from serving.device.executor import TritonExecutor
    from serving.device.graphs import Most
    from serving.device.runner import Runner
    from split_llama.engine.engine import Engine

    segment = random_segment(TINY, device)
    engine = Engine(segment, num_pages=64)
    executor = TritonExecutor(Runner(segment, engine.cache, Most(256, 4), graphs=False))
    sequence = engine.sequence(segment.blocks, 200)
    rows = [sequence.append(70), sequence.append(1)]
    finite = []
    for run_ in [*rows, sequence.append_draft((0b1, 0b11, 0b101))]:
        states = torch.randn(run_.count, TINY.hidden, device=device, dtype=segment.dtype)
        finite.append(bool(executor.run(engine.plan([run_]), states).isfinite().all()))
    sequence.accept((0, 2))
    states = torch.randn(1, TINY.hidden, device=device, dtype=segment.dtype)
    finite.append(bool(executor.run(engine.plan([sequence.append(1)]), states).isfinite().all()))
    return {"kernel": "runner", "case": "smoke", "finite": all(finite)}


if __name__ == "__main__":
    sys.exit(main())
