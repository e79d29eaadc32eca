"""`/generate`: what comes back, and that its logprobs are the model's."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from lightning_grpo.callbacks.weight_sync import WeightSync
from lightning_grpo.policy.load import without_bars
from lightning_grpo.servers.process import OwnedServers
from lightning_grpo.serving.fitness import Requirements
from lightning_grpo.serving.pool import ServerPool
from lightning_grpo.serving.wire import checked_routes, sampling_params
from lightning_grpo.types import RouterShape, Sampling
from lightning_grpo.weights.process_group import ProcessGroupTransport
from lightning_grpo.weights.transport import DiskTransport, Transport
from tests.fakes.forked_servers import ForkedServers
from tests.fakes.loops import Events, Recorder, make_data, make_module, make_prompts, make_trainer
from tests.fakes.mixtures import own_routes
from tests.fakes.proxy import FaultyProxy, in_a_thread
from tests.fakes.tiny_model import make_tiny_model, make_tiny_tokenizer
from tests.sglang.engines import REAL, real_servers
from tests.sglang.scoring import check_sampled, full_logprobs, greedy_ids, sampled
from tests.sglang.server import Server

PROMPT = [10, 40, 99, 7, 300]
FREE = {"ignore_eos": True}


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_logprobs_are_those_of_a_full_pass_at_the_temperature(
    server: Server, reference: PreTrainedModel, temperature: float
) -> None:
    sampling = FREE | {"max_new_tokens": 60, "temperature": temperature}
    reply = server.generate(PROMPT, sampling=sampling)
    check_sampled(reference, PROMPT, reply, temperature)


def test_filters_do_not_change_the_logprobs_that_are_reported(
    server: Server, reference: PreTrainedModel
) -> None:
    filters = {"top_p": 0.5, "top_k": 4, "min_p": 0.1}
    reply = server.generate(PROMPT, sampling=FREE | filters | {"max_new_tokens": 30})
    check_sampled(reference, PROMPT, reply)


def test_greedy_takes_the_likeliest_tokens_and_reports_raw_logprobs(
    server: Server, reference: PreTrainedModel
) -> None:
    reply = server.generate(PROMPT, sampling=FREE | {"max_new_tokens": 12, "temperature": 0})
    assert reply["output_ids"] == greedy_ids(reference, PROMPT, 12)
    check_sampled(reference, PROMPT, reply)


def test_a_reply_has_ids_text_reason_counts_and_versions(server: Server) -> None:
    reply = server.generate(PROMPT, sampling=FREE | {"max_new_tokens": 3}, rid="mine")
    meta = reply["meta_info"]
    assert set(reply) == {"text", "output_ids", "meta_info"}
    assert meta["id"] == "mine"
    assert meta["finish_reason"] == {"type": "length", "length": 3}
    assert (meta["prompt_tokens"], meta["completion_tokens"]) == (len(PROMPT), 3)
    assert meta["weight_version"] == "default"
    assert meta["weight_versions"] == [{"version": "default", "start": 0, "end": 3}]
    assert meta["input_token_logprobs"] == []
    assert meta["num_retractions"] == 0
    assert meta["e2e_latency"] > 0
    assert all(entry[2] is None for entry in meta["output_token_logprobs"])


def test_logprobs_come_only_when_asked_for(server: Server) -> None:
    reply = server.post("/generate", input_ids=PROMPT, sampling_params={"max_new_tokens": 2})
    assert "output_token_logprobs" not in reply["meta_info"]


def test_text_goes_in_and_text_comes_out(server: Server) -> None:
    tokenizer = make_tiny_tokenizer()
    text = "Tom has 3 apples"
    sampling = FREE | {"max_new_tokens": 8, "temperature": 0}
    by_text = server.post("/generate", text=text, sampling_params=sampling)
    by_ids = server.generate(tokenizer(text)["input_ids"], sampling=sampling)
    assert by_text["output_ids"] == by_ids["output_ids"]
    assert by_text["text"] == by_ids["text"]
    known = [i for i in by_text["output_ids"] if i < len(tokenizer)]
    assert by_text["text"] == tokenizer.decode(known, skip_special_tokens=True)


@pytest.mark.parametrize("start", [0, 2])
def test_a_prompt_is_scored_without_generation(
    server: Server, reference: PreTrainedModel, start: int
) -> None:
    ids = [3, 50, 17, 222, 9, 80]
    sampling = {"max_new_tokens": 0, "temperature": 0.5}
    reply = server.generate(ids, sampling=sampling, logprob_start_len=start)
    entries = reply["meta_info"]["input_token_logprobs"]
    assert [entry[1] for entry in entries] == ids[start:]
    assert entries[0][0] is None
    # Those of the prompt are never divided by the temperature.
    expected = full_logprobs(reference, ids)[start:].tolist()
    assert [entry[0] for entry in entries[1:]] == pytest.approx(expected, abs=2e-5)
    assert reply["output_ids"] == []
    assert reply["meta_info"]["finish_reason"] == {"type": "length", "length": 0}


def test_a_list_is_answered_in_order_each_with_its_own_sampling(
    server: Server, reference: PreTrainedModel
) -> None:
    prompts = [[5, 6], [7, 8, 9], [4]]
    replies = server.generate(
        prompts, sampling=[FREE | {"max_new_tokens": k} for k in (1, 2, 3)], rid=["a", "b", "c"]
    )
    assert [r["meta_info"]["prompt_tokens"] for r in replies] == [2, 3, 1]
    assert [r["meta_info"]["completion_tokens"] for r in replies] == [1, 2, 3]
    assert [r["meta_info"]["id"] for r in replies] == ["a", "b", "c"]
    for prompt, reply in zip(prompts, replies, strict=True):
        check_sampled(reference, prompt, reply)


def test_n_samples_come_as_a_list_prompt_by_prompt(
    server: Server, reference: PreTrainedModel
) -> None:
    replies = server.generate(PROMPT, sampling=FREE | {"max_new_tokens": 20, "n": 3})
    assert len({tuple(r["output_ids"]) for r in replies}) == 3
    assert len({r["meta_info"]["id"] for r in replies}) == 3
    for reply in replies:
        check_sampled(reference, PROMPT, reply)
    replies = server.generate([[5, 6], [7, 8, 9]], sampling={"max_new_tokens": 1, "n": 2})
    assert [r["meta_info"]["prompt_tokens"] for r in replies] == [2, 2, 3, 3]


def test_more_requests_than_it_runs_at_once_are_all_answered(
    server: Server, reference: PreTrainedModel
) -> None:
    prompts = [[1 + i, 2 + i, 3 + i][: 1 + i % 3] for i in range(90)]
    sampling = [FREE | {"max_new_tokens": 1 + i % 17} for i in range(90)]
    replies = server.generate(prompts, sampling=sampling)
    assert [len(r["output_ids"]) for r in replies] == [1 + i % 17 for i in range(90)]
    for prompt, reply in list(zip(prompts, replies, strict=True))[::9]:
        check_sampled(reference, prompt, reply)


def test_a_stop_token_ends_and_stays_in_the_ids(server: Server) -> None:
    # Every seed but the likeliest token: which one stops is known beforehand.
    stops = list(range(100, 512))
    sampling = {"max_new_tokens": 60, "stop_token_ids": stops}
    reply = server.generate(PROMPT, sampling=sampling)
    *before, last = reply["output_ids"]
    assert last in stops or last == 2
    assert all(token < 100 and token != 2 for token in before)
    assert reply["meta_info"]["finish_reason"] == {"type": "stop", "matched": last}
    assert len(sampled(reply)) == len(before) + 1


def test_the_models_own_end_token_ends_unless_ignored(server: Server) -> None:
    # In a random model any token is about as likely, so some of many samples end with it.
    sampling = {"max_new_tokens": 300, "n": 20, "temperature": 2.0}
    replies = server.generate(PROMPT, sampling=sampling)
    ended = [r for r in replies if r["meta_info"]["finish_reason"]["type"] == "stop"]
    assert ended
    for reply in ended:
        assert reply["meta_info"]["finish_reason"]["matched"] == 2
        assert reply["output_ids"].index(2) == len(reply["output_ids"]) - 1
        assert len(sampled(reply)) == len(reply["output_ids"])
    replies = server.generate(PROMPT, sampling=sampling | FREE)
    assert all(r["meta_info"]["finish_reason"]["type"] == "length" for r in replies)


def test_no_end_token_comes_before_min_new_tokens(server: Server) -> None:
    sampling = {"max_new_tokens": 9, "min_new_tokens": 6, "stop_token_ids": list(range(100, 512))}
    reply = server.generate(PROMPT, sampling=sampling)
    assert 6 < len(reply["output_ids"]) <= 9
    assert all(token < 100 and token != 2 for token in reply["output_ids"][:6])


@pytest.mark.parametrize("kept", [False, True])
def test_a_stop_string_ends_and_is_cut_from_the_text_not_the_ids(
    server: Server, kept: bool
) -> None:
    sampling = FREE | {"max_new_tokens": 400, "temperature": 0.7, "stop": ["e", "never there"]}
    # A stop string is also found in the name of a special token, which a text leaves out.
    sampling |= {"skip_special_tokens": False}
    reply = server.generate(PROMPT, sampling=sampling | {"no_stop_trim": kept})
    assert reply["meta_info"]["finish_reason"] == {"type": "stop", "matched": "e"}
    text = make_tiny_tokenizer().decode([i for i in reply["output_ids"] if i < 320])
    assert "e" in text
    assert ("e" in reply["text"]) == kept
    assert len(sampled(reply)) == len(reply["output_ids"])


@pytest.mark.anyio
@pytest.mark.parametrize("how", ["token", "string", "limit"])
async def test_what_ends_a_completion_at_its_limit_counts_before_the_limit(
    server: Server, reference: PreTrainedModel, how: str
) -> None:
    ids = greedy_ids(reference, PROMPT, 1)
    text = make_tiny_tokenizer().decode(ids)
    ends: Any = {"token": {"stop_token_ids": tuple(ids)}, "string": {"stop": (text,)}, "limit": {}}
    sampling = Sampling(max_new_tokens=1, temperature=0.0, **ends[how])
    asked = sampling_params(sampling, max_new_tokens=1, min_new_tokens=0, seed=None)
    raw = server.generate(PROMPT, sampling=asked)
    reasons: Any = {
        "token": {"type": "stop", "matched": ids[0]},
        "string": {"type": "stop", "matched": text},
        "limit": {"type": "length", "length": 1},
    }
    assert raw["meta_info"]["finish_reason"] == reasons[how]
    decode = make_tiny_tokenizer().decode
    async with ServerPool([server.handle], Requirements("run", 512, 64), decode) as pool:
        completion = await pool.generate(PROMPT, sampling)
    assert completion.token_ids == tuple(ids)
    assert completion.truncated == (how == "limit")


def test_a_completion_that_meets_the_end_of_the_context_ends_by_length(server: Server) -> None:
    reply = server.generate([1] * 2000, sampling=FREE | {"max_new_tokens": 40})
    assert reply["meta_info"]["finish_reason"] == {"type": "length", "length": 40}
    reply = server.generate([1, 2, 3], sampling=FREE | {"max_new_tokens": 2045})
    # The real one stops two tokens short of the context.
    count = len(reply["output_ids"])
    assert count in (2043, 2045)
    assert reply["meta_info"]["finish_reason"] == {"type": "length", "length": count}


def test_requests_without_a_seed_differ(server: Server) -> None:
    sampling = FREE | {"max_new_tokens": 20}
    one, two = (server.generate(PROMPT, sampling=sampling) for _ in range(2))
    assert one["output_ids"] != two["output_ids"]


def test_a_prefix_is_shared_under_one_extra_key_only(server: Server) -> None:
    prompt = [21, 22, 23, 24, 25, 26]
    sampling = FREE | {"max_new_tokens": 2}
    cached = [
        server.generate(prompt, sampling=sampling, extra_key=key)["meta_info"]["cached_tokens"]
        for key in ("run:1", "run:1", "run:2")
    ]
    assert cached[0] == cached[2] == 0
    # The real one reads at least the last token again.
    assert cached[1] >= len(prompt) - 1


def test_a_cached_prefix_gives_the_same_logprobs(
    server: Server, reference: PreTrainedModel
) -> None:
    prompt = list(range(30, 70))
    for _ in range(2):
        reply = server.generate(prompt, sampling=FREE | {"max_new_tokens": 10}, extra_key="cached")
        check_sampled(reference, prompt, reply)
    longer = prompt + reply["output_ids"]
    reply = server.generate(longer, sampling=FREE | {"max_new_tokens": 10}, extra_key="cached")
    check_sampled(reference, longer, reply)


def test_a_stream_is_cumulative_and_ends_like_a_plain_reply(
    server: Server, reference: PreTrainedModel
) -> None:
    sampling = FREE | {"max_new_tokens": 10}
    running = server.launch(PROMPT, sampling=sampling)
    last = running.result()
    assert 2 <= len(running.messages) <= 10
    for earlier, later in zip(running.messages, running.messages[1:], strict=False):
        assert later["output_ids"][: len(earlier["output_ids"])] == earlier["output_ids"]
        assert earlier["meta_info"]["finish_reason"] is None
        assert "weight_versions" not in earlier["meta_info"]
        assert len(sampled(earlier)) == len(earlier["output_ids"])
    assert last["meta_info"]["finish_reason"] == {"type": "length", "length": 10}
    assert last["meta_info"]["weight_versions"] == [{"version": "default", "start": 0, "end": 10}]
    check_sampled(reference, PROMPT, last)


def test_a_client_that_goes_away_takes_its_request_along(server: Server) -> None:
    running = server.launch(PROMPT, sampling=FREE | {"max_new_tokens": 2000}).wait_for(3)
    running.leave()
    server.wait_until(lambda running, waiting: running == 0)


def test_health_answers_without_a_body(server: Server) -> None:
    assert server.request("/health", method="GET") == (200, "")
    assert server.request("/health_generate", method="GET") == (200, "")


def test_it_says_which_model_it_holds_and_what_it_can_take(server: Server) -> None:
    model = server.get("/model_info")
    assert model["model_path"] == model["tokenizer_path"] == str(server.model)
    assert (model["weight_version"], model["is_generation"]) == ("default", True)
    info = server.get("/server_info")
    assert info["version"] == "0.5.19"
    assert (info["max_running_requests"], info["tp_size"]) == (64, 1)
    assert 2040 <= info["max_req_input_len"] <= 2048
    assert info["max_total_num_tokens"] >= 16384


# ---- a server that answers 500 to a tenth of all requests ----

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


# -- a mixture's experts reach any server one by one, and it computes with them --------------------


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3-MoE of two layers, eight experts each."""
    with without_bars():
        folder = tmp_path_factory.mktemp("mixture")
        return make_tiny_model(folder, hidden_size=64, num_experts=8, tie_word_embeddings=False)


