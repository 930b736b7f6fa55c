"""Decode-time merging and averages: identities that pin them down."""

import gc
import shutil
import weakref
from types import SimpleNamespace

import pytest
import torch
from finished_runs import finished, results
from safetensors.torch import save_file
from tiny_models import TOKENIZER, causal, prompts

from c2f_utils import merge
from c2f_utils.measure import answers
from c2f_utils.models import loading
from c2f_utils.report.results import operator_name
from c2f_utils.rollout.decoder import KVDecoder
from c2f_utils.rollout.proxy import ProxyDecoder
from c2f_utils.rollout.sampler import BatchedSampler
from c2f_utils.runs.run import Run
from c2f_utils.settings.load import load_settings
from c2f_utils.stages import choice_without_labels, evaluation, variants
from c2f_utils.stages.bench import Bench
from c2f_utils.stages.inputs import Inputs
from c2f_utils.stages.residue_merging import Merging


def greedy(decoder) -> list[list[int]]:
    return [s.ids for s in decoder(prompts(5), 20, temperature=0.0)]


def test_without_residue_proxy_tuning_is_the_instruction_model():
    instruct, coarse, base = (causal(seed) for seed in (1, 2, 3))
    assert greedy(ProxyDecoder(instruct, coarse, base, TOKENIZER, 0.0)) == greedy(KVDecoder(instruct, TOKENIZER))


def test_from_the_base_itself_full_proxy_tuning_is_the_coarse_actor():
    coarse, base = causal(2), causal(3)
    found = ProxyDecoder(causal(3), coarse, base, TOKENIZER, 1.0)(prompts(5), 20, temperature=0.0)
    expected = KVDecoder(coarse, TOKENIZER)(prompts(5), 20, temperature=0.0)
    assert [s.ids for s in found] == [s.ids for s in expected]
    assert all(torch.allclose(a.logps, b.logps, atol=1e-4) for a, b in zip(found, expected, strict=True))


def test_proxy_tuning_adds_logits_and_not_probabilities():
    trio = [causal(seed) for seed in (1, 2, 3)]
    sample = ProxyDecoder(*trio, TOKENIZER, 0.5)(prompts(1), 1, temperature=0.0)[0]
    ids = torch.tensor([sample.prompt.ids])
    with torch.no_grad():
        i, c, b = (model(ids).logits[0, -1] for model in trio)
    assert sample.ids == [int((i + 0.5 * (c - b)).argmax())]


def test_proxy_tuning_is_left_out_on_cuda_and_a_sentence_says_so(monkeypatch, capsys):
    monkeypatch.setattr(loading, "device", lambda models: torch.device("cuda"))
    settings = load_settings("smoke")
    assert variants.proxies(SimpleNamespace(inputs=SimpleNamespace(settings=settings)), 0.5) == []
    assert "proxy-tuning is left out: it has not been run on CUDA" in capsys.readouterr().out


def test_averages_over_snapshots_weigh_them_as_their_names_say(tmp_path):
    (tmp_path / "snapshots").mkdir()
    for number, value in enumerate((1.0, 5.0, 9.0, 13.0)):
        save_file({"w": torch.tensor([value, 2.0])}, tmp_path / "snapshots" / f"{number}.safetensors")
    found = []
    bench = SimpleNamespace(states={"coarse": {}}, recipe=lambda *_: None, inputs=SimpleNamespace(base_source="base"))
    bench.measure = lambda recipe, state, of: found.append(state["w"].tolist()) or {}
    kept = {"03_coarse_rlhf": {"snapshots": {}}, "04_length_schedules": {}}
    run = SimpleNamespace(
        parent=lambda stage: SimpleNamespace(models=lambda: kept[stage], model=lambda name: tmp_path / name)
    )
    rows = variants.averages(run, bench, {"name": "residue"}, 1.0)
    assert [(row["name"][:4], row["actors"]) for row in rows] == [("SWA ", 4), ("EMA ", 4), ("LaWA", 3)]
    halved = (1 / 8 + 5 / 4 + 9 / 2 + 13) / (1 / 8 + 1 / 4 + 1 / 2 + 1)
    assert [x for x, _ in found] == pytest.approx([7.0, halved, 9.0]) and {x for _, x in found} == {2.0}


def test_operators_are_named_with_their_numbers():
    assert operator_name({"name": "dare", "density": 0.5, "seed": 3}) == "dare (density 0.5)"
    assert operator_name({"name": "residue"}) == "residue"


