"""A user's own drafter and noise: how they are found, and what noise has to keep."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from edge_client.plugins import check_name, make_plugin
from edge_client.runtime import EdgeRuntime
from edge_client.settings import EdgeSettings
from split_llama.config import BlockRange
from split_llama.errors import UsageError
from split_llama.noise import (
    Accountant,
    NoiseChain,
    NoiseScope,
    NoiseSpec,
    PrefixNoise,
    apply,
    apply_plugin,
    normal_rows,
)
from split_llama.settings import load_settings
from tests.edge_client.conftest import MakeSettings, ServeModel

SOURCE = '''
import torch
from split_llama.noise import normal_rows

class Laplace:
    """Laplace noise of scale 0.1: the difference of two exponentials, here from the digests' normal numbers."""

    def rows(self, states, digests):
        n = torch.from_numpy(normal_rows(digests, 4 * states.shape[1])).view(len(states), 4, -1)
        return states + 0.1 * (n[:, 0] * n[:, 1] + n[:, 2] * n[:, 3])

class NeedsMore:
    def __init__(self, size): ...

class NoRows: ...

class Refuses:
    def __init__(self):
        from split_llama.errors import UsageError
        raise UsageError("set LAPLACE_SCALE first")

number = 3

class Outer:
    class Inner(Laplace): ...
