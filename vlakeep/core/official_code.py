"""The user's own checkout of the official OpenVLA repository, imported as it lies there; nothing in it is changed or copied.

Its `prismatic` package imports TensorFlow as soon as anything of it is touched. In an environment without TensorFlow the parts that need
none (model, processor, prompts, action tokenizer, collator) are imported all the same, by registering the packages above them without
running their __init__.
"""

import importlib
import importlib.metadata
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import List, Optional

from vlakeep.core.compat import import_timm
from vlakeep.core.log import log

MARK = Path("prismatic") / "extern" / "hf" / "modeling_prismatic.py"
TIMM = ("0.9.10", "0.9.11", "0.9.12", "0.9.16")  # others are refused by the official model class itself
# Packages whose __init__ pulls in TensorFlow or the training stack.
_HEAVY = ("prismatic", "prismatic.extern", "prismatic.models", "prismatic.models.backbones", "prismatic.models.backbones.llm",
          "prismatic.util", "prismatic.vla")


def check_openvla_dir(openvla_dir: Optional[str]) -> Path:
    """The checkout's folder. Raises FileNotFoundError or ValueError with the remedy."""
    if not openvla_dir:
        raise ValueError("the official code is needed, and its checkout is not named: give --backbone.openvla_dir DIR")
    folder = Path(openvla_dir).expanduser().absolute()
    if not (folder / MARK).is_file():
        raise FileNotFoundError(f"no {MARK} in {folder}: --backbone.openvla_dir must be a checkout of the official repository "
                                "(git clone https://github.com/openvla/openvla)")
    return folder


def load_official(openvla_dir: Optional[str]) -> SimpleNamespace:
    """Attributes: folder, the classes OpenVLAConfig OpenVLAForActionPrediction PrismaticProcessor PrismaticImageProcessor ActionTokenizer
    PurePromptBuilder PaddedCollatorForActionPrediction, and RLDSDataset and RLDSBatchTransform, which are None where TensorFlow is missing
    (`why_no_data` then says what was).

    Raises ImportError with the remedy when this environment cannot run the official code.
    """
    folder = check_openvla_dir(openvla_dir)
    timm = import_timm()
    if timm.__version__ not in TIMM:
        raise ImportError(f"the official model class refuses timm {timm.__version__} (it takes {', '.join(TIMM)}): run this in the "
                          "official environment (conda activate openvla), or take --backbone.source native")
    loaded = sys.modules.get("prismatic")
    if loaded is not None and Path(list(loaded.__path__)[0]).resolve() != (folder / "prismatic").resolve():
        raise ImportError(f"another prismatic package is loaded already, from {list(loaded.__path__)[0]}; this process cannot use "
                          f"{folder} too")
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    datasets, why = None, None
    try:
        datasets = importlib.import_module("prismatic.vla.datasets")
    except ImportError as error:
        why = f"{error}"
        for name in [name for name in sys.modules if name.split(".")[0] == "prismatic"]:
            del sys.modules[name]
        for name in _HEAVY:
            package = types.ModuleType(name)
            package.__path__ = [str(folder.joinpath(*name.split(".")))]
            sys.modules[name] = package
    try:
        parts = {name: importlib.import_module(f"prismatic.{name}") for name in (
            "extern.hf.configuration_prismatic", "extern.hf.modeling_prismatic", "extern.hf.processing_prismatic", "vla.action_tokenizer",
            "models.backbones.llm.prompting.base_prompter", "util.data_utils")}
    except ImportError as error:
        raise ImportError(f"the official code in {folder} cannot be imported here ({error}): run this in the official environment (conda "
                          "activate openvla)") from error
    log.disabled = False  # prismatic's logging.config.dictConfig silences every logger that was there before it
    return SimpleNamespace(
        folder=folder,
        OpenVLAConfig=parts["extern.hf.configuration_prismatic"].OpenVLAConfig,
        OpenVLAForActionPrediction=parts["extern.hf.modeling_prismatic"].OpenVLAForActionPrediction,
        PrismaticProcessor=parts["extern.hf.processing_prismatic"].PrismaticProcessor,
        PrismaticImageProcessor=parts["extern.hf.processing_prismatic"].PrismaticImageProcessor,
        ActionTokenizer=parts["vla.action_tokenizer"].ActionTokenizer,
        PurePromptBuilder=parts["models.backbones.llm.prompting.base_prompter"].PurePromptBuilder,
        PaddedCollatorForActionPrediction=parts["util.data_utils"].PaddedCollatorForActionPrediction,
        RLDSDataset=getattr(datasets, "RLDSDataset", None),
        RLDSBatchTransform=getattr(datasets, "RLDSBatchTransform", None),
        why_no_data=why,
    )


def versions() -> List[str]:
    """What the official code runs on here, one `name version` each."""
    found = []
    for name in ("torch", "transformers", "tokenizers", "timm", "peft", "tensorflow-cpu", "tensorflow"):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
