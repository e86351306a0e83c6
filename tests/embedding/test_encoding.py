"""Stage 1: every distinct text once, whatever stops the run, however many writers there are."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import tempfile
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import palcache.storage.layouts
from palcache.cache import Cache, Space
from palcache.care.verification import verify_cache
from palcache.comparisons import Comparisons
from palcache.configs import EmbedConfig
from palcache.devices import is_out_of_memory
from palcache.embedding.encoding import EmbedProgress, EmbedSummary, embed_comparisons, plan_embedding
from palcache.embedding.writers import SpaceWriter
from palcache.encoders import Role
from palcache.errors import InputError, ModelError, NumericsError, StorageError
from palcache.fingerprints import text_keys
from palcache.storage.claims import Claim, Standing, survey
from palcache.storage.shards import FAILED, TRUNCATED, ShardWriter
from tests.children import CONTEXT, DIED, embed, embed_limited, embed_together, embed_until, finish, start
from tests.stubs import MAX_WORDS, StubEncoder, as_encoder, contents, differing, small_table, texts_of

SHARD_ROWS = 4
CONFIG = EmbedConfig(shard_rows=SHARD_ROWS)
ROLES: tuple[Role, ...] = ("prompt", "response")


@pytest.fixture
def folder() -> Iterator[Path]:
    """Yield a folder in memory where there is one, because these tests write and sync thousands of small files."""
    memory = Path("/dev/shm")  # noqa: S108 - made unique below
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as path:
        yield Path(path)


def run(
    path: Path,
    table: Comparisons | None = None,
    encoder: StubEncoder | None = None,
    config: EmbedConfig = CONFIG,
    name: str = "table",
    on_progress: Callable[[EmbedProgress], None] | None = None,
) -> EmbedSummary:
    """Embed a table."""
    table, encoder = table or small_table(), encoder or StubEncoder()
    cache = Cache.create(path)
    return embed_comparisons(table, as_encoder(encoder), cache, name=name, config=config, on_progress=on_progress)


def space_of(path: Path, role: Role, name: str = "table") -> Space:
    """Return a space of a table's only encoder."""
    cache = Cache(path)
    return cache.space(cache.comparisons(name).spaces[0][ROLES.index(role)])


def assert_holds(path: Path, table: Comparisons, encoder: StubEncoder, name: str = "table") -> None:
    """Assert that a cache is sound and holds the right vector of every text of a table."""
    assert verify_cache(Cache(path)).problems == ()
    for role in ROLES:
        space, texts = space_of(path, role, name), texts_of(table, role)
        rows = space.find(text_keys(table.prompts.values if role == "prompt" else table.responses))
        expected = np.stack([encoder.vector(text, role) for text in texts])
        np.testing.assert_allclose(space.rows(rows).float().numpy(), expected, atol=2e-3)


def leftovers(path: Path) -> list[str]:
    """Return the files that a finished run must not leave."""
    return [name for name in contents(path) if name.endswith((".claim", ".partial", ".tmp"))]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("workers", [1, 3])
def test_every_text_gets_its_vector(folder: Path, dtype: Any, workers: int) -> None:
    """Each distinct text is encoded once per role and found by its content, whatever the stored type."""
    table, encoder = small_table(), StubEncoder(batch_sensitive=False, workers=workers)
    summary = run(folder, table, encoder, EmbedConfig(shard_rows=SHARD_ROWS, dtype=dtype))
    assert verify_cache(Cache(folder)).problems == ()
    tolerance = {"float16": 1e-3, "bfloat16": 1e-2, "float32": 0}[dtype]
    for role in ROLES:
        space, texts = space_of(folder, role), texts_of(table, role)
        assert len(space) == len(texts)
        expected = np.stack([encoder.vector(text, role) for text in texts])
        np.testing.assert_allclose(space.tensor().float().numpy(), expected, atol=tolerance)
        np.testing.assert_allclose(space.norms(), np.linalg.norm(expected, axis=1), rtol=1e-6)
        words = [len(text.split()) + (role == "prompt") for text in texts]
        n_tokens = np.concatenate([shard.n_tokens for shard in space.shards])
        flags = np.concatenate([shard.flags for shard in space.shards])
        assert n_tokens.tolist() == [min(count, MAX_WORDS) for count in words]
        assert flags.tolist() == [TRUNCATED if count > MAX_WORDS else 0 for count in words]
    assert summary.encoded == 5 + 13
    assert leftovers(folder) == []


