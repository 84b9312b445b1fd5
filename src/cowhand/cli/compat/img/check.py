"""``check``: look for damage and lost space. Exit status 0 sound, 1 not completed, 2 damage, 3 leaks, 63 a format without checks."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cowhand.block.node.options import CACHE_MODES
from cowhand.cli.compat import program
from cowhand.cli.compat.arguments import early_output_format, one_image, output_format
from cowhand.cli.compat.images import cache_mode, describe, open_image, warn_of_raw
from cowhand.cli.compat.img.command import Command, failing_as
from cowhand.cli.compat.program import Failure, UsageFailure
from cowhand.core.errors import CowhandError, NotSupported

if TYPE_CHECKING:
    from cowhand.block.node.records import CheckResult, Finding

_UNSUPPORTED = 63


def run(words: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    format = repair = None
    output = "human"
    cache = "writeback"
    quiet = force_share = image_opts = False
    command = Command(
        words,
        "hf:qr:T:U",
        {"format": "f", "repair": "r", "output": "output=", "image-opts": "image-opts", "force-share": "U"},
    )
    for key, value in command:
        match key:
            case "f":
                format = value
            case "r":
                if value not in ("leaks", "all"):
                    if program.since("10.0"):
                        comma = "" if program.is_debian_10_0() else ","
                        raise UsageFailure(f"--repair (-r) expects 'leaks' or 'all'{comma} not '{value}'")
                    raise UsageFailure(f"Unknown option value for -r (expecting 'leaks' or 'all'): {value}")
                repair = value
            case "T":
                cache = value
            case "q":
                quiet = True
            case "U":
                force_share = True
            case "output":
                output = early_output_format(value)
            case "image-opts":
                image_opts = True
    name = one_image(command.positional)
    json = output_format(output)
    _, direct, no_flush = CACHE_MODES[cache_mode(cache, "source cache")]
    options = {"cache.direct": direct, "cache.no-flush": no_flush, "force-share": force_share}
    say = _say_repaired if not quiet and not json else None
    result = _check(name, format, repair, options, say, image_opts=image_opts)
    if result.failure is not None:
        raise Failure(f"Check failed: {os.strerror(result.failure.number)}")
    if json and not quiet:
        from cowhand.cli.compat.jsontext import render

        print(render({**result.to_json(), "filename": name}))
    if not json and not quiet:
        _print_human(result)
    return result.exit_code


def _check(
    name: str,
    format: str | None,
    repair: str | None,
    options: Mapping[str, Any],
    on_repaired: Callable[[CheckResult], None] | None,
    *,
    image_opts: bool,
) -> CheckResult:
    from cowhand.image.check import check

    if image_opts and format is not None:
        raise Failure("--image-opts and --format are mutually exclusive")
    with failing_as(f"Could not open '{name}': "):
        if repair is not None and options["force-share"]:
            raise Failure("force-share=on can only be used with read-only images")
        what = describe(name, image_opts, has_format=format is not None)
    try:
        return check(
            what,
            repair=repair,
            format=format,
            options=options,
            backing=True,
            like_qemu=True,
            on_finding=_say,
            on_repaired=on_repaired,
        )
    except NotSupported as error:
        if error.qemu_message == "This image format does not support checks":
            if repair is not None and error.facts.get("guessed"):
                warn_of_raw(name)
            # Such an image was not opened whole: without its passphrase it cannot be.
            open_image(name, format=format, image_opts=image_opts, force_share=repair is None).close()
            raise Failure(error.qemu_message, status=_UNSUPPORTED) from None
        raise Failure(f"Could not open '{name}': {error.qemu()}") from error
    except CowhandError as error:
        raise Failure(f"Could not open '{name}': {error.qemu()}") from error


def _say(finding: Finding) -> None:
    for line in finding.text.split("\n"):
        (program.error if finding.kind.as_tool else program.plain)(line)


def _say_repaired(result: CheckResult) -> None:
    print("The following inconsistencies were found and repaired:\n")
    print(f"    {result.leaks_fixed} leaked clusters")
    print(f"    {result.corruptions_fixed} corruptions\n")
    print("Double checking the fixed image now...", flush=True)


def _print_human(result: CheckResult) -> None:
    if not (result.corruptions or result.leaks or result.check_errors):
        print("No errors were found on the image.")
    if result.corruptions:
        print(f"\n{result.corruptions} errors were found on the image.")
        print("Data may be corrupted, or further writes to the image may corrupt it.")
    if result.leaks:
        print(f"\n{result.leaks} leaked clusters were found on the image.")
        print("This means waste of disk space, but no harm to data.")
    if result.check_errors:
        print(f"\n{result.check_errors} internal errors have occurred during the check.")
    allocated, total = result.allocated_clusters, result.total_clusters
    if allocated and total:
        print(
            f"{allocated}/{total} = {allocated * 100 / total:.2f}% allocated, "
            f"{result.fragmented_clusters * 100 / allocated:.2f}% fragmented, "
            f"{result.compressed_clusters * 100 / allocated:.2f}% compressed clusters"
        )
    if result.image_end_offset:
        print(f"Image end offset: {result.image_end_offset}")
