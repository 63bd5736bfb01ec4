"""Where big files go: one storage root, checked before every write, and files that are either whole or not there.

    vlakeep storage-check            # is everything of this experiment below the root?

The root is `--root`, else VLAKEEP_ROOT, else /opt/data/private/vlakeep. Below it: hf_cache datasets probe artifacts runs tmp
torch_cache wandb, and eval/ and report/ beside runs/. Most have a `*_dir` key in `Config`; each must stay below the root.
"""

import os
import re
import shutil
import socket
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Tuple

import yaml
from tqdm import tqdm

from vlakeep.core.base_models import find_checkpoint as find_checkpoint  # where it was; what to import
from vlakeep.core.errors import DiskFull, StorageError, human_bytes, is_disk_full, quoted
from vlakeep.core.log import log
from vlakeep.core.schema import find_config, pick
from vlakeep.core.strict_yaml import load_yaml

DEFAULT_ROOT = Path("/opt/data/private/vlakeep")
DEMO_ROOT = Path("~/.cache/vlakeep")
WORKSPACE = Path("/workspace")  # source only, by the storage policy, whether or not it is a git work tree
PACKAGE = Path(__file__).resolve().parents[1]
SHIPS = PACKAGE / "assets"  # where the small models lie that are part of the package
# folder -> the Config key that moves it
FOLDERS = {
    "hf_cache": "cache_dir",
    "datasets": "data_root_dir",
    "probe": "probe_root_dir",
    "artifacts": "artifact_dir",
    "runs": "run_root_dir",
    "tmp": "tmp_dir",
    "torch_cache": None,
    "wandb": None,
}
KEYS = [key for key in FOLDERS.values() if key]
# Names of the variables that vlakeep itself has set: a child process with another root replaces these and keeps the user's.
_OURS = "VLAKEEP_ENVIRONMENT"


