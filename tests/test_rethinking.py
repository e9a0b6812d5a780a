"""The background model of our own: reading a hand again, its server, and the demonstration that counts what becomes of a *no*."""

from __future__ import annotations

import base64
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch
from test_loop import echo_graph, write_manifest

import export.rethink
from device.bundle import GRAPH_NAME
from device.config import ModelConfig, TextConfig, TrunkConfig
from device.engine import HostMemory, allocate
from device.reach.context import Journal, Tick, messages, png
from export.cli import main
from export.distill.behaviours import ACTS, DIGITS, WORDS
from export.distill.corpus import Corpus
from export.distill.losses import Auxiliary, perceived
from export.distill.model import TickModel
from export.distill.rereading import MANY_LOOKS, ONE_LOOK, Rereader, view
from export.hands import draw_hand
from export.rethink import Demonstration, Doubt, Tally
from export.serve_teacher import REQUEST_BYTES, Teacher, TeacherServer, decide

CONFIG = ModelConfig(
    text=TextConfig(words=WORDS, acts=ACTS),
    trunk=TrunkConfig(width=32, heads=2, mlp=32, perceive_layers=2, present_layers=1, perceive_window=3, present_window=5),
)
SIZE = (CONFIG.video.height, CONFIG.video.width)


class Grey:
    """Reads the brightness of a picture: 0 is no hand, 10 · (digit + 1) that digit, with the digit above as second choice."""

    def probabilities(self, picture: np.ndarray) -> np.ndarray:
        assert picture.shape == (*SIZE, 3)
        looks = np.full(11, 0.01, np.float32)
        label = round(float(picture.mean()) / 10)
        looks[label] += 0.6
        looks[label % 10 + 1] += 0.3
        return looks


def grey(digit: int | None) -> np.ndarray:
    return np.full((*SIZE, 3), 0 if digit is None else 10 * (digit + 1), np.uint8)


# --- reading again ----------------------------------------------------------------------------------------------------------------


def test_one_look_is_what_training_reads_and_many_are_the_mean_of_their_views() -> None:
    torch.manual_seed(0)
    model, heads = TickModel(CONFIG), Auxiliary(CONFIG)
    reader = Rereader(model, heads)
    picture = np.random.default_rng(0).integers(0, 255, (*SIZE, 3), dtype=np.uint8)
    batch = {
        "mic": torch.zeros(1, CONFIG.tick_samples + CONFIG.context_samples),
        "voice": torch.zeros(1, CONFIG.tick_samples + CONFIG.context_samples),
        "frames": torch.from_numpy(np.stack([picture, picture])[None]),
    }
    with torch.no_grad():
        trained = perceived(model, heads, batch)[1][0].softmax(-1).numpy()
    np.testing.assert_allclose(reader.probabilities(picture, ONE_LOOK), trained, atol=1e-6)
    looks = [reader.probabilities(view(picture, *how), ONE_LOOK) for how in MANY_LOOKS]
    np.testing.assert_allclose(reader.probabilities(picture), np.mean(looks, 0), atol=1e-6)
    assert np.ptp(looks, axis=0).max() > 1e-3, "the views differ"


def test_a_view_is_the_picture_moved() -> None:
    picture = np.random.default_rng(0).integers(0, 255, (*SIZE, 3), dtype=np.uint8)
    np.testing.assert_array_equal(view(picture, 0, 0, False), picture)
    np.testing.assert_array_equal(view(picture, 0, 0, True), picture[:, ::-1])
    np.testing.assert_array_equal(view(picture, 14, -3, False)[:-3, 14:], picture[3:, :-14])
    np.testing.assert_array_equal(view(picture, 14, 0, False)[:, :14], np.repeat(picture[:, :1], 14, 1))


def test_the_checkpoint_in_the_repository_reads_drawn_hands(repository: Path) -> None:
    reader = Rereader.read(repository / "export" / "checkpoints" / "companion-nano")
    rng = np.random.default_rng(0)
    empty = np.full((*SIZE, 3), 128, np.uint8)

    def read(digit: int) -> str:
        picture = empty.copy()
        picture[10:110, 30:130] = draw_hand(digit, rng, 100)
        return decide(reader.probabilities(picture)[None], None)

    answers = [read(digit) for digit in range(10)]
    assert sum(answer == f"tell {digit}" for answer, digit in zip(answers, DIGITS, strict=True)) >= 9, answers
    assert decide(reader.probabilities(empty)[None], None) == "tell sorry"


