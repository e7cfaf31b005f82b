"""The examples of docs/environments.md that need other packages: a TextArena game, an OpenEnv server on loopback."""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.environments.test_docs import files, played
from vdr_cli.config import RolloutConfig
from vdr_cli.rewards.loading import find_function

__all__ = ["files"]


def test_a_textarena_game_is_an_environment(files: Path) -> None:
    """The game's own hints lead to its number; the same seed is the same game."""
    pytest.importorskip("textarena", reason="textarena is not installed: pip install textarena")
    cfg = RolloutConfig(environment=f"{files}/arena.py:GuessTheNumber", max_turns=30)
    own, answers = played(cfg, "Play. ", ["[1]", "words", "[20]"], seed=7)
    assert "The target number is higher" in str(answers[0]) and "Invalid move" in str(answers[1])
    assert "The target number is lower" in str(answers[2])
    assert own._open[0].prompts[0].value.startswith("Play. \nYou are Player 0.")  # type: ignore[union-attr]
    environment = (own._open[0].environments or [])[0]
    secret = environment.game.state.game_state["game_number"]
    own.close()
    again, last = played(cfg, "Play. ", [f"[{secret}]"], seed=7)
    assert last == [None]
    assert again.contract.reward is not None
    assert again.contract.reward.function(environments=again._open[0].environments) == [1.0]
    again.close()


@pytest.fixture
def served(files: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The documented server on a free port; HINTS_URL names it."""
    reason = "openenv-core is not installed: pip install openenv-core"
    pytest.importorskip("openenv.core", reason=reason)
    uvicorn = pytest.importorskip("uvicorn", reason=reason)
    monkeypatch.syspath_prepend(str(files))
    app = find_function(f"{files}/openenv_server.py:app")
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        while not server.started and thread.is_alive():
            time.sleep(0.02)
        monkeypatch.setenv("HINTS_URL", f"http://127.0.0.1:{listening.getsockname()[1]}")
        yield
        server.should_exit = True
        thread.join(60)
    sys.modules.pop("openenv_server", None)


def test_an_openenv_server_is_an_environment(files: Path, served: None) -> None:
    cfg = RolloutConfig(environment=f"{files}/openenv_client.py:Hints")
    calls = [f'<tool_call>{{"name": "guess", "arguments": {{"number": {n}}}}}</tool_call>' for n in ("3", '"x"', "7")]
    own, answers = played(cfg, [{"role": "user", "content": "Play."}], [*calls, "Done."], seed=17)
    assert "higher" in str(answers[0]) and "error" in str(answers[1]) and "right" in str(answers[2])
    assert answers[3] is None
    assert own._open[0].prompts[0].value[-1]["content"] == "Play. Guess a number from 0 to 9."  # type: ignore[index]
    assert own.contract.reward is not None
    assert own.contract.reward.function(environments=own._open[0].environments) == [1.0]
    assert own._open[0].counts[0].failures == 1
    own.close()
