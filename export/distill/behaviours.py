"""What the companion should do: one table of behaviours, each with what people do for it and how a perfect companion reacts.

`stage` puts people's part into a script; `react` looks at one tick and wishes for words and acts. The conduct decides which
wish comes true in which tick, and takes down the trials by which an evaluation judges what another companion did instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import numpy as np

from export.distill.script import Moment, Script

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WORDS = ("", *DIGITS, "ok", "now", "count", "show", "quiet", "talk", "tell", "last", "ask", "sorry")
ACTS = ("none", "look_up", "look_down", "look_left", "look_right", "light_on", "light_off", "nod", "shake", "yield", "ask")
ACT_OF_WORD = {"up": "look_up", "down": "look_down", "left": "look_left", "right": "look_right", "on": "light_on", "off": "light_off"}

# How long after its cause a reaction still counts, in s.
ACT_S, OK_S, SHOW_S, RECITE_S, COUNT_S, WEAVE_S, RECALL_S = 0.6, 1.0, 1.0, 1.0, 0.8, 1.0, 1.0
RECITE_SLACK_S, TIMER_SLACK_S = 0.3, 0.4
TALK_S, NOD_EVERY_S = 3.0, 2.8  # a nod every 2 to 4 s, the first when the talk has gone on for 3
PAUSED_S = 0.5  # so long a silence is a pause to speak in: longer than those within a talk
ASK_S = 5.0

Kind = Literal["say", "act", "silence"]


class Check(NamedTuple):
    """A word or an act that should begin within a span of time, or silence throughout it; in s from captured sample 0.

    Silence with a value means that this word is not begun, without one that nothing sounds. With `after`, an index among the
    trial's checks, the span counts from when that check was met.
    """

    kind: Kind
    value: str
    since_s: float
    until_s: float
    after: int | None = None


@dataclass
class Trial:
    """One thing that should happen; met when all its checks are."""

    behaviour: str
    at_s: float  # what reaction times count from
    checks: list[Check]
    person: str = ""
    detail: float = 0.0  # the timer's seconds, the memory's age in s


class Excuse(NamedTuple):
    """A span of time in which such a reaction is neither asked for nor false."""

    kind: Kind
    since_s: float
    until_s: float


@dataclass
class Wish:
    """A word or act that is due from `due` until `deadline` (ticks, both included)."""

    value: str
    due: int
    deadline: int
    purpose: str


@dataclass
class Recitation:
    """Counting aloud: the number that comes next, the last one wished for, and the tick of number 1 once it was said."""

    person: str
    heard_s: float
    next: int = 1
    asked: int = 0
    first: int | None = None
    checks: list[Check] = field(default_factory=list)


class Wait(NamedTuple):
    """Seconds that are being waited for."""

    due: int
    trial: Trial


class Conduct:
    """How a perfect companion goes on, given what it (or another in its place) has done in the last `memory` ticks."""

    def __init__(self, word_ticks: Mapping[str, int], tick_s: float, memory: int) -> None:
        self._word_ticks, self.tick_s, self.memory = word_ticks, tick_s, memory
        self.quiet_since: float | None = None
        self.closings: int | None = None  # counted so far; None when it is not counting
        self.open_hand = False
        self.recitation: Recitation | None = None
        self.timer: Wait | None = None
        self.answered: tuple[str, str, int, float] | None = None  # the word said for a hand, the right one, its tick, the hand's appearance
        self.pending: list[tuple[str, float]] = []  # results to tell, and when they arrived
        self.last_nod = -(10**6)
        self.silent_from = 0  # the first tick without speech, if nothing new is said
        self.says: list[Wish] = []
        self.acts: list[Wish] = []
        self.trials: list[Trial] = []
        self.excuses: list[Excuse] = []
        self.masks: list[tuple[Kind, int, int]] = []  # ticks first..last in which nobody could say what is right

    # ---- for the behaviours --------------------------------------------------------------------------------------------------------

    def ticks(self, seconds: float) -> int:
        return int(seconds / self.tick_s + 1e-6)

    def speaking(self, tick: int) -> bool:
        """Whether a word that was begun earlier still sounds in what the tick gives."""
        return tick < self.silent_from

    @property
    def quiet(self) -> bool:
        return self.quiet_since is not None

    @property
    def engaged(self) -> bool:
        """Busy with something that owns the voice for a while."""
        return self.recitation is not None or self.timer is not None

    def say(self, word: str, tick: int, within_s: float, purpose: str) -> None:
        """Wish for a word, from `tick` on, as long as it comes in time."""
        if not self.quiet:
            self.says.append(Wish(word, tick, tick + max(self.ticks(within_s) - 1, 1), purpose))

    def act(self, act: str, tick: int, within_s: float = ACT_S) -> None:
        """Wish for an act, from `tick` on, as long as it comes in time."""
        self.acts.append(Wish(act, tick, tick + self.ticks(within_s), act))

    def hush(self, tick: int) -> None:
        """What sounds is broken off, and nothing that was wished for is said any more."""
        self.silent_from = min(self.silent_from, tick)
        self.says.clear()

    def stop(self, at_s: float) -> None:
        """Give up what it is at; `at_s` is the time from which nothing more of it is asked for."""
        if self.recitation is not None:
            first = self.recitation.first
            first_s = 0.0 if first is None else (first + 1) * self.tick_s
            due = []
            for check in self.recitation.checks:
                base_s = 0.0 if check.after is None else first_s
                if base_s + check.until_s <= at_s:
                    due.append(check)
                else:
                    self.excuses.append(Excuse("say", base_s + check.since_s - self.tick_s, at_s + 2 * self.tick_s))
            if due:
                self.trial("recite", self.recitation.heard_s, *due, person=self.recitation.person)
            # Nor is the number that others' words should not have kept it from.
            self.trials = [trial for trial in self.trials if trial.behaviour != "hold" or trial.checks[0].until_s <= at_s]
        self.recitation = self.timer = None
        self.says.clear()

    def trial(self, behaviour: str, at_s: float, *checks: Check, person: str = "", detail: float = 0.0) -> Trial:
        self.trials.append(Trial(behaviour, at_s, list(checks), person, detail))
        return self.trials[-1]

    def skip(self, ticks: int) -> None:
        """So many ticks pass in which nothing happens and that have no number of their own."""
        self.last_nod -= ticks
        if self.answered is not None:
            said, right, tick, seen_s = self.answered
            self.answered = (said, right, tick - ticks, seen_s - ticks * self.tick_s)

    # ---- for the scene -------------------------------------------------------------------------------------------------------------

    def wanted(self, moment: Moment) -> tuple[str, str]:
        """(word, act) that should begin in this tick, "" and "none" for nothing."""
        tick = moment.tick
        for behaviour in BEHAVIOURS:
            behaviour.react(moment, self)
        self.says = [wish for wish in self.says if tick <= wish.deadline]
        self.acts = [wish for wish in self.acts if tick <= wish.deadline]
        word, act = self._due_word(tick), self._due_act(tick)
        return (word.value if word else ""), (act.value if act else "none")

    def performed(self, moment: Moment, word: str, act: str) -> None:
        """Take note of what was really begun in this tick: as wished, something else, or nothing."""
        tick = moment.tick
        if act != "none":
            mine = self._due_act(tick)
            if mine is not None:
                self.acts.remove(mine)
            if act == "nod":
                self.last_nod = tick
            if act == "yield":
                self.silent_from = min(self.silent_from, tick)
        if word:
            wish = self._due_word(tick)
            if wish is not None:
                self.says.remove(wish)
                if wish.purpose == "show":
                    self.answered = (word, wish.value, tick, moment.hand.full_s if moment.hand else moment.edge_s)
                if wish.purpose == "recite" and self.recitation is not None:
                    self.recitation.first = tick if self.recitation.first is None else self.recitation.first
                    self.recitation.next += 1
            self.silent_from = tick + self._word_ticks[word]

    def finish(self, length_s: float) -> None:
        """The scene is over."""
        self.stop(length_s - 0.4)
        if self.quiet_since is not None:
            self.trial("quiet", self.quiet_since, Check("silence", "", self.quiet_since + 2 * self.tick_s, length_s))

    def _due_word(self, tick: int) -> Wish | None:
        return None if self.speaking(tick) or self.quiet else next((wish for wish in self.says if wish.due <= tick), None)

    def _due_act(self, tick: int) -> Wish | None:
        return next((wish for wish in self.acts if wish.due <= tick), None)


class Behaviour(Protocol):
    """One row of the table."""

    name: str
    share: float  # of the segments of a scene that are staged for it

    def stage(self, script: Script, at_s: float) -> float:
        """Put people's part into the script from `at_s` on; returns when it is over, in s."""

    def react(self, moment: Moment, conduct: Conduct) -> None:
        """Wish for what this tick calls for."""