class Storage:
    """The storage root and its folders. Attributes: root cache data probe artifacts runs tmp torch_cache wandb eval report."""

    def __init__(self, root: Path, moved: Optional[Dict[str, Optional[str]]] = None):
        """`moved`: Config key -> folder; a relative one is taken below the root. Raises StorageError when one lies outside."""
        self.root = Path(root).expanduser().absolute()
        moved = moved or {}
        self.folders: Dict[str, Path] = {}
        for name, key in FOLDERS.items():
            value = moved.get(key) if key else None
            folder = self.root / (Path(value).expanduser() if value else name)
            if not _below(folder.resolve(), self.root.resolve()):
                raise StorageError(
                    f"{'--' + key + ' ' + str(value) if value else folder} leads to {folder.resolve()}, "
                    f"outside the storage root {self.root}. "
                    + (
                        f"Give a folder below it (--{key} {quoted(self.root / name)}) or a root above both (--root ...)"
                        if value
                        else "Replace the symbolic link by a folder, or move the whole root with --root"
                    )
                )
            self.folders[name] = folder
        self.cache, self.data, self.probe = self.folders["hf_cache"], self.folders["datasets"], self.folders["probe"]
        self.artifacts, self.runs, self.tmp = self.folders["artifacts"], self.folders["runs"], self.folders["tmp"]
        self.torch_cache, self.wandb = self.folders["torch_cache"], self.folders["wandb"]
        self.eval, self.report = self.root / "eval", self.root / "report"
        tree = self.source_tree(self.root)
        if tree is not None:
            raise StorageError(
                f"the storage root {self.root} lies inside the source tree {tree}, which holds no big files. "
                "Choose a folder outside it: --root DIR or export VLAKEEP_ROOT=DIR"
            )

    @classmethod
    def from_config(cls, config, create: bool = True, demo: bool = False) -> "Storage":
        """The storage of a configuration, its folders made unless `create` is False.

        `demo`: where the default root cannot be made, ~/.cache/vlakeep is used and one line says so.
        Raises StorageError (outside the root, or root in a source tree) and PermissionError (root cannot be made or written).
        """
        storage = cls(pick_root(config.root, demo), {key: getattr(config, key) for key in KEYS})
        if create:
            storage.create()
        return storage

    def create(self) -> None:
        for folder in [self.root, *self.folders.values()]:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                if is_disk_full(error):
                    raise DiskFull(f"no space to make {folder}: {free_bytes(folder)} bytes free") from error
                raise PermissionError(
                    f"cannot make {folder} ({error.strerror}). Make it writable, or choose another storage root: "
                    "--root DIR or export VLAKEEP_ROOT=DIR"
                ) from error
            if not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError(
                    f"{folder} is not writable. Make it so (chmod u+rwx {quoted(folder)}), or choose another storage root: "
                    "--root DIR or export VLAKEEP_ROOT=DIR"
                )

    def probe_folder(self, name: str) -> Path:
        """A probe by name below the probe folder; an absolute path is taken as it is."""
        return self.probe / Path(name).expanduser()

    def artifact_folder(self, name: str) -> Path:
        return self.guard_write(self.artifacts / Path(name).expanduser(), what="artefact")

    def run_folder(self, name: str) -> Path:
        return self.guard_write(self.runs / name, what="run folder")

    def environment(self) -> Dict[str, str]:
        """The variables by which libraries find their caches (S3)."""
        return {
            "HF_HOME": str(self.cache),
            "TRANSFORMERS_CACHE": str(self.cache / "hub"),
            "HF_DATASETS_CACHE": str(self.cache / "datasets"),
            "TORCH_HOME": str(self.torch_cache),
            "WANDB_DIR": str(self.wandb),
            "TMPDIR": str(self.tmp),
        }

    def export_environment(self, environ=None) -> Dict[str, str]:
        """Set each variable that the user has not set; HF_ENDPOINT and the rest stay untouched. Returns what was set.

        Call it before transformers is imported: huggingface_hub reads the variables once, at import.
        """
        environ = os.environ if environ is None else environ
        ours = set(environ.get(_OURS, "").split(","))
        new = {name: value for name, value in self.environment().items() if not environ.get(name) or name in ours}
        environ.update(new)
        environ[_OURS] = ",".join(sorted(new))
        tempfile.tempdir = None  # tempfile remembers TMPDIR from its first use
        return new

    def source_tree(self, path: Path) -> Optional[Path]:
        """The source tree that `path` lies in, or None: /workspace, vlakeep's own tree, or a git work tree.

        A clone below one of the storage folders (a model fetched with git-lfs) is data, not source.
        """
        return self._tree_of(Path(path).resolve())

    def _tree_of(self, path: Path) -> Optional[Path]:
        """The same of a path without links."""
        for tree in (WORKSPACE.resolve(), own_tree()):
            if _below(path, tree):
                return tree
        for folder in (path, *path.parents):
            if (folder / ".git").exists() and not any(_below(folder, data.resolve()) for data in self.folders.values()):
                return folder
        return None

    def guard_write(self, path, size_hint: int = 0, what: str = "file", also: Optional[Path] = None) -> Path:
        """`path`, if weights, data, checkpoints or caches may be written there. `also`: a folder in which they may lie too.

        Raises StorageError outside the root (symbolic links resolved) or inside a source tree, and DiskFull when fewer than
        `size_hint` bytes are free.
        """
        path = Path(path).expanduser().absolute()
        # What a link leads to counts: one below the root may lead out of it.
        real = path.resolve()
        remedy = f"Choose a path below {self.root}, or move the root with --root DIR or VLAKEEP_ROOT=DIR"
        via = "" if real == path else f" (which is {real})"
        if also is not None and _below(real, also.resolve()):
            need_free(path, size_hint, what)
            return path
        if not _below(real, self.root.resolve()):
            raise StorageError(f"refused to write {what} to {path}{via}: it is outside the storage root. {remedy}")
        tree = self._tree_of(real)
        if tree is not None:
            raise StorageError(
                f"refused to write {what} to {path}{via}: {tree} is a source tree and holds no big files. {remedy}"
            )
        need_free(path, size_hint, what)
        return path

    def overview(self) -> List[Tuple[str, Path, bool, Optional[int]]]:
        """(name, folder, exists and is writable, free bytes of its disk or None) of the root and every folder."""
        rows = []
        for name, folder in [("root", self.root), *self.folders.items()]:
            rows.append((name, folder, folder.is_dir() and os.access(folder, os.W_OK | os.X_OK), free_bytes(folder)))
        return rows

    def outside(self, environ=None) -> List[Tuple[str, str]]:
        """(variable, folder) of every cache variable that points outside the root."""
        environ = os.environ if environ is None else environ
        return [
            (name, environ[name])
            for name in self.environment()
            if environ.get(name) and not _below(Path(environ[name]).expanduser().resolve(), self.root.resolve())
        ]


