"""Stage `vlakeep fetch`: bring a base model from the Hugging Face hub below the storage root, with retries.

    vlakeep fetch openvla/openvla-7b [--root DIR] [--cache_dir DIR]        HF_ENDPOINT=https://hf-mirror.com names a mirror

writes: cache_dir/<owner>/<name>/: config, safetensors, tokenizer and processor files. Pickled weights and code are left where they are. An
interrupted download goes on where it stopped.
"""

import sys
import time
from pathlib import Path
from typing import Callable, List

from vlakeep.core.config import ConfigError
from vlakeep.core.errors import is_disk_full, quoted
from vlakeep.core.options import read
from vlakeep.core.stages import FETCH
from vlakeep.core.storage import Storage

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
                remedy = {401: "log in with `huggingface-cli login`", 403: "ask for access on the model's page", 404: "check the name"}.get(
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


def main(argv: List[str]) -> int:
    args, config = read(FETCH, argv)
    if args.model.count("/") != 1:
        raise ConfigError("vlakeep fetch needs a model of the hub, such as openvla/openvla-7b")
    storage = Storage.from_config(config)
    folder = storage.guard_write(storage.cache / args.model, what="base model")
    path = with_retries(lambda: _download(args.model, folder))
    print(f"fetched {path}; name it with --backbone.checkpoint {quoted(args.model)}")
    return 0


def _download(name: str, folder: Path) -> str:
    from huggingface_hub import snapshot_download

    return snapshot_download(name, local_dir=str(folder), allow_patterns=WANTED)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
