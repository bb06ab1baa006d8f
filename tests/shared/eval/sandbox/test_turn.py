"""Turns of a side's threads on the channel."""

import threading

import pytest

from shared.eval.sandbox.turn import Turn


def test_others_write_while_a_turn_is_lent_and_it_comes_back_after_them():
    turn, written = Turn(), []

    def write():
        with turn:
            written.append("another thread")

    with turn:
        with turn.lent():
            thread = threading.Thread(target=write)
            thread.start()
            thread.join(10)
            written.append("the call has ended")
        written.append("the answer")
    assert written == ["another thread", "the call has ended", "the answer"]


def test_answers_are_given_in_the_reverse_order_of_their_calls():
    turn, answered, inner_lent, outer_ended = Turn(), [], threading.Event(), threading.Event()

    def inner():
        with turn:
            with turn.lent():
                inner_lent.set()
                outer_ended.wait(10)
            answered.append("inner")

    thread = threading.Thread(target=inner)
    with turn:
        with turn.lent():
            thread.start()
            inner_lent.wait(10)
            outer_ended.set()
        answered.append("outer")
    thread.join(10)
    assert answered == ["inner", "outer"]


def test_a_call_while_a_message_is_read_is_refused():
    turn = Turn()
    with turn, pytest.raises(RuntimeError, match="while a message is read"), turn:
        pass
