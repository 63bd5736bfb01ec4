"""The artefact of the graded method, `artifacts/graded_<backbone>/`: what the frozen teacher's inputs look like and what it answers.

    spectrum.safetensors   <input>.vectors [D, K], .values [K], .rest [1] of every distinct input of an adapted linear (spectrum.py)
    answers.safetensors    the teacher's answers to the held-out probe items, and their item numbers (answers.py)
    energy.safetensors     <group>/<input> [K + 1]: energy of each group of prompts along the directions (coverage.py)
    sensitivity.safetensors  <linear> [1]: mean square gradient of the teacher's answers at the linear's output
    coverage.json          the coverage report in numbers
    meta.json              how it was made, for which weights, probe and layers, and the hash of every file
"""

import json
import re
from pathlib import Path
from typing import Dict, List

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from vlakeep.teacher.answers import Answered
from vlakeep.teacher.folder import QUANTISATION, ArtifactError, ArtifactFolder, numeric_problems, read_meta, write_folder
from vlakeep.teacher.spectrum import Spectrum, from_tensors

FORMAT = 1
OLDER = {"tokens_generated": True}  # what artefacts have been made with that do not say it
_NEEDED = ("weights_sha256", "probe_sha256", "probe_items", "depth", "dtype", "config", "lora", "files")


def artifact_name(backbone_name: str) -> str:
    return "graded_" + re.sub(r"[^A-Za-z0-9.-]+", "-", Path(backbone_name).name)


def write(folder: Path, tensors: Dict[str, Dict[str, torch.Tensor]], coverage: dict, meta: dict) -> None:
    """Write the folder at once; `tensors` maps the stem of a file to its content."""
    contents = {f"{stem}.safetensors": save({name: t.contiguous() for name, t in sorted(content.items())})
                for stem, content in tensors.items()}
    contents["coverage.json"] = (json.dumps(coverage, indent=1) + "\n").encode()
    write_folder(folder, contents, dict(meta, format=FORMAT))


class GradedArtifact(ArtifactFolder):
    """A loaded artefact folder; every file is verified when it is read."""

    def _read(self, name: str) -> Dict[str, torch.Tensor]:
        try:
            return load(self.read(name))
        except SafetensorError as error:
            raise ArtifactError(f"{self.folder / name} cannot be read ({error}): rebuild the artefact with `vlakeep offline`") from error

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
    return GradedArtifact(Path(folder), read_meta(folder, "no artefact of the graded method at", FORMAT, _NEEDED))


def check(artifact: GradedArtifact, weights_hash: str, probe_hash: str, probe_size: int, depth: int, dtype: str,
          section: dict, quantisation: str = QUANTISATION) -> List[str]:
    """Why this artefact does not fit the run: one line per mismatch with the remedy; empty when it fits.

    `section` holds the fields of the configuration that decide the numbers; dtype and quantisation are those of the base weights.
    """
    meta, remedy, found = artifact.meta, "run `vlakeep offline` with this configuration", []
    for what, made, wanted in (("other base weights", meta["weights_sha256"][:12], weights_hash[:12]),
                               ("another probe", meta["probe_sha256"][:12], probe_hash[:12]),
                               ("another number of decoder layers", meta["depth"], depth),
                               ("another number of probe items", meta["probe_items"], probe_size)):
        if made != wanted:
            found.append(f"{artifact.folder} was made for {what} ({made}, this run has {wanted}): {remedy}")
    found += numeric_problems(artifact.folder, meta, dtype, quantisation)
    for key, value in section.items():
        made = meta["config"].get(key, OLDER.get(key))
        if made != value:
            where = "icsm" if key in OLDER else "gains"
            found.append(f"{artifact.folder} was made with {where}.{key} {made}, this run asks for {value}: {remedy}")
    return found
