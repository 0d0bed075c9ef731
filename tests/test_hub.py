"""Downloads: whatever a server, a disk or a kill does, the file with the final name is absent or exact."""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time

import httpx2
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fault_server import running

from nanochat import download, hub
from nanochat.common import UserError

REPO = "owner/data"
DATA = bytes(i * i % 251 for i in range(100_000))
TRANSIENT = ["408", "500", "503", "429", "reset at 0", "reset at 50", "reset at 99", "cut at 50", "cut without length",
             "chunked cut", "html", "wrong bytes", "too long"]


@pytest.fixture
def server(monkeypatch):
    with running() as faults:
        monkeypatch.setenv("HF_ENDPOINT", faults.url)
        monkeypatch.setattr(download, "BACKOFF_S", 0.001)
        faults.serve(REPO, "file.bin", DATA)
        yield faults


def target():
    return hub.repo_folder(REPO) / "file.bin"


def refusal(*args, **kwargs):
    with pytest.raises(UserError) as error:
        hub.fetch(*args, **kwargs)
    return str(error.value)


def parts():
    return [path.name for path in hub.repo_folder(REPO).rglob("*.part")]


# --- faults -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", TRANSIENT)
def test_a_fault_that_passes_leaves_an_exact_file(server, fault):
    server.faults.extend([fault, fault])
    assert hub.fetch(REPO, "file.bin") == target()
    assert target().read_bytes() == DATA and len(server.gets) == 3 and not parts()


@pytest.mark.parametrize("fault", [*TRANSIENT, "redirect loop", "401"])
def test_a_fault_that_stays_leaves_no_file_and_ends_with_a_sentence(server, fault):
    server.forever = fault
    sentence = refusal(REPO, "file.bin")
    assert sentence.startswith(f"{server.url}/datasets/{REPO}/resolve/main/file.bin could not be downloaded")
    assert "\n" not in sentence and not target().exists()
    attempts = {"redirect loop": 21, "401": 1}.get(fault, 5)
    assert len(server.gets) == attempts
    assert ("after 5 attempts" in sentence) == (attempts == 5)
    server.forever = ""
    assert hub.fetch(REPO, "file.bin").read_bytes() == DATA


def test_a_cut_transfer_goes_on_where_it_stopped(server):
    server.faults.extend(["cut at 50", "500", "cut without length"])
    assert hub.fetch(REPO, "file.bin").read_bytes() == DATA
    assert [asked for _, asked in server.gets] == ["", "bytes=50000-", "bytes=50000-", "bytes=75000-"]


@pytest.mark.parametrize("answer", ["200 to range", "other range", "no such range"])
def test_a_server_that_mistakes_the_range_is_no_harm(server, answer):
    server.faults.extend(["cut at 50", answer])
    assert hub.fetch(REPO, "file.bin").read_bytes() == DATA


def test_another_page_does_not_cost_what_came_before(server):
    server.faults.extend(["cut at 50", "html", "html"])
    assert hub.fetch(REPO, "file.bin").read_bytes() == DATA
    assert server.gets[-1][1] == "bytes=50000-"


def test_a_server_that_trickles_is_left(server, monkeypatch):
    monkeypatch.setattr(download, "SILENCE_S", 1.0)
    server.faults.append("one byte at a time")
    start = time.monotonic()
    assert hub.fetch(REPO, "file.bin").read_bytes() == DATA
    assert time.monotonic() - start < 0.02 * len(DATA) / 10 and len(server.gets) == 2  # all of it takes 2,000 s
    assert server.gets[1][1].startswith("bytes=")


def test_a_server_that_falls_silent_is_left(server, monkeypatch):
    monkeypatch.setattr(download, "SILENCE_S", 1.0)
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    server.faults.append("stall at 1000")
    assert refusal(REPO, "file.bin").endswith("could not be downloaded after 1 attempts: no answer within 1 s")


def test_a_file_has_a_deadline_for_all_its_attempts(server, monkeypatch):
    monkeypatch.setattr(download, "DEADLINE_S", 0.0)
    server.forever = "500"
    assert "after 1 attempts: the server answered 500" in refusal(REPO, "file.bin")
    assert len(server.gets) == 1


