"""Downloads: huggingface_hub for files on the Hugging Face hub, pooch for all others.

Both write to a temporary name, so a file never appears half-written.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llm_numba.util.cli import UserError, install


def from_hub(repository: str, name: str, **options) -> Path:
    """Download a file of a repository, unless it is up to date; options: those of `hf_hub_download`.

    HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE work as usual. Errors: UserError.
    """
    with _one_line_errors(f"{repository}/{name}", "huggingface_hub"):
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(repository, name, **options))


def from_url(url: str, path: Path, sha256: str) -> None:
    """Download `url` to `path`, unless the file there has this checksum. Errors: UserError."""
    with _one_line_errors(url, "pooch"):
        import pooch

        pooch.get_logger().setLevel("WARNING")
        visible = bool(sys.stderr and sys.stderr.isatty())
        pooch.retrieve(url, f"sha256:{sha256}", path.name, path.parent, progressbar=visible)


@contextmanager
def _one_line_errors(what: str, package: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise UserError(f"{what}: downloads need {package}: {install('download')}") from error
    except Exception as error:  # errors of the network, the server and the disk share no class
        error = error.__cause__ or error  # the hub's library wraps what happened in "cannot locate the file"
        reason = getattr(error, "strerror", None) or str(error).rpartition("Caused by ")[2]
        reason = reason.partition("\n")[0].partition(". ")[0][:200]
        raise UserError(
            f"{what}: download failed ({type(error).__name__}: {reason}): check the network and the disk, and try again"
        ) from error