class Quiet:
    """Text `quiet` / `talk`: no speech, acts go on / speech again."""

    name, share = "quiet", 0.05

    def stage(self, script: Script, at_s: float) -> float:
        rng = script.rng
        script.deliver(at_s, "quiet")
        talk_s = Free.fill(script, at_s + rng.uniform(0.1, 0.8), rng.uniform(3.0, 6.0), go=0.15)
        script.deliver(talk_s, "talk")
        if rng.random() < 0.7:
            talk_s = script.show(int(rng.integers(10)), talk_s + rng.uniform(0.4, 1.5), rng.uniform(1.2, 2.5))
        return talk_s + 0.5

    def react(self, moment: Moment, conduct: Conduct) -> None:
        if "quiet" in moment.text and not conduct.quiet:
            conduct.stop(moment.edge_s - conduct.tick_s)
            conduct.hush(moment.tick)
            conduct.pending.clear()
            conduct.quiet_since = moment.edge_s
            conduct.excuses.append(Excuse("say", moment.edge_s - 0.5, moment.edge_s + 0.1))
        if "talk" in moment.text and conduct.quiet_since is not None:
            # The last word before and the first after are as far apart as the loop's own delays.
            conduct.trial("quiet", conduct.quiet_since, Check("silence", "", conduct.quiet_since + 2 * conduct.tick_s, moment.edge_s))
            conduct.quiet_since = None


