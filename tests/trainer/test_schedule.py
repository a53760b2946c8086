"""The learning rate: bounds, borders and shape, over every schedule that hypothesis can think of."""

import math

from hypothesis import given
from hypothesis import strategies as st

from trainer.schedule import Schedule


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    num_steps = draw(st.integers(1, 5_000))
    peak = draw(st.floats(1e-6, 1.0))
    return Schedule(
        kind=draw(st.sampled_from(["cosine", "wsd", "constant"])),
        peak=peak,
        minimum=peak * draw(st.floats(0.0, 1.0)),
        warmup_steps=draw(st.integers(0, num_steps - 1)),
        num_steps=num_steps,
        decay_share=draw(st.floats(0.01, 1.0)),
    )


@given(schedules(), st.data())
def test_stays_within_its_bounds(schedule: Schedule, data: st.DataObject) -> None:
    step = data.draw(st.integers(0, schedule.num_steps))
    rate = schedule.learning_rate(step)
    assert 0 <= rate <= schedule.peak * (1 + 1e-12)
    if step >= schedule.warmup_steps:
        assert rate >= schedule.minimum * (1 - 1e-12)


@given(schedules(), st.data())
def test_rises_through_warmup_and_never_after(schedule: Schedule, data: st.DataObject) -> None:
    step = data.draw(st.integers(0, schedule.num_steps - 1))
    before, after = schedule.learning_rate(step), schedule.learning_rate(step + 1)
    if step + 1 < schedule.warmup_steps:
        assert after > before
    elif step >= schedule.warmup_steps:
        assert after <= before * (1 + 1e-12)


@given(schedules())
def test_meets_peak_after_warmup_and_minimum_at_the_end(schedule: Schedule) -> None:
    if schedule.kind != "wsd" or schedule.decay_share < 0.5:
        start = schedule.learning_rate(schedule.warmup_steps)
        assert schedule.warmup_steps == schedule.num_steps or start <= schedule.peak * (1 + 1e-12)
    if schedule.kind != "constant":
        assert math.isclose(schedule.learning_rate(schedule.num_steps), schedule.minimum, abs_tol=1e-15)


def test_the_originals_rates() -> None:
    original = Schedule(kind="cosine", peak=6e-4, minimum=3e-4, warmup_steps=100, num_steps=5_050)
    assert math.isclose(original.learning_rate(0), 6e-4 / 101)
    assert original.learning_rate(100) == 6e-4
    assert math.isclose(original.learning_rate(100 + 4_950 // 2), 4.5e-4)
    assert original.learning_rate(5_050) == 3e-4


def test_wsd_holds_then_falls_in_a_straight_line() -> None:
    wsd = Schedule(kind="wsd", peak=1.0, minimum=0.0, warmup_steps=10, num_steps=100, decay_share=0.2)
    assert {wsd.learning_rate(step) for step in range(10, 81)} == {1.0}
    assert math.isclose(wsd.learning_rate(90), 0.5)
    assert wsd.learning_rate(100) == 0.0
