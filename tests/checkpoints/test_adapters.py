"""LoRA and its relatives: one adapter in every spelling, each family against its formula, and everything that must be refused."""

import json

import jax
import numpy as np
import pytest

from dmsec_jax.checkpoints.adapter_export import write_difference, write_lora
from dmsec_jax.checkpoints.adapters import low_rank, merge, read_adapter
from dmsec_jax.checkpoints.diffusers import shapes
from dmsec_jax.checkpoints.io import write_tensors
from dmsec_jax.core.trees import flatten, map_paths, unflatten
from dmsec_jax.finetune.lora import lora
from dmsec_jax.models import presets

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
QUERY, OUT = f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn2.to_out.0"
CONV, POINT = "down_blocks.0.resnets.0.conv1", "down_blocks.0.attentions.0.proj_in"
TEXT = "encoder.layers.0.self_attn.out_proj"
RANK, ALPHA = 2, 3.0
TARGETS = {
    "unet": shapes("unet", presets.TINY.unet),
    "text_encoder": shapes("text_encoder", presets.TINY.text),
}


def paths(layer):
    """Part and path of a layer."""
    part = "text_encoder" if layer.startswith("encoder") else "unet"
    (path,) = [p for p in flatten(TARGETS[part]) if p.endswith("/kernel") and layer == spelling(p)]
    return part, path


def spelling(path):
    parts = path.removesuffix("/kernel").split("/")
    return ".".join(".".join(p.rsplit("_", 1)) if p.rsplit("_", 1)[-1].isdigit() else p for p in parts)


def random(shape, seed):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


BASE = {part: map_paths(lambda path, leaf: random(leaf.shape, len(path)), tree) for part, tree in TARGETS.items()}
FACTORS = {
    QUERY: (random((RANK, 8), 1), random((8, RANK), 2)),
    OUT: (random((RANK, 8), 3), random((8, RANK), 4)),
    TEXT: (random((RANK, 8), 5), random((8, RANK), 6)),
}
CONVOLUTIONS = {
    CONV: (random((RANK, 8, 3, 3), 7), random((8, RANK, 1, 1), 8)),
    POINT: (random((RANK, 8, 1, 1), 9), random((8, RANK, 1, 1), 10)),
}


def part_of(layer):
    return "text_encoder.text_model." if layer == TEXT else "unet."


def peft(factors):
    return {
        f"{part_of(layer)}{layer}.lora_{which}.weight": value
        for layer, pair in factors.items()
        for which, value in zip("AB", pair, strict=True)
    }


def diffusers(factors):
    word = lambda layer: "lora_linear_layer" if layer == TEXT else "lora"
    return {
        f"{part_of(layer)}{layer}.{word(layer)}.{which}.weight": value
        for layer, pair in factors.items()
        for which, value in zip(("down", "up"), pair, strict=True)
    }


def old_diffusers(factors):
    state = {}
    for layer, pair in factors.items():
        place, _, name = layer.removesuffix(".0").rpartition(".")
        if layer == TEXT:
            old = f"{part_of(layer)}{place}.to_{name.removesuffix('_proj')}_lora"
        else:
            old = f"{part_of(layer)}{place}.processor.{name}_lora"
        state |= {f"{old}.{which}.weight": value for which, value in zip(("down", "up"), pair, strict=True)}
    return state


def kohya(factors, te="lora_te_text_model_"):
    state = {}
    for layer, (down, up) in factors.items():
        name = (te if layer == TEXT else "lora_unet_") + layer.replace(".", "_")
        state |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        state[f"{name}.alpha"] = np.float32(ALPHA)
    return state


def with_alpha(state):
    """The same with a tensor of alpha beside each `down`."""
    ends = (".lora_A.weight", ".lora.down.weight", ".lora_linear_layer.down.weight", ".down.weight")
    for key in list(state):
        if end := next((end for end in ends if key.endswith(end)), None):
            state[key.removesuffix(end) + ".alpha"] = np.full(1, ALPHA, np.float32)
    return state


def in_metadata(prefixes=("unet.", "text_encoder.")):
    values = {"r": RANK, "lora_alpha": ALPHA, "alpha_pattern": {}, "use_rslora": False, "peft_type": "LORA"}
    return {"lora_adapter_metadata": json.dumps({p + key: value for p in prefixes for key, value in values.items()})}