def pick_root(given: Optional[str] = None, demo: bool = False, quiet: bool = False) -> Path:
    """`given`, else VLAKEEP_ROOT, else the default; for the demo ~/.cache/vlakeep where the default cannot be made."""
    chosen = given or os.environ.get("VLAKEEP_ROOT")
    if chosen:
        return Path(chosen)
    if demo and not _can_make(DEFAULT_ROOT):
        if quiet:
            return DEMO_ROOT.expanduser()
        log.warning(f"storage root: {DEMO_ROOT.expanduser()} ({DEFAULT_ROOT} cannot be made; set VLAKEEP_ROOT to choose)")
        return DEMO_ROOT.expanduser()
    return DEFAULT_ROOT


def peek(argv: List[str], demo: bool = False) -> "Storage":
    """The storage that a raw command line asks for, from its root and folder keys alone; nothing is made or checked beyond.

    Raises what Storage raises, and ConfigError, OSError or yaml.YAMLError for a configuration file that cannot be read.
    """
    given, _ = pick(argv, ["config", "root", *KEYS])
    tree = load_yaml(find_config(given["config"]).read_text(encoding="utf-8")) if "config" in given else {}
    tree = tree if isinstance(tree, dict) else {}
    wanted = {key: given.get(key) or tree.get(key) for key in ["root", *KEYS]}
    return Storage(pick_root(wanted.pop("root"), demo, quiet=True), wanted)


def prepare_environment(argv: List[str], demo: bool = False) -> None:
    """Export the cache variables before anything heavy is imported. Mistakes are left to the stage, which reads them again."""
    try:
        peek(argv, demo).export_environment()
    except (OSError, ValueError, TypeError, yaml.YAMLError):
        pass


def _can_make(folder: Path) -> bool:
    if folder.is_dir():
        return os.access(folder, os.W_OK | os.X_OK)
    try:
        folder.mkdir(parents=True)
    except OSError:
        return False
    return True


def _below(path: Path, folder: Path) -> bool:
    """Of absolute paths."""
    return path.parts[:len(folder.parts)] == folder.parts


def free_bytes(path) -> Optional[int]:
    """Free bytes for this user on the disk that holds (or will hold) `path`; None when that cannot be told."""
    path = Path(path).absolute()
    for folder in (path, *path.parents):
        if folder.is_dir():
            try:
                return shutil.disk_usage(folder).free
            except OSError:
                return None
    return None


def need_free(path, size: int, what: str = "file") -> None:
    """Raise DiskFull when the disk of `path` has fewer than `size` bytes free."""
    free = free_bytes(path) if size else None
    if free is not None and free < size:
        raise DiskFull(
            f"no space for {what} at {path}: {size} bytes ({human_bytes(size)}) needed, {free} bytes ({human_bytes(free)}) free. "
            "Delete old runs, lower --train.keep_last, or move the root with --root"
        )


def _fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        pass  # some network file systems cannot sync a folder; the rename is still atomic
    finally:
        os.close(handle)


def _sibling(path: Path, mark: str, suffix: str = "") -> Path:
    return path.parent / f".{path.name}.{mark}-{socket.gethostname()}-{os.getpid()}{suffix}"


def _disk_full(path: Path, error: BaseException) -> DiskFull:
    return DiskFull(
        f"the disk (or a quota) was full while writing {path}: {free_bytes(path)} bytes free now; nothing half-written is left. "
        f"Free some space or move the root with --root ({error})"
    )


@contextmanager
def naming_full_disk(path) -> Iterator[None]:
    """Within the block a full disk, quota or file-size limit is raised as DiskFull that names `path`."""
    try:
        yield
    except OSError as error:
        if is_disk_full(error) and not isinstance(error, DiskFull):
            raise _disk_full(Path(path), error) from error
        raise


