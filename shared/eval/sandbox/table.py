"""The objects that have crossed, as one side knows them, by the numbers that both sides give them."""

import enum
import operator
import sys
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any

from shared.eval.sandbox.kinds import CHANGING, OF_ATTRIBUTES, PLAIN, attributes, set_attributes

_BY_VALUE = (int, str, bytes)


class Table:
    """Numbers for objects, and what those that can change hold on both sides.

    Both sides have the `permanent` objects from the start: the entry point, then the prompt's classes.
    """

    def __init__(self, permanent: Iterable[Any] = ()) -> None:
        self.objects: dict[int, Any] = {}
        self.next_number = 0
        self.exported: set[int] = set()  # of this side's own that the other has a proxy of
        self._numbers: dict[int, int] = {}  # by id; `objects` keeps the objects alive
        # What each object that can change holds on both sides, and how to see what it holds now.
        self._agreed: dict[int, tuple[Callable[[Any], Sequence[Any]], list[Any]]] = {}
        self._unreachable: set[int] = set()
        for value in permanent:
            self.add(value)
        self._num_permanent = self.next_number
        classes = [v for v in self.objects.values() if isinstance(v, type) and not issubclass(v, BaseException)]
        self._shared = {*CHANGING, *PLAIN, *OF_ATTRIBUTES, *classes}
        self._bases: dict[type, type | None] = dict.fromkeys((*CHANGING, *PLAIN))

    def add(self, value: Any) -> int:
        """Number an object."""
        number = self.next_number
        self.next_number += 1
        self.objects[number] = value
        self._numbers[id(value)] = number
        return number

    def number(self, value: Any) -> int | None:
        """The number of an object that has crossed."""
        return self._numbers.get(id(value))

    def forget(self, numbers: Iterable[int]) -> None:
        """Give up objects."""
        for number in numbers:
            value = self.objects.pop(number, None)
            self.exported.discard(number)
            if value is not None and self._numbers.get(id(value)) == number:
                del self._numbers[id(value)]
            self._agreed.pop(number, None)

    def forget_from(self, number: int) -> None:
        """Give up all objects from a number on, whose message was not sent."""
        self.forget(range(number, self.next_number))
        self.next_number = number

    # --- what objects hold -------------------------------------------------------------------------------------------

    def base_of(self, kind: type) -> type | None:
        """What instances of a class cross as that is no class of plain data itself: the class of the prompt, of plain
        data or of attributes that it is or is built on. None of a class whose instances stay where they are."""
        if kind not in self._bases:
            self._bases[kind] = base_among(kind, self._shared)
        return self._bases[kind]

    def is_data(self, kind: type) -> bool:
        """Whether instances of classes built on this one cross as data."""
        return base_among(kind, self._shared) is not None

    def can_change(self, value: Any) -> bool:
        """Whether a call may change an object in place."""
        kind = type(value)
        return kind in CHANGING or (self.base_of(kind) is not None and not isinstance(value, enum.Enum))

    def contents(self, value: Any) -> Sequence[Any]:
        """What an object that can change holds: its attributes where it is an instance of a class, and its items."""
        kind = type(value)
        if kind in CHANGING:
            return CHANGING[kind].take(value)
        by_name, base = attributes(value), base_among(kind, CHANGING)
        return [len(by_name), *by_name, *by_name.values(), *(CHANGING[base].take(value) if base else ())]

    def refill(self, value: Any, items: list[Any]) -> None:
        """Have an object hold what `contents` gave, in place and without a call of its own methods."""
        kind = type(value)
        if not self.can_change(value):
            raise TypeError("a change of what cannot change")
        if kind in CHANGING:
            CHANGING[kind].fill(value, items)
            return
        count = items[0]
        set_attributes(value, dict(zip(items[1 : 1 + count], items[1 + count : 1 + 2 * count], strict=True)))
        if base := base_among(kind, CHANGING):
            CHANGING[base].fill(value, items[1 + 2 * count :])

    def changed(self) -> list[int]:
        """The objects that no longer hold what both sides agreed on, or may not."""
        changed, objects, unreachable, same = [], self.objects, self._unreachable, operator.is_
        for number, (held_by, agreed) in self._agreed.items():  # of all objects, before every message
            if number not in unreachable:
                items = held_by(objects[number])
                if len(items) != len(agreed) or not (all(map(same, items, agreed)) or _alike(items, agreed)):
                    changed.append(number)
        return changed

    def agree(self, numbers: Iterable[int]) -> None:
        """Take what these objects hold now as what the other side has."""
        for number in numbers:
            value = self.objects.get(number)
            if self.can_change(value):
                kind = type(value)
                held_by = CHANGING[kind].take if kind in CHANGING else self.contents
                self._agreed[number] = held_by, list(held_by(value))

    # --- what this side's code can still reach -----------------------------------------------------------------------

    def unreferenced(self) -> list[int]:
        """The objects that only this table refers to, so that nobody on this side can tell them from new ones."""
        return [n for n in self._lone() if n not in self.exported and n >= self._num_permanent]

    def note_unreachable(self) -> None:
        """Take what only this table refers to as out of reach of this side's code until the next message is sent."""
        self._unreachable = set(self._lone())

    def _lone(self) -> list[int]:
        objects, count = self.objects, sys.getrefcount
        lone = self.add([])
        try:
            least = count(objects[lone])
            return [number for number in objects if count(objects[number]) <= least and number != lone]
        finally:
            self.forget_from(lone)


def base_among(kind: type, among: Container[type]) -> Any:
    """The first class of these that a class is or is built on; None where there is none."""
    return next((base for base in kind.__mro__ if base in among), None)


def _alike(items: Sequence[Any], agreed: Sequence[Any]) -> bool:
    """Whether items are the same objects, or values that are told apart by nothing else."""
    return all(
        one is other or (type(one) is type(other) and type(one) in _BY_VALUE and one == other)
        for one, other in zip(items, agreed, strict=True)
    )
