"""The fuzzed process: ``python -m tests.fuzz.target DRIVER [libFuzzer's options] [CORPUS...]``. Started by ``python -m tests.fuzz run``.

Limits: libFuzzer's ``-timeout`` (seconds for each input) and ``-rss_limit_mb``; the address space is limited here as well.
"""

from __future__ import annotations

import importlib
import pkgutil
import resource
import sys

import atheris

ADDRESS_SPACE = 2 << 30
_ROOMS = ("cowhand.core", "cowhand.block")


def load() -> None:
    """Import the rooms that read images, instrumented: what is imported on demand later would not be."""
    for room in _ROOMS:
        package = importlib.import_module(room)
        for module in pkgutil.walk_packages(package.__path__, f"{room}."):
            importlib.import_module(module.name)
    importlib.import_module("cowhand.drivers")


def main() -> None:
    """Fuzz until libFuzzer's limits end it."""
    driver = sys.argv.pop(1)
    with atheris.instrument_imports(include=["cowhand"], enable_loader_override=False):
        load()
    from tests.fuzz.exercise import exercise
    from tests.fuzz.mutation import mutate

    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))

    def one_input(data: bytes) -> None:
        exercise(bytes(data), driver)

    def custom_mutator(data: bytes, size: int, seed: int) -> bytes:
        return mutate(bytes(data), seed, size, lambda plain: bytes(atheris.Mutate(plain, size)))

    atheris.Setup(sys.argv, one_input, custom_mutator=custom_mutator)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
