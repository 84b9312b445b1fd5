"""The opening policy: what may be opened that the user did not name.

An image's header may name other files: a backing file, an external data file, extents. A hostile one names the host's secrets
(CVE-2024-32498). So whatever is opened on an image's word, and not on the user's, asks a policy first.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from cowhand.core.errors import PolicyRefused

#: A chain longer than this is taken for a loop or an attack. QEMU has no limit but its stack; 200 is a long chain in practice.
MAX_DEPTH = 1000


#: The protocols whose files lie in a directory.
_FILES = ("file", "host_device", "host_cdrom")


class Policy(NamedTuple):
    """Rules for implicit opening. Immutable; narrow it with ``_replace``.

    ``implicit``: whether anything at all is opened on an image's word. ``drivers``: the protocol and format drivers allowed then, None for all.
    ``directories``: where such files may lie (after links are followed), None for anywhere; with directories, an image names files and nothing
    else: no network, no filter. ``json_names``: whether an image may carry a ``json:`` description. ``probe_backing``: whether the format of
    a file that an image names without its format is guessed. ``max_depth``: layers under the first one. ``as_qemu``: what QEMU refuses to open is
    refused, in its words, although the data could be had: an image with a broken bitmap directory.
    """

    name: str = "default"
    implicit: bool = True
    drivers: frozenset[str] | None = None
    directories: tuple[str, ...] | None = None
    json_names: bool = True
    probe_backing: bool = True
    max_depth: int = MAX_DEPTH
    as_qemu: bool = False

    def check_implicit(self, reference: str, *, owner: str, what: str) -> None:
        """Raise PolicyRefused unless the *what* ("backing file") that *owner*'s header names as *reference* may be opened."""
        hint = "Open it without untrusted mode if you trust the image, or name the file yourself."
        if not self.implicit:
            raise PolicyRefused(f"the {what} '{reference}' is not opened", path=owner, hint=hint)
        if reference.startswith("json:") and not self.json_names:
            raise PolicyRefused(
                f"the {what} is a json: description, which this policy does not follow", path=owner, hint=hint
            )

    def check_driver(self, driver: str, *, kind: str, owner: str, what: str) -> None:
        """Raise PolicyRefused unless *driver*, of that *kind* ("protocol", "format", "filter"), may be used for what an image names."""
        allowed = self.drivers is None or driver in self.drivers
        if self.directories is not None and kind != "format":
            allowed = allowed and driver in _FILES
        if not allowed:
            raise PolicyRefused(
                f"the {what} asks for driver '{driver}', which policy '{self.name}' does not allow", path=owner
            )

    def check_path(self, path: str, *, owner: str, what: str) -> None:
        """Raise PolicyRefused unless the file *path*, links followed, lies where the policy allows."""
        if self.directories is None:
            return
        real = os.path.realpath(path)
        for directory in self.directories:
            root = os.path.realpath(directory)
            if real == root or real.startswith(root.rstrip("/") + "/"):
                return
        raise PolicyRefused(
            f"the {what} '{path}' lies outside of the allowed directories",
            path=owner,
            hint="Allowed: " + ", ".join(self.directories),
        )

    def within(self, *directories: str) -> Policy:
        """Return this policy with implicit files limited to *directories*."""
        return self._replace(directories=directories)


#: As safe as users of qemu-img can bear: everything that QEMU follows is followed.
DEFAULT = Policy()
#: What the compatible tools open images with.
AS_QEMU = Policy(name="as QEMU", as_qemu=True)
#: For images from strangers: nothing that they name is opened.
UNTRUSTED = Policy(name="untrusted", implicit=False, json_names=False, probe_backing=False)