def test_the_summary_counts(folder: Path) -> None:
    """References, distinct texts, hits and savings add up; bytes are those on the disk."""
    table, encoder = small_table(), StubEncoder()
    first = run(folder, table, encoder)
    assert (first.references, first.distinct) == (3 * 27, {"prompt": 5, "response": 13})
    assert (first.hits, first.encoded, first.repeats_saved, first.failed) == (0, 18, 63, 0)
    assert first.tokens == sum(
        min(len(text.split()) + (role == "prompt"), MAX_WORDS) for role in ROLES for text in texts_of(table, role)
    )
    assert first.padded >= first.tokens
    assert first.truncated == sum(
        len(text.split()) + (role == "prompt") > MAX_WORDS for role in ROLES for text in texts_of(table, role)
    )
    assert first.truncated > 0
    assert first.new_bytes == sum(path.stat().st_size for path in folder.glob("spaces/*/shards/*.h5"))
    assert set(first.seconds) == {"total", "keys", "encode", "tokenize", "wait", "forward", "write", "device"}
    before = contents(folder)
    second = run(folder, table, encoder)
    assert (second.hits, second.encoded, second.new_bytes, second.repeats_saved) == (18, 0, 0, 81)
    assert contents(folder) == before, "a run with nothing to do changed the cache"


def test_batches_keep_to_the_budget(folder: Path) -> None:
    """No batch computes more padded tokens than asked for."""
    encoder = StubEncoder(memory=20, batch_sensitive=False)
    run(folder, None, encoder, EmbedConfig(shard_rows=9, token_budget=20))
    assert max(encoder.batches) > 1
    assert_holds(folder, small_table(), encoder)


def test_equal_lengths_are_kept(folder: Path) -> None:
    """An encoder whose vectors padding would change gets batches of one length."""
    seen: list[set[int]] = []

    class Watching:
        """Notes the lengths in each batch."""

        def __init__(self, stub: StubEncoder) -> None:
            self._stub = stub

        def __getattr__(self, name: str) -> Any:
            return getattr(self._stub, name)

        def encode(self, window: Any, rows: Any, role: Role) -> torch.Tensor:
            seen.append(set(window.n_tokens[rows].tolist()))
            return self._stub.encode(window, rows, role)

    embed_comparisons(
        small_table(2, 40),
        Watching(StubEncoder(equal_lengths=True)),
        Cache.create(folder),
        name="t",
        config=EmbedConfig(),
    )
    assert all(len(lengths) == 1 for lengths in seen)
    assert len(seen) < 2 + 40


def test_a_second_table_encodes_only_what_is_new(folder: Path) -> None:
    """Texts are found by content, across tables and runs; the first table's shards stay as they are."""
    encoder = StubEncoder(batch_sensitive=False, log=folder / "log")
    first, second = small_table(4, 6), small_table(6, 11)
    shared = [len(set(texts_of(first, role)) & set(texts_of(second, role))) for role in ROLES]
    assert min(shared) > 0
    run(folder / "cache", first, encoder, name="first")
    before = contents(folder / "cache")
    summary = run(folder / "cache", second, encoder, name="second")
    assert summary.hits == sum(shared)
    assert summary.encoded == 6 + 11 - sum(shared)
    assert set(Counter((folder / "log").read_text().splitlines()).values()) == {1}
    shards = {name: content for name, content in before.items() if "/shards/" in name or name == "comparisons/first.h5"}
    assert shards.items() <= contents(folder / "cache").items()
    assert_holds(folder / "cache", first, encoder, "first")
    assert_holds(folder / "cache", second, encoder, "second")


