"""Why a completion ended: the model or the limit, however its server calls it."""

from __future__ import annotations

import asyncio
import base64
from itertools import pairwise
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest

from lightning_grpo.errors import ReplyError
from lightning_grpo.serving.health import stop_generation
from lightning_grpo.serving.server import Member, Partial
from lightning_grpo.serving.wire import FinishReason, GenerateReply, MetaInfo, checked_routes
from lightning_grpo.types import RouterShape, Sampling
from tests.fakes.virtual_time import run_virtual

END, SPECIAL = 9, 8
SERVER = SimpleNamespace(url="http://server", version_of=lambda label: 0)


def spell(ids):
    return "".join("<s>" if i == SPECIAL else "<end>" if i == END else "abcdefgh"[i] for i in ids)


def decode(ids):
    return spell([i for i in ids if i < SPECIAL])


def completed(*pieces, sampling, end_ids=frozenset([END])):
    """The completion of replies `(ids, reason)`; every one must be asked for."""
    partial = Partial([1], sampling, None, end_ids)
    for ids, reason in pieces:
        assert not partial.done
        entries = [(-0.5, i, None) for i in ids]
        meta = MetaInfo(
            finish_reason=FinishReason(reason),
            weight_version="v0",
            output_token_logprobs=entries,
        )
        partial.add(GenerateReply(meta, list(ids)), SERVER, 0)
    assert partial.done
    return partial.completion(decode, spell)


@pytest.mark.parametrize(
    "pieces",
    [
        [([5, 6, END], "length")],
        [([5, 6, END], "abort")],
        [([5, 6], "abort"), ([END], "length")],
        [([5, 6], "abort"), ([END], "abort")],
        [([5], "abort"), ([], "abort"), ([6, END], "stop")],
    ],
)
@pytest.mark.parametrize("of_the_model", [True, False])
def test_an_end_token_as_the_last_permitted_one_is_the_models_own_end(pieces, of_the_model):
    ends = {} if of_the_model else {"stop_token_ids": (END,)}
    sampling = Sampling(max_new_tokens=3, **ends)
    done = completed(*pieces, sampling=sampling, end_ids=frozenset([END] if of_the_model else []))
    assert (done.token_ids, done.finish_reason, done.truncated) == ((5, 6, END), "stop", False)


@pytest.mark.parametrize(
    "pieces",
    [
        [([5, 6, 7], "length")],
        [([5, 6, 7], "abort")],
        [([5, 6], "abort"), ([7], "length")],
        [([END, 6, 7], "length")],  # an end that its server did not heed is no end
        [([5, 6], "length")],  # the server's own limit, its context
    ],
)
def test_what_the_limit_cut_off_is_truncated(pieces):
    done = completed(*pieces, sampling=Sampling(max_new_tokens=3, stop=("xyz",)))
    assert done.finish_reason == "length"
    assert done.truncated
    assert done.token_ids == tuple(i for ids, _ in pieces for i in ids)


@pytest.mark.parametrize("stop", ["c", "bc", "abc", "zz"])
@pytest.mark.parametrize("reason", ["length", "abort"])
def test_a_stop_string_that_the_last_permitted_token_completes_is_an_end(stop, reason):
    sampling = Sampling(max_new_tokens=3, stop=("zzz", stop))
    done = completed(([0, 1, 2], reason), sampling=sampling)
    assert done.truncated == (stop == "zz")
    assert done.token_ids == (0, 1, 2)
    assert done.text == "abc"


def test_a_stop_string_may_be_spelled_by_special_tokens_which_the_text_leaves_out():
    sampling = Sampling(max_new_tokens=3, stop=("b<s>",))
    done = completed(([0, 1, SPECIAL], "length"), sampling=sampling)
    assert (done.text, done.finish_reason) == ("ab", "stop")
    split = completed(([0, 1], "abort"), ([SPECIAL, 2, 3], "length"), sampling=sampling)
    assert (split.token_ids, split.finish_reason) == ((0, 1, SPECIAL), "stop")


def test_a_server_that_went_past_a_stop_string_of_its_own_is_believed():
    sampling = Sampling(max_new_tokens=3, stop=("b",))
    done = completed(([0, 1, 2], "length"), sampling=sampling)
    assert (done.token_ids, done.truncated) == ((0, 1, 2), True)


def make_member():
    info = SimpleNamespace(tp_size=1, precision="float32", device="cpu", disable_radix_cache=None)
    handle = SimpleNamespace(url="http://server")
    return Member(2, handle, SimpleNamespace(), SimpleNamespace(info=info), bound=4)


def test_nobody_waits_after_an_answer_that_came_before_that_to_the_abort():
    member = make_member()

    async def stop():
        member.take()
        member.client.abort, member.client.pause = answer, paused
        await stop_generation(member, 30.0, lambda *fault: None)
        return asyncio.get_running_loop().time()

    async def answer():
        member.answer()

    async def paused(mode):
        assert not member.unanswered

    assert run_virtual(stop) == 0.0
    assert member.paused


@pytest.mark.anyio
async def test_a_request_that_was_answered_is_not_late_however_long_it_is_read():
    member = make_member()
    member.mark_clean(0, "v0")
    member.take()
    held = member.hold(-1.0, ["r"])
    assert member.late is held
    member.hear(held)
    assert member.late is None


def test_what_a_server_does_changes_with_its_state_and_its_first_and_last_request():
    member = make_member()
    member.mark_updating()
    member.mark_clean(0, "v0")
    member.take()
    member.take()
    member.answer()
    member.answer()
    member.mark_dead("gone")
    done = member.take_activities()
    assert [each.what for each in done] == ["out", "updating", "idle", "generating", "idle"]
    assert {each.slot for each in done} == {2}
    for before, after in pairwise(done):
        assert before.began_at + before.seconds == pytest.approx(after.began_at, abs=0.05)
    assert member.take_activities() == []
    assert [each.what for each in member.take_activities(ongoing=True)] == ["out"]


