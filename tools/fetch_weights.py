"""Fetch the weights of FID's Inception on a machine with internet.

An interrupted download continues. The file gets its name only after its sha256 was checked. To use it, set
eval.inception_weights=FILE, or CVAE_INCEPTION_WEIGHTS=FILE in the shell that launches runs. Behind a proxy
set https_proxy. On a machine without internet copy the file by hand.
"""

from __future__ import annotations

import http.client
import os
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from pipeline.command_line import parser
from pipeline.errors import DataError, UserError, exit_code
from pipeline.evaluation.features import INCEPTION_SHA256
from pipeline.rundir.files import naming, sha256, sync_folder

NAME = f"weights-inception-2015-12-05-{INCEPTION_SHA256}.pth"
URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{NAME}"
EXAMPLES = """\
  python tools/fetch_weights.py                     into weights/
  python tools/fetch_weights.py /scratch/inception.pth --url https://mirror.example/file.pth
"""
CHUNK, TIMEOUT_S = 1 << 20, 30.0  # bytes


class FetchError(UserError):
    """The file could not be fetched; the part that arrived stays, and the next attempt continues."""


def fetch(url: str, file: Path, digest: str) -> None:
    """Download `url` to `file` and check that its sha256 begins with `digest`; keep a complete file.

    Raises FetchError if the server cannot be reached or breaks off, StorageError for a full disk, and
    DataError for other content, which is then removed.
    """
    if file.is_dir():
        raise DataError(f"{file}: is a folder, expected the name of a file, such as {file / NAME}")
    if file.exists():
        return require_digest(file, file, digest)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.part")
    try:
        download(url, part)
    except urllib.error.HTTPError as error:
        raise FetchError(f"{url}: answered {error.code} {error.reason}; is the address right?") from None
    except UserError:
        raise  # of the disk; a StorageError is an OSError too
    except (ValueError, http.client.InvalidURL):
        raise FetchError(f"--url: got {url!r}, expected an address such as {URL}") from None
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise FetchError(
            f"{url}: {reason}, asked {_way_out()}. On a machine that reaches it run this tool again, "
            f"or copy the file to {file.absolute()}"
        ) from None
    require_digest(part, file, digest)
    os.replace(part, file)
    sync_folder(file.parent)


def _way_out() -> str:
    """Say through which proxy requests go; without its user name and password."""
    proxies = []
    for kind, uri in urllib.request.getproxies().items():
        if kind != "no":
            proxies.append(f"{kind} {uri.rpartition('@')[2]}")
    if proxies:
        return f"through the proxy ({', '.join(proxies)})"
    return "without a proxy; if this network has one, set https_proxy"


def download(url: str, part: Path) -> None:
    """Append to `part` what it lacks of `url`. Raises OSError if the connection ends before the content."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        answer = urllib.request.urlopen(request, timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        return  # 416: nothing is left to send; the digest decides
    with answer:
        resumed = answer.status == 206
        have = have if resumed else 0
        total = have + int(answer.headers.get("Content-Length") or 0)
        bar = tqdm(
            total=total or None,
            initial=have,
            unit="B",
            unit_scale=True,
            desc=part.name[1:-5],
            disable=not sys.stderr.isatty(),
        )
        with naming(part), open(part, "ab" if resumed else "wb") as opened, bar:
            while chunk := answer.read(CHUNK):
                opened.write(chunk)
                bar.update(len(chunk))
            opened.flush()
            os.fsync(opened.fileno())
    if total and part.stat().st_size < total:
        raise OSError(
            f"the connection ended after {part.stat().st_size:,} of {total:,} bytes; run this again to go on"
        )


def require_digest(found: Path, file: Path, digest: str) -> None:
    """Raise DataError if `found`, which is to become `file`, has another sha256; a download is removed."""
    there = sha256(found)
    if there.startswith(digest):
        return
    if found != file:
        found.unlink()
    raise DataError(
        f"{file}: sha256 {there[:16]}… does not begin with {digest}, so it is not the official file; "
        "remove it and fetch it again"
    )


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    words = parser("tools/fetch_weights.py", __doc__, EXAMPLES)
    words.add_argument(
        "file", metavar="FILE", type=Path, nargs="?", default=Path("weights") / NAME, help="where to put it"
    )
    words.add_argument("--url", metavar="URL", default=URL, help="a mirror of the official file")
    args = words.parse_args(argv)
    started = time.monotonic()
    fetch(args.url, args.file, INCEPTION_SHA256)
    print(f"{args.file.absolute()} is there and verified ({time.monotonic() - started:.0f} s); use it with:")
    print(f"  export CVAE_INCEPTION_WEIGHTS={args.file.absolute()}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