SPELLINGS = {
    "peft, alpha in the header": (peft(FACTORS | CONVOLUTIONS), in_metadata()),
    "peft, one alpha for all": (peft(FACTORS | CONVOLUTIONS), in_metadata([""])),
    "peft, alpha as a tensor": (with_alpha(peft(FACTORS | CONVOLUTIONS)), {}),
    "diffusers": (with_alpha(diffusers(FACTORS | CONVOLUTIONS)), {}),
    "old diffusers": (with_alpha(old_diffusers(FACTORS)) | with_alpha(diffusers(CONVOLUTIONS)), {}),
    "kohya": (kohya(FACTORS | CONVOLUTIONS), {}),
    "kohya for two text encoders": (kohya(FACTORS | CONVOLUTIONS, "lora_te1_text_model_"), {}),
    "kohya in half precision": ({k: v.astype(np.float16) for k, v in kohya(FACTORS | CONVOLUTIONS).items()}, {}),
}


def read(tmp_path, state, metadata=None, name="adapter.safetensors"):
    write_tensors(tmp_path / name, state, metadata=metadata)
    return read_adapter(tmp_path / name, TARGETS)


def expected(strength=1.0):
    """The base model with up @ down * alpha / rank in the chosen kernels, by hand."""
    flat = {part: flatten(tree) for part, tree in BASE.items()}
    for layer, (down, up) in (FACTORS | CONVOLUTIONS).items():
        part, path = paths(layer)
        d = strength * ALPHA / RANK * (up.reshape(len(up), -1) @ down.reshape(RANK, -1))
        d = d.reshape(len(up), *down.shape[1:])
        flat[part][path] = flat[part][path] + (d.transpose(2, 3, 1, 0) if d.ndim == 4 else d.T)
    return {part: unflatten(tree) for part, tree in flat.items()}


def assert_close(found, wanted, tolerance=1e-5):
    for part in wanted:
        one, other = flatten(found[part]), flatten(wanted[part])
        assert one.keys() == other.keys()
        for path in one:
            np.testing.assert_allclose(one[path], other[path], rtol=tolerance, atol=tolerance, err_msg=path)


@pytest.mark.parametrize("strength", [1.0, 0.0, -0.5])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_one_adapter_in_every_spelling_is_the_same_model(tmp_path, spelling, strength):
    state, metadata = SPELLINGS[spelling]
    adapter = read(tmp_path, state, metadata)
    half = 5e-3 if "half" in spelling else 1e-5
    assert_close(merge(BASE, adapter, strength), expected(strength), half)
    names = {"peft": "PEFT", "kohya": "kohya"}
    assert adapter.layout == names.get(spelling.split(",")[0].split()[0], "old diffusers")


def test_kept_apart_it_is_the_trainable_tree_of_our_lora(tmp_path):
    adapter = read(tmp_path, *SPELLINGS["kohya"])
    trainable = low_rank(adapter, TARGETS)
    for scale in (None, 0.3):
        found = {part: lora(1).merge(BASE[part], trainable[part], scale) for part in BASE}
        assert_close(found, expected(1.0 if scale is None else scale))


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_what_we_train_comes_back(tmp_path, layout):
    adapter = lora(3, 4.5, [r"attn1/to_(q|out_0)/kernel$", r"conv1/kernel$", r"proj_in/kernel$"])
    tree = jax.eval_shape(adapter.init, jax.random.key(0), TARGETS["unet"])
    trainable = {"unet": map_paths(lambda path, leaf: random(leaf.shape, len(path)), tree)}
    write_lora(tmp_path / "a.safetensors", trainable, 4.5 / 3, layout)
    back = read_adapter(tmp_path / "a.safetensors", TARGETS)
    assert_close(merge(BASE, back), BASE | {"unet": adapter.merge(BASE["unet"], trainable["unet"])})
    again = low_rank(back, TARGETS)
    write_lora(tmp_path / "b.safetensors", again)
    np.testing.assert_equal(low_rank(read_adapter(tmp_path / "b.safetensors", TARGETS), TARGETS), again)


def test_peft_folder_with_its_configuration(tmp_path):
    state = {key.replace("unet.", "base_model.model."): value for key, value in peft({QUERY: FACTORS[QUERY]}).items()}
    write_tensors(tmp_path / "adapter_model.safetensors", state)
    with pytest.raises(ValueError, match=r"beside PEFT's adapter_config\.json, which holds its scale"):
        read_adapter(tmp_path, TARGETS)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "use_rslora": True}
    for patterns, ratio in (({}, 8 / 2**0.5), ({"attn1.to_q": 5}, 5 / 2**0.5), ({"to_v": 5}, 8 / 2**0.5)):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"alpha_pattern": patterns}))
        (change,) = read_adapter(tmp_path, TARGETS).changes["unet"].values()
        assert change.ratio == pytest.approx(ratio)
    for wrong in ({"alpha_pattern": {"(a+)+$": 1}}, {"peft_type": "IA3"}, {"lora_alpha": None}, {"bias": "all"}):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | wrong))
        with pytest.raises(ValueError, match=rf"adapter_config\.json: {next(iter(wrong))} must be"):
            read_adapter(tmp_path, TARGETS)


