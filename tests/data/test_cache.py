"""A cached data set reads what the data set reads, bit for bit, whoever fills the cache, whatever stops them."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fcn.config import Config, Data
from fcn.config.keys import Model, Train
from fcn.data import (
    CachedDataset,
    RankBatch,
    RankBatches,
    SampleRef,
    TrainTransform,
    build_dataset,
    cache,
    cache_files,
    with_cache,
)
from fcn.data.cache import cache_folder, fingerprint
from fcn.data.cache_files import create, memory_room
from fcn.data.datasets import OwnDataset
from fcn.errors import InputError
from tests.checkpoints.test_saver import mounted


def shapes(root: Path, **keys):
    return build_dataset(Data(name="shapes", root=str(root)), "train", **keys)


def opened(dataset, folder: Path, **keys) -> CachedDataset:
    cached = CachedDataset(dataset, folder / fingerprint(dataset), **keys)
    cached.open()
    assert cached.problem is None
    return cached


def config(root: Path, run_dir: Path, **keys) -> Config:
    data = Data(name="shapes", root=str(root), **keys)
    return Config(run_dir=str(run_dir), data=data, model=Model(name="unet"), train=Train(batch_size=4, steps=1))


def assert_reads_as(cached: CachedDataset, plain) -> None:
    assert (len(cached), cached.classes) == (len(plain), plain.classes)
    for index in range(len(plain)):
        assert (cached.name(index), cached.size(index)) == (plain.name(index), plain.size(index))
        for one, other in zip(cached.read(index), plain.read(index)):
            assert (one.mode, one.size) == (other.mode, other.size)
            assert np.array_equal(one, other)


@pytest.fixture
def copied(shapes_root, tmp_path) -> Path:
    """A copy of the data set that a test may break."""
    return shutil.copytree(shapes_root, tmp_path / "shapes")


# --- equal bits ----------------------------------------------------------------------------------------------------


def check_real_files(plain, folder: Path) -> None:
    cached = opened(plain, folder)
    assert cached.images == 0
    assert_reads_as(cached, plain)
    assert cached.images == len(plain)
    samples = [plain.read(index) for index in range(len(plain))]
    rng = random.Random(0)
    for _ in range(500):
        index = rng.randrange(len(plain))
        height, width = plain.size(index)
        top, left = rng.randrange(height), rng.randrange(width)
        window = np.s_[top : rng.randint(top, height), left : rng.randint(left, width)]
        for one, other in zip(cached.read_arrays(index), samples[index]):
            assert np.array_equal(one[window], np.asarray(other)[window])
    assert_reads_as(cached, plain)


def test_shapes_are_read_bit_for_bit(shapes_root, tmp_path):
    check_real_files(shapes(shapes_root), tmp_path)


def test_real_voc_is_read_bit_for_bit(voc_root, tmp_path):
    whole = build_dataset(Data(name="voc", root=str(voc_root)), "train")
    some = build_dataset(Data(name="voc", root=str(voc_root)), "train", pairs=whole.pairs[:12])
    check_real_files(some, tmp_path)


def test_what_is_cached_is_not_read_from_its_file_again(copied, tmp_path):
    plain = shapes(copied)
    cached = opened(plain, tmp_path / "cache")
    before = [cached.read(index) for index in range(len(plain))]
    for image, mask in plain.pairs:
        image.unlink()
        mask.unlink()
    worker = pickle.loads(pickle.dumps(cached))  # as a loader's worker gets it
    for one in (cached, worker):
        for index, (image, labels) in enumerate(before):
            arrays = one.read_arrays(index)
            assert not any(array.flags.owndata or array.flags.writeable for array in arrays)
            assert np.array_equal(arrays[0], image)
            assert np.array_equal(arrays[1], labels)
            assert one.size(index) == arrays[1].shape


@pytest.mark.parametrize("crop", [(48, 48), None], ids=["crop", "whole"])
def test_training_gets_the_same_batches(shapes_root, tmp_path, crop):
    plain = shapes(shapes_root)
    cached, transform = opened(plain, tmp_path), TrainTransform(crop, (0.5, 2.0), 0.5, (0.2, 0.2, 0.2, 0.1))
    draws = [SampleRef(0, index) for index in range(6)]
    for _ in range(2):
        one, other = (RankBatches(dataset, transform, 0)[RankBatch(0, draws, draws)] for dataset in (plain, cached))
        assert all(np.array_equal(a, b) for a, b in zip(one.batch, other.batch))


# --- a changed data set has another cache --------------------------------------------------------------------------


def test_the_fingerprint_follows_the_files(copied):
    known = {fingerprint(shapes(copied))}
    assert fingerprint(shapes(copied)) in known
    image, mask = shapes(copied).pairs[3]
    changes = [
        lambda: os.utime(image, ns=(0, 1)),
        lambda: os.utime(mask, ns=(0, 1)),
        lambda: image.write_bytes(image.read_bytes() + b"\0") and os.utime(image, ns=(0, 1)),
        lambda: (copied / "ImageSets/Segmentation/train.txt").write_text(f"{image.stem}\n"),
    ]
    for change in changes:
        change()
        known.add(fingerprint(shapes(copied)))
    known.add(fingerprint(shapes(copied, ignore_index=2)))
    known.add(fingerprint(build_dataset(config(copied, Path(), exif_orientation=False).data, "train")))
    assert len(known) == 3 + len(changes)


def test_a_changed_mask_is_read_anew(copied, tmp_path):
    assert_reads_as(opened(shapes(copied), tmp_path / "cache"), shapes(copied))
    mask = shapes(copied).pairs[0][1]
    Image.open(mask).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(mask)
    again = opened(shapes(copied), tmp_path / "cache")
    assert again.images == 0
    assert_reads_as(again, shapes(copied))


# --- many at once, and their deaths --------------------------------------------------------------------------------


def run_a_job(root: Path, folder: Path, started) -> None:
    """In a process of its own: make the cache, and let two workers read every image."""
    started.wait(60)
    cached = pickle.dumps(opened(shapes(root), folder))
    workers = [multiprocessing.get_context("fork").Process(target=read_all, args=(cached, n)) for n in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0


def read_all(pickled: bytes, seed: int) -> None:
    """In a worker: in orders of its own."""
    cached, rng = pickle.loads(pickled), random.Random(seed)
    for _ in range(2):
        for index in rng.sample(range(len(cached)), len(cached)):
            cached.read_arrays(index)


def stop_while_writing(root: Path, folder: Path, what: str) -> None:
    """In a process of its own: reach the middle of what is written for the sample 5, and stay there."""
    write, record = cache_files._write_all, 8

    def stuck(file: int, data: memoryview, at: int) -> None:
        if cached.images == 5 and (data.nbytes == record) == (what == "record"):
            write(file, data[: 0 if what == "record" else len(data) // 2], at)
            os.kill(os.getpid(), signal.SIGKILL)
        write(file, data, at)

    cache_files._write_all = stuck
    cached = opened(shapes(root), folder)
    for index in range(len(cached)):
        cached.read_arrays(index)


def start(function, *arguments) -> multiprocessing.Process:
    process = FORKSERVER.Process(target=function, args=arguments)
    process.start()
    return process


FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["fcn.training.loop", "tests.data.test_cache"])


def test_two_jobs_with_workers_fill_it_at_once(shapes_root, tmp_path):
    started = FORKSERVER.Barrier(2)
    jobs = [start(run_a_job, shapes_root, tmp_path, started) for _ in range(2)]
    for job in jobs:
        job.join(60)
        assert job.exitcode == 0
    cached = opened(shapes(shapes_root), tmp_path)
    assert cached.images == len(cached) == 24
    assert_reads_as(cached, shapes(shapes_root))
    assert [path.name for path in tmp_path.iterdir()] == [cached.path.name]


@pytest.mark.parametrize("what", ["pixels", "record"])
def test_a_process_killed_while_it_writes_leaves_a_sound_cache(shapes_root, tmp_path, what):
    process = start(stop_while_writing, shapes_root, tmp_path, what)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    cached = opened(shapes(shapes_root), tmp_path)
    assert cached.images == 5
    assert_reads_as(cached, shapes(shapes_root))
    assert cached.images == 24


def test_pixels_that_never_reached_the_disk_are_found(shapes_root, tmp_path):
    cached = opened(shapes(shapes_root), tmp_path)
    assert_reads_as(cached, shapes(shapes_root))
    with open(cached.path / "pixels", "r+b") as file:
        file.seek(8192)
        file.write(bytes(4096))
        file.seek(-4096, os.SEEK_END)
        file.truncate()
        file.truncate(cached._files.total)
    assert_reads_as(opened(shapes(shapes_root), tmp_path), shapes(shapes_root))


@pytest.mark.parametrize("file", ["pixels", "index"])
def test_a_cache_that_lost_its_end_is_made_anew(shapes_root, tmp_path, file):
    cached = opened(shapes(shapes_root), tmp_path)
    cached.read_arrays(0)
    os.truncate(cached.path / file, 100)
    assert opened(shapes(shapes_root), tmp_path).images == 0
    (cached.path / "index").write_bytes(bytes((cached.path / "index").stat().st_size))
    assert opened(shapes(shapes_root), tmp_path).images == 0
    assert [path.name for path in tmp_path.iterdir()] == [cached.path.name]


def test_a_cache_that_is_deleted_in_use_costs_only_time(shapes_root, tmp_path):
    cached = opened(shapes(shapes_root), tmp_path)
    worker = pickle.loads(pickle.dumps(cached))
    shutil.rmtree(cached.path)
    assert_reads_as(cached, shapes(shapes_root))
    assert_reads_as(worker, shapes(shapes_root))


# --- no room -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reserved", [True, False], ids=["but the reserve", "at all"])
def test_a_disk_that_fills_is_read_around(shapes_root, tmp_path, monkeypatch, capfd, reserved):
    if not reserved:
        monkeypatch.setattr(cache_files, "reserve", lambda disk: 0)
    with mounted(tmp_path / "disk", "600k") as disk:
        cached = opened(shapes(shapes_root), disk, run="one")
        other, later = (pickle.loads(pickle.dumps(cached)) for _ in range(2))
        for one in (cached, other):
            assert_reads_as(one, shapes(shapes_root))
        assert 3 <= cached.images < 24
        free = os.statvfs(disk)
        assert (free.f_bavail * free.f_frsize >= 60 * 1024) == reserved
        (warning,) = capfd.readouterr().err.splitlines()
        assert warning == (
            f"warning: data.cache: {cached.path}: cannot be written (No space left on device); images that are not in "
            f"it are read from their files; free space there, or set data.cache=null"
        )
        later._run += 1  # another run has not been told
        assert_reads_as(later, shapes(shapes_root))
        assert capfd.readouterr().err.splitlines() == [warning]


def test_a_folder_that_cannot_be_written_is_a_warning(shapes_root, tmp_path):
    (tmp_path / "file").touch()
    cached = with_cache(shapes(shapes_root), config(shapes_root, tmp_path, cache="disk", cache_dir=tmp_path / "file"))
    assert cached.problem.startswith(f"data.cache: {cached.path}: cannot be written (File exists); images that are")
    assert cached.describe() == "data.cache: not used"
    assert_reads_as(cached, shapes(shapes_root))


def test_a_disk_that_may_only_be_read_is_read(shapes_root, tmp_path, capfd):
    with mounted(tmp_path / "disk", "8m") as disk:
        cached = opened(shapes(shapes_root), disk)
        for index in range(len(cached) - 1):
            cached.read(index)
        cached.close()
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        cached.open()
        cached._usable = True
        assert "cannot be written" in cached.problem
        assert cached.images == 23
        assert_reads_as(cached, shapes(shapes_root))
    assert capfd.readouterr().err == ""


def test_memory_that_is_too_small_is_refused_in_one_line(shapes_root, tmp_path):
    with mounted(tmp_path / "shm", "600k") as disk:
        with pytest.raises(InputError) as caught:
            with_cache(shapes(shapes_root), config(shapes_root, tmp_path, cache="memory", cache_dir=str(disk)))
        folder = disk / f"fcn-cache-{os.getuid()}"
        assert str(caught.value).startswith(f"data.cache: memory: found 0.61 MB free in {folder}, and the split needs ")
        assert str(caught.value).endswith("MB; set data.cache=disk or null, or make room there")
        assert "\n" not in str(caught.value)
        assert list(folder.iterdir()) == []


def test_memory_of_killed_runs_makes_room(shapes_root, copied, tmp_path):
    with mounted(tmp_path / "shm", "2200k") as disk:
        settings = config(shapes_root, tmp_path, cache="memory", cache_dir=str(disk))
        killed = with_cache(shapes(shapes_root), settings)
        assert_reads_as(killed, shapes(shapes_root))
        with pytest.raises(InputError, match=r"^data.cache: memory: found"):
            with_cache(shapes(copied), settings)
        assert killed.path.exists(), "it is in use"
        killed.close()
        other = with_cache(shapes(copied), settings)
        assert not killed.path.exists()
        assert_reads_as(other, shapes(copied))


def test_room_is_the_least_of_file_system_machine_and_job(tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)

    def found(memory: int, groups: str, **limits: str) -> tuple[int, str]:
        (tmp_path / "proc/meminfo").write_text(f"MemTotal: 9 kB\nMemAvailable:    {memory} kB\n")
        (tmp_path / "proc/self/cgroup").write_text(groups)
        shutil.rmtree(tmp_path / "cgroups", ignore_errors=True)
        for name, text in limits.items():
            file = tmp_path / "cgroups" / name.replace("__", "/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return memory_room(tmp_path, tmp_path / "proc", tmp_path / "cgroups")

    assert found(1 << 50, "")[1] == f"free in {tmp_path}"
    assert found(3, "") == (3072, "of free memory")
    limits = {"job__memory.max": "3000", "job__memory.current": "2000", "job__step__memory.max": "max"}
    limits |= {"job__memory.stat": "anon 1\ninactive_file 200\n"}
    assert found(3, "0::/job/step\n", **limits) == (1200, "below the memory limit of this job")
    limits = {"memory__a__memory.limit_in_bytes": "900", "memory__a__memory.usage_in_bytes": "950"}
    limits |= {"memory__a__memory.stat": "total_inactive_file 0\n"}
    assert found(3, "4:cpu:/\n3:memory,x:/a\n0::/\n", **limits)[0] == 0


# --- memory is given back ------------------------------------------------------------------------------------------


def test_the_last_run_gives_memory_back(shapes_root, tmp_path):
    settings = config(shapes_root, tmp_path, cache="memory", cache_dir=str(tmp_path))
    one, other = (with_cache(shapes(shapes_root), settings) for _ in range(2))
    assert one.path.stat().st_mode & 0o77 == 0o55
    assert one.path.parent.stat().st_mode & 0o77 == 0
    pickle.loads(pickle.dumps(one)).finished()
    one.finished()
    assert_reads_as(one, shapes(shapes_root))
    assert other.path.exists()
    other.finished()
    assert list(other.path.parent.iterdir()) == []


def test_a_run_that_is_stopped_finds_its_memory_again_and_a_day_later_another_run_removes_it(shapes_root, tmp_path):
    plain, folder = shapes(shapes_root), tmp_path / "memory"
    opened(plain, folder, in_memory=True).read(0)
    again = opened(plain, folder, in_memory=True)
    assert again.images == 1
    again.close()
    used, unused, left = folder / "used", folder / "unused", folder / ".left"
    for path in (used, unused, left):
        create(path, [(1, 1)])
    holder = cache_files.CacheFiles(used, 1, lock=True)
    for path in (used / "index", unused / "index", left):
        os.utime(path, (0, time.time() - 2 * cache.DAY))
    opened(plain, folder, in_memory=True)
    assert {path.name for path in folder.iterdir()} == {"used", again.path.name}
    holder.close()


def test_a_disk_keeps_it(shapes_root, tmp_path):
    settings = config(shapes_root, tmp_path / "runs" / "one", cache="disk")
    cached = with_cache(shapes(shapes_root), settings)
    cached.read(0)
    assert cached.path.parent == tmp_path / "runs" / ".cache"
    cached.finished()
    again = with_cache(shapes(shapes_root), settings)
    assert again.images == 1
    assert "1 of 24 images are in it" in again.describe()


# --- what is wrong is said as ever ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0.5, 0.001], ids=["pixels", "header"])
@pytest.mark.parametrize("part", [0, 1], ids=["image", "mask"])
def test_a_broken_file_is_named_and_replaced_as_without_cache(copied, tmp_path, part, kept):
    plain = shapes(copied)
    path = plain.pairs[2][part]
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    cached = opened(plain, tmp_path / "cache")
    for _ in range(2):
        messages = []
        for dataset in (shapes(copied), cached):
            with pytest.raises(InputError) as caught:
                dataset.read(2)
            messages.append(str(caught.value))
        assert messages[0] == messages[1]
        draws = [SampleRef(0, index) for index in (1, 2, 3)]
        transform = TrainTransform((48, 48), None, 0.5)
        one, other = (
            RankBatches(dataset, transform, 0, skip=True)[RankBatch(0, draws, draws)] for dataset in (plain, cached)
        )
        assert one.replaced == other.replaced == messages[:1]
        assert all(np.array_equal(a, b) for a, b in zip(one.batch, other.batch))
    assert cached.images in (2, 3), "two, and the one that stands in"


class Own:
    classes = ("a", "b")

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return np.full((3, 5, 3), index, np.uint8), np.full((3, 5), index, np.uint8)


def test_a_data_set_of_ones_own_says_when_it_changes(tmp_path):
    plain = OwnDataset(Own(), Data(name="mine:Own", root="."))
    settings = config(tmp_path, tmp_path, cache="disk", cache_dir=str(tmp_path / "cache"))
    with pytest.raises(InputError) as caught:
        with_cache(plain, settings)
    assert str(caught.value) == (
        "data.cache: mine:Own has no attribute `fingerprint`, a text that changes whenever its samples do; add it, or "
        "set data.cache=null"
    )
    paths = []
    for text in ("first", "second"):
        plain.samples.fingerprint = text
        cached = with_cache(plain, settings)
        assert cached.images == 0
        assert_reads_as(cached, plain)
        assert_reads_as(cached, plain)
        paths.append(cached.path)
    assert paths[0] != paths[1]


def test_without_the_key_nothing_is_cached(shapes_root, tmp_path):
    plain = shapes(shapes_root)
    assert with_cache(plain, config(shapes_root, tmp_path)) is plain
    assert list(tmp_path.iterdir()) == []


def test_memory_is_where_the_system_has_it(shapes_root, tmp_path, monkeypatch):
    settings = config(shapes_root, tmp_path, cache="memory")
    assert cache_folder(settings) == Path(f"/dev/shm/fcn-cache-{os.getuid()}")
    monkeypatch.setattr(cache, "MEMORY", tmp_path / "none")
    with pytest.raises(InputError, match=r"^data.cache: found memory, but no .*none here; set data.cache_dir to a"):
        cache_folder(settings)