class Yield:
    """*stop* while it speaks, or is at something: silent, mid-word if need be, and `yield`."""

    name, share = "yield", 0.0  # staged by Recite and Timer

    def stage(self, script: Script, at_s: float) -> float:
        return script.say("stop", at_s)

    def react(self, moment: Moment, conduct: Conduct) -> None:
        tick = moment.tick
        for word in moment.heard:
            if word.command != "stop":
                continue
            if conduct.speaking(tick) or conduct.engaged:
                spoke = conduct.speaking(tick) or conduct.recitation is not None
                if conduct.timer is not None:
                    until_s = (conduct.timer.due + 1) * conduct.tick_s + 1.0
                    conduct.trials.remove(conduct.timer.trial)
                    conduct.trial("cancel", word.end_s, Check("silence", "now", word.end_s, until_s), person=word.speaker)
                    conduct.excuses.append(Excuse("act", word.onset_s, word.end_s + ACT_S))
                conduct.stop(word.onset_s)
                conduct.act("yield", tick)
                conduct.excuses.append(Excuse("say", word.onset_s, word.end_s + ACT_S))
                if spoke:
                    checks = (
                        Check("act", "yield", word.onset_s, word.end_s + ACT_S),
                        Check("silence", "", word.end_s + ACT_S, word.end_s + ACT_S + 0.6),
                    )
                    conduct.trial("yield", word.end_s, *checks, person=word.speaker)
            elif conduct.speaking(tick - 3):  # it fell silent just now: nobody could say whether there was something to stop
                conduct.masks.append(("act", tick, tick + 2))
                conduct.excuses.append(Excuse("act", word.onset_s, word.end_s + ACT_S))


