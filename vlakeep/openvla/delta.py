"""Stage `vlakeep base-delta`: the difference of a trained base from its public parts as a small file, and the base from parts and file.

    cd $VLAKEEP_ROOT
    vlakeep base-delta make --parts hf_cache/midsize-parts --trained midsize-trained --delta midsize-delta.safetensors
    vlakeep base-delta apply --parts hf_cache/midsize-parts --delta midsize-delta.safetensors --out hf_cache/midsize-base

What stands for a tensor is chosen by error per byte, whatever trained it:

    whole    the projector, a tensor of less than SMALL values, or rows of one of which most are as they were: what was trained, in bfloat16
    low      a matrix: the k directions of its difference with the most energy, 8 bits a number, a scale for every row and column
    full     a matrix of which so many directions would be kept that 8 bits for each weight are less

Directions of all matrices compete for the bytes; those of less energy than the rounding are left out. The product of 8-bit numbers is a sum
of integers, exact in float32 in any order, and the rest is done number by number, so that the base is the same to the bit on any machine:
the file holds its hash. Of the parts, tensors and rows that are replaced are not asked about, since some are computed (positions, means).

reads:  PARTS/, and to make a file TRAINED/ (float32)
writes: DELTA, or OUT/ in bfloat16, with PROVENANCE.json

Axes: O outputs, I inputs of a linear (a convolution's are flattened), K kept directions.
"""

import hashlib
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from vlakeep.core.checkpoint import file_sha256
from vlakeep.core.config import ConfigError
from vlakeep.core.errors import CheckpointError
from vlakeep.core.options import read
from vlakeep.core.provenance import library_versions, source_commit
from vlakeep.core.storage import Storage, atomic_dir, atomic_path
from vlakeep.models.files import hash_of, read_statistics, read_tensors, weight_files, write_json, write_weights
from vlakeep.models.load import model_class
from vlakeep.openvla.stages import DELTA

FORMAT = 1
SMALL = 65_536  # values of a tensor that is stored whole, changed or not
DRAWN = "projector."  # of tensors that no part holds: another machine may draw other last bits, so these are stored whole too
FEW_ROWS = 0.5  # share of a matrix's rows up to which only these are stored
ROUNDING = 2e-3  # of a difference's norm: what the kept directions may leave
LEVELS = 127
SCALE = 4  # bytes of a row's or a column's
ROOM = 300_000  # bytes for names and facts
Tensors = Dict[str, torch.Tensor]


class Spectrum(NamedTuple):
    """What of a matrix's difference may be kept: energies of its directions, largest first, and the bytes of one."""

    energy_K: torch.Tensor  # float64
    bytes: int
    values: int

    @property
    def needed(self) -> int:
        """Directions behind which less than ROUNDING is left."""
        left_K = self.energy_K.flip(0).cumsum(0).flip(0)
        return int((left_K > ROUNDING ** 2 * self.energy_K.sum()).sum())


def main(argv: List[str]) -> int:
    args, config = read(DELTA, argv)
    needed = "trained" if args.what == "make" else "out"
    if getattr(args, needed) is None:
        raise ConfigError(f"vlakeep base-delta {args.what} needs --{needed}")
    storage = Storage.from_config(config)
    storage.guard_write(args.delta if args.what == "make" else args.out, what="difference" if args.what == "make" else "base model")
    if args.what == "apply":
        print(f"wrote {args.out}: weights {apply(args.parts, args.delta, args.out)[:16]}")
        return 0
    rows = make(args.parts, args.trained, args.delta, args.megabytes)
    for row in rows:
        print(f"  {row['kind']:22s} {row['how']:5s} {row['tensors']:4d} tensors  {row['bytes'] / 1e6:7.2f} MB  left out "
              f"{row['error']:.4f} of the difference")
    print(f"wrote {args.delta}: {args.delta.stat().st_size / 1e6:.1f} MB")
    return 0


# Make