@pytest.fixture(params=["embedded", REAL])
def servers(request: pytest.FixtureRequest) -> Iterator[OwnedServers]:
    """One server, of its own: it loads another model than those of the other tests."""
    servers = ForkedServers() if request.param == "embedded" else real_servers()
    yield servers
    servers.stop()


def test_every_sync_of_a_mixture_is_proved(
    servers: OwnedServers, mixture: Path, tmp_path: Path
) -> None:
    answers = itertools.count()

    def alternating(completion: str) -> float:
        return float(next(answers) % 2)  # each group has something to learn

    recorder, data = Recorder(), make_data(servers, alternating)
    trainer = make_trainer(tmp_path, max_steps=4, callbacks=[recorder])
    trainer.fit(make_module(mixture), data)
    assert max(recorder.of("mismatch/probe")) < 1e-4
    assert data.session.report.probe_diff < 1e-4
    assert data.session.report.probe_change > 10 * data.session.report.probe_diff
    assert max(recorder.of("mismatch/abs_logprob_diff")) < 1e-4


@pytest.mark.sglang
@pytest.mark.timeout(400)
@pytest.mark.parametrize("kind", ["dense", "mixture"])
def test_every_sync_is_proved_where_two_processes_share_each_layer(
    kind: str, model_folder: Path, mixture: Path, tmp_path: Path
) -> None:
    answers = itertools.count()
    servers = real_servers(tp=2)
    try:
        recorder, data = Recorder(), make_data(servers, lambda completion: float(next(answers) % 2))
        trainer = make_trainer(tmp_path, max_steps=4, callbacks=[recorder])
        trainer.fit(make_module(mixture if kind == "mixture" else model_folder), data)
    finally:
        servers.stop()
    assert max(recorder.of("mismatch/probe")) < 1e-4
    assert data.session.report.probe_change > 10 * data.session.report.probe_diff
    assert max(recorder.of("mismatch/abs_logprob_diff")) < 1e-4


