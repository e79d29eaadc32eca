"""The scheduler without threads or sockets: slots, memory, sharing and bits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from lightning_grpo.engine.batch import Output, Request
from lightning_grpo.engine.model import ModelRunner, load_model
from lightning_grpo.engine.requests import BadRequestError
from lightning_grpo.engine.scheduler import Limits, PromptReader, Scheduler
from lightning_grpo.policy.load import without_bars
from tests.fakes.causal_models import make_model_of, plain_logprobs
from tests.fakes.engine_requests import PLAIN, ignore
from tests.fakes.tiny_model import make_tiny_model, make_tiny_tokenizer


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> ModelRunner:
    """A tiny model's forward pass."""
    return ModelRunner(load_model(str(make_tiny_model(tmp_path_factory.mktemp("model")))))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Bits and speed of one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class CountingRunner:
    """A runner that notes the shapes it is asked for."""

    def __init__(self, inner: ModelRunner) -> None:
        self.inner = inner
        self.records = False
        self.vocab_size = inner.vocab_size
        self.context_length = inner.context_length
        self.prefilled: list[list[int]] = []
        self.decoded: list[int] = []
        self.extended: list[list[int]] = []

    def prefill(self, prompts: Any) -> Any:
        """Note the prompts' lengths."""
        self.prefilled.append([len(p) for p in prompts])
        return self.inner.prefill(prompts)

    def score(self, prompt: Any, start: int) -> Any:
        """Pass on."""
        return self.inner.score(prompt, start)

    def decode(self, slots: Any, tokens: Any, lengths: Any) -> Any:
        """Note how many rows there are."""
        self.decoded.append(len(tokens))
        return self.inner.decode(slots, tokens, lengths)

    def extend(self, slots: Any, tails: Any, lengths: Any, first_slot: int) -> Any:
        """Note the tails' lengths."""
        self.extended.append([len(tail) for tail in tails])
        return self.inner.extend(slots, tails, lengths, first_slot)


def make(runner: Any, **limits: Any) -> Scheduler:
    """A scheduler without stop strings."""
    return Scheduler(runner, None, Limits(**limits))


def requests(count: int, **changes: Any) -> list[Request]:
    """Requests of different prompts and seeds."""
    return [
        Request(
            msgspec.structs.replace(
                PLAIN,
                **(
                    {
                        "rid": f"r{i}",
                        "input_ids": tuple(range(3 + i, 8 + 2 * i)),
                        "sampling_seed": i,
                        "max_new_tokens": 6,
                    }
                    | changes
                ),
            ),
            ignore,
        )
        for i in range(count)
    ]


def drain(scheduler: Scheduler) -> dict[str, Output]:
    """Run until nothing is left; the outputs by name."""
    while scheduler.has_work:
        scheduler.step()
    outputs = {output.request.generation.rid: output for output in scheduler.outbox}
    scheduler.outbox.clear()
    return outputs


def test_only_those_that_stream_are_told_of_before_their_end(runner: ModelRunner) -> None:
    scheduler = make(runner)
    quiet, streams = requests(2, max_new_tokens=3)
    streams.stream = True
    scheduler.submit([quiet, streams])
    scheduler.step()
    scheduler.step()
    told = [(output.request, len(output.token_ids)) for output in scheduler.outbox]
    assert told == [(streams, 1), (streams, 2)]
    scheduler.step()
    assert [output.token_ids for output in scheduler.outbox[2:]] == [
        quiet.output_ids,
        streams.output_ids,
    ]


def test_a_stop_string_ends_the_request_that_has_it_and_no_other(runner: ModelRunner) -> None:
    tokenizer = make_tiny_tokenizer()
    scheduler = Scheduler(runner, tokenizer, Limits())
    scheduler.submit(requests(2, max_new_tokens=40))
    plain = drain(scheduler)["r1"].token_ids
    stop = tokenizer.decode(plain[3:5])
    first, second = requests(2, max_new_tokens=40)
    second.generation = msgspec.structs.replace(second.generation, stop=(stop,))
    scheduler.submit([first, second])
    ended = drain(scheduler)
    assert len(ended["r0"].token_ids) == 40
    assert ended["r1"].finish_reason == {"type": "stop", "matched": stop}
    assert ended["r1"].token_ids == plain[: len(ended["r1"].token_ids)]


def test_no_more_run_than_there_are_slots(runner: ModelRunner) -> None:
    counting = CountingRunner(runner)
    scheduler = make(counting, max_running=4)
    scheduler.submit(requests(11))
    assert len(drain(scheduler)) == 11
    assert max(counting.decoded) == 4