def test_what_was_denied_is_not_told_again() -> None:
    three, nothing = Grey().probabilities(grey(3)), Grey().probabilities(grey(None))
    assert decide(np.stack([three]), None) == "tell three"
    assert decide(np.stack([three]), "four") == "tell three"
    assert decide(np.stack([three]), "three") == "tell four"
    assert decide(np.stack([three, nothing]), None) == "tell three", "a picture without a hand does not count"
    assert decide(np.stack([nothing]), "three") == "tell sorry"


# --- the server -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def served() -> Iterator[TeacherServer]:
    server = TeacherServer(Teacher(Grey(), SIZE), "owl", port=0, key="sk-secret")
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def question(digit: int | None, said: str | None) -> list[dict[str, Any]]:
    """What the device itself writes of a run in which `said` was said and denied."""
    journal, heard = Journal(CONFIG, sound=False), np.full(CONFIG.tick_samples, 0.01, np.float32)
    for k in range(20):
        words = (said,) if said and k == 5 else ()
        act = {12: "shake", 19: "ask"}.get(k, "none")
        journal.note(Tick(k, 0.2 * (k + 1), ("tell", "two") if k == 2 else (), words, act, False, 0.1, 6.0, 0, 0), grey(digit), heard, ())
    return messages(journal.package(1, grey(digit)), ("one", "two"))


def test_the_openai_library_gets_an_answer_streamed_and_whole(served: TeacherServer) -> None:
    with openai.OpenAI(api_key="sk-secret", base_url=served.url, max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["owl"]
        for digit, said, answer in (
            (3, None, "tell three"),
            (3, "three", "tell four"),
            (3, "two", "tell three"),
            (None, "two", "tell sorry"),
        ):
            asked: Any = question(digit, said)
            whole = client.chat.completions.create(model="owl", messages=asked)
            assert whole.choices[0].message.content == answer
            chunks = list(client.chat.completions.create(model="owl", messages=asked, stream=True))
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks).split() == answer.split()
            assert len(chunks) > 3 and chunks[-1].choices[0].finish_reason == "stop"


def post(url: str, data: bytes, key: str = "sk-secret", path: str = "/chat/completions") -> tuple[int, str]:
    request = urllib.request.Request(url + path, data, {"Authorization": f"Bearer {key}"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=30) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())["error"]["message"]


def asks(*parts: dict[str, Any]) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": list(parts)}]}).encode()


def picture(url: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "not JSON"),
        (b"[" * 5000, "not JSON"),
        (b"[]", "not a JSON object"),
        (b"{}", "no 'messages'"),
        (b'{"messages": [{"role": "user", "content": [5]}]}', "no 'messages'"),
        (b'{"messages": [{"role": "user", "content": "hello"}]}', "no picture"),
        (asks(picture("https://example.com/hand.png")), "nothing is fetched"),
        (asks(picture("file:///etc/passwd")), "nothing is fetched"),
        (asks(picture(7)), "no 'messages'"),
        (asks(picture("data:image/png;base64,????")), "no 'messages'"),
        (asks(picture("data:image/png;base64," + base64.b64encode(b"no picture").decode())), "not PNG or JPEG"),
        (asks(picture("data:image/png;base64," + base64.b64encode(png(np.zeros((60, 80, 3), np.uint8))[:-30]).decode())), "is broken"),
        (asks(picture("data:image/png;base64," + base64.b64encode(png(np.zeros((8, 5000, 3), np.uint8))).decode())), "4096 pixels"),
        (b" " * (REQUEST_BYTES + 1), "bytes at most"),
    ],
)
def test_a_bad_question_is_refused_and_the_next_one_answered(served: TeacherServer, data: bytes, text: str) -> None:
    try:
        status, message = post(served.url, data)
        assert status == 400 and text in message
    except urllib.error.URLError:  # it hung up on what it had refused to read
        assert len(data) > REQUEST_BYTES
    good = asks(picture("data:image/png;base64," + base64.b64encode(png(np.full((60, 80, 3), 40, np.uint8))).decode()))
    assert "tell three" in post(served.url, good)[1], "of any size"


