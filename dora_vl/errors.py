"""Errors that a user can act on, how messages quote values, and how an entry point starts and exits.

Imports nothing else of this package. Also recognises the errors of Pillow, torch and the disk that belong to these.
"""

from __future__ import annotations

import argparse
import errno
import functools
import logging
import os
import re
import reprlib
import select
import signal
import struct
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, ParamSpec, TypeVar, cast

LEFT_OUT: Mapping[str, tuple[str, ...]] = {
    # It looks for a kernel of the hub's at import; its own way on a CPU does the same.
    "bitsandbytes.backends.cpu.ops": ("Failed to load CPU gemm_4bit_forward",),
    # The tables before the first step say which device it is.
    "DeepSpeed": ("Setting accelerator to CPU", "Unable to find hostfile"),
}
"""Maps a logger to the beginnings of those of its lines that are left out, since the user need not act on them."""


@functools.cache
def leave_out_foreign_lines() -> None:
    """Filters the lines of `LEFT_OUT` in this process."""
    for name, beginnings in LEFT_OUT.items():
        logging.getLogger(name).addFilter(
            lambda record, beginnings=beginnings: not str(record.msg).startswith(beginnings)
        )


SPINS = {"GOMP_SPINCOUNT": "10000", "KMP_BLOCKTIME": "1"}


def wait_without_spinning() -> None:
    """Limits how long threads of GNU's or Intel's OpenMP spin while others need the cores; call it before torch loads.

    What the user has set is kept.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.update({**SPINS, **os.environ})


Inputs = ParamSpec("Inputs")
Returned = TypeVar("Returned")

LONGEST_MESSAGE = 490
"""A message has at most this many characters, so that it stays below 500 with "error: " in front."""
LONGEST_QUOTED = 60

_UNPRINTABLE = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Matches controls, also those that turn the direction of writing, and half surrogate pairs, which no terminal's or
file's encoding takes."""

DECODING_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    ZeroDivisionError,
    AttributeError,
    struct.error,
)
"""Pillow's decoders raise these, and `DecompressionBombError`, on bytes that are not a picture, or only part of one."""


@functools.cache
def log_once(log: logging.Logger, level: int, message: str) -> None:
    """Logs a message, unless it is empty, once, however often what it tells of is read."""
    if message:
        log.log(level, "%s", message)


def one_line(message: str, max_length: int = LONGEST_MESSAGE) -> str:
    """Returns the message without line breaks and control characters; cuts the middle of one that is too long.

    The beginning names the file and the end the next step, so both stay.
    """
    parts = (part.strip() for part in message.splitlines())
    line = _UNPRINTABLE.sub("?", " ".join(part for part in parts if part).replace("\t", " "))
    if len(line) <= max_length:
        return line
    cut = " [...] "
    end = (max_length - len(cut)) // 3
    return line[: max_length - len(cut) - end] + cut + line[-end:]


def short_repr(value: object, max_length: int = LONGEST_QUOTED) -> str:
    """Returns a value of a file as a message quotes it: as Python writes it, cut to `max_length` characters."""
    writer = reprlib.Repr()
    writer.maxlist = writer.maxdict = writer.maxstring = writer.maxother = max_length
    try:
        text = repr(value[: max_length + 1]) if isinstance(value, str | bytes) else writer.repr(value)
    except ValueError:  # a whole number of more digits than Python writes
        return f"a {type(value).__name__} too large to be shown"
    return text if len(text) <= max_length else text[: max_length - 3] + "..."


def short_text(text: str, max_length: int = LONGEST_QUOTED) -> str:
    """Returns text without quotes, cut to `max_length` characters; unprintable ones are escaped."""
    visible = "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text[: max_length + 1]
    )
    return visible if len(visible) <= max_length else visible[: max_length - 3] + "..."


def short_names(names: Iterable[object], max_names: int = 8, max_length: int = 24) -> str:
    """Lists the first few names, such as those of a row's columns, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - max_names} more" if len(names) > max_names else ""
    return (", ".join(short_text(str(name), max_length) for name in names[:max_names]) or "nothing") + more


NO_SAMPLE, EMPTY_ANSWER, NO_ANSWER, ON_THE_WEB = "not a sample", "empty answer", "no answer", "media on the web"
"""These are kinds of bad samples; all other kinds name what they are about."""


def align_columns(rows: Sequence[Sequence[str]], *, left: int) -> list[str]:
    """Returns a table's lines, the cells of the first `left` columns aligned on the left, all others on the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    pads = [str.ljust if column < left else str.rjust for column in range(len(widths))]
    padded = ([pad(cell, width) for pad, cell, width in zip(pads, row, widths, strict=True)] for row in rows)
    return ["  ".join(cells).rstrip() for cells in padded]


