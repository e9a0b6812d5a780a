"""The oracle, behaviour by behaviour: what a perfect companion says and does, tick by tick, and how its stage is set."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
from ticks import SMALL

from device.config import ModelConfig
from export.distill.behaviours import ACT_OF_WORD, ACTS, BEHAVIOURS, DIGITS, WORDS, Check, Conduct, Trial
from export.distill.corpus import Corpus
from export.distill.scenes import only
from export.distill.script import Moment, Script, Sign, Spoken
from export.distill.sounds import Sound

CONFIG = ModelConfig.from_dict(SMALL.to_dict() | {"text": {"words": WORDS, "acts": ACTS}})
TICK_S = 0.2
SILENCE = Sound(np.zeros(1, np.float32), 0, 1, 11, "")
WORD_TICKS = {word: 3 for word in WORDS if word}

Deed = tuple[int, str]  # tick, word or act


@dataclass
class Stage:
    """What happens in a scene, by tick; `play` has a companion react to it."""

    ticks: int = 70
    memory: int = 320
    heard: dict[int, list[str]] = field(default_factory=dict)
    hands: dict[int, tuple[int, int]] = field(default_factory=dict)  # first tick to (digit, how many ticks)
    text: dict[int, tuple[str, ...]] = field(default_factory=dict)
    talk: tuple[int, int] = (0, 0)  # ticks in which a person talks on
    forced: dict[int, tuple[str, str]] = field(default_factory=dict)  # what this companion does instead of what is wanted

    def play(self) -> tuple[list[Deed], Conduct]:
        """What was begun when, and the conduct with its trials."""
        conduct, deeds, over_s = Conduct(WORD_TICKS, TICK_S, self.memory), [], -np.inf
        for tick in range(self.ticks):
            moment, over_s = self._moment(tick, over_s)
            word, act = conduct.wanted(moment)
            word, act = self.forced.get(tick, (word, act))
            conduct.performed(moment, word, act)
            deeds += [(tick, deed) for deed in (word, act) if deed not in ("", "none")]
        conduct.finish(self.ticks * TICK_S)
        return deeds, conduct

    def _moment(self, tick: int, over_s: float) -> tuple[Moment, float]:
        edge_s = (tick + 1) * TICK_S
        heard = tuple(Spoken(word, 11, "somebody", edge_s - 0.55, edge_s - 0.15, SILENCE) for word in self.heard.get(tick, []))
        showing = next(((first, d) for first, (d, n) in self.hands.items() if first <= tick < first + n), None)
        hand = None if showing is None else Sign(showing[1], "a hand", (showing[0] + 1) * TICK_S - 0.1)
        talking = self.talk[0] <= tick < self.talk[1]
        over_s = edge_s if talking else max([over_s, *(word.end_s for word in heard)])
        talk_s = (tick - self.talk[0]) * TICK_S if talking else 0.0
        return Moment(tick, edge_s, heard, hand, tick in self.hands, self.text.get(tick, ()), talk_s, max(edge_s - over_s, 0.0)), over_s


def deeds(**happens: object) -> list[Deed]:
    return Stage(**happens).play()[0]  # type: ignore[arg-type]


def trials(name: str, **happens: object) -> list[Trial]:
    return [trial for trial in Stage(**happens).play()[1].trials if trial.behaviour == name]  # type: ignore[arg-type]


@pytest.mark.parametrize("word", list(ACT_OF_WORD))
def test_act(word: str) -> None:
    assert deeds(heard={10: [word]}) == [(10, "ok"), (10, ACT_OF_WORD[word])]
    (trial,) = trials("act", heard={10: [word]})
    assert trial.at_s == pytest.approx(2.05)  # the word's end
    assert trial.checks == [Check("act", ACT_OF_WORD[word], pytest.approx(1.65), pytest.approx(2.65))]
    (spoken,) = trials("ok", heard={10: [word]})
    assert spoken.checks[0].until_s == pytest.approx(3.05)


def test_act_while_it_speaks_is_the_act_alone() -> None:
    assert deeds(hands={9: (4, 5)}, heard={10: ["up"]}) == [(9, "four"), (10, "look_up")]
    assert deeds(text={2: ("quiet",)}, heard={10: ["up"]}) == [(10, "look_up")]


def test_show_once_per_showing() -> None:
    assert deeds(hands={5: (3, 20), 30: (3, 8)}) == [(5, "three"), (30, "three")]
    (first, _) = trials("show", hands={5: (3, 20), 30: (3, 8)})
    assert first.checks == [Check("say", "three", pytest.approx(1.1), pytest.approx(2.1))]


def test_a_companion_that_missed_it_is_asked_until_it_is_too_late() -> None:
    late = dict.fromkeys(range(5, 8), ("", "none"))
    assert deeds(hands={5: (3, 20)}, forced=late) == [(8, "three")]
    assert deeds(hands={5: (3, 20)}, forced=late | dict.fromkeys(range(8, 12), ("", "none"))) == []


def test_recite_one_a_second() -> None:
    said = deeds(heard={5: ["go"]})
    assert said == [(5 + 5 * i, DIGITS[i + 1]) for i in range(9)]
    (trial,) = trials("recite", heard={5: ["go"]})
    assert [check.value for check in trial.checks] == list(DIGITS[1:])
    assert trial.checks[0].until_s - trial.at_s == pytest.approx(1.0)
    assert [(check.since_s, check.until_s, check.after) for check in trial.checks[1:3]] == [(0.7, 1.3, 0), (1.7, 2.3, 0)]


def test_a_recitation_keeps_its_second_when_a_word_comes_late_or_never() -> None:
    late = deeds(heard={5: ["go"]}, forced={10: ("", "none")})
    assert late[:3] == [(5, "one"), (11, "two"), (15, "three")]
    never = deeds(heard={5: ["go"]}, forced=dict.fromkeys(range(10, 14), ("", "none")))
    assert never[:3] == [(5, "one"), (15, "three"), (20, "four")]


def test_yield() -> None:
    assert deeds(heard={5: ["go"], 21: ["stop"]}) == [(5, "one"), (10, "two"), (15, "three"), (20, "four"), (21, "yield")]
    (trial,) = trials("yield", heard={5: ["go"], 21: ["stop"]})
    assert [check.kind for check in trial.checks] == ["act", "silence"]
    assert trial.checks[1].since_s - trial.at_s == pytest.approx(0.6)
    assert deeds(heard={5: ["go"], 19: ["stop"]})[-1] == (19, "yield")  # between two of its words
    assert deeds(heard={21: ["stop"]}) == []  # nothing to stop


def test_hold() -> None:
    assert deeds(heard={5: ["go"], 12: ["bed"], 23: ["happy"]}) == deeds(heard={5: ["go"]})
    held = trials("hold", heard={5: ["go"], 12: ["bed"]})
    assert [trial.checks[0].value for trial in held] == ["three"]
    assert trials("hold", heard={5: ["go"], 12: ["bed"], 14: ["stop"]}) == []  # stopped before the next number


def test_hush_is_mid_word() -> None:
    _, conduct = Stage(ticks=12, heard={5: ["go"]}, text={11: ("quiet",)}).play()
    assert not conduct.speaking(11)  # "two" was begun in tick 10 and would have sounded until 12
    _, conduct = Stage(ticks=12, heard={5: ["go"], 11: ["stop"]}).play()
    assert not conduct.speaking(11)


def test_timer() -> None:
    said = deeds(hands={5: (3, 12)}, heard={12: ["go"]})
    assert [what for _, what in said] == ["three", "now"]
    (trial,) = trials("timer", hands={5: (3, 12)}, heard={12: ["go"]})
    now = next(check for check in trial.checks if check.value == "now")
    end_s = 13 * TICK_S - 0.15
    assert (now.since_s, now.until_s) == (pytest.approx(end_s + 3 - 0.4), pytest.approx(end_s + 3 + 0.4))
    assert now.since_s < (said[1][0] + 1) * TICK_S < now.until_s
    assert [what for _, what in deeds(hands={5: (3, 12)}, heard={12: ["go"], 20: ["stop"]})] == ["three", "yield"]
    (cancelled,) = trials("cancel", hands={5: (3, 12)}, heard={12: ["go"], 20: ["stop"]})
    assert cancelled.checks[0].value == "now" and trials("timer", hands={5: (3, 12)}, heard={12: ["go"], 20: ["stop"]}) == []


def test_a_stopped_timer_forbids_no_other_to_end() -> None:
    scene: dict[str, object] = {"hands": {5: (9, 12), 22: (1, 27)}, "heard": {12: ["go"], 18: ["stop"], 27: ["go"]}}
    (cancelled,), (timer,) = trials("cancel", **scene), trials("timer", **scene)
    assert [what for _, what in deeds(**scene)] == ["nine", "yield", "one", "now"]
    (silence,), now = cancelled.checks, next(check for check in timer.checks if check.value == "now")
    assert silence.since_s < silence.until_s == now.since_s


def test_answer() -> None:
    assert deeds(heard={5: ["yes"], 15: ["no"]}) == [(5, "nod"), (15, "shake")]
    assert [t.checks[0].until_s - t.at_s for t in trials("answer", heard={5: ["yes"]})] == [pytest.approx(0.6)]


def test_no_to_a_digit_asks_for_more_thought() -> None:
    assert deeds(hands={5: (3, 8)}, heard={15: ["no"]}) == [(5, "three"), (15, "shake"), (16, "ask")]
    assert deeds(hands={5: (3, 8)}, heard={40: ["no"]}) == [(5, "three"), (40, "shake")]  # too long ago


def test_listen() -> None:
    nods = [tick for tick, what in deeds(talk=(5, 60)) if what == "nod"]
    assert nods[0] == 20  # after 3 s
    assert all(2.0 <= gap * TICK_S <= 4.0 for gap in np.diff(nods)) and len(nods) == 3
    assert deeds(talk=(5, 19)) == []


def test_count() -> None:
    hands = {10: (5, 4), 14: (0, 4), 18: (5, 4), 22: (0, 4), 30: (2, 6)}
    assert deeds(text={5: ("count",), 28: ("show",)}, hands=hands) == [(14, "one"), (22, "two"), (30, "two")]
    found = trials("count", text={5: ("count",), 28: ("show",)}, hands=hands)
    assert [trial.checks[0].value for trial in found] == ["one", "two"]
    assert found[0].checks[0].until_s - found[0].checks[0].since_s == pytest.approx(0.8)
    assert [what for _, what in deeds(hands=hands)] == ["five", "zero", "five", "zero", "two"]  # nobody asked to count


def test_weave() -> None:
    assert deeds(text={10: ("tell", "three")}, talk=(5, 18)) == [(20, "three")]
    (trial,) = trials("weave", text={10: ("tell", "three")}, talk=(5, 18))
    assert trial.checks[0].until_s - trial.at_s == pytest.approx(1.0)
    assert deeds(text={10: ("tell", "three")}) == [(10, "three")]  # nobody is talking


def test_quiet_and_talk() -> None:
    said = deeds(heard={5: ["go"], 18: ["left"]}, text={11: ("quiet",), 40: ("talk",)}, hands={25: (2, 5), 45: (7, 5)})
    assert said == [(5, "one"), (10, "two"), (18, "look_left"), (45, "seven")]
    (trial,) = trials("quiet", text={11: ("quiet",), 40: ("talk",)})
    assert [check.kind for check in trial.checks] == ["silence"]


def test_recall() -> None:
    said = deeds(hands={5: (3, 8), 20: (8, 5)}, text={60: ("last",)})
    assert said[-1] == (60, "eight")
    (trial,) = trials("recall", hands={5: (3, 8)}, text={60: ("last",)})
    assert trial.detail == pytest.approx(11.1)
    assert deeds(text={30: ("last",)}) == []  # nothing was shown
    # It repeats what it said, and is judged by what was shown.
    mistaken = Stage(hands={5: (3, 8)}, text={60: ("last",)}, forced={5: ("two", "none")})
    assert mistaken.play()[0][-1] == (60, "two")
    assert mistaken.play()[1].trials[-1].checks[0].value == "three"
    # What was longer ago than its memory reaches is not asked for, and nobody is told that silence is right.
    assert deeds(hands={5: (3, 8)}, text={60: ("last",)}, memory=56)[-1] == (60, "three")
    done, conduct = Stage(hands={5: (3, 8)}, text={60: ("last",)}, memory=55).play()
    assert [word for _, word in done] == ["three"] and not [trial for trial in conduct.trials if trial.behaviour == "recall"]
    assert conduct.masks == [("say", 60, 65)]


def test_nothing() -> None:
    assert deeds(heard={5: ["bed"], 20: ["happy"]}, text={30: ("five",)}) == []


@pytest.mark.parametrize("behaviour", BEHAVIOURS, ids=lambda behaviour: behaviour.name)
def test_every_stage_stays_in_the_scene(behaviour: object, corpus: Corpus) -> None:
    stage: Callable[[Script, float], float] = behaviour.stage  # type: ignore[attr-defined]
    staged = 0
    for seed in range(20):
        script = Script(corpus, np.random.default_rng(seed), CONFIG, 96)
        over_s = stage(script, 1.0)
        assert np.isfinite(over_s)
        words = sorted(script.words, key=lambda word: word.onset_s)
        assert all(word.onset_s >= 1.0 and word.end_s <= script.length_s for word in words)
        assert all(a.end_s <= b.onset_s for a, b in itertools.pairwise(words))
        assert all(1.0 <= at_s < script.length_s for at_s, _ in script.deliveries)
        staged += bool(script.words or script.deliveries or script.showings)
    assert staged >= 15


@pytest.mark.parametrize("name", ["recite", "timer"])
def test_go_means_one_thing_by_the_hand_in_view(name: str, corpus: Corpus) -> None:
    asked = 0
    for seed in range(20):
        script = Script(corpus, np.random.default_rng(seed), CONFIG, 96)
        only(name)(script)
        for word in script.words:
            shown = any(s.digit is not None and s.full_s <= word.end_s <= s.gone_s for s in script.showings)
            asked += word.name == "go" and shown == (name == "timer")
    assert asked >= 20