class Timer:
    """*go* while a hand shows n: silent for n seconds, then "now"; *stop* cancels it."""

    name, share = "timer", 0.16

    def stage(self, script: Script, at_s: float, stopped: float = 0.15) -> float:
        """One timer, with probability `stopped` a cancelled one."""
        rng = script.rng
        digit = int(rng.integers(1, 10)) if rng.random() < 0.75 else int(rng.integers(1, 5))
        go_s = at_s + rng.uniform(0.9, 2.2)
        end_s = script.say("go", go_s)
        if end_s <= go_s or script.show(digit, at_s, end_s - at_s + rng.uniform(0.35, 1.5)) <= at_s:
            return at_s
        over_s = end_s + digit
        if rng.random() < stopped:
            stop_s = end_s + rng.uniform(0.6, max(digit - 0.8, 0.7))
            stopped_s = script.say("stop", stop_s)
            return (stopped_s if stopped_s > stop_s else over_s) + rng.uniform(0.6, 2.0)
        if rng.random() < 0.35:
            _meanwhile(script, end_s + 0.5, over_s - 0.3)
        return over_s + rng.uniform(0.9, 1.5)

    def react(self, moment: Moment, conduct: Conduct) -> None:
        tick = moment.tick
        for word in moment.heard:
            if word.command == "go" and moment.hand is not None and _free(conduct):
                n = moment.hand.digit
                now_s = word.end_s + n
                checks = (
                    Check("silence", "", word.end_s + 0.3, now_s - TIMER_SLACK_S) if n else Check("silence", "", now_s, now_s),
                    Check("say", "now", now_s - TIMER_SLACK_S, now_s + TIMER_SLACK_S),
                )
                trial = conduct.trial("timer", now_s, *checks, person=moment.hand.person, detail=n)
                for earlier in conduct.trials:
                    if earlier.behaviour == "cancel":  # forbids "now" no longer than until this timer may say it
                        earlier.checks = [check._replace(until_s=min(check.until_s, now_s - TIMER_SLACK_S)) for check in earlier.checks]
                # The word is heard an offset after the edge, and "go" was over before its own: one tick less is nearer.
                conduct.timer = Wait(tick + max(round(n / conduct.tick_s) - 1, 0), trial)
        if conduct.timer is not None and tick >= conduct.timer.due:
            conduct.say("now", tick, TIMER_SLACK_S + 0.2, "timer")
            conduct.timer = None


class Recite:
    """*go*, no hand in view: counts aloud one to nine, one a second; others' words and noise do not stop it."""

    name, share = "recite", 0.14

    def stage(self, script: Script, at_s: float) -> float:
        rng = script.rng
        end_s = script.say("go", at_s)
        if end_s <= at_s:
            return at_s
        over_s = end_s + 9.0
        kind = rng.random()
        if kind < 0.45:
            stop_s = end_s + rng.uniform(0.4, 8.0)
            stopped_s = script.say("stop", stop_s)
            if rng.random() < 0.5:
                _meanwhile(script, end_s + 0.4, stop_s - 0.2)
            return (stopped_s if stopped_s > stop_s else over_s) + rng.uniform(0.6, 2.0)
        if kind < 0.85:
            _meanwhile(script, end_s + 0.4, over_s - 0.3, commands=0.35)
        return over_s + rng.uniform(0.2, 1.0)

    def react(self, moment: Moment, conduct: Conduct) -> None:
        tick = moment.tick
        for word in moment.heard:
            if word.command == "go" and moment.hand is None and _free(conduct):
                conduct.recitation = Recitation(word.speaker, word.end_s)
                conduct.recitation.checks.append(Check("say", "one", word.end_s, word.end_s + RECITE_S))
        recitation = conduct.recitation
        if recitation is None:
            return
        begun = recitation.first is not None
        if recitation.asked == recitation.next and not any(wish.purpose == "recite" for wish in conduct.says):
            recitation.next += 1 if begun else 9  # the word did not come: keep time, not work
        if recitation.next > 9:
            conduct.stop(np.inf)
            return
        due = tick if recitation.first is None else recitation.first + round((recitation.next - 1) / conduct.tick_s)
        if tick >= due and recitation.asked < recitation.next:
            recitation.asked = recitation.next
            number, k = DIGITS[recitation.next], recitation.next - 1
            conduct.say(number, tick, RECITE_SLACK_S + conduct.tick_s if begun else RECITE_S, "recite")
            if begun:
                recitation.checks.append(Check("say", number, k - RECITE_SLACK_S, k + RECITE_SLACK_S, after=0))


class Hold:
    """Noise, other people's other words, its own echo while it speaks: goes on."""

    name, share = "hold", 0.0  # staged by Recite

    def stage(self, script: Script, at_s: float) -> float:
        return script.say_other(at_s)

    def react(self, moment: Moment, conduct: Conduct) -> None:
        recitation = conduct.recitation
        for word in moment.heard:
            if recitation is None or recitation.first is None or not 1 < recitation.next <= 9 or word.command in ("stop", "go"):
                continue
            next_s = (recitation.first + 1) * conduct.tick_s + recitation.next - 1
            if next_s > word.end_s:
                check = Check("say", DIGITS[recitation.next], next_s - TIMER_SLACK_S, next_s + TIMER_SLACK_S)
                conduct.trial("hold", word.end_s, check, person=word.speaker)


