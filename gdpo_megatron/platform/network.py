"""The way from this machine to the node where a job's nodes meet."""

from __future__ import annotations

import socket
from dataclasses import dataclass

import psutil


@dataclass(frozen=True, slots=True)
class Way:
    """How this machine reaches another one.

    Args:
        address: its own, as the other one sees it.
        interface: network interface.
        is_there: whether this machine is the other one; None where the way is the loopback, which
            each machine has, and several launchers on one.
    """

    address: str
    interface: str
    is_there: bool | None

    @property
    def environment(self) -> dict[str, str]:
        """Variables for workers.

        gloo would otherwise take the interface that the machine's name stands for, which is often
        the loopback, or nothing.
        """
        return {"GLOO_SOCKET_IFNAME": self.interface}


def way_to(endpoint: str) -> Way | None:
    """The way to HOST:PORT; None where that has no address here, or no way leads there.

    Nothing is sent: the kernel is asked which way it would take.
    """
    host, _, port = endpoint.rpartition(":")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)
    except (OSError, ValueError):
        return None
    for family, kind, protocol, _, there in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(there)
                address = str(probe.getsockname()[0])
        except OSError:
            continue
        for interface, addresses in psutil.net_if_addrs().items():
            if any(it.address.split("%")[0] == address for it in addresses):
                loopback = address.startswith("127.") or address == "::1"
                return Way(address, interface, None if loopback else address == there[0])
    return None