def test_encoders_do_not_mix(folder: Path) -> None:
    """Another encoder or stored type fills other spaces; the table knows all of them."""
    table = small_table()
    run(folder, table, StubEncoder())
    run(folder, table, StubEncoder(identity="other"))
    run(folder, table, StubEncoder(), EmbedConfig(shard_rows=SHARD_ROWS, dtype="bfloat16"))
    cache = Cache(folder)
    assert len(cache.space_ids) == 6
    assert len(cache.comparisons("table").spaces) == 3


def test_a_prompt_that_is_also_a_response_is_two_items(folder: Path) -> None:
    """Roles have spaces of their own, because models prefix queries and documents differently."""
    table = Comparisons.from_rows(
        [{"user_id": "u", "prompt": "same words", "response_1": "same words", "response_2": "other", "y": 1}]
    )
    encoder = StubEncoder(batch_sensitive=False)
    run(folder, table, encoder)
    assert_holds(folder, table, encoder)
    assert not torch.equal(space_of(folder, "prompt").tensor()[0], space_of(folder, "response").tensor()[0])


def test_progress_ends_where_it_said(folder: Path) -> None:
    """Each role's texts and tokens count up to their totals, which are right from the first shard on."""
    events: list[EmbedProgress] = []
    summary = run(folder, on_progress=events.append)
    for role, count in (("prompt", 5), ("response", 13)):
        of_role = [event for event in events if event.role == role]
        assert [event.texts for event in of_role] == sorted(event.texts for event in of_role)
        assert {event.texts_total for event in of_role} == {count}
        last = of_role[-1]
        assert (last.texts, last.tokens) == (last.texts_total, last.tokens_total)
    assert sum(event.role == "response" for event in events) == len(
        [event for event in events if event.role == "response"]
    )
    assert summary.tokens == sum([event for event in events if event.role == role][-1].tokens for role in ROLES)


def test_a_plan_says_what_a_run_does_and_writes_nothing(folder: Path) -> None:
    """On a new cache and on one that has some of the texts."""
    first, second = small_table(4, 6), small_table(6, 11)
    for table, cache in ((first, None), (second, folder / "cache")):
        before = contents(folder)
        plan = plan_embedding(table, StubEncoder(), Cache(cache) if cache else None, config=CONFIG)
        assert contents(folder) == before
        done = run(folder / "cache", table)
        for name in ("references", "distinct", "hits", "encoded", "truncated", "tokens", "spaces"):
            assert getattr(plan, name) == getattr(done, name), name
        assert 0 < plan.new_bytes <= done.new_bytes
    rough = plan_embedding(small_table(9, 90), StubEncoder(), None, sample=30)
    exact = plan_embedding(small_table(9, 90), StubEncoder(), None)
    assert rough.tokens == pytest.approx(exact.tokens, rel=0.3)


def test_a_name_that_cannot_be_stored_is_refused_at_once(folder: Path) -> None:
    """Not after hours of encoding."""
    encoder = StubEncoder()
    with pytest.raises(InputError, match=r"Got the table name 'a/b'; expected a file name"):
        run(folder, None, encoder, name="a/b")
    assert encoder.batches == []


# Stops


@pytest.fixture
def reference(folder: Path) -> dict[str, bytes]:
    """Return the files of a run that nothing stopped."""
    run(folder / "reference")
    return contents(folder / "reference")


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


