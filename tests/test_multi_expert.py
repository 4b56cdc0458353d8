"""Are the experts of the multi-expert baseline independent, and each in charge of its interval?"""

import torch
from helpers import NUM_TIMESTEPS, TINY, batch, tiny

from methods.multi_expert import MultiExpert


def test_one_interval_is_dense():
    dense, method = tiny("dense"), tiny("multi_expert", experts=1)
    method.load_dense(dense.network.state_dict())
    x, t, y = batch(method.intervals[0])
    assert torch.equal(method(x, t, y, method.intervals[0]).output, dense.network(x, t, y))


def test_every_expert_starts_from_the_dense_weights_and_shares_none():
    dense, method = tiny("dense"), tiny("multi_expert")
    method.load_dense(dense.network.state_dict())
    for network in method.networks:
        assert all(torch.equal(a, b) for a, b in zip(network.parameters(), dense.network.parameters(), strict=True))
    with torch.no_grad():
        method.networks[0].final.linear.bias.add_(1)
    assert torch.equal(method.networks[1].final.linear.bias, dense.network.final.linear.bias)


def test_only_the_expert_of_the_interval_gets_gradients():
    method = tiny("multi_expert")
    interval = method.intervals[2]
    method(*batch(interval), interval).output.square().mean().backward()
    for index, network in enumerate(method.networks):
        assert all((p.grad is not None) == (index == 2) for p in network.parameters())


def test_experts_draw_their_own_initial_weights():
    torch.manual_seed(0)
    method = MultiExpert(TINY, num_timesteps=NUM_TIMESTEPS, experts=2)
    first, second = (network.blocks[0].attn.qkv.weight for network in method.networks)
    assert not torch.equal(first, second)


def test_one_expert_is_active_at_a_time():
    assert tiny("multi_expert").num_active_parameters() == tiny("dense").num_active_parameters()
