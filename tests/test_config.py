"""Configuration: strict keys with suggestions, every problem at once, round trip."""

import ast
import dataclasses

import pytest
from config_reads import FIELDS, Reads
from conftest import save_config
from test_layout import SOURCES

from vlakeep.core.config import Config, ConfigError, config_from_argv, known_keys, load_config, to_dict
from vlakeep.core.options import config_help, leaves
from vlakeep.core.schema import SHIPPED
from vlakeep.core.storage import KEYS


def test_round_trip(tmp_path):
    config = Config(name="x", threads=2)
    config.lora.layers, config.icsm.layers, config.thermostat.gamma_min = "0,2", [1, 3], 0.25
    save_config(config, tmp_path / "c.yaml")
    assert load_config(str(tmp_path / "c.yaml")) == config


def test_command_line_over_file_over_default(tmp_path):
    (tmp_path / "c.yaml").write_text("train: {lr: 0.5, steps: 9}\n")
    for argv in (["--train.lr", "0.25"], ["--train.lr=0.25"]):
        config = config_from_argv(["--config", str(tmp_path / "c.yaml"), *argv])
        assert (config.train.lr, config.train.steps, config.train.batch_size) == (0.25, 9, 16)
    assert config_from_argv([f"--config={tmp_path / 'c.yaml'}"]).train.lr == 0.5
    assert load_config(None, ["--data.datasets", "[a, b]"]).data.datasets == ["a", "b"]
    assert load_config(None, ["--thermostat.gamma_min", "0.1"]).thermostat.gamma_min == 0.1


def test_one_configuration_leaves_nothing_in_the_next():
    """They are read by one parser."""
    first = load_config("method_graded", ["--data.datasets", "[a]", "--lora.layers", "last:1", "--train.steps", "3"])
    first.data.datasets.append("b")
    first.options["y"] = 2
    again = load_config(None, [])
    assert again == Config() and again.options == {} and again.data.datasets == Config().data.datasets
    assert load_config("method_graded", ["--train.steps", "3"]) != first


def test_a_configuration_that_ships_is_found_by_name_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = load_config(str(SHIPPED / "method_icsm_hsw_thermostat.yaml"))
    for name in ("configs/method_icsm_hsw_thermostat.yaml", "method_icsm_hsw_thermostat.yaml", "method_icsm_hsw_thermostat"):
        assert config_from_argv(["--config", name]) == shipped and shipped.method != Config().method
    (tmp_path / "method_icsm_hsw_thermostat").mkdir()  # a folder is no configuration file
    assert load_config("method_icsm_hsw_thermostat") == shipped
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "baseline_lora.yaml").write_text("name: mine\n")
    assert load_config("configs/baseline_lora.yaml").name == "mine" != load_config("baseline_lora").name
    for name in ("baseline", "other/baseline_lora", "configs/configs/baseline_lora.yaml", "configs", ""):
        with pytest.raises(ConfigError, match="no configuration file at .*that ship are baseline_lora, method_distillation, method_graded"):
            load_config(name)


@pytest.mark.parametrize(
    "text, words",
    [
        ("trian: {lr: 1}\n", "unknown key `trian` in .*did you mean `train`"),
        ("train: {learning_rate: 1}\nlora: {rnak: 1}\n", "(?s)train.learning_rate.*lora.rnak.*did you mean `lora.rank`"),
        ("train: {lr: fast}\n", "wrong type.*lr"),
        ("train: [1\n", "not valid YAML"),
        ("seed: null\n", "wrong type: --seed must be a whole number, not (null|None)"),
        ("- 1\n", "`key: value` pairs"),
        ("train: {lr: -1, steps: 0}\nhsw: {beta: 0}\n", "(?s)hsw.beta|train.steps"),
    ],
)
def test_mistakes_in_a_file(tmp_path, text, words):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_config(str(tmp_path / "c.yaml"))


def test_all_problems_are_shown_at_once():
    with pytest.raises(ConfigError) as caught:
        load_config(None, ["--train.lr", "-1", "--hsw.gamma", "2", "--hsw.beta", "0", "--method", "magic", "--name", "a/b/c"])
    for key in ("train.lr", "hsw.gamma", "hsw.beta", "method", "name"):
        assert f"--{key} " in str(caught.value)


@pytest.mark.parametrize(
    "key, good, bad",
    [
        ("hsw.gamma", [0.0, 1.0], [-0.1, 1.1]),
        ("hsw.beta", [0.1, 1.0], [0.0, 1.1]),
        ("thermostat.beta_min", [0.1], [0.0, 1.1]),
        ("thermostat.gamma_min", [0.0, 1.0], [-0.1, 1.1]),
        ("thermostat.every", [1], [0]),
        ("icsm.rank", [1], [0]),
        ("icsm.epsilon", [0.1], [0.0]),
        ("train.clip", [0.0], [-1.0]),
        ("train.save_every", [1], [0]),
        ("probe.size", [2], [1]),
    ],
)
def test_ranges(key, good, bad):
    for value in good:
        load_config(None, [f"--{key}", str(value)])
    for value in bad:
        with pytest.raises(ConfigError, match=key):
            load_config(None, [f"--{key}", str(value)])


def test_processes_that_would_not_be_started_are_refused():
    for words in (["--data.workers", "0"], ["--data.workers", "2", "--data.source", "official", "--backbone.openvla_dir", "x"]):
        with pytest.raises(ConfigError, match="--data.processes True: must be false with --data.source official.* without --data.workers"):
            load_config(None, ["--data.processes", "true", *words])
    assert load_config(None, ["--data.processes", "true", "--data.workers", "2"]).data.processes


def test_defaults_are_sound_and_every_key_is_known():
    assert Config().problems() == []
    flat = [key for key in known_keys() if not dataclasses.is_dataclass(_value(Config(), key))]
    assert {
        "root",
        "cache_dir",
        "data_root_dir",
        "probe_root_dir",
        "artifact_dir",
        "run_root_dir",
        "tmp_dir",
        "train.use_wandb",
    } <= set(flat)
    assert Config().train.use_wandb is False
    text = "\n".join(config_help(leaves()))
    assert [key for key in flat if f"  --{key}" not in text] == []
    assert to_dict(Config())["train"]["lr"] == Config().train.lr


CHECKING = ("config.py", "ranges.py", "checks.py", "preflight.py")  # they look at a value, and do nothing with it


def unread(found):
    """Keys that no attribute reads; folders are asked for by the names that storage.KEYS lists."""
    return sorted({key for section in FIELDS for key in keys_of(section)} - set(found.nodes) - set(KEYS))


def keys_of(section):
    return {f"{section}.{field}" if section else field for field in FIELDS[section]}


@pytest.fixture(scope="module")
def read():
    """(sources, what is found in them)."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES if path.name not in CHECKING]
    return trees, Reads(trees)


def test_no_key_is_accepted_and_ignored(read):
    """Every field is read, outside the files that only check values, from something that holds its section."""
    assert unread(read[1]) == [] and set(KEYS) < FIELDS[""]


def test_a_key_that_is_no_longer_read_is_found(read):
    """Whatever else is called alike: other sections have a seed, workers and layers too."""
    (trees, found), gone = read, ["data.workers", "evaluate.seed", "icsm.layers", "thermostat.dead_band", "threads"]
    for node in (node for key in gone for node in found.nodes[key]):
        node.attr = "nothing"
    assert unread(Reads(trees)) == gone


def _value(config, key):
    for part in key.split("."):
        config = getattr(config, part)
    return config