@contextmanager
def atomic_path(path) -> Iterator[Path]:
    """A path with the suffix of `path`, for a library to write a file at, which becomes `path` when the block ends well.

    Otherwise `path` stays what it was. Written beside it, flushed to disk, renamed. Raises DiskFull for a full disk, quota or limit.
    """
    path = Path(path)
    temporary = _sibling(path, "tmp", path.suffix)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _fsync_folder(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if is_disk_full(error) and not isinstance(error, DiskFull):
            raise _disk_full(path, error) from error
        raise


@contextmanager
def atomic_write(path, mode: str = "wb") -> Iterator:
    """An open file that becomes `path` when the block ends well; as atomic_path."""
    with atomic_path(path) as temporary, open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
        yield file


@contextmanager
def atomic_dir(path) -> Iterator[Path]:
    """An empty folder to fill, which becomes `path` (replacing an older one) when the block ends well.

    Until then it is a hidden sibling; a failure removes it, and what a killed process left is removed by the next one.
    Raises DiskFull for a full disk, quota or file-size limit.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, path.name)
    temporary, old = _sibling(path, "tmp"), _sibling(path, "old")
    try:
        temporary.mkdir()
        yield temporary
        for folder, _, names in os.walk(temporary):
            for name in names:
                with open(Path(folder) / name, "rb") as file:
                    os.fsync(file.fileno())
            _fsync_folder(Path(folder))
        if path.exists():
            os.rename(path, old)
        os.rename(temporary, path)
        _fsync_folder(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException as error:
        if old.exists() and not path.exists():
            os.rename(old, path)
        shutil.rmtree(temporary, ignore_errors=True)
        if is_disk_full(error) and not isinstance(error, DiskFull):
            raise _disk_full(path, error) from error
        raise


def remove_leftovers(folder: Path, name: str = "") -> None:
    """Clear what killed processes left of `name` (of anything, when empty); a replaced folder whose successor never came returns.

    A leftover of another host is cleared after a day, since its process cannot be looked up from here.
    """
    for entry in sorted(folder.glob(f".{name or '*'}.*-*")):
        match = re.fullmatch(r"\.(.+)\.(tmp|old)-(.+)-(\d+)(?:\.\w+)?", entry.name)
        if match is None or (name and match[1] != name):
            continue
        kind, host, pid = match[2], match[3], int(match[4])
        if host != socket.gethostname():
            if time.time() - entry.stat().st_mtime < 86400:
                continue
        elif pid != os.getpid() and _alive(pid):
            continue
        if kind == "old" and not (folder / match[1]).exists():
            os.rename(entry, folder / match[1])
        elif entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def scan_large_files(tree, threshold: int) -> List[Tuple[Path, int]]:
    """(file, bytes) of every file of at least `threshold` bytes below `tree`, largest first. Links are not followed, and virtual
    environments below it are left out: their libraries belong there."""
    found = []
    walk = os.walk(tree, followlinks=False)
    for folder, inside, names in tqdm(walk, desc=f"scanning {tree}", unit=" folders", delay=3, leave=False):
        if "pyvenv.cfg" in names and Path(folder) != Path(tree):
            inside.clear()
            continue
        for name in names:
            path = Path(folder) / name
            try:
                size = path.lstat().st_size
            except OSError:
                continue  # it vanished, or may not be read
            if size >= threshold:
                found.append((path, size))
    return sorted(found, key=lambda item: -item[1])


def own_tree() -> Path:
    """The source tree that this vlakeep runs from: its checkout, or the installed package."""
    return PACKAGE.parent if (PACKAGE.parent / "pyproject.toml").is_file() else PACKAGE


def code_trees(start: Optional[Path] = None, more: Optional[str] = None) -> List[Path]:
    """What the self-check scans: vlakeep's own tree, the git work tree of the current folder, the folder `more`, and /workspace; the last
    two if they exist."""
    trees = [own_tree()]
    here = Path(start or Path.cwd()).resolve()
    trees += [folder for folder in (here, *here.parents) if (folder / ".git").exists()][:1]
    trees += [Path(more).expanduser().resolve()] if more and Path(more).expanduser().is_dir() else []
    trees += [WORKSPACE.resolve()] if WORKSPACE.is_dir() else []
    trees = list(dict.fromkeys(trees))
    return [tree for tree in trees if not any(_below(tree, other) for other in trees if other != tree)]
