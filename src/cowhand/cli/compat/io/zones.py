"""The commands for zoned block devices, known since 8.2's profile: none of the devices that are supported has zones."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence

from cowhand.cli.compat.io.parsing import Complaint, number
from cowhand.cli.compat.io.requests import the_disk
from cowhand.cli.compat.io.session import Session


def zone(session: Session, words: Sequence[str]) -> bool:
    """Read the numbers of a zone command and tell that it is not supported."""
    the_disk(session)
    for word in words[1:]:
        number(word)
    raise Complaint(f"{words[0].replace('_', ' ')} failed: {os.strerror(errno.EOPNOTSUPP)}")
