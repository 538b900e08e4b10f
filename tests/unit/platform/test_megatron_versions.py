"""Which Megatron-Core is accepted, and what is said of another one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

from gdpo_megatron.errors import InputError
from gdpo_megatron.platform import megatron_versions
from gdpo_megatron.platform.cpu import CpuPlatform
from gdpo_megatron.platform.cuda import CudaPlatform
from gdpo_megatron.platform.megatron_versions import SUPPORTED, megatron_version

CHOICES = (
    "choices: 0.16.1 up to, not including, 0.17.0 (pip install megatron-core==0.16.1); "
    "0.19.2 up to, not including, 0.20.0 "
    "(pip install --no-deps --ignore-requires-python megatron-core==0.19.2)"
)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a megatron.core that an import would find."""
    folder = tmp_path / "core"
    folder.mkdir()
    monkeypatch.setattr(megatron_versions, "_find", lambda: folder)
    megatron_version.cache_clear()
    yield folder
    megatron_version.cache_clear()


def write(package: Path, numbers: str) -> None:
    major, minor, patch = numbers.split(".")
    text = f"MAJOR = {major}\nMINOR = {minor}\nPATCH = {patch}\nPRE_RELEASE = ''\n"
    # Like Megatron's own file it does something when it is run, which a reader does not do.
    (package / "package_info.py").write_text(text + "raise SystemExit('it was run')\n")


def test_the_installed_one_is_what_is_read() -> None:
    found = ".".join(map(str, megatron_version()))
    assert found == version("megatron-core")
    assert found in [it.tested for it in SUPPORTED]


def test_reading_imports_nothing_of_it() -> None:
    code = (
        "import sys; from gdpo_megatron.platform.megatron_versions import megatron_version as read;"
        "read(); print([name for name in sys.modules if name.startswith('megatron.')])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout == "[]\n"


@pytest.mark.parametrize("numbers", ["0.16.1", "0.16.9", "0.19.2", "0.19.11"])
def test_accepted(numbers: str, package: Path) -> None:
    write(package, numbers)
    assert megatron_version() == tuple(map(int, numbers.split(".")))


@pytest.mark.parametrize("numbers", ["0.16.0", "0.17.0", "0.18.2", "0.19.1", "0.20.0", "1.16.1"])
def test_others_are_refused_with_the_way_to_a_right_one(numbers: str, package: Path) -> None:
    write(package, numbers)
    with pytest.raises(InputError) as caught:
        megatron_version()
    [problem] = caught.value.problems
    assert problem == f"megatron-core {numbers} ({package}) is not supported; {CHOICES}"


@pytest.mark.parametrize("text", [None, "", "MAJOR = ", "MAJOR, MINOR, PATCH = 0, 16, 1\n"])
def test_no_version_to_read(text: str | None, package: Path) -> None:
    if text is not None:
        (package / "package_info.py").write_text(text)
    with pytest.raises(InputError, match="no version of megatron-core can be read; choices: 0"):
        megatron_version()


def test_none_installed(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megatron_versions, "_find", lambda: None)
    with pytest.raises(InputError) as caught:
        megatron_version()
    assert caught.value.problems == [f"megatron-core is not installed; {CHOICES}"]


@pytest.mark.parametrize("platform", [CpuPlatform, CudaPlatform])
def test_platforms_refuse_before_megatron_is_imported(platform: type, package: Path) -> None:
    write(package, "0.18.0")
    hooks = list(sys.meta_path)
    with pytest.raises(InputError, match="not supported"):
        platform().prepare_megatron()
    assert sys.meta_path == hooks
