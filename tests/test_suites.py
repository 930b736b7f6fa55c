"""Tasks by lm-eval: the numbers of its own command line, prompts as everywhere else, nothing shared by two models."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import offline_mistral
import pytest
import torch
import yaml
from test_task_files import GOOD, place
from tiny_models import TOKENIZER, causal

from c2f_utils.domain import forms, stories, task_files
from c2f_utils.domain.problems import EOS
from c2f_utils.domain.samples import make_prompts
from c2f_utils.errors import C2FError
from c2f_utils.measure import answers, suites
from c2f_utils.models import loading

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% if m['role'] == 'assistant' %}"
    "{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
PROBLEMS = stories.problems("test", 24, 5)


def talker(seed: int = 0):
    """A random model of the embedded domain that goes on to the limit."""
    model = causal(seed)
    with torch.no_grad():
        model.lm_head.weight[EOS] = 0
    return model


@pytest.fixture(scope="module")
def mistral(tmp_path_factory):
    """A toy Mistral with a byte-level tokenizer that has a chat template, loaded as 07 loads one."""
    from tokenizers import processors

    folder = tmp_path_factory.mktemp("mistral")
    tokenizer = offline_mistral.tokenizer([row["chosen"] for row in offline_mistral.pairs()])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer.chat_template = TEMPLATE
    made = offline_mistral.model(len(tokenizer), max_position_embeddings=1024)
    loading.save_model(made, tokenizer, folder / "model")
    return folder / "model"


@pytest.fixture
def log(tmp_path):
    return tmp_path / "log.txt"


@pytest.fixture
def embedded(tmp_path, log):
    entries = suites.embedded(PROBLEMS, 0, 40, tmp_path / "embedded")
    return suites.prepare([("embedded", entry) for entry in entries], log)


def local(tmp_path, log, shots: int = 0, limit: int = 16):
    entries = suites.local(task_files.read(tmp_path / "data"), shots, limit, tmp_path / "local")
    return {task.name: task for task in suites.prepare([("local", entry) for entry in entries], log)}


def test_embedded_answers_are_those_of_our_own_greedy_decoder(embedded, log):
    model = talker()
    lm = suites.harness(model, TOKENIZER, False, 7, log)
    result, rows = suites.ask(embedded[1], lm, False, 0, log)
    samples = answers.answers(model, TOKENIZER, make_prompts(PROBLEMS), "greedy", 40, 0)
    assert [row["response"] for row in rows] == [[stories.decode(s.answer)] for s in samples]
    assert len({row["response"][0] for row in rows}) > 1 and result["n"] == len(PROBLEMS)


def test_a_choice_is_the_result_that_the_model_finds_likeliest(embedded, log):
    model = causal()
    result, rows = suites.ask(embedded[0], suites.harness(model, TOKENIZER, False, 64, log), False, 0, log)
    written = [json.loads(line) for line in (log.parent / "embedded" / "c2f_choice.jsonl").read_text().splitlines()]
    right = []
    for problem, row, sample in zip(PROBLEMS, written, rows, strict=True):
        assert row["choices"][row["right"]] == f"answer : {problem.answer} ." and len(set(row["choices"])) == 4
        prompt, scores = problem.prompt_ids, []
        for choice in row["choices"]:
            ids = torch.tensor([prompt + stories.encode(choice.split())])
            with torch.no_grad():
                logps = model(ids).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
            scores.append(logps.gather(-1, ids[0, len(prompt) :, None]).sum().item())
        assert [score for score, _ in sample["response"]] == pytest.approx(scores, abs=1e-4)
        right.append(float(scores.index(max(scores)) == row["right"]))
    assert suites.values(result, rows) == right and result["score"] == sum(right) / len(right)
    assert {row["right"] for row in written} == {0, 1, 2, 3} and embedded[0].chance == 0.25


def test_an_answer_counts_by_what_it_states_last(embedded, log):
    task = embedded[1].loaded["tasks"]["c2f_generation"]
    doc = task.eval_docs[0]
    wrong = str(int(doc["answer"]) + 1)

    class Says:
        rank, world_size, max_length, max_gen_toks = 0, 1, 999, 40
        tok_encode = staticmethod(str.split)

        def generate_until(self, requests):
            said = [f"answer : {wrong} . answer : {doc['answer']} .", f"answer : {doc['answer']} . answer : {wrong} ."]
            return [said[0], said[1], *["so it goes on ."] * (len(requests) - 2)]

    _, rows = suites.ask(embedded[1], Says(), False, 0, log)
    assert rows[0]["metrics"] == {"exact_match,last": 1.0}
    assert not any(row["metrics"]["exact_match,last"] for row in rows[2:])
    assert rows[0]["read"] == {"last": [doc["answer"]]} and rows[1]["read"] == {"last": [wrong]}


@pytest.mark.parametrize("template", [False, True], ids=["raw", "template"])
def test_prompts_begin_with_one_bos_and_are_the_tokens_of_the_rest_of_07(mistral, tmp_path, log, template):
    place(tmp_path, "data/mine.jsonl", GOOD, GOOD | {"question": "What is 2 + 2?"})
    tokenizer = loading.load_tokenizer(mistral)
    model = offline_mistral.model(len(tokenizer))
    seen = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs.get("input_ids", *args)), with_kwargs=True
    )
    lm = suites.harness(model, tokenizer, template, 1, log)
    _, rows = suites.ask(local(tmp_path, log)["local_mine"], lm, template, 1, log)
    text = "Q: What is 1 + 1?\nA:"
    if template:
        wanted = forms.prompt_ids(f"{forms.HUMAN} {text}{forms.ASSISTANT}", "template", tokenizer)
    else:
        wanted = forms.prompt_ids(text, "raw", tokenizer)
    assert seen[0].tolist() == [wanted] and wanted.count(tokenizer.bos_token_id) == 1 and wanted[0] == 1
    assert len(rows) == 1 and rows[0]["prompt"].endswith("[assistant]" if template else "A:")


def test_a_tokenizer_that_ends_every_text_is_refused(mistral, log):
    from tokenizers import processors

    tokenizer = loading.load_tokenizer(mistral)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    with pytest.raises(C2FError, match="its scores would be of other prompts"):
        suites.harness(offline_mistral.model(len(tokenizer)), tokenizer, False, 1, log)


def test_a_template_without_bos_gets_none(mistral, log):
    tokenizer = loading.load_tokenizer(mistral)
    tokenizer.chat_template = TEMPLATE.removeprefix("{{ bos_token }}")
    lm = suites.harness(offline_mistral.model(len(tokenizer)), tokenizer, True, 1, log)
    assert 1 not in lm.tok_encode(lm.apply_chat_template([{"role": "user", "content": "Hello"}]))


def test_two_models_never_share_what_is_kept_and_lm_evals_own_cache_would(embedded, tmp_path, log):
    """The same requests: what lm-eval's cache gives the second model are the first one's numbers."""
    from lm_eval.api.model import CachingLM

    task, found, keys = embedded[0], [], []
    for seed in (0, 1):
        model = causal(seed)
        keys.append(task.key(loading.digest(model), TOKENIZER, False, 0, 64))
        assert suites.kept(tmp_path / "kept", keys[-1]) is None
        found.append(suites.ask(task, suites.harness(model, TOKENIZER, False, 64, log), False, 0, log))
        suites.keep(tmp_path / "kept", keys[-1], *found[-1])
    kept = [suites.kept(tmp_path / "kept", key) for key in keys]
    assert [json.loads(json.dumps(each)) for each in found] == [list(each) for each in kept]
    responses = [[row["response"] for row in rows] for _, rows in kept]
    assert responses[0] != responses[1]
    theirs = []
    for seed in (0, 1):
        lm = CachingLM(suites.harness(causal(seed), TOKENIZER, False, 64, log), str(tmp_path / "theirs.db"))
        theirs.append([row["response"] for row in suites.ask(task, lm, False, 0, log)[1]])
    assert theirs[0] == theirs[1], "lm-eval tells models apart by now: our own keeping may be done away with"


def test_everything_that_decides_a_result_is_in_its_key(embedded, mistral, tmp_path, log):
    task, tokenizer = embedded[0], loading.load_tokenizer(mistral)
    model = causal()
    digests = [loading.digest(model), loading.digest(model.to(torch.bfloat16)), loading.digest(causal(1))]
    lora = loading.add_lora(causal(), loading.Lora(rank=2, alpha=4))
    with torch.no_grad():
        next(p for n, p in lora.named_parameters() if "lora_B" in n).fill_(0.1)
    digests.append(loading.digest(lora.merge_and_unload()))
    other = causal()
    other.config.rms_norm_eps *= 2
    digests.append(loading.digest(other))
    assert loading.digest(causal()) == digests[0] and len(set(digests)) == len(digests)
    usual = task.key("m", tokenizer, True, 0, 64)
    changed = [
        task.key("m", tokenizer, False, 0, 64), task.key("n", tokenizer, True, 0, 64),
        task.key("m", TOKENIZER, False, 0, 64), task.key("m", tokenizer, True, 5, 64),
        task.key("m", tokenizer, True, 0, 8), replace(task, headline="f1,none").key("m", tokenizer, True, 0, 64),
    ]  # fmt: skip
    tokenizer.chat_template += " "
    changed.append(task.key("m", tokenizer, True, 0, 64))
    for problems, limit in ((PROBLEMS[1:], 40), (PROBLEMS, 39)):
        entries = suites.embedded(problems, 0, limit, tmp_path / "other")
        changed.append(suites.prepare([("embedded", entries[1])], log)[0].key("m", tokenizer, True, 0, 64))
    places = {suites.place_of(key) for key in [usual, *changed]}
    assert len(places) == 1 + len(changed)
    again = suites.embedded(PROBLEMS, 0, 40, tmp_path / "elsewhere")
    assert suites.prepare([("embedded", again[0])], log)[0].identity == task.identity, "a place is no part of it"


def test_worked_examples_are_the_first_rows_and_never_asked(mistral, tmp_path, log):
    rows = [{"question": f"What is {n}?", "answer": f"it is {n}"} for n in range(5)]
    place(tmp_path, "data/mine.jsonl", *rows)
    tokenizer = loading.load_tokenizer(mistral)
    lm = suites.harness(offline_mistral.model(len(tokenizer)), tokenizer, False, 4, log)
    result, found = suites.ask(local(tmp_path, log, shots=2)["local_mine"], lm, False, 0, log)
    assert (result["n"], result["shots"]) == (3, 2)
    assert found[0]["prompt"] == "Q: What is 0?\nA: it is 0\n\nQ: What is 1?\nA: it is 1\n\nQ: What is 2?\nA:"
    with pytest.raises(C2FError, match="tasks.shots = 5"):
        local(tmp_path, log, shots=5)


def test_a_prompt_that_lost_its_beginning_is_counted(mistral, tmp_path, log):
    place(tmp_path, "data/mine.jsonl", GOOD, GOOD | {"question": "word " * 400})
    tokenizer = loading.load_tokenizer(mistral)
    lm = suites.harness(offline_mistral.model(len(tokenizer)), tokenizer, False, 4, log)
    result, _ = suites.ask(local(tmp_path, log)["local_mine"], lm, False, 0, log)
    assert result["cut_prompts"] == 1


def test_an_unknown_task_and_data_that_only_the_hub_has_are_refused(log, monkeypatch):
    with pytest.raises(C2FError, match="lm-eval knows no task 'arc_chalenge'"):
        suites.prepare([("lm-eval", "arc_chalenge")], log)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(C2FError, match="the data of arc_challenge cannot be loaded .*set HF_HOME"):
        suites.prepare([("general_11", suites.suite("general_11")[0])], log)


def test_our_list_of_eleven_is_known_to_lm_eval():
    from lm_eval.tasks import TaskManager

    entries = suites.suite("general_11")
    assert len({entry["task"] for entry in entries}) == 11
    assert {entry["task"] for entry in entries} <= set(TaskManager().all_tasks)
    assert all(entry["num_fewshot"] == 5 and "," in entry["headline"] for entry in entries)


def test_nothing_is_said_on_the_screen_and_no_random_number_is_drawn(embedded, log, capfd):
    model, before = talker(), torch.random.get_rng_state()
    suites.ask(embedded[1], suites.harness(model, TOKENIZER, False, 64, log), False, 2, log)
    assert capfd.readouterr() == ("", "") and log.read_text()
    assert torch.equal(before, torch.random.get_rng_state())


def command_line(folder, tmp_path, *more: str) -> dict:
    """Results and samples of lm-eval's own command line on a folder of tasks."""
    names = [yaml.safe_load(path.read_text())["task"] for path in folder.glob("*.yaml")]
    told = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--include_path", str(folder), "--device", "cpu"]
    told += ["--tasks", *names, "--batch_size", "16", "--output_path", str(tmp_path / "theirs"), "--log_samples"]
    done = subprocess.run(
        [*told, *more], capture_output=True, text=True, cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (found,) = (tmp_path / "theirs").rglob("results_*.json")
    return json.loads(found.read_text())["results"]


def reported(results: dict) -> dict:
    return {
        name: {k: v for k, v in row.items() if "," in k and "_stderr" not in k and isinstance(v, float | int)}
        for name, row in results.items()
    }


@pytest.mark.slow
def test_embedded_gives_the_numbers_of_lm_evals_command_line(tmp_path, log, embedded):
    loading.save_model(talker(), TOKENIZER, tmp_path / "model")
    theirs = command_line(
        tmp_path / "embedded", tmp_path, "--model_args", f"pretrained={tmp_path / 'model'},dtype=float32"
    )
    lm = suites.harness(talker(), TOKENIZER, False, 16, log)
    assert {task.name: suites.ask(task, lm, False, 0, log)[0]["metrics"] for task in embedded} == reported(theirs)


@pytest.mark.slow
@pytest.mark.parametrize("template", [False, True], ids=["raw", "template"])
def test_published_files_give_the_numbers_of_lm_evals_command_line(mistral, real_data, tmp_path, log, template):
    (tmp_path / "data").mkdir()
    for name in ("gsm8k", "bbh"):
        (tmp_path / "data" / name).symlink_to(real_data / name)
    place(tmp_path, "data/pick.jsonl", *[
        {"question": f"Which word has {n} letters?", "choices": ["a" * k for k in (1, 2, 3, 4)], "answer": "a" * n}
        for n in (1, 2, 3, 4) for _ in range(5)
    ])  # fmt: skip
    tasks = local(tmp_path, log, shots=1)
    told = ["--limit", "40", "--model_args", f"pretrained={mistral},dtype=float32" + ",add_bos_token=False" * template]
    theirs = command_line(tmp_path / "local", tmp_path, *told, *["--apply_chat_template"] * template)
    tokenizer = loading.load_tokenizer(mistral)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(mistral, dtype=torch.float32).eval()
    lm = suites.harness(model, tokenizer, template, 16, log)
    assert {name: suites.ask(task, lm, template, 40, log)[0]["metrics"] for name, task in tasks.items()} == reported(
        theirs
    )
