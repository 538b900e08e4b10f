"""Programs that attack what runs them, as a table; each says THROUGH where it gets what it wants.

Pure data and standard library: the harness also runs where only a copy of the package is at hand.
`SECRET_FILE`, `OPEN_FOLDER`, `SECRET_VARIABLE`, `PORT` and `SOCKET` stand for what the harness lays
out. `call` makes a raw system call; whatever it does not refuse with EPERM, EACCES or ENOSYS counts
as through.
"""

from __future__ import annotations

from dataclasses import dataclass

_PRELUDE = """
import ctypes, errno, gc, os, resource, signal, socket, sys, threading, time
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
def call(*arguments):
    if _libc.syscall(*arguments) >= 0 or ctypes.get_errno() not in (
        errno.EPERM, errno.EACCES, errno.ENOSYS
    ):
        print("THROUGH", arguments, ctypes.get_errno())
def attempt(action, *arguments):
    try:
        print("THROUGH", action(*arguments))
    except (OSError, RuntimeError, ValueError) as error:
        print("stopped", type(error).__name__)
"""


@dataclass(frozen=True)
class Attack:
    """A program, and how its run may end.

    Args:
        program: after the common prelude.
        ends: statuses that are right; "ok" where it goes on after it was refused.
        wall_seconds: of the run; low only for what waits for ever.
        cpu_seconds: of the run; low only for what computes for ever.
    """

    program: str
    ends: tuple[str, ...] = ("ok",)
    wall_seconds: float = 600.0
    cpu_seconds: int = 60

    @property
    def source(self) -> str:
        """What is run."""
        return _PRELUDE + self.program


PROCESSES = {
    "fork once": Attack("attempt(os.fork)"),
    "fork bomb": Attack("while True:\n    os.fork()", ("denied",)),
    "fork by clone": Attack("call(56, 17, 0, 0, 0, 0)"),
    "clone3": Attack("call(435, ctypes.create_string_buffer(88), 88)"),
    "vfork": Attack("call(58)"),
    "posix_spawn": Attack("attempt(os.posix_spawn, '/bin/true', ['true'], {})"),
    "subprocess": Attack("import subprocess\nattempt(subprocess.run, ['/bin/true'])"),
    "os.system": Attack("print('THROUGH') if os.system('true') == 0 else print('stopped')"),
    "multiprocessing": Attack(
        "import multiprocessing\n"
        "attempt(multiprocessing.get_context('fork').Process(target=print).start)"
    ),
    "daemon": Attack(
        "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(600)",
        ("denied",),
    ),
    "new session": Attack("attempt(os.setsid)\ncall(109, 0, 0)"),
    "exec": Attack("attempt(os.execv, '/bin/true', ['true'])"),
    "exec of a memory file": Attack("call(319, b'x', 0)\ncall(322, 0, b'', None, None, 0x1000)"),
    "thread flood": Attack(
        "started = []\n"
        "def stay():\n    time.sleep(60)\n"
        "try:\n"
        "    while len(started) < 100000:\n"
        "        started.append(threading.Thread(target=stay, daemon=True))\n"
        "        started[-1].start()\n"
        "except (RuntimeError, MemoryError):\n    pass\n"
        "print('stopped at', len(started)) if len(started) < 5000 else print('THROUGH')",
        ("ok", "memory", "runtime_error", "timeout"),
        cpu_seconds=1,
    ),
}

