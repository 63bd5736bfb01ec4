"""The data sets of a configuration, looked at with the prompt and the action statistics of its base model, whose weights are not read."""

import json
from typing import Any, Dict, List, Optional

from vlakeep.core.base_models import model_name
from vlakeep.core.storage import Storage, find_checkpoint
from vlakeep.data.card import Prompt, look_at_all
from vlakeep.data.sample import Sample
from vlakeep.models.load import model_class


def prompt_of(processor, name: str) -> Optional[Prompt]:
    """How a processor counts a text; None where it says no limit."""
    if processor is None or not processor.max_tokens:
        return None

    def tokens(text: str) -> int:
        return len(processor.whole_prompt(Sample(None, text)))

    return Prompt(tokens, processor.max_tokens, name)


def look(config, storage: Storage) -> List[Dict[str, Any]]:
    """The reports of config.data (data/card.py). Without the base model, or with a damaged one, texts are not counted in tokens: its own
    checks say what it lacks. Raises what opening a data set raises."""
    prompt, known = None, {}
    try:
        folder = find_checkpoint(config.backbone.checkpoint, storage.cache)
        kind = model_class(folder)
        known = kind.read_statistics(folder, json.loads((folder / "config.json").read_text(encoding="utf-8")))
        prompt = prompt_of(kind.read_processor(config.backbone, folder), model_name(folder))
    except (OSError, ValueError):
        pass
    return look_at_all(config.data, storage.data, storage.cache, prompt, known)