def weights(layer):
    """A kernel of the base model as PyTorch keeps it."""
    part, path = paths(layer)
    kernel = flatten(BASE[part])[path]
    return kernel.transpose(3, 2, 0, 1) if kernel.ndim == 4 else kernel.T


def merged(tmp_path, state, layer, strength=1.0):
    part, path = paths(layer)
    kernel = flatten(merge(BASE, read(tmp_path, state), strength)[part])[path]
    return kernel.transpose(3, 2, 0, 1) if kernel.ndim == 4 else kernel.T


def under(layer, **factors):
    return {f"lora_unet_{layer.replace('.', '_')}.{name}": value for name, value in factors.items()}


def test_tucker_locon(tmp_path):
    down, mid, up = random((3, 8, 1, 1), 1), random((2, 3, 3, 3), 2), random((8, 2, 1, 1), 3)
    found = merged(
        tmp_path, under(CONV, **{"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up}), CONV
    )
    wanted = weights(CONV).copy()
    for y in range(3):
        for x in range(3):
            wanted[:, :, y, x] += up[:, :, 0, 0] @ mid[:, :, y, x] @ down[:, :, 0, 0]
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer", [QUERY, CONV])
def test_loha(tmp_path, layer):
    weight = weights(layer)
    a1, b1, a2, b2 = (random(s, i) for i, s in enumerate([(8, 2), (2, weight[0].size)] * 2))
    state = under(layer, hada_w1_a=a1, hada_w1_b=b1, hada_w2_a=a2, hada_w2_b=b2, alpha=np.float32(ALPHA))
    wanted = weight + (ALPHA / 2 * (a1 @ b1) * (a2 @ b2)).reshape(weight.shape)
    np.testing.assert_allclose(merged(tmp_path, state, layer), wanted, rtol=1e-5, atol=1e-5)


def test_tucker_loha(tmp_path):
    cores, sides = [random((2, 3, 3, 3), i) for i in (0, 1)], [random((2, 8), 2), random((3, 8), 3)]
    state = under(CONV, hada_t1=cores[0], hada_t2=cores[1])
    state |= under(CONV, hada_w1_a=sides[0], hada_w1_b=sides[1], hada_w2_a=sides[0], hada_w2_b=sides[1])
    one, two = ([[sides[0].T @ core[:, :, y, x] @ sides[1] for x in range(3)] for y in range(3)] for core in cores)
    wanted = weights(CONV) + (np.array(one) * np.array(two)).transpose(2, 3, 0, 1)
    np.testing.assert_allclose(merged(tmp_path, state, CONV), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer", [QUERY, CONV])
@pytest.mark.parametrize("first", ["whole", "product"])
@pytest.mark.parametrize("second", ["whole", "product"])
def test_lokr(tmp_path, layer, first, second):
    weight = weights(layer)
    w1, w2 = random((2, 4), 1), random((4, 2, *weight.shape[2:]), 2)
    factors = {"lokr_w1": w1, "lokr_w2": w2, "alpha": np.float32(ALPHA)}
    ratio = 1.0
    if first == "product":
        factors |= {"lokr_w1_a": random((2, 3), 3), "lokr_w1_b": random((3, 4), 4)}
        del factors["lokr_w1"]
        w1, ratio = factors["lokr_w1_a"] @ factors["lokr_w1_b"], ALPHA / 3
    if second == "product":
        factors |= {"lokr_w2_a": random((4, 3), 5), "lokr_w2_b": random((3, w2[0].size), 6)}
        del factors["lokr_w2"]
        w2, ratio = (factors["lokr_w2_a"] @ factors["lokr_w2_b"]).reshape(w2.shape), ALPHA / 3
    wanted = weight.copy()
    for o in range(8):
        for i in range(8):
            wanted[o, i] += ratio * w1[o // 4, i // 2] * w2[o % 4, i % 2]
    np.testing.assert_allclose(merged(tmp_path, under(layer, **factors), layer), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layer", [QUERY, CONV])
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_dora_by_output_and_by_input(tmp_path, layer, strength):
    weight = weights(layer)
    down, up = random((2, *weight.shape[1:]), 1), random((8, 2, *(1,) * (weight.ndim - 2)), 2)
    moved = weight + ALPHA / 2 * (up.reshape(8, 2) @ down.reshape(2, -1)).reshape(weight.shape)
    lengths = {
        (8, 1): [np.linalg.norm(moved[o]) for o in range(8)],
        (1, 8): [np.linalg.norm(moved[:, i]) for i in range(8)],
    }
    for shape, norms in lengths.items():
        shape = (*shape, 1, 1) if layer == CONV else shape
        magnitude, norms = random(shape, 3), np.reshape(norms, shape)
        state = under(
            layer, **{"lora_down.weight": down, "lora_up.weight": up}, alpha=np.float32(ALPHA), dora_scale=magnitude
        )
        wanted = weight + strength * (magnitude * moved / norms - weight)
        np.testing.assert_allclose(merged(tmp_path, state, layer, strength), wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="plain LoRA, got another kind at down_blocks_0"):
        low_rank(read(tmp_path, state), TARGETS)


GOOD = kohya(FACTORS | CONVOLUTIONS)
Q = "lora_unet_" + QUERY.replace(".", "_")
HADA = random((8, 2), 0)
WRONG = {
    "missing: up beside": {f"{Q}.lora_up.weight": None},
    "missing: down beside": {f"{Q}.lora_down.weight": None},
    "unused: lora_unet_no_such_layer.lora_down.weight [2, 8]": {"lora_unet_no_such_layer.lora_down.weight": HADA.T},
    "unused: lora_te2_text_model_encoder_layers_0_self_attn_q_proj.alpha []": {
        "lora_te2_text_model_encoder_layers_0_self_attn_q_proj.alpha": np.float32(1)
    },
    "unused: what_is_this [3]": {"what_is_this": np.ones(3, np.float32)},
    "mis-shaped: Q.lora_up.weight [7, 2], expected [8, 2]": {f"{Q}.lora_up.weight": HADA[:7]},
    "mis-shaped: Q.lora_down.weight [8], expected 2 or 4 axes": {f"{Q}.lora_down.weight": HADA[:, 0]},
    "mis-shaped: Q.lora_down.weight [0, 8], expected 2 or 4 axes": {f"{Q}.lora_down.weight": np.zeros((0, 8), np.float32)},
    "mis-shaped: Q.lora_down.weight [2, 8, 3, 3], expected [2, 8, 1, 1]": {f"{Q}.lora_down.weight": random((2, 8, 3, 3), 0)},
    "mis-shaped: Q.dora_scale [3, 1], expected [8, 1]": {f"{Q}.dora_scale": np.ones((3, 1), np.float32)},
    "given twice: unet.": {f"unet.{QUERY}.lora_A.weight": FACTORS[QUERY][0]},
    "not floating point: Q.lora_down.weight int8": {f"{Q}.lora_down.weight": np.ones((2, 8), np.int8)},
    "not finite: Q.lora_down.weight": {f"{Q}.lora_down.weight": np.full((2, 8), np.nan, np.float32)},
    "not a positive number: Q.alpha [2]": {f"{Q}.alpha": np.ones(2, np.float32)},
    "not a positive number: Q.alpha []": {f"{Q}.alpha": np.float32(-1)},
    "of several families: ": {f"{Q}.hada_w1_a": HADA},
    "incomplete: lora_unet_conv_in.alpha": {"lora_unet_conv_in.alpha": np.float32(1)},
    "mis-shaped: lora_unet_conv_in.lokr_w1 [3, 2], expected sides that divide 8 and 4": {
        "lora_unet_conv_in.lokr_w1": random((3, 2), 0), "lora_unet_conv_in.lokr_w2": random((2, 2), 0)
    },
    "unused: lora_unet_conv_in.lokr_w1": {
        f"lora_unet_conv_in.lokr_{name}": random((2, 2), 0) for name in ("w1", "w1_a", "w1_b", "w2")
    },
    "missing: hada_t2 beside": {f"lora_unet_conv_in.hada_{name}": HADA for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1")},
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_one_wrong_tensor_is_named(tmp_path, message):
    state = {key: value for key, value in (GOOD | WRONG[message]).items() if value is not None}
    with pytest.raises(ValueError, match="must be complete changes of kernels of the base model") as caught:
        read(tmp_path, state)
    assert message.replace("Q.", f"{Q}.") in str(caught.value)


def test_one_error_lists_everything_that_is_wrong(tmp_path):
    changes = {f"{Q}.lora_up.weight": None, "more": HADA, f"unet.{OUT}.lora_A.weight": FACTORS[OUT][0]}
    state = {key: value for key, value in (GOOD | changes).items() if value is not None}
    with pytest.raises(ValueError, match="1 given twice, 1 missing, 1 unused") as caught:
        read(tmp_path, state)
    assert len(str(caught.value).split("\n")) == 4


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"unet.lora_alpha": -1}', '{"lora_alpha": 1, "use_rslora": 3}', "[" * 10**5]
)
def test_damaged_metadata_is_refused(tmp_path, text):
    with pytest.raises(ValueError, match="lora_adapter_metadata"):
        read(tmp_path, peft(FACTORS), {"lora_adapter_metadata": text})


def test_empty_and_foreign_files_are_refused(tmp_path):
    for state in ({}, {"model.diffusion_model.out.2.bias": np.ones(4, np.float32)}):
        with pytest.raises(ValueError, match="must be complete changes"):
            read(tmp_path, state)
    with pytest.raises(FileNotFoundError):
        read_adapter(tmp_path / "nothing.safetensors", TARGETS)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="a folder with one of pytorch_lora_weights"):
        read_adapter(tmp_path / "empty", TARGETS)


def test_only_a_lora_is_written(tmp_path):
    for tree, message in (
        ({"unet": {}}, "a LoRA, got an empty tree"),
        ({"unet": {"conv_in": {"down": HADA}}}, "made of down and up, got conv_in/down"),
        ({"vae": {"conv_in": {"down": HADA, "up": HADA}}}, "made of unet, text_encoder, text_encoder_2, got vae"),
    ):
        with pytest.raises(ValueError, match=message):
            write_lora(tmp_path / "a.safetensors", tree)
    with pytest.raises(ValueError, match="layout must be one of diffusers, kohya"):
        write_lora(tmp_path / "a.safetensors", {}, layout="a1111")
    assert list(tmp_path.iterdir()) == []


def oft_state(blocks=2, alpha=0.0):
    layer = QUERY.replace(".", "_")
    rows = {"oft_blocks": 0.3 * random((blocks, 8 // blocks, 8 // blocks), 1), "alpha": np.float32(alpha)}
    return {f"lora_unet_{layer}.{name}": value for name, value in rows.items()}


def test_oft_turns_outputs_in_blocks(tmp_path):
    """One block against the matrix equation; the kernel's singular values stay."""
    state = oft_state(1)
    moved = merge(BASE, read(tmp_path, state))
    part, path = paths(QUERY)
    before, after = flatten(BASE[part])[path].T, flatten(moved[part])[path].T
    block = next(iter(state.values()))[0]
    skew = block - block.T
    np.testing.assert_allclose(
        (np.eye(8) + skew).T @ np.linalg.inv(np.eye(8) - skew).T, (np.eye(8) - skew) @ np.linalg.inv(np.eye(8) + skew)
    )
    np.testing.assert_allclose((np.eye(8) + skew) @ after, (np.eye(8) - skew) @ before, rtol=1e-4, atol=1e-4)
    values = [np.linalg.svd(kernel, compute_uv=False) for kernel in (before, after)]
    np.testing.assert_allclose(*values, rtol=1e-4)
    assert np.abs(after - before).max() > 0.1


def test_a_constraint_of_oft_is_read_only_where_it_bounds_nothing(tmp_path):
    free, loose = (merge(BASE, read(tmp_path, oft_state(alpha=alpha))) for alpha in (0.0, 1e3))
    assert_close(free, loose)
    with pytest.raises(ValueError, match="a constraint that programs read differently: lora_unet_.*alpha, with blocks"):
        read(tmp_path, oft_state(alpha=1e-3))
    state = oft_state()
    state = {key: value[:, :2] if value.ndim == 3 else value for key, value in state.items()}
    with pytest.raises(ValueError, match=r"expected square blocks \[n, m, m\] with n m = 8"):
        read(tmp_path, state)


def test_difference_of_whole_kernels_comes_back(tmp_path):
    wanted = expected()
    write_difference(tmp_path / "diff.safetensors", BASE, wanted)
    adapter = read_adapter(tmp_path / "diff.safetensors", TARGETS)
    assert {change.family for own in adapter.changes.values() for change in own.values()} == {"full"}
    assert_close(merge(BASE, adapter), wanted)
    with pytest.raises(ValueError, match="different from the base model, got equal kernels"):
        write_difference(tmp_path / "none.safetensors", BASE, BASE)
    biased = map_paths(lambda path, leaf: leaf + path.endswith("bias"), BASE["unet"])
    with pytest.raises(ValueError, match="different in kernels alone, got unet/"):
        write_difference(tmp_path / "none.safetensors", BASE, BASE | {"unet": biased})
