"""The cache of answers on disk: whole chunks or none, never those of another stream, through damage and full disks."""

import errno
import json
import os
import shutil
from concurrent import futures

import numpy as np
import pytest

from deit import errors, workdir
from deit.teachers import cache, chunks, labels

POSITIONS = 8  # in a chunk
HARD = labels.Layout("hard", 300, 0, "float32")
SOFT = labels.Layout("soft", 300, 3, "float16")
FINGERPRINT = {"seed": 0, "data": "d" * 64, "augment.scale": (0.08, 1.0), "teacher": "t"}
CONDITIONS = {"global_batch": POSITIONS, "teacher.batch": 4, "teacher.precision": "float32", "device": "CPU x"}


def answers(update, layout=HARD):
    rng = np.random.default_rng(update)
    if layout.kind == "hard":
        return {"class": rng.integers(0, 300, [POSITIONS]).astype("i4")}
    return {
        "class": rng.integers(0, 300, [POSITIONS, 3]).astype("i4"),
        "logits": rng.normal(size=[POSITIONS, 4]).astype("f2"),
    }


def readable(update):
    return np.random.default_rng(update + 99).random(POSITIONS) > 0.2


def opened(directory, *, layout=HARD, reads=True, writes=True, allow_ties=False, fingerprint=FINGERPRINT, **conditions):
    found = cache.Cache(directory, fingerprint=fingerprint, conditions={**CONDITIONS, **conditions}, layout=layout)
    found.open(reads=reads, writes=writes, allow_ties=allow_ties)
    return found


def fill(found, updates, layout=HARD):
    for update in updates:
        found.write(update * POSITIONS, answers(update, layout), readable(update))


def holds(found, updates):
    return [found.holds(update * POSITIONS) for update in updates]


def file_of(directory, number=0):
    (path,) = directory.glob(f"*/answers-{number:08d}.npy")
    return path


@pytest.mark.parametrize("layout", [HARD, SOFT], ids=["hard", "soft"])
def test_what_was_written_is_read_by_another_process_in_any_order_bit_by_bit(tmp_path, layout):
    updates = [5, 0, 40, 33, 1]  # in two files
    fill(opened(tmp_path / "c", layout=layout), updates, layout)
    later = opened(tmp_path / "c", layout=layout, writes=False)
    for update in updates:
        found = later.read(update * POSITIONS, POSITIONS)
        assert found.own
        np.testing.assert_array_equal(found.readable, readable(update))
        for name, expected in answers(update, layout).items():
            assert found.answers[name].dtype == expected.dtype
            assert found.answers[name].tobytes() == expected.tobytes()
    assert holds(later, [2, 6, 32, 41, 1000]) == [False] * 5


def test_a_file_is_one_that_numpy_opens(tmp_path):
    fill(opened(tmp_path / "c"), [0, 3])
    array = np.load(file_of(tmp_path / "c"), mmap_mode="r")
    assert array.shape == (chunks.CHUNKS,)
    np.testing.assert_array_equal(array["class"][3], answers(3)["class"])
    assert array["class"].dtype == np.uint16  # 300 classes


def test_positions_are_read_across_chunks_and_from_the_middle_of_one(tmp_path):
    fill(opened(tmp_path / "c"), range(4))
    whole = np.concatenate([answers(update)["class"] for update in range(4)])
    bits = np.concatenate([readable(update) for update in range(4)])
    found = opened(tmp_path / "c").read(5, 20)
    np.testing.assert_array_equal(found.answers["class"], whole[5:25])
    np.testing.assert_array_equal(found.readable, bits[5:25])
    assert opened(tmp_path / "c").read(20, 20) is None  # update 4 is not there


def test_another_fingerprint_is_refused_with_the_fields_that_differ_and_touches_nothing(tmp_path):
    fill(opened(tmp_path / "c"), [0])
    before = {path: path.read_bytes() for path in (tmp_path / "c").rglob("*") if path.is_file()}
    other = {**FINGERPRINT, "seed": 1, "augment.scale": (0.2, 1.0), "augment.new": 3}
    for writes in (False, True):
        with pytest.raises(errors.UserError) as caught:
            opened(tmp_path / "c", fingerprint=other, writes=writes)
        assert "augment.new: absent -> 3; augment.scale: [0.08, 1] -> [0.2, 1]; seed: 0 -> 1" in str(caught.value)
        assert "data" not in str(caught.value), "what is equal is not listed"
    assert before == {path: path.read_bytes() for path in (tmp_path / "c").rglob("*") if path.is_file()}


def test_a_directory_that_is_no_cache_is_refused(tmp_path):
    with pytest.raises(errors.UserError, match=r"teacher.cache_dir \(.*none\) must hold a cache"):
        opened(tmp_path / "none", writes=False)
    assert not (tmp_path / "none").exists()
    (tmp_path / "photo.jpg").write_text("x")
    with pytest.raises(errors.UserError, match=r"must be empty, absent or a cache"):
        opened(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]
    with pytest.raises(errors.UserError, match=r"can't be written: Not a directory"):
        opened(tmp_path / "photo.jpg" / "c")
    opened(tmp_path / "c")
    for text in ('{"format"', "[]", '{"files": []}', '{"fingerprint": []}', "7"):
        (tmp_path / "c" / "manifest.json").write_text(text)
        with pytest.raises(errors.UserError, match=r"manifest.json is damaged"):
            opened(tmp_path / "c")


