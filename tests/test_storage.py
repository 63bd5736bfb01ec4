"""Storage policy S1-S6: one root, refusals with a remedy, whole files or none, the self-check."""

import errno
import os
import resource
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest

from vlakeep import cli, preflight
from vlakeep.cli import STAGES
from vlakeep.core import storage as storage_module
from vlakeep.core.config import Config
from vlakeep.core.errors import DiskFull, StorageError
from vlakeep.core.storage import (
    Storage,
    atomic_dir,
    atomic_path,
    atomic_write,
    find_checkpoint,
    pick_root,
    prepare_environment,
    remove_leftovers,
    scan_large_files,
)

FOLDERS = {"hf_cache", "datasets", "probe", "artifacts", "runs", "tmp", "torch_cache", "wandb"}
VARIABLES = {"HF_HOME", "TRANSFORMERS_CACHE", "HF_DATASETS_CACHE", "TORCH_HOME", "WANDB_DIR", "TMPDIR"}


@contextmanager
def file_size_limit(size):
    """The kernel refuses to let a file grow beyond `size` bytes: what a full disk looks like, without one."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def test_root_precedence_and_folders(tmp_path, monkeypatch):
    monkeypatch.delenv("VLAKEEP_ROOT", raising=False)
    assert pick_root() == Path("/opt/data/private/vlakeep")
    monkeypatch.setenv("VLAKEEP_ROOT", str(tmp_path / "from_env"))
    assert Storage.from_config(Config()).root == tmp_path / "from_env"
    found = Storage.from_config(Config(root=str(tmp_path / "given")))
    assert found.root == tmp_path / "given"
    assert set(names(found.root)) == FOLDERS


@pytest.mark.parametrize(
    "key, name",
    [
        ("cache_dir", "hf_cache"),
        ("data_root_dir", "datasets"),
        ("probe_root_dir", "probe"),
        ("artifact_dir", "artifacts"),
        ("run_root_dir", "runs"),
        ("tmp_dir", "tmp"),
    ],
)
def test_each_folder_moves_within_the_root_only(tmp_path, key, name):
    root = tmp_path / "root"
    for value in ("elsewhere", str(root / "elsewhere")):
        assert Storage.from_config(Config(root=str(root), **{key: value})).folders[name] == root / "elsewhere"
    for value in (str(tmp_path / "outside"), "../outside"):
        with pytest.raises(StorageError, match=f"--{key} .*outside the storage root.*--{key} {root / name}.*--root"):
            Storage.from_config(Config(root=str(root), **{key: value}))
    assert not (tmp_path / "outside").exists()


def test_a_link_out_of_the_root_is_refused(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "outside").mkdir()
    (root / "runs").symlink_to(tmp_path / "outside")
    with pytest.raises(StorageError, match="symbolic link"):
        Storage(root)


def test_root_in_a_source_tree_is_refused(tmp_path, monkeypatch):
    subprocess.run(["git", "init", "-q", tmp_path / "code"], check=True)
    for inside in (tmp_path / "code" / "big", Path(storage_module.__file__).parent / "assets"):
        with pytest.raises(StorageError, match="source tree.*VLAKEEP_ROOT"):
            Storage(inside)
    monkeypatch.setattr(storage_module, "WORKSPACE", tmp_path / "workspace")
    with pytest.raises(StorageError, match="source tree"):
        Storage(tmp_path / "workspace" / "openvla")


def test_guard_write(tmp_path):
    storage = Storage.from_config(Config(root=str(tmp_path / "root")))
    assert storage.guard_write(storage.runs / "a" / "weights", 10, "weights") == storage.runs / "a" / "weights"
    with pytest.raises(StorageError, match=f"refused to write weights to {tmp_path}/w.pt.*outside the storage root.*--root"):
        storage.guard_write(tmp_path / "w.pt", what="weights")
    (storage.runs / "link").symlink_to(tmp_path)
    with pytest.raises(StorageError, match="outside"):
        storage.guard_write(storage.runs / "link" / "w.pt")
    with pytest.raises(StorageError, match="outside"):
        storage.guard_write(storage.runs / ".." / ".." / "w.pt")
    # a checkout inside the root is source; a model cloned with git into the cache is data
    subprocess.run(["git", "init", "-q", storage.root / "openvla"], check=True)
    with pytest.raises(StorageError, match="source tree"):
        storage.guard_write(storage.root / "openvla" / "w.pt")
    subprocess.run(["git", "init", "-q", storage.cache / "openvla-7b"], check=True)
    storage.guard_write(storage.cache / "openvla-7b" / "w.pt")


# Stage -> words that it needs beside an output. None of what they name is there, so whatever is computed or read first fails otherwise.
NEEDS = {
    "assemble-openvla": "--packages none", "own-texts": "--base none", "base-delta": "apply --parts none --delta none",
    "pretrain-libero": "--data none --key none", "train-base": "--base none --data none=none",
    "pretrain-tabletop": "--frames 1 --device none", "pretrain-tabletop-pi0": "--frames 1 --device none",
    "export": "--export.target none", "base-delta make": "--parts none --trained none"}
# Outputs that hold pages, tables, figures and records, of any place (docs/reference.md): stage, option.
DOCUMENTS = {("report", "--out"), ("study", "--out"), ("study", "--export")}
OUTPUTS = {("base-delta make", "--delta"), ("export", "--export.folder")} | {
    (stage.name, option.name) for stage in STAGES.values() for option in stage.own if option.name in ("--out", "--export")} - DOCUMENTS


@pytest.mark.parametrize("stage, option", sorted(OUTPUTS))
def test_no_stage_computes_for_an_output_in_a_source_tree_or_outside_the_root(tmp_path, monkeypatch, stage, option):
    for name in (*VARIABLES, "VLAKEEP_ENVIRONMENT"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(tempfile, "tempdir", None)
    root, tree = tmp_path / "root", tmp_path / "root" / "openvla"
    subprocess.run(["git", "init", "-q", tree], check=True)
    words = [*stage.split(), *NEEDS[stage].split(), "--root", str(root), option]
    with pytest.raises(StorageError, match="refused to write .* is a source tree.*--root"):
        cli.run([*words, str(tree / "out")])
    with pytest.raises(StorageError, match="refused to write .*outside the storage root.*--root"):
        cli.run([*words, str(tmp_path / "elsewhere" / "out")])
    with pytest.raises(StorageError, match="is a source tree|outside the storage root"):
        cli.run([*words, str(storage_module.PACKAGE / "out")])
    assert names(tree) == [".git"] and not (tmp_path / "elsewhere").exists() and not (storage_module.PACKAGE / "out").exists()


def test_the_small_models_may_lie_where_they_ship_and_nothing_else(tmp_path):
    storage = Storage(tmp_path / "root")
    place = storage_module.SHIPS / "tabletop-base"
    assert storage.guard_write(place, what="base model", also=storage_module.SHIPS) == place
    for path in (place, storage_module.PACKAGE / "core"):
        with pytest.raises(StorageError, match="outside"):
            storage.guard_write(path, also=storage_module.SHIPS if path != place else None)


def test_every_stage_takes_the_folders():
    assert [name for name, stage in STAGES.items() if not {"root", *storage_module.KEYS} <= set(stage.reads())] == []


def test_foreseen_lack_of_space_names_needed_and_free_bytes(tmp_path):
    storage = Storage.from_config(Config(root=str(tmp_path)))
    with pytest.raises(DiskFull, match=rf"{1 << 60} bytes .* needed, \d+ bytes .* free.*--root") as caught:
        storage.guard_write(storage.runs / "a", 1 << 60)
    assert caught.value.errno == errno.ENOSPC


def test_unwritable_root_names_the_remedy(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PermissionError, match="cannot make .*--root DIR or export VLAKEEP_ROOT"):
        Storage.from_config(Config(root=str(tmp_path / "file" / "root")))


def test_demo_falls_back_to_the_home_folder_and_says_so(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.delenv("VLAKEEP_ROOT", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(storage_module, "DEFAULT_ROOT", tmp_path / "file" / "root")
    assert Storage.from_config(Config(), demo=True).root == tmp_path / ".cache" / "vlakeep"
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(PermissionError):
        Storage.from_config(Config())


def test_environment_is_set_unless_the_user_did(tmp_path):
    first, second = Storage(tmp_path / "one"), Storage(tmp_path / "two")
    environ = {"HF_HOME": "/mine", "HF_ENDPOINT": "https://hf-mirror.com"}
    first.export_environment(environ)
    assert VARIABLES <= set(environ)
    assert environ["HF_HOME"] == "/mine" and environ["HF_ENDPOINT"] == "https://hf-mirror.com"
    assert environ["TORCH_HOME"] == str(tmp_path / "one" / "torch_cache")
    second.export_environment(environ)  # a child with another root: what vlakeep had set follows, what the user set stays
    assert environ["HF_HOME"] == "/mine" and environ["TORCH_HOME"] == str(tmp_path / "two" / "torch_cache")
    assert second.outside(environ) == [("HF_HOME", "/mine")]


def test_prepare_environment_reads_yaml_and_command_line(tmp_path, monkeypatch):
    for name in (*VARIABLES, "VLAKEEP_ENVIRONMENT"):
        monkeypatch.setenv(name, "")  # so that monkeypatch restores what the call sets
    (tmp_path / "c.yaml").write_text(f"root: {tmp_path / 'from_yaml'}\nnonsense: 1\n")
    monkeypatch.setattr(tempfile, "tempdir", None)
    prepare_environment(["--config", str(tmp_path / "c.yaml"), "--tmp_dir=scratch"])
    assert os.environ["HF_HOME"] == str(tmp_path / "from_yaml" / "hf_cache")
    assert os.environ["TMPDIR"] == str(tmp_path / "from_yaml" / "scratch")
    prepare_environment(["--root", str(tmp_path / "r")])
    assert os.environ["HF_HOME"] == str(tmp_path / "r" / "hf_cache")
    assert not (tmp_path / "r").exists()


def test_hub_reads_the_exported_cache(tmp_path):
    code = (
        "import sys; from vlakeep.core.storage import prepare_environment; prepare_environment(['--root', sys.argv[1]]);"
        "from huggingface_hub import constants; print(constants.HF_HUB_CACHE)"
    )
    environ = {k: v for k, v in os.environ.items() if k not in VARIABLES}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environ, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(tmp_path / "hf_cache" / "hub")


def test_atomic_write_is_all_or_nothing(tmp_path):
    path = tmp_path / "a.json"
    with atomic_write(path, "w") as file:
        file.write("old")
    with pytest.raises(RuntimeError):
        with atomic_write(path, "w") as file:
            file.write("half")
            raise RuntimeError
    assert path.read_text() == "old" and names(tmp_path) == ["a.json"]


def test_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with file_size_limit(10_000), pytest.raises(DiskFull, match=r"full.*a\.bin.*bytes free"):
        with atomic_write(path) as file:
            file.write(b"x" * 1_000_000)
    assert path.read_bytes() == b"old" and names(tmp_path) == ["a.bin"]


def test_enospc_from_the_kernel_is_reported_as_disk_full(tmp_path):
    with pytest.raises(DiskFull, match="full"):
        with atomic_write(tmp_path / "a.bin"):
            with open("/dev/full", "wb") as full:  # every write to it is answered with ENOSPC
                full.write(b"x")
    assert names(tmp_path) == []


def test_a_library_writes_at_a_path_with_the_same_suffix(tmp_path):
    file = tmp_path / "a.npz"
    with atomic_path(file) as partial:
        assert partial.suffix == ".npz" and partial.parent == tmp_path  # numpy would add it, and write elsewhere
        partial.write_bytes(b"one")
        assert not file.exists()
    with pytest.raises(RuntimeError), atomic_path(file) as partial:
        partial.write_bytes(b"two")
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"] and file.read_bytes() == b"one"
    left = tmp_path / partial.name.replace(str(os.getpid()), "999999999")
    left.write_bytes(b"of a process that was killed")
    remove_leftovers(tmp_path, "a.npz")
    assert not left.exists()


def test_atomic_dir_replaces_at_once_and_cleans_up(tmp_path):
    folder = tmp_path / "artifact"
    with atomic_dir(folder) as temporary:
        (temporary / "one").write_text("1")
        assert not folder.exists()
    with pytest.raises(RuntimeError):
        with atomic_dir(folder) as temporary:
            (temporary / "two").write_text("2")
            raise RuntimeError
    assert names(folder) == ["one"]
    with file_size_limit(1000), pytest.raises(DiskFull):
        with atomic_dir(folder) as temporary:
            (temporary / "two").write_bytes(b"x" * 100_000)
    assert names(folder) == ["one"] and names(tmp_path) == ["artifact"]
    with atomic_dir(folder) as temporary:
        (temporary / "two").write_text("2")
    assert names(folder) == ["two"] and names(tmp_path) == ["artifact"]


def test_leftovers_of_dead_processes_go_and_a_lost_folder_returns(tmp_path):
    child = subprocess.Popen(["true"])
    child.wait()
    host = storage_module.socket.gethostname()
    (tmp_path / f".a.tmp-{host}-{child.pid}").mkdir()
    (tmp_path / f".b.old-{host}-{child.pid}").mkdir()  # killed between the two renames: b itself is gone
    (tmp_path / f".c.tmp-{host}-{os.getppid()}").mkdir()  # its process lives
    (tmp_path / f".d.tmp-otherhost-{child.pid}").mkdir()  # and this one's may
    storage_module.remove_leftovers(tmp_path)
    assert names(tmp_path) == [f".c.tmp-{host}-{os.getppid()}", f".d.tmp-otherhost-{child.pid}", "b"]


def test_scan_finds_large_files_and_follows_no_links(tmp_path):
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    for path, size in ((tree / "sub" / "big", 3000), (tree / "mid", 2000), (tree / "small", 1999), (tmp_path / "outside", 5000)):
        path.write_bytes(b"x" * size)
    (tree / "link").symlink_to(tmp_path / "outside")
    assert scan_large_files(tree, 2000) == [(tree / "sub" / "big", 3000), (tree / "mid", 2000)]


def test_virtual_environments_are_not_scanned_and_a_checkout_is(tmp_path, monkeypatch):
    for name in (".venv/lib", "checkout", "package"):
        (tmp_path / "tree" / name).mkdir(parents=True)
        (tmp_path / "tree" / name / "big").write_bytes(b"x" * 3000)
    (tmp_path / "tree" / ".venv" / "pyvenv.cfg").write_text("")
    assert [path.parent.name for path, _ in scan_large_files(tmp_path / "tree", 2000)] == ["checkout", "package"]
    (tmp_path / "tree" / "package" / "pyvenv.cfg").write_text("")
    assert len(scan_large_files(tmp_path / "tree" / "package", 2000)) == 1, "the tree that is asked for is looked at"
    monkeypatch.chdir(tmp_path)
    assert tmp_path / "tree" / "checkout" in storage_module.code_trees(more=str(tmp_path / "tree" / "checkout"))


def test_the_self_check_says_where_the_inputs_lie(tmp_path, monkeypatch, capsys):
    for name in (*VARIABLES, "VLAKEEP_ENVIRONMENT"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(tempfile, "tempdir", None)
    root, far = tmp_path / "root", tmp_path / "far"
    for folder in (root / "datasets" / "near", far / "set", far / "probe", far / "model", far / "checkout"):
        folder.mkdir(parents=True)
    (far / "model" / "config.json").write_text("{}")
    (far / "checkout" / "big").write_bytes(b"x" * 3000)
    (root / "datasets" / "link").symlink_to(far / "set")
    (tmp_path / "c.yaml").write_text(f"root: {root}\nbackbone: {{checkpoint: {far / 'model'}, openvla_dir: {far / 'checkout'}}}\n"
                                     f"data: {{datasets: [near, link, none]}}\nprobe: {{name: {far / 'probe'}}}\n")
    seen, show = [], preflight.show
    monkeypatch.setattr(preflight, "show", lambda lines, title: seen.extend(lines) or 0)
    cli.run(["storage-check", "--config", str(tmp_path / "c.yaml"), "--large_file_gb", "0.000002"])
    found = {(line.status, line.what): line.where for line in seen}
    for what, folder in ((f"base model {far / 'model'}", far / "model"), ("data set link", far / "set"),
                         (f"probe {far / 'probe'}", far / "probe")):
        assert found["note", what] == f"{folder} is outside the storage root {root}"
    assert found["ok", "data set near"] == str(root / "datasets" / "near") and "not there yet" in found["note", "data set none"]
    assert any(line.what == "large file in source tree" and str(far / "checkout" / "big") in line.where for line in seen)
    monkeypatch.setattr(preflight, "show", show)
    assert cli.run(["storage-check", "--root", str(root), "--data.datasets", "[link]"]) == 0 and "data set link" in capsys.readouterr().out


def test_find_checkpoint(tmp_path):
    for folder in ("hub/models--openvla--openvla-7b/snapshots/abc", "mine"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config.json").write_text("{}")
    assert find_checkpoint("openvla/openvla-7b", tmp_path).name == "abc"
    assert find_checkpoint("mine", tmp_path) == tmp_path / "mine"
    with pytest.raises(FileNotFoundError, match="vlakeep fetch openvla/other"):
        find_checkpoint("openvla/other", tmp_path)
