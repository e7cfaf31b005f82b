"""Faults of the engine and the models: optimizer, checkpoints, log-probabilities, adapters."""

from __future__ import annotations

from fault_rows import in_files

ENGINE = in_files(
    "tests/engine",
    ("AdamW's betas swapped", "engine/optimizer.py", "betas=cfg.adam_betas,", "betas=cfg.adam_betas[::-1],", "dapo"),
    ("AdamW's epsilon is torch's", "engine/optimizer.py", "eps=cfg.adam_epsilon,", "eps=1e-8,", "dapo"),
    (
        "linear schedule inverted",
        "engine/optimizer.py",
        '"linear": 1.0 - progress, "',
        '"linear": progress, "',
        "dr_grpo",
    ),
    (
        "cosine schedule inverted",
        "engine/optimizer.py",
        '"cosine": 0.5 * (1.0 + math.cos',
        '"cosine": 0.5 * (1.0 - math.cos',
        "grpo",
    ),
    (
        "warm-up off by one",
        "engine/optimizer.py",
        "* (step + 1) / cfg.warmup_steps",
        "* step / cfg.warmup_steps",
        "dr_grpo",
    ),
    (
        "the schedule forgets the warm-up",
        "engine/optimizer.py",
        "progress = (step - cfg.warmup_steps) /",
        "progress = step /",
        "dr_grpo",
    ),
    (
        "norms and biases decay",
        "engine/optimizer.py",
        "matrices = [p for p in parameters if dimensions(p) > 1]",
        "matrices = [p for p in parameters if dimensions(p) > 0]",
        "zero1",
    ),
    (
        "the loss is averaged over ranks",
        "engine/engine.py",
        "loss * finite * collectives.world_size()",
        "loss * finite",
        "two",
    ),
    (
        "the gradient is clipped at 1 whatever is set",
        "engine/ds_config.py",
        '["gradient_clipping"] = config.train.max_grad_norm',
        '["gradient_clipping"] = 1.0',
        "dapo",
    ),
    (
        "random states are not restored on resume",
        "engine/checkpoint.py",
        "_set_random_states(torch.load(own, weights_only=False))",
        "torch.load(own, weights_only=False)",
    ),
    (
        "the optimizer is not restored on resume",
        "engine/checkpoint.py",
        "load_optimizer_states=True",
        "load_optimizer_states=False",
        "resumed",
    ),
    (
        "a reference that is synchronised stays",
        "engine/reference.py",
        "target.data.copy_(source.data)",
        "target.data.copy_(target.data)",
        "kl_loss",
    ),
)

MODELS = in_files(
    "tests/models",
    (
        "end tokens of generation_config ignored",
        "models/loading.py",
        'for value in (getattr(generation, "eos_token_id", None), tokenizer.eos_token_id):',
        "for value in (tokenizer.eos_token_id,):",
        "ends",
    ),
    ("the entropy's sign", "models/logprobs.py", ".mul_(log_p).sum(1).neg_()", ".mul_(log_p).sum(1)", "dapo"),
    (
        "the gradient forgets the temperature",
        "models/logprobs.py",
        "else grad_logps / settings.temperature",
        "else grad_logps",
        "sapo",
    ),
    (
        "logits of the next token",
        "models/policy.py",
        "return hidden[:, prompt_ids.shape[1] - 1 :]",
        "return hidden[:, prompt_ids.shape[1] - 2 : -1]",
        "dapo",
    ),
    ("the adapters' scale", "models/adapters.py", "lora_alpha=cfg.alpha,", "lora_alpha=cfg.rank,", "lora"),
    ("adapters are drawn under seed 0", "models/adapters.py", "manual_seed(seed)", "manual_seed(0)", "lora"),
)
