import errno
import os
import stat
import tempfile
from pathlib import Path

import pytest

from lltm_ray.errors import ConfigError
from lltm_ray.llamacpp.slot_folder import SlotFolder, new_name, own_folder, sweep_folders

BAD_NAMES = [
    *("", "x", "../secret", "/etc/passwd", "lltm-.bin", "lltm-" + "a" * 31 + ".bin", "lltm-" + "A" * 32 + ".bin"),
    *("lltm-" + "a" * 32 + ".bin\n", "lltm-" + "a" * 32 + ".bin/..", "sub/lltm-" + "a" * 32 + ".bin"),
]


def test_names_are_new_every_time_and_accepted(tmp_path):
    names = {new_name() for _ in range(1000)}
    assert len(names) == 1000
    assert {SlotFolder(tmp_path).path_of(name).parent for name in names} == {tmp_path}


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_is_not_ours_touches_nothing(tmp_path, name):
    folder, other = SlotFolder(tmp_path / "a"), SlotFolder(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "secret").write_bytes(b"keep")
    for action in (
        lambda: folder.remove(name),
        lambda: folder.size(name),
        lambda: folder.create(name),
        lambda: folder.read(name, 0, 4),
        lambda: folder.write(name, 0, b"x"),
        lambda: folder.take(name, other),
    ):
        with pytest.raises(ConfigError, match="is no name of a saved slot"):
            action()
    assert (tmp_path / "secret").read_bytes() == b"keep"


def test_a_file_is_written_and_read_in_pieces_and_is_private(tmp_path):
    folder, name = SlotFolder(tmp_path), new_name()
    folder.create(name)
    folder.write(name, 3, b"def")
    folder.write(name, 0, b"abc")
    assert (folder.read(name, 0, 4), folder.read(name, 4, 100), folder.size(name)) == (b"abcd", b"ef", 6)
    assert stat.S_IMODE(folder.path_of(name).stat().st_mode) == 0o600
    with pytest.raises(FileExistsError):
        folder.create(name)
    assert (folder.remove(name), folder.remove(name), folder.size(name)) == (True, False, None)


def test_a_link_in_place_of_a_file_is_not_followed(tmp_path):
    folder, name = SlotFolder(tmp_path / "a"), new_name()
    folder.path.mkdir()
    secret = tmp_path / "secret"
    secret.write_bytes(b"keep")
    folder.path_of(name).symlink_to(secret)
    with pytest.raises(OSError, match="symbolic link"):
        folder.read(name, 0, 4)
    with pytest.raises(OSError, match="symbolic link"):
        folder.write(name, 0, b"gone")
    folder.remove(name)
    assert secret.read_bytes() == b"keep"


@pytest.mark.parametrize("can_link", [True, False])
def test_a_file_is_taken_from_another_folder(tmp_path, monkeypatch, can_link):
    def no_link(*_args, **_options):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    if not can_link:
        monkeypatch.setattr(os, "link", no_link)
    source, target, name = SlotFolder(tmp_path / "a"), SlotFolder(tmp_path / "b"), new_name()
    source.path.mkdir()
    target.path.mkdir()
    source.create(name)
    source.write(name, 0, b"abc" * 1000)
    target.take(name, source)
    assert (source.path_of(name).stat().st_nlink == 2) is can_link
    source.remove(name)
    assert target.read(name, 0, 4000) == b"abc" * 1000
    assert stat.S_IMODE(target.path_of(name).stat().st_mode) == 0o600


def test_a_file_that_is_missing_cannot_be_taken(tmp_path):
    with pytest.raises(FileNotFoundError):
        SlotFolder(tmp_path).take(new_name(), SlotFolder(tmp_path / "nowhere"))
    assert list(tmp_path.iterdir()) == []


def test_only_old_files_of_ours_are_swept_from_a_folder_that_others_use(tmp_path):
    folder, old, new = SlotFolder(tmp_path), new_name(), new_name()
    for name in (old, new):
        folder.create(name)
    theirs = tmp_path / "mine.bin"
    theirs.write_bytes(b"keep")
    for path in (folder.path_of(old), theirs):
        os.utime(path, (0, 0))
    assert folder.sweep() == 1
    assert {path.name for path in tmp_path.iterdir()} == {new, "mine.bin"}


def test_an_owned_folder_is_private_and_goes_with_its_files(tmp_path):
    owned = own_folder(tmp_path / "run" / "slots", "engine-0")
    assert owned.path.name.startswith("engine-0-")
    assert stat.S_IMODE(owned.path.stat().st_mode) == 0o700
    SlotFolder(owned.path).create(new_name())
    owned.remove()
    owned.remove()
    assert not owned.path.exists()


def test_folders_of_the_dead_are_swept_and_those_of_the_living_stay(tmp_path):
    living = own_folder(tmp_path / "fleet-1" / "slots", "engine-0")
    dead = own_folder(tmp_path / "fleet-2" / "slots", "engine-0")
    SlotFolder(dead.path).create(new_name())
    os.close(dead._lock)  # as the kernel does when a process dies
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "fleet-2" / "slots" / "link").symlink_to(outside)
    key = tmp_path / "fleet-2" / "engine-0.key"
    key.write_text("keep")
    try:
        assert sweep_folders(tmp_path) == 1
        assert (living.path.exists(), dead.path.exists(), outside.exists(), key.exists()) == (True, False, True, True)
    finally:
        living.remove()


def test_a_folder_that_another_starting_engine_swept_before_it_was_locked_is_made_anew(tmp_path, monkeypatch):
    made, make = [], tempfile.mkdtemp

    def make_and_lose_the_first(**given):
        made.append(Path(make(**given)))
        if len(made) == 1:
            assert sweep_folders(tmp_path) == 1
        return str(made[-1])

    monkeypatch.setattr(tempfile, "mkdtemp", make_and_lose_the_first)
    owned = own_folder(tmp_path / "fleet-1" / "slots", "engine-0")
    assert [path.exists() for path in made] == [False, True]
    assert owned.path == made[1]
    owned.remove()


def test_a_run_that_ends_while_folders_are_swept_disturbs_nobody(tmp_path, monkeypatch):
    dead = own_folder(tmp_path / "fleet-1" / "slots", "engine-0")
    os.close(dead._lock)
    (tmp_path / "fleet-2" / "slots").mkdir(parents=True)
    for name in ("listdir", "scandir"):
        look = getattr(os, name)

        def gone(path=".", look=look):
            if "fleet-2" in str(path):
                raise FileNotFoundError(errno.ENOENT, "No such file or directory")
            return look(path)

        monkeypatch.setattr(os, name, gone)
    assert sweep_folders(tmp_path) == 1
