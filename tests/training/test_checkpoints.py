"""Checkpoint folders: whole or not there, kept or removed, found again, and damage noticed."""

import os
import signal
import subprocess
from multiprocessing import get_context

import pytest
import torch

from hookdistill import HookDistillError, files
from hookdistill.errors import CheckpointError
from hookdistill.training.checkpoints import checkpoints, damage, find_checkpoint, newest_whole, save_checkpoint, tidy
from hookdistill.training.states import read_state, write_state


def content(value):
    def write(folder):
        write_state({"value": torch.ones(1000)}, folder, "model")
        write_state({"value": value}, folder, "optimizer")

    return write


def save(root, step, *, keep_last=None):
    return save_checkpoint(root, step, content(step), keep_last=keep_last)


def names(root):
    return sorted(path.name for path in root.iterdir())


def test_a_checkpoint_is_whole_and_named_by_its_step(tmp_path):
    path = save(tmp_path, 12)
    assert path.name == "step-000000012"
    assert damage(path) is None
    assert read_state(path, "optimizer") == {"value": 12}
    assert names(path) == ["manifest.json", "model.json", "model.safetensors", "optimizer.json"]


@pytest.mark.parametrize(("keep_last", "kept"), [(None, [4, 3, 2, 1]), (1, [4]), (3, [4, 3, 2])])
def test_the_last_ones_are_kept(keep_last, kept, tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep_last=keep_last)
    assert [int(path.name[5:]) for path in checkpoints(tmp_path)] == kept
    assert len(names(tmp_path)) == len(kept)


def test_a_step_that_is_saved_again_replaces_the_first(tmp_path):
    save(tmp_path, 1)
    save_checkpoint(tmp_path, 1, content(99), keep_last=2)
    assert read_state(newest_whole(tmp_path), "optimizer") == {"value": 99}
    assert names(tmp_path) == ["step-000000001"]


def test_the_newest_is_by_number_and_other_folders_are_none(tmp_path):
    for step in (999_999_999, 1_000_000_000):
        save(tmp_path, step)
    (tmp_path / "step-last").mkdir()
    (tmp_path / "notes").mkdir()
    assert newest_whole(tmp_path).name == "step-1000000000"


DAMAGES = {
    "a flipped bit": (lambda path: flip(path / "model.safetensors"), r"model\.safetensors is not what was written"),
    "cut off": (lambda path: os.truncate(path / "model.safetensors", 100), r"model\.safetensors has 100 bytes instead of"),
    "a file gone": (lambda path: (path / "optimizer.json").unlink(), r"optimizer\.json is missing"),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), r"manifest\.json is missing"),
    "half a manifest": (lambda path: os.truncate(path / "manifest.json", 40), r"manifest\.json cannot be read"),
    "a strange manifest": (lambda path: (path / "manifest.json").write_text("[]"), r"manifest\.json cannot be read"),
}


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_one_is_passed_over_with_a_warning(name, tmp_path):
    break_it, message = DAMAGES[name]
    old, new = save(tmp_path, 1), save(tmp_path, 2)
    break_it(new)
    with pytest.warns(UserWarning, match=rf"step-000000002 is damaged and passed over: {message}"):
        assert find_checkpoint(tmp_path, True) == old
    with pytest.raises(CheckpointError, match=rf"{message}.*there are step-000000002, step-000000001") as caught:
        find_checkpoint(tmp_path, new)
    assert isinstance(caught.value, HookDistillError)


@pytest.mark.filterwarnings("ignore:the checkpoint")
def test_nothing_starts_anew_by_itself_when_all_are_damaged(tmp_path):
    flip(save(tmp_path, 1) / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"all 1 checkpoints .* damaged.*resume=False"):
        find_checkpoint(tmp_path, True)


def test_what_resume_means(tmp_path):
    assert find_checkpoint(tmp_path, True) is None
    path = save(tmp_path / "checkpoints", 3)
    assert find_checkpoint(tmp_path / "checkpoints", True) == path
    assert find_checkpoint(tmp_path / "checkpoints", False) is None
    for named in (path, str(path), tmp_path, str(tmp_path / "checkpoints")):
        assert find_checkpoint(None, named) == path
    with pytest.raises(CheckpointError, match=r"resume='nowhere' is no folder\. In .* there are step-000000003"):
        find_checkpoint(tmp_path / "checkpoints", "nowhere")
    with pytest.raises(CheckpointError, match=r"resume=True looks .* output_dir"):
        find_checkpoint(None, True)


