"""The artefact of the graded method, `artifacts/graded_<backbone>/`: what the frozen teacher's inputs look like and what it answers.

    spectrum.safetensors   <input>.vectors [D, K], .values [K], .rest [1] of every distinct input of an adapted linear (spectrum.py)
    answers.safetensors    the teacher's answers to the held-out probe items, and their item numbers (answers.py)
    energy.safetensors     <group>/<input> [K + 1]: energy of each group of prompts along the directions (coverage.py)
    sensitivity.safetensors  <linear> [1]: mean square gradient of the teacher's answers at the linear's output
    coverage.json          the coverage report in numbers
    meta.json              how it was made, for which weights, probe and layers, and the hash of every file
"""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from vlakeep.storage import atomic_dir
from vlakeep.teacher.answers import Answered
from vlakeep.teacher.spectrum import Spectrum, from_tensors

FORMAT = 1
_NEEDED = ("weights_sha256", "probe_sha256", "probe_items", "depth", "dtype", "config", "lora", "files")


class GradedArtifactError(ValueError):
    """An artefact that is missing, damaged, or of another model or probe."""


def artifact_name(backbone_name: str) -> str:
    return "graded_" + re.sub(r"[^A-Za-z0-9.-]+", "-", Path(backbone_name).name)


def write(folder: Path, tensors: Dict[str, Dict[str, torch.Tensor]], coverage: dict, meta: dict) -> None:
    """Write the folder at once; `tensors` maps the stem of a file to its content."""
    contents = {f"{stem}.safetensors": save({name: t.contiguous() for name, t in sorted(content.items())})
                for stem, content in tensors.items()}
    contents["coverage.json"] = (json.dumps(coverage, indent=1) + "\n").encode()
    meta = dict(meta, format=FORMAT, files={name: hashlib.sha256(data).hexdigest() for name, data in sorted(contents.items())})
    contents["meta.json"] = (json.dumps(meta, indent=1, sort_keys=True) + "\n").encode()
    with atomic_dir(folder) as temporary:
        for name, data in contents.items():
            (Path(temporary) / name).write_bytes(data)


@dataclass
class GradedArtifact:
    """A loaded artefact folder; every file is verified when it is read."""

    folder: Path
    meta: dict

    def _read(self, name: str) -> Dict[str, torch.Tensor]:
        path = self.folder / name
        if not path.is_file():
            raise GradedArtifactError(f"{path} is missing: rebuild the artefact with `vlakeep offline`")
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != self.meta["files"].get(name):
            raise GradedArtifactError(f"{path} is damaged (its hash differs from meta.json): rebuild the artefact with `vlakeep offline`")
        try:
            return load(data)
        except SafetensorError as error:
            raise GradedArtifactError(f"{path} cannot be read ({error}): rebuild the artefact with `vlakeep offline`") from error

    def spectra(self) -> Dict[str, Spectrum]:
        return from_tensors(self._read("spectrum.safetensors"))

    def sensitivity(self) -> Dict[str, float]:
        return {name: float(value) for name, value in self._read("sensitivity.safetensors").items()}

    def answers(self) -> tuple:
        """(Answered, probe item numbers of its rows)."""
        tensors = self._read("answers.safetensors")
        items = tensors.pop("items").tolist()
        return Answered(**{name: tensors[name] for name in Answered._fields}), items


def load_artifact(folder: Path) -> GradedArtifact:
    folder = Path(folder)
    path = folder / "meta.json"
    if not path.is_file():
        raise GradedArtifactError(f"no artefact of the graded method at {folder}: make it with `vlakeep offline --config ...`")
    try:
        meta = json.loads(path.read_text())
    except ValueError as error:
        raise GradedArtifactError(f"{path} is damaged ({error}): rebuild the artefact with `vlakeep offline`") from error
    form = meta.get("format") if isinstance(meta, dict) else None
    if form != FORMAT:
        raise GradedArtifactError(f"{path} has format {form}, this version reads {FORMAT}: rebuild it with `vlakeep offline`")
    missing = [key for key in _NEEDED if key not in meta]
    if missing:
        raise GradedArtifactError(f"{path} is damaged (it lacks {', '.join(missing)}): rebuild the artefact with `vlakeep offline`")
    return GradedArtifact(folder, meta)


def check(artifact: GradedArtifact, weights_hash: str, probe_hash: str, probe_size: int, depth: int, dtype: str,
          section: dict) -> List[str]:
    """Why this artefact does not fit the run: one line per mismatch with the remedy; empty when it fits.

    `section` holds the fields of the configuration that decide the numbers.
    """
    meta, remedy, found = artifact.meta, "run `vlakeep offline` with this configuration", []
    for what, made, wanted in (("other base weights", meta["weights_sha256"][:12], weights_hash[:12]),
                               ("another probe", meta["probe_sha256"][:12], probe_hash[:12]),
                               ("another number of decoder layers", meta["depth"], depth),
                               ("another number of probe items", meta["probe_items"], probe_size),
                               ("another data type of the base", meta["dtype"], dtype)):
        if made != wanted:
            found.append(f"{artifact.folder} was made for {what} ({made}, this run has {wanted}): {remedy}")
    for key, value in section.items():
        if meta["config"].get(key) != value:
            found.append(f"{artifact.folder} was made with gains.{key} {meta['config'].get(key)}, this run asks for {value}: {remedy}")
    return found
