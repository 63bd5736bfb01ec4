"""A folder of artefacts of the teacher: files, and a meta.json that holds the hash of each; written at once, verified when read."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, Sequence

from vlakeep.core.storage import atomic_dir


class ArtifactError(ValueError):
    """An artefact that is missing, damaged, or of another model, probe or layer map."""


def write_folder(folder: Path, contents: Dict[str, bytes], meta: dict) -> None:
    """The files of `contents` and meta.json, which gets their hashes as `files`."""
    files = {name: hashlib.sha256(data).hexdigest() for name, data in sorted(contents.items())}
    text = json.dumps(dict(meta, files=files), indent=1, sort_keys=True) + "\n"
    with atomic_dir(folder) as temporary:
        for name, data in {**contents, "meta.json": text.encode()}.items():
            (Path(temporary) / name).write_bytes(data)


def read_meta(folder: Path, absent: str, form: int, needed: Sequence[str], older: str = "") -> dict:
    """meta.json of a folder in format `form`. Raises ArtifactError: `absent` and the folder when there is none; `older` says what earlier
    formats lack."""
    path = Path(folder) / "meta.json"
    if not path.is_file():
        raise ArtifactError(f"{absent} {folder}: make it with `vlakeep offline --config ...`")
    try:
        meta = json.loads(path.read_text())
    except ValueError as error:
        raise ArtifactError(f"{path} is damaged ({error}): rebuild the artefact with `vlakeep offline`") from error
    found = meta.get("format") if isinstance(meta, dict) else None
    if found != form:
        raise ArtifactError(f"{path} has format {found}, this version reads {form}{older}: rebuild it with `vlakeep offline`")
    missing = [key for key in needed if key not in meta]
    if missing:
        raise ArtifactError(f"{path} is damaged (it lacks {', '.join(missing)}): rebuild the artefact with `vlakeep offline`")
    return meta


@dataclass
class ArtifactFolder:
    """An artefact folder whose meta.json has been read."""

    folder: Path
    meta: dict

    def read(self, name: str) -> bytes:
        """Content of a file. Raises ArtifactError when it is missing or not what was written."""
        path = self.folder / name
        if not path.is_file():
            raise ArtifactError(f"{path} is missing: rebuild the artefact with `vlakeep offline`")
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != self.meta["files"].get(name):
            raise ArtifactError(f"{path} is damaged (its hash differs from meta.json): rebuild the artefact with `vlakeep offline`")
        return data
