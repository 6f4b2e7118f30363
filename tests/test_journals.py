"""Work in shares: whole after any kill, done once, told apart by what made it, merged in the order of the items."""

import json

import pytest

from unmask.data import journals
from unmask.data.journals import Journal, ShareError, gather, healed, in_turn, name_shards

NAMES = [f"item {i}" for i in range(8)]
KEYS = [(name, f"{100 + i}") for i, name in enumerate(NAMES)]


def do(folder, shard=(0, 1), stop=None, keys=KEYS, stamp="made by a"):
    """Do a share, or stop before its row number `stop` as an exception would; returns the rows that were added."""
    mine, added = keys[shard[0] :: shard[1]], []
    with Journal(folder, shard, stamp) as journal:
        for k in range(journal.resume(mine), len(mine)):
            if k == stop:
                return added
            journal.add([(mine[k], {"name": mine[k][0], "half": k / 2})])
            added.append(mine[k][0])
        journal.finish()
    return added


def names(folder, of, keys=KEYS, stamp="made by a"):
    rows, to_do = gather(folder, of, stamp, iter(keys))
    assert not (rows and to_do)
    return [row["name"] for row in rows], to_do


@pytest.mark.parametrize("of", [1, 2, 3, 8, 11])
@pytest.mark.parametrize("slab", [1, 1000])
def test_shares_together_are_the_whole_in_order(tmp_path, monkeypatch, of, slab):
    monkeypatch.setattr(journals, "SLAB", slab)
    for i in reversed(range(of)):
        assert i in names(tmp_path, of)[1]
        do(tmp_path, (i, of))
    assert names(tmp_path, of) == (NAMES, [])


@pytest.mark.parametrize("stop", range(8))
@pytest.mark.parametrize("damage", ["none", "torn", "half a line more", "zeros", "head lost"])
def test_a_killed_share_goes_on_and_ends_with_the_same_bytes(tmp_path, stop, damage):
    do(tmp_path / "whole")
    do(tmp_path / "cut", stop=stop)
    part = tmp_path / "cut" / "00000-of-00001.jsonl.part"
    data = part.read_bytes()
    left = {"none": data, "torn": data[:-3], "half a line more": data + b'{"key', "zeros": data + b"\0\0\n[]\n"}
    part.write_bytes(left.get(damage, b'{"sta'))
    again = len(NAMES) if damage == "head lost" else len(NAMES) - stop + (damage == "torn" and stop > 0)
    assert names(tmp_path / "cut", 1) == ([], [0])
    assert len(do(tmp_path / "cut")) == again
    assert not part.exists()
    whole, cut = ((tmp_path / x / "00000-of-00001.jsonl").read_bytes() for x in ("whole", "cut"))
    assert whole == cut


def test_a_complete_share_is_left_alone_and_what_changed_is_done_again(tmp_path):
    do(tmp_path)
    before = (tmp_path / "00000-of-00001.jsonl").stat().st_mtime_ns
    assert do(tmp_path) == [] and (tmp_path / "00000-of-00001.jsonl").stat().st_mtime_ns == before
    changed = [*KEYS[:5], ("item 5", "another size"), *KEYS[6:]]
    assert do(tmp_path, keys=changed) == NAMES[5:]
    assert do(tmp_path, keys=changed[:6]) == [] and names(tmp_path, 1, changed[:6]) == (NAMES[:6], [])
    assert do(tmp_path, keys=changed, stamp="made by b") == NAMES


def test_shares_made_by_something_else_or_of_other_items_are_to_do(tmp_path):
    do(tmp_path, (0, 2))
    do(tmp_path, (1, 2), stamp="made by b")
    assert names(tmp_path, 2) == ([], [1]) and names(tmp_path, 2, stamp="made by b") == ([], [0])
    do(tmp_path, (1, 2))
    assert names(tmp_path, 2) == (NAMES, [])
    assert names(tmp_path, 2, KEYS[:-1]) == ([], [1]) and names(tmp_path, 2, [*KEYS, ("new", "")]) == ([], [0])
    assert names(tmp_path, 2, [KEYS[1], KEYS[0], *KEYS[2:]]) == ([], [0, 1])