@pytest.mark.parametrize("name", ["manifest.json", "conditions.json"])
def test_a_directory_that_a_kill_or_a_full_disk_left_half_made_is_a_cache(tmp_path, monkeypatch, name):
    write = workdir.write

    def killed(path, data):
        if path.name == name:
            path.with_name(f"{path.name}.tmp-1").write_bytes(data[:9])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, data)

    monkeypatch.setattr(workdir, "write", killed)
    with pytest.raises(errors.UserError, match=r"can't be written: No space left"):
        opened(tmp_path / "c")
    monkeypatch.undo()
    fill(opened(tmp_path / "c"), [0])
    assert opened(tmp_path / "c", writes=False).holds(0)


def test_many_that_open_a_new_directory_at_once_share_it(tmp_path):
    def use(update):
        found = opened(tmp_path / str(update // 8))
        fill(found, [update])
        return found.disk_bytes() > 0

    with futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(use, range(64)))
    for directory in tmp_path.iterdir():
        found = opened(directory, writes=False)
        assert found.count(64)[0] == 8
        assert sorted(path.name for path in directory.iterdir())[-1] == "manifest.json"


def test_a_whole_number_is_one_however_it_was_typed(tmp_path):
    fill(opened(tmp_path / "c", fingerprint={"seed": 0, "range": (0.0, 1.0), "mean": (0.5, 0)}), [0])
    again = opened(tmp_path / "c", fingerprint={"seed": 0.0, "range": (0, 1), "mean": (0.5, 0.0)}, writes=False)
    assert again.holds(0)


def test_what_is_there_is_counted_up_to_the_end_of_the_schedule(tmp_path):
    fill(opened(tmp_path / "c"), [0, 1, 31, 32, 40, 70])
    assert opened(tmp_path / "c").count(41) == (5, 5)
    # An update of 16 positions needs two chunks of 8: the first has both, the 16th and 17th have one.
    assert opened(tmp_path / "c", allow_ties=True, global_batch=16).count(20) == (0, 1)


def flipped(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_damage_costs_the_chunk_that_it_touches_says_so_once_and_is_mended_by_writing(tmp_path, caplog):
    found = opened(tmp_path / "c")
    fill(found, range(3))
    flipped(file_of(tmp_path / "c"), -(chunks.CHUNKS - 1) * found.chunk_bytes() + 2)  # in chunk 1
    assert holds(found, range(3)) == holds(found, range(3)) == [True, False, True]
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("answers-00000000.npy, positions 8 to 15: its checksum is wrong")
    fill(found, [1])
    assert holds(found, range(3)) == [True] * 3


@pytest.mark.parametrize("kept", [0, 10, 300, -1])
def test_a_file_that_is_cut_short_loses_what_was_cut_and_is_mended_by_writing(tmp_path, kept):
    found = opened(tmp_path / "c")
    fill(found, range(chunks.CHUNKS))
    path = file_of(tmp_path / "c")
    whole = path.read_bytes()
    path.write_bytes(whole[:kept])
    header = len(whole) - chunks.CHUNKS * found.chunk_bytes()
    complete = max(0, (len(whole[:kept]) - header) // found.chunk_bytes())
    assert holds(found, range(chunks.CHUNKS)) == [i < complete for i in range(chunks.CHUNKS)]
    assert found.count(chunks.CHUNKS) == (complete, complete)
    fill(found, range(complete, chunks.CHUNKS))
    assert path.read_bytes() == whole


def test_chunks_are_not_taken_from_another_place_or_another_cache(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    fill(opened(first), range(chunks.CHUNKS + 1))
    fill(opened(second, fingerprint={**FINGERPRINT, "seed": 1}), [0])
    shutil.copy(file_of(first), file_of(second))
    assert not opened(second, fingerprint={**FINGERPRINT, "seed": 1}).holds(0)
    shutil.copy(file_of(first, 0), file_of(first, 1))
    assert not opened(first).holds(chunks.CHUNKS * POSITIONS)


def test_a_chunk_that_was_torn_in_the_middle_of_its_writing_is_absent(tmp_path, monkeypatch):
    found = opened(tmp_path / "c")
    fill(found, [0, 1])
    pwrite = os.pwrite

    def torn(handle, data, offset):
        if len(data) > found.chunk_bytes() // 2:
            return pwrite(handle, data[: len(data) // 2], offset)
        raise KeyboardInterrupt  # stands for the kill

    monkeypatch.setattr(os, "pwrite", torn)
    with pytest.raises(KeyboardInterrupt):
        fill(found, [2])
    monkeypatch.undo()
    assert holds(found, range(3)) == [True, True, False]


def test_a_full_disk_is_an_oserror_and_leaves_what_was_there(tmp_path, monkeypatch):
    found = opened(tmp_path / "c")
    fill(found, [0])

    def full(handle, data, offset):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"):
        fill(found, [1])
    monkeypatch.undo()
    assert holds(found, [0, 1]) == [True, False]


def test_shards_written_side_by_side_are_one_cache(tmp_path):
    first, second = opened(tmp_path / "a"), opened(tmp_path / "b")
    fill(first, range(0, 32))
    fill(second, range(32, 64))
    shutil.copy(file_of(tmp_path / "b", 1), file_of(tmp_path / "a", 0).with_name("answers-00000001.npy"))
    assert all(holds(opened(tmp_path / "a", writes=False), range(64)))


def test_answers_of_other_conditions_are_refused_by_name_and_taken_with_allow_ties(tmp_path):
    fill(opened(tmp_path / "c"), [0])
    with pytest.raises(errors.UserError) as caught:
        opened(tmp_path / "c", **{"teacher.batch": 2, "device": "GPU y"})
    assert "(device: CPU x -> GPU y; teacher.batch: 4 -> 2)" in str(caught.value)
    assert "teacher.allow_ties=True" in str(caught.value)
    tied = opened(tmp_path / "c", allow_ties=True, **{"teacher.batch": 2})
    assert not tied.read(0, POSITIONS).own
    fill(tied, [1])
    assert tied.read(POSITIONS, POSITIONS).own and not tied.read(0, POSITIONS).own
    exact = opened(tmp_path / "c")  # it has a set of its own, and sees no other
    assert holds(exact, [0, 1]) == [True, False]


def test_sets_of_other_conditions_are_counted_together(tmp_path):
    fill(opened(tmp_path / "c"), range(6))
    fill(opened(tmp_path / "c", allow_ties=True, device="GPU y"), range(4, 10))
    assert opened(tmp_path / "c").count(20) == (6, 6)
    assert opened(tmp_path / "c", allow_ties=True).count(20) == (6, 10)


def test_an_empty_set_of_one_s_own_does_not_hide_that_there_are_others(tmp_path):
    fill(opened(tmp_path / "c"), [0])
    opened(tmp_path / "c", reads=False, device="GPU y")
    with pytest.raises(errors.UserError, match=r"device: CPU x -> GPU y"):
        opened(tmp_path / "c", device="GPU y")


def test_another_global_batch_reads_by_position_with_allow_ties(tmp_path):
    fill(opened(tmp_path / "c"), range(3))
    tied = opened(tmp_path / "c", writes=False, allow_ties=True, global_batch=12)
    whole = np.concatenate([answers(update)["class"] for update in range(3)])
    np.testing.assert_array_equal(tied.read(12, 12).answers["class"], whole[12:24])


def test_only_whole_chunks_in_their_places_are_written(tmp_path):
    with pytest.raises(ValueError, match="are no chunk of 8"):
        opened(tmp_path / "c").write(4, answers(0), readable(0))


def test_the_report_is_given_back_for_the_same_question_only(tmp_path):
    arrays = {"labels": np.arange(5, dtype="i4"), "confidences": np.linspace(0, 1, 5, dtype="f4")}
    opened(tmp_path / "c").write_report({"data": "e", "size": (1, 2)}, arrays)
    found = opened(tmp_path / "c", writes=False)
    back = found.read_report({"size": [1, 2], "data": "e"})
    assert back.keys() == arrays.keys()
    assert all(back[name].tobytes() == arrays[name].tobytes() for name in arrays)
    assert found.read_report({"data": "f", "size": [1, 2]}) is None
    (path,) = (tmp_path / "c").glob("*/report.npz")
    whole = path.read_bytes()
    for place in range(0, len(whole), 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 8]) + whole[place + 1 :])
        back = found.read_report({"data": "e", "size": [1, 2]})
        assert back is None or all(back[name].tobytes() == arrays[name].tobytes() for name in arrays)
    path.write_bytes(whole[:-40])
    assert found.read_report({"data": "e", "size": [1, 2]}) is None


def test_sizes_count_what_is_on_the_disk_and_what_a_schedule_takes(tmp_path):
    found = opened(tmp_path / "c", layout=SOFT)
    fill(found, [0], SOFT)
    assert found.chunk_bytes() == POSITIONS * (3 * 2 + 4 * 2) + 1 + 16
    on_disk = sum(path.stat().st_blocks * 512 for path in (tmp_path / "c").rglob("*") if path.is_file())
    assert found.disk_bytes() == on_disk > 0


def test_the_manifest_holds_the_fingerprint_and_each_set_its_conditions(tmp_path):
    opened(tmp_path / "c")
    manifest = json.loads((tmp_path / "c" / "manifest.json").read_text())
    assert manifest["fingerprint"] == {**FINGERPRINT, "augment.scale": [0.08, 1.0]}
    (conditions,) = (tmp_path / "c").glob("*/conditions.json")
    assert json.loads(conditions.read_text()) == CONDITIONS
