"""The command against a real server: the report, the counters, the metrics, and what happens when things break."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from loadtest.cli import main
from tests.loadtest.bench import Bench, Command, eventually, sample, scraped

ENDLESS = ("--clients", "4", "--requests", "100000", "--max-new-tokens", "8", "--metrics-port", "0")


def metrics_url(command: Command) -> str:
    return command.wait_for(r"metrics at (\S+)")


def wait_for_answers(command: Command) -> str:
    url = metrics_url(command)
    eventually(lambda: sample(scraped(url), "fl_llama_loadtest_requests_total") > 0, command.said)
    return url


def test_report_counters_and_metrics(
    bench: Bench, server_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # int8 sends the BOS row apart, 150 tokens make two chunks, and two processes share the clients.
    load = ("--clients", "4", "--processes", "2", "--codec", "int8", "--prompt-tokens", "uniform:1-150")
    size = ("--requests", "10", "--max-new-tokens", "uniform:1-9", "--seed", "3")
    target = tmp_path / "report.json"
    command = bench.load(server_url, *load, *size, "--metrics-port", "0", "--json", str(target))
    metrics = scraped(metrics_url(command))
    assert sample(metrics, "fl_llama_loadtest_clients") == 4

    code, table = command.finish()
    assert code == 0, table + command.said()
    report = json.loads(target.read_text())
    result = report["result"]
    assert result["requests"] == {"ok": 10, "failed": {}}
    assert report["agreement"]["agrees"]
    assert len(report["agreement"]["counters"]) == 8
    assert result["output_tokens"] == result["round_trips"] == sum(r["output_tokens"] for r in report["requests"])
    assert result["ttft_ms"]["count"] == result["end_to_end_ms"]["count"] == 10
    assert result["inter_token_ms"]["count"] == result["output_tokens"] - 10
    assert 0 < result["ttft_ms"]["p50"] <= result["ttft_ms"]["p99"] <= result["end_to_end_ms"]["max"]
    assert {r["process"] for r in report["requests"]} == {0, 1}
    assert "10 answered, 0 failed" in table
    assert main(["report", str(target)]) == 0
    assert capsys.readouterr().out == table


def test_ctrl_c_reports_what_ran_and_closes_the_sessions(bench: Bench, server_url: str, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\n\n  two words \n")
    command = bench.load(server_url, *ENDLESS, "--transport", "http", "--prompts", str(prompts), "--json", "-")
    wait_for_answers(command)
    command.process.send_signal(signal.SIGINT)
    code, output = command.finish()
    assert code == 130, command.said()
    assert "(interrupted)" in command.said()
    report = json.loads(output)
    assert report["interrupted"]
    assert report["agreement"]["agrees"], command.said()
    assert len({r["prompt_tokens"] for r in report["requests"]}) == 2
    eventually(lambda: sample(scraped(f"{server_url}/metrics"), "fl_llama_sessions") == 0)


def test_a_killed_server_ends_the_run_with_failures(bench: Bench) -> None:
    server, url = bench.server()
    command = bench.load(url, *ENDLESS, "--reconnect-seconds", "0.5")
    wait_for_answers(command)
    server.process.kill()
    code, table = command.finish()
    assert code == 1, command.said()
    assert "ServerUnreachable" in table
    assert "COULD NOT BE COMPARED" in table
