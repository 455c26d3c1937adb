"""Our package `kernels` beside Hugging Face's of the same name, which transformers looks for."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

import pytest
from packaging.version import Version
from test_packaging import context, installed, run, wheel  # noqa: F401
from transformers.utils import import_utils

from serving.kernels_package import check_kernels_package
from split_llama.errors import UsageError

ROOT = Path(__file__).resolve().parents[1]
GENERATE = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[1:]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
import kernels
import torch
import transformers
from transformers.utils import import_utils

model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
))
tokens = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, min_new_tokens=4, do_sample=False)
print(kernels.__file__, import_utils.is_kernels_available(), tokens.shape[1], "triton" in sys.modules)
"""


def generate(python: Path | str, cwd: Path, *hidden: str) -> tuple[Path, list[str]]:
    """Generate in a fresh process; give where `kernels` came from, and what else was printed."""
    file, *rest = run(python, "-c", GENERATE, *hidden, cwd=cwd).stdout.split()
    return Path(file), rest


def test_transformers_generates_beside_ours_where_it_is_in_the_source_tree() -> None:
    file, rest = generate(sys.executable, ROOT)
    assert file == ROOT / "kernels" / "__init__.py"
    assert rest[:2] == ["False", "7"]


def test_transformers_generates_beside_the_installed_wheel_and_without_triton(
    installed: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    file, rest = generate(installed / "bin" / "python", tmp_path, "triton")
    assert file.is_relative_to(installed)
    assert rest == ["False", "7", "False"]


def test_our_version_is_never_one_of_theirs_that_transformers_accepts() -> None:
    ours = Version(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"])
    accepted = Version(import_utils.KERNELS_MIN_VERSION), Version(import_utils.KERNELS_MAX_VERSION)
    assert not accepted[0] <= ours < accepted[1], "transformers would take our kernels for Hugging Face's"


def test_ours_is_accepted() -> None:
    check_kernels_package()


def test_the_installed_wheels_is_accepted(installed: Path, tmp_path: Path) -> None:  # noqa: F811
    code = "from serving.kernels_package import OURS, check_kernels_package\ncheck_kernels_package()\nprint(OURS)"
    assert Path(run(installed / "bin" / "python", "-c", code, cwd=tmp_path).stdout.strip()).is_relative_to(installed)


def test_hugging_faces_distribution_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = tmp_path / "kernels-0.18.2.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match=r"Hugging Face's package kernels 0\.18\.2 .* pip uninstall kernels"):
        check_kernels_package()


def test_another_module_of_that_name_is_refused_with_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    with pytest.raises(UsageError, match=f"finds another of that name in {tmp_path / 'kernels'}; rename or remove"):
        check_kernels_package()


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="part of fl-llama, is missing"):
        check_kernels_package()
