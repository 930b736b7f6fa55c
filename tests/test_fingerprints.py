"""Models have fingerprints: what was written is what is read, one base serves one run, and the hub's commit counts."""

import json
import os
import shutil
from pathlib import Path

import huggingface_hub
import offline_mistral
import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import load_file
from tiny_models import TOKENIZER, causal

from c2f_utils import merge, weights
from c2f_utils.errors import C2FError
from c2f_utils.models import loading
from c2f_utils.runs import disk
from c2f_utils.runs.run import Run
from c2f_utils.settings.config import Lora, Models
from c2f_utils.settings.load import load_settings
from c2f_utils.stages.inputs import Inputs

CPU = Models(device="cpu")
BASE, REWARD, COARSE = "01_base_model", "02_reward_model", "03_coarse_rlhf"


def saved(folder: Path, seed: int = 0, shard: str | None = None) -> Path:
    model = causal(seed)
    model.save_pretrained(folder, **({"max_shard_size": shard} if shard else {}))
    TOKENIZER.save_pretrained(folder)
    return folder


def finished(run: Run, name: str, seed: int | None = None, result: float = 1.0):
    """A finished stage; with a `seed` it made a model."""
    stage = run.stage(name)
    inputs, parents = run.inputs(name)
    stage.begin(inputs, parents=parents)
    if seed is not None:
        saved(stage.path("model"), seed)
    stage.save_results({"loss": result})
    stage.finish()
    return stage


def smoke(run_id: str = "a", **overrides) -> Run:
    return Run(load_settings("smoke", run_id=run_id, overrides=overrides))


def change_bytes(path: Path, count: int = 4) -> None:
    content = bytearray(path.read_bytes())
    content[-count:] = bytes(byte ^ 1 for byte in content[-count:])
    path.write_bytes(content)


# The digest


def test_the_digest_follows_weights_and_configuration_and_nothing_else(tmp_path):
    one, other = saved(tmp_path / "one"), saved(tmp_path / "other")
    assert weights.digest(one) == weights.digest(other)
    (other / "README.md").write_text("a note")
    assert weights.digest(one) == weights.digest(other)
    change_bytes(other / "model.safetensors")
    assert weights.digest(one) != weights.digest(other)
    config = json.loads((one / "config.json").read_text())
    before = weights.digest(one)
    (one / "config.json").write_text(json.dumps(dict(reversed(config.items())) | {"_name_or_path": "/elsewhere"}))
    assert weights.digest(one) == before, "the order of keys and where it once lay do not count"
    (one / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert weights.digest(one) != before


def test_weights_are_read_once_per_process_while_they_stay_as_they_are(tmp_path, monkeypatch):
    folder, read = saved(tmp_path / "m", shard="20KB"), []
    real = weights.sha256
    monkeypatch.setattr(weights, "sha256", lambda path: read.append(path.name) or real(path))
    first = weights.digest(folder)
    assert weights.digest(folder) == first and len(read) == len(set(read)) == len(weights.files(folder)) > 2
    changed = weights.files(folder)[1]
    change_bytes(changed)
    assert weights.digest(folder) != first and read[-1] == changed.name and len(read) == len(weights.files(folder)) + 1


# What a stage made is what the next one reads


def test_models_are_recorded_when_written_and_not_in_the_results(outputs):
    stage = finished(smoke(), BASE, seed=0)
    assert stage.provenance()["models"] == {
        "model": {
            "sha256": weights.digest(stage.dir / "model"),
            "bytes": (stage.dir / "model" / "model.safetensors").stat().st_size,
        }
    }
    assert stage.results() == {"loss": 1.0}


def _cut(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 100)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda f: change_bytes(f / "model.safetensors"), "holds other weights than were written"),
        (lambda f: saved(f, seed=1), "holds other weights than were written"),
        (_cut, r"holds \d+ bytes of weights, \d+ were written"),
        (shutil.rmtree, "is missing"),
        (lambda f: (f / "model.safetensors").unlink(), "holds 0 bytes of weights"),
    ],
    ids=["four bytes", "another model", "truncated", "no folder", "no weights"],
)
def test_an_altered_model_is_refused_by_name_with_the_next_step(outputs, harm, said):
    stage = finished(smoke(), BASE, seed=0)
    harm(stage.dir / "model")
    run = smoke()
    run.here = run.stage(REWARD)
    run.here.begin(run.inputs(REWARD)[0])
    with pytest.raises(C2FError, match=f"model/ of 01_base_model in run 'a' {said}.*c2f run 01 --profile smoke --seed"):
        Inputs(run).base()


