"""The runner of QEMU's iotests: what it reads out of their report, what it cleans up, and what it writes."""

from __future__ import annotations

import dataclasses
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.conformance import iotests, matrix, records, report, source, standin
from tests.conformance.__main__ import parse_arguments
from tests.conformance.iotests import Outcome, Runner
from tests.conformance.matrix import Combination
from tests.conformance.toolset import USES_VARIABLE, Toolset
from tests.tools.patience import PATIENCE

PASSED = "QEMU -- ...\n031   ...        [12:00:00] ...   ...\r031   pass       [12:00:00] [12:00:01]   0.6s  (last: 0.5s)   \nPassed all 1\n"
FAILED = """\
060   fail       [12:00:00] [12:00:03]   2.8s                 output mismatch (see /tmp/t/060.out.bad)
--- /qemu/060.out
+++ /tmp/t/060.out.bad
@@ -1,3 +1,3 @@
 QA output created by 060
-qcow2: Marking image as corrupt
+qcow2: Image is corrupt
Failures: 060
"""
NOT_RUN = "042   not run    [12:00:00] [12:00:00]   ...                   not suitable for this image format: raw\n"


@pytest.mark.parametrize(
    ("test", "output", "expected"),
    [
        ("031", PASSED, ("pass", "")),
        ("060", FAILED, ("fail", "qcow2: Image is corrupt")),
        ("042", NOT_RUN, ("not run", "not suitable for this image format: raw")),
        ("042", "", ("fail", "check printed nothing")),
        ("042", "Traceback\nOSError: no\n", ("fail", "OSError: no")),
    ],
)
def test_report_of_check_is_read(test: str, output: str, expected: tuple[str, str]) -> None:
    assert iotests.parse(test, output) == expected


def runner(folder: Path, check: str, seconds: float = 20.0) -> Runner:
    """Return a runner over a folder whose check is the given script."""
    folder.mkdir()
    (folder / "check").write_text(check)
    return Runner(folder, Toolset("fake", {}, ()), "qcow2", folder / "logs", seconds)


def test_tools_that_a_test_calls_are_recorded(tmp_path: Path) -> None:
    check = f"""
import os, sys
assert sys.argv[1:] == ["-qcow2", "031"]
open(os.environ[{USES_VARIABLE!r}], "w").write("io\\nimg\\nio\\n")
print("031 pass [1:0:0] [1:0:1] 0.1s ")
"""
    seen: list[Outcome] = []
    [outcome] = runner(tmp_path / "q", check).run_all(["031"], 1, seen.append)
    assert (outcome.status, outcome.uses) == ("pass", ("img", "io"))
    assert seen == [outcome]
    assert "031 pass" in (tmp_path / "q" / "logs" / "031.log").read_text()


