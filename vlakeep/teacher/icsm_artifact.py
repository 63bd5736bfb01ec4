"""ICSM step 4, the artefact folder `artifacts/icms_<backbone>/` (O9), and the check that it belongs to this training run.

    U<l>_f.pt [D, r_f]  U<l>_p.pt [D, r_p]  mu<l>.pt [D]  C_T<l>.pt [D, D]   per representative layer, r_f + r_p = r
    tokens.safetensors   <linear>.p [D_in, K_p], <linear>.values [D_in], and Uf as <linear>.f [D_in, K_f] or, where that is smaller,
                         its complement as <linear>.n [D_in, D_in - K_f - K_p]
    teacher.safetensors  pooled.<l> [N, D], items [N]                         for the paired drift
    meta.json            how it was made, for which weights, probe and layers, and the hash of every file
"""

import io
import re
from pathlib import Path
from typing import Dict, List, Optional

import torch
from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from safetensors.torch import save

from vlakeep.teacher.folder import QUANTISATION, ArtifactError, ArtifactFolder, numeric_problems, read_meta, write_folder

FORMAT = 3
_NEEDED = ("weights_sha256", "dtype", "quantisation", "probe_sha256", "probe_items", "depth", "layers", "layer_map", "config", "files")


def default_layers(depth: int) -> List[int]:
    """Representative layers: L-3 and L-1, so 15 and 17 of 18 layers, 29 and 31 of 32 (O8)."""
    if depth < 4:
        raise ValueError(f"the model has {depth} decoder layers; the two protection groups need at least 4")
    return [depth - 3, depth - 1]


def layer_map(depth: int, representatives: List[int]) -> Dict[int, int]:
    """Protected layer -> representative. Each representative stands for itself and the layer below it."""
    wrong = [layer for layer in representatives if not 0 <= layer < depth]
    if wrong:
        raise ValueError(f"icsm.layers {wrong} out of range: the model has layers 0 to {depth - 1}; choose among them with "
                         f"--icsm.layers, such as '[{depth - 3}, {depth - 1}]'")
    if len(set(representatives)) != len(representatives):
        raise ValueError(f"icsm.layers {representatives} names a layer twice; name each once with --icsm.layers")
    mapping = {}
    for layer in sorted(representatives):
        for member in (layer - 1, layer):
            if member >= 0 and (member not in mapping or member == layer):
                mapping[member] = layer
    return mapping


def artifact_name(backbone_name: str) -> str:
    return "icms_" + re.sub(r"[^A-Za-z0-9.-]+", "-", Path(backbone_name).name)


def _torch_bytes(tensor: torch.Tensor) -> bytes:
    buffer = io.BytesIO()  # to a buffer: a file's own name would go into the archive and change its hash
    torch.save(tensor.contiguous(), buffer)
    return buffer.getvalue()


def write(folder: Path, layers: Dict[int, dict], tokens: Optional[Dict[str, torch.Tensor]], teacher: Dict[str, torch.Tensor],
          meta: dict) -> None:
    """Write the folder at once. `layers[l]` holds U_f, U_p, mu, C_T."""
    contents = {}
    for layer, tensors in layers.items():
        for stem, key in ((f"U{layer}_f", "U_f"), (f"U{layer}_p", "U_p"), (f"mu{layer}", "mu"), (f"C_T{layer}", "C_T")):
            contents[f"{stem}.pt"] = _torch_bytes(tensors[key].float())
    contents["teacher.safetensors"] = save({name: t.contiguous() for name, t in sorted(teacher.items())})
    if tokens is not None:
        contents["tokens.safetensors"] = save({name: t.contiguous() for name, t in sorted(tokens.items())})
    write_folder(folder, contents, dict(meta, format=FORMAT))


