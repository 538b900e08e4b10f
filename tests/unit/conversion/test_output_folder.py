"""A converted folder appears when it is whole; what is interrupted goes on; full disks are told.

Power failures are out of reach of a test: that files and folders are synced is not shown.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gdpo_megatron.conversion import output_folder
from gdpo_megatron.conversion.architecture import ModelArchitecture
from gdpo_megatron.conversion.convert import Format, convert
from gdpo_megatron.conversion.families import load_architecture
from gdpo_megatron.conversion.hf_io import RandomWeights
from gdpo_megatron.conversion.hf_writer import hf_tensors, write_hf_folder
from gdpo_megatron.conversion.mapping import hf_shapes
from gdpo_megatron.conversion.model_folder import model_files, open_checkpoint
from gdpo_megatron.conversion.output_folder import OutputFolder, manifest_problems
from gdpo_megatron.errors import InputError

Write = Callable[..., Path]
SHARD = 4000
FORMATS = ("hf", "megatron")


@pytest.fixture
def source(write_config: Write, arch: ModelArchitecture, tmp_path: Path) -> Path:
    write_hf_folder(
        tmp_path / "source",
        hf_tensors(RandomWeights(arch, 0), arch),
        arch,
        dtype=torch.float32,
        source=write_config("config"),
        save_tokenizer=lambda folder: None,
    )
    return tmp_path / "source"


class Watch:
    """Counts what is written, keeps messages, and may act after so many tensors."""

    def __init__(self, act: Callable[[], None] = lambda: None, after: int = 0):
        self.files: list[str] = []
        self.messages: list[str] = []
        self._act, self._after = act, after

    def begin(self, num_bytes: int, num_files: int) -> None:
        self.num_files = num_files

    def advance(self, file: str, num_bytes: int) -> None:
        self.files.append(file)
        if len(self.files) == self._after:
            self._act()

    def message(self, text: str) -> None:
        self.messages.append(text)


def assert_complete(folder: Path, source: Path) -> None:
    """The target holds the source's tensors, its manifest is right, and nothing is beside it."""
    arch = load_architecture(source)
    one, other = open_checkpoint(source, arch), open_checkpoint(folder, arch)
    assert all(torch.equal(one.get(name), other.get(name)) for name in hf_shapes(arch))
    assert manifest_problems(folder) == []
    assert not [p for p in folder.parent.iterdir() if p.name.startswith(f"{folder.name}.")]
    assert not list(folder.glob(".journal*")) + list(folder.glob(".lock"))


# ---- whole or absent -----------------------------------------------------------------------------


@pytest.mark.parametrize("to", FORMATS)
def test_appears_at_the_end(to: Format, source: Path, tmp_path: Path) -> None:
    target, seen = tmp_path / "out", []

    class Look(Watch):
        def advance(self, file: str, num_bytes: int) -> None:
            super().advance(file, num_bytes)
            seen.append((target.exists(), (tmp_path / "out.partial" / file).exists()))

    look = Look()
    convert(source, target, to=to, shard_bytes=SHARD, progress=look)
    assert set(seen) == {(False, True)}
    assert len(set(look.files)) == look.num_files > 4
    assert_complete(target, source)


@pytest.mark.parametrize("to", FORMATS)
def test_existing_target(to: Format, source: Path, tmp_path: Path) -> None:
    """Told before anything is read; with overwrite the old one stands until the new one does."""
    target = tmp_path / "out"
    convert(source, target, to="hf", dtype="bfloat16")
    (target / "note.txt").write_text("of the old one")
    with pytest.raises(InputError) as caught:
        convert(tmp_path / "nowhere", target, to=to)
    assert str(caught.value) == (
        f"{target}: exists; give another name, or --overwrite to replace it"
    )

    def look() -> None:
        assert (target / "note.txt").exists()

    convert(source, target, to=to, overwrite=True, progress=Watch(look, 3))
    assert not (target / "note.txt").exists()
    assert_complete(target, source)


