"""The store of an `s3://bucket/prefix`; the only module that imports boto3.

botocore retries requests with exponential backoff and jitter (`standard` mode, at most `max_attempts`
tries).  It does not retry a body that breaks off while it is read; that is done here, with the same
bound.  Credentials come from the AWS chain (environment, profile, instance role), or none are used
(`s3.anonymous`).
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import boto3
import urllib3.exceptions
from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
    ProfileNotFound,
    ReadTimeoutError,
    ResponseStreamingError,
)
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from ..config.sections import S3Config
from ..errors import EnvironmentFault, GlannError, UserError, first_line
from .base import Data, Entry, MissingObject, ObjectExists, TruncatedObject, check_key
from .files import os_fault, replacing
from .proxy import proxy_hint
from .s3_address import endpoint_of, split_s3

MULTIPART_BYTES = 64 << 20
STREAM_BYTES = 16 << 20  # part size of a streamed upload
STREAM_PARTS = 4  # parts of a stream in memory and in flight at a time
_BROKEN_BODY = (
    ResponseStreamingError,
    IncompleteReadError,
    ReadTimeoutError,
    urllib3.exceptions.HTTPError,
    TruncatedObject,
)
_REFUSED = ("AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "403", "401")
_MAX_WAIT_S = 20.0
PUBLIC = "a public bucket is read without keys by s3.anonymous=true (--no-sign-request)"
NOT_PUBLIC = (
    "it is not open to requests without keys: set the AWS_* keys, and leave out s3.anonymous (--no-sign-request)"
)

T = TypeVar("T")


class S3Store:
    """Objects under a prefix of a bucket. Safe for use by many threads."""

    def __init__(self, url: str, s3: S3Config):
        self._bucket, self._prefix = split_s3(url)
        self.url = url.rstrip("/")
        self._s3 = s3
        self._endpoint = endpoint_of(s3)
        self._bucket_exists = False  # unknown, until it was asked for
        self._client = _client(s3, self._endpoint)
        self._transfer = TransferConfig(
            multipart_threshold=MULTIPART_BYTES, multipart_chunksize=MULTIPART_BYTES // 4, max_concurrency=8
        )
        self._stream = TransferConfig(
            multipart_threshold=STREAM_BYTES, multipart_chunksize=STREAM_BYTES, max_concurrency=STREAM_PARTS
        )
        self._stream.max_in_memory_upload_chunks = STREAM_PARTS  # boto3 does not pass this on

    def __reduce__(self) -> tuple[type[S3Store], tuple[str, S3Config]]:
        """A client cannot be pickled; its address and configuration can."""
        return S3Store, (self.url, self._s3)

    def read(self, key: str) -> bytes:
        return self._body(key, None)

    def read_range(self, key: str, offset: int, length: int) -> bytes:
        return self._body(key, (offset, length)) if length else b""

    def write(self, key: str, data: Data, *, only_if_absent: bool = False) -> None:
        place = self._own(key)
        with self._faults(key):
            if isinstance(data, Iterator):
                if only_if_absent:
                    raise ValueError("a stream cannot be written on condition")
                # boto3 retries each part by itself and aborts the upload if one fails.
                stream = _Stream(data)
                self._client.upload_fileobj(stream, place["Bucket"], place["Key"], Config=self._stream)
                self._check_size(key, stream.size)
            elif only_if_absent:
                # A single request even for a large file: the condition must apply to the whole object.
                with contextlib.ExitStack() as stack:
                    body = stack.enter_context(open(data, "rb")) if isinstance(data, Path) else data
                    self._client.put_object(**place, Body=body, IfNoneMatch="*")
            elif isinstance(data, Path):
                self._client.upload_file(str(data), place["Bucket"], place["Key"], Config=self._transfer)
                self._check_size(key, data.stat().st_size)
            else:
                self._client.put_object(**place, Body=data)

    def download(self, key: str, path: Path) -> None:
        place = self._place(key)
        with self._faults(key), replacing(path) as temporary:
            size = self.size(key)

            def once() -> None:
                temporary.seek(0)
                temporary.truncate()
                self._client.download_fileobj(place["Bucket"], place["Key"], temporary, Config=self._transfer)
                temporary.flush()
                if os.fstat(temporary.fileno()).st_size != size:
                    raise TruncatedObject(f"{self.url}/{key}: not all of its {size} bytes arrived")

            self._again(once)

    def entries(self, prefix: str = "") -> Iterator[Entry]:
        with self._faults(prefix):
            pages = self._client.get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self._bucket, Prefix=self._prefix + prefix):
                for entry in page.get("Contents", ()):
                    if not entry["Key"].endswith("/"):  # S3 consoles create such empty objects for "folders"
                        yield Entry(entry["Key"][len(self._prefix) :], entry["Size"])

    def sizes(self, prefix: str = "") -> dict[str, int]:
        return dict(sorted((entry.key, entry.size) for entry in self.entries(prefix)))

    def list(self, prefix: str = "") -> list[str]:
        return list(self.sizes(prefix))

    def exists(self, key: str) -> bool:
        try:
            self.size(key)
        except MissingObject:
            return False
        return True

    def size(self, key: str) -> int:
        with self._faults(key):
            try:
                return int(self._client.head_object(**self._place(key))["ContentLength"])
            except ClientError as error:
                if _status(error) == 404:  # the response to HEAD has no body: a missing bucket looks the same
                    self._require_bucket()
                raise

    def delete(self, key: str) -> None:
        with self._faults(key):
            self._client.delete_object(**self._own(key))

    def sweep(self, prefix: str = "") -> None:
        """Abort incomplete multipart uploads; servers that cannot list uploads are left as they are."""
        with self._faults(prefix):
            pages = self._client.get_paginator("list_multipart_uploads")
            try:
                for page in pages.paginate(Bucket=self._bucket, Prefix=self._prefix + prefix):
                    for upload in page.get("Uploads", ()):
                        with contextlib.suppress(self._client.exceptions.NoSuchUpload):
                            place = {"Bucket": self._bucket, "Key": upload["Key"]}
                            self._client.abort_multipart_upload(**place, UploadId=upload["UploadId"])
            except ClientError as error:
                if error.response["ResponseMetadata"]["HTTPStatusCode"] not in (405, 501):
                    raise

    def _require_bucket(self) -> None:
        """Raise UserError if the server says that there is no such bucket; asked once."""
        if self._bucket_exists:
            return
        try:
            self._client.head_bucket(Bucket=self._bucket)
        except ClientError as error:  # another status: not permitted, or not supported by the server
            if _status(error) == 404:
                raise self._place_of_fault("").no_bucket() from error
        self._bucket_exists = True

    def _place(self, key: str) -> dict[str, str]:
        """Where an object is that is read. Every key is possible on S3 but that HTTP resolves `.` and `..` in paths."""
        if not key or any(part in (".", "..") for part in key.split("/")):
            raise UserError(f"{self.url}/{key} is not a usable file name: copy the object to a key without . and ..")
        return {"Bucket": self._bucket, "Key": self._prefix + key}

    def _own(self, key: str) -> dict[str, str]:
        """Where an object is that is written."""
        return self._place(check_key(key))

    def _body(self, key: str, extent: tuple[int, int] | None) -> bytes:
        """Read an object or a range of it, of exactly the announced length."""
        request: dict[str, Any] = self._place(key)
        if extent:
            request["Range"] = f"bytes={extent[0]}-{extent[0] + extent[1] - 1}"

        def once() -> bytes:
            answer = self._client.get_object(**request)
            with contextlib.closing(answer["Body"]) as body:
                data = body.read()
            wanted = extent[1] if extent else answer["ContentLength"]
            if len(data) != wanted:
                raise TruncatedObject(f"{self.url}/{key}: {len(data)} bytes arrived instead of {wanted}")
            return data

        with self._faults(key):
            return self._again(once)

    def _again(self, once: Callable[[], T]) -> T:
        """Retry a download whose body broke off; botocore retries the requests themselves."""
        retrying = Retrying(
            stop=stop_after_attempt(self._s3.max_attempts),
            wait=wait_random_exponential(0.5, max=_MAX_WAIT_S),
            retry=retry_if_exception_type(_BROKEN_BODY),
            reraise=True,
        )
        return retrying(once)

    def _check_size(self, key: str, size: int) -> None:
        stored = self.size(key)
        if stored != size:
            raise TruncatedObject(f"{self.url}/{key}: {stored} of {size} bytes were stored")

    def _place_of_fault(self, key: str) -> _Place:
        where = f"{self.url}/{key}" if key else self.url
        endpoint = str(self._client.meta.endpoint_url)
        return _Place(where, self._bucket, self._endpoint or "AWS", endpoint, self._s3.anonymous)

    @contextlib.contextmanager
    def _faults(self, key: str) -> Iterator[None]:
        """Raise errors in one line, which names the address and nothing else of the request."""
        at = self._place_of_fault(key)
        try:
            yield
        except ClientError as error:
            raise at.explain(error) from error
        except (NoCredentialsError, PartialCredentialsError) as error:
            raise UserError(
                f"no S3 keys for {at.where}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; {PUBLIC}"
            ) from error
        except GlannError:  # already in one line
            raise
        except (ConnectionError, HTTPClientError, *_BROKEN_BODY) as error:
            raise EnvironmentFault(
                f"{at.where}: cannot reach S3 at {at.server} after {self._s3.max_attempts} tries "
                f"({type(error).__name__}); check the network and s3.endpoint_url{at.hint()}"
            ) from error
        except ParamValidationError as error:
            raise UserError(f"{at.where} is not a possible S3 address: {_last_line(error)}") from error
        except (BotoCoreError, Boto3Error) as error:
            raise at.explain_transfer(error) from error
        except OSError as error:
            raise os_fault(error, error.filename or at.where) from error


class _Stream:
    """A file-like view of consecutive pieces, as boto3 needs it; counts the bytes and drops pieces once read."""

    def __init__(self, pieces: Iterator[memoryview]):
        self.size = 0
        self._pieces = pieces
        self._rest = memoryview(b"")

    def read(self, amount: int = -1) -> bytes:
        """The next `amount` bytes, fewer only at the end; the rest if `amount` is negative."""
        taken: list[memoryview] = []
        missing = amount if amount >= 0 else 1 << 62
        while missing:
            if not self._rest:
                piece = next(self._pieces, None)
                if piece is None:
                    break
                self._rest = piece
            taken.append(self._rest[:missing])
            self._rest = self._rest[missing:]
            missing -= len(taken[-1])
        data = b"".join(taken)
        self.size += len(data)
        return data


class _Place(NamedTuple):
    """Where a request failed, for its message."""

    where: str
    bucket: str
    server: str
    endpoint: str  # also that of AWS
    anonymous: bool

    def hint(self) -> str:
        return proxy_hint(self.endpoint)

    def no_bucket(self) -> UserError:
        return UserError(
            f"there is no bucket {self.bucket} at {self.server}; create it or correct the address {self.where}"
        )

    def explain(self, error: ClientError) -> UserError | EnvironmentFault:
        code, status = str(error.response.get("Error", {}).get("Code", "unknown")), _status(error)
        where, server = self.where, self.server
        if code == "NoSuchBucket":
            return self.no_bucket()
        if code in ("NoSuchKey", "404", "NotFound"):
            return MissingObject(f"no such object: {where}")
        if code in ("PreconditionFailed", "412", "ConditionalRequestConflict"):
            return ObjectExists(f"{where} exists already")
        if code in ("InvalidRange", "416"):
            return TruncatedObject(f"{where} ends before the requested bytes")
        if code in _REFUSED or status in (401, 403):
            remedy = NOT_PUBLIC if self.anonymous else f"check the AWS_* keys and what they permit; {PUBLIC}"
            return UserError(f"S3 at {server} refuses access to {where} ({code}); {remedy}{self.hint()}")
        if status in (301, 400) or code in ("PermanentRedirect", "AuthorizationHeaderMalformed", "InvalidBucketName"):
            return UserError(
                f"S3 at {server} does not take requests for {where} ({code}); check s3.region and the address"
                f"{self.hint()}"
            )
        return EnvironmentFault(
            f"S3 at {server} failed for {where} after the allowed tries ({code}, status {status}){self.hint()}"
        )

    def explain_transfer(self, error: Exception) -> UserError | EnvironmentFault:
        """Like `explain`, for client errors that boto3 wraps in multipart transfers."""
        cause = error.__cause__ or error.__context__
        if isinstance(cause, ClientError):
            return self.explain(cause)
        return EnvironmentFault(f"S3 at {self.server} failed for {self.where} ({type(error).__name__}){self.hint()}")


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


@functools.lru_cache(maxsize=16)
def _client(s3: S3Config, endpoint: str | None) -> Any:
    """One client per configuration: clients are thread-safe, hold connections and are slow to create."""
    config = Config(
        retries={"mode": "standard", "total_max_attempts": s3.max_attempts},
        connect_timeout=s3.timeout_s,
        read_timeout=s3.timeout_s,
        s3={"addressing_style": "path" if s3.path_style else "auto"},
        # Self-hosted servers reject the trailing checksums that botocore sends by default.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        max_pool_connections=64,
        **({"signature_version": UNSIGNED} if s3.anonymous else {}),
    )
    try:
        session = boto3.session.Session()
        # S3 signatures need a region; self-hosted servers accept any.
        region = s3.region or session.region_name or "us-east-1"
        return session.client("s3", endpoint_url=endpoint, region_name=region, config=config)
    except (ProfileNotFound, BotoCoreError, ValueError) as error:
        raise UserError(f"S3 cannot be set up: {first_line(error)}") from error


def _last_line(error: Exception) -> str:
    return str(error).splitlines()[-1][:200]
