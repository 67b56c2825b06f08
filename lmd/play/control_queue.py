"""Controls asked for by people, handed to the stream at block boundaries.

Anything may be asked at any time from any thread. What cannot be played is refused at once, with a
message; texts are encoded on a thread of their own, and the old prompt plays on until the new one
is ready.
"""

import dataclasses
import itertools
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lmd.config import WindowConfig
from lmd.errors import LmdError
from lmd.stream.controls import Controls, Prompt

MAX_LIVE_STEPS = 64  # more would only be a way to stop the music
MAX_PROMPT_CHARACTERS = 500
MAX_PROMPT_PARTS = 8
MAX_REMEMBERED_TEXTS = 512  # half of what a text encoder remembers
NAMES = tuple(field.name for field in dataclasses.fields(Controls))


@dataclass(frozen=True)
class Change:
    """Something asked for."""

    number: int  # counts changes from 1
    names: tuple[str, ...]  # of the controls that it sets
    asked_s: float  # when, by the sink's clock


def texts_of(prompt: Prompt) -> tuple[str, ...]:
    """The texts that a prompt is made of."""
    return (prompt,) if isinstance(prompt, str) else tuple(text for text, _ in prompt)


def check_live(controls: Controls, window: WindowConfig) -> None:
    """Refuse (`LmdError`) what `Controls.validate` refuses, and what would stop a live stream."""
    controls.validate(window)
    if controls.n_steps > MAX_LIVE_STEPS:
        raise LmdError(
            f"n_steps = {controls.n_steps}", f"1 to {MAX_LIVE_STEPS}", "Lower it: it plays live."
        )
    texts = texts_of(controls.prompt)
    if len(texts) > MAX_PROMPT_PARTS or sum(map(len, texts)) > MAX_PROMPT_CHARACTERS:
        raise LmdError(
            f"a prompt of {len(texts)} parts and {sum(map(len, texts))} characters",
            f"at most {MAX_PROMPT_PARTS} parts and {MAX_PROMPT_CHARACTERS} characters",
            "Shorten it.",
        )


def with_changes(controls: Controls, changes: dict[str, Any]) -> Controls:
    """Controls with some values replaced; JSON's lists of a prompt's parts become tuples."""
    unknown = sorted(set(changes) - set(NAMES))
    if unknown:
        raise LmdError(f"unknown controls {unknown}", f"some of {', '.join(NAMES)}", "Check them.")
    if isinstance(prompt := changes.get("prompt"), list):
        parts = (tuple(part) if isinstance(part, list) else part for part in prompt)
        changes = changes | {"prompt": tuple(parts)}
    return replace(controls, **changes)


