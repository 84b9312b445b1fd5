"""``info``: tell what an image is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cowhand.cli.compat.arguments import early_output_format, one_image, output_format
from cowhand.cli.compat.images import open_image
from cowhand.cli.compat.img.command import Command
from cowhand.cli.compat.img.records import as_text, image_info
from cowhand.cli.compat.program import Failure


def run(words: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    format = None
    json = chain = image_opts = force_share = False
    command = Command(
        words,
        "hf:U",
        {
            "format": "f",
            "output": "output=",
            "backing-chain": "chain",
            "limits": "limits",
            "image-opts": "image-opts",
            "force-share": "U",
        },
    )
    output = None
    limits = False
    for key, value in command:
        match key:
            case "U":
                force_share = True
            case "f":
                format = value
            case "output":
                output = early_output_format(value)
            case "chain":
                chain = True
            case "limits":
                limits = True
            case "image-opts":
                image_opts = True
    name = one_image(command.positional)
    if output is not None:
        json = output_format(output)
    documents = _collect(name, format, chain=chain, limits=limits, image_opts=image_opts, force_share=force_share)
    if json:
        from cowhand.cli.compat.jsontext import render

        print(render(documents if chain else documents[0]))
        return 0
    for number, document in enumerate(documents):
        if number:
            print()
        for line in as_text(document):
            print(line)
    return 0


def _collect(
    name: str | None, format: str | None, *, chain: bool, limits: bool, image_opts: bool, force_share: bool
) -> list[dict[str, Any]]:
    """Return the documents of the image and, with *chain*, of all that lie under it; nothing is printed before all are known."""
    documents: list[dict[str, Any]] = []
    seen: set[str] = set()
    while name is not None:
        if name in seen:
            raise Failure(f"Backing file '{name}' creates an infinite loop.")
        seen.add(name)
        with open_image(name, format=format, image_opts=image_opts, force_share=force_share, backing=False) as disk:
            documents.append(image_info(disk.root, limits=limits))
        if not chain:
            break
        name = documents[-1].get("full-backing-filename")
        format = documents[-1].get("backing-filename-format")
        image_opts = False
        if name is None and "backing-filename" in documents[-1]:
            raise Failure(f"Cannot use relative backing file names for '{documents[-1]['filename']}'")
    return documents
