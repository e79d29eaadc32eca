"""Abort and the pause modes, with requests in flight, and whose weights sampled which token."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import PreTrainedModel

from tests.sglang.engines import RETRACTING
from tests.sglang.scoring import check_sampled, greedy_ids, sampled
from tests.sglang.server import InFlight, Server
from tests.sglang.trainer import Trainer

PROMPT = [10, 40, 99, 7, 300]
TOKENS = 1500  # far from done when a busy machine gets round to the next request
LONG = {"max_new_tokens": TOKENS, "ignore_eos": True}
GREEDY = {"max_new_tokens": 6, "temperature": 0, "ignore_eos": True}


def launch(server: Server, count: int = 3, tokens: int = 40) -> list[InFlight]:
    """Long requests in flight, each with some tokens."""
    running = [server.launch([*PROMPT, i], sampling=LONG) for i in range(count)]
    return [request.wait_for(tokens) for request in running]


def update(server: Server, folder: Path, label: str) -> None:
    server.post(
        "/update_weights_from_disk",
        model_path=str(folder),
        weight_version=label,
        flush_cache=False,
    )


def test_an_abort_answers_with_what_there_is(server: Server, reference: PreTrainedModel) -> None:
    running = server.launch(PROMPT, sampling=LONG, rid="one").wait_for(20)
    server.post("/abort_request", rid="on")  # the beginning of a name is no name
    running.wait_for(running.num_tokens + 20)
    server.post("/abort_request", rid="one")
    reply = running.result()
    assert reply["meta_info"]["finish_reason"] == {
        "type": "abort",
        "message": "Aborted",
        "status_code": None,
        "err_type": None,
    }
    count = len(reply["output_ids"])
    assert 40 <= count < TOKENS
    assert reply["meta_info"]["weight_versions"] == [
        {"version": "default", "start": 0, "end": count}
    ]
    check_sampled(reference, PROMPT, reply)


def test_an_abort_of_an_unknown_request_is_no_error(server: Server) -> None:
    assert server.request("/abort_request", {"rid": "nobody"}) == (200, "")


def test_abort_all_ends_running_and_waiting_requests(
    server: Server, reference: PreTrainedModel
) -> None:
    sampling = {"max_new_tokens": 450, "ignore_eos": True}
    # Held back until all are there: on a busy machine the first would end before the last begins.
    server.post("/pause_generation", mode="in_place")
    running = [server.launch([*PROMPT, i], sampling=sampling) for i in range(80)]
    if server.kind == "embedded":  # the real one does not count what it holds back
        server.wait_until(lambda running, waiting: running + waiting == 80)
    server.post("/continue_generation")
    server.wait_until(lambda running, waiting: running > 40 and waiting > 0)
    server.post("/abort_request", abort_all=True)
    replies = [request.result() for request in running]
    assert {r["meta_info"]["finish_reason"]["type"] for r in replies} == {"abort"}
    assert all(len(sampled(r)) == len(r["output_ids"]) for r in replies)
    assert max(len(r["output_ids"]) for r in replies) > 0
    check_sampled(reference, [*PROMPT, 0], replies[0])


def test_a_request_held_back_by_a_pause_can_only_be_aborted_where_it_is_known(
    server: Server,
) -> None:
    server.post("/pause_generation", mode="in_place")
    held = server.start(server.generate, PROMPT, sampling=LONG, rid="held")
    # The real one holds it before its scheduler, which so neither counts nor aborts it. Nothing is
    # sent to a server that is paused, so this does not matter to a run.
    time.sleep(0.3)
    server.post("/abort_request", rid="held")
    server.post("/continue_generation")
    reply = held.result(20)
    aborted = server.kind == "embedded"
    assert len(reply["output_ids"]) == (0 if aborted else TOKENS)
    assert reply["meta_info"]["finish_reason"]["type"] == ("abort" if aborted else "length")


def test_pause_abort_answers_all_and_holds_the_new_until_the_weights_are_in(
    server: Server, reference: PreTrainedModel, other_reference: PreTrainedModel, other_folder: Path
) -> None:
    running = launch(server)
    assert server.post("/pause_generation", mode="abort") == {
        "message": "Generation paused successfully.",
        "status": "ok",
    }
    for index, request in enumerate(running):
        reply = request.result()
        assert reply["meta_info"]["finish_reason"]["type"] == "abort"
        check_sampled(reference, [*PROMPT, index], reply)
    server.flush()
    held = server.start(server.generate, PROMPT, sampling=GREEDY)
    update(server, other_folder, "v1")
    assert not held.done()
    assert server.post("/continue_generation") == {
        "message": "Generation continued successfully.",
        "status": "ok",
    }
    reply = held.result(20)
    assert reply["output_ids"] == greedy_ids(other_reference, PROMPT, 6)
    assert reply["meta_info"]["weight_versions"] == [{"version": "v1", "start": 0, "end": 6}]


def test_in_place_goes_on_with_the_old_keys_and_values(
    server: Server, reference: PreTrainedModel, other_reference: PreTrainedModel, other_folder: Path
) -> None:
    running = launch(server)
    server.post("/pause_generation", mode="in_place")
    update(server, other_folder, "v1")
    server.post("/continue_generation")
    for index, request in enumerate(running):
        reply = request.result()
        meta = reply["meta_info"]
        assert meta["num_retractions"] == 0
        assert [s["version"] for s in meta["weight_versions"]] == ["default", "v1"]
        cut = meta["weight_versions"][1]["start"]
        assert meta["weight_versions"][1]["end"] == len(reply["output_ids"]) == TOKENS
        check_sampled(reference, [*PROMPT, index], reply, span=(0, cut))
        # Behind the cut they belong to neither set of weights.
        with pytest.raises(AssertionError, match="not close"):
            check_sampled(other_reference, [*PROMPT, index], reply, span=(cut, cut + 20))


def test_a_pause_without_an_update_changes_nothing(
    server: Server, reference: PreTrainedModel
) -> None:
    for mode in ("retract", "in_place"):
        (running,) = launch(server, count=1)
        server.post("/pause_generation", mode=mode)
        server.post("/continue_generation")
        reply = running.result()
        assert reply["meta_info"]["weight_versions"] == [
            {"version": "default", "start": 0, "end": TOKENS}
        ]
        check_sampled(reference, [*PROMPT, 0], reply)


def test_a_name_alone_can_change_while_requests_run(server: Server) -> None:
    running = server.launch(PROMPT, sampling=LONG).wait_for(20)
    reply = server.post("/update_weight_version", new_version="v5", abort_all_requests=False)
    assert (reply["success"], reply["new_version"]) == (True, "v5")
    spans = running.result()["meta_info"]["weight_versions"]
    assert [s["version"] for s in spans] == ["default", "v5"]
    assert spans[1]["end"] == TOKENS


def test_naming_aborts_unless_told_otherwise(server: Server) -> None:
    running = launch(server)
    server.post("/update_weight_version", new_version="v5")
    for request in running:
        assert request.result()["meta_info"]["finish_reason"]["type"] == "abort"


def test_the_cache_is_not_flushed_while_requests_run(server: Server) -> None:
    running = launch(server)
    status, text = server.request("/flush_cache", method="GET")
    assert (status, text.strip()) == (400, "Flush cache failed.")
    server.post("/abort_request", abort_all=True)
    for request in running:
        request.result()
    server.wait_until(lambda running, waiting: running == 0)
    server.flush()


# -- requests put back and read again: exact under the new weights where no old prefix is kept -----


def check(request: InFlight, prompt: list[int], old: PreTrainedModel, new: PreTrainedModel) -> None:
    """Its first part is of the old weights, the rest of the new."""
    reply = request.result()
    meta = reply["meta_info"]
    assert meta["num_retractions"] == 1
    assert meta["finish_reason"] == {"type": "length", "length": TOKENS}
    assert meta["weight_version"] == "v1"
    first, second = meta["weight_versions"]
    cut = first["end"]
    assert 30 <= cut < TOKENS
    assert first == {"version": "default", "start": 0, "end": cut}
    assert second == {"version": "v1", "start": cut, "end": TOKENS}
    check_sampled(old, prompt, reply, span=(0, cut))
    check_sampled(new, prompt, reply, span=(cut, TOKENS))


@RETRACTING
def test_a_folder_while_requests_are_retracted(
    server: Server, reference: PreTrainedModel, other_reference: PreTrainedModel, other_folder: Path
) -> None:
    prompts = [[*PROMPT, i] for i in range(3)]
    launched = [server.launch(p, sampling=LONG) for p in prompts]
    running = [request.wait_for(40) for request in launched]
    server.post("/pause_generation", mode="retract")
    assert server.request("/flush_cache")[0] == 400
    server.post(
        "/update_weights_from_disk",
        model_path=str(other_folder),
        weight_version="v1",
        flush_cache=False,
    )
    server.post("/continue_generation")
    for prompt, request in zip(prompts, running, strict=True):
        check(request, prompt, reference, other_reference)


@RETRACTING
def test_buckets_while_requests_are_retracted(
    server: Server, reference: PreTrainedModel, other_reference: PreTrainedModel, other_folder: Path
) -> None:
    trainer = Trainer(server)
    prompts = [[*PROMPT, i] for i in range(3)]
    launched = [server.launch(p, sampling=LONG) for p in prompts]
    running = [request.wait_for(30) for request in launched]
    server.post("/pause_generation", mode="retract")
    answers = trainer.send_buckets(load_file(other_folder / "model.safetensors"), "v1", 100_000)
    assert all(status == 200 for status, _ in answers)
    server.post("/continue_generation")
    trainer.close()
    for prompt, request in zip(prompts, running, strict=True):
        check(request, prompt, reference, other_reference)