class ControlQueue:
    """Takes wishes from any thread; the engine takes controls from it before every block.

    Args:
        controls, window: what to begin with (`LmdError` if it cannot be played), and where.
        encode: encodes texts, and remembers them (`TextEncoder.encode`).
        refused: called, from the encoding thread, with why a text could not be encoded.
        ready: called, from there, when a text that was waited for can be played.
    """

    def __init__(
        self,
        controls: Controls,
        window: WindowConfig,
        encode: Callable[[Sequence[str]], object],
        refused: Callable[[str], None],
        ready: Callable[[], object] = lambda: None,
    ) -> None:
        check_live(controls, window)
        self.window, self._encode, self._refused, self._ready = window, encode, refused, ready
        self._asked = self._playing = controls
        self._waiting: list[Change] = []  # for a block to carry them
        self._encoded: dict[str, None] = {}  # texts that a block may use, oldest first
        self._lock, self._numbers = threading.Lock(), itertools.count(1)
        self._pending: queue.SimpleQueue[tuple[str, ...] | None] = queue.SimpleQueue()
        self._worker: threading.Thread | None = None

    def check(self, changes: dict[str, Any]) -> None:
        """Refuse (`LmdError`) what `ask` would refuse now."""
        check_live(with_changes(self._asked, changes), self.window)

    def encode_first(self, later: Sequence[dict[str, Any]] = ()) -> None:
        """Encode what will be played first, and later changes' texts, before the music starts."""
        prompts = [self._playing.prompt, self._asked.prompt]
        prompts += [changes["prompt"] for changes in later if "prompt" in changes]
        texts = tuple(dict.fromkeys(text for prompt in prompts for text in texts_of(prompt)))
        self._encode(texts)
        with self._lock:
            self._remember(texts)

    def asked(self) -> Controls:
        """Everything as last asked for, heard or not yet."""
        return self._asked

    def ask(self, now_s: float, **changes: Any) -> Change:
        """Ask at `now_s` for other fields of `Controls`, from the next block on.

        Raises:
            LmdError: an unknown name, a wrong type or value; everything stays as it was.
        """
        with self._lock:
            candidate = with_changes(self._asked, changes)
            check_live(candidate, self.window)
            change = Change(next(self._numbers), tuple(changes), now_s)
            self._asked = candidate
            self._waiting.append(change)
            if not self._is_encoded(candidate.prompt):
                self._pending.put(texts_of(candidate.prompt))
                if self._worker is None:
                    self._worker = threading.Thread(target=self._work, name="lmd-text", daemon=True)
                    self._worker.start()
        return change

    def waiting(self) -> set[str]:
        """The controls that the next block would be the first to carry."""
        with self._lock:
            return {name for change in self._playable()[1] for name in change.names}

    def take(self) -> tuple[Controls, list[Change]]:
        """Controls for the next block, and the changes that it is the first to carry."""
        with self._lock:
            taken, carried = self._playable()
            self._waiting = [change for change in self._waiting if change not in carried]
            self._playing = replace(taken, drop_context_frames=0)
            if taken.drop_context_frames:  # handed out once
                self._asked = replace(self._asked, drop_context_frames=0)
            return taken, carried

    def give_back(self, taken: Controls, carried: list[Change]) -> None:
        """What `take` handed out was not heard: the next block is to carry it."""
        with self._lock:
            self._waiting = carried + self._waiting
            if not self._asked.drop_context_frames:
                self._asked = replace(self._asked, drop_context_frames=taken.drop_context_frames)

    def close(self) -> None:
        """Let the encoding thread end."""
        self._pending.put(None)

    def _playable(self) -> tuple[Controls, list[Change]]:
        """What was asked, as far as its text is encoded, and the changes in it."""
        if self._is_encoded(self._asked.prompt):
            return self._asked, self._waiting
        return self._but_the_prompt()

    def _but_the_prompt(self) -> tuple[Controls, list[Change]]:
        """What was asked with the prompt that plays, and the changes in it."""
        controls = replace(self._asked, prompt=self._playing.prompt)
        try:
            check_live(controls, self.window)
        except LmdError:  # e.g. guidance asked together with the first prompt
            return self._playing, []
        return controls, [change for change in self._waiting if "prompt" not in change.names]

    def _is_encoded(self, prompt: Prompt) -> bool:
        return all(text in self._encoded for text in texts_of(prompt))

    def _remember(self, texts: Sequence[str]) -> None:
        for text in texts:
            self._encoded.pop(text, None)
            self._encoded[text] = None
        while len(self._encoded) > MAX_REMEMBERED_TEXTS:
            del self._encoded[next(iter(self._encoded))]

    def _work(self) -> None:
        while (texts := self._pending.get()) is not None:
            if texts != texts_of(self._asked.prompt):
                continue  # asked and taken back while another text was being encoded
            try:
                self._encode(texts)
            except Exception as error:  # whatever it is, later prompts must still be encoded
                if self._give_up(texts):
                    kind = "" if isinstance(error, LmdError) else f"{type(error).__name__}: "
                    self._refused(f"{kind}{error}")
            else:
                with self._lock:
                    self._remember(texts)
                self._ready()

    def _give_up(self, texts: tuple[str, ...]) -> bool:
        """Go back to the prompt that is playing; False if others have been asked for meanwhile."""
        with self._lock:
            if texts_of(self._asked.prompt) != texts:
                return False
            self._asked, _ = self._but_the_prompt()
            self._waiting = [c for c in self._waiting if "prompt" not in c.names]
            return True
