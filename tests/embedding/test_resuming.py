"""Stage 1, stopped at any moment or shared by several writers: the cache ends the same, byte for byte."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import palcache.storage.layouts
from palcache.cache import Cache
from palcache.care.verification import verify_cache
from palcache.comparisons import Comparisons
from palcache.embedding.encoding import EmbedProgress
from palcache.embedding.writers import SpaceWriter
from palcache.storage.claims import Claim, Standing, survey
from palcache.storage.shards import ShardWriter
from tests.children import CONTEXT, DIED, embed, embed_together, embed_until, finish, start
from tests.embedding.runs import CONFIG, assert_holds, begin, leftovers, run, space_of, wait_for
from tests.stubs import StubEncoder, contents, differing, small_table, texts_of


def test_runs_give_the_same_bytes(folder: Path, reference: dict[str, bytes]) -> None:
    """No time, place, process or thread is in the files; vectors do depend on the batch, so batches are the same too."""
    run(folder / "again")
    assert differing(contents(folder / "again"), reference) == []
    run(folder / "other", None, StubEncoder(token_budget=12))
    assert differing(contents(folder / "other"), reference) != [], "the comparison cannot tell other batches"


def test_killed_at_random_a_run_resumes_to_the_same_bytes(folder: Path, reference: dict[str, bytes]) -> None:
    """Twelve kills at random moments, each followed by a resumption: every file equals that of the unstopped run."""
    table, random = small_table(), np.random.default_rng(7)
    for turn in range(12):
        path, log = folder / f"cache-{turn}", folder / f"log-{turn}"
        process = start(embed, path, table, StubEncoder(seconds=0.02, log=log), CONFIG)
        wait_for(log, lines=int(random.integers(0, 15)))
        time.sleep(random.uniform(0, 0.02))
        process.kill()
        assert finish(process) == -signal.SIGKILL
        run(path, table)
        assert verify_cache(Cache(path)).problems == ()
        assert differing(contents(path), reference) == [], turn


def test_killed_again_and_again_a_run_goes_on(folder: Path, reference: dict[str, bytes]) -> None:
    """One cache whose every writer is killed after a few batches still ends with the same bytes."""
    table, path = small_table(), folder / "cache"
    encoder, died = StubEncoder(log=folder / "log"), 0
    for moment in range(70, 700, 45):
        code = finish(start(embed_until, path, table, encoder, CONFIG, moment))
        died += code == DIED
        if code == 0:
            break
    run(path, table)
    assert died >= 2
    assert differing(contents(path), reference) == []


def test_killed_at_every_kind_of_moment_a_run_resumes_to_the_same_bytes(folder: Path) -> None:
    """Just before every seventh file operation: creating, claiming, half a batch written, sealing, journal, index."""
    table, encoder = small_table(3, 7), StubEncoder()
    assert finish(start(embed_until, folder / "whole", table, encoder, CONFIG, -1)) == 0
    reference, moments = contents(folder / "whole"), int((folder / "whole.count").read_text())
    assert moments > 150
    stood: Counter[str] = Counter()
    for moment in range(1, moments, 7):
        path = folder / f"cache-{moment}"
        assert finish(start(embed_until, path, table, encoder, CONFIG, moment)) == DIED
        stood.update({Path(name).suffix for name in leftovers(path)} if path.exists() else ["nothing"])
        run(path, table)
        assert differing(contents(path), reference) == [], moment
        shutil.rmtree(path)
    assert min(stood[kind] for kind in (".claim", ".partial", ".tmp")) >= 3, stood


@pytest.mark.parametrize("point", ["claim", "draft", "batch", "seal", "publish", "record"])
def test_killed_at_a_chosen_point_a_run_resumes_to_the_same_bytes(
    folder: Path, reference: dict[str, bytes], point: str
) -> None:
    """A claim without its name, no keys yet, half a batch, sums but no name, a name and a claim, no journal line."""
    assert finish(start(die_at, folder / "cache", point)) == DIED
    run(folder / "cache")
    assert verify_cache(Cache(folder / "cache")).problems == ()
    assert differing(contents(folder / "cache"), reference) == []


def die_at(path: Path, point: str) -> None:
    """Embed and die at a point of the second shard."""
    calls: Counter[str] = Counter()

    def fatal(function: Callable[..., Any], *, after: bool, only: str) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            calls[point] += only in str(arguments[0])
            if calls[point] == 2 and point == "batch":
                half = len(arguments[1]) // 2
                more = {name: values[:half] for name, values in arguments[4].items()}
                function(arguments[0], *(argument[:half] for argument in arguments[1:4]), more)
            result = function(*arguments, **options) if after or calls[point] < 2 else None
            if calls[point] == 2:
                os._exit(DIED)
            return result

        return wrapper

    places: dict[str, tuple[Any, str, bool, str]] = {
        "claim": (Path, "replace", False, ".claim.tmp"),
        "draft": (palcache.storage.layouts, "_reserve", True, ""),
        "batch": (ShardWriter, "write", False, ""),
        "seal": (ShardWriter, "seal", True, ""),
        "publish": (Claim, "drop", False, ""),
        "record": (Cache, "record", False, ""),
    }
    owner, name, after, only = places[point]
    setattr(owner, name, fatal(getattr(owner, name), after=after, only=only))
    run(path)


@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupt_stops_at_once_and_loses_nothing(folder: Path, reference: dict[str, bytes], workers: int) -> None:
    """Ctrl-C in mid-run ends all threads and lets go of the claims; the same process can go on."""
    encoder = StubEncoder(workers=workers)

    def interrupt(event: EmbedProgress) -> None:
        if event.role == "response" and event.texts >= 6:
            raise KeyboardInterrupt

    threads = threading.active_count()
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        run(folder / "cache", None, encoder, on_progress=interrupt)
    assert threading.active_count() == threads
    done = len(encoder.batches)
    run(folder / "cache", None, encoder)
    whole = StubEncoder()
    run(folder / "whole", None, whole)
    assert len(encoder.batches) - done < len(whole.batches)
    assert differing(contents(folder / "cache"), reference) == []


def test_a_terminated_run_resumes(folder: Path, reference: dict[str, bytes]) -> None:
    """SIGTERM without a handler is a kill."""
    process = start(embed, folder / "cache", small_table(), StubEncoder(seconds=0.05, log=folder / "log"), CONFIG)
    wait_for(folder / "log", lines=4)
    process.terminate()
    assert finish(process) == -signal.SIGTERM
    run(folder / "cache")
    assert differing(contents(folder / "cache"), reference) == []


def test_a_shard_begun_by_other_libraries_starts_anew(folder: Path) -> None:
    """A shard's record of who wrote it is true for all its rows."""
    begin(folder / "cache", small_table(), StubEncoder(library="1"))
    run(folder / "cache", None, StubEncoder(library="2"))
    run(folder / "whole", None, StubEncoder(library="2"))
    mixed, whole = (space_of(folder / name, "response").shards for name in ("cache", "whole"))
    assert [shard.header.versions["stub"] for shard in mixed] == ["1", "2", "2", "2"]
    assert [shard.path.name for shard in mixed[1:]] == [shard.path.name for shard in whole[1:]]