@pytest.mark.parametrize("to", FORMATS)
def test_failure_keeps_the_old_one(to: Format, source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    convert(source, target, to=to)
    before = (target / "manifest.json").read_bytes()

    def fail() -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        convert(source, target, to=to, dtype="float16", overwrite=True, progress=Watch(fail, 2))
    assert (target / "manifest.json").read_bytes() == before
    assert manifest_problems(target) == []


def test_overwrite_spares_other_folders(source: Path, tmp_path: Path) -> None:
    documents = tmp_path / "documents"
    documents.mkdir()
    (documents / "thesis.txt").write_text("years")
    with pytest.raises(InputError, match="exists and holds no model"):
        convert(source, documents, to="hf", overwrite=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="exists and is not a folder"):
        convert(source, tmp_path / "file", to="hf", overwrite=True)
    (tmp_path / "link").symlink_to(documents)
    with pytest.raises(InputError, match="exists and is not a folder"):
        convert(source, tmp_path / "link", to="hf", overwrite=True)
    assert (documents / "thesis.txt").exists()


def test_target_around_the_source(source: Path) -> None:
    for target in (source, source / "out", source.parent):
        with pytest.raises(InputError, match=r"lies within .* or around it|holds no model"):
            convert(source, target, to="hf", overwrite=True)


@pytest.mark.parametrize("to", FORMATS)
def test_two_at_once(to: Format, source: Path, tmp_path: Path) -> None:
    """The second is refused and does not disturb the first."""

    def second() -> None:
        with pytest.raises(InputError, match="another process is writing it"):
            convert(source, tmp_path / "out", to=to)

    convert(source, tmp_path / "out", to=to, shard_bytes=SHARD, progress=Watch(second, 3))
    assert_complete(tmp_path / "out", source)


# ---- going on ------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
from gdpo_megatron.conversion.convert import convert
class Progress:
    count = 0
    def begin(self, num_bytes, num_files): pass
    def message(self, text): pass
    def advance(self, file, num_bytes):
        self.count += 1
        if self.count == int(sys.argv[4]):
            os.kill(os.getpid(), signal.SIGKILL)
convert(Path(sys.argv[1]), Path(sys.argv[2]), to=sys.argv[3], shard_bytes=4000, progress=Progress())
"""


@pytest.mark.parametrize("to", FORMATS)
def test_goes_on_after_a_kill(to: Format, source: Path, tmp_path: Path) -> None:
    target, partial = tmp_path / "out", tmp_path / "out.partial"
    command = [sys.executable, "-c", KILLED, str(source), str(target), to, "9"]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert not target.exists()
    lines = (partial / ".journal").read_text().splitlines()
    kept = {json.loads(line)["file"] for line in lines[1:]}
    before = {name: (partial / name).stat() for name in kept}
    assert len(kept) >= 2
    watch = Watch()
    done = convert(source, target, to=to, shard_bytes=SHARD, progress=watch)
    assert watch.messages == [f"going on: {partial} has {len(kept)} finished files"]
    for name, stat in before.items():
        assert (target / name).stat().st_ino == stat.st_ino
        assert (target / name).stat().st_mtime_ns == stat.st_mtime_ns
    assert watch.num_files == len(set(watch.files)) > len(kept)
    assert_complete(target, source)
    straight = convert(source, tmp_path / "straight", to=to, shard_bytes=SHARD).manifest["files"]
    # The metadata of a distributed checkpoint carries a random id and the folder's name.
    assert {
        name: entry for name, entry in done.manifest["files"].items() if name != ".metadata"
    } == {name: entry for name, entry in straight.items() if name != ".metadata"}


def interrupted(source: Path, tmp_path: Path, to: Format) -> Path:
    """Leave a .partial with some finished files; returns it."""

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", to=to, shard_bytes=SHARD, progress=Watch(stop, 9))
    return tmp_path / "out.partial"


def damage_file(partial: Path) -> None:
    path = min(p for p in partial.iterdir() if p.suffix in (".safetensors", ".distcp"))
    data = bytearray(path.read_bytes())
    data[-10] ^= 1
    path.write_bytes(data)


def cut_journal(partial: Path) -> None:
    path = partial / ".journal"
    path.write_text(path.read_text()[:-20])


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("change", [damage_file, cut_journal])
def test_unsure_files_are_written_again(
    change: Callable[[Path], None], to: Format, source: Path, tmp_path: Path
) -> None:
    partial = interrupted(source, tmp_path, to)
    count = len((partial / ".journal").read_text().splitlines()) - 1
    change(partial)
    (partial / "rest.tmp").write_text("of the writer that died")
    watch = Watch()
    convert(source, tmp_path / "out", to=to, shard_bytes=SHARD, progress=watch)
    assert watch.messages == [f"going on: {partial} has {count - 1} finished files"]
    assert not (tmp_path / "out" / "rest.tmp").exists()
    assert_complete(tmp_path / "out", source)


def test_journal_survives_a_full_disk(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Going on before there is room again loses nothing."""
    partial = interrupted(source, tmp_path, "megatron")
    before = (partial / ".journal").read_text()

    def no_room(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", no_room)
        with pytest.raises(InputError, match="keeps the finished files"):
            convert(source, tmp_path / "out", to="megatron", shard_bytes=SHARD)
    assert (partial / ".journal").read_text() == before
    convert(source, tmp_path / "out", to="megatron", shard_bytes=SHARD)
    assert_complete(tmp_path / "out", source)


@pytest.mark.parametrize(
    "options", [{"dtype": "bfloat16"}, {"shard_bytes": 5000}, {"to": "hf"}, {"touch": True}]
)
def test_something_else_starts_over(options: dict[str, Any], source: Path, tmp_path: Path) -> None:
    partial = interrupted(source, tmp_path, "megatron")
    if options.pop("touch", False):
        os.utime(source / "model.safetensors", ns=(1, 1))
    watch = Watch()
    arguments: dict[str, Any] = {"to": "megatron", "shard_bytes": SHARD, **options}
    convert(source, tmp_path / "out", progress=watch, **arguments)
    assert watch.messages == [
        f"starting over: {partial} was begun from another source or with other options"
    ]
    if "dtype" not in options:
        assert_complete(tmp_path / "out", source)


def test_non_finite_of_finished_files_is_remembered(
    source: Path, arch: ModelArchitecture, tmp_path: Path
) -> None:
    weights = RandomWeights(arch, 0)
    held = {name: weights.get(name) for name in hf_shapes(arch)}
    held["model.embed_tokens.weight"][0, 0] = float("nan")
    write_hf_folder(
        source,
        held.items(),
        arch,
        dtype=torch.float32,
        source=source,
        save_tokenizer=lambda folder: None,
    )
    interrupted(source, tmp_path, "megatron")
    done = convert(source, tmp_path / "out", to="megatron", shard_bytes=SHARD)
    assert done.non_finite == {"model.embed_tokens.weight": 1}


# ---- disk full -----------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """An empty disk of 40 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(folder)],
        check=False,
        capture_output=True,
        text=True,
    )
    if mounted.returncode:
        # Without a disk that can be full there is nothing to test; mounting takes root.
        pytest.skip(f"no small disk can be mounted: {mounted.stderr.strip()}")
    yield folder
    # Lazily: a failed test may still hold a file of it.
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path) -> None:
    with (disk / "filler").open("wb", buffering=0) as stream:
        for size in (2**20, 2**12):
            try:
                while stream.write(bytes(size)) == size:
                    pass
            except OSError:
                pass


