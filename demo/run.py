"""A disk's life from beginning to end, on real files. Run it with ``make demo``; it writes demo/report.html.

Every step runs the commands that a user would type. Every result is judged by something that is not cowhand: SHA-256 over plain files,
and qemu-img, e2fsck and debugfs where they are installed. ``demo/run.py --pictures docs/images`` keeps the README's pictures.
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

import cowhand
from cowhand.core.units import format_size

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import report  # noqa: E402 - demo/ is a folder of scripts and no package
import source  # noqa: E402
from journey import Journey, StepFailed, digest  # noqa: E402

#: Blocks of the journal that the guest rewrites before the overlay is made, and then on the overlay.
FIRST = frozenset(range(1800))
SECOND = frozenset(number for number in range(1200, 3900) if number // 96 % 3)


def generation_of(number: int) -> int:
    """Return which generation of a block is there in the end."""
    return 2 if number in SECOND else 1 if number in FIRST else 0


class Story:
    """The demonstration's steps, in order; each uses what those before it made."""

    def __init__(self, journey: Journey) -> None:
        self.journey = journey
        self.folder = journey.folder
        self.places: dict[int, int] = {}
        self.pristine = ""

    def make_disk(self) -> None:
        step = self.journey.step(
            "Real files become a disk",
            "Python's own library, cowhand's source and a journal of 4096 blocks that name themselves are put on a raw disk.",
        )
        tree = self.folder / "tree"
        count, total = source.collect(tree)
        kind = source.make_disk(tree, self.folder / "disk.raw")
        shutil.rmtree(tree)
        self.places = source.find_journal(self.folder / "disk.raw")
        if len(self.places) < source.JOURNAL_BLOCKS // 2:
            raise StepFailed(f"only {len(self.places)} blocks of the journal were found on the disk")
        self.pristine = digest(self.folder / "disk.raw")
        self._copy_sparse("disk.raw", "model.raw")
        self.journey.fact("files", f"{count}, {format_size(total)}")
        self.journey.fact("the disk holds", kind)
        self.journey.fact("SHA-256", self.pristine[:16] + "…")
        step.words += (
            " A plain copy of it, the model, gets the same changes as the images below, through plain file I/O."
        )

    def import_disk(self) -> None:
        self.journey.step(
            "Import",
            "The raw disk becomes a qcow2 image, which takes no space for what is empty. --verify reads both again.",
        )
        begin = time.monotonic()
        self.journey.cowhand("convert", "--verify", "-O", "qcow2", "disk.raw", "vm.qcow2")
        self._speed("import and verification", begin, "vm.qcow2")
        self.journey.cowhand("info", "vm.qcow2")
        self.journey.picture("Where the data lies after the import", "map", "vm.qcow2")

    def snapshot(self) -> None:
        self.journey.step(
            "A snapshot, and life goes on",
            "The snapshot costs nothing but tables. Then the guest works: it rewrites blocks of its journal. Old blocks stay for the snapshot.",
        )
        self.journey.cowhand("snapshot", "create", "vm.qcow2", "clean-install")
        self.write_as_guest("vm.qcow2", FIRST, 1)
        self.journey.cowhand("snapshot", "list", "vm.qcow2")

    def overlay(self) -> None:
        self.journey.step(
            "An overlay for an experiment",
            "work.qcow2 stores only what differs from vm.qcow2, which stays as it is. The guest runs on the overlay and changes other blocks.",
        )
        self.journey.cowhand("create", "-f", "qcow2", "-b", "vm.qcow2", "-F", "qcow2", "work.qcow2")
        self.write_as_guest("work.qcow2", SECOND, 2)
        self.journey.cowhand("map", "--bar", "work.qcow2")
        self.journey.cowhand("compare", "-F", "raw", "work.qcow2", "model.raw")
        self.journey.picture(
            "The disk as the guest sees it: each stretch in the colour of the image that holds it", "map", "work.qcow2"
        )
        self.journey.picture("The chain", "info", "--chain", "work.qcow2")

    def measure(self) -> None:
        self.journey.step("Measure before you move", "How much space would a copy of the disk need?")
        self.journey.cowhand("measure", "-O", "qcow2", "work.qcow2")

    def commit(self) -> None:
        self.journey.step(
            "Commit, unless that harms somebody",
            "A second overlay stands on vm.qcow2. Committing would silently change what it reads, so cowhand refuses (exit code 9). When the "
            "other overlay is gone, the commit is planned, then done.",
        )
        self.journey.cowhand("create", "-f", "qcow2", "-b", "vm.qcow2", "-F", "qcow2", "colleague.qcow2")
        self.journey.cowhand("commit", "work.qcow2", status=9)
        self.journey.picture("Who stands on whom", "info", "--chain", "work.qcow2")
        (self.folder / "colleague.qcow2").unlink()
        self.journey.cowhand("commit", "--dry-run", "work.qcow2")
        self.journey.cowhand("commit", "work.qcow2")
        self.journey.cowhand("compare", "-F", "raw", "vm.qcow2", "model.raw")
        self.journey.cowhand("check", "work.qcow2")
        (self.folder / "work.qcow2").unlink()

    def revert(self) -> None:
        self.journey.step(
            "Revert",
            "Today's state is kept in a snapshot of its own; then the disk goes back to the clean installation.",
        )
        self.journey.cowhand("snapshot", "create", "vm.qcow2", "upgraded")
        self.journey.cowhand("snapshot", "apply", "vm.qcow2", "clean-install")
        self.journey.cowhand("compare", "-F", "raw", "vm.qcow2", "disk.raw")
        self.journey.cowhand("info", "vm.qcow2")

    def back_up(self) -> None:
        step = self.journey.step(
            "Compressed copy, and restore",
            "The upgraded state is taken out of its snapshot into a compressed image, and restored from it.",
        )
        begin = time.monotonic()
        self.journey.cowhand("convert", "-c", "-O", "qcow2", "-l", "upgraded", "vm.qcow2", "backup.qcow2")
        self._speed("compression", begin, "backup.qcow2")
        begin = time.monotonic()
        self.journey.cowhand("convert", "-O", "raw", "backup.qcow2", "restored.raw")
        self._speed("restore", begin, "restored.raw")
        self.journey.picture("The compressed copy", "map", "backup.qcow2")
        expected, found = digest(self.folder / "model.raw"), digest(self.folder / "restored.raw")
        if expected != found:
            raise StepFailed("the restored disk differs from the model")
        small = format_size((self.folder / "backup.qcow2").stat().st_blocks * 512)
        large = format_size((self.folder / "restored.raw").stat().st_blocks * 512)
        self.journey.figures.append((small, f"hold the compressed copy of {large}"))
        step.words += " SHA-256 of the restored disk and of the model, which cowhand never touched, are the same: every byte is right."
        self.journey.fact("SHA-256 of model and restored disk", f"{found[:16]}…, identical")

    def serve(self) -> None:
        self.journey.step(
            "Serve it to other programs",
            "The upgraded state, inside of its snapshot, becomes an NBD export; clients read it while nothing is copied.",
        )
        uri = "nbd+unix:///upgraded?socket=demo.sock"
        with self.journey.running(
            "serve", "-l", "demo.sock", "--snapshot", "upgraded", "--name", "upgraded", "vm.qcow2"
        ):
            self.journey.cowhand("compare", "-f", "raw", "-F", "raw", uri, "model.raw")
            qemu = source.find_tool("qemu-img")
            if qemu is not None:
                self.journey.tool(qemu, "compare", "-f", "raw", "-F", "raw", uri, "model.raw")

    def export(self) -> None:
        self.journey.step(
            "For other hypervisors",
            "The upgraded state as a disk of VMware, of VirtualBox and of Hyper-V; each is compared with the model.",
        )
        for format, name in (("vmdk", "vm.vmdk"), ("vdi", "vm.vdi"), ("vhdx", "vm.vhdx")):
            self.journey.cowhand("convert", "-O", format, "backup.qcow2", name)
            self.journey.cowhand("compare", "-f", format, "-F", "raw", name, "model.raw")
            (self.folder / name).unlink()

    def live(self) -> None:
        self.journey.step(
            "Back up a disk in use",
            "While a guest rewrites the disk, a job copies one moment of it: what the guest is about to overwrite is copied first.",
        )
        from cowhand.block.opening.opening import Opening
        from cowhand.drivers import REGISTRY
        from cowhand.jobs.live.backup import BackupJob

        path = self.folder / "moment.qcow2"
        with cowhand.open(self.folder / "vm.qcow2", writable=True) as disk:
            cowhand.create(path, "qcow2", disk.size)
            target = Opening(REGISTRY).open({"driver": "qcow2", "file": {"driver": "file", "filename": str(path)}})
            job = BackupJob("backup", disk.root, target)
            job.install()  # the moment
            job.start()
            written = 0
            while not job.wait(0):
                disk.write(written % disk.size // 65536 * 65536, b"the guest goes on".ljust(4096))
                written += 65536
            job.result()
        self.journey.fact("while the job ran, the guest wrote", f"{written // 65536} times")
        self.journey.cowhand("compare", "-f", "qcow2", "-F", "raw", "moment.qcow2", "disk.raw")
        self.journey.cowhand("check", "moment.qcow2")

    def check(self) -> None:
        self.journey.step("Check everything", "By cowhand, and by whoever else is installed here.")
        images = ("vm.qcow2", "backup.qcow2")
        for name in images:
            self.journey.cowhand("check", name)
        qemu = source.find_tool("qemu-img")
        if qemu is None:
            self.journey.fact("qemu-img", "not installed; nothing here needs it")
        else:
            for name in images:
                self.journey.tool(qemu, "check", name)
            self.journey.tool(qemu, "compare", "-f", "qcow2", "-F", "raw", "backup.qcow2", "model.raw")
        fsck = source.find_tool("e2fsck")
        if fsck is not None and source.find_tool("mkfs.ext4") is not None:
            self.journey.tool(fsck, "-fn", "restored.raw")
        self._read_journal()

    def _read_journal(self) -> None:
        """Read the guest's file out of the restored file system, as its owner would."""
        debugfs = source.find_tool("debugfs")
        if debugfs is None or source.find_tool("mkfs.ext4") is None:
            return
        self.journey.tool(debugfs, "-R", f"dump {source.JOURNAL_NAME} journal.bin", "restored.raw")
        data = (self.folder / "journal.bin").read_bytes()
        (self.folder / "journal.bin").unlink()
        generations = [0] * 3
        for number in range(source.JOURNAL_BLOCKS):
            block = data[number * source.BLOCK : (number + 1) * source.BLOCK]
            expected = generation_of(number) if number in self.places else 0
            if block != source.journal_block(number, expected):
                raise StepFailed(f"block {number} of the restored journal is not of generation {expected}")
            generations[expected] += 1
        words = ", ".join(f"{count} of generation {number}" for number, count in enumerate(generations))
        self.journey.fact("the journal's 4096 blocks, read from the file system", f"{words}: as written")

    # -- helpers

    def write_as_guest(self, image: str, blocks: frozenset[int], generation: int) -> None:
        """Rewrite *blocks* of the journal, in the image through the library and in the model through plain I/O."""
        requests = [(number, self.places[number]) for number in sorted(blocks) if number in self.places]
        with cowhand.open(self.folder / image, writable=True) as disk:
            for number, offset in requests:
                disk.write(offset, source.journal_block(number, generation))
        with open(self.folder / "model.raw", "r+b") as model:
            for number, offset in requests:
                model.seek(offset)
                model.write(source.journal_block(number, generation))
        self.journey.fact(f"the guest rewrote in {image}", f"{len(requests)} blocks of 4 KiB")

    def _speed(self, what: str, begin: float, made: str) -> None:
        seconds = time.monotonic() - begin
        size = (self.folder / made).stat().st_blocks * 512
        self.journey.fact(what, f"{seconds:.2f} s; {made} takes {format_size(size)} on disk")

    def _copy_sparse(self, origin: str, target: str) -> None:
        zeroes = bytes(1 << 20)
        with open(self.folder / origin, "rb") as reader, open(self.folder / target, "wb") as writer:
            while chunk := reader.read(1 << 20):
                if chunk == zeroes[: len(chunk)]:
                    writer.seek(len(chunk), 1)
                else:
                    writer.write(chunk)
            writer.truncate(reader.tell())


def save_pictures(journey: Journey, folder: Path) -> None:
    """Keep the pictures that the README shows."""
    for name, words in (("map.svg", "as the guest sees it"), ("chain.svg", "Who stands on whom")):
        found = [svg for step in journey.steps for caption, svg in step.pictures if words in caption]
        (folder / name).write_text(found[0], encoding="utf-8")


def main() -> int:
    """Run the demonstration and write the page; return the exit code."""
    folder = HERE / "work"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    story = Story(Journey(folder))
    try:
        for act in (
            story.make_disk, story.import_disk, story.snapshot, story.overlay, story.measure, story.commit, story.revert,
            story.back_up, story.serve, story.export, story.live, story.check,
        ):  # fmt: skip
            act()
    except StepFailed as error:
        sys.stdout.flush()
        print(f"\nthe demonstration failed:\n{error}", file=sys.stderr)
        return 1
    if len(sys.argv) == 3 and sys.argv[1] == "--pictures":
        save_pictures(story.journey, Path(sys.argv[2]))
    page = HERE / "report.html"
    page.write_text(report.render(story.journey), encoding="utf-8")
    print(f"\nAll of it worked, in {story.journey.seconds:.0f} s. Now look at {page}")
    print(f"The images are in {folder}. Try: .venv/bin/cowhand map demo/work/vm.qcow2")
    return 0


if __name__ == "__main__":
    sys.exit(main())