class Count:
    """Text `count`, then a hand opens and closes (5 and 0 in turn): counts each closing aloud; `show` ends it."""

    name, share = "count", 0.13

    def stage(self, script: Script, at_s: float) -> float:
        rng = script.rng
        script.deliver(at_s, "count")
        at_s += rng.uniform(0.3, 1.2)
        open_s, closed_s = rng.uniform(0.6, 1.2), rng.uniform(0.6, 1.2)
        like = None
        for _ in range(rng.integers(1, 8)):
            for digit, seconds in ((5, open_s), (0, closed_s)):
                end_s = script.show(digit, at_s, seconds * rng.uniform(0.85, 1.15), slides=like is None, like=like)
                if end_s <= at_s or end_s > script.length_s:
                    return min(end_s, script.length_s)
                at_s, like = end_s, script.showings[-1].thing
        show_s = at_s + rng.uniform(0.3, 1.0)
        script.deliver(show_s, "show")
        if rng.random() < 0.4:
            return script.show(int(rng.integers(10)), show_s + rng.uniform(0.3, 1.0), rng.uniform(1.2, 2.5)) + 0.4
        return show_s + 0.3

    def react(self, moment: Moment, conduct: Conduct) -> None:
        if "count" in moment.text:
            conduct.closings, conduct.open_hand = 0, moment.hand is not None and moment.hand.digit == 5
        if "show" in moment.text:
            conduct.closings = None
        hand = moment.hand
        if conduct.closings is None or hand is None or not moment.appeared:
            return
        if hand.digit == 0 and conduct.open_hand:
            conduct.closings += 1
            if conduct.closings <= 9:
                word = DIGITS[conduct.closings]
                conduct.say(word, moment.tick, COUNT_S - 0.2, "count")
                if not conduct.quiet:
                    conduct.trial("count", hand.full_s, Check("say", word, hand.full_s, hand.full_s + COUNT_S), person=hand.person)
        conduct.open_hand = hand.digit == 5


class Show:
    """A hand sign for a digit is held up, nothing said: says the digit, once per showing."""

    name, share = "show", 0.0  # staged by Free

    def stage(self, script: Script, at_s: float) -> float:
        return script.show(int(script.rng.integers(10)), at_s, script.rng.uniform(1.0, 3.5))

    def react(self, moment: Moment, conduct: Conduct) -> None:
        hand = moment.hand
        if hand is None or not moment.appeared or not _free(conduct):
            return
        conduct.say(DIGITS[hand.digit], moment.tick, SHOW_S, "show")
        check = Check("say", DIGITS[hand.digit], hand.full_s, hand.full_s + SHOW_S)
        conduct.trial("show", hand.full_s, check, person=hand.person)


class Recall:
    """Text `last`: says the digit of the last hand that it answered once more."""

    name, share = "recall", 0.10

    def stage(self, script: Script, at_s: float) -> float:
        rng = script.rng
        if not script.showings or rng.random() < 0.4:
            at_s = script.show(int(rng.integers(10)), at_s, rng.uniform(1.2, 2.5)) + rng.uniform(0.5, 2.0)
            if rng.random() < 0.7:
                at_s = Free.fill(script, at_s, rng.uniform(1.0, 4.0) if rng.random() < 0.5 else rng.uniform(4.0, 12.0), hands=False)
            script.breaks.append(at_s)
            at_s += rng.uniform(0.3, 1.0)
        script.deliver(at_s, "last")
        return at_s + 1.2

    @staticmethod
    def remember(script: Script, age_s: float) -> float:
        """A hand sign, then words and no hands for so long, then the question what it was."""
        shown_s = float(script.rng.uniform(0.4, 1.0))
        over_s = script.show(int(script.rng.integers(len(DIGITS))), shown_s, script.rng.uniform(1.4, 2.2))
        Free.fill(script, over_s + 0.5, max(age_s - 3.0, 1.0), hands=False)
        return script.deliver(shown_s + age_s, "last")

    def react(self, moment: Moment, conduct: Conduct) -> None:
        if "last" not in moment.text or conduct.answered is None or conduct.quiet:
            return
        said, right, said_tick, seen_s = conduct.answered
        if moment.tick - said_tick >= conduct.memory:  # the model has nothing left of it
            conduct.masks.append(("say", moment.tick, moment.tick + conduct.ticks(RECALL_S)))
            return
        conduct.say(said, moment.tick, RECALL_S, "recall")
        check = Check("say", right, moment.edge_s - conduct.tick_s, moment.edge_s + RECALL_S)
        conduct.trial("recall", moment.edge_s, check, detail=moment.edge_s - seen_s)