'''


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_noise.py").write_text(SOURCE)
    (tmp_path / "broken_noise.py").write_text("def (:\n")
    (tmp_path / "needy_noise.py").write_text("import no_such_library\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("own_noise", "broken_noise", "needy_noise"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return "own_noise"


def test_a_class_is_found_and_made(module: str) -> None:
    made = make_plugin("noise", f"{module}:Laplace", "rows")
    assert type(made).__name__ == "Laplace"
    assert type(make_plugin("noise", f"{module}:Outer.Inner", "rows")).__name__ == "Inner"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_noise", "expected MODULE:CLASS"),
        ("own_noise:", "expected MODULE:CLASS"),
        ("../own:Laplace", "expected MODULE:CLASS"),
        ("no_such_module:Laplace", "no module 'no_such_module'; install it, or name its folder in PYTHONPATH"),
        ("own_noise.sub:Laplace", "no module 'own_noise.sub'"),
        ("needy_noise:Laplace", "needy_noise imports 'no_such_library', which is not installed"),
        ("broken_noise:Laplace", "importing broken_noise failed: SyntaxError"),
        ("own_noise:Laplac", "own_noise has no 'Laplac'; did you mean 'Laplace'?"),
        ("own_noise:number", "no class or function, but a int"),
        ("own_noise:NeedsMore", "cannot be made with 0 arguments: TypeError"),
        ("own_noise:NoRows", "makes a NoRows, which has no method rows()"),
        ("own_noise:Refuses", "set LAPLACE_SCALE first"),
    ],
)
def test_mistakes_are_told_in_words(module: str, name: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        make_plugin("noise", name, "rows")
    assert message in caught.value.message


def test_the_current_folder_is_no_place_to_look_unless_named(module: str, tmp_path: Path) -> None:
    code = "from edge_client.plugins import make_plugin; make_plugin('noise', 'own_noise:Laplace', 'rows')"
    # The script itself lies elsewhere: `python -c` alone would look in the current folder.
    script = tmp_path / "elsewhere" / "run.py"
    script.parent.mkdir()
    script.write_text(code)
    root = str(Path(__file__).resolve().parents[2])
    for path, works in ((root, False), (f"{root}{os.pathsep}{tmp_path}", True)):
        done = subprocess.run(
            [sys.executable, str(script)],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": path},
            capture_output=True,
            timeout=60,
            check=False,
        )
        assert (done.returncode == 0) is works
        assert works or b"PYTHONPATH" in done.stderr


def test_the_setting_takes_a_name() -> None:
    loaded = load_settings(EdgeSettings, "edge", {"noise": "own_noise:Laplace"}, environ={}, config_file=None)
    assert NoiseSpec.parse(loaded.settings.noise).plugin == "own_noise:Laplace"
    with pytest.raises(UsageError, match="MODULE:CLASS"):
        load_settings(EdgeSettings, "edge", {"noise": "own noise:Laplace"}, environ={}, config_file=None)
    with pytest.raises(ValueError, match="MODULE:CLASS"):
        check_name("a:b:c")


def scope(spec: NoiseSpec) -> NoiseScope:
    return NoiseScope(model="m", adapter="", blocks=BlockRange(1, 3), width=8, spec=spec, numerics="float32")


def test_a_plugin_has_a_chain_of_its_own_and_others_keep_theirs() -> None:
    secret = bytes(32)
    plugin = NoiseSpec.parse("own_noise:Laplace")
    assert plugin.is_on
    assert plugin.with_clip(3.0) == plugin
    roots = {PrefixNoise(secret, scope(spec)).root for spec in (plugin, NoiseSpec(0.1), NoiseSpec.parse("own_noise:B"))}
    assert len(roots) == 3
    assert scope(NoiseSpec(0.1, 2.0)).encode() == b'["m","",[1,3],8,"float32",0.1,2.0]'
    with pytest.raises(UsageError, match="own clipping"):
        NoiseSpec(0.0, 2.0, "own_noise:Laplace")
    with pytest.raises(AssertionError, match="apply_plugin"):
        apply(plugin, torch.zeros(1, 8), torch.zeros(1, 8))


def test_rows_of_one_prefix_are_one_release_and_public_ones_stay(module: str) -> None:
    noise = make_plugin("noise", f"{module}:Laplace", "rows")
    states = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    chain = NoiseChain(PrefixNoise(bytes(32), scope(NoiseSpec.parse(f"{module}:Laplace"))))
    chain.append([1, 5, 6, 7])
    accountant = Accountant()
    digests = chain.digests(0)
    accountant.charge(digests[1:])
    rows = apply_plugin(noise, module, states, digests, exact_rows=1)
    assert torch.equal(rows[0], states[0])
    assert not torch.isclose(rows[1:], states[1:]).all(dim=1).any()
    later = apply_plugin(noise, module, states[2:], digests[2:])
    assert torch.equal(later, rows[2:])
    accountant.charge(digests[2:])
    assert accountant.rows == 3
    assert torch.equal(apply_plugin(noise, module, states[:1], digests[:1], exact_rows=1), states[:1])
    assert normal_rows(digests, 8).shape == (4, 8)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda states: states[:, :3], r"gave \[2, 3\] torch.float32; float32 rows \[2, 8\] were expected"),
        (lambda states: states.double(), "torch.float64"),
        (lambda states: states.tolist(), "gave list"),
        (lambda states: states * float("nan"), "not finite"),
        (lambda states: None, "gave NoneType"),
        (lambda states: states[5], "failed, and nothing was sent: IndexError"),
    ],
)
def test_rows_that_cannot_be_sent_are_refused(answer: Any, message: str) -> None:
    class Odd:
        def rows(self, states: Tensor, digests: Sequence[bytes]) -> Tensor:
            assert len(states) == len(digests) == 2
            given: Tensor = answer(states)
            return given

    with pytest.raises(UsageError, match=message):
        apply_plugin(Odd(), "own:Odd", torch.zeros(3, 8), [b"a" * 32] * 3, exact_rows=1)


def test_what_a_plugin_does_to_its_argument_stays_its_own_affair() -> None:
    class Clears:
        def rows(self, states: Tensor, digests: Sequence[bytes]) -> Tensor:
            return states.zero_()

    states = torch.ones(2, 8)
    assert not apply_plugin(Clears(), "own:Clears", states, [b"", b""]).any()
    assert states.all()


async def test_own_noise_is_what_the_server_gets(
    module: str, tiny_checkpoint: Any, serve_model: ServeModel, edge_settings: MakeSettings
) -> None:
    ids = [1, *range(10, 40)]
    async with serve_model(tiny_checkpoint()) as url:

        async def final(**changes: str) -> tuple[Tensor, int]:
            async with EdgeRuntime.connect(edge_settings(url, **changes)) as edge:
                return await edge.final_states(ids), edge.rows_released

        bare, _ = await final()
        noised, released = await final(noise=f"{module}:Laplace")
        again, _ = await final(noise=f"{module}:Laplace")
        drafted = edge_settings(url, noise=f"{module}:Laplace", speculate="4", drafter="lookup")
        async with EdgeRuntime.connect(drafted) as edge:
            tokens = [event.token async for event in edge.generate(ids, edge.params(max_new_tokens=30))]
        async with EdgeRuntime.connect(edge_settings(url, noise=f"{module}:Laplace", speculate="off")) as edge:
            assert tokens == [event.token async for event in edge.generate(ids, edge.params(max_new_tokens=30))]
        for noise, clip, message in (
            (f"{module}:Laplace", "3", "own clipping"),
            ("no_such:Class", "auto", "no module 'no_such'"),
        ):
            with pytest.raises(UsageError, match=message):
                await final(noise=noise, clip=clip)
    assert released == len(ids) - 1
    assert torch.equal(noised, again)
    assert not torch.isclose(bare[1:], noised[1:], atol=1e-2).all(dim=1).any()
