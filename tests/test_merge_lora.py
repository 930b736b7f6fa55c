"""Promises of adapters: streamed through, they give what PEFT's own merge gives; what cannot be merged is refused
with the reason.
"""

import json
import weakref
from pathlib import Path

import pytest
import torch
from merge_models import load, raw, save, trio, weights
from safetensors.torch import load_file, save_file

from c2f_utils.errors import C2FError
from c2f_utils.merge import Merger, Recipe, open_stored, plan_merge, run_merge, verify

peft = pytest.importorskip("peft")


def mistral(path: str):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def adapt(path: str, folder: Path, seed: int = 0, model=None, **config: object) -> tuple[Path, dict[str, torch.Tensor]]:
    """Make an adapter with random factors; returns its folder and the weights that PEFT merges."""
    torch.manual_seed(seed)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"], **config}
    adapted = peft.get_peft_model(model or mistral(path), peft.LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.05)
            elif "modules_to_save" in name:
                parameter.add_(0.01 * torch.randn_like(parameter))
    adapted.save_pretrained(folder)
    return folder, {name: tensor.clone() for name, tensor in adapted.merge_and_unload().state_dict().items()}


@pytest.fixture
def paths(tmp_path) -> dict[str, str]:
    return trio(tmp_path)


CASES = {
    "plain": {},
    "rank-stabilised": {"use_rslora": True, "r": 16, "lora_alpha": 8},
    "rank pattern": {"rank_pattern": {"q_proj": 2, "layers.1.self_attn.v_proj": 7}},
    "alpha pattern": {"alpha_pattern": {"down_proj": 32, "q_proj": 1}},
    "both patterns, rank-stabilised": {
        "use_rslora": True,
        "rank_pattern": {"v_proj": 3},
        "alpha_pattern": {"v_proj": 9},
    },
    "all linear": {"target_modules": "all-linear"},
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head", "k_proj"]},
    "modules to save": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "one layer": {"layers_to_transform": [1], "target_modules": ["q_proj"]},
}


@pytest.mark.parametrize("case", CASES)
def test_a_streamed_adapter_is_what_peft_merges(tmp_path, paths, case):
    folder, wanted = adapt(paths["base"], tmp_path / "adapter", **CASES[case])
    recipe = Recipe(**{**paths, "coarse": str(folder)}, operator={"name": "lerp"}, coefficient={"default": 1.0})
    run_merge(plan_merge(recipe), tmp_path / "out", threads=1)
    merged = load(tmp_path / "out")
    assert merged.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-6, atol=1e-8, msg=name)
    verify(tmp_path / "out", recipe)


@pytest.mark.parametrize("operator", ({"name": "residue"}, {"name": "trim", "density": 0.3}), ids=("residue", "trim"))
@pytest.mark.parametrize("case", CASES)
def test_an_adapter_that_stays_on_the_disk_merges_in_memory_to_the_stream_s_bits(tmp_path, paths, case, operator):
    folder, wanted = adapt(paths["base"], tmp_path / "adapter", **CASES[case])
    recipe = Recipe(**{**paths, "coarse": str(folder)}, operator=operator)
    run_merge(plan_merge(recipe), tmp_path / "out")
    models = open_stored(recipe)
    merged = dict(Merger(models["base"], models["instruct"], models["coarse.0"]).tensors(recipe))
    stored = load(tmp_path / "out")
    assert merged.keys() == stored.keys() and all(torch.equal(merged[name], stored[name]) for name in stored)
    for name, tensor in wanted.items():
        torch.testing.assert_close(models["coarse.0"][name], tensor, rtol=1e-6, atol=1e-8, msg=name)


@pytest.mark.parametrize("case", ["plain", "modules to save", "embedding and head"])
def test_an_adapter_on_the_instruct_side_is_what_peft_merges(tmp_path, paths, case):
    folder, wanted = adapt(paths["base"], tmp_path / "adapter", **CASES[case])
    recipe = Recipe(**{**paths, "instruct": str(folder)}, coefficient={"default": 0.0})
    run_merge(plan_merge(recipe), tmp_path / "out")
    for name, tensor in load(tmp_path / "out").items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-6, atol=1e-8, msg=name)
    verify(tmp_path / "out", recipe)


def test_adapters_on_both_sides_add_up(tmp_path, paths):
    instruct, with_instruct = adapt(paths["base"], tmp_path / "i", seed=1)
    coarse, with_coarse = adapt(paths["base"], tmp_path / "c", seed=2, target_modules="all-linear")
    recipe = Recipe(base=paths["base"], instruct=str(instruct), coarse=str(coarse), coefficient={"default": 0.5})
    report = run_merge(plan_merge(recipe), tmp_path / "out")
    base = load(paths["base"])
    for name, tensor in load(tmp_path / "out").items():
        wanted = with_instruct[name] + 0.5 * (with_coarse[name] - base[name])
        torch.testing.assert_close(tensor, wanted, rtol=1e-5, atol=1e-7, msg=name)
    assert (tmp_path / "out/config.json").exists() and not (tmp_path / "out/adapter_config.json").exists()
    assert report.survival["attention"] == pytest.approx(1.0)


