"""Where tars lie: on disk, behind URLs, or at the end of a program's pipe.

Any part of a tar can be read alone. A tar whose place does not allow that is copied to $TMPDIR first.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pipeline.config.paths import is_remote, tar_patterns
from pipeline.data.sources.optional import needed
from pipeline.errors import DataError

SCHEMES = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs"}  # and the library that fsspec needs
ATTEMPTS = 3  # at reading a part of a remote tar
IN_FOLDER = ("[!.]*.tar", "*/[!.]*.tar")  # macOS leaves ._train.tar
BLOCK_BYTES = 1 << 20  # read ahead from a URL
_PIPE = "pipe:"
_SECRET = re.compile(r"://[^/]*@|[?#]")
_copies: list[tempfile.TemporaryDirectory[str]] = []  # removed when this process ends


@dataclass(frozen=True)
class Tar:
    """One tar."""

    url: str  # for messages and names
    copy: str = ""  # local file that holds it, if `url` is not one itself

    @property
    def local(self) -> str:
        """The path of the tar on disk, or "" if it is read from its URL."""
        return self.copy or ("" if is_remote(self.url) else self.url)

    @property
    def name(self) -> str:
        """The file's name."""
        return self.url.rsplit("/", 1)[-1]


def is_pattern(place: str) -> bool:
    """Return whether a source names tars themselves, and not a folder."""
    return is_remote(place) or (place.endswith(".tar") and not Path(place).is_dir())


def find_tars(place: str, allow_pipe: bool) -> list[Tar]:
    """Return the tars of a folder, or of a pattern such as `s3://bucket/train-{000..127}.tar`.

    Raises DataError if there is none, or if its URL cannot be used here.
    """
    if not is_pattern(place):
        folder = Path(place)
        found = sorted(str(file) for pattern in IN_FOLDER for file in folder.glob(pattern))
        if not found:
            raise DataError(f"{place}: no .tar file is there")
        return [Tar(url) for url in found]
    tars = [_usable(Tar(url), allow_pipe) for url in _expand(place)]
    return [tar if is_remote(tar.url) else _on_disk(tar) for tar in tars]


def _expand(pattern: str) -> list[str]:
    """Return the tars of a pattern. Raises DataError."""
    try:
        return [url for part in tar_patterns(pattern) for url in _expand_one(part)]
    except ValueError as error:
        raise DataError(f"{pattern}: its braces are not balanced ({error})") from None


def _expand_one(pattern: str) -> Iterable[str]:
    """Expand the braces; those in the names of files and folders that are there stay."""
    import braceexpand

    place = Path(pattern)
    if is_remote(pattern) or not place.parent.is_dir():
        return braceexpand.braceexpand(pattern)
    if place.is_file():
        return [pattern]
    return [str(place.parent / name) for name in braceexpand.braceexpand(place.name)]


def _on_disk(tar: Tar) -> Tar:
    if not Path(tar.url).is_file():
        raise DataError(f"{tar.url}: no such file; check the numbers in shard.source")
    return tar


def _usable(tar: Tar, allow_pipe: bool) -> Tar:
    if tar.url.startswith(_PIPE):
        if not allow_pipe:
            raise DataError(
                f"{tar.url}: would start a program; "
                "set shard.allow_pipe=true if that is meant, or copy the tars"
            )
        return tar
    if not is_remote(tar.url):
        return tar
    scheme = tar.url.split(":", 1)[0]
    if scheme not in SCHEMES:
        raise DataError(f"{tar.url}: {scheme} is not known here; use {', '.join(SCHEMES)} or copy the tars")
    if _SECRET.search(tar.url.split(scheme, 1)[1]):
        raise DataError(
            f"{scheme}://...: the URL holds a user or a query, which configurations would keep; "
            "give access through the environment (AWS_PROFILE, AWS_ENDPOINT_URL) or copy the tars"
        )
    return tar


# ---- reading


def open_tar(tar: Tar) -> IO[bytes]:
    """Open a tar for reading at any position. Raises DataError."""
    try:
        if tar.local:
            return open(tar.local, "rb")
        system, path = _file_system(tar)
        opened: IO[bytes] = system.open(path, "rb", block_size=BLOCK_BYTES)
        return opened
    except DataError:
        raise
    except Exception as error:  # each library of fsspec has errors of its own
        raise DataError(f"{tar.url}: cannot be read ({_words(error)})") from None


def read_part(tar: Tar, start: int, length: int) -> bytes:
    """Return `length` bytes from `start` on; fewer if the tar ends there. Raises DataError."""
    if tar.local:
        try:
            with open(tar.local, "rb") as file:
                file.seek(start)
                return file.read(length)
        except OSError as error:
            raise DataError(f"{tar.url}: cannot be read ({error.strerror})") from None
    for attempt in range(ATTEMPTS):
        try:
            system, path = _file_system(tar)
            content: bytes = system.cat_file(path, start=start, end=start + length)
            return content
        except DataError:
            raise
        except Exception as error:
            if attempt == ATTEMPTS - 1:
                raise DataError(f"{tar.url}: cannot be read ({_words(error)})") from None
    raise AssertionError("the last attempt returns or raises")


def _file_system(tar: Tar) -> tuple[Any, str]:
    purpose = f"{tar.url}: reading it"
    needed(SCHEMES[tar.url.split(":", 1)[0]], "remote", purpose)
    system, path = needed("fsspec", "remote", purpose).core.url_to_fs(tar.url)
    return system, path


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


# ---- copies


def with_random_access(tars: list[Tar]) -> list[Tar]:
    """Return the tars, with a local copy of each that cannot be read at any position. Raises DataError."""
    return [tar if tar.local or _serves_parts(tar) else _copied(tar) for tar in tars]


def _serves_parts(tar: Tar) -> bool:
    """Return whether a server sends a part of a file alone; plain HTTP servers may send only the whole."""
    if tar.url.startswith(_PIPE):
        return False
    if tar.url.startswith("s3:"):
        return True
    try:
        system, path = _file_system(tar)
        system.info(path)  # raises FileNotFoundError
        return len(system.cat_file(path, start=1, end=3)) == 2
    except ValueError:
        return False
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{tar.url}: cannot be read ({_words(error)})") from None


def _copied(tar: Tar) -> Tar:
    if not _copies:
        _copies.append(tempfile.TemporaryDirectory(prefix="cvae-tars-"))
    copy = Path(_copies[0].name) / f"{len(list(Path(_copies[0].name).iterdir())):06d}.tar"
    with copy.open("wb") as target:
        if tar.url.startswith(_PIPE):
            _run(tar, target)
        else:
            system, path = _file_system(tar)
            try:
                with system.open(path, "rb", block_size=0) as stream:
                    shutil.copyfileobj(stream, target)
            except Exception as error:
                raise DataError(f"{tar.url}: cannot be read ({_words(error)})") from None
    return Tar(tar.url, str(copy))


def _run(tar: Tar, target: IO[bytes]) -> None:
    """Write what a program prints into `target`. No shell takes part."""
    command = shlex.split(tar.url.removeprefix(_PIPE))
    try:
        done = subprocess.run(
            command, stdout=target, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, check=False
        )
    except (OSError, IndexError) as error:
        raise DataError(f"{tar.url}: cannot be started ({error})") from None
    if done.returncode:
        said = " ".join(done.stderr.decode("utf-8", "replace").split())[-160:]
        raise DataError(f"{tar.url}: the program ended with exit code {done.returncode} ({said})")
