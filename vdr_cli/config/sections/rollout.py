"""Settings of sampling."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from vdr_cli.config.paths import PathText
from vdr_cli.config.sections.base import Fraction, Positive, Section


class VllmConfig(Section):
    """Servers that sample when rollout.backend is vllm. They live in an environment of their own."""

    python: PathText | None = None
    """Interpreter of an environment with vLLM: vdr starts a server with it. None: the servers in `urls` are already
    running."""
    urls: Annotated[list[str], Field(min_length=1)] = ["http://127.0.0.1:8000"]
    """Addresses of the servers, which share the prompts. With `python`: the one on which vdr's server listens."""
    push: Literal["directory", "broadcast"] = "directory"
    """The way new weights reach the servers: through `directory`, or by broadcast to their workers (NCCL where trainer
    and servers have GPUs of their own, else gloo), which needs no directory that both sides see."""
    directory: PathText | None = None
    """The directory that hands weights over; every server must see it under this path. None: vllm/ in the run
    directory."""
    sleep: bool = False
    """Between rollouts the server that vdr started drops its weights and cache, so that it can share a GPU with the
    trainer; it wakes with the new weights. Needs `python`, a GPU, and rollout.ahead 0."""
    arguments: list[str] = []
    """More arguments for a server that vdr starts, e.g. [--max-model-len, "4096"]."""
    start_timeout: Annotated[float, Field(gt=0)] = 600.0
    """Seconds allowed for a server to start, and for a push of weights to finish."""
    request_timeout: Annotated[float, Field(gt=0)] = 600.0
    """Seconds one prompt's completions may take."""
    retries: Annotated[int, Field(ge=0)] = 3
    """Retries of a request when a server does not answer."""
    tolerance: Annotated[float, Field(gt=0)] = 0.1
    """Nats; largest mean difference between the server's and the trainer's log-probabilities after a push."""


class RolloutConfig(Section):
    backend: Literal["transformers", "vllm"] = "transformers"
    """The sampler: the model in this process, or vLLM servers."""
    group_size: Positive = 8
    """G, completions per prompt."""
    max_new_tokens: Positive = 256
    """T_max, the longest completion in tokens; with an environment or tools the longest turn."""
    environment: str | None = None
    """file.py:Class or module:Class of an environment, in TRL's contract: an instance for each completion, whose public
    methods are tools, or which answers in plain text (docs/environments.md). None: a completion is one turn."""
    tools: list[str] = []
    """Functions that the model can call, file.py:function or module:function, with types and docstrings; offered
    through the chat template."""
    tool_parser: str = "auto"
    """Form of tool calls: hermes (Qwen too), llama3, mistral, or file.py:function of your own; auto: as the chat
    template writes them."""
    max_turns: Positive = 8
    """Most turns of the policy in an episode, with an environment or tools."""
    episode_tokens: Positive | None = None
    """Most tokens of an episode after its prompt, those of tools and environment included. None: max_turns x
    max_new_tokens."""
    tool_timeout: Annotated[float, Field(gt=0)] = 60.0
    """Seconds that one call of a tool or of a method of the environment may take."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Temperature of sampling and of all log-probabilities in the loss."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Sample from the k likeliest tokens; 0: from all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the smallest set of tokens with this much probability."""
    min_p: Fraction = 0.0
    """Sample from tokens with at least this share of the likeliest one's probability."""
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    """Divisor of the scores of tokens that occurred already; 1: off."""
    stop: list[Annotated[str, Field(min_length=1)]] = []
    """A completion ends after any of these strings."""
    ahead: Literal[0, 1] = 0
    """1: vLLM servers sample each step's completions while the trainer updates the step before, under the weights from
    before that update; truncated importance sampling is then on (grpo.importance_cap, 2 unless it is given). Only with
    backend vllm. 0: from the newest weights."""
    members: bool = False
    """Sample each group from one dropout member of `disagreement` instead of the policy (Thompson sampling): members
    act, they need not be paid for. Truncated importance sampling against the policy is then on (grpo.importance_cap, 2
    unless it is given). Not with backend vllm."""
    batch_tokens: Positive = 262_144
    """Most tokens (prompts and completions at full length) decoded at once on a rank; bounds the key-value cache."""
    cuda_graphs: Literal["auto", "on", "off"] = "auto"
    """Replay token steps from CUDA graphs, with the transformers backend: one launch per step instead of about a
    thousand. auto: on a GPU, for models with plain attention."""
    vllm: VllmConfig = VllmConfig()
    """Servers of backend vllm."""

    @property
    def takes_turns(self) -> bool:
        """True when a completion can have several turns."""
        return self.environment is not None or bool(self.tools)

    @property
    def completion_tokens(self) -> int:
        """T_max: most tokens of a completion, an environment's included."""
        if not self.takes_turns:
            return self.max_new_tokens
        return self.episode_tokens or self.max_turns * self.max_new_tokens

    @property
    def length_setting(self) -> str:
        """The setting that bounds a completion, as errors name it."""
        return "rollout.episode_tokens" if self.takes_turns else "rollout.max_new_tokens"

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.episode_tokens is not None and not self.takes_turns:
            raise ValueError("episode_tokens is set without environment or tools: set max_new_tokens instead")
        if self.ahead and self.backend == "transformers":
            raise ValueError(
                "ahead is 1 but backend is transformers, which samples and updates on the same device: set backend to "
                "vllm or ahead to 0"
            )
        if self.vllm.sleep and (self.vllm.python is None or self.ahead):
            raise ValueError(
                "vllm.sleep is for a server that vdr starts, and that rests while the trainer updates: set "
                "vllm.python, and ahead to 0"
            )
        if self.members and self.backend == "vllm":
            raise ValueError(
                "members is true but backend is vllm, which samples from the plain model: set backend to transformers"
            )
        return self