def test_a_transposed_layer_is_merged_transposed(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=30, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    paths = {}
    for seed, role in enumerate(("base", "instruct")):
        torch.manual_seed(seed)
        GPT2LMHeadModel(config).save_pretrained(tmp_path / role)
        paths[role] = str(tmp_path / role)
    settings = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    folder, wanted = adapt(
        paths["base"], tmp_path / "adapter", model=GPT2LMHeadModel.from_pretrained(paths["base"]), **settings
    )
    recipe = Recipe(**paths, coarse=str(folder), operator={"name": "lerp"}, coefficient={"default": 1.0})
    run_merge(plan_merge(recipe), tmp_path / "out")
    merged = load(tmp_path / "out")
    assert "lm_head.weight" not in merged  # GPT-2 ties it
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-6, atol=1e-8, msg=name)


def test_the_low_rank_residue_is_not_rounded_by_a_16_bit_base(tmp_path):
    paths = trio(tmp_path, torch.bfloat16)
    folder, _ = adapt(paths["base"], tmp_path / "adapter")
    factors = load_file(folder / "adapter_model.safetensors")
    recipe = Recipe(**{**paths, "coarse": str(folder)}, out_dtype="float32", coefficient={"default": 1.0})
    run_merge(plan_merge(recipe), tmp_path / "out")
    stem = "base_model.model.model.layers.0.self_attn.q_proj"
    delta = 1.5 * factors[f"{stem}.lora_B.weight"].double() @ factors[f"{stem}.lora_A.weight"].double()
    name = "model.layers.0.self_attn.q_proj.weight"
    wanted = load(paths["instruct"])[name].double() + delta
    torch.testing.assert_close(load(tmp_path / "out")[name].double(), wanted, rtol=1e-7, atol=1e-9)


def test_chunks_and_threads_change_no_byte_of_an_adapter_merge(tmp_path, monkeypatch):
    base = weights(0)
    wide = "model.layers.0.mlp.up_proj.weight"
    base[wide] = torch.randn(300, 700)
    for role, model in {"base": base, "instruct": weights(1, base)}.items():
        save(tmp_path / role, model)
    (tmp_path / "adapter").mkdir()
    factors = {"lora_A": torch.randn(5, 700), "lora_B": torch.randn(300, 5)}
    save_file(
        {f"base_model.model.model.layers.0.mlp.up_proj.{side}.weight": factor for side, factor in factors.items()},
        tmp_path / "adapter/adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 5, "lora_alpha": 10}
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    recipe = Recipe(**{role: str(tmp_path / role) for role in ("base", "instruct")}, coarse=str(tmp_path / "adapter"))
    for number, (chunk, threads) in enumerate([(0.25, 1), (4, 1), (0.25, 3)]):
        run_merge(plan_merge(recipe), tmp_path / f"{number}", chunk_mib=chunk, threads=threads)
    assert raw(tmp_path / "0") == raw(tmp_path / "1") == raw(tmp_path / "2")


def test_factors_of_tensors_already_merged_are_let_go(tmp_path, paths, monkeypatch):
    from c2f_utils.merge import readers

    folder, _ = adapt(paths["base"], tmp_path / "adapter", target_modules="all-linear")
    held, made = [], weakref.WeakSet()
    real = readers.Files.factors

    def watched(self, delta):
        found = real(self, delta)
        made.add(found)
        held.append(len(made))
        return found

    monkeypatch.setattr(readers.Files, "factors", watched)
    run_merge(plan_merge(Recipe(**{**paths, "coarse": str(folder)})), tmp_path / "out")
    assert len(held) > 2 * readers.FACTORS_KEPT and max(held) <= readers.FACTORS_KEPT + 1  # one may be in use


# --- what is refused ------------------------------------------------------------------------------------------------


def edit(folder: Path, **changes: object) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def rewrite(folder: Path, change) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = change(load_file(file))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)