def test_who_has_no_key_gets_no_answer(served: TeacherServer) -> None:
    assert post(served.url, b"{}", key="sk-other")[0] == 401
    assert post(served.url, b"{}", path="/completions")[0] == 404


def test_a_checkpoint_that_is_none_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve-teacher", "/nowhere"]) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and errors.startswith("copresence-export serve-teacher: /nowhere")


# --- the demonstration ------------------------------------------------------------------------------------------------------------


class Student:
    """Misreads every odd digit as zero, denies when told to, and says what it is told two ticks later."""

    def __init__(self, *_: Any) -> None:
        self.inputs, self.outputs = allocate(CONFIG)
        self.memory = HostMemory(CONFIG, self.inputs, self.outputs)

    def run(self) -> None:
        if not self.inputs["perceive_valid"].any():  # a new session
            self._tick, self._told, self._digit = 0, {}, int(self.inputs["frames"][-1, 0, 0, 0]) // 10 - 1
        text = [WORDS[token] for token in self.inputs["text_in"] if token]
        if text:
            self._told[self._tick + 2] = text[1]
        said = self._told.get(self._tick, "")
        if self._tick == 8:
            said = DIGITS[self._digit] if self._digit % 2 == 0 else "zero"
        self.outputs["say"][...] = (WORDS.index(said), 0)
        self.outputs["act"][...] = ACTS.index({20: "shake", 21: "ask"}.get(self._tick, "none"))
        self.outputs["speech"][...] = 0.1 if said else 0.0
        self._tick += 1


def test_the_demonstration_counts_what_is_said_right_after_no(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "student"
    folder.mkdir()
    (folder / GRAPH_NAME).write_bytes(echo_graph(CONFIG).SerializeToString())
    write_manifest(folder, config=CONFIG)
    monkeypatch.setattr(export.rethink, "OnnxRuntimeEngine", Student)
    monkeypatch.setattr(export.rethink, "load_corpus", lambda *_: corpus)
    monkeypatch.setattr(export.rethink, "render_words", lambda words: {word: np.full(8000, 0.1, np.float32) for word in words if word})
    made = export.rethink.make_scene
    held_up: list[int] = []

    def shown(*arguments: Any, **options: Any) -> Any:
        scene = made(*arguments, **options)
        scene.frames[...] = grey(held_up[-1])
        return scene

    monkeypatch.setattr(export.rethink, "make_scene", shown)
    tally = Tally()
    demonstration = Demonstration(folder, Grey(), tmp_path, "test")
    assert len(demonstration.photographs()) == 10

    def show(digit: int) -> Doubt | None:
        held_up.append(digit)
        return demonstration.show(digit, 0, 0, tally)

    one, two, nine = show(1), show(2), show(9)
    demonstration.close()
    assert two is None and one is not None and nine is not None
    assert (one.digit, one.misread, one.again, one.struck, one.told) == ("one", "zero", "one", "one", "one")
    assert one.shook and one.asked and one.then == ("one",) and one.alone == (), "which takes the background model"
    assert nine.then == ("nine",)

    def counts(table: str) -> dict[str, str]:
        return {line.replace("*", "").split("|")[1].strip(): line.split("|")[2].strip() for line in table.splitlines()[2:]}

    rows = counts(tally.table())
    assert (rows["shown"], rows["said right in one look"], rows["misread: another digit said"]) == ("3", "1", "2")
    assert (rows["is told the right digit"], rows["says the right digit"], rows["– of those that it is told"]) == ("2", "2", "2")
    assert rows["says the right digit without a background model"] == "0"

    held_up.append(0)
    rows = counts(export.rethink.rethink(folder, Grey(), tmp_path, "test", pictures=1, rooms=2, progress=print))
    assert (rows["shown"], rows["said right in one look"]) == ("2", "2")
