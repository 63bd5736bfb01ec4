"""ICSM: SVD against a planted subspace, sensitivity against a brute-force forward, artefacts written, verified and refused."""

import json

import pytest
import torch
from conftest import METHOD

from vlakeep.openvla.backbone import OpenVLABackbone
from vlakeep.teacher import icsm_artifact as artifact
from vlakeep.teacher.collect import pooled_states, token_moments, with_own_answers
from vlakeep.teacher.decompose import pooled_candidates, token_bases
from vlakeep.teacher.sensitivity import measured_positions, order_by_fragility, sensitivities


def test_candidates_recover_a_planted_subspace():
    torch.manual_seed(0)
    planted = torch.linalg.qr(torch.randn(40, 3))[0]
    x = 5.0 + torch.randn(200, 3) * torch.tensor([9.0, 5.0, 3.0]) @ planted.T + 0.01 * torch.randn(200, 40)
    basis, values, mean = pooled_candidates(x, 3)
    assert torch.linalg.svdvals(basis.T @ planted.double()).min() > 0.999
    assert torch.allclose(mean, x.double().mean(0)) and values[2] > 50 * values[3]
    assert (basis.T @ basis - torch.eye(3)).abs().max() < 1e-10


def test_rank_beyond_the_data_is_refused_with_the_limit():
    with pytest.raises(ValueError, match=r"min\(N - 1, D\) = 9.*--icsm.rank 9"):
        pooled_candidates(torch.randn(10, 40), 10)


def test_token_bases_are_the_leading_directions_uncentred():
    torch.manual_seed(0)
    x = torch.randn(500, 12) * torch.linspace(4, 0.1, 12)
    x[:, 11] += 30  # a constant offset is energy: the second moment is not centred
    found = token_bases(x.T @ x / 500, 0.25, 0.25)
    fragile, plastic, values = found["f"], found["p"], found["values"]
    assert fragile.shape == (12, 3) and plastic.shape == (12, 3) and fragile[11].abs().max() > 0.99
    both = torch.cat([fragile, plastic], 1)
    assert (both.T @ both - torch.eye(6)).abs().max() < 1e-5 and (values[:-1] >= values[1:]).all()


def test_a_large_fragile_share_is_kept_as_its_complement():
    torch.manual_seed(0)
    x = torch.randn(500, 12)
    direct, thin = token_bases(x.T @ x / 500, 0.4, 0.2), token_bases(x.T @ x / 500, 0.6, 0.25)
    assert set(thin) == {"n", "p", "values"} and thin["n"].shape == (12, 2) and direct["f"].shape == (12, 5)
    both = torch.cat([thin["n"], thin["p"]], 1)
    assert (both.T @ both - torch.eye(5)).abs().max() < 1e-5


def test_passes_stay_below_the_memory_and_keep_shared_inputs_together():
    from vlakeep.teacher.collect import passes
    linears = {f"layers.{i}.{name}": torch.nn.Linear(64, 8) for i in range(3) for name in ("self_attn.q_proj", "self_attn.v_proj")}
    groups = passes(linears, 2 * 4 * 64**2, OpenVLABackbone.input_key)
    assert [sorted(g) for g in groups] == [[f"layers.{i}.self_attn.{n}" for i in (a, b) if i < 3 for n in ("q_proj", "v_proj")]
                                           for a, b in ((0, 1), (2, 3))]
    alone, together = (passes(linears, limit, OpenVLABackbone.input_key) for limit in (1, 1e9))
    assert len(alone) == 3 and len(together) == 1


def test_order_puts_the_most_fragile_first():
    fragile, plastic, order = order_by_fragility(torch.eye(6)[:, :4].double(), torch.tensor([0.1, 0.4, 0.2, 0.3]), 0.5)
    assert order.tolist() == [1, 3, 2, 0]
    assert fragile.argmax(0).tolist() == [1, 3] and plastic.argmax(0).tolist() == [2, 0]


def test_representatives_and_groups_of_18_and_32_layers():
    assert artifact.default_layers(18) == [15, 17] and artifact.default_layers(32) == [29, 31]
    assert artifact.layer_map(18, [15, 17]) == {14: 15, 15: 15, 16: 17, 17: 17}
    with pytest.raises(ValueError, match="layers 0 to 17"):
        artifact.layer_map(18, [15, 18])
    with pytest.raises(ValueError, match="twice"):
        artifact.layer_map(18, [15, 15])


