"""What a client writes about its steps, and what a run reads of it."""

from __future__ import annotations

import io
import json
from dataclasses import asdict
from pathlib import Path

import pytest

from training.client.report import LOG_FILE, Bar, LogFile, StepRecord, TensorBoard, Watchers, describe, size
from training.display import Display, Followed


def record(step: int, loss: float | None = 2.5, **more: int) -> StepRecord:
    return StepRecord(step, 1, loss, 2.0, 0.01, 100, 4, 12_345, 2_000_000, 0.5, loss is not None, **more)


def test_the_log_has_a_line_per_step_and_remarks_between(tmp_path: Path) -> None:
    said: list[str] = []
    with Watchers(LogFile(tmp_path, said.append)) as watchers:
        watchers.step(record(1))
        watchers.note("the server was lost")
        watchers.step(record(2, None))
    lines = [json.loads(line) for line in (tmp_path / LOG_FILE).read_text().splitlines()]
    assert lines == [asdict(record(1)), {"note": "the server was lost"}, asdict(record(2, None))]
    assert said == []


def test_a_full_disk_ends_the_log_and_nothing_else(tmp_path: Path) -> None:
    said: list[str] = []
    log = LogFile(tmp_path, said.append)
    assert log._stream is not None
    log._stream.close()
    log._stream = Path("/dev/full").open("w", encoding="utf-8")  # noqa: SIM115 - the log closes it
    log.step(record(1))
    log.step(record(2))
    assert len(said) == 1
    assert "training goes on without it" in said[0]


def test_a_run_follows_a_log_from_where_it_stood(tmp_path: Path) -> None:
    file = tmp_path / LOG_FILE
    line = json.dumps(asdict(record(1)))
    file.write_text(line + "\n")
    followed = Followed.of("a", tmp_path)
    with file.open("a") as stream:
        stream.write(json.dumps(asdict(record(2))) + "\n" + line[:20])
    assert followed.read() == ([record(2)], [])
    with file.open("a") as stream:
        stream.write(line[20:] + '\n{"note": "x"}\nnonsense\n[1]\n')
    assert followed.read() == ([record(1)], ["x"])
    assert followed.read() == ([], [])


def test_outside_a_terminal_a_run_shows_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "client-0"
    folder.mkdir()
    with Display({"client-0": folder}, 10) as display:
        (folder / LOG_FILE).write_text(json.dumps(asdict(record(3, left_out=2))) + '\n{"note": "a \\u001b[2Jremark"}\n')
        display.update()
    shown = capsys.readouterr().err
    assert "client-0: step 3 of 10, loss 2.5000" in shown
    assert "left out 2" in shown
    assert "remark" in shown
    assert "\x1b" not in shown


def test_a_bar_says_loss_speed_and_bytes() -> None:
    stream = io.StringIO()
    bar = Bar("ann", 10, stream)
    bar.step(record(4, void=1))
    bar.note("something \x1b]0;happened")
    bar.close()
    shown = stream.getvalue()
    assert "4/10" in shown
    assert "loss 2.5000" in shown
    assert "up 12.3 kB" in shown
    assert "down 2.0 MB" in shown
    assert "void 1" in shown
    assert "ann: something" in shown
    assert "\x1b]0" not in shown


def test_words_for_steps_and_sizes() -> None:
    assert describe(record(1, None), 12.3).startswith("loss 2.0000, 12 tokens/s")
    assert [size(count) for count in (5, 1500, 2.5e6, 3e9)] == ["5 B", "1.5 kB", "2.5 MB", "3.00 GB"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_curves_can_be_read_by_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = TensorBoard(tmp_path)
    board.step(record(1))
    board.step(record(2, None))
    board.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(point.step, point.value) for point in events.Scalars("loss")] == [(1, 2.5)]
    assert [point.step for point in events.Scalars("job_loss")] == [1, 2]