@pytest.mark.parametrize("header, low, high", [("7", 7, 7), ("0", 0.5, 1.5), ("soon", 0.5, 1.5), ("86400", 300, 300)])
def test_a_busy_server_says_how_long_to_wait(header, low, high):
    request = httpx2.Request("GET", "http://127.0.0.1/")
    response = httpx2.Response(429, headers={"Retry-After": header}, request=request)
    assert low <= download._pause_after(httpx2.HTTPStatusError("", request=request, response=response), 1) <= high


def test_pauses_grow_and_differ():
    pauses = [[download._pause_after(download.Damaged(), attempt) for _ in range(20)] for attempt in (1, 4)]
    assert max(pauses[0]) <= 1.5 and min(pauses[1]) >= 4 and len(set(pauses[0])) == 20


@pytest.mark.parametrize("stale", [b"", DATA[:30_000], b"x" * 30_000, b"x" * len(DATA), b"x" * 200_000, DATA],
                         ids=["empty", "good", "bad", "bad whole", "too long", "whole"])
def test_a_part_that_was_left_behind_is_used_or_replaced(server, stale):
    target().parent.mkdir(parents=True)
    target().with_name(".file.bin.part").write_bytes(stale)
    assert hub.fetch(REPO, "file.bin").read_bytes() == DATA
    assert not parts()
    assert len(server.gets) == {DATA: 0, b"x" * 30_000: 2}.get(stale, 1)


def test_a_small_file_is_checked_by_its_git_name(server, monkeypatch):
    name = hashlib.sha1(b"blob %d\0" % len(DATA) + DATA).hexdigest()
    lookup = download.get_hf_file_metadata

    def with_git_name(*args, **kwargs):
        found = lookup(*args, **kwargs)
        return type(found)(**{**vars(found), "etag": name})

    monkeypatch.setattr(download, "get_hf_file_metadata", with_git_name)
    server.faults.append("wrong bytes")
    assert hub.fetch(REPO, "file.bin").read_bytes() == DATA and len(server.gets) == 2


def test_what_is_no_hub_is_refused(server):
    server.head_faults.extend(["html"] * 5)
    assert refusal(REPO, "file.bin").endswith("after 5 attempts: the answer is not one of a hub, it lacks a size, a "
                                              "commit or an ETag")
    server.head_faults.extend(["500", "429"])
    assert hub.fetch(REPO, "file.bin").read_bytes() == DATA


def test_a_file_that_does_not_exist_is_said_at_once(server):
    assert refusal(REPO, "none.bin") == (f"{server.url}/datasets/{REPO}/resolve/main/none.bin could not be downloaded: "
                                         "the server answered 404 (there is no such file)")


def test_a_parquet_file_must_be_one_even_if_the_hub_has_it_so(server):
    server.serve(REPO, "a.parquet", b"PAR1 not really PAR1")
    assert refusal(REPO, "a.parquet").endswith("after 5 attempts: it is no whole parquet file")
    assert not (hub.repo_folder(REPO) / "a.parquet").exists()


def test_too_little_room_is_said_before_anything_is_written(server, monkeypatch):
    usage = download.shutil.disk_usage("/")
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: usage._replace(free=len(DATA) - 1))
    assert refusal(REPO, "file.bin") == (f"downloading 1 files needs 98 KiB in {hub.repo_folder(REPO)}, 98 KiB are "
                                         "free")
    assert not server.gets


# --- processes --------------------------------------------------------------------------------------


ZYGOTE = """
import json, os, resource, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job has it ignored
from huggingface_hub import get_session
from nanochat import hub
from nanochat.common import UserError

def program(repo, path, environment, file_limit):
    os.environ.update(environment)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    try:
        hub.fetch(repo, path)
    except UserError as error:
        return 3 if "File too large" in str(error) else 4
    except KeyboardInterrupt:
        return 130
    return 0

get_session()  # reads the certificates
for line in sys.stdin:
    order = json.loads(line)
    if isinstance(order, int):
        print(os.waitstatus_to_exitcode(os.waitpid(order, 0)[1]), flush=True)
    elif pid := os.fork():
        print(pid, flush=True)
    else:
        os._exit(program(*order))
"""