@pytest.mark.parametrize("after", [1, 6])
@pytest.mark.parametrize("to", FORMATS)
def test_disk_becomes_full(to: Format, after: int, source: Path, small_disk: Path) -> None:
    """Something else fills the disk in the middle; with room again, the same command goes on."""
    target, partial = small_disk / "out", small_disk / "out.partial"
    with pytest.raises(InputError) as caught:
        convert(
            source,
            target,
            to=to,
            shard_bytes=SHARD,
            progress=Watch(lambda: fill(small_disk), after),
        )
    (problem,) = caught.value.problems
    assert problem.startswith(f"{target}: no space left on its disk")
    if after > 1:  # tried again too early: what is finished stays
        with pytest.raises(InputError, match=r"no space left|more bytes"):
            convert(source, target, to=to, shard_bytes=SHARD)
    assert not target.exists()
    assert partial.exists() == ("run the same command again" in problem) == (after > 1)
    (small_disk / "filler").unlink()
    watch = Watch()
    convert(source, target, to=to, shard_bytes=SHARD, progress=watch)
    assert bool(watch.messages) == (after > 1)
    assert_complete(target, source)


@pytest.mark.parametrize("to", FORMATS)
def test_disk_is_full_already(to: Format, source: Path, small_disk: Path) -> None:
    fill(small_disk)
    with pytest.raises(InputError) as caught:
        convert(source, small_disk / "out", to=to)
    assert "no space left on its disk" in str(caught.value) or "more bytes" in str(caught.value)
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


def test_too_little_space(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known before the first byte is written."""
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(output_folder.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(InputError) as caught:
        convert(source, tmp_path / "out", to="megatron")
    size = sum(torch.Size(s).numel() for s in hf_shapes(load_architecture(source)).values()) * 4
    assert str(caught.value) == (
        f"{tmp_path / 'out'}: needs {size + 32 * 2**20:,} more bytes, 1,000 are free on its disk"
    )
    assert not list(tmp_path.glob("out*"))


def test_unwritable(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        convert(source, tmp_path / "file" / "out", to="hf")


# ---- manifest ------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda f: flip(f / "model.safetensors"), "model.safetensors has another content than"),
        (lambda f: (f / "config.json").write_text("{}"), "config.json has 2 bytes, not "),
        (lambda f: (f / "config.json").unlink(), "config.json is missing"),
        (lambda f: (f / "modeling.py").write_text(""), "modeling.py is not in manifest.json"),
        (lambda f: (f / "manifest.json").write_text("[]"), "manifest.json is not of the kind"),
        (
            lambda f: (f / "manifest.json").write_text('{"format": "other", "files": {}}'),
            "manifest.json is not of the kind",
        ),
    ],
)
def test_tampering(change: Callable[[Path], None], expected: str, source: Path) -> None:
    assert manifest_problems(source) == []
    change(source)
    (problem,) = manifest_problems(source) or []
    assert problem.startswith(expected)


def test_no_manifest(source: Path) -> None:
    (source / "manifest.json").unlink()
    assert manifest_problems(source) is None


def test_checksums_are_of_the_bytes_on_the_disk(tmp_path: Path) -> None:
    import hashlib

    with OutputFolder(tmp_path / "out", overwrite=False, resume_key={"a": 1}) as out:
        with out.create("data", {}) as stream:
            for part in (b"one", memoryview(b"two"), torch.arange(6).numpy()):
                stream.write(part)
        manifest = out.publish({"kind": "test"})
    data = b"onetwo" + torch.arange(6).numpy().tobytes()
    assert (tmp_path / "out" / "data").read_bytes() == data
    assert manifest["files"] == {
        "data": {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    }
    assert model_files(tmp_path / "out") == tmp_path / "out"