def test_those_behind_full_slots_are_read_many_at_a_time(runner: ModelRunner) -> None:
    counting = CountingRunner(runner)
    scheduler = make(counting, max_running=8)
    for index in range(24):
        scheduler.submit(requests(1, rid=f"r{index}", input_ids=(index,), max_new_tokens=index + 2))
    assert len(drain(scheduler)) == 24
    assert [len(prompts) for prompts in counting.prefilled] == [8, 4, 4, 4, 4]


def test_what_is_only_scored_waits_neither_for_a_slot_nor_for_others(runner: ModelRunner) -> None:
    scheduler = make(runner, max_running=2)
    scheduler.submit(requests(6))
    scheduler.step()
    scheduler.pause("retract")
    scheduler.submit(requests(1, rid="score", max_new_tokens=0, logprob_start=0))
    scheduler.resume()
    scheduler.step()
    assert [output.request.generation.rid for output in scheduler.outbox] == ["score"]
    scheduler.step()
    scheduler.submit(requests(1, rid="again", max_new_tokens=0, logprob_start=0))
    assert len(scheduler.running) == 2
    scheduler.step()
    assert [output.request.generation.rid for output in scheduler.outbox] == ["score", "again"]


def test_slots_times_the_longest_request_stay_within_the_memory(runner: ModelRunner) -> None:
    counting = CountingRunner(runner)
    # 5 + 6 tokens each: three fit in 33.
    scheduler = make(counting, max_running=8, max_total_tokens=33)
    scheduler.submit(requests(7, input_ids=(1, 2, 3, 4, 5)))
    assert len(drain(scheduler)) == 7
    assert max(counting.decoded) == 3


def test_a_request_larger_than_the_memory_still_runs_alone(runner: ModelRunner) -> None:
    scheduler = make(runner, max_total_tokens=4)
    scheduler.submit(requests(2))
    assert len(drain(scheduler)) == 2


def test_equal_prompts_are_read_once_in_one_round_and_in_later_ones(runner: ModelRunner) -> None:
    counting = CountingRunner(runner)
    scheduler = make(counting)
    scheduler.submit(requests(5, input_ids=(9, 8, 7)))
    first = drain(scheduler)
    scheduler.submit(requests(2, input_ids=(9, 8, 7)))
    drain(scheduler)
    assert counting.prefilled == [[3]]
    assert [o.request.cached_tokens for o in first.values()].count(0) == 1


def test_the_least_recently_used_prompt_goes_first(runner: ModelRunner) -> None:
    counting = CountingRunner(runner)
    reader = PromptReader(counting, max_batch_tokens=100, max_kept_tokens=10)
    one, two, three = ([request] for request in requests(3))
    for number, request in enumerate((one, two, three)):
        request[0].generation = msgspec.structs.replace(
            request[0].generation, input_ids=(number,) * 4
        )
    state = reader.read(one)[0]
    reader.read(two)
    assert reader.read(one)[0] is state
    reader.read(three)
    assert reader.read(one)[0] is state
    reader.read(three)
    assert counting.prefilled == [[4], [4], [4]]
    reader.read(two)
    assert len(counting.prefilled) == 4
    reader.forget()
    assert reader.read(one)[0] is not state


def test_a_prompt_that_would_evict_all_is_not_kept(runner: ModelRunner) -> None:
    counting = CountingRunner(runner)
    reader = PromptReader(counting, max_batch_tokens=100, max_kept_tokens=10)
    small, large = requests(1, input_ids=(1,) * 4), requests(1, input_ids=(1,) * 11)
    for _ in range(2):
        reader.read(small)
        reader.read(large)
    assert counting.prefilled == [[4], [11], [11]]


def test_weights_that_are_renamed_before_the_first_token_name_it(runner: ModelRunner) -> None:
    scheduler = make(runner)
    scheduler.submit(requests(1))
    scheduler.set_version("new")
    scheduler.step()
    scheduler.set_version("newer")
    scheduler.set_version("newest")
    (output,) = drain(scheduler).values()
    assert output.spans == [
        {"version": "new", "start": 0, "end": 1},
        {"version": "newest", "start": 1, "end": 6},
    ]


def test_a_round_of_reading_is_bounded_so_that_others_decode(runner: ModelRunner) -> None:
    counting = CountingRunner(runner)
    scheduler = make(counting, prefill_tokens=12)
    scheduler.submit(requests(3, max_new_tokens=40))
    scheduler.step()
    assert len(scheduler.running) < 3
    scheduler.submit(requests(1, rid="long", input_ids=tuple(range(3, 60))))
    assert set(drain(scheduler)) == {"r0", "r1", "r2", "long"}
    assert [57] in counting.prefilled