@pytest.fixture
def loaded(monkeypatch):
    """How many models that were loaded earlier are still there, whenever one is loaded."""
    alive, counts, load = weakref.WeakSet(), [], loading.load_causal

    def counted(*arguments):
        gc.collect()
        counts.append(len(alive))
        alive.add(model := load(*arguments))
        return model

    monkeypatch.setattr(loading, "load_causal", counted)
    return counts


def begun(smoke_run, tmp_path, monkeypatch, stage: str, **merge: object) -> Run:
    for folder in smoke_run.glob(f"0[0-{int(stage[1]) - 1}]_*"):
        if folder.is_dir():
            shutil.copytree(folder, tmp_path / "mine" / folder.name)
    monkeypatch.setenv("C2F_OUTPUTS", str(tmp_path))
    changes = {f"merge.{name}": value for name, value in merge.items()}
    run = Run(load_settings("smoke", run_id="mine", overrides=changes))
    run.here = run.stage(stage)
    run.here.begin(run.inputs(stage)[0])
    return run


@pytest.mark.slow
def test_evaluation_holds_one_model_at_a_time_beside_the_reward_model(smoke_run, tmp_path, monkeypatch, loaded):
    run = begun(smoke_run, tmp_path, monkeypatch, "07_evaluation")
    evaluation.make(run)
    run.here.finish()
    assert len(loaded) > 6 and max(loaded) == 0
    assert run.here.results() == results(smoke_run, "07")


def test_merging_holds_one_model_and_reads_the_three_it_is_made_of(smoke_run, tmp_path, monkeypatch, loaded):
    run = begun(smoke_run, tmp_path, monkeypatch, "06_residue_merging")
    bench = Bench(Inputs(run))
    assert bench.stored and len(loaded) == 1
    recipe = bench.recipe({"name": "trim", "density": 0.3}, 0.4)
    bench.merged(recipe)
    merge.run_merge(merge.plan_merge(recipe), tmp_path / "merged")
    written = dict(loading.stored(tmp_path / "merged"))
    mine = {name: value.clone() for name, value in bench.model.state_dict().items()}
    assert mine.keys() == written.keys() and all(torch.equal(mine[name], written[name]) for name in written)
    run.here.stop()


def test_a_model_that_the_library_keeps_otherwise_than_stored_is_held_and_merges_alike(
    smoke_run, tmp_path, monkeypatch, capsys
):
    run = begun(smoke_run, tmp_path, monkeypatch, "06_residue_merging")
    usual = Bench(Inputs(run))
    recipe = usual.recipe({"name": "residue"}, 0.4)
    expected = {name: value.clone() for name, value in usual.merged(recipe).state_dict().items()}
    load = loading.load_causal

    def changed(*arguments):
        model = load(*arguments)
        model.register_buffer("table", torch.ones(2))  # as if the library had built it from other tensors
        return model

    monkeypatch.setattr(loading, "load_causal", changed)
    held = Bench(Inputs(run))
    assert not held.stored and "three more copies" in capsys.readouterr().out
    found = held.merged(held.recipe({"name": "residue"}, 0.4, rules=[{"match": "^table$", "set": 0.0}])).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    run.here.stop()


def test_rules_without_labels_choose_by_two_answers_and_are_judged_by_a_third(smoke_run, tmp_path, monkeypatch):
    run = begun(smoke_run, tmp_path, monkeypatch, "06_residue_merging", sections=["label_free"])
    merging = Merging(run)
    bench, drawn, rows = merging.bench, [], merging.sweep()
    sweep = [{**rows[0], "coefficient": 0.0}, *rows]  # with c = 0, the instruction model itself
    sample = bench.inputs.sampled
    monkeypatch.setattr(bench.inputs, "sampled", lambda *given: drawn.append(sample(*given)) or drawn[-1])
    found = choice_without_labels.compare(bench, {"name": "residue"}, sweep)
    count = len(bench.prompts)
    assert [len(samples) for samples in drawn] == [3 * count] * 3 == [found["prompts"] * 3] * 3
    logps = torch.cat([s.logps for s in drawn[0][: 2 * count]]).double()  # under instruct, whose own answers they are
    assert found["rows"][0]["perplexity"] == pytest.approx(logps.mean().neg().exp().item(), rel=1e-5)
    for row, samples in zip(found["rows"], drawn, strict=True):
        last = samples[2 * count :]
        score = sum(bench.scores(last)) / count
        assert row["judged"] == answers.measure(last) | {"score": pytest.approx(score)}
        assert 0 <= row["agreement_draws"] <= 1 and row["prompt_perplexity"] > 1
    (checker,) = (row["coefficient"] for row in found["rules"] if row["rule"] == "checker")
    assert checker == max(sweep, key=lambda row: row["score"])["coefficient"]
    assert choice_without_labels.compare(bench, {"name": "residue"}, sweep) == found and len(drawn) == 3, (
        "kept as pieces"
    )
    run.here.stop()