def make(parts: Path, trained: Path, file: Path, megabytes: float) -> List[Dict]:
    """Write the file; what each kind of tensor takes and leaves out. CheckpointError for models of other tensors, ValueError when what must
    be whole is larger than `megabytes`."""
    before, after = dict(read_tensors(weight_files(parts))), dict(read_tensors(weight_files(trained)))
    odd = sorted(name for name in before.keys() | after.keys()
                 if name not in before or name not in after or before[name].shape != after[name].shape)
    if odd:
        raise CheckpointError(f"{trained} was not trained from {parts}: {len(odd)} tensors differ in name or shape, first {odd[0]}")
    stored: Tensors = {}
    spectra: Dict[str, Spectrum] = {}
    used, starts = {}, {}
    for name in tqdm(sorted(before), desc="spectra", mininterval=2.0):
        old, new = before[name], after[name]
        if new.numel() < SMALL or name.startswith(DRAWN):
            stored[f"{name}:whole"] = new.to(torch.bfloat16)
            continue
        rows = (flat(old) != flat(new)).any(1).nonzero()[:, 0]
        if not len(rows):
            used[name] = digest(old)
        elif len(rows) <= FEW_ROWS * len(old):
            first, last = int(rows[0]), int(rows[-1]) + 1
            stored[f"{name}:whole"], starts[name] = new[first:last].to(torch.bfloat16), [first, last]
            used[name] = digest(torch.cat([old[:first], old[last:]]))
        else:
            spectra[name], used[name] = spectrum(flat(new).float() - flat(old).float()), digest(old)
    room = megabytes * 1e6 - sum(tensor.nbytes for tensor in stored.values()) - ROOM
    if room < 0:
        raise ValueError(f"--megabytes {megabytes}: what is stored whole takes {sum(t.nbytes for t in stored.values()) / 1e6:.1f}")
    errors: Dict[str, Tuple[float, float]] = {}
    for name, kept in tqdm(chosen(spectra, int(room)).items(), desc="directions", mininterval=2.0):
        change_OI = flat(after[name]).float() - flat(before[name]).float()
        energy = float(change_OI.square().sum())
        errors[name] = (energy, energy)
        if kept:
            found = in_full(change_OI) if kept * spectra[name].bytes >= spectra[name].values else in_directions(change_OI, kept)
            stored.update({f"{name}:{part}": tensor for part, tensor in found.items()})
            errors[name] = (float((change_OI - restored(found)).square().sum()), energy)
    stored = {name: tensor.contiguous() for name, tensor in stored.items()}
    table = summary(stored, errors)
    provenance = trained / "PROVENANCE.json"
    facts: Dict[str, Any] = {
        "format": FORMAT, "parts": used, "rows": starts, "table": table, "commit": source_commit(),
        "statistics": read_statistics(trained, json.loads((trained / "config.json").read_text())),
        "made": json.loads(provenance.read_text()) if provenance.is_file() else None}
    facts["result"] = weights_of(patched_all(before, stored, starts))
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(file) as partial:
        save_file(stored, str(partial), metadata={"facts": json.dumps(facts)})  # two entries would be written in any order
    return table


def flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flatten(1) if tensor.ndim > 1 else tensor[:, None]


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()


def spectrum(change_OI: torch.Tensor) -> Spectrum:
    energy_K = torch.linalg.eigvalsh(_gram(change_OI)).flip(0).clamp(min=0)
    return Spectrum(energy_K, sum(change_OI.shape), change_OI.numel())


def _gram(change_OI: torch.Tensor) -> torch.Tensor:
    """Of the shorter side, float64."""
    wide = change_OI if change_OI.shape[0] <= change_OI.shape[1] else change_OI.T
    return wide.double() @ wide.double().T


def chosen(spectra: Dict[str, Spectrum], room: int) -> Dict[str, int]:
    """How many directions of each matrix are kept: those with the most energy a byte, as long as there is room."""
    offers = [(float(one.energy_K[k]) / one.bytes, name, one.bytes) for name, one in spectra.items() for k in range(one.needed)]
    kept = dict.fromkeys(spectra, 0)
    for _, name, size in sorted(offers, key=lambda offer: (-offer[0], offer[1])):
        full = spectra[name].values
        cost = min(size, max(0, full - kept[name] * size))  # no matrix takes more than 8 bits a weight
        cost += 0 if kept[name] else SCALE * size
        if cost <= room:
            room -= cost
            kept[name] += 1
    return kept


