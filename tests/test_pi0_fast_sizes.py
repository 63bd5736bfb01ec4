"""pi0-FAST of other sizes than the goldens': layers, heads, key heads, cameras and layouts of the weight file."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from vlakeep.data.sample import Sample
from vlakeep.models.adapters import target_modules
from vlakeep.models.load import make_backbone
from vlakeep.pi0_fast.model import DECODER, EMBEDDING, Sizes, VisionSizes
from vlakeep.pi0_fast.tiny import make_folder

TEXTS = ["pick up the red block", "open the drawer, State: left"]
VISION = VisionSizes(hidden_size=20, intermediate_size=28, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8)
# width, layers, MLP, heads, key heads, columns of a head; cameras; state; how the file names its tensors
CASES = {
    "heads are wider than the model": (Sizes(0, 40, 3, 56, 4, 2, 16, vision=VISION), 1, 0, "whole"),
    "as many key heads as heads": (Sizes(0, 36, 5, 24, 3, 3, 8, vision=VISION), 2, 8, "without model."),
    "one key head, three cameras": (Sizes(0, 48, 2, 64, 6, 1, 12, vision=VISION._replace(patch_size=4)), 3, 14, "one vocabulary"),
    "one layer": (Sizes(0, 24, 1, 16, 2, 1, 6, rope_theta=100.0, vision=VISION), 2, 3, "without model., one vocabulary"),
}


@pytest.fixture(scope="module", params=CASES)
def made(request, tmp_path_factory):
    """(backbone of the case from a rewritten file, samples with one that lacks a camera between others where there are three)."""
    sizes, cameras, state, keys = CASES[request.param]
    folder, rng = tmp_path_factory.mktemp("sizes") / "pi0", np.random.default_rng(0)
    names = tuple(f"camera_{i}" for i in range(cameras))
    make_folder(folder, TEXTS, [rng.uniform(-1, 1, (5, 3)) for _ in range(80)], {}, names, state=state, sizes=sizes)
    tensors = load_file(str(folder / "model.safetensors"))
    if "one vocabulary" in keys:
        del tensors[EMBEDDING]
    if "without model." in keys:
        tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(tensors, str(folder / "model.safetensors"))
    samples = []
    for row in range(3):
        there = [name for name in names if not (row == 1 and name == "camera_1" and cameras == 3)]
        seen = {name: rng.integers(0, 256, (20, 16, 3), dtype=np.uint8) for name in there}
        own = {"image": seen["camera_0"]} if cameras == 1 else {"image": None, "cameras": seen}
        samples.append(Sample(instruction=TEXTS[row % 2], action=rng.uniform(-1, 1, (5, 3)).astype(np.float32),
                              state=rng.uniform(-1.2, 1.2, state).astype(np.float32) if state else None, **own))
    return make_backbone(folder), samples


@torch.no_grad()
def test_layers_batches_and_answers(made):
    backbone, samples = made
    processor, depth = backbone.processor, backbone.num_layers
    batch = processor.encode_batch(samples)
    prefix, states = backbone.embed(batch), backbone.hidden_states(batch)
    whole = backbone.run_layers(prefix)
    for start in range(depth + 1):
        assert torch.equal(backbone.run_layers(replace(prefix, hidden_BSD=states[start]), start), whole)
    each = [backbone(processor.encode_batch([one])) for one in samples]
    total = sum(float(out.loss) * int(out.num_labelled) for out in each) / sum(int(out.num_labelled) for out in each)
    assert abs(total - float(backbone(batch).loss)) < 1e-5
    prompts = processor.encode_prompts(samples)
    ids, _ = backbone.generate(prompts, 5, stop_at_eos=False)
    told = backbone.log_probabilities_of_continuation(prompts, ids)
    assert torch.equal(told.argmax(-1), ids), "with a cache of keys as without"
    chunks, _ = backbone.attempt_chunks(prompts) if backbone.norm_stats else (processor.read(ids.numpy())[0], None)
    assert chunks.shape == (3, 5, 3)


def test_adapters_are_those_of_the_decoder(made):
    backbone, _ = made
    layers = f"last:{min(2, backbone.num_layers)}"
    found = target_modules(backbone, layers, ["attention", "mlp"])
    assert len(found) == 7 * min(2, backbone.num_layers) and all(name.startswith(DECODER + "layers.") for name in found)


@torch.no_grad()
def test_the_decoder_is_transformers_gemma(made):
    """On text alone and causally, where there is nothing that its releases do in different ways."""
    from transformers import GemmaConfig, GemmaModel

    backbone, _ = made
    sizes = backbone.pi0.sizes
    torch.manual_seed(0)
    theirs = GemmaModel(GemmaConfig(
        vocab_size=sizes.vocab_size, hidden_size=sizes.width, intermediate_size=sizes.mlp_dim, num_hidden_layers=sizes.depth,
        num_attention_heads=sizes.num_heads, num_key_value_heads=sizes.num_kv_heads, head_dim=sizes.head_dim, pad_token_id=0,
        hidden_act="gelu_pytorch_tanh", hidden_activation="gelu_pytorch_tanh", rms_norm_eps=sizes.rms_norm_eps,
        rope_theta=sizes.rope_theta)).eval()
    own = {name.removeprefix(DECODER): tensor for name, tensor in backbone.network.state_dict().items() if name.startswith(DECODER)}
    theirs.load_state_dict(own, strict=False)
    ids = torch.randint(4, sizes.vocab_size, (2, 11))
    causal = torch.ones(11, 11, dtype=torch.bool).tril()[None, None].expand(2, 1, 11, 11)
    hidden = backbone.pi0.run_layers(backbone.pi0.embed_text(ids), causal, torch.arange(11).expand(2, 11))
    assert torch.allclose(backbone.norm(hidden), theirs(input_ids=ids).last_hidden_state, atol=2e-5)