@pytest.fixture(scope="module")
def zygote():
    """A process that has imported everything: a program that it forks starts in milliseconds."""
    with subprocess.Popen([sys.executable, "-c", ZYGOTE], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          text=True) as process:
        yield process
        process.stdin.close()


class Program:
    """A process that fetches the file; 0, 3 for a full disk, 4 for another refusal, 130 for an interrupt."""

    def __init__(self, zygote, url, base, file_limit):
        self._zygote = zygote
        self.pid = self._ask([REPO, "file.bin", {"HF_ENDPOINT": url, "NANOCHAT_BASE_DIR": str(base)}, file_limit])

    def _ask(self, order):
        print(json.dumps(order), file=self._zygote.stdin, flush=True)
        return int(self._zygote.stdout.readline())

    def signal(self, number):
        os.kill(self.pid, number)

    def wait(self):
        return self._ask(self.pid)


@pytest.fixture
def start(zygote, server, own_base_dir):
    return lambda file_limit=-1: Program(zygote, server.url, own_base_dir, file_limit)


def test_killed_twenty_times_the_file_is_absent_and_then_exact(server, start):
    data = DATA * 20
    server.serve(REPO, "file.bin", data)
    part = target().with_name(".file.bin.part")
    for _ in range(20):
        before = part.stat().st_size if part.exists() else 0
        server.stalled.clear()
        server.faults.append("stall at 90000")
        process = start()
        assert server.stalled.wait(60)
        while not part.exists() or part.stat().st_size < before + 80_000:  # until most of what was sent is in the file
            time.sleep(0.002)
        process.signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not target().exists()
    assert start().wait() == 0 and target().read_bytes() == data and not parts()
    starts = [int(asked.removeprefix("bytes=").removesuffix("-") or 0) for _, asked in server.gets]
    assert starts == sorted(set(starts)) and starts[-1] >= 1_600_000


def test_a_full_disk_is_a_sentence_and_no_file(start):
    assert start(file_limit=50_000).wait() == 3 and not target().exists()
    assert hub.fetch(REPO, "file.bin").read_bytes() == DATA


def test_two_programs_fetch_one_file_once(server, start):
    server.faults.append("stall at 1000")
    first = start()
    assert server.stalled.wait(60)
    others = [start(), start()]
    threading.Timer(0.3, server.resume.set).start()  # then the stalled transfer is cut, and goes on
    assert [process.wait() for process in [first, *others]] == [0, 0, 0]
    assert target().read_bytes() == DATA and len(server.gets) == 2 and not parts()


def test_an_interrupt_ends_the_program_and_keeps_the_part(server, start):
    server.faults.extend(["cut at 50", "one byte at a time"])
    process = start()
    while len(server.gets) < 2:
        time.sleep(0.01)
    process.signal(signal.SIGINT)
    assert process.wait() == 130 and not target().exists() and parts() == [".file.bin.part"]
    assert hub.fetch(REPO, "file.bin").read_bytes() == DATA
    assert int(server.gets[-1][1].removeprefix("bytes=").removesuffix("-")) >= len(DATA) // 2


# --- many files, and the manifest -------------------------------------------------------------------


def manifest():
    return json.loads((hub.repo_folder(REPO) / "manifest.json").read_text(encoding="utf-8"))


def serve_many(server, n=12):
    for i in range(n):
        server.serve(REPO, f"sub/{i}.bin", DATA[i:])
    return [(REPO, f"sub/{i}.bin") for i in range(n)]


def test_files_come_in_parallel_and_are_returned_in_order(server):
    files = serve_many(server)
    server.faults.extend(["cut at 50"] * 4)
    paths = hub.fetch_all([*files, files[0]], workers=4)
    assert [path.read_bytes() for path in paths] == [DATA[i:] for i in range(12)] + [DATA]
    assert sorted(manifest()["files"]) == sorted(path for _, path in files)


