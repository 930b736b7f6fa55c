"""What notebooks show before they compute (one pair, one iteration, one answer) are the numbers that are used."""

import pytest
import torch

from c2f_utils.coarse.experience import token_rows
from c2f_utils.report import figures, tables_laws
from c2f_utils.report.results import committed, committed_seeds
from c2f_utils.runs.run import Run
from c2f_utils.settings.load import load_settings
from c2f_utils.stages import coarse_rlhf, reward_model
from c2f_utils.stages.inputs import Inputs


@pytest.fixture
def opened(smoke_run, monkeypatch):
    """A finished stage of the smoke run, opened to be read."""
    monkeypatch.setenv("C2F_OUTPUTS", str(smoke_run.parent))

    def at(stage: str) -> Run:
        run = Run(load_settings("smoke", run_id=smoke_run.name))
        run.here = run.stage(stage)
        return run

    return at


def test_the_credit_that_is_shown_adds_up(opened):
    """Final reward, GAE at a cut and the critic's target can be recomputed from the rows alone."""
    inputs = Inputs(opened("03_coarse_rlhf"))
    trainer = coarse_rlhf.small_trainer(inputs, prompts=6)
    trainer.step()
    experience = trainer.credit(trainer.judge(trainer.collect()))
    advantages = torch.cat([experience.returns[i, : s.tokens] - experience.values[i, : s.tokens]
                            for i, s in enumerate(experience.samples)])  # fmt: skip
    for index, sample in enumerate(experience.samples):
        rows = token_rows(experience, index, [f"w{token}" for token in sample.ids])
        assert len(rows) == sample.tokens and rows[0]["token"] == f"w{sample.ids[0]}"
        assert rows[-1]["reward"] - rows[-1]["kl_price"] == pytest.approx(float(experience.shaped[index]), abs=1e-6)
        following, lam = {"value": 0.0, "return": 0.0}, trainer.config.lambda_critic
        for row in reversed(rows):
            delta = row["reward"] + following["value"] - row["value"]
            advantage = delta + lam * (following["return"] - following["value"])
            assert row["return"] - row["value"] == pytest.approx(advantage, abs=1e-5)
            whitened = (advantage - float(advantages.mean())) / float(advantages.std(unbiased=False))
            assert row["advantage"] == pytest.approx(whitened, abs=1e-3)
            following = row
        assert index or "the answer's reward" in " ".join(
            text.get_text() for ax in figures.credit_of_one_answer(rows).axes for text in ax.texts
        )


def test_the_pair_that_is_shown_ends_in_its_rewards(opened):
    pair, rows = reward_model.one_pair(opened("02_reward_model"))
    assert pair["chosen"]["prompt"] == pair["rejected"]["prompt"] and pair["chosen"]["text"] != pair["rejected"]["text"]
    for name, answer in pair.items():
        mine = [row for row in rows if row["answer"] == name]
        assert [row["position"] for row in mine] == list(range(1, answer["tokens"] + 1))
        assert mine[-1]["reward"] == answer["reward"]
    assert len(figures.pair_scores(rows).data) == len(rows)


def test_code_and_law_multiply_to_the_whole_speed_and_fixed_long_is_its_own_measure():
    frame = tables_laws.equal_quality_table(committed("time_to_target")).set_index("arm")
    assert (frame["times faster: code"] * frame["law"] / frame["in all"]).tolist() == pytest.approx([1] * len(frame))
    assert frame.loc["fixed_long", ["tokens", "law"]].tolist() == [1, 1]
    assert (frame["law low"] <= frame["law"]).all() and (frame["tokens"] <= frame["tokens high"]).all()


def test_committed_seeds_are_drawn_like_evaluations_of_runs():
    runs, names = committed_seeds("tiny_seeds_11_to_15", {"fine": "fine actor"})
    assert names == [f"seed {seed}" for seed in range(11, 16)]
    frame = figures.seed_overview(runs, names).data
    assert "fine actor" in set(frame["label"]) and frame.groupby(["model", "metric"]).size().eq(5).all()