class Weave:
    """Text result `tell three` arrives while the person talks: says it when the person has paused."""

    name, share = "weave", 0.12

    def stage(self, script: Script, at_s: float) -> float:
        rng = script.rng
        seconds = rng.uniform(1.0, 5.0)
        over_s = script.talk(at_s, seconds, (0.03, 0.4))
        if over_s <= at_s:
            return at_s
        word = str(rng.choice(DIGITS)) if rng.random() < 0.6 else str(rng.choice(WORDS[1:]))
        quick = rng.random() < 0.2  # nobody is talking
        script.deliver(over_s + rng.uniform(0.6, 1.5) if quick else rng.uniform(at_s + 0.3, max(over_s, at_s + 0.4)), "tell", word)
        return over_s + rng.uniform(1.8, 2.6)

    def react(self, moment: Moment, conduct: Conduct) -> None:
        if "tell" in moment.text:
            told = moment.text[moment.text.index("tell") + 1 :]
            if told and not conduct.quiet:
                conduct.pending.append((told[0], moment.edge_s))
        if conduct.pending and moment.pause_s >= PAUSED_S and not conduct.engaged and not conduct.speaking(moment.tick):
            word, arrived_s = conduct.pending.pop(0)
            conduct.say(word, moment.tick, 0.6, "weave")
            since_s = (
                max(moment.edge_s - moment.pause_s, arrived_s - conduct.tick_s)
                if np.isfinite(moment.pause_s)
                else arrived_s - conduct.tick_s
            )
            conduct.trial("weave", since_s, Check("say", word, since_s, since_s + WEAVE_S))


class Listen:
    """A person nearby talks on: a nod every 2 to 4 s, never a word."""

    name, share = "listen", 0.10

    def stage(self, script: Script, at_s: float) -> float:
        return script.talk(at_s, script.rng.uniform(2.5, 9.0)) + script.rng.uniform(0.8, 2.0)

    def react(self, moment: Moment, conduct: Conduct) -> None:
        tick = moment.tick
        if moment.talk_s < TALK_S or moment.pause_s > 0.5 or any(wish.value == "nod" for wish in conduct.acts):
            return
        if tick - conduct.last_nod >= round(NOD_EVERY_S / conduct.tick_s):
            conduct.act("nod", tick, 0.4)
            conduct.trial("listen", moment.edge_s, Check("act", "nod", moment.edge_s - 1.0, moment.edge_s + 1.0))
            # A perfect companion nods at once; one that is late nods in its own rhythm.
            conduct.last_nod = tick


class Answer:
    """*yes* / *no*: `nod` / `shake`; *no* soon after a digit was said for a hand: `ask` in the next tick, to think harder."""

    name, share = "answer", 0.0  # staged by Free

    def stage(self, script: Script, at_s: float) -> float:
        return script.say(str(script.rng.choice(("yes", "no"))), at_s)

    @staticmethod
    def contradict(script: Script, until_s: float) -> float:
        """Hand signs up to `until_s`, and after most answers to them, while most are still up, a word: every other time *no*."""
        rng, at_s = script.rng, float(script.rng.uniform(0.3, 1.0))
        while at_s < until_s:
            over_s = script.show(int(rng.integers(len(DIGITS))), at_s, rng.uniform(1.0, 3.5))
            word_s, kind = at_s + rng.uniform(0.9, 3.0), rng.random()
            if kind < 0.5:
                end_s = script.say("no", word_s)
            elif kind < 0.85:
                end_s = (Answer if rng.random() < 0.3 else Act)().stage(script, word_s)
            else:
                end_s = script.say_other(word_s)
            at_s = max(over_s, end_s) + rng.uniform(0.4, 1.5)
        return at_s

    def react(self, moment: Moment, conduct: Conduct) -> None:
        tick = moment.tick
        for word in moment.heard:
            if word.command not in ("yes", "no"):
                continue
            act = "nod" if word.command == "yes" else "shake"
            conduct.act(act, tick)
            conduct.trial("answer", word.end_s, Check("act", act, word.onset_s, word.end_s + ACT_S), person=word.speaker)
            if word.command == "no" and conduct.answered is not None and tick - conduct.answered[2] <= round(ASK_S / conduct.tick_s):
                conduct.act("ask", tick + 1, ACT_S)
                check = Check("act", "ask", word.onset_s, word.end_s + ACT_S + 2 * conduct.tick_s)
                conduct.trial("ask", word.end_s, check, person=word.speaker)