def test_a_write_that_raises_leaves_nothing(tmp_path):
    save(tmp_path, 1)

    def broken(folder):
        (folder / "model.json").write_text("half")
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        save_checkpoint(tmp_path, 2, broken, keep_last=1)
    assert names(tmp_path) == ["step-000000001"]
    assert damage(tmp_path / "step-000000001") is None


def test_what_is_renamed_is_on_the_disk_before_and_the_name_after(tmp_path, monkeypatch):
    acts = []

    def flush(path):
        acts.append(("flush", path.name if path != tmp_path else "the place"))

    def replace(self, target):
        acts.append(("rename", target.name))
        return real(self, target)

    real = files.Path.replace
    monkeypatch.setattr(files, "flush", flush)
    monkeypatch.setattr(files.Path, "replace", replace)
    save(tmp_path, 3)
    renamed = acts.index(("rename", "step-000000003"))
    written = {"manifest.json", "model.json", "model.safetensors", "optimizer.json"}
    assert written <= {name for act, name in acts[:renamed] if act == "flush"}
    assert ("flush", "the place") in acts[renamed:]


# A kill at every act of a save


def save_and_die(root, at):
    """In a process of its own: save step 2 over an older step 2, and die before the act number ``at``."""
    acts = []

    def counted(function):
        def act(*args, **kwargs):
            acts.append(function)
            if len(acts) == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return act

    files.tempfile.mkdtemp = counted(files.tempfile.mkdtemp)
    files.os.fsync = counted(files.os.fsync)
    files.Path.chmod = counted(files.Path.chmod)
    files.Path.replace = counted(files.Path.replace)
    files.shutil.rmtree = counted(files.shutil.rmtree)
    save_checkpoint(root, 2, content("new"), keep_last=1)
    os._exit(len(acts))


def test_killed_at_any_act_of_a_save_a_whole_checkpoint_is_found(tmp_path):
    found, acts = [], None
    for at in range(1, 40):
        root = tmp_path / str(at)
        save(root, 1)
        save_checkpoint(root, 2, content("old"), keep_last=None)
        process = get_context("fork").Process(target=save_and_die, args=(root, at))
        process.start()
        process.join(30)
        tidy(root)
        found.append(read_state(newest_whole(root), "optimizer")["value"])
        assert all(name.startswith("step-") for name in names(root))
        assert all(damage(path) is None for path in checkpoints(root))
        if process.exitcode != -signal.SIGKILL:
            acts = process.exitcode
            break
    assert acts == len(found) - 1 >= 8
    assert found[0] == "old"
    assert found[-1] == "new"
    assert sorted(found, key=["old", "new"].index) == found


# A full disk


@pytest.fixture
def full_disk(tmp_path):
    """A file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting a tiny tmpfs needs rights that are not given here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_an_error_and_leaves_what_was_there(full_disk):
    old = save(full_disk, 1)

    def large(folder):
        write_state({"value": torch.zeros(100_000)}, folder, "model")

    with pytest.raises(CheckpointError, match=r"No space left.*0 MiB are free.*Nothing half-written"):
        save_checkpoint(full_disk, 2, large, keep_last=1)
    assert names(full_disk) == ["step-000000001"]
    assert damage(old) is None


def test_a_disk_that_is_full_when_the_manifest_is_written(tmp_path, monkeypatch):
    old = save(tmp_path, 1)

    def write_text(self, *args, **kwargs):
        if self.name == "manifest.json":
            raise OSError(28, "No space left on device")
        return real(self, *args, **kwargs)

    real = files.Path.write_text
    monkeypatch.setattr(files.Path, "write_text", write_text)
    with pytest.raises(CheckpointError, match="No space left"):
        save_checkpoint(tmp_path, 2, content(2), keep_last=1)
    assert names(tmp_path) == ["step-000000001"]
    assert damage(old) is None


def test_a_read_only_folder_is_an_error(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting needs rights that are not given here: {done.stderr.strip()}")
    try:
        with pytest.raises(CheckpointError, match=r"Read-only file system"):
            save(folder, 1)
    finally:
        subprocess.run(["umount", str(folder)], check=True)