def test_a_full_batch_gives_what_each_request_gives_alone(runner: ModelRunner) -> None:
    crowd = make(runner, max_running=5)
    crowd.submit(requests(12, max_new_tokens=20))
    together = drain(crowd)
    for request in requests(12, max_new_tokens=20):
        alone = make(runner)
        alone.submit([request])
        output = drain(alone)[request.generation.rid]
        assert output.token_ids == together[request.generation.rid].token_ids
        assert output.logprobs == pytest.approx(together[request.generation.rid].logprobs, abs=1e-5)


def test_a_retracted_request_ends_as_if_it_had_not_been(runner: ModelRunner) -> None:
    plain = make(runner)
    plain.submit(requests(3, max_new_tokens=100))
    expected = drain(plain)
    scheduler = make(runner)
    scheduler.submit(requests(3, max_new_tokens=100))
    for _ in range(70):
        scheduler.step()
    scheduler.pause("retract")
    assert (len(scheduler.running), scheduler.num_waiting) == (0, 3)
    assert not scheduler.has_work
    scheduler.resume()
    for name, output in drain(scheduler).items():
        assert output.token_ids == expected[name].token_ids
        assert output.logprobs == pytest.approx(expected[name].logprobs, abs=1e-5)
        assert output.request.num_retractions == 1


def test_windows_hold_for_prompts_in_the_cache_and_after_interruptions(tmp_path: Path) -> None:
    kinds = ["sliding_attention", "full_attention"]
    model = make_model_of("gemma3_text", sliding_window=8, layer_types=kinds)
    with without_bars():
        model.save_pretrained(tmp_path)
        scheduler = make(ModelRunner(load_model(str(tmp_path))), max_running=3)
    for name, length in (("a", 3), ("b", 7), ("c", 8), ("d", 9), ("e", 20)):
        shared = {"input_ids": tuple(range(3, 3 + length)), "max_new_tokens": 15}
        scheduler.submit([*requests(1, rid=name, **shared), *requests(1, rid=2 * name, **shared)])
    while scheduler.has_work:
        for _ in range(4):
            scheduler.step()
        scheduler.pause("retract")
        scheduler.resume()
    outputs = drain(scheduler)
    assert len(outputs) == 10
    assert max(output.request.num_retractions for output in outputs.values()) > 1
    for output in outputs.values():
        ids = torch.tensor([*output.request.generation.input_ids, *output.token_ids])
        expected = plain_logprobs(model, [ids])[0][-len(output.token_ids) :]
        assert output.logprobs == pytest.approx(expected.tolist(), abs=1e-5)


def test_retracted_requests_read_their_prompt_once_and_only_their_own_tokens_behind_it(
    runner: ModelRunner,
) -> None:
    counting = CountingRunner(runner)
    scheduler = make(counting)
    for index in range(5):  # each a token behind the one before
        scheduler.submit(requests(1, rid=f"r{index}", input_ids=(9, 8, 7), max_new_tokens=50))
        scheduler.step()
    scheduler.pause("retract")
    scheduler.update(lambda: None, "next")
    scheduler.submit(requests(1, rid="new", input_ids=(9, 8, 7)))
    scheduler.resume()
    assert len(drain(scheduler)) == 6
    assert counting.prefilled == [[3], [3]]
    assert counting.extended == [[1, 2, 3, 4, 5]]


def test_the_deterministic_mode_repeats_bits_after_other_work(runner: ModelRunner) -> None:
    scheduler = make(runner, max_running=6, deterministic=True)

    def run(order: int) -> dict[str, Output]:
        scheduler.pause("abort")
        scheduler.submit(requests(14, max_new_tokens=30)[::order])
        scheduler.resume()
        return drain(scheduler)

    first = run(1)
    scheduler.submit(requests(20, max_new_tokens=200))
    drain(scheduler)
    for again in (run(1), run(-1)):
        for name, output in again.items():
            assert output.token_ids == first[name].token_ids
            assert output.logprobs == first[name].logprobs


def test_a_hold_ends_when_those_in_flight_have_and_keeps_new_ones_out(runner: ModelRunner) -> None:
    scheduler = make(runner)
    scheduler.submit(requests(2))
    drained = scheduler.hold()
    scheduler.submit(requests(1, rid="late"))
    assert not drained.done()
    assert set(drain(scheduler)) == {"r0", "r1"}
    assert drained.done()
    scheduler.release()
    assert set(drain(scheduler)) == {"late"}


def test_a_pause_ends_a_hold(runner: ModelRunner) -> None:
    scheduler = make(runner)
    scheduler.submit(requests(2))
    scheduler.step()
    drained = scheduler.hold()
    scheduler.pause("in_place")
    assert drained.done()
    scheduler.release()
    scheduler.resume()
    assert len(drain(scheduler)) == 2