def test_a_machine_that_was_too_busy_is_asked_again(tmp_path: Path) -> None:
    count = tmp_path / "count"
    check = f"""
from pathlib import Path
count = Path({str(count)!r})
count.write_text((count.read_text() if count.exists() else "") + "x")
if len(count.read_text()) < 3:
    print("189 fail [1:0:0] [1:0:1] 0.1s output mismatch\\n+qemu-img: Unable to get accurate CPU usage")
else:
    print("189 pass [1:0:0] [1:0:1] 0.1s ")
"""
    [outcome] = runner(tmp_path / "q", check).run_all(["189"], 1, lambda outcome: None)
    assert (outcome.status, count.read_text()) == ("pass", "xxx")
    count.unlink()
    [outcome] = runner(tmp_path / "r", check.replace("< 3", "< 9")).run_all(["189"], 1, lambda outcome: None)
    assert (outcome.status, outcome.detail) == ("fail", "qemu-img: Unable to get accurate CPU usage")
    assert count.read_text() == "xxxx"


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
def test_time_limit_ends_a_test_and_its_daemons(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    check = f"""
import subprocess, sys, time
daemon = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100000)"], start_new_session=True)
open({str(note)!r}, "w").write(str(daemon.pid))
time.sleep(100000)
"""
    work = runner(tmp_path / "q", check, seconds=2.0)
    [outcome] = work.run_all(["300"], 1, lambda outcome: None)
    assert outcome.status == "timeout"
    deadline = time.monotonic() + PATIENCE
    while alive(int(note.read_text())):
        assert time.monotonic() < deadline, "the daemon is still there"
        time.sleep(0.02)


def test_stand_in_replaces_the_accelerator_and_keeps_the_rest() -> None:
    given = [
        "-display",
        "none",
        "-accel",
        "qtest",
        "-qtest",
        "unix:path=/s/q.sock",
        "-machine",
        "pc,accel=qtest",
        "-device",
        "x",
    ]
    real, qtest = standin.translate(given, "/halt")
    assert qtest == "/s/q.sock"
    assert real == ["-display", "none", "-accel", "tcg", "-bios", "/halt", "-machine", "pc,accel=tcg", "-device", "x"]
    assert standin.translate(["-accel", "kvm"], "/halt") == (["-accel", "kvm"], None)


def test_stand_in_firmware_halts_at_the_reset_vector() -> None:
    image = standin.firmware()
    assert len(image) == 65536
    assert image[0xFFF0:0xFFF3] == b"\xf4\xeb\xfd"


def test_stand_in_answers_each_line_and_becomes_the_program(tmp_path: Path) -> None:
    path = str(tmp_path / "q")
    with socket.socket(socket.AF_UNIX) as server:
        server.settimeout(PATIENCE)
        server.bind(path)
        server.listen()
        command = [sys.executable, standin.__file__, "/bin/echo", "/halt", "-qtest", f"unix:path={path}", "started"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.communicate(timeout=PATIENCE)[0] == "started\n"
        connection, _ = server.accept()
        with connection, connection.makefile("r") as answers:
            connection.sendall(b"clock_step 1\nmemset 0 1 0\n")
            assert [answers.readline(), answers.readline()] == ["OK\n", "OK\n"]


def test_source_entries_are_derived_from_both_forms() -> None:
    one_line = "# deb-src of nothing\ndeb [signed-by=/k] http://mirror stable main\ndeb-src http://mirror stable main\n"
    assert source.as_source_entries(one_line, ".list") == "deb-src [signed-by=/k] http://mirror stable main\n"
    stanza = "Types: deb\nURIs: http://mirror\nSuites: stable\n\nTypes: deb deb-src\nURIs: http://other\n"
    assert source.as_source_entries(stanza, ".sources").count("Types: deb-src\n") == 2


def test_outcomes_of_concurrent_tests_are_all_kept(tmp_path: Path) -> None:
    path = tmp_path / "out" / "x.json"
    names = [f"{number:03}" for number in range(40)]

    def write(part: list[str]) -> None:
        for name in part:
            records.record(path, Outcome(name, "pass", 0.1, uses=("img",)))

    threads = [threading.Thread(target=write, args=(names[start::4],)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(records.load(path)) == names
    assert records.load(path)["001"].uses == ("img",)


def test_one_test_has_one_reason(tmp_path: Path) -> None:
    path = tmp_path / "reasons.toml"
    entry = '[[reason]]\ntext = "later"\non = ["qcow2", "raw-*"]\ntests = ["060"]\n'
    path.write_text(entry)
    assert records.Reasons.read(path).why("qcow2", "060") == "later"
    assert records.Reasons.read(path).why("raw", "060") is None
    assert records.Reasons.read(path).why("raw-direct", "060") == "later"
    path.write_text(entry * 2)
    with pytest.raises(ValueError, match="two reasons for 060"):
        records.Reasons.read(path)


def test_page_counts_only_what_qemu_passes_and_cowhand_takes_part_in() -> None:
    reference = {
        "001": Outcome("001", "pass", 1.0, uses=("img", "io")),
        "002": Outcome("002", "pass", 1.0, uses=("img", "machine")),
        "003": Outcome("003", "fail", 1.0, "x"),
        "004": Outcome("004", "pass", 1.0, uses=("io",)),
        "005": Outcome("005", "pass", 1.0, uses=("daemon",)),
        "006": Outcome("006", "not run", 1.0, "no such device"),
    }
    own = {
        "001": Outcome("001", "pass", 1.0, date="2026-01-02"),
        "002": Outcome("002", "fail", 1.0, "a|b", date="2026-01-03", tools="others"),
        "003": Outcome("003", "pass", 1.0, date="2026-01-03"),
    }
    result = report.Results(Combination("qcow2", "qcow2"), reference, own, frozenset({"img", "io"}))
    text = report.page(
        {"Machine": "here"}, [result], records.Reasons({("qcow2", "002"): "because"}), ["001", "002", "003"]
    )
    assert "| qcow2 | none | 3 | 1 | 33 % | 1 | 1 | 1 of 2 | 1 |" in text
    assert "- qcow2: 1 of 2 pass: 001; others: 002" in text
    assert "| 002 | because | `a\\|b` |" in text
    assert "Results: 2026-01-02 to 2026-01-03" in text
    assert "Not started in this record: 004" in text
    assert "Last run with earlier sources, not with these (1): 002" in text
    assert "fails with QEMU's own tools: 003" in text
    assert "calls none of cowhand's tools: 005" in text
    assert "QEMU's own run says: no such device: 006" in text


def test_reasons_and_lists_of_the_project_are_readable() -> None:
    folder = Path(records.__file__).parent
    records.Reasons.read(folder / "reasons.toml")
    assert "031" in records.test_lists(folder / "lists.toml")["foundation"]


def test_tests_by_name_and_by_list_are_joined() -> None:
    options = parse_arguments(["run", "--format", "raw", "300", "--list", "foundation", "qsd-jobs"])
    assert [combination.name for combination in options.combinations] == ["raw"]
    assert options.tests[:3] == ["300", "qsd-jobs", "001"]
    assert {"qcow2", "raw", "luks"} <= {combination.name for combination in parse_arguments(["baseline"]).combinations}
    for wrong in (["--list", "nothing"], ["--format", "vmdk"]):
        with pytest.raises(SystemExit):
            parse_arguments(["run", *wrong])


def test_tests_that_start_more_than_image_tools_run_without_options_only() -> None:
    plain = {
        "001": Outcome("001", "pass", 1.0, uses=("img",)),
        "002": Outcome("002", "pass", 1.0, uses=("img", "machine")),
        "003": Outcome("003", "fail", 1.0, uses=("img",)),
        "004": Outcome("004", "pass", 1.0, uses=("img", "nbd")),
    }
    small = Combination("qcow2-512", "qcow2", "cluster_size=512", "tools")
    assert matrix.in_scope(small, sorted(plain), plain) == ["001"]
    assert matrix.in_scope(small.plain, sorted(plain), plain) == sorted(plain)
    reference = {"001": plain["001"], "002": plain["002"]}
    result = report.Results(small, reference, {"001": plain["001"]}, frozenset({"img"}), elsewhere=("002", "004"))
    assert result.comparable() == ["001"] and not result.not_comparable()
    text = report.page({}, [result], records.Reasons({}))
    assert "| qcow2-512 | `cluster_size=512` | 1 | 1 | 100 % | 0 | 0 | 1 of 1 | 1 |" in text
    assert "Combinations with options are for these" in text
    assert "since they start more than image tools: 002 004" in text


def test_a_scope_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "matrix.toml"
    path.write_text('[[combination]]\nname = "raw"\nformat = "raw"\nscope = "some"\n')
    with pytest.raises(ValueError, match="no scope some"):
        matrix.read(path)


def test_combinations_are_named_and_distinct(tmp_path: Path) -> None:
    known = matrix.read(Path(records.__file__).with_name("matrix.toml"))
    assert [c.name for c in matrix.named(known, ["qcow2-v2", "raw"])] == ["raw", "qcow2-v2"]
    assert {c.image_format for c in matrix.named(known, ["qcow2*"])} == {"qcow2"}
    path = tmp_path / "matrix.toml"
    path.write_text('[[combination]]\nname = "a"\nformat = "raw"\n' * 2)
    with pytest.raises(ValueError, match="one name"):
        matrix.read(path)


def test_options_of_a_combination_reach_check(tmp_path: Path) -> None:
    check = 'import sys\nassert sys.argv[1:] == ["-qcow2", "-o", "compat=0.10", "031"]\nprint("031 pass [1:0:0] [1:0:1] 0.1s ")\n'
    work = dataclasses.replace(runner(tmp_path / "q", check), options="compat=0.10")
    assert [outcome.status for outcome in work.run_all(["031"], 1, lambda outcome: None)] == ["pass"]


def test_only_what_these_sources_have_not_run_remains() -> None:
    held = {
        "001": Outcome("001", "pass", 1.0, tools="new"),
        "002": Outcome("002", "pass", 1.0, tools="old"),
        "003": Outcome("003", "timeout", 1.0, tools="new"),
    }
    tests = ["001", "002", "003", "004"]
    assert matrix.chosen(tests, held, "all", "new") == tests
    assert matrix.chosen(tests, held, "remaining", "new") == ["002", "004"]
    assert matrix.chosen(tests, held, "failed", "new") == ["003"]


def test_fingerprint_follows_contents_and_names(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    first = matrix.fingerprint(tmp_path)
    (tmp_path / "note.txt").write_text("not a source")
    assert matrix.fingerprint(tmp_path) == first
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    assert matrix.fingerprint(tmp_path) != first


def test_interrupted_run_ends_its_tests_and_keeps_the_outcomes_before(tmp_path: Path) -> None:
    check = """
import sys, time
if sys.argv[-1] == "002":
    time.sleep(100000)
print(sys.argv[-1], "pass [1:0:0] [1:0:1] 0.1s ")
"""
    work = runner(tmp_path / "q", check, seconds=100000.0)
    seen: list[str] = []

    class Interrupt(Exception):
        pass

    def report_one(outcome: Outcome) -> None:
        seen.append(outcome.test)
        raise Interrupt

    with pytest.raises(Interrupt):
        work.run_all(["001", "002", "003"], 2, report_one)
    assert seen == ["001"]
