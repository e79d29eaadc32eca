"""A server that answers 500 to a tenth of all requests: nothing is lost, and the run goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_grpo.callbacks.weight_sync import WeightSync
from lightning_grpo.weights.process_group import ProcessGroupTransport
from lightning_grpo.weights.transport import DiskTransport, Transport
from tests.fakes.loops import Events, Recorder, make_data, make_module, make_prompts, make_trainer
from tests.fakes.proxy import FaultyProxy, in_a_thread
from tests.sglang.server import Server

STEPS, BATCH, GROUP = 8, 4, 3


@pytest.mark.parametrize("transport", [DiskTransport(), ProcessGroupTransport("gloo", 30.0)])
def test_nothing_is_lost_where_a_tenth_of_all_requests_fails(
    server: Server, model_folder: Path, tmp_path: Path, transport: Transport
) -> None:
    proxy, recorder = FaultyProxy(server.url, error_every=10), Recorder()
    trainer = make_trainer(tmp_path, max_steps=STEPS, callbacks=[WeightSync(transport), recorder])
    with in_a_thread(proxy):
        data = make_data(
            proxy.url,
            prompts=make_prompts(STEPS * BATCH),
            batch_size=BATCH,
            group_size=GROUP,
            max_staleness=1,
        )
        data.on_event = events = Events()
        trainer.fit(make_module(model_folder), data)
        ledger = data.session.state_dict()["producer"]["ledger"]["counts"]
    assert len(proxy.errors) == proxy.num_requests // 10
    assert "/generate" in proxy.errors
    assert trainer.global_step == STEPS
    # Every prompt that was let in was trained on, once, and whole.
    assert ledger == {"trained": STEPS * BATCH}
    groups = [g for b in recorder.batches for g in b.rollout.groups]
    assert sorted(g.prompt.row for g in groups) == list(range(STEPS * BATCH))
    assert sorted(g.prompt.key for g in groups) == sorted(e["key"] for e in events.of("admit"))
    for group in groups:
        assert len(group.trajectories) == GROUP
        for trajectory in group.trajectories:
            assert len(trajectory.logprobs) == len(trajectory.input_ids)
            assert 1 <= sum(trajectory.response_mask) <= 6
    assert max(m["mismatch/probe"] for m in recorder.metrics[1:]) < 1e-4
    # A step measures it on tokens of its own weights; where all are older it has none.
    name = "mismatch/abs_logprob_diff"
    measured = [metrics[name] for metrics in recorder.metrics if name in metrics]
    assert measured
    assert max(measured) < 1e-4