def test_a_name_twice_takes_none_of_the_request(runner: ModelRunner) -> None:
    scheduler = make(runner)
    scheduler.submit(requests(1))
    with pytest.raises(BadRequestError, match="r0"):
        scheduler.submit(requests(2))
    assert scheduler.num_waiting == 1


def test_an_unknown_pause_changes_nothing(runner: ModelRunner) -> None:
    scheduler = make(runner)
    with pytest.raises(BadRequestError, match="sleep"):
        scheduler.pause("sleep")
    assert not scheduler.paused


@pytest.fixture
def mixture(tmp_path: Path) -> ModelRunner:
    """Three layers of eight experts, whose router weights may be changed."""
    folder = make_tiny_model(tmp_path, num_layers=3, num_experts=8, tie_word_embeddings=False)
    return ModelRunner(load_model(str(folder)))


def routes_of(output: Output) -> torch.Tensor:
    """What is told, sorted in each layer, `[tokens - 1, 3, 2]`."""
    told = torch.frombuffer(bytearray(output.routes), dtype=torch.int32)
    return told.view(-1, 3, 2).sort(-1).values.long()


def full_pass(runner: ModelRunner, output: Output) -> torch.Tensor:
    """What transformers' own forward chooses for the same tokens."""
    ids = [*output.request.generation.input_ids, *output.token_ids[:-1]]
    chosen: list[torch.Tensor] = []
    found = [m for m in runner.model.modules() if type(m).__name__.endswith("Router")]
    hooks = [m.register_forward_hook(lambda _, __, out: chosen.append(out[2])) for m in found]
    runner.model(input_ids=torch.tensor([ids]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return torch.stack(chosen, 1).sort(-1).values


@pytest.mark.parametrize("row_by_row", [False, True])
@pytest.mark.parametrize("retracts", [False, True])
def test_the_experts_that_are_told_are_those_of_a_full_pass(
    mixture: ModelRunner, row_by_row: bool, retracts: bool
) -> None:
    mixture.row_by_row = row_by_row
    scheduler = make(mixture)
    asked = requests(4, return_routed_experts=True)
    asked[3].generation = msgspec.structs.replace(
        asked[3].generation, input_ids=asked[2].generation.input_ids
    )
    others = requests(1, rid="other")
    scheduler.submit([*asked, *others])
    if retracts:
        for _ in range(3):
            scheduler.step()
        scheduler.pause("retract")
        scheduler.resume()
    outputs = drain(scheduler)
    assert outputs.pop("other").routes == b""
    for output in outputs.values():
        assert torch.equal(routes_of(output), full_pass(mixture, output))


def test_retracted_requests_keep_the_experts_that_their_tokens_were_sampled_with(
    mixture: ModelRunner,
) -> None:
    scheduler = make(mixture)
    (request,) = requests(1, max_new_tokens=20, return_routed_experts=True)
    scheduler.submit([request])
    for _ in range(9):
        scheduler.step()
    scheduler.pause("retract")
    known = len(request.routes)
    before = Output(request, len(request.output_ids), None, "")
    sampled_with = full_pass(mixture, before)
    assert len(sampled_with) == known
    for module in mixture.model.modules():
        if type(module).__name__.endswith("Router"):
            module.weight.data = module.weight.data.roll(1, 0)
    scheduler.update(lambda: None, "new")
    scheduler.resume()
    (output,) = drain(scheduler).values()
    told, read_again = routes_of(output), full_pass(mixture, output)
    assert torch.equal(told[:known], sampled_with)
    assert torch.equal(told[known:], read_again[known:])
    assert not torch.equal(read_again[:known], sampled_with)


def test_nothing_is_recorded_before_somebody_asks_and_prompts_of_before_are_read_again(
    mixture: ModelRunner,
) -> None:
    scheduler = make(mixture)
    scheduler.submit(requests(1))
    (first,) = drain(scheduler).values()
    assert not mixture.records
    scheduler.submit(requests(1, return_routed_experts=True))
    (second,) = drain(scheduler).values()
    assert mixture.records
    assert second.token_ids == first.token_ids
    assert torch.equal(routes_of(second), full_pass(mixture, second))


def test_an_aborted_request_tells_the_experts_of_what_it_has(mixture: ModelRunner) -> None:
    scheduler = make(mixture)
    scheduler.submit(requests(1, max_new_tokens=20, return_routed_experts=True))
    for _ in range(5):
        scheduler.step()
    scheduler.abort(None)
    (output,) = drain(scheduler).values()
    assert len(output.token_ids) == 5
    assert torch.equal(routes_of(output), full_pass(mixture, output))
