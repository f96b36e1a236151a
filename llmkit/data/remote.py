"""Files elsewhere, by URL: object stores and clusters through fsspec and the user's driver, web servers by HTTP.

No message, name or JSON made here holds a password, a key or a signature that stood in a URL.
"""

import glob
import hashlib
import io
import json
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

from llmkit.data.places import FileFault
from llmkit.errors import DataError, LlmkitError, MissingError, RecipeError

_DRIVERS = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
    "az": "adlfs",
    "adl": "adlfs",
    "oss": "ossfs",
    "hdfs": "pyarrow",
    "webhdfs": "requests",
    "sftp": "paramiko",
    "ssh": "paramiko",
    "smb": "smbprotocol",
    "oci": "ocifs",
}
_CHECKSUMS = (
    "ETag",
    "etag",
    "md5Hash",
    "md5",
    "content_md5",
    "contentHash",
    "checksum",
    "crc32c",
    "generation",
)
_DATES = ("mtime", "LastModified", "last_modified", "modified", "updated")
_PAUSES_S = (0.5, 1.0, 2.0, 4.0)
_HASH_BYTES = 2**20
_WEB = ("http", "https")

_USER = re.compile(r"(://)[^/\s@'\"]{1,500}@")
_QUERY = re.compile(r"(://[^\s?#'\"]{1,8000})[?#][^\s'\"]*")
_SECRET = re.compile(
    r"sig|token|key|secret|pass|auth|cred|expires|^x-amz|^x-goog|^se$|^sp$|^sv$", re.IGNORECASE
)

T = TypeVar("T")


def is_url(pattern: str) -> bool:
    """Whether an entry of `files` is a URL."""
    return re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*://", pattern) is not None


def without_secrets(text: str) -> str:
    """The text with users, passwords, queries and fragments taken out of its URLs."""
    return _QUERY.sub(r"\1", _USER.sub(r"\1", text))


def bare_url(url: str) -> str:
    """One URL without user, password, query and fragment."""
    bare = re.split(r"[?#]", url, maxsplit=1)[0]
    scheme, sign, rest = bare.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}{sign}{host.rpartition('@')[2]}{slash}{path}" if sign else bare


def local_path(url: str) -> str | None:
    """The path that a `file://` URL means; None for any other URL."""
    if not url.lower().startswith("file://"):
        return None
    path = url[len("file://") :].removeprefix("localhost")
    return path if Path(path).exists() else unquote(path)


@dataclass(frozen=True)
class RemoteFile:
    """A file elsewhere.

    Attributes:
        shown: Its URL without secrets, for messages and records.
        root: The URL by which its file system is reached; may hold secrets.
        path: Its name there.
        size: Bytes, if the other side tells.
        stamp: What the other side says of the content: a checksum, or date and size; empty if nothing.
        seeks: Whether reading can begin anywhere.
    """

    shown: str
    root: str = field(repr=False)
    path: str = field(repr=False)
    size: int | None
    stamp: str
    seeks: bool

    @property
    def suffix(self) -> str:
        """The last ending of the name: `.gz`."""
        return PurePosixPath(urlsplit(self.shown).path).suffix

    @property
    def stem(self) -> str:
        """The name without the last ending."""
        return PurePosixPath(urlsplit(self.shown).path).stem

    def identity(self) -> str:
        """A hash of what tells the content: the other side's word for it, else the bytes themselves.

        Raises:
            MissingError: It cannot be reached.
        """
        if self.stamp:
            told = [self.shown, _lasting_query(self.root), self.size, self.stamp]
            return hashlib.sha256(json.dumps(told).encode()).hexdigest()
        digest = hashlib.sha256()
        with self.open() as file:
            while chunk := file.read(_HASH_BYTES):
                digest.update(chunk)
        return digest.hexdigest()

    def open(self, start: int = 0) -> io.RawIOBase:
        """The file to read from byte `start` on, and, where it `seeks`, to jump about in.

        Raises:
            DataError: It changed since it was listed, or may not be read.
            MissingError: It cannot be reached.
        """
        return _Reader(self, start)


def resolve(pattern: str) -> list[RemoteFile]:
    """The files that a URL means: one file, a glob, or a folder with all below it; sorted.

    Raises:
        DataError: Nothing is there.
        MissingError: The driver is not installed, or the other side cannot be reached.
        RecipeError: There is no such kind of URL.
    """
    if urlsplit(pattern).scheme.lower() in _WEB:
        from llmkit.data.web import web_file

        return [web_file(pattern)]
    return _Fsspec(pattern).resolve()


