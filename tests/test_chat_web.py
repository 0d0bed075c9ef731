"""The server program: its flags, its sentences, and one life from start to SIGTERM."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from fake_engine import byte_tokenizer, until
from tiny_engine import CONFIG, random_model

from nanochat.checkpoint import save_checkpoint
from nanochat.common import UserError, base_dir, run_script
from nanochat.server import Defaults
from scripts import chat_web

ROOT = Path(__file__).resolve().parent.parent


def save_stage(stage):
    tokenizer = byte_tokenizer()
    tokenizer.save(base_dir() / "tokenizer")
    state = {"stage": stage, "step": 1, "model_config": vars(CONFIG), "args": {}, "kernels": {},
             "tokenizer_fingerprint": tokenizer.fingerprint}
    save_checkpoint(base_dir() / "checkpoints" / stage / "d2", 1, {"model": random_model().state_dict()}, state)


@pytest.fixture
def served(monkeypatch):
    """What the program would have served."""
    apps = []
    monkeypatch.setattr(chat_web, "serve", lambda app, listener: apps.append((app, listener.getsockname())))
    return apps


def sentence(capsys, *flags):
    """Run the program as its command line does; return its one sentence."""
    with pytest.raises(SystemExit) as stop:
        run_script(lambda: chat_web.parse_args(["--port", "0", "--device", "cpu", *flags]), chat_web.main)
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "example.org", ""])
def test_an_address_that_others_reach_needs_a_token(host, monkeypatch):
    monkeypatch.delenv("NANOCHAT_TOKEN", raising=False)
    with pytest.raises(UserError, match="needs --token or NANOCHAT_TOKEN"):
        chat_web.check_access(host, None)
    chat_web.check_access(host, "secret")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.0.0.2"])
def test_this_machine_s_own_address_needs_none(host):
    chat_web.check_access(host, None)


@pytest.mark.parametrize("token", ["", " ", "a ", "a\nb", "schlüssel"])
def test_a_token_that_no_header_can_carry_is_refused(token, capsys):
    assert "--token must be printable ASCII" in sentence(capsys, "--token", token)


def test_flags_become_settings(served, monkeypatch):
    save_stage("sft")
    monkeypatch.setenv("NANOCHAT_TOKEN", "from-env")
    flags = ("--port 0 --device cpu --host localhost --allow-host Box.lan --queue 3 --queue-timeout 2 --temperature 0 "
             "--top-k 0 --max-tokens 9 --max-batch 5 --tools off --log-text")
    chat_web.main(chat_web.parse_args(flags.split()))
    ((app, (host, port)),) = served
    settings = app.state.pool.settings
    assert (settings.token, settings.queue, settings.queue_timeout, settings.log_text) == ("from-env", 3, 2.0, True)
    assert settings.allowed_hosts == {"localhost", "box.lan"} and host == "127.0.0.1" and port > 0
    assert settings.defaults == Defaults(0.0, 0, 1.0, 0.0, 9)
    (worker,) = app.state.pool.workers
    engine = worker.factory()
    assert engine.max_batch == 5 and engine.tools == "off" and engine.context == CONFIG.sequence_len


def test_a_core_is_left_to_the_event_loop(served, monkeypatch):
    save_stage("sft")
    threads = []
    monkeypatch.setattr("torch.set_num_threads", threads.append)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2, 3})
    for cores in ("2", None):  # who sets the number keeps it
        monkeypatch.delenv("OMP_NUM_THREADS") if cores is None else monkeypatch.setenv("OMP_NUM_THREADS", cores)
        chat_web.main(chat_web.parse_args(["--port", "0", "--device", "cpu"]))
        served.pop()[0].state.pool.workers[0].factory()
    assert threads == [3]


def test_without_flags_the_defaults_hold(served, capsys, monkeypatch):
    monkeypatch.delenv("NANOCHAT_TOKEN", raising=False)
    save_stage("sft")
    save_stage("rl")
    chat_web.main(chat_web.parse_args(["--port", "0", "--device", "cpu"]))
    ((app, (host, port)),) = served
    assert app.state.pool.settings.defaults == Defaults() and app.state.pool.settings.token is None
    assert capsys.readouterr().out == f"stage rl at http://127.0.0.1:{port}\n"  # the newest stage


def test_a_taken_port_is_one_sentence(capsys):
    save_stage("sft")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        want = rf"error: --host 127\.0\.0\.1 --port {port} must be an address that is free, it is not \(.*\)"
        assert re.fullmatch(want, sentence(capsys, "--port", str(port)))
    assert "--port 99999 must be" in sentence(capsys, "--port", "99999")
    assert "--host no.such.host.invalid --port" in sentence(capsys, "--host", "no.such.host.invalid", "--token", "t")


def test_no_checkpoint_is_one_sentence(capsys):
    assert "needs a checkpoint of rl, sft, mid" in sentence(capsys)
    save_stage("sft")
    assert "the model could not be loaded: " in sentence(capsys, "--stage", "base")
    assert "has no checkpoint of step 7" in sentence(capsys, "--step", "7")


@pytest.mark.parametrize("flags", [["--queue", "0"], ["--max-batch", "0"], ["--temperature", "-1"], ["--top-p", "2"],
                                   ["--tools", "shell"], ["--stage", "x"], ["--max-tokens", "0"], ["--port", "x"]])
def test_a_flag_out_of_range_is_refused(flags, capsys):
    assert flags[0] in sentence(capsys, *flags)


@pytest.mark.slow
def test_from_start_to_sigterm_in_the_middle_of_a_stream():
    save_stage("sft")
    program = subprocess.Popen([sys.executable, "-m", "scripts.chat_web", "--port", "0", "--device", "cpu"], cwd=ROOT,
                               env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    try:
        url = program.stdout.readline().split()[-1]

        def healthy():
            with contextlib.suppress(urllib.error.HTTPError):
                with urllib.request.urlopen(f"{url}/health", timeout=10) as answer:
                    return json.load(answer) == {"status": "ok"}

        until(healthy, 60)
        body = {"messages": [{"role": "user", "content": "hi"}], "stream": True, "max_tokens": 80, "ignore_eos": True}
        request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as stream:
            assert b'"role":"assistant"' in stream.readline()
            program.send_signal(signal.SIGTERM)
            lines = stream.read().decode().splitlines()
        assert lines[-2] == "data: [DONE]" and '"finish_reason":"length"' in lines[-4]  # it could finish
        assert program.wait(30) == -signal.SIGTERM
        assert "Traceback" not in program.stderr.read()
    finally:
        program.kill()
        program.communicate()