class UserError(Exception):
    """Something in the input is wrong; the message names the file, key or id, the numbers and the next step.

    As text it is one line of at most `LONGEST_MESSAGE` characters; `status` is what the process ends with.
    """

    status = 2

    def __str__(self) -> str:
        return one_line(super().__str__())


class Diverged(UserError):
    """Training cannot go on with these settings: the loss, the gradients or the weights are no longer finite."""

    status = 3


class SettingError(UserError):
    """A setting, or an option of a command, that cannot be used.

    The message begins with its `key`, such as `data.train`; where that is none, `nearest` were probably meant.
    """

    def __init__(self, key: str, problem: str = "", nearest: Sequence[str] = ()) -> None:
        super().__init__(key + problem)
        self.key, self.nearest = key, tuple(nearest)


class MissingExtra(UserError):
    """A package that only some runs need is not installed.

    pip takes the `extra` from the metadata of the dora-vl that is installed; no index need have it.
    """

    def __init__(self, problem: str, extra: str) -> None:
        super().__init__(f"{problem}: pip install 'dora-vl[{extra}]'")
        self.extra = extra


@contextmanager
def needs_extra(extra: str, purpose: str) -> Iterator[None]:
    """Raises a `MissingExtra` for an import in the block that fails for want of a package."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingExtra(f"{purpose} needs {error.name}", extra) from error


class LostRank(UserError):
    """Another rank ended or never joined; its own message names the cause."""

    status = 1


class BadSample(UserError):
    """A sample cannot be used, for a `reason`; it is counted and skipped, up to `data.max_bad_share`.

    For tables, `kind` is the same text for all samples with that trouble.
    """

    def __init__(self, sample_id: str, reason: str, kind: str = NO_SAMPLE) -> None:
        super().__init__(f"sample {one_line(sample_id, LONGEST_QUOTED)}: {reason}")
        self.sample_id = sample_id
        self.reason = one_line(reason)
        self.kind = kind

    def __reduce__(self) -> tuple[type[BadSample], tuple[str, str, str]]:
        # Exceptions unpickle from their message only; data workers send this one across processes.
        return type(self), (self.sample_id, self.reason, self.kind)


UNWRITABLE = {
    errno.ENOSPC: ("the disk is full", "make room"),
    errno.EDQUOT: ("your quota of the disk is used up", "make room"),
    errno.EROFS: ("the file system can only be read", "mount it for writing"),
    errno.EFBIG: ("a file would be larger than is allowed", "raise the limit (ulimit -f)"),
}
"""Maps the system's error number to why a disk takes nothing more, and what to do."""
_OF_THE_SYSTEM = {
    errno.ENAMETOOLONG: "the file name is too long",
    errno.EACCES: "you have no permission; change it, or name another path",
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST), "a file is where a folder is needed; name another path"),
    **{number: f"{cause}; {remedy} and start again" for number, (cause, remedy) in UNWRITABLE.items()},
}


@contextmanager
def ended_by_signals(*numbers: signal.Signals) -> Iterator[None]:
    """Ends the block with one line and status 130 on Ctrl-C, 143 on SIGTERM, once what it opened is closed.

    Libraries make errors of their own of an interruption, or lose it: any end after a signal counts as its work, and
    one that is lost in a place where Python ignores errors (`__del__`, a weakref's callback) is sent again. Forked
    children end at once.
    """
    received: list[int] = []
    process, ended = os.getpid(), threading.Event()

    def note(number: int, _: object) -> None:
        if os.getpid() != process:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        received.append(number)
        if len(received) == 1:
            threading.Thread(target=_send_again, args=(number, ended), daemon=True).start()
        raise KeyboardInterrupt

    heard = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    in_main = threading.current_thread() is threading.main_thread()  # no other thread may set handlers
    before = {number: signal.signal(number, note) for number in heard} if in_main else {}
    try:
        try:
            yield
        except BaseException as error:
            if not received and not isinstance(error, KeyboardInterrupt):
                raise
            received.append(signal.SIGINT)
        if received:
            _exit_by(signal.Signals(received[0]))
    finally:
        ended.set()
        for number, handler in before.items():
            signal.signal(number, handler)


def _send_again(number: int, ended: threading.Event) -> None:
    """Sends a signal again as long as the main thread goes on as if none had come."""
    main_thread = cast(int, threading.main_thread().ident)
    while not ended.wait(1):
        if sys._current_exceptions().get(main_thread) in (None, (None, None, None)):  # no error is on its way out
            os.kill(os.getpid(), number)


def _exit_by(number: signal.Signals) -> NoReturn:
    if os.environ.get("RANK", "0") == "0":
        sys.stderr.write(f"stopped by {'Ctrl-C' if number == signal.SIGINT else number.name}\n")
    sys.exit(128 + number)  # as shells count it