def test_06_chooses_without_labels_and_interpolates_with_coarse_only_where_it_is_asked_to(
    smoke_run, tmp_path, monkeypatch
):
    plain = {"controls": ["coarse_interpolation"], "other_operators": []}
    run = begun(smoke_run, tmp_path, monkeypatch, "06_residue_merging", sections=["label_free"], **plain)
    found, usual = Merging(run).finish(), results(smoke_run, "06")
    assert found["sweep"] == usual["sweep"] and found["chosen"] == usual["chosen"]
    assert found.keys() - usual.keys() == {"label_free"}
    assert found["label_free"]["rules"][4]["coefficient"] == found["chosen"]["coefficient"]
    control = found["controls"]["coarse_interpolation"]
    assert control["coefficient"] == max(control["sweep"], key=lambda row: row["score"])["coefficient"]
    folders = {"05_instruction_model": "model", "03_coarse_rlhf": "model", "06_residue_merging": "controls"}
    folders["06_residue_merging"] += "/coarse_interpolation"
    instruct, coarse, made = (dict(loading.stored(tmp_path / "mine" / stage / folders[stage])) for stage in folders)
    for name, value in made.items():
        assert torch.allclose(value, torch.lerp(instruct[name], coarse[name], control["coefficient"]), atol=1e-6), name
    run.here.finish()


@pytest.mark.slow
def test_the_best_recipe_of_all_tried_can_be_the_fine_actor_with_one_coefficient_as_its_control(smoke_run, tmp_path):
    for stage in smoke_run.glob("0[0-5]_*"):
        if stage.is_dir():
            shutil.copytree(stage, tmp_path / "best" / stage.name)
    finished(tmp_path, "run", "06", "07", "--profile", "smoke", "--run-id", "best", "-p", "merge.select=best_recipe")
    found, before = results(tmp_path / "best", "07")["models"], results(smoke_run, "07")["models"]
    assert "best_recipe" not in found and "one_coefficient" not in before
    assert found["fine"]["sampled_t1"] == before["best_recipe"]["sampled_t1"]
    assert found["one_coefficient"]["sampled_t1"] == before["fine"]["sampled_t1"]


@pytest.mark.study
def test_06_and_07_hold_two_sets_of_weights_whatever_they_compare(tmp_path, monkeypatch):
    """As on a GPU: adapters, a critic on the actor's trunk, sections and controls of profile mistral_7b."""
    changes = {
        "models.lora": {"rank": 2, "alpha": 4}, "coarse.critic": "shared", "coarse.critic_head": "zero",
        "merge.sections": ["layers", "roundings"],
    }  # fmt: skip
    given = [part for name, value in changes.items() for part in ("-p", f"{name}={value!r}")]
    finished(tmp_path, "run", "01", "02", "03", "04", "05", "--profile", "smoke", "--run-id", "r", *given)
    monkeypatch.setenv("C2F_OUTPUTS", str(tmp_path))
    stored = dict(loading.stored(tmp_path / "r" / "01_base_model" / "model"))
    shapes = {tuple(value.shape) for value in stored.values() if value.dim() == 2}
    one = sum(value.nbytes for value in stored.values() if value.dim() == 2)
    del stored
    held: dict[str, float] = {}

    def counted(sampler, *arguments, **named):
        gc.collect()
        tensors = [item for item in gc.get_objects() if isinstance(item, torch.Tensor) and tuple(item.shape) in shapes]
        storages = {item.untyped_storage().data_ptr(): item.untyped_storage().nbytes() for item in tensors}
        held[stage] = max(held.get(stage, 0.0), sum(storages.values()) / one)
        return sample(sampler, *arguments, **named)

    sample = BatchedSampler.__call__
    monkeypatch.setattr(BatchedSampler, "__call__", counted)
    for stage, make in (("06_residue_merging", lambda run: Merging(run).finish()), ("07_evaluation", evaluation.make)):
        run = Run(load_settings("smoke", run_id="r", overrides=changes))
        run.here = run.stage(stage)
        run.here.begin(run.inputs(stage)[0])
        make(run)
        run.here.finish()
    # The merge or the actor, and the reward model without its head; one tensor or two at a time while it merges.
    assert 1.8 < held["06_residue_merging"] <= 2.5 and 1.8 < held["07_evaluation"] <= 2.2, held