SIGNALS = {
    "kill the parent": Attack(
        "attempt(os.kill, os.getppid(), signal.SIGKILL)\n"
        "attempt(os.kill, os.getppid(), signal.SIGSTOP)"
    ),
    "kill everybody": Attack("attempt(os.kill, -1, signal.SIGKILL)"),
    "kill the group": Attack("attempt(os.kill, 0, signal.SIGKILL)"),
    "kill by thread": Attack("call(200, os.getppid(), 9)\ncall(129, os.getppid(), 9, None)"),
    "kill by descriptor": Attack("call(434, os.getppid(), 0)\ncall(424, 0, 9, None, 0)"),
    "signal by file owner": Attack(
        "import fcntl\n"
        "r, w = os.pipe()\n"
        "attempt(fcntl.fcntl, r, fcntl.F_SETOWN, os.getppid())\n"
        "attempt(fcntl.fcntl, r, 10, 9)"
    ),
    "ptrace the parent": Attack("call(101, 16, os.getppid(), 0, 0)\ncall(101, 0, 0, 0, 0)"),
    "read the parent's memory": Attack("call(310, os.getppid(), None, 0, None, 0, 0)"),
    "write the parent's memory": Attack("call(311, os.getppid(), None, 0, None, 0, 0)"),
    "priority": Attack("attempt(os.setpriority, 0, os.getppid(), -5)"),
    "pin the parent": Attack("attempt(os.sched_setaffinity, os.getppid(), {0})"),
    "limits of the parent": Attack(
        "attempt(resource.prlimit, os.getppid(), resource.RLIMIT_CPU, (1, 1))"
    ),
}

FILES = {
    "read a secret file": Attack("attempt(lambda: open(SECRET_FILE).read())"),
    "read the accounts": Attack(
        "for path in ('/etc/passwd', '/etc/shadow', '/root/.bashrc', '/home'):\n"
        "    attempt(lambda: os.listdir(path) if path == '/home' else open(path).read())"
    ),
    "read by a relative path": Attack(
        "attempt(lambda: open('../' * 20 + SECRET_FILE.lstrip('/')).read())"
    ),
    "walk from open descriptors": Attack(
        "for number in range(300):\n"
        "    try:\n"
        "        os.fstat(number)\n"
        "    except OSError:\n"
        "        continue\n"
        "    for up in range(1, 9):\n"
        "        path = '../' * up + SECRET_FILE.lstrip('/')\n"
        "        try:\n"
        "            print('THROUGH', os.read(os.open(path, os.O_RDONLY, dir_fd=number), 99))\n"
        "        except OSError:\n"
        "            pass"
    ),
    "/proc tricks": Attack(
        "for path in ('/proc/self/environ', f'/proc/{os.getppid()}/environ', '/proc/1/environ',\n"
        "             f'/proc/{os.getppid()}/maps', '/proc/self/root/etc/passwd',\n"
        "             f'/proc/{os.getppid()}/root/etc/passwd', '/proc/self/cwd/etc/passwd',\n"
        "             '/proc/sys/kernel/core_pattern', '/proc/self/mem', '/proc/kcore'):\n"
        "    attempt(lambda: open(path, 'rb').read(1))"
    ),
    "write /proc/self/mem": Attack("attempt(open, '/proc/self/mem', 'r+b')"),
    "write beside a secret": Attack("attempt(open, OPEN_FOLDER + '/new', 'w')"),
    "append to a secret": Attack("attempt(open, SECRET_FILE, 'a')"),
    "truncate a secret": Attack("attempt(os.truncate, SECRET_FILE, 0)"),
    "write anywhere": Attack(
        "for folder in ('/tmp', '/var/tmp', '/dev/shm', '/etc', '/usr/lib', '/root', '.', '/',\n"
        "               os.path.dirname(os.__file__)):\n"
        "    attempt(open, folder + '/gdpo-attack', 'w')"
    ),
    "fill the disk": Attack(
        "import tempfile\n"
        "while True:\n    tempfile.NamedTemporaryFile(delete=False).write(b'x' * (1 << 20))",
        ("runtime_error", "denied"),
    ),
    "fill memory files": Attack(
        "number = 0\n"
        "for data in (b'x' * (1 << 20),) * 64:\n"
        "    attempt(os.write, 0, data)\n"
        "call(319, b'x', 0)"
    ),
    "device files": Attack("attempt(os.mknod, OPEN_FOLDER + '/device')"),
    "chmod": Attack("attempt(os.chmod, SECRET_FILE, 0o777)\ncall(91, 0, 0o777)"),
    "chown": Attack("attempt(os.chown, SECRET_FILE, 65534, 65534)"),
    "remove": Attack("attempt(os.unlink, SECRET_FILE)\nattempt(os.rmdir, OPEN_FOLDER)"),
    "rename": Attack("attempt(os.rename, SECRET_FILE, OPEN_FOLDER + '/moved')"),
    "symlink race": Attack(
        "for _ in range(200):\n"
        "    attempt(os.symlink, SECRET_FILE, OPEN_FOLDER + '/link')\n"
        "    attempt(os.link, SECRET_FILE, OPEN_FOLDER + '/hard')"
    ),
    "times of a file": Attack("attempt(os.utime, SECRET_FILE, (0, 0))"),
    "extended attributes": Attack("attempt(os.setxattr, SECRET_FILE, 'user.x', b'1')"),
    "file handles": Attack("call(303, -100, b'/', None, None, 0)\ncall(304, -100, None, 0)"),
    "environment": Attack(
        "print('THROUGH') if SECRET_VARIABLE in os.environ else print('stopped')\n"
        "print(sorted(os.environ.items()))"
    ),
}