class Artifact(ArtifactFolder):
    """A loaded and verified artefact folder."""

    def _read(self, name: str):
        path, data = self.folder / name, self.read(name)
        try:
            return torch.load(io.BytesIO(data), weights_only=True, map_location="cpu") if name.endswith(".pt") else from_bytes(data)
        except (RuntimeError, SafetensorError, EOFError) as error:
            raise ArtifactError(f"{path} cannot be read ({error}): rebuild the artefact with `vlakeep offline`") from error

    @property
    def layers(self) -> List[int]:
        return list(self.meta["layers"])

    @property
    def layer_map(self) -> Dict[int, int]:
        return {int(member): representative for member, representative in self.meta["layer_map"].items()}

    def residual_basis(self, representative: int):
        """(Uf [D, r_f], Up [D, r_p]) of a representative layer."""
        return self._read(f"U{representative}_f.pt"), self._read(f"U{representative}_p.pt")

    def teacher_statistics(self, representative: int):
        """(mu [D], C_T [D, D])."""
        return self._read(f"mu{representative}.pt"), self._read(f"C_T{representative}.pt")

    def teacher_states(self):
        """(pooled [N, D] per representative layer, probe item numbers [N])."""
        tensors = self._read("teacher.safetensors")
        return {layer: tensors[f"pooled.{layer}"] for layer in self.layers}, tensors["items"].tolist()

    def token_bases(self):
        """Linear name -> {"p": Up [D_in, K_p]} and "f": Uf [D_in, K_f] or "n": the complement of both (decompose.token_bases)."""
        if "tokens.safetensors" not in self.meta["files"]:
            raise ArtifactError(f"{self.folder} holds no token-level bases: run `vlakeep offline --icsm.tokens true`")
        tensors = self._read("tokens.safetensors")
        bases = {}
        for name, tensor in tensors.items():
            linear, _, kind = name.rpartition(".")
            if kind != "values":
                bases.setdefault(linear, {})[kind] = tensor
        return bases


def load(folder: Path) -> Artifact:
    older = ", in which the data type of the teacher is recorded"
    return Artifact(Path(folder), read_meta(folder, "no ICSM artefact at", FORMAT, _NEEDED, older))


def check(artifact: Artifact, weights_hash: str, probe_hash: str, icsm_section: dict, depth: int, probe_size: int, dtype: str,
          quantisation: str = QUANTISATION) -> List[str]:
    """Why this artefact does not fit the run: one line per mismatch with the remedy; empty when it fits.

    dtype, quantisation: of the base weights. Attention implementations agree up to rounding (folder.note_attention).
    """
    meta, remedy = artifact.meta, "run `vlakeep offline` with this configuration"
    found = []
    if meta["weights_sha256"] != weights_hash:
        found.append(f"{artifact.folder} was made for other base weights ({meta['weights_sha256'][:12]}, this run loads "
                     f"{weights_hash[:12]}): {remedy}")
    found += numeric_problems(artifact.folder, meta, dtype, quantisation)
    if meta["probe_sha256"] != probe_hash:
        found.append(f"{artifact.folder} was made from another probe ({meta['probe_sha256'][:12]}, this run names "
                     f"{probe_hash[:12]}): {remedy}")
    if meta["depth"] != depth:
        found.append(f"{artifact.folder} was made for {meta['depth']} decoder layers, this model has {depth}: {remedy}")
    if meta["probe_items"] != probe_size:
        found.append(f"{artifact.folder} was made from {meta['probe_items']} probe items, this run asks for {probe_size}: {remedy}")
    recorded = meta["config"]
    for key, value in icsm_section.items():
        if key in ("name", "batch_size", "answered", "moments_gib"):  # neither changes the numbers' meaning
            continue
        wanted = default_layers(depth) if key == "layers" and value is None else value
        made = default_layers(meta["depth"]) if key == "layers" and recorded.get(key) is None else recorded.get(key)
        if wanted != made:
            found.append(f"{artifact.folder} was made with icsm.{key} {made}, this run asks for {wanted}: {remedy}")
    return found
