"""What trial records must have in common to be of one evaluation: weights, how the model computes, and the benchmark's own identity."""

import hashlib
import json
from typing import Dict, Optional

from vlakeep.benchmarks.base import Benchmark
from vlakeep.benchmarks.policy import Target
from vlakeep.core.config import Config, to_dict


def model_settings(backbone, config: Config, key: Optional[str], old_key: Optional[str] = None) -> Dict:
    """What beside the weights decides about the actions: how the model computes, and how they are un-normalised."""
    key = backbone.action_key(key)
    old_key, chunk = old_key or key, backbone.processor.spec.chunk

    def identity(own: str) -> str:
        return hashlib.sha256(json.dumps(backbone.action_statistics(own), sort_keys=True).encode()).hexdigest()

    return {"unnorm_key": key, "statistics": identity(key), **computing(config),
            **({"chunk": min(chunk, config.evaluate.chunk or chunk)} if chunk > 1 else {}),
            **({"old_unnorm_key": old_key, "old_statistics": identity(old_key)} if old_key != key else {})}


def computing(config: Config) -> Dict:
    """How the model computes."""
    said = config.backbone
    return {"dtype": said.dtype, "attn_implementation": said.attn_implementation, "source": said.source}


def make_header(benchmark: Benchmark, target: Target) -> Dict:
    """What records must have in common to be of one evaluation."""
    settings = {key: value for key, value in to_dict(benchmark.settings).items() if key in benchmark.decides}
    model = {}
    if target.backbone is not None:
        model = {"model": model_settings(target.backbone, benchmark.config, target.key, benchmark.old_key(target.known))
                 if benchmark.acts else computing(benchmark.config)}
    return {"weights": target.weights, "base": target.base, "evaluate": settings, **model, **benchmark.identity()}