def test_a_retrained_parent_is_another_input_even_with_the_same_results(outputs):
    finished(smoke(), BASE, seed=0)
    finished(smoke(), REWARD, seed=1)
    shutil.rmtree(smoke().stage(BASE).dir)
    finished(smoke(), BASE, seed=2)
    with pytest.raises(C2FError, match="weights:base: other weights(.|\n)*input 01_base_model: .*or its models"):
        smoke().stage(REWARD).begin(smoke().inputs(REWARD)[0])


def test_a_stage_made_before_fingerprints_is_used_with_a_word(outputs, capsys):
    stage = finished(smoke(), BASE, seed=0)
    record = stage.provenance()
    del record["models"]
    (stage.dir / "provenance.json").write_text(json.dumps(record))
    run = smoke()
    run.here = run.stage(REWARD)
    run.here.begin(run.inputs(REWARD)[0])
    assert torch.equal(Inputs(run).base().lm_head.weight, causal().lm_head.weight)
    assert "01_base_model of run 'a' has no fingerprints yet: model/ is used unchecked" in capsys.readouterr().out


# One base for one run


def test_an_actor_made_from_another_base_is_not_lent(outputs):
    finished(smoke("first"), BASE, seed=0)
    finished(smoke("first"), REWARD, seed=5)
    finished(smoke("second"), BASE, seed=1)
    run = smoke("second")
    with pytest.raises(
        C2FError, match="02_reward_model of run 'first' was made with other weights of 01_base_model.*c2f run 02"
    ):
        run.inputs(COARSE)
    finished(smoke("second"), REWARD, seed=6)
    assert smoke("second").inputs(COARSE)[1] == {BASE: "second", REWARD: "second"}


def test_of_two_that_could_be_lent_the_one_with_this_base_is(outputs):
    for run_id, seed in (("first", 0), ("second", 1)):
        finished(smoke(run_id), BASE, seed=seed)
        finished(smoke(run_id), REWARD, seed=seed + 5)
    shutil.rmtree(smoke("first").stage(BASE).dir)
    (smoke("third").dir).mkdir()
    shutil.copytree(smoke("second").stage(BASE).dir, smoke("third").stage(BASE).dir)
    finished(smoke("fourth"), BASE, seed=9)
    assert smoke("third").parent(REWARD).run_id == "second"


def test_a_replaced_model_of_the_users_own_is_refused(outputs, tmp_path):
    offline_mistral.build(tmp_path / "m", tmp_path / "o.yaml", "float32")
    overrides = offline_mistral.settings(tmp_path / "m", "float32")
    run = Run(load_settings("mistral_7b", run_id="a", overrides=overrides))
    finished(run, BASE)
    assert run.stage(BASE).provenance()["inputs"]["weights:base"] == weights.identity(overrides["models"]["base"])
    change_bytes(tmp_path / "m" / "base" / "model.safetensors")
    later = Run(run.settings)
    with pytest.raises(C2FError, match="input weights:base: other weights"):
        later.stage(BASE).begin(later.inputs(BASE)[0])
    with pytest.raises(C2FError, match="01_base_model of run 'a' was made with other weights of models.base"):
        Run(run.settings).inputs(REWARD)


def test_weights_replaced_while_a_stage_works_are_refused_when_they_are_loaded(outputs, tmp_path):
    offline_mistral.build(tmp_path / "m", tmp_path / "o.yaml", "float32")
    overrides = offline_mistral.settings(tmp_path / "m", "float32")
    run = Run(load_settings("mistral_7b", run_id="a", overrides=overrides))
    run.here = run.stage(BASE)
    run.here.begin(run.inputs(BASE)[0])
    change_bytes(tmp_path / "m" / "base" / "model.safetensors")
    with pytest.raises(C2FError, match="begun with another weights:base"):
        Inputs(run).base()
    run.here.release()


