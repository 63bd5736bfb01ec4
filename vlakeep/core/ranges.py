"""The range of every value of the configuration, and the rules between them; what is wrong is collected, not raised."""

import math
from operator import attrgetter
from typing import List

from vlakeep.core import schema
from vlakeep.core.registry import benchmark_class, benchmark_names, method_class, method_names


def problems(config) -> List[str]:
    """Every value of a config.Config out of its range, one line each with what is allowed; empty when it is sound."""
    found = []

    def need(ok, key, allowed):
        if not ok:
            value = config
            for part in key.split("."):
                value = getattr(value, part)
            found.append(f"--{key} {value!r}: must be {allowed}")

    def one_of(key, *choices):
        value = config
        for part in key.split("."):
            value = getattr(value, part)
        need(value in choices, key, "one of " + ", ".join("null" if choice is None else choice for choice in choices))

    for key in schema.known_keys(type(config)):
        value = attrgetter(key)(config)
        need(not isinstance(value, float) or math.isfinite(value), key, "a finite number")
    need(0 <= config.seed < 2**32, "seed", "in [0, 2^32)")
    need(config.threads is None or config.threads >= 1, "threads", "at least 1, or null for torch's choice")
    need(config.evaluate.seed is None or 0 <= config.evaluate.seed < 100_000, "evaluate.seed", "null, or in [0, 100000)")
    need(config.evaluate.target not in ("", ".", ".."), "evaluate.target", "base, the name of a run, or a checkpoint folder")
    for key, off in (("icsm.layers", ""), ("hsw.layers", "; --hsw.enabled false switches the surgery off")):
        layers = attrgetter(key)(config)
        sound = layers is None or (layers and min(layers) >= 0 and len(set(layers)) == len(layers))
        need(sound, key, f"null, or different layer numbers from 0 on, such as '[3, 5]'{off}")
    one_of("method", *method_names())
    if config.method in method_names():
        found += method_class(config.method).problems(config)
    one_of("device", "auto", "cpu", "cuda")
    one_of("data.source", "native", "official")
    need(config.data.source == "native" or config.backbone.openvla_dir, "backbone.openvla_dir",
         "the folder of an OpenVLA checkout with --data.source official")
    need(config.data.source == "native" or config.data.statistics is None, "data.statistics", "null with --data.source official")
    one_of("backbone.source", "native", "official")
    need(config.backbone.source == "native" or config.backbone.openvla_dir, "backbone.openvla_dir",
         "the folder of an OpenVLA checkout with --backbone.source official")
    one_of("backbone.dtype", "float32", "bfloat16", "float16")
    one_of("backbone.attn_implementation", "sdpa", "eager", "flash_attention_2")
    one_of("hsw.site", "residual", "lora_input", "both")
    one_of("hsw.subspace", "icsm", "random")
    one_of("hsw.dtype", "float32", "model")
    one_of("thermostat.estimator", None, "covariance", "paired", "kl")
    graded = config.method == "graded"
    need(graded or config.thermostat.estimator != "kl", "thermostat.estimator", "covariance or paired: kl belongs to --method graded")
    need(not graded or config.thermostat.estimator in (None, "kl"), "thermostat.estimator", "kl or null with --method graded")
    one_of("gains.allocation", "linear", "model", "sensitivity")
    need(config.gains.steepness > 0, "gains.steepness", "greater than 0")
    need(config.gains.opening is None or config.gains.opening > 0, "gains.opening", "greater than 0, or null")
    need(not graded or config.gains.opening is None or not config.thermostat.enabled, "gains.opening",
         "null while the Thermostat sets it: fix it with --thermostat.enabled false")
    need(0 < config.gains.start <= 1, "gains.start", "in (0, 1]")
    need(config.gains.scale > 0, "gains.scale", "greater than 0")
    need(0 < config.gains.holdout < 1, "gains.holdout", "in (0, 1)")
    need(config.thermostat.target > 0, "thermostat.target", "greater than 0")
    need(config.thermostat.open_factor > 1, "thermostat.open_factor", "greater than 1")
    need(config.thermostat.close_factor > 1, "thermostat.close_factor", "greater than 1")
    one_of("train.optimizer", "adamw", "sgd")
    one_of("train.schedule", "constant", "cosine")
    one_of("train.autocast", "none", "bfloat16", "float16")
    one_of("lora.dtype", "float32", "model")
    if "all-linear" in config.lora.modules:
        need(config.lora.modules == ["all-linear"], "lora.modules", "all-linear alone, or a list without it")
        need(str(config.lora.layers) == "all", "lora.layers", "all with --lora.modules '[all-linear]'")
        need(not (config.method in method_names() and method_class(config.method).decoder_only), "lora.modules",
             "attention, mlp or linear names with a method: its subspaces are those of decoder layers, and all-linear adapts vision and "
             "lm_head too")
    one_of("lora.init", "gaussian", "kaiming")
    usual = type(config.evaluate)().benchmark
    one_of("evaluate.benchmark", *sorted(benchmark_names(), key=lambda name: name != usual))
    if config.evaluate.benchmark in benchmark_names():
        found += benchmark_class(config.evaluate.benchmark).problems(config)
    one_of("export.dtype", "stored", "float32", "bfloat16", "float16")
    need(config.export.parity_frames >= 0, "export.parity_frames", "0 or more")
    need(config.export.close_to is None or config.export.close_to > 0, "export.close_to", "greater than 0, or null for no closing pass")
    need(config.evaluate.videos >= 0, "evaluate.videos", "0 or more")
    need(bool(config.name) and "/" not in config.name and config.name not in (".", "..", "base"), "name",
         "a single folder name, and not base, which names the model before training")
    for key in ("lora.rank", "lora.alpha", "data.shuffle_buffer", "icsm.rank", "icsm.batch_size", "icsm.sensitivity_items", "gains.columns",
                "thermostat.every", "train.steps", "train.batch_size", "train.accumulation", "train.log_every",
                "train.save_every", "train.keep_last", "evaluate.episodes", "evaluate.questions_per_kind",
                "evaluate.retention_frames", "evaluate.parallel", "evaluate.workers", "evaluate.batch"):
        section, name = key.split(".")
        need(getattr(getattr(config, section), name) >= 1, key, "at least 1")
    need(config.probe.size >= 2, "probe.size", "at least 2")
    need(config.thermostat.batch_size >= 2, "thermostat.batch_size", "at least 2")
    need(config.thermostat.calibration >= 2, "thermostat.calibration", "at least 2 (a noise level needs two values)")
    need(0 <= config.lora.dropout < 1, "lora.dropout", "in [0, 1)")
    need(0 < config.data.train_fraction <= 1, "data.train_fraction", "in (0, 1]")
    need(config.data.workers >= 0, "data.workers", "0 or more")
    need(config.data.gripper in (None, "libero", "standard"), "data.gripper", "libero, standard or null")
    need(0 < config.icsm.fragile_fraction < 1, "icsm.fragile_fraction", "in (0, 1)")
    need(config.icsm.moments_gib > 0, "icsm.moments_gib", "greater than 0")
    need(config.icsm.epsilon > 0, "icsm.epsilon", "greater than 0")
    need(0 < config.icsm.tokens_fragile_fraction < 1, "icsm.tokens_fragile_fraction", "in (0, 1)")
    need(0 <= config.icsm.tokens_plastic_fraction < 1, "icsm.tokens_plastic_fraction", "in [0, 1)")
    need(config.icsm.tokens_fragile_fraction + config.icsm.tokens_plastic_fraction <= 1, "icsm.tokens_plastic_fraction",
         "such that fragile and plastic shares add up to at most 1")
    need(0 <= config.hsw.gamma <= 1, "hsw.gamma", "in [0, 1]")
    need(0 < config.hsw.beta <= 1, "hsw.beta", "in (0, 1]: plastic directions are damped, never closed")
    need(config.hsw.eps > 0, "hsw.eps", "greater than 0")
    t = config.thermostat
    gamma_max, beta_max = (1 if high is None else high for high in (t.gamma_max, t.beta_max))
    need(0 <= gamma_max <= 1, "thermostat.gamma_max", "in [0, 1]")
    need(0 < beta_max <= 1, "thermostat.beta_max", "in (0, 1]")
    need(t.gamma_min is None or 0 <= t.gamma_min <= gamma_max, "thermostat.gamma_min", "in [0, gamma_max]")
    need(t.beta_min is None or 0 < t.beta_min <= beta_max, "thermostat.beta_min", "in (0, beta_max]: beta never reaches 0")
    need(0 < t.ema <= 1, "thermostat.ema", "in (0, 1]")
    need(t.dead_band >= 0, "thermostat.dead_band", "0 or more")
    need(t.rate_limit > 0, "thermostat.rate_limit", "greater than 0")
    need(t.paired_noise > 0, "thermostat.paired_noise", "greater than 0")
    need(t.half_excess > 0, "thermostat.half_excess", "greater than 0")
    need(t.threshold_sigmas >= 0, "thermostat.threshold_sigmas", "0 or more")
    need(config.train.lr > 0, "train.lr", "greater than 0")
    need(config.train.clip >= 0, "train.clip", "0 or more")
    need(config.train.warmup >= 0, "train.warmup", "0 or more")
    need(config.train.weight_decay >= 0, "train.weight_decay", "0 or more")
    need(config.train.blowup_factor > 1, "train.blowup_factor", "greater than 1")
    return found
