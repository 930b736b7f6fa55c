"""On-policy distillation: the loss against a plain float64 loop, who grades which tokens, and resuming."""

import copy
import math

import pytest
import torch
from tiny_models import LAWS, SHAPE, TOKENIZER, PrefixReward, causal, prompts

from c2f_utils.coarse import actor_critic
from c2f_utils.coarse.distil import Distillation, graded_by_coarse
from c2f_utils.coarse.experience import Experience
from c2f_utils.domain import stated, stories
from c2f_utils.domain.problems import EOS, PAD
from c2f_utils.domain.samples import Prompt, Sample
from c2f_utils.errors import C2FError
from c2f_utils.rollout.decoder import KVDecoder
from c2f_utils.settings.config import Coarse
from c2f_utils.settings.laws import make_law

PROMPTS = prompts(8)


def distillation(folder=None, those=PROMPTS, teacher: int = 7, **changes) -> Distillation:
    actor = causal()
    policy = actor_critic.ActorCritic(actor, actor_critic.Critic(SHAPE.hidden_size))
    settings = {"iterations": 4, "prompts": 8, "tokens_per_micro_batch": 200, "checkpoint_every": 1} | changes
    config = Coarse(law=LAWS["fixed"], critic="shared", critic_head="zero", **settings)
    return Distillation(
        policy, PrefixReward(), KVDecoder(actor, TOKENIZER), those, make_law(LAWS["fixed"]), config,
        seed=0, pad_id=PAD, folder=folder, teacher=causal(teacher),
    )  # fmt: skip


def answered(words: str, number: int = 0) -> Sample:
    return Sample(PROMPTS[number], stories.encode(words.split()), "eos", 40)


STATING = [
    answered("let us think . start with 3 . answer : 4 . answer : 5 . </s>"),
    answered("answer : 2 . maybe it is more . </s>", 1),
    answered("this is not easy . </s>", 2),
]


def test_the_end_of_a_stated_answer_is_where_the_checker_reads_one():
    problem = PROMPTS[0].problem
    assert stated.ends(problem, STATING[0].ids) == [12, 16]
    assert stated.ends(problem, stories.encode("so it goes on . answer : 7 </s>".split())) == [8]
    assert stated.ends(problem, STATING[2].ids) == [] == stated.ends(problem, [])
    assert [graded_by_coarse(s) for s in STATING] == [12, 4, 6]


def test_right_answers_are_cut_where_they_state_their_result():
    problem, gold = PROMPTS[0].problem, str(PROMPTS[0].problem.answer)
    wrong = str(next(n for n in range(9) if str(n) != gold))
    texts = [
        f"let us think . answer : {gold} . so it goes on . answer : {wrong} .",
        f"so it goes on . maybe it is more . answer : {gold} . answer : {gold} . this",
        f"answer : {wrong} . answer : {gold} .",
        "this is not easy .",
    ]
    answers = [stories.encode(text.split()) for text in texts]
    first = stories.encode(f"let us think . answer : {gold} . </s>".split())
    assert stated.shortest_right(problem, answers) == first
    assert stated.shortest_right(problem, answers[2:]) is None
    kept = stated.right_to_the_last(problem, answers)
    assert kept == [[*answers[1][:-1], EOS], [*answers[2], EOS]]


