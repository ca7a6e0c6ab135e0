"""Files from the network: resumed where they broke off, checked, and under their name only when they are right.

What has come so far lies beside the file, as NAME.incomplete. When all of it is there its SHA-256 decides: the file
gets its name, and a line in the folder's `.SHA256SUMS` (which `sha256sum -c` reads too), or it is thrown away.
"""

import hashlib
import importlib
import os
import shutil
import time
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from llm_numba.util.cli import UserError, not_installed
from llm_numba.util.files import format_bytes, write_whole

ATTEMPTS = 5  # in a row that bring nothing new
PAUSE = 1.0  # seconds before the second attempt; each later pause is twice as long
CONNECT_TIMEOUT, READ_TIMEOUT = 10, 30  # seconds without an answer, without a byte
BLOCK = 1 << 14  # bytes; of one that is cut off all is lost
TRANSIENT = (408, 425, 429, 500, 502, 503, 504)  # HTTP statuses that may pass
SUMS = ".SHA256SUMS"


class Remote(NamedTuple):
    """A file somewhere else, and what its bytes must be."""

    url: str
    size: int
    sha256: str


def fetch(path: Path, remote: Remote) -> None:
    """path = the file at remote.url; goes on from what an earlier call has left in PATH.incomplete.

    Errors: UserError where the server refuses, keeps failing, or gives other bytes than the checksum's; where the disk
    is full. `path` is not touched then.
    """
    part = path.with_name(path.name + ".incomplete")
    try:
        _check_space(part, remote.size)
        resumed = _download(part, remote)
        if resumed and sha256_of(part) != remote.sha256:  # of another version of the file, or damaged since
            part.unlink()
            _download(part, remote)
        found = sha256_of(part)
        if found != remote.sha256:
            part.unlink()
            raise UserError(
                f"{remote.url}: wrong bytes (sha256 {found[:12]}..., expected {remote.sha256[:12]}...), now thrown "
                "away: run the command again; if it stays so, the file or the way to it was tampered with"
            )
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}): free some space, or give --out") from error


def _download(part: Path, remote: Remote) -> bool:
    """part = what remote has, all its bytes, unchecked; whether some of them were there or came by another request."""
    from tqdm import tqdm

    requests = library("requests")
    part.touch()
    resumed, failures, reason = part.stat().st_size > 0, 0, ""
    with tqdm(total=remote.size, desc=part.stem, unit="B", unit_scale=True, disable=None) as progress:
        while (have := part.stat().st_size) != remote.size:
            progress.n = have
            progress.refresh()
            if failures == ATTEMPTS:
                raise UserError(
                    f"{remote.url}: {reason}, {ATTEMPTS} times in a row; {have:,} of {remote.size:,} bytes are here: "
                    "run the command again to go on from there"
                )
            if failures:
                progress.set_postfix_str(f"{reason}: trying again")
                time.sleep(PAUSE * 2 ** (failures - 1))
                progress.set_postfix_str("")
            try:
                reason = _append(requests, part, remote, progress)
            except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
                reason = reason_of(error)
            except requests.RequestException as error:
                raise UserError(f"{remote.url}: {reason_of(error)}") from error
            resumed = resumed or 0 < part.stat().st_size < remote.size
            failures = 0 if part.stat().st_size > have else failures + 1
    return resumed


def _append(requests: ModuleType, part: Path, remote: Remote, progress) -> str:
    """One request for the bytes that `part` lacks, which are appended as they come. Returns what is wrong if some lack.

    Errors: UserError for a status that will not change.
    """
    have = part.stat().st_size
    if have > remote.size:
        part.write_bytes(b"")
        have = 0
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    timeout = (CONNECT_TIMEOUT, READ_TIMEOUT)
    with requests.get(remote.url, headers=headers, stream=True, timeout=timeout) as response:
        status = response.status_code
        if status in TRANSIENT:
            return f"the server answers {status} {response.reason}"
        goes_on = status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        if status == 416 or (status == 206 and not goes_on):  # another version of the file, or a confused server
            part.write_bytes(b"")
            return "the server did not go on where it was asked to"
        if status not in (200, 206):
            raise UserError(
                f"{remote.url}: the server answers {status} {response.reason}: has it moved, or is it closed?"
            )
        if not goes_on:
            progress.n = have = 0
        with part.open("ab" if goes_on else "wb") as file:
            for block in response.iter_content(BLOCK):
                have += len(block)
                if have > remote.size:
                    file.truncate(0)
                    raise UserError(f"{remote.url}: longer than the {remote.size:,} bytes expected: not the same file")
                file.write(block)
                progress.update(len(block))
    return f"the connection ended after {have:,} bytes"


def on_the_hub(repository: str, name: str) -> Remote:
    """A data set's file on the Hugging Face hub, with the SHA-256 under which its large-file storage keeps it.

    HF_ENDPOINT and HF_HUB_OFFLINE count. The hub's own library downloads neither resumably nor checked (2.4), so it is
    asked for the facts alone.
    """
    hub = library("huggingface_hub")
    url = hub.hf_hub_url(repository, name, repo_type="dataset")
    for failures in range(ATTEMPTS):
        try:
            found = hub.get_hf_file_metadata(url)
            break
        except Exception as error:  # its HTTP library's errors, which is another one from version to version
            status = getattr(getattr(error, "response", None), "status_code", None)
            lasting = isinstance(error, hub.errors.OfflineModeIsEnabled) or (status and status not in TRANSIENT)
            if lasting or failures == ATTEMPTS - 1:
                reason = f"the hub answers {status}" if status else reason_of(error)
                raise UserError(f"{url}: {reason}") from error
            time.sleep(PAUSE * 2**failures)
    if not found.size or len(found.etag or "") != 64:
        raise UserError(f"{url}: the hub gives no SHA-256 and size for it: is HF_ENDPOINT a whole mirror?")
    return Remote(url, found.size, found.etag)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def recorded(folder: Path) -> dict[str, str]:
    """name -> SHA-256 of the files that were right when they came into this folder."""
    try:
        lines = (folder / SUMS).read_text().splitlines()
    except FileNotFoundError:
        return {}
    return {name: sha256 for sha256, _, name in (line.partition("  ") for line in lines)}


def record(path: Path, sha256: str) -> None:
    """Remember that the file is right as it is."""
    sums = recorded(path.parent) | {path.name: sha256}
    write_whole(path.parent / SUMS, "".join(f"{sha256}  {name}\n" for name, sha256 in sums.items()).encode())


def is_there(path: Path, expected: str | None) -> bool:
    """Whether the file is there, with the expected SHA-256. Errors: UserError where it has another one, or None is
    known."""
    if not path.exists():
        return False
    if expected is None:
        raise UserError(
            f"{path}: in the way, and nothing says whether it is right: move it away, or give another --out"
        )
    if sha256_of(path) != expected:
        raise UserError(f"{path}: damaged or changed (its SHA-256 is not {expected[:12]}...): delete it and run again")
    return True


def library(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(not_installed(name)) from error


def reason_of(error: Exception) -> str:
    """What a library says, in one short line."""
    inner = error
    while inner.args and isinstance(inner.args[0], Exception):
        inner = inner.args[0]
    text = str(getattr(inner, "reason", None) or (inner.args or [inner])[0])
    text = " ".join(text.split())
    return text[:300].rstrip(".") or type(error).__name__


def _check_space(part: Path, size: int) -> None:
    missing = size - (part.stat().st_size if part.exists() else 0)
    free = shutil.disk_usage(part.parent).free
    if missing > free:
        raise UserError(f"{part.parent}: {format_bytes(missing)} needed, {format_bytes(free)} free: give another --out")
