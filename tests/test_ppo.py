"""The mathematics of PPO against slow, obvious references."""

import pytest
import torch

from c2f_utils.coarse import ppo


def reference_gae(rewards, values, final, lengths, gamma, lam):
    """O(T^2): A_t = sum_k (gamma lambda)^k delta_{t+k}."""
    out = torch.zeros_like(values)
    for i, n in enumerate(lengths):
        deltas = []
        for t in range(n):
            after = values[i, t + 1] if t + 1 < n else final[i]
            deltas.append(rewards[i, t] + gamma * after - values[i, t])
        for t in range(n):
            out[i, t] = sum((gamma * lam[i]) ** k * deltas[t + k] for k in range(n - t))
    return out


@pytest.mark.parametrize("gamma", [1.0, 0.97])
def test_gae_equals_the_quadratic_definition_with_and_without_bootstrap(gamma):
    torch.manual_seed(0)
    lengths = [1, 5, 9, 9]
    mask = ppo.token_mask(lengths)
    rewards, values = torch.randn(2, 4, 9).double() * mask
    final = torch.tensor([0.0, 0.7, 0.0, -1.3]).double()
    lam = torch.tensor([0.95, 1.0, 0.5, 0.0]).double()
    found = ppo.gae(rewards, values, final, mask, gamma, lam)
    assert torch.allclose(found, reference_gae(rewards, values, final, lengths, gamma, lam), atol=1e-12)


def test_gae_ignores_what_lies_behind_an_answer():
    mask = ppo.token_mask([3, 6])
    rewards, values = torch.randn(2, 2, 6) * mask
    dirty = values.masked_fill(~mask, 99.0)
    final = torch.zeros(2)
    assert torch.allclose(
        ppo.gae(rewards, values, final, mask, 1.0, 0.9), ppo.gae(rewards, dirty, final, mask, 1.0, 0.9)
    )


def test_whitened_advantages_have_unit_variance_over_real_tokens_only():
    mask = ppo.token_mask([2, 7, 4])
    white = ppo.whiten(torch.randn(3, 7) * 5 + 3, mask)
    assert white[mask].mean().abs() < 1e-5 and (white[mask].pow(2).mean() - 1).abs() < 1e-4
    assert white[~mask].abs().max() == 0


def test_the_first_policy_gradient_is_that_of_the_advantage():
    logp = torch.tensor([-1.0, -2.0], requires_grad=True)
    advantages = torch.tensor([1.5, -0.5])
    loss, ratio, clipped = ppo.policy_loss(logp, logp.detach(), advantages, 0.2)
    loss.sum().backward()
    assert torch.equal(logp.grad, -advantages) and torch.equal(ratio, torch.ones(2)) and not clipped.any()


@pytest.mark.parametrize(
    ("ratio", "advantage", "gradient"), [(1.5, 1.0, False), (0.5, -1.0, False), (1.5, -1.0, True), (0.5, 1.0, True)]
)
def test_the_clip_stops_only_moves_that_went_far_in_the_wanted_direction(ratio, advantage, gradient):
    logp = torch.tensor([ratio]).log().requires_grad_()
    ppo.policy_loss(logp, torch.zeros(1), torch.tensor([advantage]), 0.2)[0].sum().backward()
    assert bool(logp.grad.abs().sum() > 0) is gradient


def test_the_value_clip_takes_the_larger_error():
    loss = ppo.value_loss(torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([1.0]), 0.2)
    assert loss.item() == pytest.approx(0.5 * 0.8**2)
    assert ppo.value_loss(torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([1.0]), 0.0).item() == 0


def test_explained_variance_is_one_for_a_perfect_critic_zero_for_a_constant_and_unknown_without_variance():
    mask = ppo.token_mask([4, 4])
    returns = torch.randn(2, 4)
    assert ppo.explained_variance(returns, returns, mask) == pytest.approx(1.0)
    assert ppo.explained_variance(torch.full((2, 4), 3.0), returns, mask) == pytest.approx(0.0, abs=1e-6)
    assert ppo.explained_variance(returns, torch.ones(2, 4), mask) is None


def test_the_kl_estimates_agree_in_expectation_and_k3_is_never_negative():
    torch.manual_seed(1)
    p, q = torch.randn(8).log_softmax(0), torch.randn(8).log_softmax(0)
    draws = torch.multinomial(p.exp(), 200_000, replacement=True)
    exact = (p.exp() * (p - q)).sum()
    assert ppo.kl_k1(p[draws], q[draws]).mean() == pytest.approx(exact.item(), rel=0.02)
    k3 = ppo.kl_k3(p[draws], q[draws])
    assert k3.min() >= 0 and k3.mean() == pytest.approx(exact.item(), rel=0.02)


def test_the_kl_controller_moves_towards_its_target_by_a_fifth_at_most():
    controller = ppo.KLController(0.1, target=0.05)
    controller.update(10.0)
    assert controller.coefficient == pytest.approx(0.12)
    controller.update(0.0)
    assert controller.coefficient == pytest.approx(0.096)
    fixed = ppo.KLController(0.1)
    fixed.update(10.0)
    assert fixed.coefficient == 0.1


@pytest.mark.parametrize(("limit", "expected"), [(64, 0.95), (1000, 0.98), (10**9, 1.0)])
def test_lambda_grows_with_the_limit(limit, expected):
    assert ppo.adaptive_lambda(limit, 0.05) == pytest.approx(expected, abs=1e-6)
