"""How often the garbage collector looks at everything."""

import gc

from lightning_grpo.session.assembly import SHARE, QuietHeap


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def look(heap, clock, generation, seconds):
    heap.space_out("start", {"generation": generation})
    clock.now += seconds
    heap.space_out("stop", {"generation": generation})


def test_a_look_at_everything_is_put_off_by_what_the_last_one_took():
    clock, before = Clock(), gc.get_threshold()
    heap = QuietHeap(clock)
    try:
        look(heap, clock, 2, 0.5)
        assert gc.get_threshold()[:2] == before[:2]
        assert gc.get_threshold()[2] > 1000 * before[2]
        clock.now += 0.5 / SHARE - 1.0
        look(heap, clock, 1, 0.0)
        assert gc.get_threshold() != before
        clock.now += 1.0
        look(heap, clock, 0, 0.0)
        assert gc.get_threshold() == before
    finally:
        gc.set_threshold(*before)


def test_everything_is_as_before_once_it_is_thawed():
    callbacks, thresholds = list(gc.callbacks), gc.get_threshold()
    heap = QuietHeap()
    heap.freeze()
    heap.freeze()
    assert len(gc.callbacks) == len(callbacks) + 1
    gc.collect()
    heap.thaw()
    heap.thaw()
    assert gc.callbacks == callbacks
    assert gc.get_threshold() == thresholds
    assert gc.get_freeze_count() == 0