class _Reader(io.RawIOBase):
    """A remote file as a file: opened when it is first read, and again where reading broke off."""

    def __init__(self, file: RemoteFile, start: int) -> None:
        self._file = file
        self._open_at = _opener(file)
        self._at = start
        self._stream: Any = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._file.seeks and self._file.size is not None

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if not self.seekable():
            raise io.UnsupportedOperation("seek")
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._file.size or 0}[whence]
        if base + offset != self._at:
            self._drop()
            self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        if len(view) == 0 or (self._file.size is not None and self._at >= self._file.size):
            return 0
        data = retried(lambda: self._read(len(view)), self._file.shown)
        view[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        self._drop()
        super().close()

    def _read(self, size: int) -> bytes:
        try:
            if self._stream is None:
                self._stream = self._open_at(self._file, self._at)
            data = bytes(self._stream.read(size))
            if not data and self._file.size is not None and self._at < self._file.size:
                raise ConnectionError(f"it ended at byte {self._at:,} of {self._file.size:,}")
        except BaseException:
            self._drop()
            raise
        return data

    def _drop(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None


class _Fsspec:
    """Any file system that fsspec has a driver for."""

    def __init__(self, url: str) -> None:
        try:
            import fsspec
        except ImportError:
            raise MissingError(
                f"{without_secrets(url)}: reading URLs needs fsspec", hint="pip install fsspec"
            ) from None
        scheme = urlsplit(url).scheme.lower()
        try:
            self._fs, self._path = retried(lambda: fsspec.core.url_to_fs(url), without_secrets(url))
        except ImportError as error:
            raise MissingError(
                f"{without_secrets(url)}: {scheme}:// needs a driver ({without_secrets(str(error))})",
                hint=f"pip install {_DRIVERS.get(scheme, f'the fsspec driver for {scheme}://')}",
            ) from None
        except ValueError as error:
            raise RecipeError(
                f"{without_secrets(url)}: {without_secrets(str(error))}",
                hint="such as s3://bucket/*.jsonl, gs://, hdfs://, https://, or a path",
            ) from None
        self._url = url

    def resolve(self) -> list[RemoteFile]:
        """The files that the URL means."""
        infos = retried(self._infos, without_secrets(self._url))
        found = [self._file(info) for name, info in sorted(infos.items()) if info.get("type") == "file"]
        if not found:
            raise DataError(f"no file matches {without_secrets(self._url)}")
        return found

    def open_at(self, file: RemoteFile, start: int) -> Any:
        if file.stamp and self._stamp(self._fs.info(file.path)) != file.stamp:
            raise changed(file)
        stream = self._fs.open(file.path, "rb")
        if start:
            stream.seek(start)
        return stream

    def _infos(self) -> dict[str, dict[str, Any]]:
        if glob.has_magic(self._path):
            found: dict[str, dict[str, Any]] = self._fs.glob(self._path, detail=True)
            return found
        if self._fs.isdir(self._path):
            below = self._fs.find(self._path, detail=True)
            length = len(self._path.rstrip("/"))
            return {name: info for name, info in below.items() if "/." not in name[length:]}
        return {self._path: self._fs.info(self._path)}

    def _file(self, info: dict[str, Any]) -> RemoteFile:
        path = str(info["name"])
        return RemoteFile(
            shown=without_secrets(str(self._fs.unstrip_protocol(path))),
            root=self._url,
            path=path,
            size=info.get("size"),
            stamp=self._stamp(info),
            seeks=info.get("size") is not None,
        )

    def _stamp(self, info: dict[str, Any]) -> str:
        for key in _CHECKSUMS:
            if info.get(key):
                return f"{key} {info[key]} size {info.get('size')}"
        told = next((info[key] for key in _DATES if info.get(key)), None) or self._modified(str(info["name"]))
        return f"changed {told} size {info.get('size')}" if told else ""

    def _modified(self, path: str) -> Any:
        try:
            return self._fs.modified(path)
        except (NotImplementedError, KeyError, AttributeError):  # it does not tell
            return None


def _lasting_query(url: str) -> list[tuple[str, str]]:
    """What of a URL's query tells one page from another, without signatures, which change."""
    return [(name, value) for name, value in parse_qsl(urlsplit(url).query) if not _SECRET.search(name)]


def retried(work: Callable[[], T], shown: str) -> T:
    """Do it, and again a few times where the network fails.

    Raises:
        DataError: There is no such file, or it may not be read.
        MissingError: The network failed each time.
    """
    for pause in (*_PAUSES_S, None):
        try:
            return work()
        except LlmkitError:
            raise
        except FileNotFoundError:
            raise FileFault(f"{shown}: no such file", reason="no such file") from None
        except PermissionError as error:
            raise _refused(shown, str(error)) from None
        except _network_errors() as error:
            reason = without_secrets(str(error)) or type(error).__name__
        if pause is not None:
            time.sleep(pause)
    raise MissingError(
        f"{shown} cannot be reached, tried {len(_PAUSES_S) + 1} times ({reason})",
        hint="check the network and the address, then run the same command again: finished parts are kept",
    )


def _refused(shown: str, reason: str) -> FileFault:
    return FileFault(f"{shown}: cannot be read ({without_secrets(reason)})", reason="refused by the server")


def changed(file: RemoteFile) -> DataError:
    """The error for a file that is no longer the one that was listed."""
    return DataError(f"{file.shown}: the file changed while it was read", hint="run the same command again")


def _network_errors() -> tuple[type[Exception], ...]:
    """What drivers raise when the network fails; those not loaded cannot have raised anything."""
    names = (
        ("botocore.exceptions", "BotoCoreError"),
        ("aiohttp", "ClientError"),
        ("requests", "RequestException"),
    )
    loaded = [getattr(sys.modules[module], name) for module, name in names if module in sys.modules]
    return (OSError, *loaded)


def _opener(file: RemoteFile) -> Callable[[RemoteFile, int], Any]:
    """What opens the file at a byte and gives a stream with `read(size)` and `close()`."""
    if urlsplit(file.root).scheme.lower() in _WEB:
        from llmkit.data.web import open_at

        return open_at
    return _Fsspec(file.root).open_at