class Act:
    """*up down left right on off*: the control token, and "ok"; while it is speaking anyway, the act alone."""

    name, share = "act", 0.0  # staged by Free

    def stage(self, script: Script, at_s: float) -> float:
        return script.say(str(script.rng.choice(list(ACT_OF_WORD))), at_s)

    def react(self, moment: Moment, conduct: Conduct) -> None:
        tick = moment.tick
        for word in moment.heard:
            act = ACT_OF_WORD.get(word.name)
            if act is None:
                continue
            conduct.act(act, tick)
            conduct.trial("act", word.end_s, Check("act", act, word.onset_s, word.end_s + ACT_S), person=word.speaker)
            if not (conduct.quiet or conduct.engaged or conduct.speaking(tick) or conduct.says):
                conduct.say("ok", tick, OK_S, "act")
                conduct.trial("ok", word.end_s, Check("say", "ok", word.onset_s, word.end_s + OK_S), person=word.speaker)


class Free:
    """People and their hands as they come, each in a rhythm of its own: words, signs, things, and what calls for nothing."""

    name, share = "nothing", 0.45

    def stage(self, script: Script, at_s: float) -> float:
        return self.fill(script, at_s, script.rng.uniform(3.0, 9.0))

    @staticmethod
    def fill(script: Script, at_s: float, seconds: float, go: float = 0.0, hands: bool = True) -> float:
        """Words and, with `hands`, signs for so many seconds; a "go" with probability `go` in place of any other word."""
        rng = script.rng
        over_s = word_s = hand_s = at_s
        kind = rng.random()
        while kind > 0.12:  # else nobody says anything
            word_s += 0.25 + rng.exponential(0.9)
            if word_s > at_s + seconds - 0.8:
                break
            what = rng.random()
            if what < go:
                end_s = script.say("go", word_s)
            elif kind < 0.25 or what > 0.72:
                end_s = script.say("stop", word_s) if what > 0.96 and kind > 0.25 else script.say_other(word_s)
            else:
                end_s = (Act if what < 0.45 else Answer)().stage(script, word_s)
            over_s = word_s = max(over_s, end_s)
        kind = rng.random() if hands else 0.0
        while kind > 0.15:
            hand_s += rng.uniform(0.4, 2.4)
            if hand_s > at_s + seconds - 0.9:
                break
            shown = None if rng.random() < 0.15 or kind < 0.25 else int(rng.integers(10))
            end_s = script.show(shown, hand_s, rng.uniform(1.0, 3.5))
            hand_s = max(end_s, hand_s)
            over_s = max(over_s, end_s)
        return max(over_s + 0.4, at_s + seconds)

    def react(self, moment: Moment, conduct: Conduct) -> None:
        """Nothing calls for nothing."""


# In the order in which they look at a tick: what ends something comes first, and "ok" is said when nothing else is.
BEHAVIOURS: tuple[Behaviour, ...] = (
    Quiet(),
    Yield(),
    Hold(),
    Timer(),
    Recite(),
    Count(),
    Show(),
    Recall(),
    Weave(),
    Answer(),
    Act(),
    Listen(),
    Free(),
)


def _free(conduct: Conduct) -> bool:
    """Whether the voice is its own to use: not told to be quiet, not counting, not at something."""
    return not conduct.quiet and conduct.closings is None and not conduct.engaged


def _meanwhile(script: Script, since_s: float, until_s: float, commands: float = 0.0) -> None:
    """Other people's words while the companion is at something; with probability `commands` one that it should act on."""
    rng = script.rng
    at_s = since_s + rng.exponential(0.8)
    while at_s < until_s - 0.8:
        command: Behaviour = Act() if rng.random() < 0.7 else Answer()
        end_s = command.stage(script, at_s) if rng.random() < commands else script.say_other(at_s)
        at_s = end_s + 0.2 + rng.exponential(1.2)