def exit_on_user_error(main: Callable[Inputs, Returned]) -> Callable[Inputs, Returned]:
    """Wraps an entry point: a `UserError` becomes one line on stderr and its exit status, never a traceback.

    So does a path of more characters than a file's name may have, one that leads through a file or lacks permission,
    and a disk that takes no more, wherever it is met; so do Ctrl-C and SIGTERM at any moment. A reader of the output
    that leaves early (`| head`) ends the program quietly, as it ends others.
    """

    @functools.wraps(main)
    def run(*arguments: Inputs.args, **options: Inputs.kwargs) -> Returned:
        leave_out_foreign_lines()
        wait_without_spinning()
        in_launch = "LOCAL_RANK" in os.environ  # SIGTERM ends a rank at once, which may hang in a collective
        signals = [signal.SIGINT] if in_launch else [signal.SIGINT, signal.SIGTERM]
        try:
            try:
                return ended_by_signals(*signals)(main)(*arguments, **options)
            finally:
                sys.stdout.flush()  # at the exit nobody could catch what this raises
        except BrokenPipeError:
            poller = select.poll()
            poller.register(sys.stdout.fileno(), select.POLLOUT)
            if not any(event & select.POLLERR for _, event in poller.poll(0)):
                raise  # some other pipe is broken
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is buffered goes there at the exit
            sys.exit(128 + signal.SIGPIPE)  # as shells count it
        except UserError as error:
            message, status = str(error), error.status
        except OSError as error:
            if error.errno not in _OF_THE_SYSTEM:
                raise
            message = one_line(f"{error.filename or 'a file'}: {_OF_THE_SYSTEM[error.errno]}")
            status = UserError.status
        sys.stderr.write(f"error: {message}\n")
        sys.exit(status)

    return run


# RuntimeErrors of torch that the failed operation did not cause. torch is imported inside the functions that need it;
# at module level it would add a second to every command.

_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")
"""The CPU allocator, cuBLAS, cuDNN and CUDA raise plain RuntimeErrors that hold one of these."""
_COMMUNICATION = ("gloo", "NCCL", "ProcessGroup", "Connection closed by peer", "Connection reset by peer")
"""gloo and in part NCCL raise plain RuntimeErrors with one of these words when another rank is gone."""


def is_out_of_memory(error: BaseException) -> bool:
    """Tells errors of too little memory (torch's, Python's, numpy's) from others."""
    from torch import OutOfMemoryError

    if isinstance(error, MemoryError | OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _MEMORY)


def is_communication(error: BaseException) -> bool:
    """Tells errors that another, lost rank caused from others."""
    from torch.distributed import DistError

    if isinstance(error, DistError):  # a backend's, a store's or a connection's
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _COMMUNICATION)


def parse_digits(text: str) -> int | None:
    """Reads ASCII digits without a sign, as many as fit 64 bits; None for other text ("²" is a digit for Python)."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= 18 else None


def number_between(kind: type[Any], low: int | float, high: int | float = sys.maxsize) -> Callable[[str], Any]:
    """Makes a type for argparse: a number in these limits."""

    def number(text: str) -> Any:
        value = kind(text)
        if not low <= value <= high:
            limit = f" and at most {high:g}" if high < sys.maxsize else ""
            raise argparse.ArgumentTypeError(f"{text} must be at least {low:g}{limit}")
        return value

    number.__name__ = kind.__name__
    return number


positive_int = number_between(int, 1)
_WRONG_KIND = re.compile(
    r"^\W*(?:Parser key )?\W*([\w.]+)\W*: Expected an? <class '(?:[\w.]+\.)?(\w+)'>\. Got value: (.*)$"
)
_KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "NoneType": "null"}
_KINDS |= {"Mapping": "a mapping of names to values"}
_ONE_OF = re.compile(
    r"^\W*(?:Parser key )?\W*([\w.]+)\W*: (Does not validate|Expected a typing\.Literal).*value: (.*)$"
)


def wrong_value(message: str) -> UserError:
    """Rewrites a parser's complaint about a value without Python's names of types."""
    line = " ".join(message.split())
    if (match := _WRONG_KIND.match(line)) and match[2] in _KINDS:
        return SettingError(match[1], f" is {short_text(match[3])}; it must be {_KINDS[match[2]]}")
    if match := _ONE_OF.match(line):
        literals = [word.strip("'") for group in re.findall(r"Literal\[([^\]]*)\]", line) for word in group.split(", ")]
        kinds = [
            _KINDS[word] for word in re.findall(r"<class '(\w+)'>", line.partition("Errors:")[0]) if word in _KINDS
        ]
        if choices := list(dict.fromkeys([*literals, *kinds])):
            return SettingError(match[1], f" is {short_text(match[3])}; it must be one of {', '.join(choices)}")
    return UserError(line.replace('Parser key "', '"', 1))