@pytest.fixture(scope="module")
def teacher(world):
    from vlakeep.models.load import make_backbone
    from vlakeep.probe.batches import prompt_batches
    from vlakeep.probe.probe_set import ProbeSet
    storage, make_config = world
    config = make_config(METHOD)
    backbone = make_backbone(config.backbone, torch.device("cpu")).eval()
    probe = ProbeSet(storage.probe_folder(config.probe.name))
    return backbone, lambda size=8, count=8: list(prompt_batches(probe, list(range(count)), backbone.processor, size))


@pytest.mark.parametrize("offset", [1, 3])
def test_sensitivity_from_cached_activations_is_the_full_forward(teacher, offset):
    """The upper layers re-run from the cache, against the whole model run again with the perturbation put in by a hook."""
    backbone, batches = teacher
    layer = backbone.num_layers - offset
    directions = torch.linalg.qr(torch.randn(backbone.hidden_size, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    got = sensitivities(backbone, batches(), layer, directions, step=0.5)
    (batch, mask_BL), = batches()
    prefix = backbone.embed(batch)
    mask_BS = backbone.sequence_mask(prefix, mask_BL)
    where = measured_positions(mask_BS, prefix.attention_mask_BS)
    with torch.no_grad():
        clean = torch.log_softmax(backbone.logits(backbone.run_layers(prefix)[where]), -1)
        for k in range(2):
            def push(module, args, output, k=k):
                hidden = output[0] if isinstance(output, tuple) else output
                hidden = hidden + mask_BS[..., None] * (0.5 * directions[:, k].float())
                return (hidden, *output[1:]) if isinstance(output, tuple) else hidden
            handle = backbone.decoder_layers[layer].register_forward_hook(push)
            pushed = torch.log_softmax(backbone.logits(backbone.run_layers(prefix)[where]), -1)
            handle.remove()
            wanted = (clean.exp() * (clean - pushed)).sum(-1).mean().item()
            assert wanted > 0 and got[k].item() == pytest.approx(wanted, rel=1e-3, abs=1e-7)
    assert (got > 0).all(), "at the last layer too: the injected positions themselves are measured"


def test_pooling_does_not_depend_on_the_batch_size(teacher):
    backbone, batches = teacher
    layers = [backbone.num_layers - 3, backbone.num_layers - 1]
    a, b = (pooled_states(backbone, batches(size), layers, quiet=True) for size in (8, 3))
    assert all(torch.allclose(a.states[layer], b.states[layer], atol=1e-4) for layer in layers) and a.kept == list(range(8))


@torch.no_grad()
def test_pooled_states_and_their_scale_are_those_of_single_prompts(teacher):
    """Text token j stands at position patches + j; the scale is the mean norm over the instruction tokens of all items."""
    backbone, batches = teacher
    layers = [1, backbone.num_layers - 2]
    found = pooled_states(backbone, batches(3), layers, quiet=True)
    norms = {layer: [] for layer in layers}
    for item, (batch, mask_BL) in enumerate(batches(1)):
        states = backbone.hidden_states(batch)
        positions = [backbone.num_patches + j for j in range(1, batch.input_ids.shape[1]) if mask_BL[0, j]]
        assert len(positions) == mask_BL.sum() > 1
        for layer in layers:
            tokens_TD = states[layer + 1][0, positions]
            assert torch.allclose(found.states[layer][item], tokens_TD.mean(0), atol=1e-4)
            norms[layer] += tokens_TD.norm(dim=-1).tolist()
    for layer in layers:
        assert found.scale[layer] == pytest.approx(sum(norms[layer]) / len(norms[layer]), rel=1e-4)


def test_empty_masks_are_counted_and_left_out_and_all_empty_is_an_error(teacher):
    backbone, batches = teacher
    (batch, mask), = batches()
    mask = mask.clone()
    mask[2] = False
    pooled = pooled_states(backbone, [(batch, mask)], [1], quiet=True)
    assert pooled.empty == 1 and len(pooled.states[1]) == 7 and 2 not in pooled.kept and torch.isfinite(pooled.states[1]).all()
    with pytest.raises(ValueError, match="empty instruction mask.*audit-probe"):
        pooled_states(backbone, [(batch, torch.zeros_like(mask))], [1], quiet=True)


def test_token_moments_count_valid_tokens_only_and_share_inputs(teacher):
    from vlakeep.models.adapters import select_linears
    backbone, batches = teacher
    linears = select_linears(backbone, "last:1", ["attention", "mlp"])
    (batch, _), = batches()
    moments = token_moments(backbone, [batch], linears)
    last = backbone.num_layers - 1
    assert set(moments) == {f"layers.{last}.{name}" for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")}
    caught = {}
    handle = linears[f"layers.{last}.mlp.down_proj"].register_forward_pre_hook(lambda module, args: caught.update(x=args[0]))
    prefix = backbone.embed(batch)
    with torch.no_grad():
        backbone.run_layers(prefix)
    handle.remove()
    x = caught["x"][prefix.attention_mask_BS.bool()]
    assert torch.allclose(moments[f"layers.{last}.mlp.down_proj"], x.T @ x / len(x), rtol=1e-3, atol=1e-5)
    assert backbone.input_key("layers.3.self_attn.v_proj") == "layers.3.self_attn.q_proj"


def test_the_teacher_continues_prompts_by_itself(teacher):
    backbone, batches = teacher
    (batch, _), = batches()
    longer = with_own_answers(backbone, batch, 8)
    before, after = batch.attention_mask.sum(1), longer.attention_mask.sum(1)
    assert ((after > before) & (after <= before + 9)).all()
    for row in range(batch.size):
        assert torch.equal(longer.input_ids[row, :before[row]], batch.input_ids[row, :before[row]])


@pytest.fixture
def made(world, tmp_path):
    """A copy of the artefact that may be damaged."""
    import shutil
    storage, make_config = world
    folder = storage.artifact_folder("icms_tabletop-base")
    shutil.copytree(folder, tmp_path / "copy")
    return artifact.load(tmp_path / "copy"), make_config(METHOD)


def test_artefact_files_shapes_and_meta_are_complete(made):
    found, config = made
    names = {p.name for p in found.folder.iterdir()}
    for layer in found.layers:
        assert {f"U{layer}_f.pt", f"U{layer}_p.pt", f"mu{layer}.pt", f"C_T{layer}.pt"} <= names
        fragile, plastic = found.residual_basis(layer)
        mean, covariance = found.teacher_statistics(layer)
        dim = found.meta["hidden_size"]
        assert fragile.shape[0] == plastic.shape[0] == dim and fragile.shape[1] + plastic.shape[1] == config.icsm.rank
        assert mean.shape == (dim,) and covariance.shape == (dim, dim) and torch.allclose(covariance, covariance.T, atol=1e-6)
    assert {"layers", "layer_map", "r", "epsilon", "probe_sha256", "versions", "commit", "weights_sha256", "empty_masks"} <= set(found.meta)
    states, items = found.teacher_states()
    assert all(len(x) == len(items) for x in states.values())


def test_the_artefact_holds_the_statistics_and_the_ranked_directions_of_the_teachers_states(made):
    found, config = made
    states, _ = found.teacher_states()
    for layer in found.layers:
        x_ND, notes = states[layer].double(), found.meta["per_layer"][str(layer)]
        mean_D, covariance_DD = found.teacher_statistics(layer)
        assert torch.allclose(mean_D.double(), x_ND.mean(0), atol=1e-5)
        assert torch.allclose(covariance_DD.double(), torch.cov(x_ND.T), rtol=1e-4, atol=1e-5)
        fragile_DK, plastic_DK = found.residual_basis(layer)
        assert fragile_DK.shape[1] == notes["r_f"] == 12 and sorted(notes["svd_order"]) == list(range(24))
        assert notes["kl"] == sorted(notes["kl"], reverse=True) and notes["kl"][0] > notes["kl"][-1]
        ranked_DK = pooled_candidates(x_ND, 24)[0][:, notes["svd_order"]].float()
        assert torch.allclose(torch.cat([fragile_DK, plastic_DK], dim=1), ranked_DK, atol=1e-3)


def test_the_same_probe_and_seed_give_the_same_files(world, made):
    from vlakeep.offline import run_offline
    storage, make_config = world
    again = artifact.load(run_offline(make_config(METHOD, "--icsm.name", "again"), storage))
    assert again.meta["files"] == made[0].meta["files"]


def test_damaged_or_foreign_artefacts_are_refused_with_the_remedy(made):
    found, config = made
    section = {**vars(config.icsm)}
    good = (found.meta["weights_sha256"], found.meta["probe_sha256"], section, found.meta["depth"], config.probe.size, "float32")
    assert artifact.check(found, *good) == []
    assert "other base weights" in artifact.check(found, "0" * 64, *good[1:])[0]
    assert "another probe" in artifact.check(found, good[0], "0" * 64, *good[2:])[0]
    assert "decoder layers" in artifact.check(found, *good[:3], 18, *good[4:])[0]
    changed = artifact.check(found, *good[:2], {**section, "rank": 12}, *good[3:])
    assert len(changed) == 1 and "icsm.rank 24" in changed[0] and "vlakeep offline" in changed[0]
    whole = (found.folder / "meta.json").read_text()
    other = {**found.meta, "layer_map": {**found.meta["layer_map"], "2": found.meta["layers"][0] + 1}}  # what no file's hash would show
    (found.folder / "meta.json").write_text(json.dumps(other))
    with pytest.raises(artifact.ArtifactError, match="damaged .it is not what was written"):
        artifact.load(found.folder)
    other.pop("meta_sha256")
    (found.folder / "meta.json").write_text(json.dumps(other))
    assert artifact.load(found.folder).layer_map[2] == found.layers[0] + 1  # an older version's has no hash
    (found.folder / "meta.json").write_text(whole)
    path = found.folder / f"U{found.layers[0]}_f.pt"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(artifact.ArtifactError, match="damaged.*vlakeep offline"):
        found.residual_basis(found.layers[0])
    path.unlink()
    with pytest.raises(artifact.ArtifactError, match="is missing"):
        found.residual_basis(found.layers[0])
    (found.folder / "meta.json").write_text(json.dumps(found.meta)[:-5])
    with pytest.raises(artifact.ArtifactError, match="damaged"):
        artifact.load(found.folder)
    with pytest.raises(artifact.ArtifactError, match="vlakeep offline"):
        artifact.load(found.folder / "nowhere")


# ---- what the artefact says of its making ----


def test_an_artefact_of_another_type_is_refused_with_the_command(world, capsys):
    from vlakeep.methods.icsm_hsw_thermostat import METHOD as Method
    from vlakeep.models.load import make_backbone

    storage, make_config = world
    meta = artifact.load(storage.artifact_folder("icms_tabletop-base")).meta
    assert (meta["format"], meta["dtype"], meta["quantisation"], meta["attn_implementation"]) == (3, "float32", "none", "sdpa")
    config = make_config(METHOD, "--backbone.dtype", "bfloat16")
    backbone = make_backbone(config.backbone, "cpu", storage.cache)
    with pytest.raises(artifact.ArtifactError, match="made with float32 weights, this run has bfloat16 ones: run `vlakeep offline`"):
        Method.prepare(config, storage, backbone)
    eager = make_config(METHOD, "--backbone.attn_implementation", "eager")  # recorded, and the same up to rounding
    Method.prepare(eager, storage, make_backbone(eager.backbone, "cpu", storage.cache))
    assert "was made with attn_implementation sdpa, this run uses eager" in capsys.readouterr().err


def test_quantisation_is_compared_and_older_artefacts_are_refused(world, tmp_path):
    storage, _ = world
    found = artifact.load(storage.artifact_folder("icms_tabletop-base"))
    meta = found.meta
    same = (meta["weights_sha256"], meta["probe_sha256"], meta["config"], meta["depth"], meta["probe_items"], "float32")
    assert artifact.check(found, *same) == []
    line, = artifact.check(found, *same, quantisation="4bit")
    assert "quantised as none, this run as 4bit" in line
    (tmp_path / "meta.json").write_text(json.dumps(dict(meta, format=2)))
    with pytest.raises(artifact.ArtifactError, match="has format 2, this version reads 3.*data type.*vlakeep offline"):
        artifact.load(tmp_path)


def test_sensitivity_items_are_spread_over_all_usable_items(world, monkeypatch):
    from vlakeep.methods import icsm_hsw_thermostat_offline as offline
    from vlakeep.offline import run_offline
    from vlakeep.probe.probe_set import evenly
    storage, make_config = world
    assert evenly(500, 64)[-1] == 492 and evenly(10, 10) == list(range(10)) and evenly(7, 3) == [0, 2, 4]
    asked, prompt_batches = [], offline.prompt_batches

    def noted(probe, items, *rest):
        asked.append(list(items))
        return prompt_batches(probe, items, *rest)

    monkeypatch.setattr(offline, "prompt_batches", noted)
    config = make_config(METHOD, "--icsm.name", "spread", "--icsm.sensitivity_items", 28, "--icsm.rank", 4, "--icsm.tokens", False)
    run_offline(config, storage)
    joined = [item for part in asked for item in part]
    assert joined[:48] == list(range(48)) and joined[48:76] == [i * 48 // 28 for i in range(28)] and len(set(joined[48:])) == 28