def test_a_share_whose_item_has_changed_is_to_do(tmp_path):
    for i in range(2):
        do(tmp_path, (i, 2))
    changed = [*KEYS[:5], ("item 5", "another size"), *KEYS[6:]]
    assert names(tmp_path, 2, changed) == ([], [1])
    assert do(tmp_path, (1, 2), keys=changed) == ["item 5", "item 7"] and names(tmp_path, 2, changed) == (NAMES, [])


@pytest.mark.parametrize("emptied", range(3))
def test_an_emptied_journal_accuses_no_other(tmp_path, emptied):
    for i in range(3):
        do(tmp_path, (i, 3))
    (tmp_path / f"0000{emptied}-of-00003.jsonl").write_bytes(b"")
    assert names(tmp_path, 3) == ([], [emptied])
    assert len(do(tmp_path, (emptied, 3))) in (2, 3) and names(tmp_path, 3) == (NAMES, [])
    do(tmp_path / "none", (1, 2), keys=KEYS[:1])  # a share without items has a head all the same
    do(tmp_path / "none", (0, 2), keys=KEYS[:1])
    (tmp_path / "none" / "00001-of-00002.jsonl").write_bytes(b"")
    assert names(tmp_path / "none", 2, KEYS[:1]) == ([], [1])


def test_what_has_healed_is_found_by_trying_and_done_again(tmp_path):
    def found(reasons, new):
        tried = []
        return healed(reasons, {"killed"}, lambda some: (tried.append(i) or new[i] for i in some)), tried

    reasons = ["", "killed", "no video", "killed", "killed"]
    assert found(reasons, {1: "killed", 3: "", 4: ""}) == (3, [1, 3]), "later ones are done again anyway"
    assert found(reasons, {1: "killed", 3: "killed", 4: "killed"}) == (None, [1, 3, 4])
    assert found(reasons, {1: "no video"}) == (1, [1]) and found(["", "no video"], {}) == (None, [])
    do(tmp_path)
    with Journal(tmp_path, (0, 1), "made by a") as journal:
        assert [row["name"] for row in journal.kept(KEYS)] == NAMES
        assert [row["name"] for row in journal.kept([*KEYS[:2], ("x", "")])] == NAMES[:2]
        assert journal.resume(KEYS, 3) == 3
    assert names(tmp_path, 1) == ([], [0]) and do(tmp_path) == NAMES[3:]
    with Journal(tmp_path, (0, 1), "made by b") as journal:
        assert list(journal.kept(KEYS)) == []


def test_a_lock_that_was_deleted_meanwhile_keeps_nobody_out_and_is_not_used(tmp_path, monkeypatch):
    lock, real = tmp_path / "00000-of-00001.lock", journals.fcntl.flock
    monkeypatch.setattr(journals.fcntl, "flock", lambda *given: (
        lock.unlink(), monkeypatch.setattr(journals.fcntl, "flock", real), real(*given)))  # fmt: skip
    with Journal(tmp_path, (0, 1), ""), pytest.raises(ShareError):
        Journal(tmp_path, (0, 1), "")


def test_one_writer_per_share(tmp_path):
    with Journal(tmp_path, (1, 4), ""), pytest.raises(ShareError, match="doing shard 1/4 of"):
        Journal(tmp_path, (1, 4), "")
    with Journal(tmp_path, (1, 4), ""), Journal(tmp_path, (2, 4), ""):
        pass


def test_lines_come_in_turn(tmp_path):
    for i, count in enumerate((3, 1, 2)):
        (tmp_path / str(i)).write_text("".join(json.dumps({"n": n}) + "\n" for n in range(count)))
    found = [(i, line["n"]) for i, line in in_turn([tmp_path / str(i) for i in range(3)])]
    assert found == [(0, 0), (1, 0), (2, 0), (0, 1), (2, 1), (0, 2)]


def test_names_of_shards():
    assert name_shards([3], 16) == "shard 3/16" and name_shards([0, 2], 4) == "shard 0/4, 2/4"
    assert name_shards(range(20), 32).endswith("7/32 and 12 more")