NETWORK = {
    "TCP": Attack("attempt(socket.create_connection, ('127.0.0.1', PORT), 1)"),
    "TCP server": Attack("attempt(socket.create_server, ('', 0))"),
    "UDP": Attack(
        "attempt(lambda: socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', PORT)))"
    ),
    "abstract unix socket": Attack(
        "attempt(lambda: socket.socket(socket.AF_UNIX).connect('\\0' + SOCKET))"
    ),
    "socket pair": Attack("attempt(socket.socketpair)"),
    "raw and netlink": Attack("call(41, 2, 3, 1)\ncall(41, 16, 3, 0)\ncall(41, 17, 3, 0)"),
    "name look-up": Attack("attempt(socket.gethostbyname, 'localhost.localdomain.invalid')"),
}

KERNEL = {
    "user namespace": Attack("call(272, 0x10000000)\ncall(56, 0x10000000 | 17, 0, 0, 0, 0)"),
    "join a namespace": Attack("call(308, 0, 0)"),
    "mounts": Attack(
        "call(165, None, None, None, 0, None)\ncall(155, None, None)\ncall(166, b'/')"
    ),
    "chroot": Attack("attempt(os.chroot, '/')\nattempt(os.fchdir, 0)"),
    "io_uring": Attack("call(425, 1, None)\ncall(426, 0, 1, 0, 0, None, 0)\ncall(427, 0, 0, 0, 0)"),
    "bpf and perf": Attack("call(321, 0, None, 0)\ncall(298, None, 0, -1, -1, 0)"),
    "keys": Attack("call(248, None, None, None, 0, 0)\ncall(250, 0, 0)"),
    "userfaultfd": Attack("call(323, 0)"),
    "become root": Attack("attempt(os.setuid, 0)\nattempt(os.setresuid, 0, 0, 0)\ncall(126, 0, 0)"),
    "undo confinement": Attack(
        "call(157, 22, 0, 0, 0, 0)\ncall(157, 4, 1, 0, 0, 0)\n"
        "call(317, 0, 0, None)\ncall(444, 0, 0, 1)"
    ),
    "raise limits": Attack(
        "most = resource.RLIM_INFINITY\n"
        "for what in (resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_FSIZE):\n"
        "    attempt(resource.setrlimit, what, (most, most))"
    ),
    "x32 numbers": Attack("call(0x40000000 + 39)\ncall(0x40000000 + 57)"),
    "int 0x80": Attack(
        "import mmap\n"
        "page = mmap.mmap(-1, 4096, prot=7)\n"
        # mov eax, 20 (getpid); int 0x80; ret
        "page.write(b'\\xb8\\x14\\x00\\x00\\x00\\xcd\\x80\\xc3')\n"
        "where = ctypes.addressof(ctypes.c_char.from_buffer(page))\n"
        "print('THROUGH', ctypes.CFUNCTYPE(ctypes.c_int)(where)())",
        ("runtime_error",),
    ),
    "terminal": Attack(
        "import fcntl\n"
        "for number in range(3):\n"
        "    attempt(fcntl.ioctl, number, 0x5412, b'x')\n"  # TIOCSTI
        "attempt(open, '/dev/tty', 'w')"
    ),
}

