"""tools/replay_dockerfile.py and .dockerignore: what would reach an image, and in which order.

Not covered: an installation, which running the tool shows, and a container engine.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

REPO = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def replay() -> ModuleType:
    spec = importlib.util.spec_from_file_location("replay", REPO / "tools/replay_dockerfile.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_instructions(replay: ModuleType):
    text = '# a comment\nFROM a AS b\nRUN one \\\n    && two\n\n# note\nFROM c\nCMD ["x", "y z"]\n'
    assert list(replay.instructions(text)) == [
        ("FROM", "a AS b"),
        ("RUN", "one && two"),
        ("FROM", "c"),
        ("CMD", '["x", "y z"]'),
    ]
    assert replay.last_stage(text) == [("FROM", "c"), ("CMD", '["x", "y z"]')]
    assert replay.exec_form('--interval=1m CMD ["x", "y z"]') == ["x", "y z"]


def test_packages_are_installed_before_the_source_is_there(replay: ModuleType):
    """So that a change of the source does not install them again."""
    steps = replay.last_stage((REPO / "Dockerfile").read_text())
    order = [name + " " + arguments.split()[-1] for name, arguments in steps]
    wanted = ["RUN packages", "RUN compiled", "COPY .", "RUN project"]
    assert [it for it in order if it in wanted] == wanted
    users = [arguments for name, arguments in steps if name == "USER"]
    assert users == ["10001"], "not root"
    assert ("ENTRYPOINT", '["gdpo-megatron"]') in steps


def test_health_check_names_checks_that_there_are(replay: ModuleType):
    from gdpo_megatron.doctor import CHECKS

    steps = dict(replay.last_stage((REPO / "Dockerfile").read_text()))
    program, command, *checks = replay.exec_form(steps["HEALTHCHECK"])
    assert (program, command) == ("gdpo-megatron", "doctor")
    assert checks and set(checks) <= set(CHECKS.names())


def test_context_of_the_repository(replay: ModuleType):
    files = {str(path) for path in replay.context(REPO)}
    assert {
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "gdpo_megatron/platform/pins.toml",
        "scripts/install_image.sh",
        "scripts/lib/requirements-image-gpu.txt",
    } <= files
    assert {it.split("/")[0] for it in files} == {
        *("pyproject.toml", "README.md", "LICENSE"),
        *("gdpo_megatron", "scripts", "examples", "tools"),
    }
    assert not [it for it in files if "__pycache__" in it or it.endswith(".pyc")]


def test_context_takes_what_is_listed(replay: ModuleType, tmp_path: Path):
    for name in ("a/x.py", "a/__pycache__/x.pyc", "b/y", "c"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / ".dockerignore").write_text("# why\n*\n!a\n!c\n**/__pycache__\n")
    assert [str(path) for path in replay.context(tmp_path)] == ["a/x.py", "c"]
    (tmp_path / ".dockerignore").write_text("!a\n")
    with pytest.raises(ValueError, match="must begin with"):
        list(replay.context(tmp_path))
