"""Tells a file that is not there, which may be, from a disk that fails, which must stop whoever reads it."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from roadwork.errors import UserError

ABSENT = {
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EACCES,
    errno.EPERM,
    errno.ENAMETOOLONG,
    errno.ELOOP,
}
"""What the system says of a path that leads to no file that we may read. EIO, ESTALE and the like are not among them."""


@contextlib.contextmanager
def if_there(what: str, path: Path) -> Iterator[None]:
    """Ends its block quietly where `path` leads to no readable file.

    Args:
        what: what the file is, for the message.
        path: of the file that the block reads.

    Raises:
        UserError: the system has the file and cannot give it: a failing disk, a network share that went away. Taken for
            an absent file, it would drop every photo behind it without a word.
    """
    try:
        yield
    except UserError:  # a ValueError too
        raise
    except OSError as error:
        if error.errno not in ABSENT:
            raise UserError(
                f"{what} {path}: cannot be read ({error.strerror or error}) although it is there; mend its disk, network "
                f"share or limits and run the same command again: what is finished is kept"
            ) from error
    except ValueError:  # a zero byte in the path
        return
