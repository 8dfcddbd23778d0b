"""A class and a function that record every use of them, and pickles that ask for such."""

import io

from minegan_fast.files.pickles import Unpickler
from minegan_fast.files.plain import plain

CALLS = []


class Canary:
    """Everything that pickle could run of a class, recorded."""

    def __new__(cls, *arguments, **named):
        CALLS.append("__new__")
        return super().__new__(cls)

    def __init__(self, *arguments, **named):
        CALLS.append("__init__")

    def __setstate__(self, state):
        CALLS.append("__setstate__")

    def __setattr__(self, name, value):
        CALLS.append("__setattr__")

    def append(self, value):
        CALLS.append("append")

    def __setitem__(self, key, value):
        CALLS.append("__setitem__")

    def __call__(self, *arguments):
        CALLS.append("__call__")

    def __reduce__(self):
        CALLS.append("__reduce__")
        return Canary, ()


def touch(*arguments):
    CALLS.append("touch")


def loaded(content: bytes):
    return plain(Unpickler(io.BytesIO(content)).load())


def asks_for(function, *arguments):
    class Evil:
        def __reduce__(self):
            return function, arguments

    return Evil()
