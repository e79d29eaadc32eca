"""What both refuse, with a status that the client tells apart, and nobody else is hurt.

What kills the real server is not sent to it here, and the package sends none of it: a token id
beyond the vocabulary, an empty prompt in a list, a `logprob_start_len` below -1, a bucket for an
unknown group, a flush with requests in flight.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.sglang.server import Server

OK = {"input_ids": [1, 2, 3], "sampling_params": {"max_new_tokens": 2}}


def sampling(**params: Any) -> dict[str, Any]:
    """A good request but for its sampling parameters."""
    return {"input_ids": [1, 2, 3], "sampling_params": {"max_new_tokens": 2} | params}


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"input_ids": []},
        {"text": ""},
        {"input_ids": [1, "a"]},
        {"input_ids": [1, 2.5]},
        {"input_ids": [1, [2]]},
        {"input_ids": [[1], 2]},
        {"input_ids": "abc"},
        {"input_ids": [1] * 2049},
        sampling(max_new_tokens=2046),
        sampling(max_new_tokens=-1),
        sampling(temperature=-0.5),
        sampling(top_p=0),
        sampling(top_p=1.5),
        sampling(top_k=0),
        sampling(top_k=-2),
        sampling(min_p=2),
        sampling(min_new_tokens=3),
        OK | {"sampling_params": 7},
        OK | {"input_ids": [[1], [2]], "sampling_params": [{"n": 2}, {}]},
        OK | {"input_ids": [[1], [2]], "rid": ["a", "a"]},
        OK | {"input_ids": [[1], [2]], "rid": ["a"]},
        OK | {"rid": 5},
    ],
    ids=repr,
)
def test_a_bad_request_is_refused_with_a_reason(server: Server, body: dict[str, Any]) -> None:
    status, reply = server.request("/generate", body)
    assert status == 400
    # Two shapes of one thing; the client reads both.
    assert reply.get("message") or reply["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [
        sampling(max_new_tokens="many"),
        sampling(temperature="hot"),
        sampling(stop_token_ids=1),
        sampling(temprature=1.0),
        OK | {"sampling_params": [{}, {}]},
    ],
    ids=repr,
)
def test_a_value_of_a_wrong_type_is_an_error_of_that_request_only(
    server: Server, body: dict[str, Any]
) -> None:
    # The engine says what is wrong (400), the real one that something is (500).
    assert server.request("/generate", body)[0] in (400, 500)
    assert server.request("/generate", OK)[0] == 200


@pytest.mark.parametrize("raw", [b"{", b"[1, 2]", b"7", b"\xff\xfe"])
@pytest.mark.parametrize(
    "path",
    [
        "/generate",
        "/pause_generation",
        "/continue_generation",
        "/abort_request",
        "/update_weights_from_disk",
        "/init_weights_update_group",
        "/update_weights_from_distributed",
        "/destroy_weights_update_group",
        "/update_weight_version",
    ],
)
def test_a_body_that_is_no_json_object_is_refused(server: Server, path: str, raw: bytes) -> None:
    assert server.request(path, raw=raw)[0] == 400


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/pause_generation", {"mode": "sleep"}),
        ("/update_weights_from_disk", {}),
        ("/update_weights_from_disk", {"model_path": 3}),
        ("/update_weight_version", {}),
    ],
)
def test_a_bad_command_is_refused(server: Server, path: str, body: dict[str, Any]) -> None:
    assert server.request(path, body)[0] == 400


def test_unknown_keys_beside_the_sampling_are_ignored(server: Server) -> None:
    assert len(server.post("/generate", **OK, some_new_key=1)["output_ids"]) <= 2


def test_refusals_do_not_touch_requests_in_flight(server: Server) -> None:
    running = server.launch([1, 2], sampling={"max_new_tokens": 600, "ignore_eos": True})
    running.wait_for(5)
    for body in ({}, {"input_ids": []}, sampling(temperature=-1)):
        assert server.request("/generate", body)[0] == 400
    assert len(running.result()["output_ids"]) == 600


@pytest.mark.parametrize("path", ["/begin_weight_update", "/end_weight_update", "/nothing"])
def test_what_that_version_lacks_is_not_found(server: Server, path: str) -> None:
    assert server.request(path)[0] == 404
