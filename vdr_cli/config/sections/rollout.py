"""Settings of sampling."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from vdr_cli.config.paths import PathText
from vdr_cli.config.sections.base import Fraction, Positive, Section


class VllmConfig(Section):
    """Servers that sample when rollout.backend is vllm. They run in a Python environment of their own."""

    python: PathText | None = None
    """Python interpreter of an environment with vLLM; vdr uses it to start a server. None: the servers in `urls` are
    already running."""
    urls: Annotated[list[str], Field(min_length=1)] = ["http://127.0.0.1:8000"]
    """Addresses of the servers; the prompts are split among them. With `python`: the one address on which vdr's server
    listens."""
    push: Literal["directory", "broadcast"] = "directory"
    """Way in which new weights reach the servers. directory: through files in `directory`. broadcast: sent to their
    workers, over NCCL where trainer and servers have separate GPUs and over gloo otherwise; this needs no shared
    directory."""
    directory: PathText | None = None
    """Directory through which weights are handed over; every server must see it under this path. None: vllm/ in the run
    directory."""
    sleep: bool = False
    """Put the server that vdr started to sleep between rollouts: it drops its weights and cache, so that it can share a
    GPU with the trainer, and wakes with the new weights. Needs `python`, a GPU, and rollout.ahead 0."""
    arguments: list[str] = []
    """Extra arguments for a server that vdr starts, e.g. [--max-model-len, "4096"]."""
    start_timeout: Annotated[float, Field(gt=0)] = 600.0
    """Seconds allowed for a server to start, and for a push of weights to finish."""
    request_timeout: Annotated[float, Field(gt=0)] = 600.0
    """Seconds that the completions of one prompt may take."""
    retries: Annotated[int, Field(ge=0)] = 3
    """Retries of a request when a server does not answer."""
    tolerance: Annotated[float, Field(gt=0)] = 0.1
    """Largest allowed mean difference, in nats, between the server's and the trainer's log-probabilities after a
    push."""


class RolloutConfig(Section):
    backend: Literal["transformers", "vllm"] = "transformers"
    """Sampler of completions: the model in this process (transformers), or vLLM servers (vllm)."""
    group_size: Positive = 8
    """G, the number of completions per prompt."""
    max_new_tokens: Positive = 256
    """T_max, the most tokens in a completion; with an environment or tools, in one turn."""
    environment: str | None = None
    """Environment class, as file.py:Class or module:Class, with the same interface as in TRL: one instance per
    completion, whose public methods are tools or which replies in plain text (docs/environments.md). None: a completion
    is one turn."""
    tools: list[str] = []
    """Functions that the model can call, as file.py:function or module:function. They need type hints and docstrings,
    and are offered to the model through the chat template."""
    tool_parser: str = "auto"
    """Format of tool calls: hermes (also for Qwen), llama3, mistral, or your own parser, file.py:function. auto: the
    format that the chat template uses."""
    max_turns: Positive = 8
    """Maximum number of policy turns in an episode, with an environment or tools."""
    episode_tokens: Positive | None = None
    """Maximum tokens in an episode after its prompt, including those from tools and the environment. None: max_turns x
    max_new_tokens."""
    tool_timeout: Annotated[float, Field(gt=0)] = 60.0
    """Seconds that one call of a tool or an environment method may take."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Temperature for sampling and for all log-probabilities in the loss."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Sample from the k likeliest tokens; 0: from all tokens."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the smallest set of tokens whose total probability reaches this."""
    min_p: Fraction = 0.0
    """Sample from tokens whose probability is at least this fraction of the likeliest token's."""
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    """Penalty on the scores of tokens that have already occurred, as in transformers; 1: off."""
    stop: list[Annotated[str, Field(min_length=1)]] = []
    """A completion ends after any of these strings."""
    ahead: Literal[0, 1] = 0
    """1: vLLM servers sample the next step's completions while the trainer is still updating, from the weights before
    that update. This turns on truncated importance sampling (grpo.importance_cap, 2 unless set) and needs backend vllm.
    0: sample from the newest weights."""
    members: bool = False
    """Sample each group from one dropout member of `disagreement` instead of the policy (Thompson sampling), with or
    without a bonus. This turns on truncated importance sampling against the policy (grpo.importance_cap, 2 unless set).
    Not available with backend vllm."""
    batch_tokens: Positive = 262_144
    """Maximum tokens decoded at once on a rank, counting prompts and full-length completions; bounds the key-value
    cache."""
    cuda_graphs: Literal["auto", "on", "off"] = "auto"
    """With the transformers backend, replay each decoding step from a CUDA graph: one launch per step instead of about
    a thousand. auto: on GPUs, for models with plain attention."""
    vllm: VllmConfig = VllmConfig()
    """The vLLM servers."""

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
                "vllm.sleep needs a server that vdr starts and that is idle during the update: set "
                "vllm.python, and ahead to 0"
            )
        if self.members and self.backend == "vllm":
            raise ValueError(
                "members is true but backend is vllm, which samples from the plain model: set backend to transformers"
            )
        return self
