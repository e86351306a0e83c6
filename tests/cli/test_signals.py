"""Ctrl-C and SIGTERM stop the real command cleanly, and the same command goes on."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Invoke
from tests.worlds import make_cache, planted_rows

Start = Callable[..., subprocess.Popen[str]]
TIMEOUT = 120


def wait_for(process: subprocess.Popen[str], path: Path, pattern: str) -> None:
    """Wait until a process has made a file."""
    end = time.monotonic() + TIMEOUT
    while not list(path.glob(pattern)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


def stop(process: subprocess.Popen[str], number: signal.Signals) -> tuple[int, str, str]:
    process.send_signal(number)
    out, err = process.communicate(timeout=TIMEOUT)
    return process.returncode, out, err


@pytest.mark.usefixtures("sample_cache")
def test_embed_stops_on_sigterm_and_goes_on(start: Start, invoke: Invoke, tmp_path: Path) -> None:
    """Small batches and small shards: the first one is being filled while most texts are still to come."""
    table, cache = tmp_path / "table.jsonl", tmp_path / "cache"
    with table.open("w") as file:
        for i in range(120):
            row = {
                "user_id": "a",
                "prompt": "the prompt",
                "response_1": f"{i} " + "word " * 40,
                "response_2": f"{i}",
                "y": 1,
            }
            file.write(json.dumps({**row, "split": "train"}) + "\n")
    command = ("embed", table, "--cache", cache, "--token-budget", 256, "--shard-rows", 40, "--json")
    process = start(*command)
    wait_for(process, cache, "spaces/*/shards/*.partial")
    code, out, err = stop(process, signal.SIGTERM)
    assert (code, out) == (143, "")
    assert "Stopped; what was finished is kept." in err
    assert "Traceback" not in err
    assert not list(cache.glob("comparisons/*.h5"))
    again = invoke(*command)
    assert again.exit_code == 0, again.stderr
    assert json.loads(again.stdout)["distinct"] == {"prompt": 1, "response": 240}
    assert not list(cache.glob("spaces/*/shards/*.partial"))
    assert not list(cache.glob("spaces/*/shards/*.claim"))
    assert invoke("cache", "verify", cache).exit_code == 0


def test_train_head_stops_on_ctrl_c_and_says_how_to_go_on(start: Start, invoke: Invoke, tmp_path: Path) -> None:
    cache, run, options = make_cache(tmp_path / "cache", *planted_rows()).path, tmp_path / "run", tmp_path / "long.toml"
    options.write_text("epochs = 20000\nevaluations = 20000\npatience = 0\np = 4\n")
    process = start("train-head", cache, "--run", run, "--config", options, "--device", "cpu", "--json")
    wait_for(process, run, "state.safetensors")
    code, out, err = stop(process, signal.SIGINT)
    assert (code, out) == (130, "")
    assert "train-head: with --resume" in err
    assert "Traceback" not in err
    assert sorted(path.name for path in run.iterdir()) == ["config.json", "state.safetensors"]
    evaluated = invoke("evaluate", run, "--cache", cache)
    assert evaluated.exit_code == 2
    assert "go on with palcache train-head" in evaluated.stderr
