"""Which folder the name of a base model means: one that ships, a path, or `owner/name` below the cache; never a guess among several.

    cache_dir/<owner>/<name>/                                   what `vlakeep fetch` writes
    cache_dir/<name>/                                           a folder that someone has put there; its name is all of it
    cache_dir/hub/models--<owner>--<name>/snapshots/<commit>/   the cache of Hugging Face: the commit that refs/main names, or `@commit`

A name means a place and not what is in it: stages compare the hash of the weights (models/files.py).
"""

import re
from pathlib import Path
from typing import List, Optional, Tuple

from vlakeep.core.errors import quoted

PACKAGE = Path(__file__).resolve().parents[1]
SHIPPED = {"tabletop-base": "pretrain-tabletop", "tabletop-pi0": "pretrain-tabletop-pi0"}  # part of the package -> the stage that made it
_OF_THE_HUB = re.compile(r"[\w.-]+(?:/[\w.-]+)?")


class AmbiguousModel(FileNotFoundError):
    """Several folders that a name may mean; the message names them, and what to give instead. No OSError of the system: errno is None."""


def find_checkpoint(name: str, cache: Path) -> Path:
    """Folder of a base model. `owner/name@REVISION` is a snapshot by its commit (or the beginning of it) or by a name in refs/.

    Raises FileNotFoundError with the command that fetches it, AmbiguousModel where several different folders answer to the name.
    """
    cache = Path(cache)
    if name in SHIPPED:
        places = [PACKAGE / "assets" / name]
        remedy = (f"it is part of the package; install vlakeep again, or rebuild it with `vlakeep {quoted(SHIPPED[name])} --out "
                  f"{quoted(places[0])}`")
    else:
        places, remedy = _places(name, cache)
    found: List[Path] = []
    for folder in places:
        if (folder / "config.json").is_file() and not any(folder.resolve() == other.resolve() for other in found):
            found.append(folder)
    if len(found) > 1:
        listed = ", ".join(str(folder.absolute()) for folder in found)
        raise AmbiguousModel(f"several folders answer to the base model {name!r} ({listed}): say which one with its path, such as "
                             f"--backbone.checkpoint {quoted(found[0].absolute())}, or put the others aside")
    if not found:
        _refuse_without_owner(name, cache)
        raise FileNotFoundError(f"no base model {name!r} (looked in {', '.join(dict.fromkeys(str(place) for place in places))}): {remedy}")
    return found[0]


def model_name(folder: Path) -> str:
    """Name of a checkpoint folder; in the hub's cache (models--openvla--openvla-7b/snapshots/<commit>) that of the model."""
    folder = Path(folder).absolute()
    if folder.parent.name == "snapshots":
        return folder.parents[1].name.replace("models--", "").replace("--", "-")
    return folder.name


def name_in_store(checkpoint: str, cache: Path) -> str:
    """model_name of a base model; of one that is not there yet, the name that it will have."""
    try:
        return model_name(find_checkpoint(checkpoint, cache))
    except AmbiguousModel:
        raise
    except FileNotFoundError:
        return Path(checkpoint.partition("@")[0]).name


def model_names(name: str, cache: Path) -> List[str]:
    """What evaluations of a base model may be called by (core/names.py): by its folder, and where it is not here as it was written."""
    try:
        return [model_name(find_checkpoint(name, cache))]
    except (OSError, ValueError):
        written = name.partition("@")[0].rstrip("/")
        return list(dict.fromkeys([written.rpartition("/")[2], written.replace("/", "-").lstrip("-")]))


def _places(name: str, cache: Path) -> Tuple[List[Path], str]:
    """(the folders that a name may mean, what to do when none is there)."""
    given = Path(name).expanduser()
    if given.is_absolute():
        return [given], "give the folder that has config.json with --backbone.checkpoint"
    model, at, revision = name.rpartition("@")
    if not at or not _OF_THE_HUB.fullmatch(model) or (cache / given).exists():
        model, revision = name, ""
    own = [] if revision else [given, cache / given]
    if "/" not in model and not revision:
        # The owner may be left out where only one model is called so.
        own += [folder for folder in sorted(cache.glob(f"*/{_escaped(model)}")) if folder.parent.name != "hub"]
    hub = cache / "hub" / ("models--" + model.replace("/", "--"))
    snapshot = _snapshot(hub, name, revision)
    remedy = (f"fetch it with `vlakeep fetch {quoted(model)}` (HF_ENDPOINT names a mirror)" if model.count("/") == 1 and not revision
              else "give the folder that has config.json with --backbone.checkpoint")
    return [*own, snapshot or hub / "snapshots"], remedy


def _escaped(name: str) -> str:
    return re.sub(r"([\[?*])", r"[\1]", name)


def _snapshot(hub: Path, name: str, revision: str) -> Optional[Path]:
    """The snapshot that is meant: of `revision`, else of refs/main, else the only one. AmbiguousModel where none of these tells."""
    there = sorted(path for path in (hub / "snapshots").glob("*") if (path / "config.json").is_file())
    commits = [path.name for path in there]
    try:
        wanted = (hub / "refs" / (revision or "main")).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        wanted = revision
    fitting = [path for path in there if wanted and path.name.startswith(wanted)]
    exact = [path for path in fitting if path.name == wanted] or fitting
    if len(exact) == 1:
        return exact[0]
    if not there or (not wanted and len(there) == 1):
        return there[0] if there else None
    plain = name.rpartition("@")[0] or name if revision else name
    said = (f"--backbone.checkpoint {quoted(plain + '@' + (revision or wanted))} means none or several of its snapshots" if revision
            else f"{hub / 'refs' / 'main'} names {wanted}, which is not among its snapshots" if wanted
            else f"{hub} has no refs/main, and several snapshots")
    raise AmbiguousModel(f"{said} ({', '.join(commits)}): say which one, such as --backbone.checkpoint {quoted(plain + '@' + commits[0])}")


def _refuse_without_owner(name: str, cache: Path) -> None:
    """AmbiguousModel where a folder has the name but not the owner that is asked for: two owners' models may be called alike."""
    owner, slash, last = name.partition("/")
    folder = cache / last
    if not slash or "/" in last or not owner or owner in (".", "..", "~") or not (folder / "config.json").is_file():
        return
    target = cache / owner
    # A link may be relative, and would point elsewhere from another folder.
    move = f"ln -s {quoted(folder.resolve())} {quoted(target / last)}" if folder.is_symlink() else f"mv {quoted(folder)} {quoted(target)}"
    raise AmbiguousModel(f"no base model {name!r} below {cache} ({folder} does not say whose it is): if it is {owner}'s, "
                         f"`mkdir -p {quoted(target)} && {move}`; to take it as it is, "
                         f"--backbone.checkpoint {quoted(last)}; else `vlakeep fetch {quoted(name)}`")