def wait_for(*logs: Path, lines: int) -> int:
    """Wait until one of several writers has encoded that many texts; return which."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for number, log in enumerate(logs):
            if not lines or (log.exists() and log.read_bytes().count(b"\n") >= lines):
                return number
        time.sleep(0.002)
    raise TimeoutError(f"nobody encoded {lines} texts")


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


def begin(path: Path, table: Comparisons, encoder: StubEncoder) -> None:
    """Embed and stop in the middle of the second shard of responses."""

    def interrupt(event: EmbedProgress) -> None:
        if event.role == "response" and event.texts > SHARD_ROWS:
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        run(path, table, encoder, on_progress=interrupt)
    assert [name[-14:] for name in leftovers(path) if name.endswith(".partial")] == ["000002.partial"]


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


# Texts, memory and disks that fail


def test_texts_that_fail_are_recorded_and_retried(folder: Path) -> None:
    """The run goes on without them; a later run encodes them, and until then nothing finds them."""
    table = small_table()
    bad = [texts_of(table, "response")[6], texts_of(table, "prompt")[4]]
    encoder = StubEncoder(fails_on=frozenset(bad), batch_sensitive=False)
    summary = run(folder, table, encoder)
    assert (summary.failed, summary.encoded) == (2, 16)
    (line,) = [json.loads(line) for line in (space_of(folder, "response").folder / "failed.jsonl").open("rb")]
    assert line["text"] == bad[0]
    assert line["error"] == f"ValueError: cannot encode {bad[0]}"
    assert line["key"] == text_keys(table.responses)[6].tobytes().hex()
    space = space_of(folder, "response")
    assert space.find(text_keys(table.responses)).tolist() == [row if row != 6 else -1 for row in range(13)]
    assert space.shards[1].flags[2] & FAILED
    assert len(verify_cache(Cache(folder)).problems) == 2
    before = contents(folder)
    again = run(folder, table, encoder)
    assert (again.failed, again.encoded, again.hits) == (2, 0, 16)
    assert contents(folder) == before, "a retry that fails again left something behind"
    healed = run(folder, table, StubEncoder(batch_sensitive=False))
    assert (healed.failed, healed.encoded) == (0, 2)
    assert_holds(folder, table, encoder)


def test_a_shard_without_a_single_vector_is_left_out(folder: Path) -> None:
    """Texts that fail all together leave no shard of zeros."""
    table = small_table()
    encoder = StubEncoder(fails_on=frozenset(texts_of(table, "response")[:SHARD_ROWS]))
    summary = run(folder, table, encoder)
    assert (summary.failed, summary.encoded) == (4, 14)
    assert len(space_of(folder, "response")) == 13 - SHARD_ROWS
    assert leftovers(folder) == []


def test_failures_are_reported_once_after_a_kill(folder: Path) -> None:
    """Killed on either side of the report, and with the report cut short, a resumed run leaves one line."""
    table = small_table(3, 7)
    encoder = StubEncoder(fails_on=frozenset(texts_of(table, "response")[5:6]))
    assert finish(start(embed_until, folder / "whole", table, encoder, CONFIG, -1)) == 0
    reference, moments = contents(folder / "whole"), int((folder / "whole.count").read_text())
    for moment in range(moments // 2, moments, 13):
        path = folder / f"cache-{moment}"
        finish(start(embed_until, path, table, encoder, CONFIG, moment))
        for report in path.glob("spaces/*/failed.jsonl"):
            os.truncate(report, report.stat().st_size // 2)
        run(path, table, encoder)
        assert differing(contents(path), reference) == [], moment


def test_failed_rows_of_a_begun_shard_are_retried(folder: Path) -> None:
    """What failed before the kill is tried again by the run that goes on with the shard."""
    table = small_table()
    encoder = StubEncoder(fails_on=frozenset(texts_of(table, "prompt")[:2]), batch_sensitive=False)

    def interrupt(event: EmbedProgress) -> None:
        if event.texts >= 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        run(folder, table, encoder, on_progress=interrupt)
    healed = StubEncoder(batch_sensitive=False)
    assert run(folder, table, healed).failed == 0
    assert_holds(folder, table, healed)


def test_an_encoder_that_fails_on_everything_stops(folder: Path) -> None:
    """A broken encoder does not mark a whole table as failed; once it is mended the run goes on."""
    table = small_table(12, 15)
    broken = StubEncoder(fails_on=frozenset([*texts_of(table, "prompt"), *texts_of(table, "response")]))
    config = EmbedConfig(shard_rows=10)
    with pytest.raises(
        ModelError, match=r"failed on 8 texts in a row, and on 'ask.*' too \(ValueError: cannot.*failed.jsonl"
    ):
        run(folder, table, broken, config)
    run(folder, table, StubEncoder(batch_sensitive=False), config)
    assert_holds(folder, table, StubEncoder(batch_sensitive=False))


def test_an_encoder_that_breaks_in_mid_run_stops(folder: Path) -> None:
    """As after a device error, from which every text fails."""
    table = small_table(3, 30)
    encoder = StubEncoder(batch_sensitive=False)

    def break_it(event: EmbedProgress) -> None:
        if event.role == "response" and event.texts > 4:
            encoder.fails_on = frozenset(texts_of(table, "response"))

    with pytest.raises(ModelError, match=r"failed on 8 texts in a row"):
        run(folder, table, encoder, EmbedConfig(shard_rows=25), on_progress=break_it)
    encoder.fails_on = frozenset()
    assert run(folder, table, encoder, EmbedConfig(shard_rows=25)).failed == 0
    assert_holds(folder, table, encoder)


def test_many_texts_that_fail_do_not_stop_a_sound_encoder(folder: Path) -> None:
    """Ten texts too many for the memory in a row, and the rest is encoded."""
    rows = [
        {"user_id": "u", "prompt": f"p{i}", "response_1": f"r{i} " + "w " * 8, "response_2": f"s{i}", "y": 1}
        for i in range(10)
    ]
    summary = run(folder, Comparisons.from_rows(rows), StubEncoder(memory=8, token_budget=40), EmbedConfig())
    assert (summary.failed, summary.encoded) == (10, 20)


def test_out_of_memory_halves_the_budget(folder: Path) -> None:
    """Batches that do not fit are halved, and the next ones are planned smaller: few attempts are in vain."""
    table, encoder = small_table(3, 64), StubEncoder(token_budget=96, memory=24, batch_sensitive=False)
    summary = run(folder, table, encoder, EmbedConfig(shard_rows=100))
    assert (summary.failed, summary.encoded) == (0, 67)
    assert_holds(folder, table, encoder)
    assert len(encoder.batches) > 12
    assert encoder.overflows <= 4, "later batches were planned as large as those that failed"


@pytest.mark.parametrize(
    ("message", "memory"),
    [
        ("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory", True),
        ("MPS backend out of memory (MPS allocated: 1 GiB)", True),
        ("CUDA error: out of memory", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("index out of range in self", False),
    ],
)
def test_memory_that_ran_out_is_told_on_every_device(message: str, memory: bool) -> None:
    """Not every library raises `torch.OutOfMemoryError`."""
    assert is_out_of_memory(RuntimeError(message)) == memory


def test_out_of_memory_with_workers_does_not_halve_for_each_of_them(folder: Path) -> None:
    """Batches that were already under way say nothing new about the memory."""
    table = small_table(3, 64)
    encoder = StubEncoder(token_budget=96, memory=48, workers=4, batch_sensitive=False)
    run(folder, table, encoder, EmbedConfig(shard_rows=100))
    assert_holds(folder, table, encoder)
    assert encoder.overflows >= 4
    assert len(encoder.batches) < 30, "the budget was halved again and again"


def test_memory_is_free_before_a_batch_is_tried_again(folder: Path) -> None:
    """No frame of the failed attempt is alive while its halves are encoded, or its tensors would fill the device."""
    alive: list[bool] = []

    class Hoarding:
        """Fails above two rows and looks whether the last attempt's tensors are gone."""

        def __init__(self, stub: StubEncoder) -> None:
            self._stub = stub
            self._last: Callable[[], object] = lambda: None

        def __getattr__(self, name: str) -> Any:
            return getattr(self._stub, name)

        def encode(self, window: Any, rows: Any, role: Role) -> torch.Tensor:
            alive.append(self._last() is not None)
            hoard = torch.zeros(3)
            self._last = weakref.ref(hoard)
            if len(rows) > 2:
                raise torch.OutOfMemoryError("stub out of memory")
            return self._stub.encode(window, rows, role) + hoard[0]

    embed_comparisons(small_table(), Hoarding(StubEncoder()), Cache.create(folder), name="t", config=CONFIG)
    assert len(alive) > 10
    assert not any(alive)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            "nan_on",
            r"A vector is not finite: row 2 of shard 000002 in the response space, the text 'say6.*float32",
        ),
        (
            "huge_on",
            r"beyond the range of float16 \(65504\): row 2 of shard 000002 .*the text 'say6.*store with --dtype bfloat16",
        ),
    ],
)
def test_vectors_that_cannot_be_stored_stop_the_run(
    folder: Path, reference: dict[str, bytes], option: str, message: str, workers: int
) -> None:
    """The text and the remedy are named, and what was finished is kept."""
    table = small_table()
    encoder = StubEncoder(workers=workers)
    setattr(encoder, option, frozenset([texts_of(table, "response")[6]]))
    with pytest.raises(NumericsError, match=message):
        run(folder / "cache", table, encoder)
    sealed = {name: content for name, content in contents(folder / "cache").items() if name.endswith(".h5")}
    assert len(sealed) >= 3
    assert sealed.items() <= reference.items()
    resumed = StubEncoder()
    run(folder / "cache", table, resumed)
    assert sum(resumed.batches) < 13
    assert differing(contents(folder / "cache"), reference) == []


