"""How often thinking harder helps: hand signs of the test people that the student misreads, a *no*, and what it says then."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from device.bundle import Bundle
from device.config import ModelConfig
from device.engine import OnnxRuntimeEngine
from device.reach.endpoint import Endpoint
from device.reach.reach import Reach
from export.distill.behaviours import DIGITS
from export.distill.clips import Split
from export.distill.corpus import Corpus, load_corpus
from export.distill.pictures import Showing
from export.distill.scenes import Scene, make_scene
from export.distill.script import Script
from export.distill.sounds import Placed, augment_word, room_sound, word_clip
from export.scoreboard.play import Reaction, Run, play
from export.serve_teacher import Reader, Teacher, TeacherServer, decide
from export.spoken_words import render_words

LENGTH_S = 10.4
SHOWN_S, HELD_S = 0.8, (1.0, 3.5)  # when the hand is held up, and for how long, as in the scoreboard's scenes
LOOK_S = 3.2  # who has not said a digit by then has not answered
NO_AFTER_S = 1.2  # from the edge that chose the wrong word to the person's *no*: the word is over, and a moment to notice
SAID_WITHIN_S = 6.0  # from the *no*: a second to answer, and time for a good moment


@dataclass(frozen=True)
class Doubt:
    """One picture that the student misread, and what became of it."""

    digit: str
    misread: str
    again: str  # what the teacher reads in the same picture
    struck: str  # the same, when it knows what was denied
    shook: bool
    asked: bool
    told: str  # by the background model, in the closed loop
    then: tuple[str, ...]  # words that it began after the *no*
    alone: tuple[str, ...]  # the same without a background model


@dataclass
class Tally:
    """All pictures."""

    pictures: int = 0
    right: int = 0
    silent: int = 0
    spoilt: int = 0  # read right by the student, and wrong by the teacher
    doubts: list[Doubt] | None = None

    def table(self) -> str:
        """Markdown."""
        doubts = self.doubts or []
        n = len(doubts)

        def row(what: str, count: int, of: int) -> str:
            return f"| {what} | {count} | {100 * count / of:.1f} % |" if of else f"| {what} | {count} | – |"

        def count(holds: Callable[[Doubt], bool]) -> int:
            return sum(map(holds, doubts))

        teachable, told = count(lambda d: d.struck == d.digit), count(lambda d: d.told == d.digit)
        rows = [
            "| | pictures | share |",
            "|---|---:|---:|",
            row("**shown**", self.pictures, self.pictures),
            row("said right in one look", self.right, self.pictures),
            row("nothing said", self.silent, self.pictures),
            row("**misread**: another digit said", n, self.pictures),
            row("read right by the teacher, who looks again", count(lambda d: d.again == d.digit), n),
            row("read right by the teacher, who also knows what was denied", teachable, n),
            row("after *no*: shakes its head", count(lambda d: d.shook), n),
            row("asks", count(lambda d: d.asked), n),
            row("is told the right digit", told, n),
            row("**says the right digit**", count(lambda d: d.digit in d.then), n),
            row("– of those that the teacher reads right", count(lambda d: d.struck == d.digit in d.then), teachable),
            row("– of those that it is told", count(lambda d: d.told == d.digit in d.then), told),
            row("says another digit than that", count(lambda d: d.digit not in d.then and any(w in DIGITS for w in d.then)), n),
            row("says the right digit without a background model", count(lambda d: d.digit in d.alone), n),
            row("said right in one look, and misread by the teacher", self.spoilt, self.right),
        ]
        return "\n".join(rows)


class Demonstration:
    """Shows pictures to a student in closed loop, on a simulated clock, with the teacher behind its server."""

    def __init__(self, bundle: Path, reader: Reader, data: Path, split: Split) -> None:
        opened = Bundle.open(bundle, unproven=True)
        self._c: ModelConfig = opened.config
        self._engine = OnnxRuntimeEngine(opened.graph, self._c)
        self._corpus: Corpus = load_corpus(data, split)
        self._words = render_words(self._c.text.words)
        self._reader = reader
        size = (self._c.video.height, self._c.video.width)
        self._server = TeacherServer(Teacher(reader, size), "teacher", port=0)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def photographs(self) -> list[tuple[int, int]]:
        """(digit, number among the digit's) of all there are, in an order that mixes the digits."""
        counts = {digit: len(photos) for digit, photos in self._corpus.hands.items()}
        return sorted(((digit, i) for digit, count in counts.items() for i in range(count)), key=lambda photo: photo[::-1])

    def show(self, digit: int, number: int, room: int, tally: Tally) -> Doubt | None:
        """One photograph, taken down in `tally`; what became of it if it was misread."""
        scene = self._scene(digit, number, room)
        first = self._first_digit(play(self._until(scene, LOOK_S), self._c, self._engine, room))
        tally.pictures += 1
        if first is None:
            tally.silent += 1
            return None
        edge_s = first.at_s - first.choice
        picture = scene.frames[round(edge_s * 1000) // self._c.tick_ms - 1, -1]
        look = self._reader.probabilities(picture)[None]
        again = decide(look.copy(), None)
        if first.value == DIGITS[digit]:
            tally.right += 1
            tally.spoilt += again != f"tell {first.value}"
            return None
        no_s = edge_s + NO_AFTER_S
        doubted = self._with_no(scene, [room, digit, number, 1 << 20], no_s)
        with closing(Reach(self._c, Endpoint(self._server.url, "teacher"), patient=True)) as reach:
            run = play(doubted, self._c, self._engine, room, thinker=reach)
        alone = play(doubted, self._c, self._engine, room)
        acts = [reaction.value for reaction in run.reactions if reaction.kind == "act" and reaction.at_s > no_s]
        told = [thought["word"] for thought in run.thoughts if thought["what"] == "told"]
        struck = decide(look.copy(), first.value)
        doubt = Doubt(
            digit=DIGITS[digit],
            misread=first.value,
            again=again.removeprefix("tell "),
            struck=struck.removeprefix("tell "),
            shook="shake" in acts,
            asked="ask" in acts,
            told=told[0] if told else "",
            then=_said(run, no_s),
            alone=_said(alone, no_s),
        )
        tally.doubts = [*(tally.doubts or []), doubt]
        return doubt

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _scene(self, digit: int, number: int, room: int) -> Scene:
        """A room in which somebody holds up this photograph, where there is a camera and it does not freeze; `room` tells rooms apart."""
        photo = self._corpus.hands[digit][number]
        corpus = replace(self._corpus, hands={**self._corpus.hands, digit: [photo]})
        showings: list[Showing] = []

        def stage(script: Script) -> None:
            script.show(digit, SHOWN_S, script.rng.uniform(*HELD_S))
            showings[:] = script.showings

        ticks = round(LENGTH_S * 1000) // self._c.tick_ms
        for attempt in range(1000):
            rng = np.random.default_rng([room, digit, number, attempt])
            scene = make_scene(corpus, self._words, rng, self._c, ticks, flawless=True, stage=stage)
            if showings and showings[0].thing.person == photo[1]:  # neither left out nor a drawn hand in its place
                return scene
        raise AssertionError("nine scenes in ten show the photograph")

    def _until(self, scene: Scene, seconds: float) -> Scene:
        samples = self._c.context_samples + round(seconds * self._c.audio.sample_rate_hz)
        return replace(scene, room=scene.room[:samples])

    def _with_no(self, scene: Scene, seed: list[int], at_s: float) -> Scene:
        """The same room with a *no* of one of the test people, begun at `at_s`."""
        rng = np.random.default_rng(seed)
        sound = augment_word(word_clip(self._corpus, rng, "no"), rng, None, float(rng.uniform(-32, -20)))
        at = self._c.context_samples + round(at_s * self._c.audio.sample_rate_hz)
        return replace(scene, room=np.clip(room_sound([Placed(sound, at)], np.zeros_like(scene.room), scene.room), -1, 1))

    def _first_digit(self, run: Run) -> Reaction | None:
        return next((reaction for reaction in run.reactions if reaction.kind == "say" and reaction.value in DIGITS), None)


def _said(run: Run, no_s: float) -> tuple[str, ...]:
    words = (reaction for reaction in run.reactions if reaction.kind == "say" and no_s < reaction.at_s <= no_s + SAID_WITHIN_S)
    return tuple(reaction.value for reaction in words)


def rethink(
    bundle: Path, reader: Reader, data: Path, split: Split, pictures: int | None, rooms: int, progress: Callable[[str], None]
) -> str:
    """Show so many photographs of `split` (default: all), each in so many rooms, and return the table."""
    tally = Tally()
    with closing(Demonstration(bundle, reader, data, split)) as demonstration:
        for room in range(rooms):
            for digit, number in demonstration.photographs()[:pictures]:
                doubt = demonstration.show(digit, number, room, tally)
                if doubt is not None:
                    progress(f"{tally.pictures}: {doubt}")
    return tally.table()
