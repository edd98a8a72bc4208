"""Runs whose answers a vLLM server draws from the adapter (slow: a real vLLM), and what is refused before they start.

`VLLM_PYTHON` names the interpreter of vLLM's environment, where dora_vl is installed too (docs/export.md).
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any, ClassVar, cast
from urllib.request import urlopen

import pytest
import torch
from PIL import Image

from benchmarks.vllm_dora import ENVIRONMENT, LLAVA_ADAPTER, write_adapter, write_llava
from dora_vl.backbones.towers import ImagePreparation, Preparation
from dora_vl.data.pictures import open_image
from dora_vl.errors import SettingError
from dora_vl.run.folder import DRAWN, read_log
from dora_vl.training.extras import vllm as vllm_rollouts
from dora_vl.training.extras.vllm import LOAD, VllmAnswers, VllmServer, as_png
from tests.serving.test_vllm import NO_VLLM, PYTHON
from tests.training.launched import free_port
from tests.training.tiny_run import logged, refused_key, trained, write_run, write_tiny_data, write_tiny_llava

OBJECTIVE = {"loss": "dr_grpo", "group": 4, "max_new_tokens": 6}
OWN = "def letters(example, answer):\n    return sum(letter.isalpha() for letter in answer) / 10\n"


def run_file(folder: Path, base: Path, url: str, **changes: Any) -> Path:
    (folder / "own.py").write_text(OWN)
    objective = {**OBJECTIVE, "rewards": {f"{folder / 'own.py'}:letters": 1.0}, "vllm": url}
    adapter = {"train_projector": False, **changes.pop("adapter", {})}
    data = write_tiny_data(folder / "data", samples=16)
    settings: dict[str, Any] = {"optim": {"projector_learning_rate": None}, **changes}
    return write_run(folder / "run.yaml", base, data, objective=objective, adapter=adapter, **settings)


# -- a real server -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a LLaVA as vLLM opens it."""
    folder = tmp_path_factory.mktemp("vllm")
    llava, _ = write_llava(folder / "llava")
    from transformers import AutoModelForImageTextToText

    adapter = write_adapter(AutoModelForImageTextToText, llava, folder / "adapter", seed=20, **LLAVA_ADAPTER)
    command = ["export", "--for", "vllm", "--adapter", str(adapter), "--to", str(folder / "served")]
    subprocess.run([sys.executable, "-m", "dora_vl.cli", *command], check=True)
    return folder / "served" / "base"


