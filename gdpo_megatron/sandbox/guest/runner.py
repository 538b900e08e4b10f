"""In the child, after it is confined: runs the program like `python main.py`, or calls into it.

Exit codes tell the caller what a traceback would tell a person. A program may forge them; all that
they distinguish is the kind of its failure, never success, and never a fault of the sandbox.
"""

from __future__ import annotations

import atexit
import errno
import gc
import importlib
import json
import os
import random
import site
import sys
import threading
import traceback
import types
import warnings

from gdpo_megatron.sandbox.guest.encode import encode

FAILED, COMPILE_ERROR, MEMORY, DENIED, NO_LITERAL = 1, 80, 81, 82, 83
VALUE_DESCRIPTOR = 3

# What programs import most, so that each child has it for free.
_PRELOADED = (
    "abc array base64 bisect calendar cmath collections contextlib copy dataclasses datetime "
    "decimal enum fractions functools hashlib heapq inspect itertools json math numbers operator "
    "pprint queue random re statistics string struct sys textwrap threading time traceback typing "
    "unittest encodings.idna encodings.ascii encodings.latin_1"
).split()
# What a package imports at first use, which each child would pay for.
_PARTS = {"numpy": ("random", "linalg", "fft")}


def preload(packages: dict[str, str]) -> None:
    """Import what children will want.

    Args:
        packages: name -> folder that it is found in; imported once, then the folder is forgotten.
    """
    for name, folder in packages.items():
        sys.path.insert(0, folder)
        for module in (name, *(f"{name}.{part}" for part in _PARTS.get(name, ()))):
            importlib.import_module(module)
        sys.path.remove(folder)
        sys.path_importer_cache.pop(folder, None)
    for name in _PRELOADED:
        importlib.import_module(name)
    site.setquit()  # exit() and quit(), which -S leaves out
    site.setcopyright()
    sys.dont_write_bytecode = True
    gc.collect()
    gc.freeze()  # children then touch, hence copy, fewer pages


def read_request(descriptor: int) -> dict:
    """Read and close the run's request: JSON, with "sources" and what to do after them."""
    with open(descriptor, "rb") as file:
        file.seek(0)
        return json.load(file)


def run(request: dict) -> None:
    """Run the request; ends the process."""
    code = FAILED
    try:
        _open_standard_files()
        code = _run_sources(request)
        code = _finish(code)
    except BaseException:
        code = code or FAILED
    finally:
        os._exit(code)


def _open_standard_files() -> None:
    """Those of the server are of other files, and remember things of them."""
    options = {"encoding": "utf-8", "closefd": False}
    sys.stdin = sys.__stdin__ = open(0, errors="surrogateescape", **options)
    sys.stdout = sys.__stdout__ = open(1, "w", errors="surrogateescape", **options)
    sys.stderr = sys.__stderr__ = open(2, "w", errors="backslashreplace", **options)
    sys.argv = ["main.py"]
    random.seed(0)  # a program that draws gets the same verdict everywhere
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)


def _run_sources(request: dict) -> int:
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    warnings.simplefilter("ignore")
    try:
        compiled = [
            compile(text, name, "exec", dont_inherit=True) for name, text in request["sources"]
        ]
    except BaseException:
        traceback.print_exc(limit=0)
        return COMPILE_ERROR
    try:
        for code in compiled:
            exec(code, main.__dict__)
        if "expression" in request:
            code = compile(request["expression"], "call", "eval", dont_inherit=True)
            value = eval(code, main.__dict__)
            return _answer(value)
        if "check" in request:
            exec(compile(request["check"], "check", "exec", dont_inherit=True), main.__dict__)
            os.write(VALUE_DESCRIPTOR, request["nonce"].encode())
        return 0
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return (error.code or 0) & 255
        print(error.code, file=sys.stderr)
        return FAILED
    except MemoryError:
        return MEMORY
    except BaseException as error:
        inner = error.__traceback__ and error.__traceback__.tb_next  # without this file's frame
        traceback.print_exception(error.with_traceback(inner), limit=-20)
        if isinstance(error, OSError) and error.errno in (errno.EPERM, errno.EACCES):
            return DENIED
        return FAILED


def _answer(value: object) -> int:
    try:
        text = encode(value)
    except MemoryError:
        return MEMORY
    except (TypeError, RecursionError, ValueError) as error:
        print(error, file=sys.stderr)
        return NO_LITERAL
    rest = memoryview(text.encode())
    while rest:
        rest = rest[os.write(VALUE_DESCRIPTOR, rest) :]
    return 0


def _finish(code: int) -> int:
    """What an interpreter does on its way out; programs rely on all of it."""
    try:
        threading._shutdown()  # type: ignore[attr-defined]  # private, so not in the stubs: joins threads
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.__stdout__, sys.stderr, sys.__stderr__):
            if stream is not None and not stream.closed:
                stream.flush()
    except MemoryError:
        return code or MEMORY
    except BaseException:
        return code or FAILED
    return code