RESOURCES = {
    "memory bomb": Attack("x = bytearray(1 << 40)", ("memory",)),
    "memory in pieces": Attack(
        "x = []\nwhile True:\n    x.append(bytearray(1 << 22))", ("memory",)
    ),
    "memory by mmap": Attack(
        "import mmap\nkept = []\n"
        "try:\n"
        "    while len(kept) < 4096:\n"
        "        kept.append(mmap.mmap(-1, 1 << 24))\n"
        "    print('THROUGH')\n"
        "except (OSError, MemoryError):\n    print('stopped')"
    ),
    "endless loop": Attack("while True:\n    pass", ("timeout",), cpu_seconds=1),
    "loop that ignores SIGXCPU": Attack(
        "signal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True:\n    pass",
        ("timeout",),
        cpu_seconds=1,
    ),
    "sleep that ignores signals": Attack(
        "for number in range(1, 65):\n"
        "    try:\n        signal.signal(number, signal.SIG_IGN)\n"
        "    except (OSError, ValueError):\n        pass\n"
        "time.sleep(3600)",
        ("timeout",),
        0.5,
    ),
    "stop itself": Attack("os.kill(os.getpid(), signal.SIGSTOP)", ("timeout",), 0.5),
    "thread that never ends": Attack(
        "threading.Thread(target=time.sleep, args=(3600,)).start()", ("timeout",), 0.5
    ),
    "exit that never comes": Attack(
        "import atexit\natexit.register(time.sleep, 3600)", ("timeout",), 0.5
    ),
    "kill itself": Attack("os.kill(os.getpid(), signal.SIGKILL)", ("memory",)),
    "endless stdout": Attack("while True:\n    print('x' * 9999)", ("output_limit",)),
    "endless stderr": Attack(
        "while True:\n    print('x' * 9999, file=sys.stderr)", ("output_limit",)
    ),
    "descriptor flood": Attack(
        "kept = []\n"
        "try:\n"
        "    while len(kept) < 10000:\n        kept.append(os.dup(0))\n"
        "    print('THROUGH')\n"
        "except OSError:\n    print('stopped')"
    ),
    "write to every descriptor": Attack(
        "for number in range(3, 1024):\n"
        "    try:\n        os.write(number, b'garbage')\n"
        "    except OSError:\n        pass"
    ),
    "close every descriptor": Attack("os.closerange(0, 1024)", ("ok", "runtime_error")),
    "deep recursion": Attack("def f(): return f()\nf()", ("runtime_error",)),
    "recursion without limit": Attack(
        "sys.setrecursionlimit(10**9)\n"
        "class A:\n    def __repr__(self): return repr(self)\nrepr(A())",
        ("runtime_error", "memory"),
    ),
    "huge integers": Attack("x = 7 ** (7 ** (7 ** 7))", ("timeout", "memory"), cpu_seconds=1),
    "null pointer": Attack("ctypes.string_at(0)", ("runtime_error",)),
    "nested source": Attack(
        "try:\n    eval('(' * 100000 + ')' * 100000)\n"
        "except (SyntaxError, MemoryError, RecursionError):\n    print('stopped')"
    ),
    "regular expression": Attack(
        "import re\nre.match('(a|a)*$', 'a' * 60 + 'b')", ("timeout",), cpu_seconds=1
    ),
    "terminal escapes": Attack("print('\\x1b]0;title\\x07\\x1b[2J\\x00\\x9b31m')"),
    "bytes that are no text": Attack("sys.stdout.buffer.write(bytes(range(256)))"),
    "no streams": Attack("sys.stdout = sys.stderr = sys.stdin = None"),
}

ATTACKS = PROCESSES | SIGNALS | FILES | NETWORK | KERNEL | RESOURCES
