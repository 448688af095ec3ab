"""Which hosts a sandbox may reach: names with ports, and no address that is not public.

What it is
    `Allowlist.of(["pypi.org", "*.pythonhosted.org:443"])` reads the rules, `allows(host, port)` decides on
    the name, `public(address)` on what it resolved to. Both must hold, and the connection must go to that
    very address: a name that answers differently the second time gains nothing.

What it does not do
    No names are resolved and nothing is connected here (`egress.py`).
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

WEB = (80, 443)
_LABEL = r"[a-z0-9_](?:[a-z0-9_-]*[a-z0-9_])?"
_RULE = re.compile(rf"^(?P<any>\*\.)?(?P<host>{_LABEL}(?:\.{_LABEL})*)(?::(?P<port>\d{{1,5}}))?$")
_NUMBER = re.compile(r"^(0x[0-9a-f]*|\d+)$")  # the last part of what some resolvers take for an address
_NAT64 = (ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("64:ff9b:1::/48"))


@dataclass(frozen=True)
class Rule:
    """One line of the list. `below`: also every name below the host, but not itself."""

    host: str
    below: bool
    ports: tuple[int, ...]

    def allows(self, host: str, port: int) -> bool:
        named = host.endswith(f".{self.host}") if self.below else host == self.host
        return named and port in self.ports


@dataclass(frozen=True)
class Allowlist:
    """Empty: nothing is allowed."""

    rules: tuple[Rule, ...] = ()

    @classmethod
    def of(cls, lines: Iterable[str]) -> Self:
        """ValueError for a line that is no rule."""
        return cls(tuple(_rule(line) for line in lines))

    def allows(self, host: str, port: int) -> bool:
        """By name, never by address: what is written as a number is refused whatever the list says."""
        name = host.lower().removesuffix(".")
        return not is_number(name) and any(rule.allows(name, port) for rule in self.rules)


def _rule(line: str) -> Rule:
    found = _RULE.match(line.strip().lower().removesuffix("."))
    if found is None or is_number(found["host"]) or not 0 < int(found["port"] or 1) < 65536:
        raise ValueError(
            f"{line[:80]!r} is no host that could be allowed: write a name, `*.name` for all below it, and "
            "`:port` where it is neither 80 nor 443. Addresses cannot be allowed."
        )
    ports = (int(found["port"]),) if found["port"] else WEB
    return Rule(found["host"], bool(found["any"]), ports)


def is_number(host: str) -> bool:
    """Whether somebody might take it for an address: 127.1, 0x7f000001, 2130706433, ::1."""
    return ":" in host or "%" in host or bool(_NUMBER.match(host.rpartition(".")[2]))


def public(address: str) -> bool:
    """Whether it is one of the internet, in whatever clothes."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour or (found.teredo[1] if found.teredo else None)
        if inner is not None or any(found in network for network in _NAT64):
            return False
        if int(found) >> 32 == 0:  # ::127.0.0.1
            return False
    return found.is_global and not (found.is_multicast or found.is_reserved or found.is_unspecified)
