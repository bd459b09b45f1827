"""The promises of conftest.py: without them a test could pass by talking to the world."""

import os
import socket

import pytest
import torch


def test_a_test_that_reaches_out_fails_with_the_name_of_the_host() -> None:
    """Both ways out: by name and by address."""
    with pytest.raises(RuntimeError, match=r"example\.org.*no network"):
        socket.create_connection(("example.org", 80))
    with socket.socket() as outgoing, pytest.raises(RuntimeError, match=r"192\.0\.2\.1.*no network"):
        outgoing.connect(("192.0.2.1", 80))


def test_a_server_on_this_machine_can_be_reached() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        assert client.getpeername() == server.getsockname()


def test_every_test_starts_with_one_thread_and_the_same_random_state() -> None:
    assert torch.get_num_threads() == 1
    torch.testing.assert_close(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(0)))


def test_caches_are_not_those_of_the_user() -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert "pytest" in os.environ["RLHF_PPO_CACHE"]
