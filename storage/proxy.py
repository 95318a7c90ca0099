"""The proxy that an environment variable puts between this process and a server, named in error messages.

Servers of a cluster are usually reached directly, while `http_proxy` is set for the internet: without
`no_proxy` every request to them then goes to the proxy, which does not know them.
"""

from __future__ import annotations

import os
import shlex
from typing import NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies_environment, proxy_bypass_environment  # type: ignore[attr-defined]

from ..errors import redact


class Proxy(NamedTuple):
    """A proxy, the variable that names it, and the host that is reached through it."""

    url: str
    variable: str
    host: str

    def __str__(self) -> str:
        return f"requests to {self.host} go through the proxy {redact(self.url)} of the variable {self.variable}"

    @property
    def remedy(self) -> str:
        """The command that excepts the host from the proxy; what is excepted already stays so."""
        name = "no_proxy" if os.environ.get("no_proxy") else "NO_PROXY"  # the lower-case one takes precedence
        hosts = [self.host, f"[{self.host}]"] if ":" in self.host else [self.host]  # libraries differ in IPv6
        excepted = [part for part in (os.environ.get(name, ""), *hosts) if part]
        return f"export {name}={shlex.quote(','.join(excepted))}"


def proxy_of(url: str, *, reads_all_proxy: bool = False) -> Proxy | None:
    """The proxy through which requests to `url` go, or None.

    Args:
        reads_all_proxy: also consider ALL_PROXY, as the library `requests` does and boto3 does not.
    """
    try:
        split = urlsplit(url)
        host, scheme = split.hostname, split.scheme
    except ValueError:
        return None
    proxies = getproxies_environment()
    if not host or proxy_bypass_environment(split.netloc.rpartition("@")[2], proxies):
        return None
    for kind in (scheme, "all") if reads_all_proxy else (scheme,):
        if proxies.get(kind):
            names = (f"{kind}_proxy", f"{kind}_proxy".upper())
            return Proxy(proxies[kind], next((name for name in names if os.environ.get(name)), names[0]), host)
    return None


def proxy_hint(url: str, *, reads_all_proxy: bool = False) -> str:
    """End of a message about a failed request to `url`: the proxy and its remedy; "" where there is none."""
    proxy = proxy_of(url, reads_all_proxy=reads_all_proxy)
    return f"; {proxy}: correct it, or leave it out by `{proxy.remedy}`" if proxy else ""


def configured_proxies() -> str:
    """End of a message about a program that chose its own server: the proxies in the environment; "" without any."""
    names = [name for name in os.environ if name.lower() in ("http_proxy", "https_proxy", "all_proxy")]
    given = [f"{name}={redact(os.environ[name])}" for name in sorted(names) if os.environ[name]]
    return f"; {', '.join(given)} is set: correct it, or name the server in NO_PROXY" if given else ""
