"""A folder of artefacts of the teacher: files, and a meta.json that holds the hash of each; written at once, verified when read."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

from vlakeep.core.log import log
from vlakeep.core.names import HASH
from vlakeep.core.storage import atomic_dir

QUANTISATION = "none"  # of the base's weights, where a meta.json says nothing of it


class ArtifactError(ValueError):
    """An artefact that is missing, damaged, or of another model, probe or layer map."""


def of_weights(folder: Path, weights_sha256: Optional[str], chosen: bool = False) -> Path:
    """`folder`, or FOLDER-<hash> where that is, or has to be, the place of these base weights, since another model of the name has the
    plain one. chosen: the user has named the folder, who may replace what is in it."""
    if chosen or weights_sha256 is None:
        return folder
    own = folder.with_name(f"{folder.name}-{weights_sha256[:HASH]}")
    if (own / "meta.json").is_file():
        return own
    try:
        made = json.loads((folder / "meta.json").read_text())["weights_sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return folder
    return folder if made == weights_sha256 else own


def _meta_hash(meta: dict) -> str:
    """Of all but itself."""
    told = {key: value for key, value in meta.items() if key != "meta_sha256"}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def write_folder(folder: Path, contents: Dict[str, bytes], meta: dict) -> None:
    """The files of `contents` and meta.json, which gets their hashes as `files`."""
    files = {name: hashlib.sha256(data).hexdigest() for name, data in sorted(contents.items())}
    meta = dict(meta, files=files)
    text = json.dumps({**meta, "meta_sha256": _meta_hash(meta)}, indent=1, sort_keys=True) + "\n"
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
    if "meta_sha256" in meta and meta["meta_sha256"] != _meta_hash(meta):  # those of older versions have none
        raise ArtifactError(f"{path} is damaged (it is not what was written): rebuild the artefact with `vlakeep offline`")
    missing = [key for key in needed if key not in meta]
    if missing:
        raise ArtifactError(f"{path} is damaged (it lacks {', '.join(missing)}): rebuild the artefact with `vlakeep offline`")
    return meta


def numerics(settings) -> Dict[str, str]:
    """How a model computes, as the backbone section of a configuration says; meta.json records it under these names."""
    return {"dtype": settings.dtype, "quantisation": settings.quantisation, "attn_implementation": settings.attn_implementation}


def numeric_problems(folder: Path, meta: dict, dtype: str, quantisation: str = QUANTISATION) -> List[str]:
    """Why an artefact was made with other numbers than those of this run's base weights, one line each."""
    found, remedy = [], "run `vlakeep offline` with this configuration"
    if meta["dtype"] != dtype:
        found.append(f"{folder} was made with {meta['dtype']} weights, this run has {dtype} ones: {remedy}")
    made = meta.get("quantisation", QUANTISATION)
    if made != quantisation:
        found.append(f"{folder} was made with weights quantised as {made}, this run as {quantisation}: {remedy}")
    return found


def recorded_problems(folder: Path, meta: dict, recorded: Dict[str, Any]) -> List[str]:
    """Why an artefact was made by a model that works otherwise (models/base.py:Backbone.recorded), one line each."""
    return [f"{folder} was made with --backbone.{key} {meta.get(key)}, this run has {value}: run `vlakeep offline` with this configuration"
            for key, value in recorded.items() if meta.get(key) != value]


def attention_note(folder: Path, meta: dict, settings) -> str:
    """A line when teacher and run use two attention implementations; empty otherwise.

    It is said and not refused. All of them compute the same function and differ by rounding, as one does between batch shapes and devices,
    which no artefact is refused for either; and who has the artefact of one machine may lack flash-attention on another. dtype and
    quantisation change the function itself, so that numeric_problems refuses those. docs/log.md has how far the answers move.
    """
    made = meta.get("attn_implementation", settings.attn_implementation)
    if made == settings.attn_implementation:
        return ""
    return (f"note: {folder} was made with attn_implementation {made}, this run uses {settings.attn_implementation}; they agree up to "
            "rounding, which a divergence near zero shows")


def note_attention(folder: Path, meta: dict, settings) -> None:
    """Log the attention_note, if there is one."""
    if note := attention_note(folder, meta, settings):
        log.warning(note)


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