@contextmanager
def served(base: Path, dtype: str, log: Path) -> Iterator[str]:
    port = free_port()
    command = [
        *(str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(base), "--port", str(port)),
        *("--dtype", dtype, "--enable-lora", "--max-lora-rank", "8", "--trust-request-chat-template"),
        *("--enforce-eager", "--no-enable-chunked-prefill", "--max-model-len", "512"),
    ]
    environment = {**os.environ, **ENVIRONMENT, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    with log.open("w") as output:
        server = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        url, end = f"http://127.0.0.1:{port}", time.monotonic() + 300
        while True:
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            try:
                urlopen(f"{url}/health").close()
                break
            except OSError:
                time.sleep(1)
        yield url
    finally:
        server.terminate()
        server.wait(60)


@pytest.mark.slow
@pytest.mark.skipif(PYTHON is None, reason=NO_VLLM)
def test_it_draws_by_the_adapter_of_each_step(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = {"max_steps": 4, "learning_rate": 3e-2, "lr_scheduler_type": "constant", "warmup_steps": 0}
    with served(base, "float32", tmp_path / "server.log") as url:
        made = run_file(tmp_path, base, url, training=training)
        folder = trained(made)
        gaps = [line["log_probs/gap"] for line in logged(folder)]
        assert max(gaps) < 1e-4, gaps
        assert [len(line["answers"]) for line in read_log(folder / DRAWN)] == [4] * 4
        assert all(0 < line["answers/tokens"] <= 6 for line in logged(folder))

        send = VllmAnswers.update_weights
        monkeypatch.setattr(VllmAnswers, "update_weights", lambda self: self.names or send(self))
        stale = [line["log_probs/gap"] for line in logged(trained(made, name="stale"))]
        assert stale[0] < 1e-4
        assert stale[-1] > 0.05  # what a server that missed the steps would show

        assert refused_key(made, "--adapter.train_projector=true", "--overwrite=true") == "objective.vllm"


@pytest.mark.slow
@pytest.mark.skipif(PYTHON is None, reason=NO_VLLM)
def test_in_bfloat16_it_differs_as_the_model_itself_does(base: Path, tmp_path: Path) -> None:
    training = {"max_steps": 3, "learning_rate": 1e-2, "warmup_steps": 0}
    with served(base, "bfloat16", tmp_path / "server.log") as url:
        made = run_file(tmp_path, base, url, training=training, model={"dtype": "bfloat16"})
        by_server = [line["log_probs/gap"] for line in logged(trained(made, name="server"))]
    by_itself = [line["log_probs/gap"] for line in logged(trained(made, "--objective.vllm=null", name="itself"))]
    assert 0 < max(by_server) < 3 * max(by_itself)


# -- without one ---------------------------------------------------------------------------------------------------


class Answer(BaseHTTPRequestHandler):
    """Says what a vLLM server says of itself."""

    root, paths = "", {LOAD: {}}

    def do_GET(self) -> None:
        body = {"data": [{"id": "base", "root": self.root}]} if "models" in self.path else {"paths": self.paths}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""


@pytest.fixture
def stated(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.slow
def test_a_server_that_does_not_fit_is_refused_before_training(stated, tmp_path, monkeypatch) -> None:
    tiny = write_tiny_llava(tmp_path / "base")
    monkeypatch.setattr(Answer, "root", "another/base")
    assert refused_key(run_file(tmp_path, tiny, stated)) == "objective.vllm"
    monkeypatch.setattr(Answer, "root", str(tiny))
    monkeypatch.setattr(Answer, "paths", {})
    assert refused_key(run_file(tmp_path, tiny, stated)) == "objective.vllm"
    assert refused_key(run_file(tmp_path, tiny, f"http://127.0.0.1:{free_port()}")) == "objective.vllm"


class Unwell(BaseHTTPRequestHandler):
    """Gives the answers of a list, one for each request: a status and a body."""

    answers: ClassVar[list[tuple[int, str]]] = []

    def do_GET(self) -> None:
        status, body = self.answers.pop(0)
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""


@pytest.mark.parametrize(
    ("answers", "tried", "is_read"),
    [
        ([(500, "busy"), (503, "busy"), (200, '{"data": [1]}')], 3, True),
        ([(500, "busy")] * 4, 3, False),
        ([(429, "wait"), (200, '{"data": [1]}')], 2, True),
        ([(404, "what?"), (200, '{"data": [1]}')], 1, False),
        ([(200, "<html>Sign in</html>")], 1, False),
        ([(200, "[]")], 1, False),
        ([(200, '{"data": []}')], 1, False),
    ],
)
def test_what_may_pass_is_tried_again_and_what_is_no_answer_is_named(answers, tried, is_read, monkeypatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(vllm_rollouts.time, "sleep", waits.append)
    monkeypatch.setattr(Unwell, "answers", [*answers])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Unwell)
    Thread(target=server.serve_forever, daemon=True).start()
    vllm = VllmServer(f"http://127.0.0.1:{server.server_port}", "start", timeout=5)
    if is_read:
        assert vllm.read("/v1/models", "data") == {"data": [1]}
    else:
        with pytest.raises(SettingError) as error:
            vllm.read("/v1/models", "data")
        assert error.value.key == "objective.vllm"
    assert len(answers) - len(Unwell.answers) == tried
    assert waits == sorted(waits)
    assert len(waits) == tried - 1
    server.shutdown()


def test_a_silent_server_is_given_up_and_what_is_no_url_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(vllm_rollouts.time, "sleep", waits.append)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for url in (f"http://127.0.0.1:{silent.getsockname()[1]}", "here"):
            with pytest.raises(SettingError):
                VllmServer(url, "start", timeout=0.2).ask("/v1/models")
    assert waits == []


def completion(*tokens: list[int]) -> dict[str, Any]:
    choices = [
        {"token_ids": ids, "logprobs": {"content": [{"logprob": -0.5} for _ in ids]}, "finish_reason": "stop"}
        for ids in tokens
    ]
    return {"prompt_token_ids": [5, 6], "choices": choices}


@pytest.mark.parametrize("tokens", [[[1]], [[1], []], [[1], [2], [3]]])
def test_answers_that_lack_or_are_empty_are_named(tokens: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_rollouts, "sent", lambda *_: (200, json.dumps(completion(*tokens))))
    prompts = SimpleNamespace(render=lambda *_, **__: SimpleNamespace(text="What?"), bos_token=None)
    answers = VllmAnswers(
        server=VllmServer("http://one", "start", timeout=5),
        backbone=cast(Any, None),
        encoder=cast(Any, SimpleNamespace(prompts=prompts)),
        example_of=lambda _: SimpleNamespace(turns=["a", "b"], images=()),
        reader=None,
        preparation=None,
        base="base",
        max_new_tokens=4,
        never=(),
        names=["step"],
    )
    monkeypatch.setattr(vllm_rollouts, "prompt_of", lambda _: SimpleNamespace(input_ids=torch.tensor([5, 6])))
    with pytest.raises(SettingError, match="row 7"):
        answers.draw([cast(Any, SimpleNamespace(index=0, id="row 7"))], 2, 0)


@pytest.mark.parametrize("aspect", ["pad", "square", "squash"])
def test_a_picture_that_is_sent_gives_the_pixels_that_train(aspect: Any, tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(1)
    shades = torch.randint(0, 256, (40, 31, 3), generator=draw, dtype=torch.uint8)
    Image.fromarray(shades.numpy()).save(tmp_path / "a.png")
    picture = open_image(tmp_path, "a.png")
    preparation = Preparation(image_size=24, mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28))
    ours, clip = (ImagePreparation(preparation, aspect=way) for way in (aspect, "square"))
    pixels = ours.prepare(picture)
    sent = ours.as_picture(pixels)
    torch.testing.assert_close(clip.prepare(sent), pixels, atol=1e-6, rtol=0)
    assert as_png(sent).startswith("data:image/png;base64,")