def test_the_experts_of_each_token_are_told_and_are_those_of_a_full_pass(
    servers: OwnedServers, mixture: Path, tmp_path: Path
) -> None:
    servers.tells_routes = True
    server = Server("mixture", servers, mixture, tmp_path)
    assert server.get("/server_info")["enable_return_routed_experts"] is True
    prompts = [[5, 6, 7, 8, 9], [10, 11, 12], [5, 6, 7, 8, 9]]
    sampling = {"max_new_tokens": 30, "temperature": 1.0, "ignore_eos": True}
    replies = server.generate(prompts, sampling=sampling, return_routed_experts=True)
    again = server.generate(prompts[0], sampling=sampling, return_routed_experts=True)
    with without_bars():
        model = AutoModelForCausalLM.from_pretrained(mixture, dtype=torch.float32)
    for prompt, reply in zip([*prompts, prompts[0]], [*replies, again], strict=True):
        ids = torch.tensor([*prompt, *reply["output_ids"]])
        expected = own_routes(model, ids, torch.tensor([0, len(ids)]), num_layers=2)[:-1]
        routes = checked_routes(
            reply["meta_info"]["routed_experts"], RouterShape(2, 2, 8), len(ids), "http://a"
        )
        told = torch.frombuffer(bytearray(routes.experts), dtype=torch.uint8).view(-1, 2, 2)
        assert torch.equal(told.sort(-1).values.long(), expected.sort(-1).values)


def test_what_servers_chose_is_replayed_in_training(
    servers: OwnedServers, mixture: Path, tmp_path: Path
) -> None:
    answers = itertools.count()
    recorder = Recorder()
    trainer = make_trainer(tmp_path, max_steps=4, callbacks=[recorder])
    data = make_data(
        servers, lambda completion: float(next(answers) % 2), sampling=Sampling(max_new_tokens=20)
    )
    trainer.fit(make_module(mixture, router_replay=True), data)
    assert len(recorder.of("moe/replayed")) == 4
    assert min(recorder.of("moe/replayed")) > 0.8
    # Both sides compute in fp32: of some hundreds of choices hardly one is as near as that.
    assert max(recorder.of("moe/rerouted")) < 0.01
    assert max(recorder.of("mismatch/abs_logprob_diff")) < 1e-4
