"""What a value of the configuration may be: said where its field stands, as `rate: float = above(5e-4)`; and the rules between fields.

What is wrong is collected, not raised.
"""

import math
import re
from dataclasses import field, fields
from operator import attrgetter
from typing import Any, Callable, Dict, List

from vlakeep.core import schema
from vlakeep.core.registry import benchmark_class, benchmark_names, method_class, method_names

# Fields


def limited(default, ok: Callable[[Any], bool], allowed: str) -> Any:
    """A field whose value must pass `ok`; `allowed` says in words what does."""
    return field(default=default, metadata={"ok": ok, "allowed": allowed})


def choice(*values) -> Any:
    """One of these; the first is the default."""
    return limited(values[0], lambda value: value in values, "one of " + ", ".join("null" if value is None else value for value in values))


def least(default, low: int = 1, note: str = "") -> Any:
    return limited(default, lambda value: value >= low, f"at least {low}{note}")


def from_zero(default) -> Any:
    return limited(default, lambda value: value >= 0, "0 or more")


def above(default, low: int = 0, null: str = "") -> Any:
    """Greater than `low`; `null`, if given, goes on in the sentence and admits null too."""
    return limited(default, lambda value: bool(null) if value is None else value > low, f"greater than {low}{null}")


def inside(default, interval: str, note: str = "") -> Any:
    """In an interval such as [0, 1) or (0, 1]."""
    low, high = (float(end) for end in interval[1:-1].split(","))

    def ok(value):
        return (low <= value if interval[0] == "[" else low < value) and (value <= high if interval[-1] == "]" else value < high)

    return limited(default, ok, f"in {interval}{note}")


def is_gripper(value) -> bool:
    """libero, standard, two different numbers such as 100/0, or None."""
    if value in (None, "libero", "standard"):
        return True
    found = re.fullmatch(r"(-?\d+(?:\.\d+)?)/(-?\d+(?:\.\d+)?)", str(value))
    return found is not None and float(found[1]) != float(found[2])


def layer_numbers(off: str = "") -> Any:
    """None, or a list of different layers."""
    return limited(None, lambda value: value is None or (value and min(value) >= 0 and len(set(value)) == len(value)),
                   f"null, or different layer numbers from 0 on, such as '[3, 5]'{off}")


def limits(cls, prefix: str = "") -> Dict[str, Any]:
    """Dotted key -> the field of every key of a configuration class that has a range."""
    found = {}
    for one in fields(cls):
        kind = schema.type_of(cls, one.name)
        found.update(limits(kind, f"{prefix}{one.name}.") if hasattr(kind, "__dataclass_fields__") else
                     {prefix + one.name: one} if "ok" in one.metadata else {})
    return found


def problems(config) -> List[str]:
    """Every value of a config.Config out of its range, one line each with what is allowed; empty when it is sound."""
    found: List[str] = []

    def need(ok, key, allowed):
        if not ok:
            found.append(f"--{key} {attrgetter(key)(config)!r}: must be {allowed}")

    for key in schema.known_keys(type(config)):
        value = attrgetter(key)(config)
        need(not isinstance(value, float) or math.isfinite(value), key, "a finite number")
    for key, one in limits(type(config)).items():
        need(one.metadata["ok"](attrgetter(key)(config)), key, one.metadata["allowed"])
    _between(config, need)
    if config.method in method_names():
        found += method_class(config.method).problems(config)
    if config.evaluate.benchmark in benchmark_names():
        found += benchmark_class(config.evaluate.benchmark).problems(config)
    return found


def _between(config, need: Callable[[Any, str, str], None]) -> None:
    """Rules between several keys."""
    known = config.method in method_names()
    need(known, "method", "one of " + ", ".join(method_names()))
    for key in ("data.source", "backbone.source"):
        need(attrgetter(key)(config) == "native" or config.backbone.openvla_dir, "backbone.openvla_dir",
             f"the folder of an OpenVLA checkout with --{key} official")
    need(config.data.source == "native" or config.data.statistics is None, "data.statistics", "null with --data.source official")
    need(not config.data.processes or (config.data.source == "native" and config.data.workers > 0), "data.processes",
         "false with --data.source official, which has its own, and without --data.workers, which says how many")
    need(config.lora.dtype == "float32" or config.backbone.dtype != "float16", "lora.dtype",
         "float32 with --backbone.dtype float16: updates of float16 adapters are rounded away, and their gradients cannot be unscaled")
    need(config.backbone.quantisation == "none" or config.train.from_run is None, "backbone.quantisation",
         "none with --train.from_run: export that run first, and name the export with --backbone.checkpoint")
    need(config.backbone.quantisation == "none" or "all-linear" not in config.lora.modules, "backbone.quantisation",
         "none with --lora.modules '[all-linear]'")
    need(config.backbone.quantisation == "none" or config.train.sharding == "none", "train.sharding",
         "none with --backbone.quantisation nf4: 4-bit weights fit one card, and their blocks cannot be cut")
    graded = config.method == "graded"
    need(graded or config.thermostat.estimator != "kl", "thermostat.estimator", "covariance or paired: kl belongs to --method graded")
    need(not graded or config.thermostat.estimator in (None, "kl"), "thermostat.estimator", "kl or null with --method graded")
    need(not graded or config.gains.opening is None or not config.thermostat.enabled, "gains.opening",
         "null while the Thermostat sets it: fix it with --thermostat.enabled false")
    need(config.train.from_run not in ("", ".", "..", "base", config.name), "train.from_run",
         "another run, or a checkpoint folder; null for the base model as it is")
    if "all-linear" in config.lora.modules:
        need(config.lora.modules == ["all-linear"], "lora.modules", "all-linear alone, or a list without it")
        need(str(config.lora.layers) == "all", "lora.layers", "all with --lora.modules '[all-linear]'")
        need(not (known and method_class(config.method).decoder_only), "lora.modules",
             "attention, mlp or linear names with a method: its subspaces are those of decoder layers, and all-linear adapts vision and "
             "lm_head too")
    benchmarks = benchmark_names()
    usual = type(config.evaluate)().benchmark
    need(config.evaluate.benchmark in benchmarks, "evaluate.benchmark",
         "one of " + ", ".join(sorted(benchmarks, key=lambda name: name != usual)))
    need(config.icsm.tokens_fragile_fraction + config.icsm.tokens_plastic_fraction <= 1, "icsm.tokens_plastic_fraction",
         "such that fragile and plastic shares add up to at most 1")
    t = config.thermostat
    gamma_max, beta_max = (1 if high is None else high for high in (t.gamma_max, t.beta_max))
    need(0 <= gamma_max <= 1, "thermostat.gamma_max", "in [0, 1]")
    need(0 < beta_max <= 1, "thermostat.beta_max", "in (0, 1]")
    need(t.gamma_min is None or 0 <= t.gamma_min <= gamma_max, "thermostat.gamma_min", "in [0, gamma_max]")
    need(t.beta_min is None or 0 < t.beta_min <= beta_max, "thermostat.beta_min", "in (0, beta_max]: beta never reaches 0")