# The hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache in which `main` of lab/base and the commit before it differ; nothing else can be reached."""
    cache = tmp_path / "hub"
    for module in (huggingface_hub.constants,):
        monkeypatch.setattr(module, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)
    commits = {"main": "b" * 40, "old": "a" * 40}
    repo = cache / "models--lab--base"
    for seed, (name, commit) in enumerate(commits.items()):
        folder = repo / "snapshots" / commit
        saved(tmp_path / "made" / name, seed)
        folder.mkdir(parents=True)
        (repo / "blobs").mkdir(exist_ok=True)
        for file in (tmp_path / "made" / name).iterdir():
            blob = repo / "blobs" / f"{seed}-{file.name}"
            shutil.copy(file, blob)
            (folder / file.name).symlink_to(Path("../../blobs") / blob.name)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commits["main"])
    return commits


def test_main_and_a_pinned_commit_are_two_models_for_loading_identity_and_merging(hub, tmp_path):
    for revision, seed in ((None, 0), (hub["old"], 1)):
        source = weights.pinned("lab/base", revision, "models.base")
        commit = revision or hub["main"]
        assert source == f"lab/base@{commit}" and weights.identity(source) == f"commit:{commit}"
        assert weights.locate(source, "base").name == commit
        model = loading.load_causal(source, CPU)
        assert torch.equal(model.lm_head.weight, causal(seed).lm_head.weight)
        assert loading.load_tokenizer(source).get_vocab() == TOKENIZER.get_vocab()
        assert weights.count(source) == sum(p.numel() for p in model.parameters())
    instruct, coarse = saved(tmp_path / "instruct", 2), saved(tmp_path / "coarse", 3)
    for revision, seed in ((hub["main"], 0), (hub["old"], 1)):
        recipe = merge.Recipe(base=f"lab/base@{revision}", instruct=str(instruct), coarse=str(coarse), coefficient=1.0)
        merge.run_merge(merge.plan_merge(recipe), tmp_path / f"fine{seed}")
        made = load_file(tmp_path / f"fine{seed}" / "model.safetensors")["lm_head.weight"]
        expected = causal(2).lm_head.weight + causal(3).lm_head.weight - causal(seed).lm_head.weight
        assert torch.allclose(made, expected, atol=1e-6)


def test_an_adapter_goes_back_onto_the_commit_that_it_was_trained_on(hub, tmp_path):
    base = loading.load_causal(f"lab/base@{hub['old']}", CPU)
    loading.save_model(loading.add_lora(base, Lora(rank=2, alpha=4)), TOKENIZER, tmp_path / "adapter")
    assert torch.equal(loading.load_actor(tmp_path / "adapter", CPU).lm_head.weight, causal(1).lm_head.weight)


def test_a_run_means_the_revision_of_its_settings_and_records_the_commit(hub, outputs, tmp_path):
    offline_mistral.build(tmp_path / "m", tmp_path / "o.yaml", "float32")
    overrides = offline_mistral.settings(tmp_path / "m", "float32")
    overrides["models"] |= {"base": "lab/base", "base_revision": hub["old"], "instruct": "lab/base"}
    run = Run(load_settings("mistral_7b", run_id="a", overrides=overrides))
    run.here = finished(run, BASE)
    assert run.here.provenance()["inputs"]["weights:base"] == f"commit:{hub['old']}"
    assert torch.equal(Inputs(run).base().lm_head.weight, causal(1).lm_head.weight)
    assert torch.equal(Inputs(run).instruct().lm_head.weight, causal(0).lm_head.weight), "its own revision is main"
    del overrides["models"]["base_revision"]
    moved = Run(load_settings("mistral_7b", run_id="b", overrides=overrides))
    with pytest.raises(C2FError, match="01_base_model of run 'a' was made with other weights of models.base"):
        moved.inputs(REWARD)