def test_the_time_in_which_a_server_is_none_of_the_run_s_is_no_activity_of_it():
    member = make_member()
    member.mark_clean(0, "v0")
    member.leave()
    assert not member.routable
    member.mark_dead("it has left")
    assert [each.what for each in member.take_activities(ongoing=True)] == ["out", "idle"]
    member.replace(member.handle, member.client, member.facts)
    member.mark_clean(1, "v1")
    assert [each.what for each in member.take_activities(ongoing=True)] == ["out", "idle"]
    assert member.routable


SHAPE = RouterShape(layers=2, top_k=1, experts=8)


def routed_reply(ids, first, num_tokens, reason="stop", shift=0, **changed):
    """A reply whose token `t` went through the experts `first + t` in both layers."""
    rows = [[(first + t) % 8] * 2 for t in range(num_tokens - 1 + shift)]
    meta = {
        "finish_reason": FinishReason(reason),
        "weight_version": "v0",
        "output_token_logprobs": [(-0.5, i, None) for i in ids],
        "routed_experts": base64.b64encode(np.array(rows, "<i4").tobytes()).decode(),
    }
    return GenerateReply(MetaInfo(**{**meta, **changed}), list(ids))


def started(prompt=(1, 2), **sampling):
    settings = Sampling(**{"max_new_tokens": 9, **sampling})
    return Partial(prompt, settings, None, frozenset([END]), SHAPE)


def experts_of(completion):
    """Of the first layer."""
    return list(completion.routes.experts[::2])


def test_tokens_keep_the_experts_that_they_were_sampled_with_over_an_interruption():
    partial = started()
    assert partial.request("r", "").return_routed_experts
    partial.add(routed_reply([3, 4], 0, 4, "abort"), SERVER, 0)
    # After the update all tokens are read again, and go through other experts.
    partial.add(routed_reply([5, END], 5, 6), SERVER, 0)
    completion = partial.completion(decode, spell)
    assert completion.token_ids == (3, 4, 5, END)
    # Token 3 (the last before the update) was read first under the new weights.
    assert experts_of(completion) == [0, 1, 2, 0, 1]


def test_an_abort_that_tells_no_experts_leaves_them_to_the_next_reply():
    partial = started()
    partial.add(routed_reply([3, 4], 0, 4, "abort", routed_experts=None), SERVER, 0)
    partial.add(routed_reply([END], 5, 5), SERVER, 0)
    assert experts_of(partial.completion(decode, spell)) == [5, 6, 7, 0]


def test_a_token_that_an_abort_leaves_without_a_logprob_is_sampled_with_new_experts():
    partial = started()
    entries = [(-0.5, 3, None), (None, 4, None)]
    cut = routed_reply([3, 4], 0, 4, "abort", output_token_logprobs=entries)
    partial.add(cut, SERVER, 0)
    partial.add(routed_reply([END], 5, 4), SERVER, 0)
    completion = partial.completion(decode, spell)
    assert completion.token_ids == (3, END)
    assert experts_of(completion) == [0, 1, 7]


def test_what_is_cut_off_behind_a_stop_string_takes_its_experts_with_it():
    partial = started(stop=("d",))
    partial.add(routed_reply([3, 4], 0, 4, "abort"), SERVER, 0)
    partial.add(routed_reply([5, END], 5, 6), SERVER, 0)
    completion = partial.completion(decode, spell)
    assert completion.token_ids == (3,)
    assert experts_of(completion) == [0, 1]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"shift": 1}, "sent 6 experts of 3 tokens, 4 are 1 in 2 layers"),
        ({"shift": -1}, "sent 2 experts of 3 tokens, 4 are"),
        ({"routed_experts": None}, "does not say which experts"),
        ({"routed_experts": "{}"}, "can't be read"),
        ({"routed_experts": "YWJj"}, "can't be read"),
        (
            {"routed_experts": base64.b64encode(np.full(4, 8, "<i4").tobytes()).decode()},
            "experts 8 to 8 of 8",
        ),
        (
            {"routed_experts": base64.b64encode(np.full(4, -1, "<i4").tobytes()).decode()},
            "experts -1 to -1",
        ),
    ],
)
def test_experts_that_can_t_be_those_of_the_tokens_are_refused(changed, words):
    with pytest.raises(ReplyError, match=words):
        started().add(routed_reply([END], 0, 3, **changed), SERVER, 0)


def test_nobody_asks_for_experts_unless_they_are_replayed():
    partial = Partial([1], Sampling(max_new_tokens=1), None)
    assert b"routed" not in msgspec.json.encode(partial.request("r", ""))
    partial.add(routed_reply([5], 0, 2, "length"), SERVER, 0)
    assert partial.completion(decode, spell).routes is None


def test_sglang_s_own_encoding_is_read():
    """As `RoutedExpertsCapturer.get_topk` and the detokenizer write it: int32, row by row."""
    experts = np.random.default_rng(0).integers(0, 300, (5, 3, 2), dtype=np.int32)
    encoded = base64.b64encode(experts.tobytes()).decode("utf-8")
    for num_experts, dtype in ((300, "<i2"), (320, "<i2")):
        routes = checked_routes(encoded, RouterShape(3, 2, num_experts), 6, "http://a")
        read = np.frombuffer(routes.experts, dtype).reshape(5, 3, 2)
        assert read.tolist() == experts.tolist()
