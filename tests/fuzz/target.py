"""The fuzzed process: ``python -m tests.fuzz.target TARGET FINDINGS [libFuzzer's options] [CORPUS...]``. Started by ``python -m tests.fuzz run``.

A finding does not end it: the input and what happened go into the folder FINDINGS once for each place in the code, and fuzzing goes on. libFuzzer's
own limits (``-timeout`` of wall-clock time, ``-rss_limit_mb``) and the address space's end it: those are for what cannot be caught.
"""

from __future__ import annotations

import gc
import hashlib
import importlib
import pkgutil
import resource
import sys
import traceback
from pathlib import Path

import atheris

from tests.fuzz.budget import Exceeded, TooSlow

ADDRESS_SPACE = 3 << 30
_COLLECT_EVERY = 50
_ROOMS = ("cowhand.core", "cowhand.block", "cowhand.crypto")


def load() -> None:
    """Import the rooms that read images, instrumented: what is imported on demand later would not be."""
    for room in _ROOMS:
        package = importlib.import_module(room)
        for module in pkgutil.walk_packages(package.__path__, f"{room}."):
            importlib.import_module(module.name)
    importlib.import_module("cowhand.drivers")
    importlib.import_module("cowhand.cli.compat.optionstrings")


def place_of(problem: BaseException) -> str:
    """Return what tells one finding from another: the kind of exception, its text for our own, and the last line of the library it came through."""
    frames = traceback.extract_tb(problem.__traceback__)
    inside = [frame for frame in frames if "/cowhand/" in frame.filename] or frames
    last = inside[-1] if inside else None
    if last is None:
        where = ""
    elif isinstance(problem, Exceeded):
        where = f"{Path(last.filename).name}:{last.name}"  # whichever line of it the time ran out in
    else:
        where = f"{Path(last.filename).name}:{last.lineno}"
    text = str(problem).partition(":")[0] if type(problem).__module__.startswith("tests.") else ""
    return f"{type(problem).__name__} {text} {where}"


def keep(problem: BaseException, data: bytes, folder: Path) -> None:
    """Write the input and the traceback of a finding that is not there yet; of one that was slow, which is to be judged without instruments."""
    kind = "finding" if not isinstance(problem, TooSlow) else "slow"
    name = f"{kind}-" + hashlib.sha256(place_of(problem).encode()).hexdigest()[:12]
    if not (folder / name).exists():
        (folder / name).write_bytes(data)
        (folder / f"{name}.txt").write_text("".join(traceback.format_exception(problem)))
        print(f"FINDING {name}: {place_of(problem)}", file=sys.stderr, flush=True)


def main() -> None:
    """Fuzz until libFuzzer's limits end it."""
    name, folder = sys.argv.pop(1), Path(sys.argv.pop(1))
    with atheris.instrument_imports(include=["cowhand"], enable_loader_override=False):
        load()
    from tests.fuzz.budget import INSTRUMENTED, set_factor
    from tests.fuzz.targets import TARGETS

    set_factor(INSTRUMENTED)
    target = TARGETS[name]
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))

    inputs = 0

    def one_input(data: bytes) -> None:
        nonlocal inputs
        inputs += 1
        if inputs % _COLLECT_EVERY == 0:
            gc.collect()  # which counts objects, and not how large they are
        try:
            target.exercise(bytes(data))
        except KeyboardInterrupt:
            raise
        except BaseException as problem:  # noqa: BLE001 whatever it is, it is the finding
            keep(problem, bytes(data), folder)

    mutate = target.mutate
    if mutate is None:
        atheris.Setup(sys.argv, one_input)
    else:

        def custom_mutator(data: bytes, size: int, seed: int) -> bytes:
            return mutate(bytes(data), seed, size, lambda plain: bytes(atheris.Mutate(plain, size)))

        atheris.Setup(sys.argv, one_input, custom_mutator=custom_mutator)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
