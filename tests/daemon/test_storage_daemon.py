"""The storage daemon beside QEMU's: the same commands, the same answers, the same events; and jobs under a client that writes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cowhand.image.create import create
from cowhand.image.open import open_image
from tests.daemon.qmp import StorageDaemon
from tests.tools.programs import require

OURS = (sys.executable, "-m", "cowhand.cli.compat.storage_daemon")
MIB = 1 << 20


def images(folder: Path) -> None:
    for name in ("a", "b", "t"):
        create(folder / f"{name}.qcow2", "qcow2", 4 * MIB)
    with open_image(folder / "a.qcow2", writable=True) as disk:
        disk.write(0, b"\7" * MIB)


def qcow2(folder: Path, name: str) -> dict[str, Any]:
    return {"driver": "qcow2", "node_name": name, "file": {"driver": "file", "filename": str(folder / f"{name}.qcow2")}}


def drive(daemon: StorageDaemon) -> list[tuple[str, Any]]:
    """Ask a daemon many things, and return the answers, with the events in their order."""
    folder = daemon.folder
    out: list[tuple[str, Any]] = []

    def ask(command: str, /, **arguments: Any) -> None:
        out.append((command, daemon.ask(command, **arguments)))

    def events(until: str, **data: Any) -> None:
        daemon.wait_event(until, **data)
        kept = [
            (name, {k: v for k, v in told.items() if k not in ("len", "offset")}) for name, told in daemon.take_events()
        ]
        out.append(("events", kept))

    def ended(job: str) -> None:
        events("JOB_STATUS_CHANGE", id=job, status="null")

    ask("blockdev-add", **qcow2(folder, "a"))
    ask("blockdev-add", **{**qcow2(folder, "b"), "node_name": "a"})
    ask("blockdev-add", **qcow2(folder, "t"))
    ask("blockdev-add", driver="zork", node_name="z")
    ask("blockdev-add", driver="raw", node_name="r", file="nix")
    ask("nope")
    for size in ("x", 8 * MIB, 4 * MIB):
        ask("block_resize", node_name="a", size=size)
    ask("block_resize", node_name="q", size=1)
    ask("block-dirty-bitmap-add", node="a", name="b0")
    ask("block-dirty-bitmap-add", node="a", name="b0")
    ask("block-dirty-bitmap-add", node="a", name="b1", granularity=3)
    ask("blockdev-backup", job_id="j", device="a", target="t", sync="full")
    ended("j")
    ask("blockdev-backup", job_id="9", device="a", target="t", sync="full")
    ask("blockdev-backup", job_id="j", device="a", target="t", sync="incremental")
    ask("blockdev-backup", job_id="j", device="a", target="t", sync="zork")
    ask("blockdev-backup", job_id="j", device="a", target="t", sync="none")
    ask("query-jobs")
    ask("blockdev-backup", job_id="k", device="a", target="t", sync="full")
    ask("blockdev-del", node_name="a")
    ask("block-job-cancel", device="j")
    daemon.wait_event("JOB_STATUS_CHANGE", id="j", status="null")
    daemon.take_events()  # QEMU's drains show as pauses, as many as there were
    ask("blockdev-mirror", job_id="m", device="a", target="t", sync="full")
    events("BLOCK_JOB_READY")
    ask("block-job-pause", device="m")
    events("JOB_STATUS_CHANGE", status="standby")
    ask("block-job-pause", device="m")
    ask("block-job-resume", device="m")
    events("JOB_STATUS_CHANGE", status="ready")
    ask("block-job-cancel", device="m")
    ended("m")
    ask("blockdev-mirror", job_id="m", device="a", target="t", sync="full", auto_finalize=False, auto_dismiss=False)
    events("BLOCK_JOB_READY")
    ask("job-finalize", id="m")
    ask("job-complete", id="m")
    events("BLOCK_JOB_PENDING")
    ask("job-finalize", id="m")
    events("JOB_STATUS_CHANGE", status="concluded")
    ask("job-dismiss", id="m")
    ended("m")
    ask("job-dismiss", id="m")
    ask("job-pause", id="x")
    ask("block-job-pause", device="x")
    ask("nbd-server-stop")
    address = {"type": "unix", "data": {"path": str(folder / "nbd")}}
    ask("nbd-server-start", addr=address)
    ask("nbd-server-start", addr=address)
    ask("block-export-add", type="nbd", id="e", node_name="t", writable=True, name="x")
    ask("block-export-add", type="nbd", id="e", node_name="t")
    ask("query-block-exports")
    ask("block-export-del", id="e")
    events("BLOCK_EXPORT_DELETED")
    ask("block-export-del", id="e")
    ask("nbd-server-stop")
    clear = {"type": "block-dirty-bitmap-clear", "data": {"node": "a", "name": "b0"}}
    add = {"type": "block-dirty-bitmap-add", "data": {"node": "a", "name": "b5"}}
    ask("transaction", actions=[clear, {"type": "abort", "data": {}}])
    ask("transaction", actions=[add, clear])
    ask("transaction", actions=[{"type": "zork", "data": {}}])
    ask("transaction", actions=[add], properties={"completion-mode": "grouped"})
    ask("block-dirty-bitmap-remove", node="a", name="b9")
    ask("x-debug-block-dirty-bitmap-sha256", node="a", name="b0")
    ask("blockdev-snapshot-sync", node_name="a", snapshot_file=str(folder / "s.qcow2"), snapshot_node_name="s")
    for name in ("a", "x", "t"):
        ask("blockdev-del", node_name=name)
    ask("query-block")
    ask("object-add", qom_type="iothread", id="io0")
    ask("object-add", qom_type="zork", id="io0")
    ask("object-del", id="io9")
    for data in (
        b"{'execute': 'query-block', 'id': 5}",
        b"{'foo': 1}",
        b"[1]",
        b"{'execute': 5}",
    ):
        out.append((data.decode(), daemon.raw(data)))
    out.append(("exit", daemon.quit()))
    return out


def test_commands_are_answered_as_by_qemus_daemon(tmp_path: Path) -> None:
    require("qemu-storage-daemon")
    answers = []
    for program in (("qemu-storage-daemon",), OURS):
        folder = tmp_path / "d"
        folder.mkdir()
        images(folder)
        with StorageDaemon(program, folder) as daemon:
            answers.append(drive(daemon))
        shutil.rmtree(folder)
    theirs, ours = answers
    assert [name for name, _ in ours] == [name for name, _ in theirs]
    different = [(name, one, other) for (name, one), (_, other) in zip(theirs, ours, strict=True) if one != other]
    assert not different


def test_a_guest_writes_through_nbd_while_its_disk_moves(tmp_path: Path) -> None:
    require("qemu-io")
    images(tmp_path)
    with StorageDaemon(OURS, tmp_path) as daemon:
        for name in ("a", "t"):
            assert daemon.ask("blockdev-add", **qcow2(tmp_path, name)) == {}
        daemon.ask("nbd-server-start", addr={"type": "unix", "data": {"path": str(tmp_path / "nbd")}})
        daemon.ask("block-export-add", type="nbd", id="e", node_name="a", writable=True, name="x")
        uri = f"nbd+unix:///x?socket={tmp_path / 'nbd'}"
        commands = [word for n in range(40) for word in ("-c", f"write -P {n + 1} {n * 64}k 64k")]
        writer = subprocess.Popen(["qemu-io", "-f", "raw", *commands, uri], stdout=subprocess.PIPE, text=True)
        assert daemon.ask("blockdev-mirror", job_id="m", device="a", target="t", sync="full") == {}
        daemon.wait_event("BLOCK_JOB_READY")
        assert daemon.ask("block-job-complete", device="m") == {}
        daemon.wait_event("JOB_STATUS_CHANGE", id="m", status="null")
        assert writer.communicate(timeout=120)[0].count("wrote 65536/65536") == 40
        assert daemon.ask("blockdev-del", node_name="a") == {}
        exports = daemon.ask("query-block-exports")
        assert [export["node-name"] for export in exports] == ["t"]
        assert daemon.quit() == 0
    with open_image(tmp_path / "t.qcow2") as disk:
        for n in range(40):
            assert disk.read(n * 65536, 65536) == bytes([n + 1]) * 65536


def test_a_command_line_builds_the_graph_and_a_signal_ends_it(tmp_path: Path) -> None:
    require("qemu-io")
    images(tmp_path)
    options = (
        "--object", "throttle-group,id=g,x-iops-total=100000",
        "--blockdev", f"driver=file,node-name=f,filename={tmp_path / 'a.qcow2'}",
        "--blockdev", "qcow2,node-name=q,file=f",
        "--blockdev", "driver=throttle,throttle-group=g,file=q,node-name=d",
        "--nbd-server", f"addr.type=unix,addr.path={tmp_path / 'nbd'}",
        "--export", "nbd,id=e,node-name=d,writable=on,name=x",
        "--pidfile", str(tmp_path / "pid"),
    )  # fmt: skip
    with StorageDaemon(OURS, tmp_path, *options) as daemon:
        uri = f"nbd+unix:///x?socket={tmp_path / 'nbd'}"
        done = subprocess.run(
            ["qemu-io", "-f", "raw", "-c", "read -P 7 0 1M", "-c", "write -P 9 3M 64k", uri],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert "Pattern verification failed" not in done.stdout
        assert int((tmp_path / "pid").read_text()) == daemon.process.pid
        names = [node["node-name"] for node in daemon.ask("query-named-block-nodes")]
        assert names == ["d", "q", "f"]
        daemon.process.terminate()
        assert daemon.process.wait(120) == 0
    assert not (tmp_path / "monitor").exists()
    with open_image(tmp_path / "a.qcow2") as disk:
        assert disk.read(3 * MIB, 65536) == b"\t" * 65536


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            ("--blockdev", "driver=file,filename=/nowhere/x,node-name=f"),
            "--blockdev driver=file,filename=/nowhere/x,node-name=f: ",
        ),
        (("--monitor", "chardev=x"), '--monitor chardev=x: chardev "x" not found'),
        (
            ("--export", "nbd,id=e,node-name=x"),
            "--export nbd,id=e,node-name=x: Cannot find device='' nor node-name='x'",
        ),
    ],
)
def test_wrong_options_end_it_with_their_text(options: tuple[str, ...], text: str) -> None:
    done = subprocess.run([*OURS, *options], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1
    assert text in done.stderr


def test_monitors_that_send_garbage_or_hang_up_are_survived(tmp_path: Path) -> None:
    with StorageDaemon(OURS, tmp_path) as daemon:
        assert daemon.raw(b"\x00\xff{]")["error"]["class"] == "GenericError"
        answer = daemon.raw(b" {'execute': 'query-version', 'id': 1}")
        while answer.get("id") != 1:
            assert answer["error"]["class"] == "GenericError"
            answer = daemon.raw(b" ")
        assert answer["return"]["qemu"]["major"] >= 7
        daemon.send(b'{"execute": "query-')  # and never the rest
    images(tmp_path)
