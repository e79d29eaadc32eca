from types import SimpleNamespace

import pytest

from lightning_grpo.session.assembly import choose_transport
from lightning_grpo.weights.process_group import IPCTransport, ProcessGroupTransport
from lightning_grpo.weights.transport import DiskTransport


def servers_on(*devices):
    return SimpleNamespace(handles=[SimpleNamespace(devices=(each,)) for each in devices])


@pytest.mark.parametrize(
    ("trainer_gpu", "serving", "kind"),
    [
        (0, (0,), IPCTransport),
        (0, (1,), ProcessGroupTransport),
        (0, (1, 2, 3), ProcessGroupTransport),
        (1, (0, 1), DiskTransport),
        (0, (), ProcessGroupTransport),
        (None, (), ProcessGroupTransport),
    ],
)
def test_the_transport_follows_from_where_trainer_and_servers_are(trainer_gpu, serving, kind):
    assert type(choose_transport(None, servers_on(*serving), trainer_gpu)) is kind


def test_a_server_on_a_cpu_beside_a_trainer_on_a_gpu_joins_a_group_of_the_cpus():
    # Of a running server that is local the only GPU is known, not whether it uses it.
    chosen = choose_transport(None, servers_on(0), 0, on_cpu=True)
    assert isinstance(chosen, ProcessGroupTransport)
    assert chosen.backend == "gloo"


def test_a_given_transport_is_kept():
    given = DiskTransport()
    assert choose_transport(given, servers_on(0), 0) is given
