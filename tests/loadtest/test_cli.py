from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.agreement import STEPS, Ledger, compare, unchecked
from loadtest.cli import main
from loadtest.metrics import LiveMetrics
from loadtest.records import Record
from loadtest.report import FORMAT, describe_agreement, render
from loadtest.settings import LoadSettings
from loadtest.stats import Tally
from split_llama.errors import UsageError
from tests.loadtest.records_factory import records
from tests.loadtest.test_agreement import NOTHING, faithful

HELP = (
    "import sys; from loadtest.cli import main\ntry: main({arguments})\nfinally: assert not {heavy} & set(sys.modules)"
)
HEAVY = {"torch", "pydantic", "httpx", "prometheus_client", "numpy"}


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["report", "--help"]])
def test_help_needs_nothing_heavy(arguments: list[str]) -> None:
    script = HELP.format(arguments=arguments, heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "usage: split-loadtest" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["run"], 2, "which server"),
        (["run", "--server", "http://192.0.2.1:80"], 2, "--allow-remote"),
        (["run", "--server", "http://127.0.0.1:1", "--prompt-tokens", "many"], 2, "lognormal"),
        (["run", "--server", "http://127.0.0.1:1"], 3, "nothing listens there"),
        (["report", "/no/such/file"], 2, "cannot be read"),
    ],
)
def test_mistakes_are_explained(
    arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", "/nowhere")
    assert main(arguments) == code
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.out == ""


def document(drawn: list[Record], agreement: object) -> dict[str, object]:
    measured, warm = Tally(), Tally()
    for record in drawn:
        (warm if record.warmup else measured).add(record)
    return {
        "format": FORMAT,
        "settings": LoadSettings(server="http://127.0.0.1:1").shown(),
        "server": {"model": "tiny", "blocks": [1, 3]},
        "planned_requests": 64,
        "interrupted": False,
        "warmup": warm.summary(0.0)["requests"],
        "result": measured.summary(3.0),
        "problems": ["edge process 1 ended with exit code 9"],
        "agreement": agreement,
    }


@given(st.lists(records(), max_size=5), st.integers(0, 2))
def test_every_report_can_be_shown_and_read_back(drawn: list[Record], extra: int) -> None:
    ledger = Ledger(1, 10, 20)
    for record in drawn:
        ledger.add(record)
    after = faithful(ledger)
    after[STEPS] += extra * 1_000_000
    shown = document(drawn, describe_agreement(compare(ledger, NOTHING, after)))
    table = render(shown)
    assert table == render(json.loads(json.dumps(shown)))
    assert ("DISAGREE" in table) is (extra > 0)
    for record in drawn:
        assert record.error is None or record.error in table


def test_a_check_that_was_left_out_or_not_possible_is_said() -> None:
    assert "--no-check" in render(document([], None))
    assert "gone away" in render(document([], describe_agreement(unchecked("gone away"))))


@pytest.mark.parametrize("other", [{}, {"format": 99}, {"format": FORMAT}, {"format": FORMAT, "settings": []}])
def test_what_is_no_report_is_refused(other: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        render(other)
    file = tmp_path / "other.json"
    file.write_text(json.dumps(other))
    assert main(["report", str(file)]) == 2


def test_metrics_are_served_while_the_block_runs_and_not_after() -> None:
    metrics = LiveMetrics()
    record = Record(0, 0, False, 0.0, 5, output_tokens=3, ttft_ms=20.0, itl_ms=[5.0, 7.0], total_ms=32.0, round_trips=3)
    with metrics.serve(0) as url:
        assert url is not None
        metrics.ended(record)
        metrics.ended(Record(1, 0, False, 0.0, 5, error="OutOfPages"))
        text = httpx.get(url, trust_env=False).text
    assert 'fl_llama_loadtest_requests_total{outcome="ok"} 1.0' in text
    assert 'fl_llama_loadtest_requests_total{outcome="OutOfPages"} 1.0' in text
    assert "fl_llama_loadtest_generation_tokens_total 3.0" in text
    assert "fl_llama_loadtest_inter_token_latency_seconds_count 2.0" in text
    with pytest.raises(httpx.ConnectError):
        httpx.get(url, trust_env=False)


def test_metrics_are_off_by_default_and_a_taken_port_is_explained() -> None:
    with LiveMetrics().serve(None) as url:
        assert url is None
    with LiveMetrics().serve(0) as url:
        taken = LiveMetrics().serve(httpx.URL(str(url)).port)
        with pytest.raises(UsageError, match="--metrics-port 0"):
            taken.__enter__()