def test_a_revision_of_a_folder_is_refused(tmp_path):
    saved(tmp_path / "m")
    offline_mistral.build(tmp_path / "o", tmp_path / "o.yaml", "float32")
    overrides = offline_mistral.settings(tmp_path / "o", "float32")
    overrides["models"]["instruct_revision"] = "v2"
    with pytest.raises(C2FError, match="models.instruct_revision = 'v2' has no effect on models.instruct = "):
        load_settings("mistral_7b", overrides=overrides)


def _answer(status: int):
    import httpx2

    return httpx2.Response(status, request=httpx2.Request("GET", "https://hub/lab/secret?token=hf_KEYKEYKEY"))


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (lambda: errors.GatedRepoError("hf_KEYKEYKEY", response=_answer(403)), "is gated: accept its terms"),
        (lambda: errors.RepositoryNotFoundError("hf_KEYKEYKEY", response=_answer(404)), "shows it to its members only"),
        (lambda: errors.RevisionNotFoundError("hf_KEYKEYKEY", response=_answer(404)), "has no revision 'v9'"),
        (lambda: errors.HfHubHTTPError("hf_KEYKEYKEY", response=_answer(401)), r"refuses access .*\(401\): give a tok"),
        (lambda: errors.HfHubHTTPError("hf_KEYKEYKEY", response=_answer(503)), "answered 503 .*: try again later"),
        (lambda: errors.LocalTokenNotFoundError("hf_KEYKEYKEY"), "give a token"),
        (lambda: errors.LocalEntryNotFoundError("hf_KEYKEYKEY"), "the hub cannot be reached: look at the network"),
        (lambda: errors.OfflineModeIsEnabled("hf_KEYKEYKEY"), "offline mode is on: unset HF_HUB_OFFLINE"),
        (lambda: OSError("something about hf_KEYKEYKEY"), "something about hf_"),
    ],
    ids=["gated", "unknown", "revision", "refused", "down", "no token", "unreachable", "offline", "other"],
)
def test_what_the_hub_refuses_is_said_with_the_remedy_and_without_a_key(monkeypatch, tmp_path, raised, said):
    import transformers

    def refuse(*_, **__):
        raise raised()

    def wrapped(*_, **__):  # as the library hands it on
        try:
            refuse()
        except Exception as error:
            raise OSError("You cannot have this. hf_KEYKEYKEY" if error.args else "") from error

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", wrapped)
    attempts = [
        lambda: weights.pinned("lab/secret", "v9", "models.base"),
        lambda: weights.locate("lab/secret@v9", "base"),
        lambda: loading.load_causal("lab/secret@v9", CPU),
    ]
    for number, attempt in enumerate(attempts):
        with pytest.raises(C2FError, match="lab/secret") as caught:
            attempt()
        assert "KEY" not in str(caught.value) and "\n" not in str(caught.value)
        if not (number == 2 and said.startswith("something")):
            caught.match(said)


def test_offline_and_not_in_the_cache_is_one_sentence_with_the_remedy(hub):
    for attempt in (
        lambda: weights.pinned("lab/other", None, "models.base"),
        lambda: weights.locate("lab/other", "base"),
        lambda: loading.load_causal("lab/other", CPU),
    ):
        with pytest.raises(C2FError, match="not in the local cache and offline mode is on: unset HF_HUB_OFFLINE"):
            attempt()


# Shards


def test_a_sharded_model_is_read_as_the_whole_one(tmp_path):
    whole, shards = saved(tmp_path / "whole"), saved(tmp_path / "shards", shard="20KB")
    assert len(weights.files(shards)) > 2
    one, other = dict(loading.stored(whole)), dict(loading.stored(shards))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert weights.count(str(whole)) == weights.count(str(shards)) == sum(v.numel() for v in one.values())
    weights.files(shards)[1].unlink()
    with pytest.raises(C2FError, match=r"lacks 1 of \d+ shards, first model-00002"):
        loading.load_causal(shards, CPU)


# Disk


