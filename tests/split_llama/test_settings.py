"""Settings: the four layers, where each value came from, and mistakes that are named."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import pytest

from split_llama.errors import UsageError
from split_llama.settings import Loaded, add_flags, config_path, load_settings, nearest, setting


def positive(value: float) -> None:
    if not value > 0 or math.isinf(value):
        raise ValueError("expected a positive number")


@dataclass(frozen=True)
class Sample:
    server: str | None = setting(None, "address of the server")
    max_new_tokens: int = setting(256, "how many tokens at most", check=lambda value: positive(value))
    noise: float = setting(0.5, "how much noise")
    codec: str = setting("fp16", "how states travel", choices=("fp16", "int8"))
    stop: tuple[str, ...] = setting((), "texts that end the answer")
    json: bool = setting(False, "print one object")
    cache: Path | None = setting(None, "folder of the cache")
    api_key: str | None = setting(None, "key of the server", secret=True)


def load(
    tmp_path: Path, flags: list[str] | None = None, environ: dict[str, str] | None = None, toml: str = ""
) -> Loaded[Sample]:
    parser = argparse.ArgumentParser()
    add_flags(parser, Sample)
    path = tmp_path / "config.toml"
    path.write_text(toml)
    return load_settings(Sample, "edge", vars(parser.parse_args(flags or [])), environ=environ or {}, config_file=path)


def test_defaults_and_origin(tmp_path: Path) -> None:
    loaded = load(tmp_path)
    assert loaded.settings == Sample()
    assert set(loaded.origins.values()) == {"default"}


def test_each_layer_wins_over_the_next(tmp_path: Path) -> None:
    toml = '[edge]\nnoise = 1\ncodec = "int8"\nmax-new-tokens = 7\nstop = ["a", "b"]\n[server]\nanything = 1\n'
    environ = {"FL_LLAMA_EDGE_NOISE": "2", "FL_LLAMA_EDGE_MAX_NEW_TOKENS": "8", "FL_LLAMA_SERVER_PORT": "1"}
    loaded = load(tmp_path, ["--noise", "3"], environ, toml)
    assert (loaded.settings.noise, loaded.settings.max_new_tokens, loaded.settings.codec) == (3.0, 8, "int8")
    assert loaded.settings.stop == ("a", "b")
    assert loaded.origins["noise"] == "--noise"
    assert loaded.origins["max_new_tokens"] == "FL_LLAMA_EDGE_MAX_NEW_TOKENS"
    assert loaded.origins["codec"].endswith("config.toml [edge]")
    assert loaded.origins["server"] == "default"


def test_conversions(tmp_path: Path) -> None:
    environ = {"FL_LLAMA_EDGE_STOP": '["x,y", "z"]', "FL_LLAMA_EDGE_JSON": "yes", "FL_LLAMA_EDGE_CACHE": "~/c"}
    settings = load(tmp_path, environ=environ).settings
    assert settings.stop == ("x,y", "z")
    assert settings.json is True
    assert settings.cache == Path.home() / "c"
    assert load(tmp_path, environ={"FL_LLAMA_EDGE_STOP": "a,b"}).settings.stop == ("a", "b")
    assert load(tmp_path, ["--stop", "a,b", "--stop", "c", "--no-json"]).settings.stop == ("a,b", "c")


@pytest.mark.parametrize(
    ("flags", "environ", "toml", "message"),
    [
        ([], {"FL_LLAMA_EDGE_NOSE": "1"}, "", "did you mean 'FL_LLAMA_EDGE_NOISE'"),
        ([], {"FL_LLAMA_EDEG_NOISE": "1"}, "", "did you mean 'FL_LLAMA_EDGE_NOISE'"),
        ([], {}, "[edge]\nmax_new_token = 1", "did you mean 'max_new_tokens'"),
        ([], {}, "[egde]\nnoise = 1", "did you mean 'edge'"),
        ([], {}, "noise = 1", "unknown section or key 'noise'"),
        ([], {}, "edge = 1", r"expected a section \[edge\]"),
        ([], {}, "[edge", "not valid TOML"),
        ([], {}, "[edge]\nnoise = true", "got a boolean"),
        ([], {}, "[edge]\nnoise = [1]", "expected a number, got list"),
        ([], {}, "[edge]\nmax_new_tokens = 1.5", "expected a whole number, got float"),
        ([], {}, "[edge]\nstop = [1]", "expected a list of texts"),
        ([], {"FL_LLAMA_EDGE_STOP": "[1"}, "", "expected a JSON list"),
        ([], {"FL_LLAMA_EDGE_JSON": "perhaps"}, "", "expected true or false"),
        (["--noise", "loud"], {}, "", "--noise: cannot use 'loud' for noise: expected a number"),
        (["--codec", "fp61"], {}, "", "did you mean 'fp16'"),
        (["--max-new-tokens", "0"], {}, "", "expected a positive number"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, flags: list[str], environ: dict[str, str], toml: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load(tmp_path, flags, environ, toml)


def test_secrets_are_masked(tmp_path: Path) -> None:
    loaded = load(tmp_path, ["--api-key", "hunter2"])
    assert ("api_key", "********", "--api-key") in loaded.rows()
    assert ("server", "-", "default") in loaded.rows()
    assert "hunter2" not in str(loaded.rows())


def test_which_file(tmp_path: Path) -> None:
    assert config_path({}) == Path.home() / ".config" / "fl-llama" / "config.toml"
    assert config_path({"XDG_CONFIG_HOME": str(tmp_path)}) == tmp_path / "fl-llama" / "config.toml"
    named = {"FL_LLAMA_CONFIG": str(tmp_path / "none.toml")}
    with pytest.raises(UsageError, match=r"no configuration file .*none\.toml"):
        load_settings(Sample, "edge", environ=named)
    assert load_settings(Sample, "edge", environ={"XDG_CONFIG_HOME": str(tmp_path)}).settings == Sample()
    (tmp_path / "none.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="cannot read"):
        load_settings(Sample, "edge", environ=named)


def test_unknown_flag_and_subset_of_flags() -> None:
    with pytest.raises(UsageError, match="did you mean 'noise'"):
        load_settings(Sample, "edge", {"niose": 1}, environ={"XDG_CONFIG_HOME": "/nonexistent"})
    parser = argparse.ArgumentParser()
    add_flags(parser, Sample, ["noise"])
    assert vars(parser.parse_args([])) == {"noise": None}
    assert "(default: 0.5)" in parser.format_help()


def test_nearest_without_a_close_match() -> None:
    assert nearest("zzz", ["alpha", "beta"]) == "; known are alpha, beta"
    assert nearest("zzz", []) == ""


def test_the_variable_of_the_test_data_is_no_setting(tmp_path: Path) -> None:
    environ = {"FL_LLAMA_DATA": "/somewhere", "XDG_CONFIG_HOME": str(tmp_path)}
    assert load_settings(Sample, "edge", environ=environ).settings == Sample()