def test_a_log_shows_every_file_that_came(server, capsys):
    hub.fetch_all(serve_many(server, 3))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(", ")[1] for line in lines] == ["1 of 3 files", "2 of 3 files", "3 of 3 files"]
    assert sorted(line.split(", ")[0] for line in lines) == [f"fetched sub/{i}.bin" for i in range(3)]


def test_a_missing_file_is_said_before_any_is_fetched(server):
    with pytest.raises(UserError, match=r"none\.bin could not be downloaded: the server answered 404 \(there is no "
                                        r"such file\)$"):
        hub.fetch_all([*serve_many(server, 3), (REPO, "none.bin")])
    assert not server.gets


@pytest.mark.parametrize("repo, path", [(REPO, "../../evil"), (REPO, "/evil"), ("../evil", "file.bin")])
def test_names_stay_below_the_hub_folder(repo, path):
    assert refusal(repo, path) == (f"a file of the hub must be named by owner/name and a path below it, got {repo} and "
                                   f"{path}")


def test_what_is_here_needs_no_server(server, monkeypatch):
    files = serve_many(server, 3)
    hub.fetch_all(files)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert [path.read_bytes() for path in hub.fetch_all(files)] == [DATA[i:] for i in range(3)]


def test_manifest_tells_bytes_sha256_commit_and_of_parquet_the_rows(server):
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": ["a", "b", "c"]}), buffer, row_group_size=2)
    server.serve(REPO, "a.parquet", buffer.getvalue())
    hub.fetch(REPO, "a.parquet")
    assert manifest() == {"format": 1, "files": {"a.parquet": {
        "bytes": len(buffer.getvalue()), "sha256": hashlib.sha256(buffer.getvalue()).hexdigest(), "revision": "main",
        "commit": "0" * 40, "rows": 3, "row_groups": [2, 1]}}}


def test_another_revision_is_another_file(server):
    hub.fetch(REPO, "file.bin")
    server.files[f"/datasets/{REPO}/resolve/v2/file.bin"] = DATA[::-1]
    assert hub.fetch(REPO, "file.bin", revision="v2").read_bytes() == DATA[::-1]
    assert manifest()["files"]["file.bin"]["revision"] == "v2"


@pytest.mark.parametrize("text", [None, "{", '{"format": 2, "files": {}}', "[]"])
def test_without_a_manifest_of_this_version_files_are_looked_at_and_kept(server, text):
    hub.fetch(REPO, "file.bin")
    whole = manifest()
    path = hub.repo_folder(REPO) / "manifest.json"
    path.unlink() if text is None else path.write_text(text, encoding="utf-8")
    hub.fetch(REPO, "file.bin")
    assert manifest() == whole and len(server.gets) == 1 and not parts()


@pytest.mark.parametrize("damage", [DATA[:-1], b"", DATA[:-1] + b"!"])
def test_a_damaged_file_is_fetched_again_when_its_size_or_manifest_tells(server, damage):
    hub.fetch(REPO, "file.bin")
    target().write_bytes(damage)
    if len(damage) == len(DATA):
        (hub.repo_folder(REPO) / "manifest.json").unlink()
    assert hub.fetch(REPO, "file.bin").read_bytes() == DATA


def test_after_a_failure_no_other_file_is_begun(server):
    files = serve_many(server)
    server.forever = "401"
    with pytest.raises(UserError, match=r"could not be downloaded: the server answered 401 \(it needs access: set "
                                        r"HF_TOKEN\).*; 0 of 12 files came, the same command goes on from there$"):
        hub.fetch_all(files, workers=2)
    assert len(server.gets) <= 4


def test_two_sets_of_files_at_once_share_a_manifest(server):
    files = serve_many(server)
    threads = [threading.Thread(target=hub.fetch_all, args=(part,)) for part in (files[:8], files[4:])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(manifest()["files"]) == sorted(path for _, path in files)
    assert len(server.gets) == 12
