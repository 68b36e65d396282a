"""A damaged result in the cache is made again, with a warning, and never used."""

import json
import os
import stat
from pathlib import Path

import pytest

from helpers.damage import DAMAGES, files
from helpers.forking import Forked, run
from lisa_lightning.runtime.cache import RECORD, build_once
from lisa_lightning.runtime.ranks import OneRank

CONTENT = {
    "adapter/model.safetensors": bytes(range(256)) * 8,
    "stage.json": b'{"seconds": 1.5}',
    "curves.csv": b"a,b\n1,2\n",
}


def make(folder: Path) -> None:
    (folder / "adapter").mkdir()
    for name, content in CONTENT.items():
        (folder / name).write_bytes(content)


@pytest.mark.parametrize("name", [*CONTENT, RECORD])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, damage: str
) -> None:
    folder = build_once(OneRank(), tmp_path, {"key": 1}, make)
    DAMAGES[damage](folder / name)
    again: list[Path] = []
    assert build_once(OneRank(), tmp_path, {"key": 1}, lambda out: [make(out), again.append(out)][0]) == folder
    harmless = name == RECORD and {file: (folder / file).read_bytes() for file in CONTENT} == CONTENT and not again
    assert again or harmless
    assert ("is damaged (" in caplog.text) == bool(again)
    assert {file: (folder / file).read_bytes() for file in CONTENT} == CONTENT
    assert not list(tmp_path.glob("*.part-*"))


def test_only_a_bit_outside_the_list_of_files_may_go_unnoticed(tmp_path: Path) -> None:
    """A flipped bit of the record has the folder made again, or leaves all hashes unchanged."""
    folder = build_once(OneRank(), tmp_path, {"key": "k" * 40}, make)
    record = (folder / RECORD).read_bytes()
    for place in range(0, len(record), 7):
        flipped = bytearray(record)
        flipped[place] ^= 1
        (folder / RECORD).write_bytes(flipped)
        again: list[Path] = []
        build_once(OneRank(), tmp_path, {"key": "k" * 40}, lambda out, again=again: [make(out), again.append(out)][0])
        assert again or json.loads(flipped)["files"] == json.loads(record)["files"]
        (folder / RECORD).write_bytes(record)


def test_a_file_that_was_added_counts_as_damage_unless_it_is_hidden(tmp_path: Path) -> None:
    folder = build_once(OneRank(), tmp_path, {}, make)
    (folder / ".DS_Store").write_bytes(b"x")
    assert build_once(OneRank(), tmp_path, {}, lambda _: pytest.fail("made again")) == folder
    (folder / "adapter_config.json").write_text("{}")  # transformers would apply the adapter
    build_once(OneRank(), tmp_path, {}, make)
    assert {file.relative_to(folder).as_posix() for file in files(folder)} == {*CONTENT, RECORD}


@pytest.mark.parametrize("mask", [0o077, 0o027, 0o002])
def test_the_cache_respects_the_umask(tmp_path: Path, mask: int) -> None:
    def guarded(folder: Path) -> None:
        make(folder)
        (folder / "stage.json").chmod(0o600)  # as safetensors leaves its files

    before = os.umask(mask)
    try:
        folder = build_once(OneRank(), tmp_path / "cache", {}, guarded)
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (folder, folder / "adapter", *files(folder))}
    assert {mode & ~0o111 for mode in modes.values()} == {0o666 & ~mask}
    assert modes[folder] == 0o777 & ~mask


@pytest.mark.slow
def test_a_run_over_damaged_stages_gives_what_a_run_without_them_gives(forked: Forked, tmp_path: Path) -> None:
    """A whole command over damaged models and files of every stage, all at once, gives the results of one without."""
    short = ("experiment=smoke", "optim.steps=8", "align.optim.steps=2", "evaluate.every=4", "repair=antidote")
    assert run(forked, tmp_path, *short, "hydra.run.dir=one").returncode == 0
    results = ("adapter/adapter_model.safetensors", "responses.jsonl", "judged.jsonl")
    one = {name: (tmp_path / "one" / name).read_bytes() for name in results}
    stages = [f for f in files(tmp_path / "cache") if f.suffix in (".safetensors", ".json", ".csv", ".jsonl")]
    assert len(stages) > 15
    for number, file in enumerate(stages):
        DAMAGES[[*DAMAGES][number % len(DAMAGES)]](file)
    done = run(forked, tmp_path, *short, "hydra.run.dir=two")
    assert done.returncode == 0, done.stderr
    assert "is damaged (" in done.stdout
    assert one == {name: (tmp_path / "two" / name).read_bytes() for name in results}
