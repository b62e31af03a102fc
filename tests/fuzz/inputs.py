"""Files of any content for everything that reads a user's file: data, settings, checkpoints.

    python -m tests.fuzz.inputs --count 50000 --seed 0

Each input is a valid file, a valid one that was damaged, or made up. What may come back is a result
or the one kind of error that the user is shown in a line. Anything else, an input that takes
longer than LIMIT seconds, and a change to any file beside the input end the run with the input that
did it, made as small as it gets.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import logging
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from hydra_rlhf import cli
from hydra_rlhf.checkpoint import (
    CheckpointError,
    CheckpointStore,
    load_state,
    save_state,
    verify,
)
from hydra_rlhf.config import PPOConfig
from hydra_rlhf.data.loading import iter_preferences, iter_prompts, iter_sft
from hydra_rlhf.errors import UserError

LIMIT = 30  # seconds for one input: for a hang, not for speed, on a machine that is busy
SHARES = {"data": 0.6, "manifest": 0.2, "state": 0.1, "config": 0.1}

_TURNS = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Yes?"}]
_ROWS = [
    {"prompt": "Why?", "chosen": " So.", "rejected": " No."},
    {"prompt": "Why?", "completion": " So."},
    {"prompt": _TURNS[:1], "chosen": _TURNS[1:], "rejected": _TURNS[1:]},
    {"messages": _TURNS},
    {"text": "Once."},
    {"chosen": "\n\nHuman: Hi.\n\nAssistant: A", "rejected": "\n\nHuman: Hi.\n\nAssistant: B"},
    {"prompt": "../../outside", "path": "../../../etc/passwd", "file_name": "/tmp/x"},
]

_leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(["../outside", "/etc/passwd", "user", "assistant", "prompt", "\x00", "𝕏"]),
)
_values = st.recursive(
    _leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["role", "content", "prompt", "chosen", "text", "x"]), inner, max_size=3
        ),
    ),
    max_leaves=6,
)
_columns = st.sampled_from(
    ["prompt", "chosen", "rejected", "completion", "messages", "text", "margin", "score", "x"]
)
_rows = st.one_of(
    st.sampled_from(_ROWS),
    st.dictionaries(_columns, _values, max_size=4),
    st.builds(
        lambda row, more: {**row, **more},
        st.sampled_from(_ROWS),
        st.dictionaries(_columns, _values, max_size=2),
    ),
    _values,
)


@st.composite
def damaged(draw, content: st.SearchStrategy[bytes]) -> bytes:
    """Mostly as it is; else cut short, with bytes put in, or with bits turned over."""
    found = draw(content)
    kind = draw(st.sampled_from(["whole", "whole", "cut", "insert", "flip"]))
    if kind == "whole" or not found:
        return found
    at = draw(st.integers(0, len(found) - 1))
    if kind == "cut":
        return found[:at]
    if kind == "insert":
        return found[:at] + draw(st.binary(min_size=1, max_size=8)) + found[at:]
    return found[:at] + bytes([found[at] ^ draw(st.integers(1, 255))]) + found[at + 1 :]


def _json_lines(rows: list) -> bytes:
    return "\n".join(json.dumps(row) for row in rows).encode("utf-8", "surrogatepass")


def _csv(cells: list[list[str]]) -> bytes:
    return "\n".join(",".join(line) for line in cells).encode("utf-8", "surrogatepass")


_cells = st.lists(
    st.lists(
        st.one_of(_columns, st.sampled_from(['"a, b"', '"', "", '"x""y"']), st.text(max_size=6)),
        min_size=1,
        max_size=4,
    ),
    max_size=4,
)
_lines = st.lists(_rows, max_size=4)
data_files = st.one_of(
    st.tuples(st.just("f.jsonl"), damaged(_lines.map(_json_lines))),
    st.tuples(st.just("f.json"), damaged(_lines.map(lambda rows: json.dumps(rows).encode()))),
    st.tuples(st.sampled_from(["f.csv", "f.tsv"]), damaged(_cells.map(_csv))),
    st.tuples(st.just("f.jsonl.gz"), damaged(_lines.map(_json_lines).map(gzip.compress))),
    st.tuples(
        st.sampled_from(["f.jsonl", "f.json", "f.csv", "f.parquet", "f.json.gz", "f"]),
        st.binary(max_size=64),
    ),
)

_names = st.one_of(
    st.sampled_from(
        ["method", "learning_rate", "lora-r", "max_steps", "ppo", "seed", "top_p", "gradient"]
    ),
    st.text(max_size=8),
)
_settings = st.dictionaries(_names, _values, max_size=4)
config_files = st.one_of(
    st.tuples(
        st.just("c.yaml"),
        damaged(
            _settings.map(
                lambda s: yaml.safe_dump(s, allow_unicode=True).encode("utf-8", "replace")
            )
        ),
    ),
    st.tuples(st.just("c.json"), damaged(_settings.map(lambda s: json.dumps(s).encode()))),
    st.tuples(st.sampled_from(["c.yaml", "c.json"]), st.binary(max_size=48)),
)

_FILES = {"a.bin": b"abc", "sub/b.bin": b"", "state.pt": b""}
_entry = st.one_of(
    st.fixed_dictionaries({"size": st.integers(-1, 9) | _leaves, "sha256": st.text(max_size=4)}),
    _values,
)
manifests = st.one_of(
    damaged(st.just(b"VALID")),
    damaged(
        st.fixed_dictionaries(
            {"format": st.sampled_from([1, 2, "1", None])},
            optional={
                "step": _leaves,
                "files": _values
                | st.dictionaries(
                    st.sampled_from([*_FILES, "../outside", "/etc/passwd", "", "\x00"]), _entry
                ),
            },
        ).map(lambda m: json.dumps(m).encode())
    ),
    st.binary(max_size=48),
)


@contextlib.contextmanager
def no_hang():
    def stop(number, frame):
        raise AssertionError(f"still busy after {LIMIT} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, LIMIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def told(error: Exception) -> None:
    """An error for the user is one sentence, of any use, without a traceback in it."""
    text = str(error)
    assert text.strip() and "Traceback" not in text


class Targets:
    """The readers, each over a file in ``inside``; ``outside`` must stay as it is."""

    def __init__(self, folder: Path):
        self.inside, self.outside = folder / "inside", folder / "outside"
        self.inside.mkdir()
        self.outside.mkdir()
        (self.outside / "kept").write_text("as it was")
        self.checkpoints = CheckpointStore(self.inside / "checkpoints")
        self.checkpoint = self.checkpoints.save(1, self._fill)
        self.manifest = (self.checkpoint / "manifest.json").read_bytes()
        self.whole_state = (self.checkpoint / "state.pt").read_bytes()
        self.counts = dict.fromkeys(SHARES, 0)

    @staticmethod
    def _fill(folder: Path) -> None:
        (folder / "sub").mkdir()
        for name, content in _FILES.items():
            (folder / name).write_bytes(content)
        save_state(folder, {"step": 1, "config": {"seed": 0}})

    def data(self, file: tuple[str, bytes]) -> None:
        path = self.inside / file[0]
        path.write_bytes(file[1])
        for read in (iter_preferences, iter_sft, iter_prompts):
            try:
                list(read(path))
            except UserError as error:
                told(error)
        path.unlink()

    def config(self, file: tuple[str, bytes]) -> None:
        path = self.inside / file[0]
        path.write_bytes(file[1])
        try:
            (config,) = cli.parse("ppo", "train", [PPOConfig], ["--config", str(path)])
            config.validate()
        except UserError as error:
            told(error)
        path.unlink()

    def manifest_(self, content: bytes) -> None:
        (self.checkpoint / "manifest.json").write_bytes(content.replace(b"VALID", self.manifest))
        try:
            verify(self.checkpoint)
        except CheckpointError as error:
            told(error)
        try:
            found = self.checkpoints.latest()
        except UserError as error:
            told(error)
        else:
            # Only what says the same in other bytes, white space for instance, is as good.
            now = json.loads((self.checkpoint / "manifest.json").read_bytes())
            was = json.loads(self.manifest)
            assert found is not None and now["files"] == was["files"] and now["step"] == 1

    def state(self, content: bytes) -> None:
        (self.checkpoint / "state.pt").write_bytes(content)
        try:
            load_state(self.checkpoint)
        except CheckpointError as error:
            told(error)

    def unchanged(self) -> None:
        assert [p.name for p in self.outside.iterdir()] == ["kept"]
        assert (self.outside / "kept").read_text() == "as it was"
        assert sorted(p.name for p in self.inside.parent.iterdir()) == ["inside", "outside"]
        assert sorted(p.name for p in self.inside.iterdir()) == ["checkpoints"]
        assert [p.name for p in (self.inside / "checkpoints").iterdir()] == ["step-00000001"]

    def all(self) -> dict[str, tuple[st.SearchStrategy, Callable]]:
        return {
            "data": (data_files, self.data),
            "manifest": (manifests, self.manifest_),
            "state": (damaged(st.just(self.whole_state)), self.state),
            "config": (config_files, self.config),
        }


def fuzz(count: int, number: int) -> dict[str, int]:
    """Runs ``count`` inputs or a few more; how many each reader got."""
    logging.getLogger("hydra_rlhf").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        targets = Targets(Path(folder))
        for name, (strategy, read) in targets.all().items():
            wanted = max(1, round(count * SHARES[name]))

            @seed(number)
            @settings(
                max_examples=wanted,
                database=None,
                deadline=None,
                suppress_health_check=list(HealthCheck),
                phases=(Phase.generate, Phase.shrink),
            )
            @given(found=strategy)
            def one(found, *, name, read):
                with no_hang():
                    read(found)
                targets.counts[name] += 1

            one(name=name, read=read)
            (targets.checkpoint / "manifest.json").write_bytes(targets.manifest)
            targets.unchanged()
        return targets.counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=0)
    given_ = parser.parse_args()
    started = time.perf_counter()
    counts = fuzz(given_.count, given_.seed)
    shown = ", ".join(f"{n:,} {name}" for name, n in counts.items())
    print(f"{sum(counts.values()):,} inputs in {time.perf_counter() - started:.0f} s: {shown}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
