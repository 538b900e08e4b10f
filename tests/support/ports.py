"""Ports that nobody else takes between the time they are chosen and the time they are used."""

from __future__ import annotations

import random
import socket
from pathlib import Path

from torch.distributed import TCPStore


def quiet_port() -> int:
    """A free one that the kernel gives to nobody who asks for just any."""
    first_of_any = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    chosen = random.SystemRandom()  # what seeds the other generators gives others the same
    for _ in range(100):
        port = chosen.randrange(max(2000, first_of_any // 2), first_of_any)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RuntimeError(f"no port below {first_of_any} is free")


def group_of_one() -> tuple[TCPStore, dict[str, str]]:
    """A store, and the environment of a rank that finds it, as under torchrun.

    Keep the store for as long as the rank is there.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return store, {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "0",
    }
