"""What laws are told of an iteration, on answers small enough to know every signal by heart."""

import pytest
import torch

from c2f_utils.coarse.experience import Experience, signals, token_rows
from c2f_utils.domain.samples import Prompt, Sample


def test_the_signals_of_answers_known_by_heart():
    prompt = Prompt((9,), "")
    repeating = Sample(prompt, [1, 2, 3, 4, 1, 2, 3, 4], "limit", 8)  # its second half repeats a 4-gram
    ended, late = Sample(prompt, [5, 6, 7, 0], "eos", 8), Sample(prompt, [1, 2, 3, 4, 1, 2, 3, 5], "string", 8)
    half = Sample(prompt, [8, 8, 8, 8, 8, 1, 2, 3], "limit", 8)  # repeats itself, but not at its end
    e = Experience([repeating, ended, late, half], limit=8)
    e.rewards = e.earned = torch.tensor([1.0, 2.0, 3.0, 6.0])
    e.mask = torch.tensor([[True] * 8, [True] * 4 + [False] * 4, [True] * 8, [True] * 8])
    e.logps, e.reference = torch.full((4, 8), -1.0), torch.full((4, 8), -1.5)
    e.values = torch.arange(8.0).expand(4, 8) * torch.tensor([[0.1], [9.0], [9.0], [0.3]])
    e.returns = e.values + torch.tensor([[3.0], [-3.0], [3.0], [-3.0]])
    found = signals(e, 5)
    assert found.iteration == 5 and found.reward == 3.0 and found.limits == (8, 8, 8, 8)
    assert found.truncated_share == 0.5, "a stop string ends an answer, a limit cuts it"
    assert found.value_slope == pytest.approx((0.1 + 0.3) / 2), "the last value less that at three quarters, cut ones"
    assert found.tail_repetition == pytest.approx((1 + 0) / 2), "cut answers only, their last quarter only"
    assert found.kl_per_token == pytest.approx(2.718281828**-0.5 - 1 + 0.5, abs=1e-6)
    assert found.tail_return is None and found.useful_length is None, "no prefix was scored"
    spread = float(e.returns[e.mask].var())
    assert found.value_error == pytest.approx(9 / spread) and spread > 9
    e.returns = torch.where(e.mask, e.values.mean() + e.values * 1e-3, 0.0)
    assert signals(e, 5).value_error == 3.0, "a lost critic counts as three times the variance at most"


def test_the_credit_of_one_answer_token_by_token():
    e = Experience([Sample(Prompt((9,), ""), [5, 6], "eos", 8)], limit=8)
    e.paid, e.shaped = torch.tensor([[-0.25, 2.5]]), torch.tensor([3.0])
    e.mask = torch.ones(1, 2, dtype=torch.bool)
    e.values, e.advantages, e.returns = (torch.tensor([[x, x + 1]]) for x in (1.0, 3.0, 5.0))
    assert token_rows(e, 0, ["five", "six"]) == [
        {"position": 1, "token": "five", "reward": -0.25, "kl_price": -0.25, "value": 1, "advantage": 3, "return": 5},
        {"position": 2, "token": "six", "reward": 2.5, "kl_price": -0.5, "value": 2, "advantage": 4, "return": 6},
    ]