def in_directions(change_OI: torch.Tensor, kept: int) -> Tensors:
    wide = change_OI.shape[0] <= change_OI.shape[1]
    matrix = (change_OI if wide else change_OI.T).double()
    energy_K, vectors = torch.linalg.eigh(_gram(change_OI))
    root_K = energy_K[-kept:].clamp(min=1e-30) ** 0.25
    left = vectors[:, -kept:] * root_K
    right = (vectors[:, -kept:] / root_K).T @ matrix
    b_OK, a_KI = (left, right) if wide else (right.T, left.T)
    (b, b_scale), (a, a_scale) = rounded(b_OK, 1), rounded(a_KI, 0)
    return {"b": b, "b_scale": b_scale[:, 0], "a": a, "a_scale": a_scale[0]}


def in_full(change_OI: torch.Tensor) -> Tensors:
    full, scale = rounded(change_OI.double(), 1)
    return {"full": full, "scale": scale[:, 0]}


def rounded(matrix: torch.Tensor, axis: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """(int8, float32 scale for everything along `axis`)."""
    scale = (matrix.abs().amax(axis, keepdim=True) / LEVELS).float()
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return (matrix / scale.double()).round().clamp(-LEVELS, LEVELS).to(torch.int8), scale


def summary(stored: Tensors, errors: Dict[str, Tuple[float, float]]) -> List[Dict]:
    """By the last parts of the tensors' names, and how they are stored."""
    groups: Dict[Tuple[str, str], Dict[str, Any]] = {}
    nothing = {f"{name}:none": torch.zeros(0, 0) for name in errors.keys() - by_tensor(stored).keys()}
    for key, tensor in {**stored, **nothing}.items():
        name, _, part = key.rpartition(":")
        how = {"whole": "whole", "full": "full", "scale": "full", "none": "none"}.get(part, "low")
        kind = f"{name.split('_')[0].split('.')[0]} {name.split('.')[-2]}" if how != "whole" or tensor.ndim > 1 else "small ones"
        group = groups.setdefault((kind, how), {"names": set(), "bytes": 0})
        group["names"].add(name)
        group["bytes"] += tensor.nbytes
    rows = []
    for (kind, how), group in sorted(groups.items()):
        lost, whole = (sum(errors[name][i] for name in group["names"] if name in errors) for i in (0, 1))
        rows.append({"kind": kind, "how": how, "tensors": len(group["names"]), "bytes": group["bytes"],
                     "error": round((lost / whole) ** 0.5, 5) if whole else 0.0})
    return rows


# Apply


def restored(found: Tensors) -> torch.Tensor:
    """The difference [O, I] in float32: exact sums of integers, below 2^24 for up to 1,040 directions, and two products a number."""
    if "full" in found:
        return found["full"].float() * found["scale"][:, None]
    assert found["a"].shape[0] * LEVELS ** 2 < 2 ** 24, "sums of that many directions are not exact in float32"
    return (found["b"].float() @ found["a"].float()) * found["b_scale"][:, None] * found["a_scale"]


def patched(old: torch.Tensor, found: Tensors, rows: Optional[List[int]]) -> torch.Tensor:
    """A tensor of the base in bfloat16."""
    if "whole" in found and rows is None:
        return found["whole"]
    if "whole" in found:
        new = old.to(torch.bfloat16, copy=True)  # the parts stay as they are
        new[rows[0]:rows[1]] = found["whole"]
        return new
    return (old.float() + restored(found).view(old.shape)).to(torch.bfloat16) if found else old.to(torch.bfloat16)


def factors(found: Tensors, rank: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """(b [O, K], a [K, I]) in float32, K <= rank, whose product is the difference: what adapters begin with in a training that goes on. Of
    a matrix that is kept in more directions than `rank`, or as a `change` [O, I], those with the most energy."""
    if "a" in found and found["a"].shape[0] <= rank:
        return found["b"].float() * found["b_scale"][:, None], found["a"].float() * found["a_scale"]
    change_OI = found["change"] if "change" in found else restored(found)
    left, size_K, right = torch.linalg.svd(change_OI, full_matrices=False)
    root_K = size_K[:rank].sqrt()
    return left[:, :rank] * root_K, root_K[:, None] * right[:rank]


def by_tensor(stored: Tensors) -> Dict[str, Tensors]:
    found: Dict[str, Tensors] = defaultdict(dict)
    for key, tensor in stored.items():
        name, _, part = key.rpartition(":")
        found[name][part] = tensor
    return found


def patched_all(before: Tensors, stored: Tensors, rows: Dict[str, List[int]]) -> Tensors:
    found = by_tensor(stored)
    return {name: patched(old, found.get(name, {}), rows.get(name)).contiguous() for name, old in before.items()}


def weights_of(base: Tensors) -> str:
    """files.weights_hash of what `apply` will write, before it is written."""
    return hash_of({name: f"{name} BF16 {list(tensor.shape)} {digest(tensor)}\n" for name, tensor in base.items()})


def read_difference(file: Path) -> Tuple[Dict[str, Any], Tensors]:
    """(facts, tensors by <name of the base's tensor>:<part>). CheckpointError for a file that is damaged or of another format."""
    try:
        with safe_open(str(file), framework="pt") as opened:
            facts = json.loads((opened.metadata() or {})["facts"])
            stored = {name: opened.get_tensor(name) for name in opened.keys()}
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"{file} is no difference of a base ({error!r}): make it with `vlakeep base-delta make`") from error
    if facts.get("format") != FORMAT:
        raise CheckpointError(f"{file} has format {facts.get('format')}, this version reads {FORMAT}")
    return facts, stored


def apply(parts: Path, file: Path, out: Path) -> str:
    """Write the base to the folder `out` and return the hash of its weights. CheckpointError for a file that is damaged, parts of which the
    difference was not taken, and a result that is not the recorded one."""
    facts, stored = read_difference(file)
    state = patched_all(own_parts(parts, file, facts, stored), stored, facts["rows"])
    if weights_of(state) != facts["result"]:
        raise CheckpointError(f"the base out of {parts} and {file} is not the one that was made: the file was changed, or this machine "
                              "computes otherwise")
    with atomic_dir(out) as partial:
        write_weights(partial, state)
        model_class(parts).complete_merged(parts, partial, facts["statistics"], torch.bfloat16)
        write_json(partial / "PROVENANCE.json", {
            "command": "vlakeep base-delta apply --parts PARTS --delta DELTA --out OUT", "delta": file_sha256(file),
            "weights": facts["result"], "made": facts["made"], "made_by": facts["commit"], "versions": library_versions(),
            "commit": source_commit()})
    return facts["result"]


def own_parts(parts: Path, file: Path, facts: Dict[str, Any], stored: Tensors) -> Tensors:
    """The parts' tensors. CheckpointError where they are not those of which the difference was taken, but for what it replaces."""
    before = dict(read_tensors(weight_files(parts)))
    wrong = [name for name, wanted in facts["parts"].items()
             if name not in before or digest(_used(before[name], facts["rows"].get(name))) != wanted]
    lacking = sorted({key.rpartition(":")[0] for key in stored} - before.keys())
    if wrong or lacking:
        raise CheckpointError(f"{parts} are not the parts of which {file} is the difference: {len(wrong + lacking)} tensors are others, "
                              f"first {(wrong + lacking)[0]}: assemble them anew with `vlakeep assemble-openvla`, of the packages it names")
    return before


def _used(tensor: torch.Tensor, rows: Optional[List[int]]) -> torch.Tensor:
    return tensor if rows is None else torch.cat([tensor[:rows[0]], tensor[rows[1]:]])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