def mistral(tmp_path: Path, monkeypatch, **overrides) -> Run:
    """Profile mistral_7b with the shapes of Mistral-7B in the cache and none of its weights."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--mistralai--Mistral-7B-v0.1"
    (repo / "snapshots" / ("c" * 40)).mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("c" * 40)
    shape = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 32}
    shape |= {"intermediate_size": 14336, "vocab_size": 32000, "tie_word_embeddings": False}
    (repo / "snapshots" / ("c" * 40) / "config.json").write_text(json.dumps(shape))
    return Run(load_settings("mistral_7b", run_id="a", overrides=overrides))


def test_the_weights_of_a_model_are_counted_from_its_configuration(tmp_path, monkeypatch):
    mistral(tmp_path, monkeypatch)
    assert weights.count("mistralai/Mistral-7B-v0.1") == pytest.approx(7.2417e9, rel=1e-4)
    assert weights.count("mistralai/unknown") is None


def test_what_06_will_write_is_announced_and_refused_where_it_does_not_fit(outputs, tmp_path, monkeypatch):
    run = mistral(tmp_path, monkeypatch)
    stage = run.stage("06_residue_merging")
    assert 70e9 < stage.disk_needed() < 80e9, "model, four whole controls, the adapters of the fifth"
    monkeypatch.setattr(disk, "free", lambda folder: 40e9)
    with pytest.raises(C2FError, match=r"has 38147 MB free, 7\d{4} MB are needed; .*models of about 7\d GB"):
        stage.plan()
    monkeypatch.setattr(disk, "free", lambda folder: 90e9)
    assert stage.plan() == "fresh"


def test_what_a_stage_has_written_already_is_not_asked_for_again(outputs, tmp_path, monkeypatch):
    stage = mistral(tmp_path, monkeypatch).stage("06_residue_merging")
    monkeypatch.setattr(disk, "free", lambda folder: 200e9)  # whatever this machine has
    stage.begin()
    stage.release()
    monkeypatch.setattr(disk, "used", lambda folder: 60e9)
    monkeypatch.setattr(disk, "free", lambda folder: 20e9)
    assert stage.plan() == "continue"


@pytest.mark.parametrize("profile", ["smoke", "tiny"])
def test_the_models_of_a_laptop_ask_for_nothing_worth_a_word(profile):
    run = Run(load_settings(profile))
    for name in ("01_base_model", "03_coarse_rlhf", "04_length_schedules", "06_residue_merging"):
        assert 0 < run.stage(name).disk_needed() < 200e6


def test_what_differs_between_the_settings_of_small_gpus_pair_does_not_stop_their_merge(tmp_path):
    """Qwen3-0.6B beside its base at toy size: other positions, another EOS, the tied head stored twice."""
    from safetensors.torch import save_file
    from transformers import Qwen3Config, Qwen3ForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 90, "tie_word_embeddings": True}
    kinds = {"base": (64, 2), "instruct": (96, 3), "coarse": (64, 2)}
    for seed, (name, (positions, end)) in enumerate(kinds.items()):
        torch.manual_seed(seed)
        config = Qwen3Config(**shape, max_position_embeddings=positions, eos_token_id=end, bos_token_id=1)
        Qwen3ForCausalLM(config).save_pretrained(tmp_path / name)
    file = tmp_path / "instruct" / "model.safetensors"
    state = load_file(file)
    save_file(state | {"lm_head.weight": state["model.embed_tokens.weight"].clone()}, file, {"format": "pt"})
    recipe = merge.Recipe(**{name: str(tmp_path / name) for name in kinds}, coefficient=0.5)
    merge.run_merge(merge.plan_merge(recipe), tmp_path / "fine")
    made = json.loads((tmp_path / "fine" / "config.json").read_text())
    assert (made["max_position_embeddings"], made["eos_token_id"]) == kinds["instruct"]


def test_a_revision_with_slashes_is_still_a_revision_of_a_hub_model(tmp_path):
    assert weights.split("owner/name@refs/pr/1") == ("owner/name", "refs/pr/1")
    assert not weights.is_hub(str(tmp_path)) and not weights.is_hub("a/b/c@main")
    with pytest.raises(C2FError, match="holds no safetensors weights"):
        weights.digest(tmp_path)
    for overrides in ({"models.base": "owner/name@a", "models.base_revision": "b"},):
        with pytest.raises(C2FError, match="name two; keep one"):
            load_settings("mistral_7b", overrides=overrides)