Q = "base_model.model.model.layers.0.self_attn.q_proj"
WRONG = {
    "DoRA": (lambda f: edit(f, use_dora=True), "DoRA"),
    "hidden DoRA": (lambda f: rewrite(f, lambda t: {**t, f"{Q}.lora_magnitude_vector.weight": torch.ones(16)}), "DoRA"),
    "bias": (lambda f: edit(f, bias="lora_only"), "bias"),
    "low-rank bias": (lambda f: edit(f, lora_bias=True), "bias"),
    "another kind": (lambda f: edit(f, peft_type="IA3"), "IA3"),
    "replicated layers": (lambda f: edit(f, layer_replication=[[0, 2]]), "layer_replication"),
    "changed base": (lambda f: edit(f, init_lora_weights="pissa_niter_4"), "changed the base"),
    "activated": (lambda f: edit(f, alora_invocation_tokens=[3, 4]), "alora"),
    "single tokens": (lambda f: edit(f, trainable_token_indices=[1]), "trainable_token"),
    "no rank": (lambda f: edit(f, r=0), "r is 0"),
    "text for alpha": (lambda f: edit(f, lora_alpha="big"), "lora_alpha"),
    "a list for a pattern": (lambda f: edit(f, rank_pattern=[1]), "rank_pattern"),
    "another rank": (lambda f: edit(f, r=8), "rank 8"),
    "damaged config": (lambda f: (f / "adapter_config.json").write_text("{"), "damaged"),
    "one factor": (
        lambda f: rewrite(f, lambda t: {n: v for n, v in t.items() if n != f"{Q}.lora_B.weight"}),
        "only lora_A",
    ),
    "another width": (
        lambda f: rewrite(f, lambda t: {**t, f"{Q}.lora_A.weight": torch.ones(4, 9)}),
        "trained on another",
    ),
    "no matrix": (lambda f: rewrite(f, lambda t: {**t, f"{Q}.lora_A.weight": torch.ones(4, 4, 4)}), "do not fit"),
    "another module": (
        lambda f: rewrite(f, lambda t: {n.replace("layers.0.", "layers.7."): v for n, v in t.items()}),
        "no module of the base",
    ),
    "a stray tensor": (
        lambda f: rewrite(f, lambda t: {**t, "base_model.model.v_head.weight": torch.ones(2)}),
        "belongs to no",
    ),
    "another saved shape": (
        lambda f: rewrite(f, lambda t: {**t, "base_model.model.lm_head.weight": torch.ones(2, 2)}),
        "has shape",
    ),
    "nothing inside": (lambda f: rewrite(f, lambda t: {}), "changes no weight"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "does not exist"),
    "only a pickle": (
        lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"),
        "safe_serialization",
    ),
    "cut off": (
        lambda f: (f / "adapter_model.safetensors").write_bytes((f / "adapter_model.safetensors").read_bytes()[:-9]),
        "truncated",
    ),
}


@pytest.fixture(scope="module")
def sound_adapter(tmp_path_factory) -> tuple[dict[str, str], Path]:
    folder = tmp_path_factory.mktemp("adapter")
    paths = trio(folder)
    return paths, adapt(paths["base"], folder / "adapter")[0]


@pytest.mark.parametrize("case", WRONG)
def test_an_adapter_that_cannot_be_merged_is_refused_with_the_reason(tmp_path, sound_adapter, case):
    import shutil

    paths, sound = sound_adapter
    folder = Path(shutil.copytree(sound, tmp_path / "adapter"))
    change, words = WRONG[case]
    change(folder)
    with pytest.raises(C2FError, match=words) as error:
        plan_merge(Recipe(**{**paths, "coarse": str(folder)}))
    assert "coarse" in str(error.value) and "adapter" in str(error.value)


def test_nan_in_the_factors_is_found_and_named(tmp_path, sound_adapter):
    import shutil

    paths, sound = sound_adapter
    folder = Path(shutil.copytree(sound, tmp_path / "adapter"))
    rewrite(folder, lambda t: {**t, f"{Q}.lora_A.weight": torch.full((4, 16), torch.nan)})
    for operator in ("residue", "dare", "ties", "dots", "slerp"):
        recipe = Recipe(**{**paths, "coarse": str(folder)}, operator={"name": operator})
        with pytest.raises(C2FError, match="retrain the adapter"):
            run_merge(plan_merge(recipe), tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_change_of_a_tied_head_alone_is_refused(tmp_path, sound_adapter):
    import shutil

    paths, sound = sound_adapter
    folder = Path(shutil.copytree(sound, tmp_path / "adapter"))
    head = {
        "base_model.model.lm_head.lora_A.weight": torch.ones(4, 16),
        "base_model.model.lm_head.lora_B.weight": torch.ones(40, 4),
    }
    rewrite(folder, lambda t: {**t, **head})
    for role in ("base", "instruct"):
        tensors = {name: tensor for name, tensor in load(paths[role]).items() if name != "lm_head.weight"}
        save(tmp_path / role, tensors, tie_word_embeddings=True)
    with pytest.raises(C2FError, match="ties its head"):
        plan_merge(Recipe(base=str(tmp_path / "base"), instruct=str(tmp_path / "instruct"), coarse=str(folder)))


def test_an_adapter_cannot_be_the_base(tmp_path, sound_adapter):
    paths, sound = sound_adapter
    with pytest.raises(C2FError, match="name the full model"):
        plan_merge(Recipe(**{**paths, "base": str(sound)}))


def test_an_adapter_overwritten_after_planning_is_noticed(tmp_path, sound_adapter):
    import shutil

    paths, sound = sound_adapter
    folder = Path(shutil.copytree(sound, tmp_path / "adapter"))
    plan = plan_merge(Recipe(**{**paths, "coarse": str(folder)}))
    rewrite(folder, lambda t: {name: 2 * tensor for name, tensor in t.items()})
    with pytest.raises(C2FError, match="changed since the plan"):
        run_merge(plan, tmp_path / "out")