def test_a_dead_writers_shard_is_left_to_who_has_its_texts(folder: Path) -> None:
    """Another table is not held up by it, and the first one goes on with it later."""
    first, second = small_table(label="a"), small_table(label="b")
    encoder = StubEncoder(batch_sensitive=False)
    begin(folder / "cache", first, encoder)
    begun = [name for name in contents(folder / "cache") if name.endswith(".partial")]
    run(folder / "cache", second, encoder, name="second")
    assert [name for name in contents(folder / "cache") if name.endswith(".partial")] == begun
    assert_holds(folder / "cache", second, encoder, "second")
    run(folder / "cache", first, encoder)
    assert leftovers(folder / "cache") == []
    assert_holds(folder / "cache", first, encoder)


# Several writers


@pytest.mark.parametrize("writers", [2, 4])
def test_writers_share_one_cache(folder: Path, reference: dict[str, bytes], writers: int) -> None:
    """All finish, nothing is encoded twice, and the shards are those of a single writer."""
    gate, table = CONTEXT.Barrier(writers, timeout=60), small_table()
    encoder = StubEncoder(seconds=0.02, log=folder / "log")
    processes = [start(embed_together, folder / "cache", table, encoder, CONFIG, gate) for _ in range(writers)]
    assert [finish(process) for process in processes] == [0] * writers
    encoded = Counter((folder / "log").read_text().splitlines())
    assert encoded == Counter([*texts_of(table, "prompt"), *texts_of(table, "response")])
    assert verify_cache(Cache(folder / "cache")).problems == ()
    found = contents(folder / "cache")
    assert set(differing(found, reference)) <= {"journal.jsonl"}, "only the order of sealing may differ"
    assert sorted(found["journal.jsonl"].splitlines()) == sorted(reference["journal.jsonl"].splitlines())


