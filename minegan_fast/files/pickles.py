"""Pickles as data: an interpreter of pickle's opcodes that makes tensors, arrays, containers, numbers and strings.

Python's own unpickler calls what a file names. This one looks a name up in a fixed table; a name that is not there
becomes a `Thing`, which remembers how the file wanted to call it and is never called. Attributes are never set, no
`__setstate__`, `__init__` or `__reduce__` runs, nothing is imported. Names by which files are made to attack are not
even remembered: the whole file is refused.
"""

import pickletools
from collections.abc import Callable, Iterable
from typing import Any

from .pickle_names import (
    ORDERS,
    Array,
    DamagedError,
    DType,
    Known,
    RefusedError,
    Thing,
    array_of,
    check_keys,
    lookup,
    require,
)

# What a pickle may cost beyond its own length: bytes and elements copied for each of its bytes, and keys in all whose
# hashes it can choose so that they collide.
COPIES, MOST_CHOSEN = 8, 4096


class Unpickler:
    """Reads one pickle from a file opened for reading bytes; the file is left just behind it.

    Args:
        file: has read, readline and tell.
        persistent: what a persistent id (a torch storage) stands for; None refuses them.
        nested: what the bytes of a torch.save file inside the pickle hold; None refuses them.
    """

    def __init__(self, file: Any, persistent: Callable | None = None, nested: Callable | None = None):
        self.file, self.persistent, self.nested = file, persistent, nested
        self.stack, self.marks, self.memo = [], [], {}
        self.copied = self.chosen = 0

    def load(self) -> Any:
        """The object that the pickle holds. Raises RefusedError or DamagedError."""
        try:
            for opcode, argument, _ in pickletools.genops(self.file):
                if opcode.name == "STOP":
                    require(len(self.stack) == 1 and not self.marks, "the pickle ends in the middle of an object")
                    return self.stack[0]
                self._step(opcode.name, argument)
        except (RefusedError, DamagedError):
            raise
        except RecursionError:
            raise DamagedError("it is nested too deeply") from None
        except MemoryError:
            raise DamagedError("it asks for more memory than there is") from None
        except Exception as error:  # anything can be wrong with the arguments that a damaged file gives
            raise DamagedError((str(error) or type(error).__name__).splitlines()[0]) from None
        raise DamagedError("the pickle has no end")

    def _step(self, opcode: str, argument) -> None:
        stack = self.stack
        match opcode:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                self.marks.append(len(stack))
            case "POP":
                if self.marks and self.marks[-1] == len(stack):
                    self.marks.pop()
                else:
                    stack.pop()
            case "POP_MARK":
                self._above_mark()
            case "DUP":
                stack.append(stack[-1])
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode == "NEWTRUE")
            case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE" | "EMPTY_SET":
                stack.append({"DICT": dict, "LIST": list, "TUPLE": tuple, "SET": set}[opcode[6:]]())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                number = int(opcode[-1])
                require(len(stack) >= number, "the stack is empty")
                values = tuple(stack[-number:])
                del stack[-number:]
                stack.append(values)
            case "TUPLE" | "LIST" | "FROZENSET":
                values = self._above_mark()
                if opcode == "FROZENSET":
                    self._hash(values)
                stack.append({"TUPLE": tuple, "LIST": list, "FROZENSET": frozenset}[opcode](values))
            case "DICT":
                stack.append(self._pairs(self._above_mark()))
            case "APPEND" | "APPENDS":
                values = [stack.pop()] if opcode == "APPEND" else self._above_mark()
                self._extend(stack[-1], values)
            case "ADDITEMS":
                values = self._above_mark()
                require(isinstance(stack[-1], set), "items are added to what is no set")
                self._hash(values)
                stack[-1].update(values)
            case "SETITEM" | "SETITEMS":
                values = [stack.pop() for _ in "kv"][::-1] if opcode == "SETITEM" else self._above_mark()
                target = stack[-1].items if isinstance(stack[-1], Thing) else stack[-1]
                require(isinstance(target, dict), "items are set in what is no dict")
                target.update(self._pairs(values))
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[str(argument)] = stack[-1]  # the file chooses the number, and so the hash of a number
            case "MEMOIZE":
                self.memo[str(len(self.memo))] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self.memo[str(argument)])
            case "GLOBAL":
                stack.append(self._named(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(self._named(module, name))
            case "REDUCE" | "NEWOBJ":
                arguments, made = stack.pop(), stack.pop()
                stack.append(_made(made, arguments))
            case "NEWOBJ_EX":
                named, arguments, made = stack.pop(), stack.pop(), stack.pop()
                self._copy(arguments)
                stack.append(_made(made, (*arguments, named) if named else arguments))
            case "INST":
                arguments = tuple(self._above_mark())
                stack.append(_made(self._named(*argument.split(" ", 1)), arguments))
            case "OBJ":
                made, *arguments = self._above_mark()
                stack.append(_made(made, tuple(arguments)))
            case "BUILD":
                state = stack.pop()
                if isinstance(stack[-1], Array):
                    self._copy(*state)
                _build(stack[-1], state)
            case "PERSID" | "BINPERSID":
                if self.persistent is None:
                    raise DamagedError("it refers to objects outside the file")
                stack.append(self.persistent(argument if opcode == "PERSID" else stack.pop()))
            case "EXT1" | "EXT2" | "EXT4" | "NEXT_BUFFER" | "READONLY_BUFFER":
                raise DamagedError(f"it refers to what only the program that wrote it has ({opcode})")
            case _:  # a number, a string or bytes
                stack.append(argument)

    def _named(self, module: str, name: str):
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            if self.nested is None:
                raise DamagedError("it holds a torch file inside a torch file")
            found = Known("torch.storage._load_from_bytes", self.nested)
        else:
            found = lookup(module, name)
        if not isinstance(found, Known):
            return found

        def make(*arguments):
            self._copy(arguments, *arguments)
            if found.keys is not None:
                self._hash(found.keys(*arguments))
            return found.make(*arguments)

        return Known(found.name, make)

    def _copy(self, *values) -> None:
        """Counts what a call copies of values that it does not bring, but has in the memo. DamagedError: too much."""
        self.copied += sum(len(v) for v in values if isinstance(v, (str, bytes, bytearray, list, tuple, dict, set)))
        require(self.copied <= COPIES * (self.file.tell() + 1024), "it copies the same data over and over")

    def _hash(self, keys: Iterable) -> None:
        self.chosen += check_keys(keys)
        require(self.chosen <= MOST_CHOSEN, f"more than {MOST_CHOSEN} keys are neither text nor small numbers")

    def _pairs(self, values: list) -> dict:
        self._hash(values[::2])
        return dict(zip(values[::2], values[1::2], strict=True))

    def _above_mark(self) -> list:
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    @staticmethod
    def _extend(target, values: list) -> None:
        if isinstance(target, list):
            target.extend(values)
        elif isinstance(target, Thing):  # a list of an unknown class
            target.items.update(enumerate(values, len(target.items)))
        else:
            raise DamagedError("items are appended to what is no list")


def _made(made, arguments):
    require(isinstance(arguments, tuple), "arguments are no tuple")
    if isinstance(made, Known):
        return made.make(*arguments)
    require(isinstance(made, Thing), "it calls what is no function")
    return Thing(made.name, arguments)


def _build(target, state) -> None:
    """Gives an object that was made the state that the file holds for it."""
    if isinstance(target, Array):
        _, shape, dtype, fortran, data = state
        target.value = array_of(data, dtype, shape, "F" if fortran else "C")
    elif isinstance(target, DType):
        order = state[1].decode() if isinstance(state[1], bytes) else state[1]
        require(isinstance(order, str) and order in ORDERS, "a dtype has no byte order")
        target.order = ORDERS[order]
    elif isinstance(target, Thing):
        target.state = state
    # Anything else, such as the `_metadata` of a state dict, is an attribute of a container or tensor. Nobody reads it.