def test_the_loss_is_the_reverse_kl_of_every_answer_token_over_the_whole_vocabulary():
    process, steps = distillation(temperature=0.7), 0.0
    with torch.no_grad():  # a student that is not the model it started as
        for p in process.policy.actor.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    student, coarse, own = (
        copy.deepcopy(m).double() for m in (process.policy.actor, causal(7), causal())
    )  # as the trainer has them
    tokens = 0
    for sample in STATING:
        ids, start = torch.tensor([[*sample.prompt.ids, *sample.ids]]), len(sample.prompt.ids)
        with torch.no_grad():
            logits = [model(ids).logits[0] / 0.7 for model in (student, coarse, own)]
        end = stated.ends(sample.prompt.problem, sample.ids)[:1] or [len(sample.ids)]
        for k in range(len(sample.ids)):
            p, *teachers = (row[start + k - 1].softmax(-1).tolist() for row in logits)
            q = teachers[0] if k < end[0] else teachers[1]
            steps += sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))
            tokens += 1
    found = process.loss(Experience(STATING, 40), [0, 1, 2], tokens)[0].detach()
    assert float(found) == pytest.approx(steps / tokens, rel=1e-5)
    pieces = sum(float(process.loss(Experience(STATING, 40), [i], tokens)[0].detach()) for i in range(3))
    assert pieces == pytest.approx(float(found), rel=1e-5), "cut into micro-batches it is the same"


def test_behind_the_first_answer_a_student_that_is_still_instruct_learns_nothing():
    process = distillation()
    process.loss(Experience(STATING[:2], 40), [0, 1], 30)[0].backward()
    before = {name: p.grad.clone() for name, p in process.policy.actor.named_parameters()}
    assert max(float(g.abs().max()) for g in before.values()) > 1e-3
    process.updates.clear()
    longer = [answered("let us think . start with 3 . answer : 4 . " + "so it goes on . " * 5 + "</s>"), STATING[1]]
    process.loss(Experience(longer, 60), [0, 1], 30)[0].backward()
    for name, p in process.policy.actor.named_parameters():
        assert torch.allclose(p.grad, before[name], atol=1e-6), name
    process.updates.clear()
    same = distillation(teacher=0)  # both teachers are what the student is
    loss, _ = same.loss(Experience(STATING, 40), [0, 1, 2], 30)
    loss.backward()
    assert abs(float(loss.detach())) < 1e-6
    assert all(p.grad.abs().max() < 1e-6 for p in same.policy.actor.parameters() if p.grad is not None)


def test_a_student_comes_nearer_to_its_teacher_and_continues_where_it_was_stopped(tmp_path):
    whole = distillation(tmp_path / "whole", iterations=12, actor_learning_rate=5e-3)
    rows = list(whole)
    assert rows[-1]["reverse_kl"] < 0.7 * rows[0]["reverse_kl"]
    assert [row["iteration"] for row in rows] == list(range(1, 13)) and whole.rollout_tokens == rows[-1][
        "rollout_tokens"
    ]
    broken = distillation(tmp_path / "broken", iterations=12, actor_learning_rate=5e-3)
    for row in broken:
        if row["iteration"] == 5:
            break
    again = distillation(tmp_path / "broken", iterations=12, actor_learning_rate=5e-3)
    list(again)
    untimed = [[{k: v for k, v in row.items() if k != "seconds"} for row in p.history] for p in (whole, again)]
    assert untimed[0] == untimed[1]
    for (name, a), b in zip(whole.policy.actor.named_parameters(), again.policy.actor.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_prompts_without_a_problem_are_refused():
    with pytest.raises(C2FError, match="nobody knows where an answer states its result"):
        distillation(those=[Prompt(p.ids, p.text) for p in PROMPTS])


@pytest.mark.slow
def test_the_loss_is_that_of_the_library_s_distillation_where_one_teacher_grades_everything():
    from trl.experimental.gkd import GKDTrainer

    process = distillation()
    sample = STATING[2]  # it states nothing: coarse grades all of it
    ids, start = torch.tensor([[*sample.prompt.ids, *sample.ids]]), len(sample.prompt.ids)
    with torch.no_grad():
        student, teacher = (m(ids).logits[:, start - 1 : -1] for m in (causal(), causal(7)))
    expected = GKDTrainer.generalized_jsd_loss(student, teacher, beta=1.0, reduction="sum")
    found, _ = process.loss(Experience([sample], 40), [0], 1)
    assert float(found.detach()) == pytest.approx(float(expected), rel=1e-5)