@pytest.mark.parametrize(
    ("compute", "remedy"), [("float16", "--compute-dtype bfloat16 or float32"), ("bfloat16", "--compute-dtype float32")]
)
def test_the_remedy_fits_the_computation(folder: Path, compute: str, remedy: str) -> None:
    """What is advised is not what was done."""
    table = small_table()
    encoder = StubEncoder(nan_on=frozenset(texts_of(table, "prompt")), compute_dtype=compute)
    with pytest.raises(NumericsError, match=remedy):
        run(folder, table, encoder)


def test_huge_values_fit_bfloat16(folder: Path) -> None:
    """The advice helps."""
    table = small_table()
    encoder = StubEncoder(huge_on=frozenset(texts_of(table, "response")[:3]))
    run(folder, table, encoder, EmbedConfig(dtype="bfloat16"))
    assert float(space_of(folder, "response").tensor().float().abs().max()) > 65_504


@pytest.mark.parametrize("call", [1, 2, 5, 8])
def test_a_full_disk_is_one_sentence_and_loses_nothing(
    folder: Path, reference: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """Whichever reservation fails, the run says so, leaves no half file, and goes on when there is space."""
    calls = 0
    reserve = os.posix_fallocate

    def full(descriptor: int, offset: int, length: int) -> None:
        nonlocal calls
        calls += 1
        if calls >= call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        reserve(descriptor, offset, length)

    with monkeypatch.context() as patch:
        patch.setattr("os.posix_fallocate", full)
        with pytest.raises(StorageError, match=r"The disk is full while writing .*; free some space and run the same"):
            run(folder / "cache")
    assert not [name for name in leftovers(folder / "cache") if name.endswith(".tmp")]
    run(folder / "cache")
    assert differing(contents(folder / "cache"), reference) == []


@pytest.mark.parametrize("limit", [2_000, 100_000])
def test_a_limit_on_file_sizes_is_one_sentence(folder: Path, reference: dict[str, bytes], limit: int) -> None:
    """A quota that cuts files short is found before anything is written through a map, where it would kill."""
    path = folder / "cache"
    assert finish(start(embed_limited, path, small_table(), StubEncoder(), CONFIG, limit)) == 1
    assert path.with_suffix(".error").read_text().startswith("StorageError: The disk is full while writing")
    run(path)
    assert differing(contents(path), reference) == []


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
