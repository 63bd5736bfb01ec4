"""Stage `vlakeep fetch`: bring a base model or a data set from the Hugging Face hub below the storage root, with retries.

    vlakeep fetch openvla/openvla-7b [--root DIR] [--cache_dir DIR]        HF_ENDPOINT=https://hf-mirror.com names a mirror
    vlakeep fetch --dataset openvla/modified_libero_rlds --only libero_spatial_no_noops,libero_object_no_noops

writes: cache_dir/<owner>/<name>/: config, safetensors, tokenizer and processor files. Pickled weights and code are left where they are.
        data_root_dir/<name>/, or with --only each folder of a collection as data_root_dir/<folder>/
        .fetched/<owner>--<name>....json beside them, the mark that all is there: its commit and files, written last

An interrupted download goes on where it stopped, by the same command. What the mark names and is whole is not asked for again.
"""

import json
import sys
import time
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Tuple

from vlakeep.core.config import ConfigError
from vlakeep.core.errors import is_disk_full, quoted
from vlakeep.core.options import read
from vlakeep.core.stages import FETCH
from vlakeep.core.storage import Storage, atomic_write, need_free

TRIES, FIRST_WAIT_S = 6, 5.0
WANTED = ["*.json", "*.safetensors", "tokenizer.model", "*.txt"]


def with_retries(work: Callable, tries: int = TRIES, first_wait_s: float = FIRST_WAIT_S, sleep: Callable[[float], None] = time.sleep):
    """work(), tried again after a failure of the network, each wait twice the last. Raises the last failure with what to do."""
    failures = _network_errors()
    for number in range(1, tries + 1):
        try:
            return work()
        except failures as error:
            if is_disk_full(error):
                raise
            status = getattr(getattr(error, "response", None), "status_code", None)
            if status in (401, 403, 404) or number == tries:
                remedy = {401: "log in with `huggingface-cli login`", 403: "ask for access on its page", 404: "check the name"}.get(
                    status, "check the network, or name a mirror with HF_ENDPOINT")
                raise ConnectionError(f"{error} (try {number} of {tries}): {remedy}") from error
            wait = first_wait_s * 2 ** (number - 1)
            print(f"try {number} of {tries} failed ({type(error).__name__}); again in {wait:.0f} s", file=sys.stderr, flush=True)
            sleep(wait)


def _network_errors() -> tuple:
    """What a failing network raises: OSError covers requests, which older versions of the hub's library use; newer ones use httpx."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        from httpx import HTTPError
    except ImportError:
        return OSError, HfHubHTTPError
    return OSError, HfHubHTTPError, HTTPError


class Wanted(NamedTuple):
    """What is brought: files of a repository of the hub that fit one of the patterns, to a folder as they lie there."""

    kind: str  # model or dataset
    name: str
    folder: Path
    patterns: List[str]
    cache: Path
    mark: Path


def main(argv: List[str]) -> int:
    args, config = read(FETCH, argv)
    name = args.dataset or args.model or ""
    if (args.dataset is None) == (args.model is None) or name.count("/") != 1 or not all(name.split("/")):
        raise ConfigError("vlakeep fetch needs a model of the hub, such as openvla/openvla-7b, or --dataset OWNER/NAME")
    if args.only and args.model:
        raise ConfigError("--only takes folders of a --dataset")
    storage = Storage.from_config(config)
    for wanted in [_model(name, storage)] if args.model else _datasets(name, args.only, storage):
        print(f"fetched {wanted.folder}" if bring(wanted) else f"{wanted.folder} is there")
    print(f"name it with --backbone.checkpoint {quoted(name)}" if args.model else
          f"name it with --data.datasets {quoted('[' + ', '.join(args.only or [name.split('/')[1]]) + ']')}")
    return 0


def _mark(folder: Path, *words: str) -> Path:
    return folder / ".fetched" / ("--".join(words).replace("/", "--") + ".json")


def _model(name: str, storage: Storage) -> Wanted:
    folder = storage.guard_write(storage.cache / name, what="base model")
    return Wanted("model", name, folder, WANTED, storage.cache, _mark(storage.cache, name))


def _datasets(name: str, only: List[str], storage: Storage) -> List[Wanted]:
    if not only:
        folder = storage.guard_write(storage.data / name.split("/")[1], what="data set")
        return [Wanted("dataset", name, folder, ["*"], storage.cache, _mark(storage.data, name))]
    odd = [word for word in only if "/" in word or word.startswith(".")]
    if odd:
        raise ConfigError(f"--only {odd[0]}: must be a folder at the top of the data set, such as libero_spatial_no_noops")
    for word in only:
        storage.guard_write(storage.data / word, what="data set")
    return [Wanted("dataset", name, storage.data, [f"{word}/*"], storage.cache, _mark(storage.data, name, word)) for word in only]


def bring(wanted: Wanted) -> bool:
    """Whether anything had to be fetched. ConfigError where the repository holds nothing of it, ConnectionError where the network fails."""
    try:
        marked = json.loads(wanted.mark.read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError):
        marked = None
    if marked and not _lacking(wanted.folder, marked):
        return False
    commit, files = with_retries(lambda: _fetch(wanted))
    wanted.mark.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(wanted.mark, "w") as file:
        json.dump({"name": wanted.name, "commit": commit, "files": files}, file, indent=1)
    return True


def _fetch(wanted: Wanted) -> Tuple[str, Dict[str, int]]:
    """One try: (commit, bytes of each file). What the hub lists is compared with what lies there: without a network the library takes a
    folder that is there for the whole."""
    commit, there = _listing(wanted.kind, wanted.name)
    files = {path: size for path, size in there.items() if any(fnmatch(path, pattern) for pattern in wanted.patterns)}
    if not files:
        raise ConfigError(f"{wanted.kind} {wanted.name} of the hub has no {' or '.join(wanted.patterns)}; at its top are "
                          f"{', '.join(sorted({path.split('/')[0] for path in there})) or 'no files'}")
    need_free(wanted.folder, sum(files[path] or 0 for path in _lacking(wanted.folder, files)), wanted.name)
    _download(wanted, commit)
    lacking = _lacking(wanted.folder, files)
    if lacking:
        raise ConnectionError(f"{len(lacking)} of {len(files)} files of {wanted.name} did not come whole, first {lacking[0]}")
    return commit, files


def _lacking(folder: Path, files: Dict[str, int]) -> List[str]:
    """Files that are not there, or have another size."""
    return [path for path, size in files.items()
            if not (folder / path).is_file() or (size is not None and (folder / path).stat().st_size != size)]


def _listing(kind: str, name: str) -> Tuple[str, Dict[str, int]]:
    """(commit, bytes of each file or None) of a repository of the hub."""
    from huggingface_hub import HfApi

    info: Any = HfApi().repo_info(name, repo_type=kind, files_metadata=True)
    return info.sha, {file.rfilename: file.size for file in info.siblings}


def _download(wanted: Wanted, commit: str) -> None:
    from huggingface_hub import snapshot_download

    snapshot_download(wanted.name, repo_type=wanted.kind, revision=commit, local_dir=str(wanted.folder),
                      cache_dir=str(wanted.cache / "hub"), allow_patterns=wanted.patterns)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