def test_a_writer_takes_over_from_a_killed_one(folder: Path) -> None:
    """While both run, one is killed: the other finishes, and only the batch in flight is encoded twice."""
    gate, table, alone = CONTEXT.Barrier(2, timeout=60), small_table(6, 40), StubEncoder()
    run(folder / "alone", table, alone)
    logs = [folder / "log-0", folder / "log-1"]
    processes = [
        start(embed_together, folder / "cache", table, StubEncoder(seconds=0.04, log=log), CONFIG, gate) for log in logs
    ]
    victim = wait_for(*logs, lines=12)
    processes[victim].kill()
    assert finish(processes[victim]) == -signal.SIGKILL
    assert finish(processes[1 - victim]) == 0
    encoded = Counter(line for log in logs if log.exists() for line in log.read_text().splitlines())
    assert set(encoded) == {*texts_of(table, "prompt"), *texts_of(table, "response")}
    assert sum(encoded.values()) - len(encoded) <= max(alone.batches)
    assert verify_cache(Cache(folder / "cache")).problems == ()
    assert set(differing(contents(folder / "cache"), contents(folder / "alone"))) <= {"journal.jsonl"}


def test_claims_are_looked_at_before_sealed_shards(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other way round, a shard sealed between the two looks would be in neither, and be encoded again."""
    looks: list[str] = []
    sealed_rows = SpaceWriter._sealed_rows

    def watched_survey(path: Path) -> Standing:
        looks.append("claims")
        return survey(path)

    def watched_rows(self: SpaceWriter, path: Path) -> Any:
        looks.append("shards")
        return sealed_rows(self, path)

    monkeypatch.setattr("palcache.embedding.writers.survey", watched_survey)
    monkeypatch.setattr(SpaceWriter, "_sealed_rows", watched_rows)
    run(folder)
    at = [number for number, look in enumerate(looks) if look == "claims"]
    assert len(at) > 6
    assert looks[0] == "claims"
    assert {looks[number + 1] for number in at} == {"shards"}


def test_writers_of_different_tables_share_what_they_can(folder: Path) -> None:
    """Two tables with common texts at once: each common text is encoded once, and both tables are whole."""
    gate, tables = CONTEXT.Barrier(2, timeout=60), (small_table(4, 6), small_table(6, 11))
    encoder = StubEncoder(seconds=0.02, log=folder / "log", batch_sensitive=False)
    processes = [start(embed_named, folder / "cache", table, encoder, gate, f"t{i}") for i, table in enumerate(tables)]
    assert [finish(process) for process in processes] == [0, 0]
    assert set(Counter((folder / "log").read_text().splitlines()).values()) == {1}
    for number, table in enumerate(tables):
        assert_holds(folder / "cache", table, encoder, f"t{number}")


def embed_named(path: Path, table: Comparisons, encoder: StubEncoder, gate: Any, name: str) -> None:
    """Embed a table under a name as soon as all processes are there."""
    gate.wait()
    run(path, table, encoder, name=name)


def test_two_encoders_at_once_keep_both_spaces_of_a_table(folder: Path) -> None:
    """The table's list of spaces is not lost to the one that writes last."""
    gate = CONTEXT.Barrier(3, timeout=60)
    processes = [
        start(embed_together, folder / "cache", small_table(), StubEncoder(identity=name), CONFIG, gate)
        for name in ("a", "b", "c")
    ]
    assert [finish(process) for process in processes] == [0, 0, 0]
    assert len(Cache(folder / "cache").comparisons("table").spaces) == 3


# Damage


def test_a_damaged_begun_shard_is_made_anew(folder: Path, reference: dict[str, bytes]) -> None:
    """Rows that cannot be trusted are encoded again."""
    begin(folder / "cache", small_table(), StubEncoder())
    (partial,) = folder.glob("cache/spaces/*/shards/*.partial")
    partial.write_bytes(partial.read_bytes()[:5_000])
    run(folder / "cache")
    assert differing(contents(folder / "cache"), reference) == []


def test_a_deleted_shard_is_encoded_again(folder: Path) -> None:
    """What verify advises works: delete the damaged file, embed again."""
    encoder = StubEncoder(batch_sensitive=False)
    run(folder, None, encoder)
    before = contents(folder)
    victim = sorted(folder.glob("spaces/*/shards/000002-*.h5"))[0]
    victim.unlink()
    assert len(verify_cache(Cache(folder)).problems) == 2
    run(folder, None, encoder)
    assert_holds(folder, small_table(), encoder)
    assert len(contents(folder)) == len(before)
